"""The callbacks of a training: times, early stopping, router health, moving average, calibration, how routing forms.

Times differ from run to run, so they stand in summary.md and never in metrics.csv, which a resumed run repeats exactly.

`max_violation` is max load / mean load - 1 of one layer in one update (MaxVio, arXiv:2408.15664, §2.2): 0 for perfect
balance, E/K - 1 for all tokens on K of E experts. `update_norm` is ‖Δw‖ of one applied update over all weights that
learn, `update_ratio` is ‖Δw‖ / ‖w‖; both jump before the loss does.
"""

# ruff: noqa: D102 (Lightning's hooks, whose `task` is the `ClassificationTask`)

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
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
from moevision.layers import MoEMlp, moe_layers
from moevision.losses import sum_over_ranks
from moevision.models.history import FILE, RoutingHistory, moment_of, planned_moments
from moevision.models.vit_moe import set_fused_attention
from moevision.stats import fit_sets, fit_temperature
from moevision.train.processes import (
    data_of,
    gather_objects,
    is_trial,
    parallel_strategy,
    print_rank0,
)
from moevision.train.task import ClassificationTask
from moevision.types import State
from moevision.words import duration, percent

MAX_DATA_WAIT = 0.03  # of the training time: above it waiting for data is worth a remedy
_SETTLED_S = 30.0  # before that the first batches, which come late, weigh too much
_PATIENCE = 100  # updates that are summed before a layer is judged
_STARVED = 0.1  # of the mean load: an expert below it hardly learns


def cpu_s() -> float:
    """CPU seconds of this process, all its threads and its children that have ended."""
    times = os.times()  # of children; its steps of 10 ms are too coarse for our own
    return time.process_time() + times.children_user + times.children_system


class Stopwatch(Callback):
    """Seconds and images of training proper, over all sessions of a run: validation is left out."""

    def __init__(self) -> None:
        self.train_s = 0.0
        self.images = 0  # over all processes
        self.data_wait_s = 0.0  # of `train_s`: this process waited for a batch
        self._started = 0.0  # this step, on the clock
        self._waited = 0.0  # for batches up to then, by the loader's count
        self._advised = False
        self._run_started = time.monotonic()
        self._cpu_started = cpu_s()

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
        """Add the time of an earlier session, or of another run that did part of this one's work."""
        self._run_started -= run_s
        self._cpu_started -= cpu_s

    def state_dict(self) -> State:
        return {
            name: getattr(self, name)
            for name in ("train_s", "images", "run_s", "cpu_s", "data_wait_s")
        }

    def load_state_dict(self, state_dict: State) -> None:
        self.train_s = state_dict["train_s"]
        self.images = state_dict["images"]
        # Version 0.1 had neither of these.
        self.data_wait_s = state_dict.get("data_wait_s") or 0.0
        self.add(state_dict["run_s"], state_dict.get("cpu_s") or 0.0)

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        """Where a run goes on within an epoch, no epoch starts."""
        self._start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, task: Any) -> None:
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        self._started = time.monotonic()
        self._waited = getattr(trainer.train_dataloader, "wait_s", 0.0)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        task: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.images += len(batch["label"]) * trainer.world_size
        earlier, waited_earlier = self._started, self._waited
        self._start(trainer)
        self.train_s += self._started - earlier
        self.data_wait_s += self._waited - waited_earlier

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        self._start(trainer)

    def on_train_epoch_end(self, trainer: Trainer, task: Any) -> None:
        if not self._advised and self.train_s >= _SETTLED_S and trainer.is_global_zero:
            self._advised = True
            for sentence in data_wait_advice(self.data_wait, data_of(trainer)):
                print_rank0(sentence)


class StopEarly(EarlyStopping):
    """Lightning's EarlyStopping, which also stays stopped when a finished training is resumed."""

    def __init__(self, config: EarlyStoppingConfig, checkpoint_monitor: str | None = None) -> None:
        """`checkpoint_monitor` is --checkpoint.monitor, used where early stopping has no monitor of its own."""
        monitor = config.monitor or checkpoint_monitor or "val/top1"
        super().__init__(
            monitor,
            patience=cast(int, config.patience),
            mode="min" if monitor == "val/loss" else "max",
            check_finite=False,  # that is the guard's business
            strict=False,
        )

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        """Train no further epoch if the checkpoint was saved after the decision to stop."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, task: Any) -> None:
        if trainer.is_global_zero:
            for sentence in self.sentences(trainer):
                print_rank0(sentence)

    def sentences(self, trainer: Trainer) -> list[str]:
        """The sentence for summary.md, if training ended before its last step."""
        steps, planned = trainer.global_step, trainer.estimated_stepping_batches
        if self.wait_count < self.patience or steps >= planned:
            return []
        done = f"{trainer.current_epoch} of {trainer.max_epochs} epochs"
        if trainer.max_steps > 0:
            done = f"{steps} of {planned} steps"
        return [
            f"Stopped early after {done}: {self.monitor} was no better than {float(self.best_score):.4f} in "
            f"{self.wait_count} validations. The learning rate had not come down to its end."
        ]


class EpochLines(Callback):
    """Says after each validation how far the training is, where no progress bar does."""

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        self._began_s = time.monotonic()
        self._first_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        if trainer.state.fn is not TrainerFn.FITTING or trainer.sanity_checking:
            return
        steps = trainer.estimated_stepping_batches  # asks all processes
        if trainer.progress_bar_callback is not None or not trainer.is_global_zero:
            return

        epoch = f"epoch {trainer.current_epoch + 1}"
        if (trainer.max_epochs or 0) > 0:
            epoch += f" of {trainer.max_epochs}"
        shares = [float(trainer.callback_metrics[f"val/{name}"]) for name in task.targets.shown]
        accuracy, second = map(percent, shares)
        if "map" in task.targets.shown:
            accuracy = f"mAP {accuracy} (F1 at 0.5: {second})"
        elif second != accuracy:
            accuracy += f" (balanced {second})"

        steps_done = max(1, trainer.global_step - self._first_step)  # none behind a resume
        seconds_per_step = (time.monotonic() - self._began_s) / steps_done
        left_s = seconds_per_step * (steps - trainer.global_step)
        left = f", {duration(left_s)} left" if math.isfinite(left_s) else ""
        print(f"{epoch}: validation {accuracy}{left}", flush=True)


def data_wait_advice(share: float | None, data: ImageDataModule) -> list[str]:
    """Advice if training waited for data for too large a share of its time."""
    if share is None or share <= MAX_DATA_WAIT:
        return []
    remedies = [f"raise --data.num_workers (now {data.num_workers})"]
    if not data.contents.fits_memory:
        cache = f"keep the decoded images in memory (--data.cache_mb above {data.cache_mb})"
        remedies.insert(0, cache)
    if data.augment in ("randaugment", "trivialaugment"):
        remedies.append("choose --data.augment light")
    return [
        f"Training waited for data during {100 * share:.0f} % of its time: {', or '.join(remedies)}."
    ]


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the numbers of this step, counted from 1, are logged; none where --trainer.log_every_n_steps is 0."""
    every: int = cast(Any, trainer).log_every_n_steps
    return every != 0 and step % every == 0


class RouterHealth(Callback):
    """Logs `train/update_norm`, `train/update_ratio`, `moe/<layer>/max_violation`; warns of collapse once per layer."""

    def __init__(self) -> None:
        self._weights_before: list[Tensor] = []  # a logged update
        self._loads: list[Tensor] = []  # [E] of each layer over the last updates
        self._updates = 0
        self._warned: set[int | None] = set()  # blocks

    def on_before_optimizer_step(
        self, trainer: Trainer, task: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_logged(trainer, trainer.global_step + 1):
            self._weights_before = [x.detach().clone() for x in _learning_parameters(task)]

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        before, self._weights_before = self._weights_before, []
        if not task.update_applied:
            return
        if before:
            self._log_update(task, before)
        counts = [count.detach() for count in task.balance.counts]
        if is_logged(trainer, trainer.global_step):
            self._log_violation(task, counts)

        if self._loads:
            counts = [load + count for load, count in zip(self._loads, counts, strict=True)]
        self._loads = counts
        self._updates += 1
        if self._updates % _PATIENCE == 0:
            for layer, load in zip(moe_layers(task.net), sum_over_ranks(self._loads), strict=True):
                self._judge(task, layer, load.double())
            self._loads = []

    @torch.no_grad()
    def _log_update(self, task: ClassificationTask, before: list[Tensor]) -> None:
        after = _learning_parameters(task)
        changes = [new.detach() - old for new, old in zip(after, before, strict=True)]
        total_norm = task.tensors.total_norm
        update_norm = total_norm(changes)
        task.log("train/update_norm", update_norm)
        task.log("train/update_ratio", update_norm / total_norm(before))

    def _log_violation(self, task: ClassificationTask, counts: list[Tensor]) -> None:
        for layer, count in zip(moe_layers(task.net), sum_over_ranks(counts), strict=True):
            load = count.double()  # [E]
            violation = load.max() / load.mean() - 1
            task.log(f"moe/{layer.layer_index}/max_violation", violation.float())

    def _judge(self, task: ClassificationTask, layer: MoEMlp, load: Tensor) -> None:
        """Warn once of a layer with experts that get hardly any of the load [E], if options can change that."""
        block = layer.layer_index
        starved = (load < _STARVED * load.mean()).nonzero().flatten().tolist()
        is_frozen = not any(parameter.requires_grad for parameter in layer.parameters())
        if not starved or is_frozen or block in self._warned:
            return
        losses = sorted(layer.router.losses - {"z"})
        if getattr(layer.router, "bias_rate", None) is not None:
            advice = "Give the bias a larger --model.arch.bias_rate."
        elif losses:
            options = " or ".join(f"--model.aux.{name}" for name in losses)
            advice = f"Give {options} more weight, lower --model.optim.lr, or use --model.arch.router bias_balanced."
        else:
            return
        self._warned.add(block)
        if task.trainer.is_global_zero:
            experts = ", ".join(map(str, starved))
            print_rank0(
                f"warning: experts collapse in block {block}: {len(starved)} of {len(load)} experts ({experts}) got "
                f"less than a tenth of the mean load in the last {_PATIENCE} updates, so they hardly learn. {advice}"
            )


def _learning_parameters(module: LightningModule) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# ---- a moving average of the weights


class WeightEMA(Callback):
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

    def on_fit_start(self, trainer: Trainer, task: Any) -> None:
        if self._average is None:
            self._begin(trainer, task)
        cast(nn.Module, self.network).to(task.device)

    def _begin(self, trainer: Trainer, task: Any) -> None:
        net = task.net
        sharded = parallel_strategy(trainer)
        if sharded is not None:
            net = sharded.copy_of(
                net
            )  # of this process's part: a module that FSDP2 has sharded has no copies
        self._average = ModelEmaV3(
            net,
            decay=cast(float, self.config.decay),
            use_warmup=self.config.warmup,
            warmup_power=0.75,
            foreach=sharded is None,  # torch's functions on lists of tensors want one mesh
        )

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if task.update_applied:
            self.updates += 1
            cast(ModelEmaV3, self._average).update(task.net, self.updates)

    def on_validation_epoch_start(self, trainer: Trainer, task: Any) -> None:
        if self._average is not None and trainer.state.fn is TrainerFn.FITTING:
            self._swap(task)

    def on_validation_epoch_end(self, trainer: Trainer, task: Any) -> None:
        if self.swapped:
            self._swap(task)

    def on_exception(self, trainer: Trainer, task: Any, exception: BaseException) -> None:
        """Put the weights back if a validation was interrupted, before anything saves them."""
        if self.swapped:
            self._swap(task)

    def on_fit_end(self, trainer: Trainer, task: Any) -> None:
        task.net.load_state_dict(cast(nn.Module, self.network).state_dict())
        self._average = None  # another fit begins with what the model then holds

    @torch.no_grad()
    def _swap(self, task: Any) -> None:
        average = cast(nn.Module, self.network)
        net = task.net
        ours = [*average.parameters(), *average.buffers()]
        theirs = [*net.parameters(), *net.buffers()]
        for ema, weight in zip(ours, theirs, strict=True):
            copy = ema.clone()
            ema.copy_(weight)
            weight.copy_(copy)
        self.swapped = not self.swapped

    def state_dict(self) -> State:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: State) -> None:
        self.updates = int(state_dict["updates"])

    def on_save_checkpoint(self, trainer: Trainer, task: Any, checkpoint: State) -> None:
        if self._average is None:
            return
        network = cast(nn.Module, self.network).state_dict()
        current = checkpoint["state_dict"]
        average = {**current, **{f"net.{name}": value for name, value in network.items()}}
        if self.swapped:
            current, average = average, current
        checkpoint["state_dict"] = average
        checkpoint["current_model_state"] = current

    def on_load_checkpoint(self, trainer: Trainer, task: Any, checkpoint: State) -> None:
        # The model has just loaded the average.
        if trainer.state.fn is not TrainerFn.FITTING:
            return
        self._begin(trainer, task)
        task.load_state_dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))


class Calibrate(Callback):
    """Fits the temperature on the validation images when a trained model is tested."""

    def on_test_start(self, trainer: Trainer, task: Any) -> None:
        set_fused_attention(task.net, True)  # as in validation
        loader = data_of(trainer).val_dataloader()
        limit = trainer.limit_val_batches
        if isinstance(limit, float):  # a share of them
            limit = math.ceil(limit * len(loader))
        limit = min(limit, len(loader))  # islice takes no number beyond the machine's

        plugin = trainer.precision_plugin
        outputs = []
        for batch in islice(loader, limit):
            batch = {name: value.to(task.device) for name, value in batch.items()}
            batch = plugin.convert_input(batch)
            with plugin.forward_context():
                logits = task(batch["image"]).float()  # [B, C]
            target = batch.get("target", batch["label"])
            outputs.append((logits.cpu().numpy(), target.long().cpu().numpy()))

        outputs = list(chain.from_iterable(gather_objects(outputs)))  # of all processes
        if outputs:
            all_logits = np.concatenate([logits for logits, _ in outputs])
            all_labels = np.concatenate([labels for _, labels in outputs])
            task.calibration = fit_temperature(all_logits, all_labels)
            task.sets = fit_sets(all_logits, all_labels)
        if task.coverage is not None and task.sets is None:
            raise UserError(
                "--sets needs one class an image, and finite logits of the run's validation images: leave it out."
            )


# ---- how routing forms: `fit --record_routing`; its file is described in `models.history`

MOMENTS = 24
_COST = 0.01  # of the training's work: the most that moments take whose number nobody gave


class RecordRouting(Callback):
    """Records routing by the weights in training (not their average), in evaluation mode; at last by the saved model.

    A resumed run drops what was recorded after the checkpoint that it goes on from. Of several processes the first one
    records; a model without MoE layers has nothing to record, nor has one that several processes share.
    """

    def __init__(self, config: RecordRoutingConfig, run_dir: Path) -> None:
        self.config = config
        self.file = run_dir / FILE
        self._images: Tensor | None = None
        self._history = RoutingHistory((), (), 0)
        self._planned: list[int] = []
        self._loaded_step = 0  # of the checkpoint whose weights the model has

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        if self._begin(trainer, task):
            self._record_if_due(trainer, task)

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if self._images is not None:
            self._record_if_due(trainer, task)

    def on_train_end(self, trainer: Trainer, task: Any) -> None:
        if self._images is not None:
            self._record(trainer, task)

    @property
    def _last(self) -> int:
        return self._history.steps[-1] if len(self._history) else -1

    def _begin(self, trainer: Trainer, task: ClassificationTask) -> bool:
        total = trainer.estimated_stepping_batches  # asks all processes
        is_alone = trainer.is_global_zero and parallel_strategy(trainer) is None
        has_end = total != float("inf")
        if not moe_layers(task.net) or not is_alone or is_trial(trainer) or not has_end:
            return False

        data, source = data_of(trainer), self.config.images
        if isinstance(source, str):
            names, pixels = _read_folder(Path(source), data.image_size, data.framing)
        else:
            names, pixels = _read_test_images(data, cast(int, source))
        if not names:
            return False
        self._images = normalize(pixels, data.mean, data.std)

        steps = int(total)
        batch_size = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        moments = self.config.moments or moments_for(steps, batch_size, len(names))
        self._planned = planned_moments(steps, moments)
        self._history = RoutingHistory(
            names, tuple(data.class_names), steps, task.arch.pretrained is not None
        )
        if trainer.global_step and self.file.is_file():
            earlier = RoutingHistory.load(self.file).until(trainer.global_step)
            if earlier.image_names == names and earlier.class_names == self._history.class_names:
                self._history = earlier
        return True

    def _record_if_due(self, trainer: Trainer, task: Any) -> None:
        if any(self._last < planned <= trainer.global_step for planned in self._planned):
            self._record(trainer, task)

    def _record(self, trainer: Trainer, task: Any) -> None:
        if trainer.global_step > self._last:
            with trainer.precision_plugin.forward_context():
                self._add(task, trainer.global_step)

    def _add(self, task: ClassificationTask, step: int) -> None:
        like = next(task.net.parameters())
        images = cast(Tensor, self._images).to(like.device, like.dtype)
        set_fused_attention(task.net, True)
        # A compiled block would be compiled again for this batch.
        stance = torch.compiler.set_stance("force_eager") if task.compile_blocks else nullcontext()
        with stance:
            moment = moment_of(task.net, images, task.targets.probabilities)
        task.choose_attention()
        self._history = self._history.plus(step, moment)
        self._history.save(self.file)

    def on_load_checkpoint(self, trainer: Trainer, task: Any, checkpoint: State) -> None:
        self._loaded_step = int(checkpoint["global_step"])

    def on_test_end(self, trainer: Trainer, task: Any) -> None:
        """Record the model that was tested, which is the one that is saved, and drop what was recorded after its step.

        Of several processes only those of this training have images: one that ended in an earlier command can't be
        begun by the first process alone.
        """
        if self._images is not None or (trainer.world_size == 1 and self._begin(trainer, task)):
            self._history = self._history.until(self._loaded_step - 1)
            self._add(task, self._loaded_step)


def moments_for(steps: int, batch_size: int, images: int) -> int:
    """How many moments take about 1 % of a training of so many steps, at most 24.

    Forward and backward of a training image take about three times what its forward pass takes.
    """
    affordable = int(_COST * 3 * steps * batch_size / images)
    return max(2, min(MOMENTS, affordable))


def _read_test_images(data: ImageDataModule, count: int) -> tuple[tuple[str, ...], Tensor]:
    """Names and pixels, as `_read_folder` has them, of the first test images, classes in turn: the explorer's."""
    dataset = data.contents.datasets["test"]
    labels = [sample.label for sample in dataset.samples]
    rows = interleave_by_class(labels)[:count]
    names = []
    images = []
    for row in rows:
        image = dataset.pixels(row)
        if isinstance(image, str):  # the reason why it can't be read
            continue
        names.append(escape_controls(dataset.samples[row].sample_id))
        images.append(image)
    if not images:
        return (), torch.empty(0)
    return tuple(names), torch.from_numpy(np.stack(images))


def _read_folder(folder: Path, image_size: int, framing: Framing) -> tuple[tuple[str, ...], Tensor]:
    """Names [I] and pixels [I, 3, S, S] uint8 of the images below a folder, as evaluation sees them."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file() and is_image_path(path)]
    if not files or len(files) > MAX_RECORDED:
        raise UserError(
            f"--record_routing.images {folder} holds {len(files)} images: give a folder with 1 to {MAX_RECORDED}."
        )
    images = []
    for file in files:
        image = safe_open(file, image_size)
        images.append(square_pixels(image, image_size, framing))
    names = tuple(escape_controls(file.relative_to(folder).as_posix()) for file in files)
    pixels = torch.from_numpy(np.stack(images))  # [I, S, S, 3]
    return names, pixels.permute(0, 3, 1, 2)
