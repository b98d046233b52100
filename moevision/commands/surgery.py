"""`moevision surgery MODEL`: prune, merge or collapse the experts of a model, and measure what it costs.

The experts are chosen on one set of images (validation by default), the cost is measured on another: nothing is chosen
on the set that is reported.
"""

from __future__ import annotations

import copy
import shlex
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moevision.analysis.collect import PictureReader
from moevision.analysis.images import PictureSet, pictures_for
from moevision.commands.upcycle import check_folder, write_model
from moevision.efficiency import measure_cost
from moevision.errors import UserError, shown
from moevision.models.io import SavedModel, best_device, load_model
from moevision.models.surgery import (
    ExpertUse,
    collapse_to_dense,
    layers_by_block,
    measure_use,
    merge_experts,
    most_used,
    prune_experts,
    similar_groups,
)
from moevision.stats import accuracy_interval, paired_difference
from moevision.train.provenance import collect_provenance
from moevision.words import loading


def run(chosen: Namespace) -> None:
    """Operate, measure, and write the new model with `surgery.json`."""
    if chosen.split == chosen.use_split:
        raise UserError(f"--split and --use-split are both {chosen.split!r}: never choose on the set that is reported.")
    if not chosen.align and (chosen.prune is not None or chosen.collapse == "most_used"):
        raise UserError("--no-align is for averages: --prune and --collapse most_used average nothing.")
    check_folder(chosen.out, force=chosen.force)
    with loading("loading the model"):
        saved = load_model(chosen.model)
    layers_by_block(saved.net)  # a dense model is refused before images are read
    saved.net.to(best_device())
    used_on, tested_on = (
        _pictures(chosen, saved, split, limit)
        for split, limit in ((chosen.use_split, chosen.use_limit), (chosen.split, chosen.limit))
    )
    use = measure_use(saved.net, (images for images, _ in _batches(saved, used_on, chosen.batch_size)))
    net, layers = _operate(saved.net, chosen, use)
    after = replace(saved, net=net.eval(), temperature=None, strangers=None)  # another model
    kind = next(name for name in ("prune", "merge", "collapse") if getattr(chosen, name) is not None)
    record = {
        "model": chosen.model,
        "operation": {"kind": kind, "amount": getattr(chosen, kind), "align": chosen.align},
        "use": {"pictures": used_on.name, "layers": layers},
        "accuracy": {"pictures": tested_on.name, **_compare(saved, after, tested_on, chosen.batch_size)},
        "costs": {
            name: asdict(measure_cost(each.net, each.image_size))
            for name, each in (("before", saved), ("after", after))
        },
        "provenance": collect_provenance(command=shlex.split(chosen.command), seed=None, data_sha256=None),
    }
    write_model(after, chosen.out, "surgery.json", record)
    _print_report(record)
    print(f"The new model is in {shown(str(chosen.out))}")


def _pictures(chosen: Namespace, saved: SavedModel, split: str, limit: int | None) -> PictureSet:
    pictures = pictures_for(chosen.model, saved, chosen.data, split=split, limit=limit, root=chosen.root)
    if pictures is None:
        raise UserError(
            f"{chosen.model} lies in no run that says on which images it was trained: say which, with --data."
        )
    if list(pictures.class_names) != list(saved.class_names):
        raise UserError(
            f"{pictures.name} has the classes {', '.join(pictures.class_names[:5])}, ..., and the model knows "
            f"{', '.join(saved.class_names[:5])}, ...: give data of the model's classes."
        )
    return pictures


def _batches(saved: SavedModel, pictures: PictureSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the network takes them [B, 3, S, S] and labels [B]; unreadable images are left out with a warning."""
    weight = next(saved.net.parameters())
    reader = PictureReader(pictures, saved, batch_size)
    for batch in reader.batches(progress=True):
        yield batch.images.to(weight.device, weight.dtype), batch.labels
    reader.report()


def _operate(
    net: nn.Module, chosen: Namespace, use: dict[int, ExpertUse]
) -> tuple[nn.Module, dict[int, dict[str, Any]]]:
    seen: dict[int, dict[str, Any]] = {
        block: {"counts": layer.counts.tolist(), "gates_per_token": layer.gate_total} for block, layer in use.items()
    }
    if chosen.collapse is not None:
        return collapse_to_dense(net, chosen.collapse, use=use, align=chosen.align), seen
    if chosen.prune is not None:
        kept = {block: most_used(layer, max(len(layer.counts) - chosen.prune, 0)) for block, layer in use.items()}
        return prune_experts(net, kept), {block: {**seen[block], "kept": kept[block]} for block in use}
    groups = {block: similar_groups(layer, chosen.merge) for block, layer in use.items()}
    merged = merge_experts(net, groups, use=use, align=chosen.align)
    return merged, {block: {**seen[block], "groups": groups[block]} for block in use}


def _compare(before: SavedModel, after: SavedModel, pictures: PictureSet, batch_size: int) -> dict[str, Any]:
    """Accuracy of both and of a control on the same images, with the paired difference after - before.

    The control is the same network with MoE layers that give nothing, so that only the residual stream passes. An
    average of experts that have little in common is nearly that, and should not be taken for a good dense layer.
    """
    control = copy.deepcopy(before.net)
    for block in layers_by_block(control):
        cast(Any, control).blocks[block].mlp = _Nothing()
    nets = {"before": before.net, "after": after.net, "without": control}
    rows: list[npt.NDArray[np.bool_]] = []
    with torch.inference_mode():
        for images, labels in _batches(before, pictures, batch_size):
            answers = torch.stack([net(images).argmax(-1).cpu() for net in nets.values()])  # [3, B]
            known = labels >= 0  # [B]; images of classes that the model doesn't know have the label -1
            rows.append((answers == labels)[:, known].numpy())
    correct = dict(zip(nets, np.concatenate(rows, axis=1), strict=True))  # each [n], in the order of the images
    if not correct["before"].size:
        raise UserError(f"{pictures.name} has no image of a class that the model knows: give other --data.")
    found: dict[str, Any] = {"n": correct["before"].size}
    for name, hits in correct.items():
        low, high = accuracy_interval(int(hits.sum()), len(hits))
        found[name] = {"correct": int(hits.sum()), "top1": float(hits.mean()), "low": low, "high": high}
    return {**found, "difference": asdict(paired_difference(correct["after"], correct["before"]))}


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _print_report(record: dict[str, Any]) -> None:
    console = Console(highlight=False)
    used_on, tested_on = (shown(record[part]["pictures"]) for part in ("use", "accuracy"))
    console.print(f"use of experts on {used_on}, in percent of choices:", markup=False, soft_wrap=True)
    for block, layer in record["use"]["layers"].items():
        total = sum(layer["counts"])
        shares = " ".join(f"{100 * count / total:.1f}" for count in layer["counts"])
        done = "".join(f"; {name} {layer[name]}" for name in ("kept", "groups") if name in layer)
        console.print(
            f"  L{block}: {shares}; gates of a token sum to {layer['gates_per_token']:.2f}{done}", soft_wrap=True
        )
    accuracy, costs = record["accuracy"], record["costs"]
    table = Table("", "accuracy", "parameters", "active", "MFLOPs / image")
    for name, title in (("before", "before"), ("after", "after"), ("without", "no MoE layers")):
        hits, cost = accuracy[name], costs.get(name)
        cells = [f"{hits['top1']:.2%} ({hits['low']:.1%} to {hits['high']:.1%})"]
        if cost is not None:
            flops = (cost["flops_per_image"] + cost["router_flops_per_image"]) / 1e6
            cells += [f"{cost['total_parameters']:,}", f"{cost['active_parameters']:,}", f"{flops:,.1f}"]
        table.add_row(title, *cells)
    console.print(table)
    change = {name: 100 * accuracy["difference"][name] for name in ("difference", "low", "high")}
    console.print(
        f"accuracy changed by {change['difference']:+.2f} points ({change['low']:+.2f} to {change['high']:+.2f}, "
        f"paired, 95 %) on {accuracy['n']} images: {tested_on}",
        markup=False,
        soft_wrap=True,
    )
