"""`moevision upcycle` and `moevision surgery`: a model made from another one without training, and what that costs.

Surgery chooses experts on one set of images (validation by default) and measures on another: nothing is chosen on the
set that is reported.
"""

from __future__ import annotations

import copy
import shlex
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from moevision.analysis.collect import PictureReader
from moevision.analysis.images import PictureSet, open_pictures, pictures_for
from moevision.commands.info import cost_table
from moevision.data import SyntheticPets
from moevision.data.transforms import normalize
from moevision.efficiency import measure_cost
from moevision.errors import UserError, shown
from moevision.files import write_json_atomic
from moevision.models.convert import unread_layers
from moevision.models.io import SavedModel, best_device, describe, load_model, save_model
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
from moevision.models.upcycle import START_IMAGES, load_dense, start_routers, step0_gap, upcycle
from moevision.models.vit_moe import MOE_ARGUMENTS
from moevision.stats import accuracy_interval, paired_difference
from moevision.train.provenance import collect_provenance
from moevision.words import loading, shell_word

GAP_IMAGES = 32  # drawn images for the comparison of outputs; one pass even of a large ViT takes seconds
SAME = 1e-5  # max |Δ logit| below which two models compute the same in float32


def check_folder(out: Path, *, force: bool) -> None:
    """Refuse to write into a folder that holds something, unless `force` says that this is meant."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not force):
        raise UserError(f"{out} is there already: give --out another name, or --force to write into it.")


def write_model(saved: SavedModel, out: Path, name: str, record: dict[str, Any]) -> None:
    """Write the model, and `record` as the JSON file `name`; other files in the folder are left alone."""
    save_model(saved, out)
    write_json_atomic(out / name, record)


# ---- a dense model becomes a Mixture of Experts that computes the same


def run_upcycle(chosen: Namespace) -> None:
    """Convert, measure, and write the new model with `upcycle.json`."""
    out = Path(chosen.out)
    check_folder(out, force=chosen.force)
    if (chosen.router_start == "cluster") != (chosen.data is not None):
        raise UserError("--router-start cluster and --data belong together: the images whose tokens are clustered.")
    for name, _ in chosen.option:
        if name not in MOE_ARGUMENTS:
            raise UserError(f"There is no option {name!r}: use one of {', '.join(MOE_ARGUMENTS)}.")
    # In `upcycle` `noise` is that on the copies.
    options = {"router_noise" if name == "noise" else name: value for name, value in chosen.option}
    with loading("reading the dense model"):
        sizes = {name: getattr(chosen, name) for name in ("num_classes", "image_size", "depth")}
        dense = load_dense(chosen.model, chosen.weights, **sizes, seed=chosen.seed)
    if not dense.num_classes:
        raise UserError(f"{chosen.model} has no classifier: say how many classes it shall have, --num-classes N.")
    with loading("copying experts"):
        names = ("num_experts", "top_k", "router", "expert_hidden", "noise", "reinit", "seed")
        moe = upcycle(dense, layers=chosen.layers or None, **{name: getattr(chosen, name) for name in names} | options)
    saved = describe(moe.eval())
    start: dict[str, Any] = {}
    if chosen.router_start == "cluster":
        data = {} if chosen.root is None else {"root": chosen.root}
        sizes = {"framing": saved.framing, "limit": START_IMAGES, "seed": chosen.seed}
        pictures = open_pictures(chosen.data, saved.image_size, split="train", **sizes, **data)
        reader = PictureReader(pictures, saved, batch_size=64)
        with loading("clustering the routers' input"):
            batches = (batch.images for batch in reader.batches(progress=True))
            shares = start_routers(saved.net, batches, seed=chosen.seed)
        reader.report()
        start = {"router_start": {"kind": "cluster", "pictures": pictures.name, "shares": shares}}
    with loading("measuring"):
        record = {"source": chosen.model, "moe_config": moe.moe_config, **start, **measure(dense, saved)}
    write_model(saved, out, "upcycle.json", record)
    console = Console(highlight=False)
    _print_upcycling(console, record)
    unread = unread_layers(saved.net)
    if unread:
        console.print(
            f"the classifier reads the class token alone, so the routes of patches in block {unread[-1]} change no "
            "answer: leave --layers out, or fine-tune with --model.arch.global_pool avg",
            soft_wrap=True,
        )
    command = f"moevision fit FOLDER --pretrained {shell_word(str(out))} --data.image_size {saved.image_size}"
    if (saved.mean, saved.std) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):  # what `fit` takes by itself
        command += f" --data.mean '{list(saved.mean)}' --data.std '{list(saved.std)}'"
    console.print(f"\nnext: {shown(command)}", markup=False, soft_wrap=True)


def measure(dense: nn.Module, saved: SavedModel) -> dict[str, Any]:
    """Cost before and after, and the gap between the outputs on drawn pets.

    Not on noise: its patches are all alike, and routers that mix or drop tokens hardly change them.
    """
    side = saved.image_size
    pets = SyntheticPets(GAP_IMAGES, side, 0, "test")
    pixels = np.stack([pets.image(index) for index in range(len(pets))])  # uint8 [B, S, S, 3]
    images = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), saved.mean, saved.std)
    costs = {"before": measure_cost(dense, side), "after": measure_cost(saved.net, side)}
    return {
        "image_size": side,
        "classes": len(saved.class_names),
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "step0_gap": asdict(step0_gap(dense, saved.net, images)),
    }


def _print_upcycling(console: Console, record: dict[str, Any]) -> None:
    config, gap = record["moe_config"], record["step0_gap"]

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(
        f"{shown(record['source'])}: {record['classes']} classes, {record['image_size']} px; {config['num_experts']} "
        f"experts of {config['expert_hidden']} hidden units, top_k {config['top_k']}, router {config['router']}, in "
        f"blocks {', '.join(map(str, config['moe_layers']))}"
    )
    if "router_start" in record:
        shares = [max(each) * len(each) for each in record["router_start"]["shares"].values()]
        say(
            f"routers start from clusters of what {record['router_start']['pictures']} gives them; largest over mean "
            f"cluster {', '.join(f'{share:.2f}' for share in shares)}"
        )
    console.print(cost_table({"dense": record["costs"]["before"], "upcycled": record["costs"]["after"]}))
    say(
        f"outputs before training, on {gap['images']} drawn images: max |Δ logit| {gap['max_logit']:.2g} (the dense "
        f"logits' standard deviation is {gap['logit_scale']:.2g}), same class for {gap['agreement']:.0%}"
    )
    if gap["max_logit"] > SAME:
        say(
            "so training starts from other outputs than the dense model's: noise, reinit, a capacity in evaluation, "
            "fewer experts per token than share an MLP, and the routers expert_choice and soft change them"
        )


# ---- experts are removed


def run_surgery(chosen: Namespace) -> None:
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
    _print_surgery(record)
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


def _print_surgery(record: dict[str, Any]) -> None:
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
