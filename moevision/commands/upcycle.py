"""`moevision upcycle`: a Mixture of Experts made from a dense model without training, and what that costs."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from moevision.analysis.collect import PictureReader
from moevision.analysis.images import open_pictures
from moevision.commands.info import cost_table
from moevision.data import SyntheticPets
from moevision.data.transforms import normalize
from moevision.efficiency import measure_cost
from moevision.errors import UserError, escape_controls
from moevision.files import sync_folder, temporary_for, write_json_atomic
from moevision.models.convert import layers_that_miss_classifier
from moevision.models.io import SavedModel, describe, save_model
from moevision.models.upcycle import (
    START_IMAGES,
    initial_output_difference,
    load_dense,
    start_routers,
    upcycle,
)
from moevision.models.vit_moe import MOE_ARGUMENTS
from moevision.words import loading, shell_word

GAP_IMAGES = (
    32  # drawn images for the comparison of outputs; one pass even of a large ViT takes seconds
)
SAME = 1e-5  # max |Δ logit| below which two models compute the same in float32


def write_model(saved: SavedModel, out: Path, record: dict[str, Any]) -> None:
    """Write the model with its `upcycle.json` beside `out`, which isn't there or is empty; the whole gets that name."""
    part = temporary_for(out)
    try:
        save_model(saved, part)
        write_json_atomic(part / "upcycle.json", record)
        if out.is_dir():
            out.rmdir()  # Windows renames over no folder
        os.replace(part, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run(chosen: Namespace) -> None:
    """Convert, measure, and write the new model with `upcycle.json`."""
    out = Path(chosen.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already: give --out another name.")
    if (chosen.router_start == "cluster") != (chosen.data is not None):
        raise UserError(
            "--router-start cluster and --data belong together: the images whose tokens are clustered."
        )
    for name, _ in chosen.option:
        if name not in MOE_ARGUMENTS:
            raise UserError(f"There is no option {name!r}: use one of {', '.join(MOE_ARGUMENTS)}.")
    with loading("reading the dense model"):
        sizes = {name: getattr(chosen, name) for name in ("num_classes", "image_size", "depth")}
        dense = load_dense(chosen.model, chosen.weights, **sizes, seed=chosen.seed)
    if not dense.num_classes:
        raise UserError(
            f"{chosen.model} has no classifier: say how many classes it shall have, --num-classes N."
        )
    with loading("copying experts"):
        names = ("num_experts", "top_k", "router", "reinit", "seed")
        moe = upcycle(
            dense,
            layers=chosen.layers or None,
            **{name: getattr(chosen, name) for name in names} | dict(chosen.option),
        )
    saved = describe(moe.eval())
    start: dict[str, Any] = {}
    if chosen.router_start == "cluster":
        data = {} if chosen.root is None else {"root": chosen.root}
        sizes = {"framing": saved.framing, "limit": START_IMAGES, "seed": chosen.seed}
        pictures = open_pictures(chosen.data, saved.image_size, split="train", **sizes, **data)
        reader = PictureReader(pictures, saved, batch_size=64)
        with loading("clustering the routers' input"):
            batches = (batch.images for batch in reader.batches(progress=True))
            shares = start_routers(saved.net, batches, seed=chosen.seed)
        reader.report()
        start = {"router_start": {"kind": "cluster", "pictures": pictures.name, "shares": shares}}
    with loading("measuring"):
        record = {
            "source": chosen.model,
            "moe_config": moe.moe_config,
            **start,
            **measure(dense, saved),
        }
    write_model(saved, out, record)
    console = Console(highlight=False)
    _print_upcycling(console, record)
    if unread := layers_that_miss_classifier(saved.net):
        console.print(
            f"the classifier reads the class token alone, so the routes of patches in block {unread[-1]} change no "
            "answer: leave --layers out, or fine-tune with --model.arch.global_pool avg",
            soft_wrap=True,
        )
    command = f"moevision fit FOLDER --pretrained {shell_word(str(out))} --data.image_size {saved.image_size}"
    if (saved.mean, saved.std) != (
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
    ):  # what `fit` takes by itself
        command += f" --data.mean '{list(saved.mean)}' --data.std '{list(saved.std)}'"
    console.print(f"\nnext: {escape_controls(command)}", markup=False, soft_wrap=True)


def measure(dense: nn.Module, saved: SavedModel) -> dict[str, Any]:
    """Cost before and after, and the gap between the outputs on drawn pets.

    Not on noise: its patches are all alike, and routers that mix or drop tokens hardly change them.
    """
    side = saved.image_size
    pets = SyntheticPets(GAP_IMAGES, side, 0, "test")
    pixels = np.stack([pets.image(index) for index in range(len(pets))])  # uint8 [B, S, S, 3]
    images = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), saved.mean, saved.std)
    costs = {"before": measure_cost(dense, side), "after": measure_cost(saved.net, side)}
    return {
        "image_size": side,
        "classes": len(saved.class_names),
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "step0_gap": asdict(initial_output_difference(dense, saved.net, images)),
    }


def _print_upcycling(console: Console, record: dict[str, Any]) -> None:
    config, gap = record["moe_config"], record["step0_gap"]

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(
        f"{escape_controls(record['source'])}: {record['classes']} classes, {record['image_size']} px; "
        f"{config['num_experts']} experts of {config['expert_hidden']} hidden units, top_k {config['top_k']}, "
        f"router {config['router']}, in blocks {', '.join(map(str, config['moe_layers']))}"
    )
    if "router_start" in record:
        shares = [max(each) * len(each) for each in record["router_start"]["shares"].values()]
        say(
            f"routers start from clusters of what {record['router_start']['pictures']} gives them; largest over mean "
            f"cluster {', '.join(f'{share:.2f}' for share in shares)}"
        )
    console.print(
        cost_table({"dense": record["costs"]["before"], "upcycled": record["costs"]["after"]})
    )
    say(
        f"outputs before training, on {gap['images']} drawn images: max |Δ logit| {gap['max_logit']:.2g} (the dense "
        f"logits' standard deviation is {gap['logit_scale']:.2g}), same class for {gap['agreement']:.0%}"
    )
    if gap["max_logit"] > SAME:
        say(
            "so training starts from other outputs than the dense model's: reinit, a capacity in evaluation, and the "
            "routers expert_choice and soft change them"
        )
