"""Checkpoints that a crash or a flipped bit can't turn into a wrong training.

Contents: plain data only (`plain`), since a checkpoint is read with `weights_only=True`, which refuses NumPy's
numbers, paths and the like. Divided tensors are whole in it (`parallel.parts.gathered`).

Writing: Lightning's own goes through a temporary file in $TMPDIR, without fsync; on another file system a kill leaves
half a file. Here the temporary file lies in the target's own folder, is flushed, and renamed.

Reading: nothing in a file is run, and nothing unfolds to more than the file. A flipped bit inside a tensor loads
without an error, so the CRC-32 that the zip archive keeps of each part is compared first.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from typing import Any, cast, get_args

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map

from moevision.config import Fit, MoEConfig, OptimizerConfig
from moevision.errors import UserError
from moevision.files import write_bytes_atomic
from moevision.models.config import build_model
from moevision.models.io import (
    SavedModel,
    check_finite_weights,
    colours,
    explain_load_errors,
    from_cache_only,
    load_model,
)
from moevision.models.safe_files import check_arguments
from moevision.train.processes import broadcast_from_rank0
from moevision.types import State

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# A folder beside them, with the config.json of the model that training started from.
PRETRAINED_CONFIG = "start"
MARK = "moevision"  # the key of a checkpoint under which this package keeps its own part
_PREFERRED = {LAST: 2, PREVIOUS: 1}


def plain(value: Any) -> Any:
    """`value` with NumPy numbers and arrays, paths and enumerations as plain data, at any depth; the rest as it is."""
    return tree_map(_plain_leaf, value)


def _plain_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Enum):
        leaf = leaf.value
    if isinstance(leaf, np.generic | np.ndarray):
        return leaf.tolist()
    return str(leaf) if isinstance(leaf, PurePath) else leaf


@contextmanager
def explain_damaged_files(path: Path | str) -> Iterator[None]:
    """Say in one sentence that a checkpoint can't be read: damaged or foreign files fail in every type of error."""
    try:
        yield
    except UserError:
        raise
    # Zip, pickle, key and OS errors alike; torch's own words advise to trust the file.
    except Exception as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        if type(error) is ValueError:
            reason = str(error)
        raise UserError(
            f"The checkpoint {path} can't be read ({reason}): it is damaged, or no checkpoint of moevision. Use "
            "another one of the run, such as last.ckpt or best.ckpt."
        ) from error


def load_archive(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """Load what torch.save wrote, as data only; with `mmap` tensors stay on the disk until they are used."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no regular file")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            raise ValueError("its parts are compressed")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError("its parts overlap")
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


@dataclass(frozen=True)
class Verified:
    """A checkpoint by `verify`: its optimizer steps (-1: unknown), and why it can't be used (None: it can)."""

    path: Path
    step: int
    fault: str | None


def verify(path: Path) -> Verified:
    """Compare a checkpoint with its own checksums."""
    try:
        step = int(load_archive(path, mmap=True)["global_step"])
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    # Zip, pickle, key and OS errors alike: whatever it is, nothing can go on from it.
    except Exception as error:
        return Verified(path, -1, f"is no whole checkpoint ({type(error).__name__})")
    return Verified(path, step, None if damaged is None else f"is damaged in {damaged}")


def newest_valid(folder: Path) -> tuple[Verified | None, list[Verified]]:
    """The valid checkpoint of the latest step in `folder`, and those that can't be used.

    Between files of the same step `last.ckpt` wins, and then `previous.ckpt`.
    """
    checkpoints = [verify(path) for path in sorted(folder.glob("*.ckpt"))]
    valid = [checkpoint for checkpoint in checkpoints if checkpoint.fault is None]
    damaged = [checkpoint for checkpoint in checkpoints if checkpoint.fault is not None]
    valid.sort(key=lambda checkpoint: (checkpoint.step, _PREFERRED.get(checkpoint.path.name, 0)))
    return (valid[-1] if valid else None), damaged


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and reads only those that are as they were written.

    A new `last.ckpt` turns the one before into `previous.ckpt`, so that there are two to go on from.
    """

    def save_checkpoint(
        self, checkpoint: State, path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint. An OSError if the disk refuses it; the file that was there before then stays."""
        path = Path(path)
        memory = io.BytesIO()
        torch.save(checkpoint, memory)
        previous = path.with_name(PREVIOUS) if path.name == LAST else None
        write_bytes_atomic(path, memory.getvalue(), backup=previous)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,
        *,
        mmap: bool = False,
    ) -> State:
        """Read a checkpoint, never by unpickling; `weights_only` is there for Lightning's sake, `mmap` as above.

        Every process of a training must call it; the first one compares the checksums.
        """
        path = Path(path)
        fault = broadcast_from_rank0(lambda: verify(path).fault if path.exists() else "is missing")
        if fault is not None:
            raise UserError(f"The checkpoint {path} {fault}: use another one of the run.")
        with explain_damaged_files(path):
            result: State = load_archive(path, map_location or "cpu", mmap=mmap)
            return result


def check_checkpoint(name: str) -> State:
    """The content of a checkpoint, on the disk until it is used; a UserError if it is missing, damaged or foreign."""
    if not Path(name).exists():
        raise UserError(f"There is no checkpoint {name}: look in runs/NAME/checkpoints/.")
    with explain_damaged_files(name):
        checkpoint = load_archive(Path(name), mmap=True)
    options = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(options, dict) or "arch" not in options:
        raise UserError(
            f"The checkpoint {name} was not written by moevision: use one from runs/NAME/checkpoints/."
        )
    return cast(State, checkpoint)


# ---- the model that a training has so far


def load_trained(address: str) -> SavedModel:
    """Load a model as `load_model` does, or the weights of a checkpoint of a run (with a moving average: those)."""
    path = Path(address)
    if path.suffix != ".ckpt":
        return load_model(address)
    check_checkpoint(address)
    checkpoint = SafeCheckpointIO().load_checkpoint(path)
    with explain_load_errors(address), from_cache_only():
        return _model_of(checkpoint, path)


def _model_of(checkpoint: Mapping[str, Any], path: Path) -> SavedModel:
    options, data = checkpoint["hyper_parameters"], checkpoint[MARK]["data"]
    num_classes, image_size = options["num_classes"], options["image_size"]
    class_names, fit = data["class_names"], data.get("fit", "crop")
    if len(class_names) != num_classes or not all(isinstance(name, str) for name in class_names):
        raise ValueError("its classes have no names")
    if fit not in get_args(Fit):
        raise ValueError("it doesn't say how images become square")
    mean, std = data["mean_std"]
    mean, std = colours(mean, std, str(path))

    state = checkpoint["state_dict"].items()
    weights = {name.removeprefix("net."): x for name, x in state if name.startswith("net.")}
    arch = MoEConfig.from_checkpoint(options["arch"])
    OptimizerConfig(**options["optim"])  # a damaged record is refused as a whole
    build = partial(
        build_model,
        arch,
        num_classes,
        image_size,
        load_pretrained=False,
        pretrained_config_dir=path.parent / PRETRAINED_CONFIG,
    )
    # Options that describe a larger model than the weights are get no memory for it.
    arguments = {name: value for name, value in asdict(arch).items() if value is not None}
    arguments.pop("pretrained", None)
    check_arguments({**arguments, "num_classes": num_classes, "img_size": image_size})
    with torch.device("meta"):
        outline = build()
    if _numel(outline.parameters()) > _numel(weights.values()):
        raise ValueError("it describes more weights than it holds")

    net = build()
    net.load_state_dict(weights)
    check_finite_weights(net, str(path))
    thresholds: tuple[float, ...] = ()
    if data.get("multilabel") is True:
        thresholds = (0.5,) * num_classes
    return SavedModel(
        net.eval(), class_names, image_size, mean, std, fit=fit, thresholds=thresholds
    )


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
