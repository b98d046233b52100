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
from moevision.demo.wire import Floats, Json, to_numpy
from moevision.errors import UserError
from moevision.layers import Routing, SoftRouting, routing_lock
from moevision.models.io import SavedModel, load_model

KINDS: Final = ("ablate", "force", "swap", "random")
FILLS: Final = ("next_best", "zero")


@dataclass(frozen=True)
class Settings:
    """How an image is routed, where it differs from how the model was trained."""

    top_k: int | None = None  # experts per patch
    # An expert computes at most ceil(capacity · choices / E) of an image's choices.
    capacity: float | None = None
    intervention: Intervention | None = None  # one change of the routing, of one of `KINDS`
    # Seed of the noise that routers draw in training; None for evaluation, without noise.
    noise: int | None = None
    # Experts that are taken away, beside the one change of `intervention`.
    ablated_experts: tuple[Intervention, ...] = ()

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Hold `net` in these settings inside the scope; if they change anything, other threads wait for their turn."""
        changes: list[Intervention] = []
        if self.top_k is not None:
            changes += _where_possible(net, "top_k", top_k=self.top_k)
        if self.capacity is not None:
            changes += _where_possible(net, "capacity", factor=self.capacity)
        changes += self.ablated_experts
        if self.intervention is not None:
            changes.append(self.intervention)

        with (
            intervene(net, *changes) if changes else nullcontext(),
            noise_of_training(net, self.noise),
        ):
            yield

    def off_reason(self, routers: Sequence[LayerFacts]) -> str | None:
        """How k and capacity differ from the training, in words; None where they don't."""
        sentences = []
        if self.top_k is not None:
            sentences += _other_k(self.top_k, routers)
        if self.capacity is not None:
            sentences += _other_capacity(self.capacity, routers)
        return " ".join(sentences) or None

    def to_json(self, facts: ModelFacts) -> Json:
        """The settings as a view of that model says them."""
        reason = self.off_reason(facts.routers)
        changed = self.intervention is not None or bool(self.ablated_experts)
        return {
            "top_k": facts.top_k if self.top_k is None else self.top_k,
            "capacity": self.capacity,
            "intervention": self.intervention and intervention_json(self.intervention),
            "noise": self.noise,
            "away": [[change.layer, change.expert] for change in self.ablated_experts],
            "off_distribution": changed or reason is not None,
            "off_reason": reason,
        }


def _where_possible(
    net: nn.Module, kind: Literal["top_k", "capacity"], **value: Any
) -> list[Intervention]:
    """The change on those layers of `net` where it has a meaning; some must have."""
    layers = numbered_layers(net)
    possible = [number for number, layer in layers.items() if refusal(kind, layer.router) is None]
    # Where it is possible nowhere, the first layer says why.
    return [Intervention(kind, layer=number, **value) for number in possible or layers]


def _other_k(k: int, routers: Sequence[LayerFacts]) -> list[str]:
    """At most one sentence about an other k."""
    routers = [router for router in routers if "top_k" not in router.refused]
    if all(router.top_k == k for router in routers):
        return []
    trained_k: dict[str, list[str]] = {}  # names of the layers by their k
    for router in routers:
        trained_k.setdefault(router.k_text, []).append(router.name)
    if len(trained_k) == 1:
        first = routers[0]
        k_text = f"top-{k}" if first.kind == "token_choice" else str(k)
        return [f"Trained with {first.k_text}, shown is {k_text}."]
    texts = [f"{k_text} in {' and '.join(names)}" for k_text, names in trained_k.items()]
    return [f"Shown is k = {k}; trained were {'; '.join(texts)}."]


def _other_capacity(factor: float, routers: Sequence[LayerFacts]) -> list[str]:
    """A sentence about layers whose patches choose, and one about those whose experts do."""
    routers = [router for router in routers if "capacity" not in router.refused]
    limits = {router.train_capacity for router in routers if router.kind == "token_choice"}
    texts = ["no limit" if limit is None else f"capacity factor {limit:g}" for limit in limits]

    sentences = []
    if limits == {None}:
        sentences.append(f"Trained without a capacity limit, shown is capacity factor {factor:g}.")
    elif limits - {factor}:
        trained = " and ".join(sorted(texts))
        sentences.append(f"Trained with {trained}, shown is {factor:g}.")
    if factor != 1 and any(router.kind == "expert_choice" for router in routers):
        sentences.append(f"Experts take {factor:g} times as many patches as trained.")
    return sentences


def intervention_json(change: Intervention) -> Json:
    """The fields of an intervention as the explorer's requests and answers have them; `other` is of a swap."""
    names = ["kind", "layer", "expert", "fill", "seed"]
    if change.kind == "swap":
        names.insert(3, "other")
    return {name: getattr(change, name) for name in names}


TOP = 10
LENS_TOP = 2


@dataclass(frozen=True)
class LayerView:
    """Where one MoE layer sent the patches of the image."""

    facts: LayerFacts  # which layer, and how it routes; `top_k` is what is shown, which may not be as trained
    expert_index: npt.NDArray[np.int64]  # [P, K] experts of each patch, best first
    combine_weight: Floats  # [P, K] weight of each of them in the output
    # [P, K] False where a capacity dropped the choice, or the expert chose other patches
    kept: npt.NDArray[np.bool_]
    probs: Floats  # [P, E] the router's affinities, summing to 1
    # [E, P] what an expert reads, mean over its slots; of Soft MoE alone
    reads: npt.NDArray[np.float64] | None = None
    computation: Computation | None = None  # what was computed of it, in numbers, where captured

    @property
    def margin(self) -> Floats:
        """[P] best minus second-best router probability; with one expert its probability."""
        ordered = np.sort(np.pad(self.probs, ((0, 0), (1, 0))), axis=1)
        return ordered[:, -1] - ordered[:, -2]

    @property
    def entropy_bits(self) -> Floats:
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

    def to_json(self) -> Json:
        """The numbers as JSON, real ones with four decimals; where experts choose, those that took the patch only."""
        facts = self.facts.to_json()
        del facts["refused"]  # about the model, not about this image
        counts = self.counts
        slowest = counts.max() / counts.mean() if counts.any() else 0.0
        return {
            **facts,
            "experts": self._choices(self.expert_index),
            "weights": self._choices(_round(self.combine_weight)),
            "kept": self._choices(self.kept),
            "probs": _round(self.probs).tolist(),
            "margin": _round(self.margin).tolist(),
            "entropy": _round(self.entropy_bits).tolist(),
            "counts": counts.tolist(),
            "requested": self.requested.tolist(),
            "slowest": round(float(slowest), 4),
            "computation": self.computation and self.computation.to_json(),
            "reads": None if self.reads is None else np.round(self.reads, 5).tolist(),
        }

    def _choices(self, values: npt.NDArray[Any]) -> Any:
        """Values [P, K] as lists; where experts choose, without those of experts that left the patch out."""
        if self.facts.kind != "expert_choice":
            return values.tolist()
        return [row[taken].tolist() for row, taken in zip(values, self.kept, strict=True)]


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
    probabilities: Floats = field(repr=False)
    dense_probabilities: Floats | None = field(default=None, repr=False)
    settings: Settings = field(default_factory=Settings)
    lens: Floats | None = field(default=None, repr=False)

    def layer(self, block_index: int) -> LayerView:
        """The MoE layer in that block."""
        return self.layers[self.model.layers.index(block_index)]

    def to_json(self) -> Json:
        """The view in the schema `moevision.view/2`."""
        names = self.model.class_names
        dense = self.dense_probabilities
        prediction = {
            "moe": top_classes(names, self.probabilities),
            "dense": None if dense is None else top_classes(names, dense),
        }
        after_blocks = None
        if self.lens is not None:
            after_blocks = [top_classes(names, block, LENS_TOP) for block in self.lens]
        return {
            "schema": VIEW_SCHEMA,
            "model": self.model.to_json(),
            "picture": self.picture.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "prediction": prediction,
            "lens": after_blocks,
            "settings": self.settings.to_json(self.model),
        }

    def _repr_html_(self) -> str:
        return view_html(self.to_json(), full_page=False)


def route_image(
    model: SavedModel | str | Path,
    image: Image.Image | Pixels | str | Path,
    *,
    dense: SavedModel | None = None,
    dense_probabilities: Floats | None = None,
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
    title = ""
    if not isinstance(model, SavedModel):
        title = title_of(model)
        model = load_model(str(model))
    settings = settings or Settings()
    facts = facts or describe(model, title=title)
    pixels = model_input(image, model.image_size, model.framing)
    if picture is None:
        name = Path(image).name if isinstance(image, str | Path) else "one image"
        picture = PictureFacts(pixels, name=name)

    # The computation asks for the layers' clean scores too: no other thread's noise may be in them.
    with routing_lock(model.net):
        with (
            settings.applied(model.net),
            capture_activations(model.net) as activations,
            block_outputs(model.net) as outputs,
        ):
            logits, routings = route_batch(model, pixels[None])
        if not logits.isfinite().all():
            raise UserError(
                "The model's answer to this image is no number: its weights are too large, or damaged."
            )
        layers = [
            _layer_view(routing, router, settings, layer)
            for routing, router, layer in zip(routings, facts.routers, activations, strict=True)
        ]

    if dense is not None:
        dense_pixels = pixels
        if dense.image_size != len(pixels):
            dense_pixels = model_input(image, dense.image_size, dense.framing)
        dense_logits, _ = route_batch(dense, dense_pixels[None])
        dense_probabilities = softmax(dense_logits)[0]
    return RoutingView(
        model=facts,
        picture=replace(picture, pixels=pixels),
        layers=tuple(layers),
        probabilities=softmax(logits)[0],
        dense_probabilities=dense_probabilities,
        settings=settings,
        lens=softmax(lens(model.net, outputs)) if outputs else None,
    )


def top_classes(names: Sequence[str], probabilities: Floats, count: int = TOP) -> list[Json]:
    """The `count` likeliest classes, best first: `{"class", "p"}`."""
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [{"class": names[index], "p": round(float(probabilities[index]), 4)} for index in best]


def _layer_view(
    routing: Routing, facts: LayerFacts, settings: Settings, activations: LayerActivations
) -> LayerView:
    first = routing.num_prefix_tokens
    top_k = routing.top_k  # also what an intervention around us has made of it
    if routing.kind != "token_choice":
        top_k = facts.top_k
        if settings.top_k is not None and "top_k" not in facts.refused:
            top_k = settings.top_k
    capacity = None if "capacity" in facts.refused else settings.capacity
    noisy = settings.noise is not None and facts.noise != "none"
    steps = activations.layer.router.explain(noisy=noisy, top_k=top_k, capacity=capacity)
    return LayerView(
        facts=replace(facts, top_k=top_k, steps=steps),
        expert_index=routing.expert_index[0, first:].cpu().numpy(),
        combine_weight=to_numpy(routing.combine_weight[0, first:]),
        kept=routing.kept[0, first:].cpu().numpy(),
        probs=to_numpy(routing.probs[0, first:]),
        reads=_reads(routing) if isinstance(routing, SoftRouting) else None,
        computation=activations.computation(routing, noisy=noisy),
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

    def store(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        if threading.get_ident() == thread:
            outputs.append(output)

    with routing_lock(net), ExitStack() as hooks:
        for block in getattr(net, "blocks", ()):
            hooks.enter_context(block.register_forward_hook(store))
        yield outputs


@torch.inference_mode()
def lens(net: Any, outputs: list[Tensor]) -> Tensor:
    """Logits [L, C] of the head after each block; the last row is the model's own."""
    return torch.cat([net.forward_head(net.norm(output)) for output in outputs])


def _reads(routing: SoftRouting) -> npt.NDArray[np.float64]:
    """[E, P] what experts read of the patches of a batch of one image: means over their slots."""
    weight = routing.dispatch_weight[0, routing.num_prefix_tokens :]  # [P, E, S]
    mean: npt.NDArray[np.float64] = weight.double().cpu().numpy().mean(2)
    return mean.T


def _round(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.round(values.astype(np.float64), 4)
