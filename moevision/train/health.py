"""What the command line hangs onto Lightning's Trainer: metrics.csv, times, router health, averages, how routing forms.

Times differ from run to run, so they stand in summary.md and never in metrics.csv, which a resumed run repeats exactly.

`max_violation` is max load / mean load - 1 of one layer in one update (MaxVio, arXiv:2408.15664, §2.2): 0 for perfect
balance, E/K - 1 for all tokens on K of E experts. `update_norm` is ‖Δw‖ of one applied update over all weights that
learn, `update_ratio` is ‖Δw‖ / ‖w‖; both jump before the loss does.
"""

# ruff: noqa: D102 (Lightning's hooks)

from __future__ import annotations

import csv
import math
import os
import time
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, cast

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from moevision.config import (
    MAX_RECORDED,
    EarlyStoppingConfig,
    EmaConfig,
    Framing,
    RecordRoutingConfig,
)
from moevision.data import ImageDataModule
from moevision.data.collection import interleave_by_class
from moevision.data.images import is_image_path, safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.errors import UserError, escape_controls
from moevision.files import write_text_atomic
from moevision.layers import MoEMlp, moe_layers
from moevision.models.history import FILE, RoutingHistory, moment_of, planned_moments
from moevision.models.vit_moe import set_fused_attention
from moevision.stats import fit_temperature
from moevision.train.processes import (
    gather_objects,
    parallel_strategy,
    print_rank0,
    sums_over_processes,
)
from moevision.train.task import ClassificationTask

MAX_DATA_WAIT: Final = 0.03  # of the training time: above it waiting for data is worth a remedy
_SETTLED_S = 30.0  # before that the first batches, which come late, weigh too much
_PATIENCE = 100  # updates that are summed before a layer is judged
_STARVED = 0.1  # of the mean load: an expert below it hardly learns


class RunLogger(CSVLogger):
    """Lightning's CSVLogger in a run folder, without deleting what is there."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The file behind it, as Lightning asks for it; on the first process only."""
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir)
        return cast(MetricsFile, self._experiment)


class MetricsFile(ExperimentWriter):
    """metrics.csv, to which a run that goes on adds its rows."""

    def _check_log_dir_exists(self) -> None:
        """Know the columns that are there; Lightning's own would delete the file."""
        self.metrics_keys = next(csv.reader(self._lines()), [])

    def _lines(self) -> list[str]:
        path = Path(self.metrics_file_path)
        return path.read_bytes().decode().splitlines(keepends=True) if path.is_file() else []

    def cut(self, rows: int) -> None:
        """Drop all rows after the first `rows`."""
        if len(lines := self._lines()) > rows + 1:
            write_text_atomic(self.metrics_file_path, "".join(lines[: rows + 1]))

    def save(self) -> None:
        super(ExperimentWriter, self).save()  # without hparams.yaml

    def count(self) -> int:
        """Write what is left to write; the number of rows."""
        self.save()
        return max(0, len(self._lines()) - 1)


def cpu_s() -> float:
    """CPU seconds of this process, all its threads and its children that have ended."""
    times = os.times()  # of children; its steps of 10 ms are too coarse for our own
    return time.process_time() + times.children_user + times.children_system


class Stopwatch(L.Callback):
    """Seconds and images of training proper, over all sessions of a run: validation is left out."""

    def __init__(self) -> None:
        self.train_s = 0.0
        self.images = 0  # over all processes
        self.data_wait_s = 0.0  # of `train_s`: this process waited for a batch
        self._started, self._waited, self._advised = 0.0, 0.0, False
        self._run_started, self._cpu_started = time.monotonic(), cpu_s()

    @property
    def data_wait(self) -> float | None:
        """Share of the training time in which the process waited for data, in [0, 1]; None before the training."""
        return self.data_wait_s / self.train_s if self.train_s else None

    @property
    def run_s(self) -> float:
        """Seconds since the run began, reading and validation included, interruptions left out."""
        return time.monotonic() - self._run_started

    @property
    def cpu_s(self) -> float:
        """CPU seconds over the same time, all threads of this process and of workers that have ended."""
        return cpu_s() - self._cpu_started

    def add(self, run_s: float, cpu_s: float) -> None:
        """Count what was done before: by an earlier session, or by another run for this one."""
        self._run_started -= run_s
        self._cpu_started -= cpu_s

    def state_dict(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("train_s", "images", "run_s", "cpu_s", "data_wait_s")
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_s, self.images = state_dict["train_s"], state_dict["images"]
        self.data_wait_s = (
            state_dict.get("data_wait_s") or 0.0
        )  # version 0.1 had neither this nor the next
        self.add(state_dict["run_s"], state_dict.get("cpu_s") or 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where a run goes on within an epoch, no epoch starts."""
        self._start(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        self._started, self._waited = (
            time.monotonic(),
            getattr(trainer.train_dataloader, "wait_s", 0.0),
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.images += len(batch["label"]) * trainer.world_size
        began, waited = self._started, self._waited
        self._start(trainer)
        self.train_s += self._started - began
        self.data_wait_s += self._waited - waited

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._advised and self.train_s >= _SETTLED_S and trainer.is_global_zero:
            self._advised = True
            for sentence in data_wait_advice(self.data_wait, cast(Any, trainer).datamodule):
                print_rank0(sentence)


class StopEarly(EarlyStopping):
    """Lightning's EarlyStopping, which also stays stopped when a finished training is gone on with."""

    def __init__(self, config: EarlyStoppingConfig, of_checkpoint: str | None = None) -> None:
        """`of_checkpoint` is --checkpoint.monitor, which goes where early stopping has no monitor of its own."""
        monitor, patience = (
            config.monitor or of_checkpoint or "val/top1",
            cast(int, config.patience),
        )
        mode = "min" if monitor == "val/loss" else "max"
        # not finite is not better, and the guard's business
        super().__init__(monitor, patience=patience, mode=mode, check_finite=False, strict=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train no further epoch if the checkpoint was saved after the decision to stop."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for sentence in self.sentences(trainer):
                print_rank0(sentence)

    def sentences(self, trainer: L.Trainer) -> list[str]:
        """What summary.md says, if training ended before its last step."""
        steps, planned = trainer.global_step, trainer.estimated_stepping_batches
        if self.wait_count < self.patience or steps >= planned:
            return []
        in_steps = trainer.max_steps > 0
        done = (
            f"{steps} of {planned} steps"
            if in_steps
            else f"{trainer.current_epoch} of {trainer.max_epochs} epochs"
        )
        return [
            f"Stopped early after {done}: {self.monitor} was no better than {float(self.best_score):.4f} in "
            f"{self.wait_count} validations. The learning rate had not come down to its end."
        ]


def data_wait_advice(share: float | None, data: ImageDataModule) -> list[str]:
    """A sentence that says what to change, if training waited for data for too large a share of its time."""
    if share is None or share <= MAX_DATA_WAIT:
        return []
    remedies = [f"raise --data.num_workers (now {data.num_workers})"]
    if not data.contents.fits_memory:
        remedies.insert(
            0, f"keep the decoded images in memory (--data.cache_mb above {data.cache_mb})"
        )
    if data.augment in ("randaugment", "trivialaugment"):
        remedies.append("choose --data.augment light")
    return [
        f"Training waited for data during {100 * share:.0f} % of its time: {', or '.join(remedies)}."
    ]


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether the numbers of this step, counted from 1, are logged; none where --trainer.log_every_n_steps is 0."""
    every: int = cast(Any, trainer).log_every_n_steps
    return every != 0 and step % every == 0


class RouterHealth(L.Callback):
    """Logs `train/update_norm`, `train/update_ratio`, `moe/<layer>/max_violation`; warns of collapse once per layer."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []
        self._loads: list[Tensor] = []
        self._updates = 0
        self._warned: set[int | None] = set()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_logged(trainer, trainer.global_step + 1):
            self._before = [parameter.detach().clone() for parameter in _learning(pl_module)]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        task = cast(ClassificationTask, pl_module)
        before, self._before = self._before, []
        if not task.update_applied:
            return
        if before:
            self._log_update(task, before)
        counts = [count.detach() for count in task.window_counts]
        self._loads = (
            [sum_ + count for sum_, count in zip(self._loads, counts, strict=True)]
            if self._loads
            else counts
        )
        if is_logged(trainer, trainer.global_step):
            for layer, count in zip(moe_layers(task.net), sums_over_processes(counts), strict=True):
                load = count.double()
                task.log(
                    f"moe/{layer.layer_index}/max_violation", (load.max() / load.mean() - 1).float()
                )
        self._updates += 1
        if self._updates % _PATIENCE == 0:
            for layer, count in zip(
                moe_layers(task.net), sums_over_processes(self._loads), strict=True
            ):
                self._judge(task, layer, count.double())
            self._loads = []

    @torch.no_grad()
    def _log_update(self, task: ClassificationTask, before: list[Tensor]) -> None:
        after = _learning(task)
        norm = task.tensors.total_norm
        update = norm([now.detach() - then for now, then in zip(after, before, strict=True)])
        task.log("train/update_norm", update)
        task.log("train/update_ratio", update / norm(before))

    def _judge(self, task: ClassificationTask, layer: MoEMlp, load: Tensor) -> None:
        starved = (load < _STARVED * load.mean()).nonzero().flatten().tolist()
        losses, block = sorted(layer.router.losses - {"z"}), layer.layer_index
        biased = getattr(layer.router, "bias_rate", None) is not None
        frozen = not any(parameter.requires_grad for parameter in layer.parameters())
        if not starved or frozen or block in self._warned or not (biased or losses):
            return
        self._warned.add(block)
        advice = "Give the bias a larger --model.arch.bias_rate."
        if not biased:
            names = " or ".join(f"--model.aux.{name}" for name in losses)
            advice = f"Give {names} more weight, lower --model.optim.lr, or use --model.arch.router bias_balanced."
        if task.trainer.is_global_zero:
            print_rank0(
                f"warning: experts collapse in block {block}: {len(starved)} of {len(load)} experts "
                f"({', '.join(map(str, starved))}) got less than a tenth of the mean load in the last {_PATIENCE} "
                f"updates, so they hardly learn. {advice}"
            )


def _learning(module: L.LightningModule) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# ---- a moving average of the weights


class WeightEMA(L.Callback):
    """Keeps `ema = decay · ema + (1 - decay) · weights` over every *applied* update, by timm's `ModelEmaV3`.

    The first update copies the weights. With the warm-up the decay of update u = 2, 3, ... is `1 - u^-0.75`, at most
    the given one, so that a short training soon forgets its first weights. Floating-point buffers (BatchNorm
    statistics, router biases) are averaged like weights, counters are copied.
    Lightning's `EMAWeightAveraging` (2.6) counts refused steps too, and copies the module, which FSDP2 refuses.

    Validation, test and export use the average: a checkpoint holds it as `state_dict`, and the weights that training
    goes on with as `current_model_state`, as Lightning's has. After `fit` the model *is* the average. While `swapped`,
    the network holds the average and `network` the weights. It stands in front of the `StabilityGuard`.
    """

    def __init__(self, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self.swapped = False
        self._average: ModelEmaV3 | None = None

    @property
    def network(self) -> nn.Module | None:
        """The averaged network (the weights in training, while `swapped`); None before the training."""
        return None if self._average is None else self._average.module

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average is None:
            self._begin(trainer, pl_module)
        cast(nn.Module, self.network).to(pl_module.device)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net, divided = cast(ClassificationTask, pl_module).net, parallel_strategy(trainer)
        self._average = ModelEmaV3(
            net
            if divided is None
            else divided.copy_of(net),  # of the own part; FSDP2 has no copies
            decay=cast(float, self.config.decay),
            use_warmup=self.config.warmup,
            warmup_power=0.75,
            foreach=divided is None,  # torch's functions on lists of tensors want one mesh
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        task = cast(ClassificationTask, pl_module)
        if task.update_applied:
            self.updates += 1
            cast(ModelEmaV3, self._average).update(task.net, self.updates)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average is not None and trainer.state.fn is TrainerFn.FITTING:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.swapped:
            self._swap(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Put the weights back if a validation was interrupted, before anything saves them."""
        if self.swapped:
            self._swap(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        cast(ClassificationTask, pl_module).net.load_state_dict(
            cast(nn.Module, self.network).state_dict()
        )
        self._average = None  # another fit begins with what the model then holds

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule) -> None:
        ours, theirs = cast(nn.Module, self.network), cast(ClassificationTask, pl_module).net
        for one, other in zip(
            (*ours.parameters(), *ours.buffers()),
            (*theirs.parameters(), *theirs.buffers()),
            strict=True,
        ):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
        self.swapped = not self.swapped

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = int(state_dict["updates"])

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average is None:
            return
        other = {
            f"net.{name}": value
            for name, value in cast(nn.Module, self.network).state_dict().items()
        }
        current = checkpoint["state_dict"]
        average = {**current, **other}
        checkpoint["state_dict"], checkpoint["current_model_state"] = (
            (current, average) if self.swapped else (average, current)
        )

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The model has just loaded the average.
        if trainer.state.fn is not TrainerFn.FITTING:
            return
        self._begin(trainer, pl_module)
        pl_module.load_state_dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))


class Calibrate(L.Callback):
    """Fits the temperature on the validation images when a trained model is tested."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        task, loader = cast(Any, pl_module), cast(Any, trainer).datamodule.val_dataloader()
        set_fused_attention(task.net, True)  # as in validation
        limit = trainer.limit_val_batches
        batches = min(
            len(loader), limit if isinstance(limit, int) else math.ceil(limit * len(loader))
        )
        own: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        for batch in islice(loader, batches):
            batch = {name: value.to(task.device) for name, value in batch.items()}
            batch = trainer.precision_plugin.convert_input(batch)
            with trainer.precision_plugin.forward_context():
                logits = task(batch["image"]).float()
            own.append((logits.cpu().numpy(), batch["label"].cpu().numpy()))
        known = list(chain.from_iterable(gather_objects(own)))
        if known:
            task.calibration = fit_temperature(
                *(np.concatenate(part) for part in zip(*known, strict=True))
            )


# ---- how routing forms: `fit --record_routing`; its file is described in `models.history`

MOMENTS: Final = 24
_COST = 0.01  # of the training's work: the most that moments take whose number nobody gave


class RecordRouting(L.Callback):
    """Records with the weights in training (not their moving average), in evaluation mode; at last the saved model.

    A resumed run drops what was recorded after the checkpoint that it goes on from. Of several processes the first one
    records; a model without MoE layers has nothing to record, nor has one that several processes share.
    """

    def __init__(self, config: RecordRoutingConfig, run_dir: Path) -> None:
        self.config, self.file = config, run_dir / FILE
        self._images: Tensor | None = None
        self._history = RoutingHistory((), (), 0)
        self._planned: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._begin(trainer, cast(ClassificationTask, pl_module)):
            self._record_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._images is not None:
            self._record_if_due(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._images is not None:
            self._record(trainer, pl_module)

    @property
    def _last(self) -> int:
        return self._history.steps[-1] if len(self._history) else -1

    def _begin(self, trainer: L.Trainer, task: ClassificationTask) -> bool:
        data, asked = cast(Any, trainer).datamodule, self.config.images
        total = trainer.estimated_stepping_batches  # asks all processes
        alone = trainer.is_global_zero and parallel_strategy(trainer) is None
        if (
            not moe_layers(task.net)
            or not alone
            or bool(cast(Any, trainer).fast_dev_run)
            or total == float("inf")
        ):
            return False
        if isinstance(asked, str):
            names, pixels = _read(Path(asked), data.image_size, data.framing)
        else:
            names, pixels = _of_test(data, cast(int, asked))
        if not names:
            return False
        self._images = normalize(pixels, data.mean, data.std)
        batch = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        self._planned = planned_moments(
            int(total), self.config.moments or moments_for(int(total), batch, len(names))
        )
        self._history = RoutingHistory(
            names, tuple(data.class_names), int(total), task.arch.pretrained is not None
        )
        if trainer.global_step and self.file.is_file():
            earlier = RoutingHistory.load(self.file).until(trainer.global_step)
            if earlier.image_names == names and earlier.class_names == self._history.class_names:
                self._history = earlier
        return True

    def _record_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if any(self._last < planned <= trainer.global_step for planned in self._planned):
            self._record(trainer, pl_module)

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._last:
            with trainer.precision_plugin.forward_context():
                self._add(cast(ClassificationTask, pl_module), trainer.global_step)

    def _add(self, task: ClassificationTask, step: int) -> None:
        some = next(task.net.parameters())
        set_fused_attention(task.net, True)
        # A compiled block would be compiled again for this batch.
        with torch.compiler.set_stance("force_eager") if task.compile_blocks else nullcontext():
            moment = moment_of(task.net, cast(Tensor, self._images).to(some.device, some.dtype))
        task.choose_attention()
        self._history = self._history.plus(step, moment)
        self._history.save(self.file)

    def finish(self, trainer: L.Trainer, task: ClassificationTask, step: int) -> None:
        """Close with the model that is saved, which is of that step, in the place of all that came after it.

        The first process is alone here, and a training that ended in an earlier command can't be begun by it.
        """
        if self._images is not None or (trainer.world_size == 1 and self._begin(trainer, task)):
            self._history = self._history.until(step - 1)
            self._add(task, step)


def moments_for(steps: int, batch_size: int, images: int) -> int:
    """How many moments take about 1 % of a training of so many steps, at most 24.

    Forward and backward of a training image take about three times what its forward pass takes.
    """
    return max(2, min(MOMENTS, int(_COST * 3 * steps * batch_size / images)))


def _of_test(data: ImageDataModule, count: int) -> tuple[tuple[str, ...], Tensor]:
    """Names and pixels, as `_read` has them, of the first test images, classes in turn: those the explorer shows."""
    dataset = data.contents.datasets["test"]
    rows = interleave_by_class([sample.label for sample in dataset.samples])[:count]
    found = {
        row: own
        for row, own in zip(rows, dataset.pixels(rows), strict=True)
        if not isinstance(own, str)
    }
    names = tuple(escape_controls(dataset.samples[row].sample_id) for row in found)
    return names, torch.from_numpy(np.stack([*found.values()])) if found else torch.empty(0)


def _read(folder: Path, image_size: int, framing: Framing) -> tuple[tuple[str, ...], Tensor]:
    """Names [I] and pixels [I, 3, S, S] uint8 of the images below a folder, as evaluation sees them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and is_image_path(path))
    if not files or len(files) > MAX_RECORDED:
        raise UserError(
            f"--record_routing.images {folder} holds {len(files)} images: give a folder with 1 to {MAX_RECORDED}."
        )
    pixels = np.stack(
        [square_pixels(safe_open(file, image_size), image_size, framing) for file in files]
    )
    names = tuple(escape_controls(file.relative_to(folder).as_posix()) for file in files)
    return names, torch.from_numpy(pixels).permute(0, 3, 1, 2)
