"""What the explorer shows of one picture: `route_image(model, image) -> RoutingView`.

Pure: a model and a picture in, numbers out; nothing of gradio, of visitors or of files. In a notebook the last line
of a cell shows the same interactive view as the web page. `to_json` is the schema `moevision.view/2`.

Axes: P patches (row-major, prefix tokens left out), K choices, E experts, C classes, L MoE layers. Where experts
choose patches or mix them, K = E, best first, and `kept` says which of them computed the patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from moevision.demo.facts import (
    ModelFacts,
    PictureFacts,
    Pixels,
    describe,
    model_input,
    route_batch,
    softmax,
    title_of,
)
from moevision.demo.kinds import LayerFacts
from moevision.demo.settings import Settings, intervention_json
from moevision.demo.slots import SlotWeights
from moevision.layers import Routing, SoftRouting
from moevision.models.io import SavedModel, load_model

SCHEMA: Final = "moevision.view/2"
TOP: Final = 5


@dataclass(frozen=True)
class LayerView:
    """Where one MoE layer sent the patches of the picture.

    Attributes:
        facts: which layer, and how it routes; `top_k` is what is shown, which may not be as trained.
        expert_index: [P, K] experts of each patch, best first.
        combine_weight: [P, K] weight of each of them in the output.
        kept: [P, K] False where an expert didn't compute the patch: a capacity dropped the choice, or the expert chose
            other patches.
        probs: [P, E] the router's affinities, summing to 1.
        slots: what slots read and patches take; None but for Soft MoE.
    """

    facts: LayerFacts
    expert_index: npt.NDArray[np.int64]
    combine_weight: npt.NDArray[np.float32]
    kept: npt.NDArray[np.bool_]
    probs: npt.NDArray[np.float32]
    slots: SlotWeights | None = None

    @property
    def margin(self) -> npt.NDArray[np.float32]:
        """[P] best minus second-best router probability; with one expert its probability."""
        ordered = np.sort(self.probs, axis=1)
        second = ordered[:, -2] if ordered.shape[1] > 1 else np.zeros_like(ordered[:, -1])
        margin: npt.NDArray[np.float32] = ordered[:, -1] - second
        return margin

    @property
    def entropy_bits(self) -> npt.NDArray[np.float32]:
        """[P] entropy of the router's probabilities, in bits."""
        p = self.probs.astype(np.float64)
        bits = -np.sum(p * np.log2(np.where(p > 0, p, 1)), axis=1)
        positive: npt.NDArray[np.float32] = np.maximum(bits, 0).astype(np.float32)
        return positive

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[E] what each expert computes: patch choices, or slots."""
        if self.facts.slots is not None:
            return np.full(self.facts.num_experts, self.facts.slots, np.int64)
        return np.bincount(self.expert_index[self.kept], minlength=self.facts.num_experts)

    @property
    def requested(self) -> npt.NDArray[np.int64]:
        """[E] what was asked of each expert, dropped choices too."""
        if self.facts.kind != "token_choice":
            return self.counts
        return np.bincount(self.expert_index.ravel(), minlength=self.facts.num_experts)

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON, real ones with four decimals; where experts choose, those that took the patch only."""
        counts, facts = self.counts, self.facts.to_json()
        del facts["refused"]  # about the model, not about this picture
        choices: list[Any] = [self.expert_index.tolist(), _round(self.combine_weight), self.kept.tolist()]
        if self.facts.kind == "expert_choice":
            takers = [[rank for rank, taken in enumerate(row) if taken] for row in choices[2]]
            choices = [[[row[rank] for rank in ranks] for row, ranks in zip(of, takers, strict=True)] for of in choices]
        return {
            **facts,
            **dict(zip(("experts", "weights", "kept"), choices, strict=True)),
            "probs": _round(self.probs),
            "margin": _round(self.margin),
            "entropy": _round(self.entropy_bits),
            "counts": counts.tolist(),
            "requested": self.requested.tolist(),
            "slowest": round(float(counts.max() / counts.mean()), 4) if counts.any() else 0.0,
            "reads": None if self.slots is None else np.round(self.slots.reads, 5).tolist(),
        }


@dataclass(frozen=True)
class RoutingView:
    """One picture, where every patch of it went, and what the model made of it.

    Attributes:
        model: which model.
        picture: which picture.
        layers: one entry per MoE layer, in order of depth.
        probabilities: [C] of the MoE.
        dense_probabilities: [C] of its dense twin; None without one.
        settings: what was changed about the model.
    """

    model: ModelFacts
    picture: PictureFacts
    layers: tuple[LayerView, ...] = field(repr=False)
    probabilities: npt.NDArray[np.float32] = field(repr=False)
    dense_probabilities: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    settings: Settings = field(default_factory=Settings)

    def layer(self, block_index: int) -> LayerView:
        """The MoE layer in that block."""
        return self.layers[self.model.layers.index(block_index)]

    def to_json(self) -> dict[str, Any]:
        """The view in the schema `moevision.view/2`."""
        names, dense = self.model.class_names, self.dense_probabilities
        settings = self.settings
        changed = settings.intervention
        reason = settings.off_reason(self.model.routers)
        return {
            "schema": SCHEMA,
            "model": self.model.to_json(),
            "picture": self.picture.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "prediction": {
                "moe": top_classes(names, self.probabilities),
                "dense": None if dense is None else top_classes(names, dense),
            },
            "settings": {
                "top_k": self.model.top_k if settings.top_k is None else settings.top_k,
                "capacity": settings.capacity,
                "intervention": None if changed is None else intervention_json(changed),
                "off_distribution": reason is not None or changed is not None,
                "off_reason": reason,
            },
        }

    def _repr_html_(self) -> str:
        from moevision.demo.html import view_html

        return view_html(self.to_json(), full_page=False)


def route_image(
    model: SavedModel | str | Path,
    image: Image.Image | Pixels | str | Path,
    *,
    dense: SavedModel | None = None,
    settings: Settings | None = None,
    facts: ModelFacts | None = None,
    picture: PictureFacts | None = None,
) -> RoutingView:
    """Route one picture and say where every patch went.

    Args:
        model: a MoE model, or its folder or timm address.
        image: a PIL picture, uint8 [H, W, 3] RGB pixels, or an image file; its central square is used.
        dense: the dense twin, whose prediction then stands beside the MoE's.
        settings: other top-k, a capacity, or an intervention; as trained if None.
        facts: how the view calls the model; found out from the model if None.
        picture: how the view calls the picture; its pixels are replaced by those that the model saw.

    Raises:
        UserError: if the model has no MoE layer, or the picture can't be read.
    """
    saved = model if isinstance(model, SavedModel) else load_model(str(model))
    settings = settings or Settings()
    facts = facts or describe(saved, title="" if isinstance(model, SavedModel) else title_of(model))
    pixels = model_input(image, saved.image_size)
    with settings.applied(saved.net):
        logits, routings = route_batch(saved, pixels[None])
    known = picture or PictureFacts(pixels, name=Path(image).name if isinstance(image, str | Path) else "one image")
    return RoutingView(
        model=facts,
        picture=PictureFacts(pixels, known.id, known.name, known.label, known.unlike),
        layers=tuple(
            _layer_view(routing, router, settings) for routing, router in zip(routings, facts.routers, strict=True)
        ),
        probabilities=softmax(logits)[0],
        dense_probabilities=None if dense is None else _dense(dense, image, pixels),
        settings=settings,
    )


def top_classes(names: Sequence[str], probabilities: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
    """The likeliest classes, best first, at most five: `{"class", "p"}`."""
    best = np.argsort(-probabilities, kind="stable")[:TOP]
    return [{"class": names[index], "p": round(float(probabilities[index]), 4)} for index in best]


def _dense(dense: SavedModel, image: Image.Image | Pixels | str | Path, pixels: Pixels) -> npt.NDArray[np.float32]:
    if dense.image_size != len(pixels):
        pixels = model_input(image, dense.image_size)
    probabilities: npt.NDArray[np.float32] = softmax(route_batch(dense, pixels[None])[0])[0]
    return probabilities


def _layer_view(routing: Routing, facts: LayerFacts, settings: Settings) -> LayerView:
    first = routing.num_prefix_tokens
    top_k = routing.top_k  # also what an intervention around us has made of it
    if routing.kind != "token_choice":
        top_k = facts.top_k if settings.top_k is None or "top_k" in facts.refused else settings.top_k
    return LayerView(
        facts=replace(facts, top_k=top_k),
        expert_index=routing.expert_index[0, first:].cpu().numpy(),
        combine_weight=routing.combine_weight[0, first:].float().cpu().numpy(),
        kept=routing.kept[0, first:].cpu().numpy(),
        probs=routing.probs[0, first:].float().cpu().numpy(),
        slots=SlotWeights.of(routing) if isinstance(routing, SoftRouting) else None,
    )


def _round(values: npt.NDArray[Any]) -> Any:
    return np.round(values.astype(np.float64), 4).tolist()
