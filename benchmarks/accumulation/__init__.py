"""The balance losses' gradient under gradient accumulation, against that of the whole batch at once.

    OMP_NUM_THREADS=1 python -m benchmarks accumulation --out benchmarks/accumulation/record.json

A batch of drawn pets (or of white noise, which leaves experts nearly balanced) goes through the small model of
`study.py` (plain patches, since BatchNorm in a convolutional stem sees micro-batches one by one) in one piece, and in K
micro-batches on one or two processes, with gradients divided by K and averaged over processes as Lightning and DDP do.
The routers' noise is drawn once for the whole batch and replayed. Their weights are drawn too (those of learned noise
start at 0, where nothing is unbalanced). Compared are the gradients of all router parameters, in float64: the
projection on the whole batch's gradient (1 is right; without the factor m it is about (1 + 1/2 + ... + 1/K) / K), the
ratio of norms and the cosine, each the mean over draws of weights and images.

Axes: B images, N tokens, E experts, K micro-batches.
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import about, argument_parser
from benchmarks.lines import write_lines
from benchmarks.markdown import table
from benchmarks.study import IMAGE_SIZE, MODEL
from moevision.data import SyntheticPets
from moevision.layers import forward_routing, moe_layers
from moevision.losses import AuxLoss, AuxLossWeights
from moevision.models.config import MoEConfig, build_model

CASES = {"z": "switch", "load_balancing": "switch", "importance": "vmoe_top_k", "load": "noisy_top_k"}
"""The losses, each on a router that has it by default (z: on any)."""
KINDS = ("pets", "noise")
PARTS = (1, 2, 4, 8, 16)


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("accumulation", __doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[256, 32], help="B, multiples of 32 (%(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="of weights and images (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    origin = about()
    sizes = (options.images, options.draws)
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(Path(folder), *sizes)
        torch.multiprocessing.spawn(_process, (Path(folder), *sizes), nprocs=2)
        rows += torch.load(Path(folder) / "rows.pt")
    print(table_of(rows))
    if options.out:
        settings = {"images": options.images, "draws": options.draws, "model": MODEL, "stem": "patch"}
        write_lines(options.out, {"settings": settings, "rows": rows, "provenance": origin})


def table_of(rows: list[dict[str, Any]]) -> str:
    """Projection (least to most over draws) and cosine: a line for each loss, a column for each number of parts."""
    cells: dict[tuple[str, str, int], list[str]] = {}
    for row in rows:
        if row["parts"] > 1:
            text = "{projection:.2f} ({least:.2f} to {most:.2f}), {cosine:.3f}".format(**row)
            cells.setdefault((f"{row['images']} {row['kind']}", row["loss"], row["processes"]), []).append(text)
    heads = ["images", "loss", "processes", *(f"K = {parts}" for parts in PARTS[1:])]
    return table(heads, [[*map(str, key), *found] for key, found in cells.items()])


def _process(rank: int, folder: Path, images: list[int], draws: int) -> None:
    """One of two processes; the first one leaves their rows in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = _measure(folder, images, draws, rank, processes=2)
    dist.destroy_process_group()
    if rank == 0:
        torch.save(rows, folder / "rows.pt")


def _measure(folder: Path, images: list[int], draws: int, rank: int = 0, processes: int = 1) -> list[dict[str, Any]]:
    """A row for each batch, loss and number of parts; one process alone leaves the whole batches' gradients behind."""
    rows = []
    for kind, size, (loss, router) in product(KINDS, images, CASES.items()):
        batches = [Batch(loss, router, seed, kind, size) for seed in range(draws)]
        at_once = folder / f"{kind}-{size}-{loss}.pt"
        if processes == 1:
            torch.save([batch.gradient(1) for batch in batches], at_once)
        whole = torch.load(at_once)
        for parts in PARTS:
            pairs = [(batch.gradient(parts, rank, processes), g) for batch, g in zip(batches, whole, strict=True)]
            key = {"kind": kind, "images": size, "loss": loss, "router": router}
            rows.append({**key, "processes": processes, "parts": parts, **_compare(pairs)})
    return rows


class Batch:
    """One draw of weights, images and noise.

    Args:
        loss: name of the balance loss.
        router: name of the router.
        seed: of everything.
        kind: of images.
        images: B.
    """

    def __init__(self, loss: str, router: str, seed: int, kind: str, images: int) -> None:
        torch.manual_seed(seed)
        net = build_model(MoEConfig(**MODEL, router=router, stem="patch"), 8, IMAGE_SIZE)
        self.net: nn.Module = net.double().train()
        self.layers = moe_layers(self.net)
        for layer in self.layers:
            for parameter in layer.router.parameters():
                nn.init.normal_(parameter, std=MODEL["embed_dim"] ** -0.5)
        if kind == "pets":
            pets = SyntheticPets(images, IMAGE_SIZE, seed)
            pixels = np.stack([np.asarray(pets[index][0]) for index in range(images)])
            self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 127.5 - 1
        else:
            self.images = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
        self.noise = [torch.randn(images, 16, 8, dtype=torch.float64) for _ in self.layers]
        weights = {**dict.fromkeys(("importance", "load", "load_balancing", "z"), 0.0), loss: 1.0}
        self.aux = AuxLoss(AuxLossWeights(**weights))
        self.aux.check(self.net)

    def gradient(self, parts: int, rank: int = 0, processes: int = 1) -> Tensor:
        """What one optimizer step sees of the loss: the gradients of all router parameters, one after the other."""
        self.net.zero_grad()
        self.aux.start_window()
        # Micro-batches go round the processes.
        for rows in torch.arange(len(self.images)).chunk(parts * processes)[rank::processes]:
            noise = iter(self.noise)
            with patch.object(torch, "randn_like", lambda _, noise=noise, rows=rows: next(noise)[rows]):
                _, routings = forward_routing(self.net, self.images[rows])
            value, _ = self.aux(routings)
            assert value is not None
            (value / parts).backward()
        found = [p.grad.flatten() for layer in self.layers for p in layer.router.parameters() if p.grad is not None]
        total = torch.cat(found)
        if processes > 1:
            dist.all_reduce(total)
        return total / processes


def _compare(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Gradients beside those of the whole batch, over draws."""
    projections = [float(found @ whole / whole.square().sum()) for found, whole in pairs]
    return {
        "projection": mean(projections),
        "least": min(projections),
        "most": max(projections),
        "norm_ratio": mean(float(found.norm() / whole.norm()) for found, whole in pairs),
        "cosine": mean(float(F.cosine_similarity(found, whole, dim=0)) for found, whole in pairs),
    }
