"""Recording how routing forms: `fit --record_routing.images FOLDER`; its file is described in `models.history`."""

# ruff: noqa: D102 (Lightning's hooks)

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor

from moevision.config import RecordRoutingConfig
from moevision.data.images import BadImageError, is_image_path, safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.errors import UserError, shown
from moevision.layers import moe_layers
from moevision.models.history import FILE, RoutingHistory, moment_of, planned_moments
from moevision.models.vit_moe import set_fused_attention
from moevision.train.task import ClassificationTask

MAX_IMAGES = 64


class RecordRouting(L.Callback):
    """Records with the weights in training (not their moving average), in evaluation mode.

    A resumed run drops what was recorded after the checkpoint that it goes on from, so that its file is that of an
    uninterrupted one. Of several processes the first one records. A model without MoE layers has nothing to record.
    """

    def __init__(self, config: RecordRoutingConfig, run_dir: Path) -> None:
        self.config, self.file = config, run_dir / FILE
        self._images: Tensor | None = None
        self._history = RoutingHistory((), (), 0)
        self._planned: list[int] = []

    @staticmethod
    def of(config: RecordRoutingConfig, run_dir: Path) -> list[L.Callback]:
        """The callback that the config asks for, if it does."""
        return [] if config.images is None else [RecordRouting(config, run_dir)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net, data = cast(ClassificationTask, pl_module).net, cast(Any, trainer).datamodule
        if not moe_layers(net) or not trainer.is_global_zero or bool(cast(Any, trainer).fast_dev_run):
            return
        folder, total = Path(cast(str, self.config.images)), trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("--record_routing needs a training with an end: give --trainer.max_epochs.")
        names, pixels = _read(folder, data.image_size)
        self._images = normalize(pixels, data.mean, data.std)
        self._planned = planned_moments(int(total), self.config.moments)
        self._history = RoutingHistory(names, tuple(data.class_names), int(total))
        if trainer.global_step and self.file.is_file():
            earlier = RoutingHistory.load(self.file).until(trainer.global_step)
            if earlier.image_names == names and earlier.class_names == self._history.class_names:
                self._history = earlier
        self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._record(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the end, also of a training that was stopped early."""
        self._record(trainer, pl_module, ends=True)

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, *, ends: bool = False) -> None:
        if self._images is None:
            return
        task, step = cast(ClassificationTask, pl_module), trainer.global_step
        last = self._history.steps[-1] if len(self._history) else -1
        due = any(last < planned <= step for planned in self._planned)
        if step <= last or not (due or ends):
            return
        dtype = next(task.net.parameters()).dtype
        set_fused_attention(task.net, True)
        with trainer.precision_plugin.forward_context():
            moment = moment_of(task.net, self._images.to(task.device, dtype))
        task.choose_attention()
        self._history = self._history.plus(step, moment)
        self._history.save(self.file)


def _read(folder: Path, image_size: int) -> tuple[tuple[str, ...], Tensor]:
    """Names [I] and pixels [I, 3, S, S] uint8 of the images below a folder, as evaluation sees them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and is_image_path(path))
    if not files or len(files) > MAX_IMAGES:
        raise UserError(
            f"--record_routing.images {folder} holds {len(files)} images: give a folder with 1 to {MAX_IMAGES}."
        )
    try:
        pixels = np.stack([square_pixels(safe_open(file, image_size), image_size) for file in files])
    except BadImageError as error:
        raise UserError(f"An image below --record_routing.images can't be used: {error}") from error
    names = tuple(shown(file.relative_to(folder).as_posix()) for file in files)
    return names, torch.from_numpy(pixels).permute(0, 3, 1, 2)
