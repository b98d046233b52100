"""What travels between processes under expert parallelism, and how long they wait for each other where load is uneven.

    OMP_NUM_THREADS=1 python -m benchmarks waiting --out benchmarks/waiting/runs.jsonl
    python -m benchmarks waiting --draw benchmarks/waiting/runs.jsonl

A network of `study.py`'s size with 8 experts, one per token, trains in W processes (gloo) that hold 8 / W experts each.
Four arms take turns, step by step, in the same processes:

- `even`: tokens go round the experts, whatever the router says: the floor;
- `forced`: expert e gets 100^(1 - e/7) tokens for every one of the last expert, 100 : 1 at the ends;
- `no loss`, `loss`: the router decides; its first row starts eight times as long, so that expert 0 gets about half of
  the tokens, and it learns without and with a load balancing loss of 0.05.

Counted, per process and step: rows sent to other processes, bytes, messages (all-to-alls that carry rows to another
process), all-to-alls of rows and of counts. These are of the forward pass; the backward pass moves as many rows the
other way. Measured: time in which a process waits for rows in the forward pass. A process waits for the slowest one, so
that this shows imbalance only on a machine that does nothing else and has a core for each process; ratios to `even` are
taken step by step.

Axes: W processes, T tokens of a process, D width, R rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import about, argument_parser
from benchmarks.markdown import table
from benchmarks.queue import read_records
from benchmarks.study import IMAGE_SIZE, MODEL
from moevision.analysis.plots import PAGE_INCHES, calm, figure_png, new_figure, panel_title
from moevision.files import write_bytes_atomic
from moevision.layers import Routing, forward_routing, moe_layers
from moevision.losses import AuxLoss, AuxLossWeights
from moevision.models.config import MoEConfig, build_model
from moevision.train.optim import OptimizerConfig, build_optimizer
from moevision.train.parallel import layout
from moevision.train.parallel.layout import AllToAllDispatcher, Layout, same_everywhere, shard
from moevision.train.parallel.parts import DIVIDED

ARMS = ("even", "forced", "no loss", "loss")
EXPERTS, CLASSES, BALANCE = 8, 8, 0.05
FORCED = 100.0  # tokens of the first expert for one of the last
FIGURE = Path(__file__).with_name("waiting.png")
WORDS = ("even by force", "100 : 1 by force", "learned", "learned,\nbalance loss")  # for ARMS


@dataclass
class Traffic:
    """What one process sends in a forward pass, and how long it waits for what the others send."""

    rows_sent: int = 0
    bytes_sent: int = 0
    messages: int = 0
    exchanges_of_rows: int = 0
    exchanges_of_counts: int = 0
    rows_computed: int = 0
    wait_ms: float = 0.0


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("waiting", __doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="W (%(default)s)")
    parser.add_argument("--images", type=int, default=64, help="of a process in a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of each arm (%(default)s)")
    parser.add_argument("--out", type=Path, help="add the record to this file, as a line")
    parser.add_argument("--draw", type=Path, metavar="RECORDS", help="draw records of 2 processes instead")
    options = parser.parse_args()
    if options.draw:
        draw(read_records(options.draw), FIGURE)
        print(f"{FIGURE}: drawn, nothing measured")
        return
    origin, rows = about(), []
    with tempfile.TemporaryDirectory() as folder:
        for processes in options.processes:
            arguments = (processes, Path(folder), options.images, options.steps)
            torch.multiprocessing.spawn(_process, arguments, nprocs=processes)
            rows += torch.load(Path(folder) / f"{processes}.pt")
    print(table_of(rows))
    if options.out:
        settings = {"images": options.images, "steps": options.steps, "experts": EXPERTS, "model": MODEL}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"settings": settings, "rows": rows, "provenance": origin}) + "\n")


def table_of(rows: list[dict[str, Any]]) -> str:
    """A line for each number of processes and arm; of the last tenth of its steps."""
    heads = ["processes", "arm", "busiest process / mean rows", "KB sent", "messages", "waiting, ms", "waiting / even"]
    cells = [
        [
            str(row["processes"]),
            row["arm"],
            f"{row['busiest_over_mean']:.2f}",
            f"{row['bytes_sent'] / 1000:.0f}",
            f"{row['messages']:.1f}",
            f"{row['wait_ms']:.2f}",
            f"{row['wait_over_even']:.2f}",
        ]
        for row in rows
    ]
    return table(heads, cells)


def draw(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Bars for each arm: the middle one of the records, and a line from the lowest to the highest.

    Args:
        records: of runs in 2 processes.
        file: the figure.
    """
    figure = new_figure(PAGE_INCHES, 2.3)
    rows = [row for record in records for row in record["rows"] if row["processes"] == 2]
    panels = (
        ("busiest_over_mean", "Work", "rows of the busiest of 2 processes / mean"),
        ("wait_over_even", "Waiting", f"time / that of an even load; {len(records)} runs"),
    )
    for axes, (key, name, note) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        found = [sorted(row[key] for row in rows if row["arm"] == arm) for arm in ARMS]
        bars = axes.bar(range(len(ARMS)), [median(values) for values in found], width=0.6)
        for bar, colour in zip(bars, ("#8C8C8C", "#8C8C8C", "#D55E00", "#0072B2"), strict=True):
            bar.set_color(colour)
        axes.vlines(range(len(ARMS)), [low for low, *_ in found], [high for *_, high in found], "#333333", linewidth=1)
        for place, values in enumerate(found):
            axes.text(place, values[-1] + 0.04, f"{median(values):.2f}", ha="center", fontsize=7)
        calm(axes)
        axes.axhline(1, color="#333333", linewidth=0.7, linestyle=":")
        axes.set_xticks(range(len(ARMS)), WORDS)
        panel_title(axes, name, note)
    write_bytes_atomic(file, figure_png(figure))


def _process(rank: int, processes: int, folder: Path, images: int, steps: int) -> None:
    """One of W processes; the first one leaves their rows in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{processes}", rank=rank, world_size=processes)
    layout = Layout.of("cpu", processes)
    arms = {name: Arm(name, layout) for name in ARMS}
    found: dict[str, list[Traffic]] = {name: [] for name in ARMS}
    for step in range(steps):
        for name, arm in arms.items():
            found[name].append(arm.step(step * processes + rank, images))
    every: list[Any] = [None] * processes
    dist.all_gather_object(every, {name: [asdict(one) for one in each] for name, each in found.items()})
    if rank == 0:
        torch.save(
            [{"processes": processes, "arm": name, **_summary(every, name, steps)} for name in ARMS],
            folder / f"{processes}.pt",
        )
    dist.destroy_process_group()


def _summary(every: list[dict[str, list[dict[str, Any]]]], arm: str, steps: int) -> dict[str, float]:
    """Means over processes and the last tenth of the steps, which is at least one."""
    last = range(steps - max(1, steps // 10), steps)

    def mean(key: str, step: int, name: str = arm) -> float:
        return sum(float(one[name][step][key]) for one in every) / len(every)

    counts = {key: sum(mean(key, step) for step in last) / len(last) for key in Traffic.__dataclass_fields__}
    busiest = [max(one[arm][step]["rows_computed"] for one in every) / mean("rows_computed", step) for step in last]
    ratios = [mean("wait_ms", step) / max(1e-9, mean("wait_ms", step, "even")) for step in last]
    return {**counts, "busiest_over_mean": sum(busiest) / len(busiest), "wait_over_even": median(ratios)}


class Arm:
    """One network in training, with its way of routing.

    Args:
        name: of `ARMS`.
        layout: all processes; each holds E / W experts.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        torch.manual_seed(0)
        arch = MoEConfig(**MODEL, router="switch", num_experts=EXPERTS, stem="patch")
        self.net: nn.Module = build_model(arch, CLASSES, IMAGE_SIZE).train()
        for layer in moe_layers(self.net):
            if name in ("even", "forced"):
                layer.intervention = forced(1.0 if name == "even" else FORCED)
            else:
                _tilt(layer.router)
        self.aux = AuxLoss(AuxLossWeights(load_balancing=BALANCE if name == "loss" else 0.0))
        self.aux.check(self.net)
        same_everywhere(self.net, torch.device("cpu"))
        shard(self.net, layout)
        self.optimizer, _ = build_optimizer(
            self.net, OptimizerConfig(lr=1e-3, warmup_fraction=0.0), total_steps=10**6, kinds=DIVIDED.optimizers
        )

    def step(self, seed: int, images: int) -> Traffic:
        """One optimizer step on images of noise."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        y = torch.randint(CLASSES, (images,), generator=generator)
        self.aux.start_window()
        self.optimizer.zero_grad()
        with counted() as traffic:
            logits, routings = forward_routing(self.net, x)
        aux, _ = self.aux(routings)
        loss = F.cross_entropy(logits, y)
        ((loss if aux is None else loss + aux) / dist.get_world_size()).backward()
        self.optimizer.step()
        return traffic


def forced(ratio: float) -> Any:
    """An intervention that sends tokens to experts in fixed shares, `ratio` times as many to the first as the last."""

    def send(routing: Routing) -> Routing:
        shares = ratio ** -torch.linspace(0, 1, routing.num_experts, dtype=torch.float64)
        tokens = routing.expert_index.numel()
        ends = (shares.cumsum(0) / shares.sum() * tokens).round().long()
        expert = torch.searchsorted(ends, torch.arange(tokens), right=True).clamp(max=routing.num_experts - 1)
        return replace(routing, expert_index=expert.view_as(routing.expert_index))

    return send


def _tilt(router: nn.Module) -> None:
    """Give expert 0 about half of the tokens: its scores are far from 0, and above the others' where positive."""
    weight: Tensor = router.weight  # type: ignore[assignment]
    with torch.no_grad():
        weight[0] *= 8


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what dispatchers of this process send inside the scope, and time their waiting."""
    traffic, rank = Traffic(), dist.get_rank()
    travel, arrived, exchange = AllToAllDispatcher._travel, layout._arrived, dist.all_to_all_single

    def counting_travel(self: AllToAllDispatcher, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        others = [count for process, count in enumerate(sent) if process != rank]
        traffic.rows_sent += sum(others)
        traffic.bytes_sent += sum(others) * rows.shape[1] * rows.element_size()
        traffic.messages += sum(count > 0 for count in others)
        traffic.exchanges_of_rows += 1
        return travel(self, rows, sent, received)

    def timed_arrived(rows: Tensor) -> Tensor:
        began = time.perf_counter()
        found = arrived(rows)
        traffic.wait_ms += 1000 * (time.perf_counter() - began)
        return found

    def counting_exchange(*args: Any, **kwargs: Any) -> Any:
        traffic.exchanges_of_counts += 1
        return exchange(*args, **kwargs)

    def counting_receive(self: AllToAllDispatcher, sent: Any) -> tuple[Tensor, Tensor]:
        traffic.rows_computed += sum(sent.received)
        return receive(self, sent)

    receive = AllToAllDispatcher.receive
    with (
        patch.object(AllToAllDispatcher, "_travel", counting_travel),
        patch.object(AllToAllDispatcher, "receive", counting_receive),
        patch.object(layout, "_arrived", timed_arrived),
        patch.object(layout.dist, "all_to_all_single", counting_exchange),
    ):
        yield traffic
