"""The model that a training has so far: from its checkpoint, of one process or of many."""

from __future__ import annotations

from pathlib import Path

from moevision.errors import UserError
from moevision.models.io import SavedModel, load_model, saying_what_fails

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
    from moevision.train.checkpoint import START, SafeCheckpointIO, check_checkpoint
    from moevision.train.resume import MARK
    from moevision.train.task import ClassificationTask

    check_checkpoint(address)
    checkpoint = SafeCheckpointIO().load_checkpoint(path)
    known = checkpoint.get(MARK, {}).get("data")
    if known is None:
        raise UserError(f"{address} doesn't name its classes, as those of this version do: go on with the run first.")
    with saying_what_fails(address):
        options = dict(checkpoint["hyper_parameters"])
        sizes = options.pop("num_classes"), options.pop("image_size")
        task = ClassificationTask(**options)
        task.build(*sizes, load_pretrained=False, kept=path.parent / START)
        state = checkpoint["state_dict"].items()
        task.net.load_state_dict({name.removeprefix("net."): x for name, x in state if name.startswith("net.")})
    mean, std = (tuple(each) for each in known["mean_std"])
    return SavedModel(task.net.eval(), known["class_names"], task.hparams["image_size"], mean, std)
