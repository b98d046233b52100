"""Trainings that are interrupted and resumed, beside those that nobody interrupted: the cells of a matrix.

Each cell trains a tiny model on 64 drawn images (8 steps an epoch, 3 epochs, dropout, stochastic depth and router
noise on) twice: once straight through, and once interrupted by a real SIGTERM at one place, and resumed by new objects
from `last.ckpt`. Compared are all weights, buffers, moments, schedules and averages, and metrics.csv byte for byte.
`python -m benchmarks resume` runs every cell.
"""

import os
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from moevision.config import EmaConfig
from moevision.data import ImageDataModule
from moevision.models.config import MoEConfig
from moevision.train.checkpoint import SafeCheckpointIO, newest_valid
from moevision.train.guard import StabilityGuard
from moevision.train.health import Stopwatch, WeightEMA
from moevision.train.lightning_internals import RunLogger
from moevision.train.optim import OptimizerConfig
from moevision.train.processes import Interrupted, Interruption
from moevision.train.resume import MARK, CheckpointConfig, EpochEnd, ResumePoint
from moevision.train.scores import ExampleScores
from moevision.train.task import ClassificationTask
from tests.train.quiet import quiet_trainer

STEPS_PER_EPOCH, EPOCHS, IMAGES = 8, 3, 64


@dataclass(frozen=True)
class Setting:
    """How a cell trains: what differs from the plain training."""

    name: str
    arch: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    resumed_data: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    ema: float | None = None


IN_STEPS = {
    "max_steps": 22,
    "max_epochs": -1,
}  # ends in the middle of the third epoch, at the place "epoch 2"
SETTINGS = (
    Setting("plain"),
    Setting("bf16", trainer={"precision": "bf16-mixed"}),
    Setting("accumulate 2", trainer={"accumulate_grad_batches": 2}),
    Setting("accumulate 3, rest of 2", trainer={"accumulate_grad_batches": 3}),
    Setting("router bias", arch={"router": "bias_balanced", "bias_rate": 0.05}),
    Setting("by image", arch={"route_by": "image"}),
    Setting("EMA", ema=0.9),
    Setting("mixup, cutmix, trivialaugment", data={"mixup": 0.4, "cutmix": 1.0, "augment": "trivialaugment"}),
    Setting("0 workers, then 2", resumed_data={"num_workers": 2}),
    Setting("2 workers, then 0", data={"num_workers": 2}, resumed_data={"num_workers": 0}),
    Setting("convolutional stem", arch={"stem": "conv"}),
    Setting("hybrid, Muon", arch={"stem": "stages"}, optim={"name": "muon"}),
    Setting("validation twice an epoch", trainer={"val_check_interval": 0.5}),
    Setting("max_steps", trainer=IN_STEPS),
    Setting("max_steps, accumulate 3, rest of 2", trainer={**IN_STEPS, "max_steps": 8, "accumulate_grad_batches": 3}),
    Setting("max_steps, validation twice an epoch", trainer={**IN_STEPS, "val_check_interval": 0.5}),
    Setting("EMA, bias, bf16, accumulate 2, mixup", arch={"router": "bias_balanced", "bias_rate": 0.05}, ema=0.9,
            trainer={"precision": "bf16-mixed", "accumulate_grad_batches": 2}, data={"mixup": 0.4}),
)  # fmt: skip
# Batches (counted from 1 over the whole training) in or after which the signal comes.
PLACES = {
    "first step": 1,
    "mid-epoch": 3,
    "at a validation": 4,
    "last batch of an epoch": 8,
    "in validation": -8,
    "epoch 1": 13,
    "last batch of epoch 1": 16,
    "epoch 2": 22,
}
EVERYWHERE = ("plain", "max_steps")
SOME = ("mid-epoch", "last batch of an epoch", "epoch 1")


def cells() -> list[tuple[Setting, str]]:
    """Setting and place of every cell; the plain trainings are interrupted everywhere."""
    found = []
    for setting in SETTINGS:
        names = PLACES if setting.name in EVERYWHERE else SOME
        if "validation" in setting.name:
            names = ("at a validation", *names)
        if "max_steps," in setting.name:
            names = (*names, "epoch 2")
        found += [(setting, place) for place in names]
    return found


class Signal(L.Callback):
    """Sends this process a SIGTERM in one place: after a batch, or (negative) in the validation after it."""

    def __init__(self, place: int) -> None:
        self.place = place

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After a batch."""
        if trainer.fit_loop.total_batch_idx + 1 == self.place:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """While validating."""
        if trainer.fit_loop.total_batch_idx + 1 == -self.place:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    folder: Path, setting: Setting, place: int = 0, resume: Path | None = None
) -> dict[str, Any]:
    """Train in `folder`, interrupted in one place (0: nowhere) or resumed from a checkpoint.

    Returns:
        All state at the end, as a checkpoint would hold it; {} after an interruption.
    """
    L.seed_everything(1, verbose=False)
    options = setting.data | (setting.resumed_data if resume else {})
    sizes = {"train_size": IMAGES, "val_size": 16, "test_size": 8}
    data = ImageDataModule(
        "synthetic_pets",
        **({"image_size": 32, "batch_size": IMAGES // STEPS_PER_EPOCH} | sizes | options),
    )
    arch = {
        "name": "test_vit_moe",
        "stem": "patch",
        "proj_drop_rate": 0.1,
        "drop_path_rate": 0.1,
    } | setting.arch
    task = ClassificationTask(MoEConfig(**arch), OptimizerConfig(**setting.optim))
    interruption = Interruption()
    point = ResumePoint(folder / "checkpoints", CheckpointConfig(), interruption)
    best = ModelCheckpoint(
        folder / "checkpoints", "best", monitor="val/top1", mode="max", enable_version_counter=False
    )
    average = [WeightEMA(EmaConfig(setting.ema))] if setting.ema else []
    ours = [
        point,
        Stopwatch(),
        LearningRateMonitor("step"),
        *average,
        ExampleScores(),
        StabilityGuard(),
    ]
    ours += [Signal(place), best]
    trainer = quiet_trainer(
        **({"max_epochs": EPOCHS, "log_every_n_steps": 1} | setting.trainer),
        callbacks=[*ours, EpochEnd(point)],
        logger=RunLogger(folder),
        plugins=[SafeCheckpointIO()],
        default_root_dir=folder,
        enable_checkpointing=True,
    )
    torch.rand(
        7 if resume else 1
    )  # whatever a start draws: the generators have to be put back after it
    with interruption:
        try:
            trainer.fit(task, data, ckpt_path=resume, weights_only=True)
        except Interrupted:
            return {}
    state = trainer._checkpoint_connector.dump_checkpoint()
    state["metrics.csv"] = (folder / "metrics.csv").read_bytes()
    return state


def unequal(first: Any, second: Any, name: str = "") -> list[str]:
    """Names of everything that differs between two states; floating-point numbers have to be equal to the last bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
        return [] if same else [name]
    if isinstance(first, dict) and isinstance(second, dict):
        keys = first.keys() | second.keys()
        return [
            each
            for key in sorted(keys, key=str)
            for each in unequal(first.get(key), second.get(key), f"{name}/{key}")
        ]
    if (
        isinstance(first, (list, tuple))
        and isinstance(second, (list, tuple))
        and len(first) == len(second)
    ):
        return [
            each
            for i, pair in enumerate(zip(first, second, strict=True))
            for each in unequal(*pair, f"{name}/{i}")
        ]
    return [] if first == second else [name]


def compared(state: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal: all but clocks, and the folder's name."""
    kept = {key: value for key, value in state.items() if key not in ("callbacks", "loops")}
    callbacks = {}
    for name, value in state["callbacks"].items():
        if name.startswith("ModelCheckpoint"):
            callbacks[name] = value["best_model_score"]
        elif name == "Stopwatch":
            callbacks[name] = value["images"]
        else:
            callbacks[name] = value
    return kept | {"callbacks": callbacks}


def run_cell(setting: Setting, place: str, baseline: dict[str, Any], root: Path) -> dict[str, Any]:
    """Interrupt and resume; what differs from the uninterrupted training, and what was done."""
    folder = Path(tempfile.mkdtemp(dir=root))
    assert train(folder, setting, PLACES[place]) == {}, "the signal must interrupt"
    found, refused = newest_valid(folder / "checkpoints")
    assert found is not None
    assert not refused
    state = train(folder, setting, resume=found.path)
    if (
        found.step == baseline["global_step"]
    ):  # no step is left, for which generators would be put back
        state[MARK]["random"] = baseline[MARK]["random"]
    differs = unequal(compared(baseline), compared(state))
    leaked = [path.name for path in folder.rglob("*.tmp")]
    return {"resumed_at_step": found.step, "differs": differs, "leaked": leaked}
