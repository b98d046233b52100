"""`moevision surgery MODEL`: prune, merge or collapse the experts of a model, and measure what it costs."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moevision.names import shown

SPLITS = ("train", "val", "test")
DESCRIPTION = """\
Take experts out of a trained model, without training it again, and see what it costs.

  --prune N      take the N least used experts of every MoE layer away; their tokens go to the next-best expert
  --merge N      leave N experts in every MoE layer, averages of those that the same tokens want
  --collapse W   make the model dense: one MLP of an expert's width in every MoE layer, the average of its experts
                 or the most used one

The use of experts is measured on one set (--use-split), accuracy before and after on another one (--split): on the same
pictures for both and for a control, the model with its MoE layers left out. Experts that have little in common average
to almost nothing, and a result that is no better than the control has lost them all.

Writes OUT/ with the new model, which the other verbs take, and surgery.json with every number.
"""

EXAMPLES = """\
examples
  moevision surgery runs/pets --prune 2 --out pets_6_experts           on the pictures that the run was trained on
  moevision surgery runs/pets --merge 4 --out pets_4_experts
  moevision surgery runs/pets --collapse average --out pets_dense
  moevision surgery my/model --collapse most_used --data cifar10 --root datasets --out dense
"""


def print_report(record: dict[str, Any]) -> None:
    """What was done, and what it cost, beside each other."""
    console = Console(highlight=False)
    used_on, tested_on = (shown(record[part]["pictures"]) for part in ("use", "accuracy"))
    console.print(f"use of experts on {used_on}, in percent of choices:", markup=False, soft_wrap=True)
    for block, layer in record["use"]["layers"].items():
        total = sum(layer["counts"])
        shares = " ".join(f"{100 * count / total:.1f}" for count in layer["counts"])
        done = "".join(f"; {name} {layer[name]}" for name in ("kept", "groups") if name in layer)
        console.print(
            f"  L{block}: {shares}; gates of a token sum to {layer['gates_per_token']:.2f}{done}", soft_wrap=True
        )
    accuracy, costs = record["accuracy"], record["costs"]
    table = Table("", "accuracy", "parameters", "active", "MFLOPs / image")
    for name, title in (("before", "before"), ("after", "after"), ("without", "no MoE layers")):
        hits, cost = accuracy[name], costs.get(name)
        cells = [f"{hits['top1']:.2%} ({hits['low']:.1%} to {hits['high']:.1%})"]
        if cost is not None:
            flops = (cost["flops_per_image"] + cost["router_flops_per_image"]) / 1e6
            cells += [f"{cost['total_parameters']:,}", f"{cost['active_parameters']:,}", f"{flops:,.1f}"]
        table.add_row(title, *cells)
    console.print(table)
    change = {name: 100 * accuracy["difference"][name] for name in ("difference", "low", "high")}
    console.print(
        f"accuracy changed by {change['difference']:+.2f} points ({change['low']:+.2f} to {change['high']:+.2f}, "
        f"paired, 95 %) on {accuracy['n']} pictures: {tested_on}",
        markup=False,
        soft_wrap=True,
    )


def main(arguments: list[str]) -> None:
    """Run with command-line arguments."""
    parser = ArgumentParser(
        prog="moevision surgery", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run folder, its model/ folder, or a timm address; it must have MoE layers")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prune", type=_positive, metavar="N", help="take N experts of every MoE layer away")
    what.add_argument("--merge", type=_positive, metavar="N", help="leave N experts in every MoE layer")
    what.add_argument("--collapse", choices=("average", "most_used"), help="make the model dense")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--data",
        help="a folder with one subfolder per class, or a dataset's name such as synthetic_pets or cifar10; "
        "by default what the run was trained on",
    )
    parser.add_argument("--root", help="folder of named datasets (the run's own, or data)")
    parser.add_argument(
        "--split", default="test", choices=SPLITS, help="set on which accuracy is measured (%(default)s)"
    )
    parser.add_argument(
        "--use-split", default="val", choices=SPLITS, help="set on which the use of experts is measured (%(default)s)"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="pictures of --split (all)")
    parser.add_argument(
        "--use-limit", type=_positive, metavar="N", default=1000, help="pictures of --use-split (%(default)s)"
    )
    parser.add_argument(
        "--no-align", action="store_true", help="average experts without bringing their hidden units into one order"
    )
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="pictures per pass (%(default)s)")
    parser.add_argument("--force", action="store_true", help="write into a folder that holds something")
    chosen = vars(parser.parse_args(arguments))
    operation, amount = next(
        (name, amount) for name in ("prune", "merge", "collapse") if (amount := chosen.pop(name, None)) is not None
    )
    options = {name: value for name, value in chosen.items() if name not in ("prune", "merge", "collapse", "no_align")}
    from moevision.commands.surgery_run import SurgerySettings, surgery  # torch: not for --help

    settings = SurgerySettings(
        operation=operation,
        amount=amount,
        align=not chosen["no_align"],
        command=shlex.join(["moevision", "surgery", *arguments]),
        **options,
    )
    print_report(surgery(settings))
    print(f"The new model is in {shown(str(settings.out))}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"it is {number} and must be at least 1")
    return number
