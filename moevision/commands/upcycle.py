"""`moevision upcycle NAME_OR_PATH`: a trained dense ViT becomes a Mixture of Experts that computes the same."""

from __future__ import annotations

import json
import os
import shlex
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moevision.errors import UserError
from moevision.files import write_json_atomic
from moevision.names import shown

if TYPE_CHECKING:
    from torch import nn

    from moevision.models.io import SavedModel

GAP_IMAGES = 32  # drawn pictures for the comparison of outputs; one pass even of a large ViT takes seconds
SAME = 1e-5  # max |Δ logit| below which two models compute the same in float32
DESCRIPTION = """\
Turn a trained dense ViT into a Mixture of Experts: every expert starts as a copy of the MLP that it replaces, so that
the model computes what it computed before, and learns from there (arXiv:2212.05055).

Writes OUT/ with the new model, which every verb takes, and upcycle.json with what was measured: parameters and FLOPs
before and after, and how far the outputs are from the dense model's.
"""

EXAMPLES = """\
examples
  moevision upcycle deit_tiny_patch16_224 --out tiny_moe               weights from the hub, 8 experts in two blocks
  moevision upcycle runs/dense/model --layers every2 --top-k 2 --out moe
  moevision upcycle deit_small_patch16_224 --weights my.safetensors --num-classes 37 --out pets_moe
  moevision upcycle deit_tiny_patch16_224 --router expert_choice --top-k 2 --out ec
  moevision upcycle runs/dense/model --reinit 0.5 --option capacity_factor=1.25 --out drop

what it costs: --num-experts E stores E MLPs in each converted block; --top-k K computes K of them per token, so K = 1
costs what the dense model costs. Routers and options: docs/routers.md; what can't be upcycled: docs/upcycling.md.
"""


def main(arguments: list[str]) -> None:
    """Run with command-line arguments."""
    chosen = _parser().parse_args(arguments)
    out = Path(chosen.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not chosen.force):
        raise UserError(f"{out} is there already: give --out another name, or --force to write into it.")

    options = _options(chosen.option)
    from moevision.models.io import describe  # torch: not for --help
    from moevision.models.upcycle import load_dense, upcycle

    console = Console(highlight=False)
    with console.status("reading the dense model"):
        dense = load_dense(
            chosen.model, chosen.weights, num_classes=chosen.num_classes, image_size=chosen.image_size, seed=chosen.seed
        )
    if not dense.num_classes:
        raise UserError(f"{chosen.model} has no classifier: say how many classes it shall have, --num-classes N.")
    with console.status("copying experts"):
        names = ("layers", "num_experts", "top_k", "router", "noise", "reinit", "seed")
        moe = upcycle(dense, **{name: getattr(chosen, name) for name in names} | options)
    saved = describe(moe.eval())
    with console.status("measuring"):
        record = {"source": chosen.model, "moe_config": moe.moe_config, **measure(dense, saved)}
    _write(saved, record, out)
    print_report(console, record)
    console.print(f"\nnext: {shown(next_command(saved, out))}", markup=False, soft_wrap=True)


def measure(dense: nn.Module, saved: SavedModel) -> dict[str, Any]:
    """Cost before and after, and the gap between the outputs on drawn pets.

    Not on noise: its patches are all alike, and routers that mix or drop tokens hardly change them.
    """
    import numpy as np
    import torch

    from moevision.data import SyntheticPets
    from moevision.data.transforms import normalize
    from moevision.efficiency import measure_cost
    from moevision.models.upcycle import step0_gap

    side = saved.image_size
    pets = SyntheticPets(GAP_IMAGES, side, 0, "test")
    pixels = torch.from_numpy(np.stack([pets.image(index) for index in range(len(pets))])).permute(0, 3, 1, 2)
    images = normalize(pixels, saved.mean, saved.std)
    costs = {"before": measure_cost(dense, side), "after": measure_cost(saved.net, side)}
    return {
        "image_size": side,
        "classes": len(saved.class_names),
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "step0_gap": asdict(step0_gap(dense, saved.net, images)),
    }


def print_report(console: Console, record: dict[str, Any]) -> None:
    """What was made, what it costs, and how far it is from the dense model."""
    config, gap = record["moe_config"], record["step0_gap"]
    blocks = ", ".join(map(str, config["moe_layers"]))
    console.print(
        f"{shown(record['source'])}: {record['classes']} classes, {record['image_size']} px; "
        f"{config['num_experts']} experts, top_k {config['top_k']}, router {config['router']}, in blocks {blocks}",
        markup=False,
        soft_wrap=True,
    )
    table = Table("", "parameters", "active", "MFLOPs / image", "routers' MFLOPs")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cost in record["costs"].items():
        table.add_row(
            {"before": "dense", "after": "upcycled"}[name],
            f"{cost['total_parameters']:,}",
            f"{cost['active_parameters']:,}",
            f"{cost['flops_per_image'] / 1e6:,.1f}",
            f"{cost['router_flops_per_image'] / 1e6:,.2f}",
        )
    console.print(table)
    console.print(
        f"outputs before training, on {gap['images']} drawn pictures: max |Δ logit| {gap['max_logit']:.2g} (the "
        f"dense logits' standard deviation is {gap['logit_scale']:.2g}), same class for {gap['agreement']:.0%}",
        soft_wrap=True,
    )
    if gap["max_logit"] > SAME:
        console.print(
            "so training starts from other outputs than the dense model's: noise, reinit, a capacity in evaluation, "
            "and the routers expert_choice and soft change them",
            soft_wrap=True,
        )


def next_command(saved: SavedModel, out: Path) -> str:
    """How to train the new model, with the size and the colour statistics that it knows."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # what `fit` takes by itself

    command = f"moevision fit FOLDER --pretrained {shlex.quote(str(out))} --data.image_size {saved.image_size}"
    if (saved.mean, saved.std) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        command += f" --data.mean '{list(saved.mean)}' --data.std '{list(saved.std)}'"
    return command


def _write(saved: SavedModel, record: dict[str, Any], out: Path) -> None:
    """Each file whole or not at all; other files in `out` are left alone."""
    from moevision.models.io import save_model

    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out, prefix=".upcycle-") as place:
            save_model(saved, Path(place))
            write_json_atomic(Path(place) / "upcycle.json", record)
            for file in sorted(Path(place).iterdir()):
                os.replace(file, out / file.name)
    except OSError as error:
        raise UserError(f"{out} can't be written to ({error.strerror}): give --out another place.") from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moevision upcycle", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a timm name, a saved model's folder, or a timm address")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--num-experts", type=_positive, default=8, metavar="E", help="experts per layer (%(default)s)")
    parser.add_argument(
        "--layers",
        type=_layers,
        default="last2",
        help="last2 (of the odd blocks), every2 (1, 3, 5, ...), all, or numbers such as 8,10 (%(default)s)",
    )
    parser.add_argument("--top-k", type=_positive, default=1, metavar="K", help="experts per token (%(default)s)")
    parser.add_argument("--router", default="vmoe_top_k", metavar="NAME", help="(%(default)s)")
    more = parser.add_argument_group("more")
    more.add_argument("--weights", metavar="FILE", help="a .safetensors file for the architecture NAME")
    more.add_argument("--num-classes", type=_positive, metavar="C", help="with another number, a new classifier")
    more.add_argument("--image-size", type=_positive, metavar="PX", help="with another size, resampled positions")
    more.add_argument("--noise", type=float, default=0.0, help="noise on the copies, relative to their weights' spread")
    more.add_argument("--reinit", type=float, default=0.0, help="share of each expert's hidden units drawn anew")
    more.add_argument("--seed", type=int, default=0, help="of everything drawn (%(default)s)")
    more.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the router, such as capacity_factor=1.25 or noise=none; may be repeated",
    )
    more.add_argument("--force", action="store_true", help="write into a folder that holds something")
    return parser


def _options(given: list[tuple[str, Any]]) -> dict[str, Any]:
    """`--option` as arguments of `upcycle`, in which `noise` is that on the copies.

    Raises:
        UserError: for a name that is no option of MoE layers.
    """
    from moevision.models.vit_moe import MOE_ARGUMENTS

    for name, _ in given:
        if name not in MOE_ARGUMENTS:
            raise UserError(f"There is no option {name!r}: use one of {', '.join(MOE_ARGUMENTS)}.")
    return {"router_noise" if name == "noise" else name: value for name, value in given}


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ArgumentTypeError(f"{text!r} is no number of at least 1")
    return number


def _layers(text: str) -> str | list[int]:
    numbers = text.replace(" ", "").split(",")
    return [int(number) for number in numbers] if all(number.isdecimal() for number in numbers) else text


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:  # a word, such as batch
        return name, value
