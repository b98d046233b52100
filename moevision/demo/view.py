"""What the explorer shows of one image: `route_image(model, image, settings) -> RoutingView`.

Pure: a model and an image in, numbers out; nothing of gradio, of visitors or of files. In a notebook the last line
of a cell shows the same interactive view as the web page. `to_json` is the schema `moevision.view/2`. `Settings` are
what a person may change before an image is routed: top-k, capacity, one intervention.

Axes: P patches (row-major, prefix tokens left out), K choices, E experts, C classes, L MoE layers. Where experts choose
patches or mix them, K = E, best first, and `kept` says which of them computed the patch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.special import entr
from torch import Tensor, nn

from moevision.analysis.intervention import Intervention, intervene, numbered_layers, refusal
from moevision.demo.computation import Computation, LayerActivations, capture_activations
from moevision.demo.facts import (
    LayerFacts,
    ModelFacts,
    PictureFacts,
    Pixels,
    describe,
    model_input,
    noise_of_training,
    route_batch,
    softmax,
    title_of,
)
from moevision.demo.html import VIEW_SCHEMA, view_html
from moevision.errors import UserError
from moevision.layers import Routing, SoftRouting, routing_lock
from moevision.models.io import SavedModel, load_model

KINDS: Final = ("ablate", "force", "swap", "random")
FILLS: Final = ("next_best", "zero")


@dataclass(frozen=True)
class Settings:
    """How an image is routed, where it differs from how the model was trained."""

    top_k: int | None = None  # experts per patch
    capacity: float | None = (
        None  # an expert computes at most ceil(capacity · choices / E) of an image's choices
    )
    intervention: Intervention | None = None  # one change of the routing, of one of `KINDS`
    noise: int | None = (
        None  # seed of the noise that routers draw in training; None for evaluation, without noise
    )
    away: tuple[
        Intervention, ...
    ] = ()  # experts that are taken away, beside the one change of `intervention`

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Hold `net` in these settings inside the scope; if they change anything, other threads wait for their turn."""
        top_k = [] if self.top_k is None else _where_possible(net, "top_k", top_k=self.top_k)
        capacity = (
            [] if self.capacity is None else _where_possible(net, "capacity", factor=self.capacity)
        )
        changed = (*top_k, *capacity, *self.away, *filter(None, [self.intervention]))
        with (
            intervene(net, *changed) if changed else nullcontext(),
            noise_of_training(net, self.noise),
        ):
            yield

    def off_reason(self, routers: Sequence[LayerFacts]) -> str | None:
        """How k and capacity differ from the training, in words; None where they don't."""
        reasons = [] if self.top_k is None else _other_k(self.top_k, routers)
        if self.capacity is not None:
            reasons += _other_capacity(self.capacity, routers)
        return " ".join(reasons) or None


def _where_possible(
    net: nn.Module, kind: Literal["top_k", "capacity"], **value: Any
) -> list[Intervention]:
    """The change on those layers of `net` where it has a meaning; some must have."""
    layers = numbered_layers(net)
    able = [number for number, layer in layers.items() if refusal(kind, layer.router) is None]
    # Where none is able, the first one says why.
    return [Intervention(kind, layer=number, **value) for number in able or layers]


def _other_k(k: int, routers: Sequence[LayerFacts]) -> list[str]:
    """At most one sentence about an other k."""
    able = [router for router in routers if "top_k" not in router.refused]
    trained = {
        router.k_words: [other.name for other in able if other.k_words == router.k_words]
        for router in able
    }
    if all(router.top_k == k for router in able):
        return []
    if len(trained) == 1:
        shown = f"top-{k}" if able[0].kind == "token_choice" else str(k)
        return [f"Trained with {able[0].k_words}, shown is {shown}."]
    was = "; ".join(f"{words} in {' and '.join(names)}" for words, names in trained.items())
    return [f"Shown is k = {k}; trained were {was}."]


def _other_capacity(factor: float, routers: Sequence[LayerFacts]) -> list[str]:
    """A sentence about layers whose patches choose, and one about those whose experts do."""
    able = [router for router in routers if "capacity" not in router.refused]
    limits = {router.train_capacity for router in able if router.kind == "token_choice"}
    sentences = []
    if limits == {None}:
        sentences.append(f"Trained without a capacity limit, shown is capacity factor {factor:g}.")
    elif limits - {factor}:
        was = " and ".join(
            sorted(
                "no limit" if limit is None else f"capacity factor {limit:g}" for limit in limits
            )
        )
        sentences.append(f"Trained with {was}, shown is {factor:g}.")
    if factor != 1 and any(router.kind == "expert_choice" for router in able):
        sentences.append(f"Experts take {factor:g} times as many patches as trained.")
    return sentences


def intervention_json(change: Intervention) -> dict[str, Any]:
    """The fields of an intervention as the explorer's requests and answers have them; `other` is of a swap."""
    names = (
        "kind",
        "layer",
        "expert",
        *(["other"] if change.kind == "swap" else []),
        "fill",
        "seed",
    )
    return {name: getattr(change, name) for name in names}


TOP, LENS_TOP = 10, 2


@dataclass(frozen=True)
class LayerView:
    """Where one MoE layer sent the patches of the image."""

    facts: LayerFacts  # which layer, and how it routes; `top_k` is what is shown, which may not be as trained
    expert_index: npt.NDArray[np.int64]  # [P, K] experts of each patch, best first
    combine_weight: npt.NDArray[np.float32]  # [P, K] weight of each of them in the output
    kept: npt.NDArray[
        np.bool_
    ]  # [P, K] False where a capacity dropped the choice, or the expert chose other patches
    probs: npt.NDArray[np.float32]  # [P, E] the router's affinities, summing to 1
    reads: npt.NDArray[np.float64] | None = (
        None  # [E, P] what an expert reads, mean over its slots; of Soft MoE alone
    )
    computation: Computation | None = (
        None  # what was computed of it, in numbers; None where nobody listened
    )

    @property
    def margin(self) -> npt.NDArray[np.float32]:
        """[P] best minus second-best router probability; with one expert its probability."""
        ordered = np.sort(np.pad(self.probs, ((0, 0), (1, 0))), axis=1)
        return ordered[:, -1] - ordered[:, -2]

    @property
    def entropy_bits(self) -> npt.NDArray[np.float32]:
        """[P] entropy of the router's probabilities, in bits."""
        bits: npt.NDArray[np.float64] = entr(self.probs.astype(np.float64)).sum(1) / np.log(2)
        return np.maximum(bits, 0).astype(np.float32)

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
        del facts["refused"]  # about the model, not about this image
        choices: list[Any] = [
            self.expert_index.tolist(),
            _round(self.combine_weight),
            self.kept.tolist(),
        ]
        if self.facts.kind == "expert_choice":
            takers = [[rank for rank, taken in enumerate(row) if taken] for row in choices[2]]
            choices = [
                [[row[rank] for rank in ranks] for row, ranks in zip(of, takers, strict=True)]
                for of in choices
            ]
        return {
            **facts,
            **dict(zip(("experts", "weights", "kept"), choices, strict=True)),
            "probs": _round(self.probs),
            "margin": _round(self.margin),
            "entropy": _round(self.entropy_bits),
            "counts": counts.tolist(),
            "requested": self.requested.tolist(),
            "slowest": round(float(counts.max() / counts.mean()), 4) if counts.any() else 0.0,
            "computation": None if self.computation is None else self.computation.to_json(),
            "reads": None if self.reads is None else np.round(self.reads, 5).tolist(),
        }


@dataclass(frozen=True)
class RoutingView:
    """One image, where every patch of it went, and what the model made of it.

    Attributes:
        model: which model.
        picture: which image.
        layers: one entry per MoE layer, in order of depth.
        probabilities: [C] of the MoE.
        dense_probabilities: [C] of its dense twin; None without one.
        settings: what was changed about the model.
        lens: [blocks, C] probabilities by the logit lens (`demo/view.py`); None for a network without blocks.
    """

    model: ModelFacts
    picture: PictureFacts
    layers: tuple[LayerView, ...] = field(repr=False)
    probabilities: npt.NDArray[np.float32] = field(repr=False)
    dense_probabilities: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    settings: Settings = field(default_factory=Settings)
    lens: npt.NDArray[np.float32] | None = field(default=None, repr=False)

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
            "schema": VIEW_SCHEMA,
            "model": self.model.to_json(),
            "picture": self.picture.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "prediction": {
                "moe": top_classes(names, self.probabilities),
                "dense": None if dense is None else top_classes(names, dense),
            },
            "lens": None
            if self.lens is None
            else [top_classes(names, block, LENS_TOP) for block in self.lens],
            "settings": {
                "top_k": self.model.top_k if settings.top_k is None else settings.top_k,
                "capacity": settings.capacity,
                "intervention": None if changed is None else intervention_json(changed),
                "noise": settings.noise,
                "away": [[one.layer, one.expert] for one in settings.away],
                "off_distribution": reason is not None
                or changed is not None
                or bool(settings.away),
                "off_reason": reason,
            },
        }

    def _repr_html_(self) -> str:
        return view_html(self.to_json(), full_page=False)


def route_image(
    model: SavedModel | str | Path,
    image: Image.Image | Pixels | str | Path,
    *,
    dense: SavedModel | None = None,
    dense_probabilities: npt.NDArray[np.float32] | None = None,
    settings: Settings | None = None,
    facts: ModelFacts | None = None,
    picture: PictureFacts | None = None,
) -> RoutingView:
    """Route one image and say where every patch went.

    Args:
        model: a MoE model, or its folder or timm address.
        image: a PIL image, uint8 [H, W, 3] RGB pixels, or an image file; made square as the model does it.
        dense: the dense twin, whose prediction then stands beside the MoE's.
        dense_probabilities: [C] what the dense twin said about this image, where the twin itself isn't here.
        settings: other top-k, a capacity, or an intervention; as trained if None.
        facts: how the view calls the model; found out from the model if None.
        picture: how the view calls the image; its pixels are replaced by those that the model saw.

    Raises:
        UserError: if the model has no MoE layer, the image can't be read, or the answer is no number.
    """
    saved = model if isinstance(model, SavedModel) else load_model(str(model))
    settings = settings or Settings()
    facts = facts or describe(saved, title="" if isinstance(model, SavedModel) else title_of(model))
    pixels = model_input(image, saved.image_size, saved.framing)
    with routing_lock(
        saved.net
    ):  # the layers' clean scores too: another thread's noise would be in them
        with (
            settings.applied(saved.net),
            capture_activations(saved.net) as heard,
            block_outputs(saved.net) as outputs,
        ):
            logits, routings = route_batch(saved, pixels[None])
        if not logits.isfinite().all():
            raise UserError(
                "The model's answer to this image is no number: its weights are too large, or damaged."
            )
        layers = tuple(
            _layer_view(routing, router, settings, one)
            for routing, router, one in zip(routings, facts.routers, heard, strict=True)
        )
    if dense is not None:
        alike = (
            pixels
            if dense.image_size == len(pixels)
            else model_input(image, dense.image_size, dense.framing)
        )
        dense_probabilities = softmax(route_batch(dense, alike[None])[0])[0]
    after_blocks = lens(saved.net, outputs)
    known = picture or PictureFacts(
        pixels, name=Path(image).name if isinstance(image, str | Path) else "one image"
    )
    return RoutingView(
        model=facts,
        picture=replace(known, pixels=pixels),
        layers=layers,
        probabilities=softmax(logits)[0],
        dense_probabilities=dense_probabilities,
        settings=settings,
        lens=None if after_blocks is None else softmax(after_blocks),
    )


def top_classes(
    names: Sequence[str], probabilities: npt.NDArray[np.float32], count: int = TOP
) -> list[dict[str, Any]]:
    """The `count` likeliest classes, best first: `{"class", "p"}`."""
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [{"class": names[index], "p": round(float(probabilities[index]), 4)} for index in best]


def _layer_view(
    routing: Routing, facts: LayerFacts, settings: Settings, heard: LayerActivations
) -> LayerView:
    first = routing.num_prefix_tokens
    top_k = routing.top_k  # also what an intervention around us has made of it
    if routing.kind != "token_choice":
        top_k = (
            facts.top_k if settings.top_k is None or "top_k" in facts.refused else settings.top_k
        )
    noisy = settings.noise is not None and facts.noise != "none"
    capacity = None if "capacity" in facts.refused else settings.capacity
    words = heard.layer.router.explain(noisy=noisy, top_k=top_k, capacity=capacity)
    return LayerView(
        facts=replace(facts, top_k=top_k, steps=words),
        expert_index=routing.expert_index[0, first:].cpu().numpy(),
        combine_weight=routing.combine_weight[0, first:].float().cpu().numpy(),
        kept=routing.kept[0, first:].cpu().numpy(),
        probs=routing.probs[0, first:].float().cpu().numpy(),
        reads=_reads(routing) if isinstance(routing, SoftRouting) else None,
        computation=heard.computation(routing, noisy=noisy),
    )


# The logit lens (nostalgebraist, "interpreting GPT", 2020): final norm, pooling and head, applied to the output of each
# block as they are. They were trained for the last one alone, so of an earlier one they are an untrained readout.


@contextmanager
def block_outputs(net: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what the blocks of `net` give, each [1, N, D] for one image; in this thread, and until the scope closes.

    The list fills in order of depth while the model runs; it stays empty where a network has no blocks.
    """
    outputs: list[Tensor] = []
    thread = threading.get_ident()

    def keep(_module: nn.Module, _given: tuple[Any, ...], result: Tensor) -> None:
        if threading.get_ident() == thread:
            outputs.append(result)

    with routing_lock(net), ExitStack() as hooks:
        for block in getattr(net, "blocks", ()):
            hooks.enter_context(block.register_forward_hook(keep))
        yield outputs


@torch.inference_mode()
def lens(net: Any, outputs: list[Tensor]) -> Tensor | None:
    """Logits [L, C] of the head after each block; the last row is the model's own. None without blocks."""
    if not outputs:
        return None
    return torch.cat([net.forward_head(net.norm(output)) for output in outputs])


def _reads(routing: SoftRouting) -> npt.NDArray[np.float64]:
    """[E, P] what experts read of the patches of a batch of one image: means over their slots."""
    weight = (
        routing.dispatch_weight[0, routing.num_prefix_tokens :].double().cpu().numpy()
    )  # [P, E, S]
    mean: npt.NDArray[np.float64] = weight.mean(2).T
    return mean


def _round(values: npt.NDArray[Any]) -> Any:
    return np.round(values.astype(np.float64), 4).tolist()
