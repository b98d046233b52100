"""What fewer, chosen training images cost: of a run (`of`), or on CIFAR-10 after a training of its own.

    python -m benchmarks curve of RUN                                  # `curve of --help` has its options
    nice -n 19 python -m benchmarks curve run --data path/to/cifar10
    python -m benchmarks curve report                                  # README.md's table and curve.png

`run` draws images, trains the recipe on them with scores, and leaves everything else to `of`. Stopped, the same command
goes on; another commit is refused, since trainings of two versions don't compare.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks.curve import shares
from benchmarks.curve.shares import draw, lines, sentences, table
from benchmarks.harness import HERE, about, argument_parser, count, positive
from benchmarks.lines import write_lines
from benchmarks.queue import add_study, fill_readme, refuse_changes
from benchmarks.study import drawn
from moevision.cli import main as run_moevision
from moevision.data import ImageDataModule
from moevision.errors import UserError, csv_name
from moevision.files import write_text_atomic
from moevision.models.safe_files import read_json

FOLDER = HERE / "curve"
IMAGES, EPOCHS, SEEDS, MARGIN = 8_000, 4, 3, 1.0
METHODS, SHARES = ("random", "ccs", "aum"), (0.9, 0.7, 0.5, 0.3)
VALIDATION = 0.02  # of the training set: validation chooses nothing here


def run(options: Namespace) -> None:
    """Train on all, then on shares; write the record.

    Raises:
        UserError: if a training fails, or other code began the work.
    """
    refuse_changes(FOLDER / "README.md", allowed=options.allow_dirty)
    torch.set_num_threads(options.threads)
    run_dir = options.work / "all"
    origin = _origin(options.work / "origin.json")
    _call([
        "fit", "--config", options.config, "--name", run_dir.name, "--runs_root", str(options.work),
        "--resume", "auto", "--data.path", str(options.data), "--data.download", "false", "--data.scores", "true",
        "--data.keep", str(_images(options)), "--data.val_fraction", str(VALIDATION), "--seed_everything", "0",
        "--trainer.max_epochs", str(options.epochs), "--trainer.enable_progress_bar", "false", *options.fit,
    ])  # fmt: skip
    shares.run([
        str(run_dir), "--by", *METHODS, "--shares", *map(str, options.shares), "--seeds", str(options.seeds),
        "--margin", str(MARGIN),
    ])  # fmt: skip
    trainings = [read_json(path) for path in sorted((run_dir / "curve/records").glob("*.json"))]
    for training in trainings:
        del training["recipe"]
    setup = {"images": options.images, "epochs": options.epochs, "margin": MARGIN, "methods": list(METHODS)}
    write_lines(options.out, {**setup, "trainings": trainings, **origin})


def _origin(file: Path) -> dict[str, Any]:
    """Where the trainings come from: what the first call wrote."""
    now = {**about(), "command": "python -m benchmarks curve run"}  # without this machine's folders
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_lines(file, now)
    known: dict[str, Any] = read_json(file)
    if known["code"] != now["code"]:
        raise UserError(f"{file} is of another commit: check that one out, or begin in another folder, --work DIR.")
    return known


def _images(options: Namespace) -> Path:
    """The list of the images, as many of each class."""
    keep: Path = options.work / "images.csv"
    if not keep.exists():
        data = ImageDataModule(str(options.data), image_size=32, cache_mb=0, val_fraction=VALIDATION)
        data.setup()
        train = data.contents.datasets["train"].samples
        some = drawn([sample.label for sample in train], options.images, seed=0)
        write_text_atomic(keep, "image\n" + "".join(f"{csv_name(train[index].sample_id)}\n" for index in some))
    return keep


def _call(command: list[str]) -> None:
    if code := run_moevision(command):
        raise UserError(f"`moevision {command[0]}` ended with code {code}, see above: the same command goes on.")


def parts_of(record: dict[str, Any]) -> list[str]:
    """What stands in the README: the table and the sentences of the command."""
    rows = table(record["trainings"], record["methods"])
    said = "\n".join(f"- {sentence}" for sentence in sentences(rows, record["trainings"], record["margin"]))
    return ["```text\n" + "\n".join(lines(rows)) + "\n```", said]


def report(options: Namespace) -> None:
    """Put the table into the README, and draw the figure beside it."""
    record = read_json(options.out)
    fill_readme(options.readme, parts_of(record))
    draw(table(record["trainings"], record["methods"]), record["margin"], options.readme.with_name("curve.png"))


def parser() -> ArgumentParser:
    """The command line."""
    known = argument_parser("curve", __doc__)
    add = known.add_argument
    add("verb", choices=("run", "report"), help="or of RUN: what fewer images cost a run, see `curve of --help`")
    add("--data", type=Path, metavar="DIR", help="CIFAR-10 as a folder")
    add("--images", type=positive, default=IMAGES, metavar="N", help="training images (%(default)s)")
    add("--epochs", type=positive, default=EPOCHS, metavar="N", help="(%(default)s)")
    add("--seeds", type=count, default=SEEDS, metavar="N", help="(%(default)s)")
    add("--shares", type=float, nargs="+", default=SHARES, metavar="SHARE", help="(0.9 0.7 0.5 0.3)")
    add("--config", default="cifar10", help="recipe (%(default)s)")
    add("--fit", action="append", default=[], metavar="OPTION", help="one more option of fit: --fit=--data.cache_mb=0")
    add("--threads", type=positive, default=1, help="(%(default)s)")
    add_study(known, FOLDER, "record.json")
    return known


def main() -> None:
    """The curve of a run, or the study's run or report."""
    if sys.argv[1:2] == ["of"]:
        shares.run(sys.argv[2:])
        return
    options = parser().parse_args()
    if options.verb == "run" and options.data is None:
        raise UserError("Say where CIFAR-10 is: --data path/to/cifar10.")
    {"run": run, "report": report}[options.verb](options)
