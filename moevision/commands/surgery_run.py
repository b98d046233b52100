"""Expert surgery with its measurement: what `moevision surgery` does.

What is taken away is decided on one set of pictures (validation by default), what it costs is measured on another:
nothing is chosen on the set that is reported.
"""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moevision.analysis.collect import PictureReader
from moevision.analysis.images import PictureSet, pictures_for
from moevision.efficiency import measure_cost
from moevision.errors import UserError
from moevision.files import write_json_atomic
from moevision.models.io import SavedModel, best_device, load_model, save_model
from moevision.models.surgery import (
    ExpertUse,
    collapse_to_dense,
    measure_use,
    merge_experts,
    most_used,
    numbered_layers,
    prune_experts,
    similar_groups,
)
from moevision.train.provenance import collect_provenance
from moevision.train.report import accuracy_interval, paired_difference


@dataclass(frozen=True)
class SurgerySettings:
    """What the command line asks for.

    Attributes:
        model: a run folder, its model/ folder, or a timm address.
        operation: `prune`, `merge` or `collapse`.
        amount: experts to take away, experts to leave, or how to collapse.
        out: folder to write.
        data: where pictures come from; what the run was trained on if None.
        root: folder of named datasets.
        split: the set that accuracy is measured on.
        use_split: the set that the use of experts is measured on.
        limit: pictures of `split`, all if None.
        use_limit: pictures of `use_split`.
        align: bring hidden units into one order before averaging.
        batch_size: pictures per forward pass.
        force: overwrite what `out` holds.
        command: the command line, for the record.
    """

    model: str
    operation: str
    amount: int | str
    out: Path
    data: str | None = None
    root: str | None = None
    split: str = "test"
    use_split: str = "val"
    limit: int | None = None
    use_limit: int = 1000
    align: bool = True
    batch_size: int = 64
    force: bool = False
    command: str = ""


def surgery(settings: SurgerySettings) -> dict[str, Any]:
    """Operate, measure, and write the new model with `surgery.json`.

    Returns:
        What `surgery.json` holds.

    Raises:
        UserError: if the model, its data or the operation isn't possible, or `out` holds something.
    """
    _check(settings)
    saved = load_model(settings.model)
    numbered_layers(saved.net)  # a dense model is refused before pictures are read
    saved.net.to(best_device())
    used_on, tested_on = (
        _pictures(settings, saved, split, limit)
        for split, limit in ((settings.use_split, settings.use_limit), (settings.split, settings.limit))
    )
    use = measure_use(saved.net, (images for images, _ in _batches(saved, used_on, settings.batch_size)))
    net, layers = _operate(saved.net, settings, use)
    after = replace(saved, net=net.eval())
    record = {
        "model": settings.model,
        "operation": {"kind": settings.operation, "amount": settings.amount, "align": settings.align},
        "use": {"pictures": used_on.name, "layers": layers},
        "accuracy": {"pictures": tested_on.name, **_compare(saved, after, tested_on, settings.batch_size)},
        "costs": _costs(saved, after),
        "provenance": collect_provenance(command=shlex.split(settings.command), seed=None, data_sha256=None),
    }
    _write(after, record, settings.out)
    return record


def _check(settings: SurgerySettings) -> None:
    if settings.split == settings.use_split:
        raise UserError(
            f"--split and --use-split are both {settings.split!r}: never choose on the set that is reported."
        )
    if settings.out.is_file() or (settings.out.is_dir() and any(settings.out.iterdir()) and not settings.force):
        raise UserError(f"{settings.out} is there already: give --out another name, or --force to write into it.")


def _pictures(settings: SurgerySettings, saved: SavedModel, split: str, limit: int | None) -> PictureSet:
    pictures = pictures_for(settings.model, saved, settings.data, split=split, limit=limit, root=settings.root)
    if pictures is None:
        raise UserError(f"{settings.model} lies in no run that tells its pictures: say which, with --data.")
    if list(pictures.class_names) != list(saved.class_names):
        raise UserError(
            f"{pictures.name} has the classes {', '.join(pictures.class_names[:5])}, ..., and the model knows "
            f"{', '.join(saved.class_names[:5])}, ...: give data of the model's classes."
        )
    return pictures


def _batches(saved: SavedModel, pictures: PictureSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the network takes them [B, 3, S, S] and labels [B]; unreadable pictures are left out with a warning."""
    weight = next(saved.net.parameters())
    reader = PictureReader(pictures, saved, batch_size)
    for batch in reader.batches(progress=True):
        yield batch.images.to(weight.device, weight.dtype), batch.labels
    reader.report()


def _operate(
    net: nn.Module, settings: SurgerySettings, use: dict[int, ExpertUse]
) -> tuple[nn.Module, dict[int, dict[str, Any]]]:
    """The new network, and per layer what was seen and done."""
    seen: dict[int, dict[str, Any]] = {
        block: {"counts": layer.counts.tolist(), "gates_per_token": layer.gate_total} for block, layer in use.items()
    }
    amount: Any = settings.amount
    if settings.operation == "collapse":
        return collapse_to_dense(net, amount, use=use, align=settings.align), seen
    if settings.operation == "prune":
        kept = {block: most_used(layer, max(len(layer.counts) - amount, 0)) for block, layer in use.items()}
        return prune_experts(net, kept), {block: {**seen[block], "kept": kept[block]} for block in use}
    groups = {block: similar_groups(layer, amount) for block, layer in use.items()}
    merged = merge_experts(net, groups, use=use, align=settings.align)
    return merged, {block: {**seen[block], "groups": groups[block]} for block in use}


def _compare(before: SavedModel, after: SavedModel, pictures: PictureSet, batch_size: int) -> dict[str, Any]:
    """Accuracy of both and of a control on the same pictures, with the paired difference after - before."""
    nets = {"before": before.net, "after": after.net, "without": _without_moe_layers(before.net)}
    rows: list[npt.NDArray[np.bool_]] = []
    with torch.inference_mode():
        for images, labels in _batches(before, pictures, batch_size):
            answers = torch.stack([net(images).argmax(-1).cpu() for net in nets.values()])
            known = labels >= 0
            rows.append((answers == labels)[:, known].numpy())
    correct = dict(zip(nets, np.concatenate(rows, axis=1), strict=True))
    if not correct["before"].size:
        raise UserError(f"{pictures.name} has no picture of a class that the model knows: give other --data.")
    return {
        "n": correct["before"].size,
        **{name: _accuracy(hits) for name, hits in correct.items()},
        "difference": asdict(paired_difference(correct["after"], correct["before"])),
    }


def _accuracy(hits: npt.NDArray[np.bool_]) -> dict[str, Any]:
    low, high = accuracy_interval(int(hits.sum()), len(hits))
    return {"correct": int(hits.sum()), "top1": float(hits.mean()), "low": low, "high": high}


def _without_moe_layers(net: nn.Module) -> nn.Module:
    """The control: the same network with MoE layers that give nothing, so that only the residual stream passes.

    An average of experts that have little in common is nearly that, and should not be taken for a good dense layer.
    """
    control = copy.deepcopy(net)
    for block in numbered_layers(net):
        cast(Any, control).blocks[block].mlp = _Nothing()
    return control


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _costs(before: SavedModel, after: SavedModel) -> dict[str, dict[str, int]]:
    return {
        name: asdict(measure_cost(model.net, model.image_size))
        for name, model in (("before", before), ("after", after))
    }


def _write(model: SavedModel, record: dict[str, Any], out: Path) -> None:
    """Each file whole or not at all; other files in `out` are left alone."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".surgery-") as place:
        save_model(model, Path(place))
        write_json_atomic(Path(place) / "surgery.json", record)
        for file in sorted(Path(place).iterdir()):
            os.replace(file, out / file.name)
