"""`moevision upcycle`: makes a Mixture of Experts from a dense model without training, and measures its cost."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from moevision.analysis.collect import PictureReader, network_input
from moevision.analysis.images import open_pictures
from moevision.commands.info import cost_table
from moevision.data import SyntheticPets
from moevision.efficiency import measure_cost
from moevision.errors import UserError, escape_controls
from moevision.files import require_new_or_empty, write_json_atomic
from moevision.models.convert import layers_that_miss_classifier
from moevision.models.io import SavedModel, config_file, describe, save_model
from moevision.models.safe_files import read_config
from moevision.models.upcycle import (
    START_IMAGES,
    initial_output_difference,
    load_dense,
    start_routers,
    upcycle,
)
from moevision.models.vit_moe import MOE_ARGUMENTS
from moevision.types import Json
from moevision.words import loading, shell_word

# Images of SyntheticPets on which outputs are compared; a forward pass of them takes seconds even with a large ViT.
GAP_IMAGES = 32
SAME = 1e-5  # max |Δ logit| up to which two models count as equal in float32


def run(args: Namespace) -> None:
    """Convert, measure, and write the new model with `upcycle.json`."""
    out = Path(args.out)
    _check_arguments(args, out)
    dense = _read_dense(args)
    moe = _convert(dense, args)
    saved = describe(moe.eval())

    record: Json = {"source": args.model, "moe_config": moe.moe_config}
    if args.router_start == "cluster":
        record["router_start"] = _start_from_clusters(saved, args)
    with loading("measuring"):
        record |= measure(dense, saved)
    save_model(saved, out)
    write_json_atomic(out / "upcycle.json", record)

    console = Console(highlight=False)
    _print_upcycling(console, record)
    _print_next(console, saved, out)


def _check_arguments(args: Namespace, out: Path) -> None:
    """Raise a UserError for arguments that can't work, before the model is read."""
    require_new_or_empty(out)
    clusters = args.router_start == "cluster"
    if clusters != (args.data is not None):
        raise UserError(
            "--router-start cluster and --data belong together: the images whose tokens are clustered."
        )
    for name, _ in args.option:
        if name not in MOE_ARGUMENTS:
            raise UserError(f"There is no option {name!r}: use one of {', '.join(MOE_ARGUMENTS)}.")


def _read_dense(args: Namespace) -> Any:
    file = config_file(args.model)
    if args.num_classes is None and file is not None and read_config(file).get("thresholds"):
        raise UserError(
            f"{args.model} gives an image several labels, which upcycling doesn't take over: --num-classes N gives it "
            "a new classifier, to be trained."
        )
    with loading("reading the dense model"):
        dense = load_dense(
            args.model,
            args.weights,
            num_classes=args.num_classes,
            image_size=args.image_size,
            depth=args.depth,
            seed=args.seed,
        )
    if not dense.num_classes:
        raise UserError(
            f"{args.model} has no classifier: say how many classes it shall have, --num-classes N."
        )
    return dense


def _convert(dense: Any, args: Namespace) -> Any:
    options = dict(args.option)
    arguments = {
        "layers": args.layers or None,
        "num_experts": args.num_experts,
        "top_k": args.top_k,
        "router": args.router,
        "reinit": args.reinit,
        "seed": args.seed,
    }
    with loading("copying experts"):
        return upcycle(dense, **arguments | options)


def _start_from_clusters(saved: SavedModel, args: Namespace) -> Json:
    """Initialise the routers with clusters of their inputs on the images of --data; the entry of the record."""
    root = {} if args.root is None else {"root": args.root}
    pictures = open_pictures(
        args.data,
        saved.image_size,
        split="train",
        framing=saved.framing,
        limit=START_IMAGES,
        seed=args.seed,
        **root,
    )
    reader = PictureReader(pictures, saved, batch_size=64)
    with loading("clustering the routers' input"):
        batches = (batch.images for batch in reader.batches(progress=True))
        shares = start_routers(saved.net, batches, seed=args.seed)
    reader.report()
    return {"kind": "cluster", "pictures": pictures.name, "shares": shares}


def _print_next(console: Console, saved: SavedModel, out: Path) -> None:
    """Name the block whose patches are routed without effect on the output, if any, and the command for training."""
    without_effect = layers_that_miss_classifier(saved.net)
    if without_effect:
        console.print(
            f"the classifier reads the class token alone, so the routes of patches in block {without_effect[-1]} "
            "change no answer: leave --layers out, or fine-tune with --model.arch.global_pool avg",
            soft_wrap=True,
        )
    command = f"moevision fit FOLDER --pretrained {shell_word(str(out))} --data.image_size {saved.image_size}"
    console.print(f"\nnext: {escape_controls(command)}", markup=False, soft_wrap=True)


def measure(dense: nn.Module, saved: SavedModel) -> Json:
    """Cost before and after, and the difference of the outputs on SyntheticPets.

    Noise would hide differences: its patches are all alike, so that routers which mix or drop tokens change little.
    """
    side = saved.image_size
    pets = SyntheticPets(GAP_IMAGES, side, 0, "test")
    pixels = np.stack([pets.image(index) for index in range(len(pets))])  # uint8 [B, S, S, 3]
    images = network_input(saved, pixels)
    return {
        "image_size": side,
        "classes": len(saved.class_names),
        "costs": {
            "before": asdict(measure_cost(dense, side)),
            "after": asdict(measure_cost(saved.net, side)),
        },
        "step0_gap": asdict(initial_output_difference(dense, saved.net, images)),
    }


def _print_upcycling(console: Console, record: Json) -> None:
    config = record["moe_config"]
    gap = record["step0_gap"]
    say = partial(console.print, markup=False, soft_wrap=True)
    say(
        f"{escape_controls(record['source'])}: {record['classes']} classes, {record['image_size']} px; "
        f"{config['num_experts']} experts of {config['expert_hidden']} hidden units, top_k {config['top_k']}, "
        f"router {config['router']}, in blocks {', '.join(map(str, config['moe_layers']))}"
    )
    if "router_start" in record:
        start = record["router_start"]
        # The shares of a layer have the mean 1 / len(shares).
        ratios = ", ".join(
            f"{max(shares) * len(shares):.2f}" for shares in start["shares"].values()
        )
        say(
            f"routers start from clusters of what {start['pictures']} gives them; largest over mean cluster {ratios}"
        )
    costs = record["costs"]
    console.print(cost_table({"dense": costs["before"], "upcycled": costs["after"]}))
    say(
        f"outputs before training, on {gap['images']} drawn images: max |Δ logit| {gap['max_logit']:.2g} (the dense "
        f"logits' standard deviation is {gap['logit_scale']:.2g}), same class for {gap['agreement']:.0%}"
    )
    if gap["max_logit"] > SAME:
        say(
            "so training starts from other outputs than the dense model's: reinit, a capacity in evaluation, and the "
            "routers expert_choice and soft change them"
        )
