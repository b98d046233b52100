"""The images of a folder from the folder and from tar shards: the same images, the same training, images/s of both.

FOLDER has one subfolder per class; `moevision data shard` writes it to a temporary folder on the same disk.

Compared are the names, labels and decoded pixels of all images, and what a short `moevision fit` on either leaves.
Timed, in turns, are reading and the input pipeline (in the main process, without images kept in memory), over the same
random images of the training set: with their pages dropped from the system's cache by `posix_fadvise` before each turn
(cold) and without that (warm). A folder's directory entries stay in memory, which no unprivileged call drops: on a disk
that is really cold the folder would be slower.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, positive
from benchmarks.timing import Candidate, interleave, rows_of
from moevision.data import ImageDataModule
from moevision.data.collection import Collection, Sample
from moevision.data.folder import read_folder
from moevision.data.loader import ImageDataset
from moevision.data.shards import file_sha256, open_shards, write_shards
from moevision.errors import UserError

QUICK = {"images": 64, "repetitions": 2, "steps": 2}
EXAMPLES = """\
  python -m benchmarks shards datasets/cifar10 --image-size 32 --out benchmarks/data/cifar10
"""
COMPARED = ("metrics.csv", "predictions_test.csv", "splits.csv", "scores.csv", "model/model.safetensors")
_BATCH = 64


def parser() -> ArgumentParser:
    """The command line."""
    parser = harness.argument_parser("shards", __doc__, EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images, one subfolder per class")
    parser.add_argument(
        "--image-size", type=positive, default=64, metavar="PX", help="side of the images (%(default)s)"
    )
    parser.add_argument("--images", type=positive, default=4096, metavar="N", help="images per turn (%(default)s)")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="training steps (%(default)s)")
    parser.add_argument("--shard-mb", type=positive, default=16, metavar="MB", help="MiB in a shard (%(default)s)")
    harness.add_measuring(parser, repetitions=9, warm_up=None)
    return parser


def main() -> None:
    """Write the shards, compare, time, and write the record."""
    options = harness.parse(parser(), QUICK)
    if not hasattr(os, "posix_fadvise"):
        raise UserError("This system can't drop pages of a file (posix_fadvise): run it on Linux.")
    device = harness.set_up(options)
    record = harness.new_record("shards", options, device)
    record["settings"]["folder"] = options.folder.name

    place = options.folder.absolute().parent
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as work:
        out = Path(work) / "shards"
        folder = read_folder(options.folder)
        write_shards(folder, out, shard_bytes=options.shard_mb * 2**20)
        tars = open_shards(out)
        record["shards"] = len(tars.files.names)
        record["equal"] = compare(folder, tars)
        record["training"] = train_both(options, out, Path(work))
        record["rows"] = measure({"folder": options.folder.resolve(), "shards": out}, options)
    show(record)
    harness.write_record(options.out, record)


# ---- the same images


def compare(folder: Collection, tars: Collection) -> dict[str, Any]:
    """How many images there are, and how many agree in place, name, label and decoded pixels."""
    equal, total = 0, 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for split, samples in folder.given.items():
            total += len(samples)
            pairs = zip(samples, tars.given.get(split, ()), strict=False)
            equal += sum(pool.map(lambda pair: _agree(folder, tars, *pair), pairs))
    return {"images": total, "equal": equal, "classes": folder.class_names == tars.class_names}


def _agree(folder: Collection, tars: Collection, one: Sample, other: Sample) -> bool:
    return one == other and folder.open(one).tobytes() == tars.open(other).tobytes()


def train_both(options: Namespace, shards: Path, work: Path) -> dict[str, Any]:
    """Whether a short training on either leaves the same bytes, by file."""
    hashes = []
    for name, path in (("folder", options.folder.resolve()), ("shards", shards)):
        command = [
            *(sys.executable, "-m", "moevision", "fit", str(path), f"--name={name}", f"--runs_root={work / 'runs'}"),
            *("--pretrained=none", f"--data.image_size={options.image_size}", f"--data.batch_size={_BATCH}"),
            *("--data.cache_mb=0", "--trainer.max_epochs=1", f"--trainer.limit_train_batches={options.steps}"),
            *("--trainer.limit_val_batches=4", "--trainer.limit_test_batches=4", "--trainer.enable_progress_bar=false"),
        ]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"`moevision fit` on the {name} ended with {done.returncode}: {done.stderr[-2000:]}")
        hashes.append({file: file_sha256(work / "runs" / name / file) for file in COMPARED})
    return {
        "steps": options.steps,
        "same": {file: hashes[0][file] == hashes[1][file] for file in COMPARED},
        "sha256": hashes[0],
    }


# ---- images/s


def measure(paths: Mapping[str, Path], options: Namespace) -> list[dict[str, Any]]:
    """Rows of what was timed: reading and the pipeline, cold and warm, folder beside shards."""
    datasets = {}
    for name, path in paths.items():
        module = ImageDataModule(str(path), image_size=options.image_size, cache_mb=0, check_duplicates=False)
        module.setup("fit")
        datasets[name] = module.contents.datasets["train"]
    total = len(datasets["folder"])
    indices = random.Random(0).sample(range(total), min(options.images, total))
    samples = [datasets["folder"].samples[index] for index in indices]
    files = {
        "folder": [paths["folder"] / sample.sample_id for sample in samples],
        "shards": sorted(paths["shards"].glob("*.tar")),
    }
    rows = []
    for kind, work in (("reading", _read), ("pipeline", _fetch)):
        for cold in (True, False):
            candidates = [
                Candidate(name, partial(work, dataset, indices), partial(_drop, files[name]) if cold else _nothing)
                for name, dataset in datasets.items()
            ]
            with harness.progress_bar(f"{kind}, {'cold' if cold else 'warm'}", 2 * (options.repetitions + 1)) as step:
                timings = interleave(candidates, repetitions=options.repetitions, warm_up=1, on_step=step)
            facts = {name: {"kind": kind, "cold": cold, "images": len(indices)} for name in files}
            rows += rows_of(timings, ["folder"], facts)
    return rows


def _read(dataset: ImageDataset, indices: Sequence[int]) -> None:
    for index in indices:
        dataset.collection.stored(dataset.samples[index])


def _fetch(dataset: ImageDataset, indices: Sequence[int]) -> None:
    for start in range(0, len(indices), _BATCH):
        dataset.__getitems__([(0, index) for index in indices[start : start + _BATCH]])


def _drop(files: Sequence[Path]) -> None:
    """Drop the pages of files from the system's cache, which it does with those that are on the disk."""
    for file in files:
        with _opened(file) as number:
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    number = os.open(file, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


def _nothing() -> None:
    pass


def show(record: Json) -> None:
    """What is equal, and the ratios."""
    harness.print_machine(record)
    equal, training = record["equal"], record["training"]
    harness.print_line(f"{equal['equal']:,} of {equal['images']:,} images are equal; {record['shards']} shards.")
    same = [file for file, is_same in training["same"].items() if is_same]
    harness.print_line(f"after {training['steps']} training steps the same bytes: {', '.join(same)}")
    rows = []
    for row in record["rows"]:
        if row["name"] == "shards":
            ratio = row["speed_to"]["folder"]
            cells = [row["kind"], "cold" if row["cold"] else "warm"]
            rows.append([*cells, f"{ratio['median']:.2f} ({ratio['quartile_1']:.2f}–{ratio['quartile_3']:.2f})"])
    harness.print_table("images/s from shards ÷ from the folder", ["what", "pages", "ratio (quartiles)"], rows)
