"""The model that a training has so far: from its checkpoint, of one process or of many."""

from __future__ import annotations

from pathlib import Path

from moevision.errors import UserError
from moevision.models.io import SavedModel, load_model

SUFFIX = ".ckpt"


def load_trained(address: str) -> SavedModel:
    """Load a model as `load_model` does, or the weights of a checkpoint (with a moving average: those).

    Args:
        address: of a saved model, or `runs/NAME/checkpoints/NAME.ckpt`, a file or a folder. No process group is needed.

    Raises:
        UserError: if there is no model, its files are damaged or foreign, or an earlier version wrote the checkpoint.
    """
    path = Path(address)
    if path.suffix != SUFFIX:
        return load_model(address)
    from moevision.train.checkpoint import SafeCheckpointIO, check_checkpoint
    from moevision.train.resume import MARK
    from moevision.train.task import ClassificationTask

    check_checkpoint(address)
    checkpoint = SafeCheckpointIO().load_checkpoint(path)
    known = checkpoint.get(MARK, {}).get("data")
    if known is None:
        raise UserError(f"{address} doesn't name its classes, as those of this version do: go on with the run first.")
    task = ClassificationTask(**checkpoint["hyper_parameters"])
    weights = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("net.")}
    task.net.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
    return SavedModel(task.net.eval(), known["class_names"], task.hparams["image_size"], *known["mean_std"])
