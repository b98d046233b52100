"""Train on four data sets by `moevision fit`, and record after every validation which images are right.

    nice -n 19 python -m benchmarks.checkpoint_choice.training --data FOLDER --pretrained FILE --seeds 0 1 2 3

FOLDER has cifar10/{train,test}, imagenette128/{train,val} and cats_vs_dogs/{train,val}, a folder per class. A seed
draws the images, the split, the initial weights and the order. A run that has its record isn't done again.

Axes: n images.
"""

from __future__ import annotations

import base64
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import HERE, about, argument_parser
from benchmarks.queue import is_recorded, refuse_changes, write_run
from moevision.config import read, settings
from moevision.data import ImageDataModule
from moevision.layers.routing import evaluating
from moevision.train.fit import quiet_lightning, train
from moevision.train.resume import Session, begin

FOLDER = HERE / "checkpoint_choice"
ARMS = {"moe": [], "dense": ["--dense"]}


# ---- the images


def draw(source: Path, target: Path, counts: list[int], seed: int) -> None:
    """Link `counts[c]` images of class c from the folder `source` into `target`."""
    generator = np.random.default_rng(seed)
    for folder, count in zip(sorted(source.iterdir()), counts, strict=True):
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        files = sorted(folder.iterdir())
        for index in generator.permutation(len(files))[:count]:
            link = target / folder.name / files[index].name
            if not link.exists():
                link.symlink_to(files[index].resolve())


def unbalanced(options: Namespace, seed: int, folder: Path) -> list[str]:
    """Photos of ten classes of 122 to 622 images, a tenth of them for validation; a test set of the same shares."""
    sizes = np.geomspace(122, 622, 10)
    draw(options.data / "imagenette128/train", folder / "train", sizes.round().astype(int).tolist(), seed)
    draw(options.data / "imagenette128/val", folder / "test", (sizes * 0.35).round().astype(int).tolist(), seed)
    return [str(folder), "--pretrained", str(options.pretrained), "--data.image_size", "56"]


def cats_vs_dogs(options: Namespace, seed: int, folder: Path) -> list[str]:
    """2,048 photos, a tenth of them for validation, and 832 to test on."""
    return [str(options.data / "cats_vs_dogs"), "--pretrained", str(options.pretrained), "--data.image_size", "56"]


def cifar10(options: Namespace, seed: int, folder: Path) -> list[str]:
    """10,000 of the training images, a tenth of them for validation, and 2,000 test images; from scratch."""
    for split, count in (("train", 1000), ("test", 200)):
        draw(options.data / "cifar10" / split, folder / split, [count] * 10, seed)
    return [
        *(str(folder), "--pretrained", "none", "--data.image_size", "32", "--data.crop", "pad"),
        *("--trainer.max_epochs", "8"),
    ]


def drawn(options: Namespace, seed: int, folder: Path) -> list[str]:
    """The quickstart's images and model, in ten epochs of 1,200 images."""
    sizes = ("--data.train_size", "1200", "--data.val_size", "300", "--data.test_size", "1000")
    return ["--config", "quickstart", *sizes, "--trainer.max_epochs", "10"]


DATA: dict[str, Callable[[Namespace, int, Path], list[str]]] = {
    "unbalanced": unbalanced,
    "cats_vs_dogs": cats_vs_dogs,
    "cifar10": cifar10,
    "drawn": drawn,
}


# ---- one training


class Observer(L.Callback):
    """What the weights say of every validation and test image, after every validation.

    Attributes:
        rows: for each validation its step, the two losses, and which images are right, as bits.
        labels: of the validation and the test images.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.labels: dict[str, list[int]] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask for every image."""
        if trainer.sanity_checking:
            return
        row: dict[str, Any] = {"step": trainer.global_step}
        for split in ("val", "test"):
            right, loss, self.labels[split] = predicted(trainer, pl_module, split)
            row |= {f"{split}_right": packed(right), f"{split}_loss": round(loss, 5)}
        self.rows.append(row)


@torch.no_grad()
def predicted(trainer: L.Trainer, task: Any, split: str) -> tuple[list[bool], float, list[int]]:
    """Of every image of a split whether it is right, and its class; and the mean loss."""
    data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
    right: list[bool] = []
    labels: list[int] = []
    losses: list[float] = []
    with evaluating(task.net), trainer.strategy.precision_plugin.forward_context():
        for batch in data.plain_loader(split):
            logits = task.net(batch["image"]).float()
            right += (logits.argmax(1) == batch["label"]).tolist()
            losses += F.cross_entropy(logits, batch["label"], reduction="none").tolist()
            labels += batch["label"].tolist()
    return right, float(np.mean(losses)), labels


def packed(right: list[bool]) -> str:
    """Bits in the order of the images, as base64."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def run(name: str, arm: str, seed: int, options: Namespace) -> None:
    """Train, and write the record."""
    origin = {**about(), "command": "python -m benchmarks.checkpoint_choice.training"}
    folder = options.work / f"{name}-{seed}"
    arguments = [*DATA[name](options, seed, folder), *ARMS[arm]]
    arguments += ["--data.seed", str(seed), "--seed_everything", str(seed), "--name", f"{name}-{arm}-{seed}"]
    arguments += ["--runs_root", str(options.work / "runs"), "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.accelerator", "cpu", "--resume=auto"]
    began, observer = time.process_time(), Observer()
    given = read("fit", arguments)
    session = Session(given.command)
    try:
        with session.interruption, quiet_lightning():
            asked, start = begin(session, given)
            training = train(settings(asked), session, start, [observer])
    finally:
        session.close()
    data, trainer = training.data, training.trainer
    record = {
        "data": name, "arm": arm, "seed": seed, "monitor": training.settings.checkpoint.monitor,
        "class_counts": [list(counts.values()) for counts in data.class_counts.values()],
        "image_size": data.image_size, "epochs": trainer.max_epochs, "steps": trainer.global_step,
        "precision": str(trainer.precision), "cpu_s": round(time.process_time() - began, 1),
        "labels": {split: "".join(map(str, labels)) for split, labels in observer.labels.items()},
        "validations": observer.rows, **origin,
    }  # fmt: skip
    write_run(options.out, f"{name}-{arm}-{seed}", record)
    shares = [np.unpackbits(np.frombuffer(base64.b64decode(row["test_right"]), np.uint8)) for row in observer.rows]
    tested = len(observer.labels["test"])
    print(
        name, arm, seed, f"{record['cpu_s']} s", [round(float(each[:tested].mean()), 4) for each in shares], flush=True
    )


def main() -> None:
    """All runs that have no record yet, a seed of every data set before the next one."""
    parser = argument_parser("checkpoint_choice.training", __doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--work", type=Path, default=Path("runs/checkpoint_choice"))
    parser.add_argument("--out", type=Path, default=FOLDER / "runs.jsonl")
    parser.add_argument("--allow-dirty", action="store_true")
    options = parser.parse_args()
    refuse_changes(FOLDER / "__init__.py", allowed=options.allow_dirty)
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.only:
            for arm in ARMS:
                if not is_recorded(options.out, f"{name}-{arm}-{seed}"):
                    run(name, arm, seed, options)


if __name__ == "__main__":
    main()
