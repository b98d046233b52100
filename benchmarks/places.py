"""A classifier that reads every place of the image, in the place of the mean over patches: a control, not a recipe.

The mean over patches forgets where each one was. An expert that only some places reach gives that back, so that a
router by place can look better than it is. With a linear layer over the normalized tokens of all places, dense models
know the place as well: logits = sum over places p of W_p LN(x_p) + b.

    python -m benchmarks places fit --config cifar10 --model.arch.name vit_moe_hybrid_wide_places_patch4_32 ...
    python -m benchmarks places test runs/NAME ...       # accuracy, also on shifted images: places.jsonl

`import benchmarks.places` registers the project's models for images of 32 px under names of their own, so that every
command builds, saves and loads them; `fit` is `moevision fit` with these names.

Axes: B images, C classes, D width, N places.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from benchmarks.accuracy import curve_of, read_finished
from benchmarks.harness import HERE, about, argument_parser
from moevision.cli import main as run_moevision
from moevision.data import ImageDataModule
from moevision.layers.routing import evaluating
from moevision.models.io import load_model
from moevision.models.safe_files import read_yaml
from moevision.models.vit_moe import _MODELS, VisionTransformerMoE, _build, _cfg

MICRO, HYBRID, WIDE = (f"vit_moe_{size}_patch4_32" for size in ("micro", "hybrid", "hybrid_wide"))
PLACES = {name: name.replace("_patch4", "_places_patch4") for name in (MICRO, HYBRID, WIDE)}
"""The name of a model that pools, and that of the same model that reads places."""
SHIFTS = (4, 8)
"""Pixels by which test images are moved: what reading places costs where the object isn't where it was."""


class PlacesHead(nn.Linear):
    """One linear layer over all places: normalized tokens [B, N, D] -> logits [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C]."""
        return super().forward(x.flatten(1))


class ReadsPlaces(VisionTransformerMoE):
    """The model of these arguments without pooling; the final norm is each token's."""

    def __init__(self, *, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(
            num_classes=num_classes, **{**kwargs, "class_token": False, "global_pool": ""}
        )
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier over all places, initialized as timm's ViT initializes linear layers (normal, SD .02)."""
        self.num_classes = num_classes
        self.head = PlacesHead(
            cast(int, self.patch_embed.num_patches) * self.embed_dim, num_classes
        )
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(cast(Tensor, self.head.bias))


_32 = {"img_size": 32, "patch_size": 4}
_STAGES = {**_32, "embed_dim": 128, "num_heads": 4, "moe_layers": "all"}
default_cfgs = generate_default_cfgs(
    {f"{own}.untrained": _cfg(32, _MODELS[name][1]["stem"]) for name, own in PLACES.items()}
)


@register_model
def vit_moe_micro_places_patch4_32(pretrained: bool = False, **kwargs: Any) -> ReadsPlaces:
    """`vit_moe_micro_patch4_32`, reading places."""
    size = {**_32, "embed_dim": 192, "depth": 6, "num_heads": 3, "stem": "conv"}
    return _build(ReadsPlaces, "vit_moe_micro_places_patch4_32", pretrained, {**size, **kwargs})


@register_model
def vit_moe_hybrid_places_patch4_32(pretrained: bool = False, **kwargs: Any) -> ReadsPlaces:
    """`vit_moe_hybrid_patch4_32`, reading places."""
    size = {**_STAGES, "depth": 4, "stem": "stages", "init_values": 0.1}
    return _build(ReadsPlaces, "vit_moe_hybrid_places_patch4_32", pretrained, {**size, **kwargs})


@register_model
def vit_moe_hybrid_wide_places_patch4_32(pretrained: bool = False, **kwargs: Any) -> ReadsPlaces:
    """`vit_moe_hybrid_wide_patch4_32`, reading places."""
    size = {**_STAGES, "depth": 2, "stem": "wide_stages"}
    return _build(
        ReadsPlaces, "vit_moe_hybrid_wide_places_patch4_32", pretrained, {**size, **kwargs}
    )


def shifted(images: Tensor, by: int, index: Tensor) -> Tensor:
    """Images [B, 3, S, S] moved by `by` pixels, image i to the left, right, top or bottom by i mod 4.

    The border is the mean colour, 0 in normalized images, as in the crops of training.
    """
    size, padded = images.shape[-1], F.pad(images, (by, by, by, by))
    out = torch.empty_like(images)
    for direction, (down, right) in enumerate(((by, 2 * by), (by, 0), (2 * by, by), (0, by))):
        own = index % 4 == direction
        out[own] = padded[own, :, down : down + size, right : right + size]
    return out


@torch.inference_mode()
def accuracy_of(net: nn.Module, data: ImageDataModule, by: int = 0) -> float:
    """Top-1 of the test images, each moved by `by` pixels."""
    right = torch.zeros(())
    with evaluating(net):
        for batch in data.test_dataloader():
            answers = net(shifted(batch["image"], by, batch["index"])).argmax(-1)
            right += (answers == batch["label"]).sum()
    return round(float(right) / len(data.contents.datasets["test"]), 6)


def record_of(run: Path) -> dict[str, Any]:
    """A finished run of `fit`: accuracy of its test images as they are and moved, counted anew from the saved model."""
    summary, provenance = read_finished(run)
    settings = read_yaml(run / "config.yaml")["data"]
    data = ImageDataModule(**{**settings, "batch_size": 256})
    data.setup()
    net = load_model(str(run)).net
    top1 = {
        "test_top1": accuracy_of(net, data),
        **{f"shifted_{by}": accuracy_of(net, data, by) for by in SHIFTS},
    }
    curve = [val for _, val, _ in curve_of(run / "metrics.csv", summary["batch_size"])]
    test = {name: summary["test"][name] for name in ("correct", "total")}
    return {
        "name": run.name,
        "model": summary["model"],
        "seed": summary["seed"],
        "epochs": summary["epochs"],
        "test": test,
        **top1,
        "curve": curve,
        "cpu_s": summary.get("cpu_s"),
        "trained_at": provenance["code"],
        **about(),
        "command": "python -m benchmarks places test",
    }


def main() -> None:
    """Train with these names, or test what was trained."""
    if sys.argv[1:2] == ["fit"]:
        sys.exit(run_moevision(sys.argv[1:]))
    parser = argument_parser("places", __doc__)
    add = parser.add_argument
    add("verb", choices=("fit", "test"))
    add("runs", nargs="+", type=Path, metavar="RUN", help="finished run folders")
    add(
        "--out", type=Path, default=HERE / "accuracy" / "places.jsonl", help="records (%(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for run in options.runs:
        record = record_of(run)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{run.name}: {record['test_top1']:.2%}, shifted {[record[f'shifted_{by}'] for by in SHIFTS]}",
            flush=True,
        )
