"""The data that the explorer shows of one image: `route_image(model, image, settings) -> RoutingView`.

This module knows nothing of web pages, requests or stored files. In a notebook a `RoutingView` displays itself as the
same interactive view as on the web page; its `to_json` has the schema `moevision.view/2`. `Settings` are what a person
may change before an image is routed: top-k, capacity, noise, one intervention, ablated experts.

Shapes: P patches (row-major, prefix tokens left out), K choices of a patch, E experts, S slots of an expert (Soft MoE),
C classes (of the computation: tokens taken by an expert, expert choice), N tokens of one image (prefix tokens first),
D width, R rows of all experts, V shown channels. For expert choice and Soft MoE K = E, best first, and `kept` marks the
experts that computed the patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from scipy.special import entr
from torch import Tensor, nn

from moevision.analysis.collect import record_modules
from moevision.analysis.intervention import Intervention, intervene, numbered_layers, refusal
from moevision.demo.facts import (
    LayerFacts,
    ModelFacts,
    PictureFacts,
    describe,
    model_input,
    noise_of_training,
    route_batch,
    title_of,
)
from moevision.demo.html import VIEW_SCHEMA, view_html
from moevision.demo.wire import encode_float32, to_numpy
from moevision.errors import UserError
from moevision.layers import (
    ExpertChoiceRouting,
    MoEMlp,
    Routing,
    SoftRouting,
    moe_layers,
    routing_lock,
)
from moevision.models.io import SavedModel, load_model
from moevision.models.shares import patch_shares, shares_refusal
from moevision.types import Array, Floats, Json, Pixels

KINDS = ("ablate", "force", "swap", "random")
FILLS = ("next_best", "zero")


@dataclass(frozen=True)
class Settings:
    """Changes to the routing of one image; None or empty leaves the model as it is in evaluation."""

    top_k: int | None = None  # experts per patch
    # Capacity factor: an expert computes at most ceil(capacity · choices / E) of an image's choices.
    capacity: float | None = None
    intervention: Intervention | None = None  # of one of `KINDS`
    noise: int | None = None  # seed of the routers' training noise; None for no noise
    # Ablations in addition to `intervention`.
    ablated_experts: tuple[Intervention, ...] = ()

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Within the context, `net` routes by these settings; if they change anything, other threads are locked out."""
        changes: list[Intervention] = []
        if self.top_k is not None:
            changes += _for_each_layer(net, "top_k", top_k=self.top_k)
        if self.capacity is not None:
            changes += _for_each_layer(net, "capacity", factor=self.capacity)
        changes += self.ablated_experts
        if self.intervention is not None:
            changes.append(self.intervention)

        with (
            intervene(net, *changes) if changes else nullcontext(),
            noise_of_training(net, self.noise),
        ):
            yield

    def off_reason(self, routers: Sequence[LayerFacts]) -> str | None:
        """Sentences on how top-k and capacity differ from the training; None if they don't."""
        sentences = []
        if self.top_k is not None:
            sentences += _top_k_sentences(self.top_k, routers)
        if self.capacity is not None:
            sentences += _capacity_sentences(self.capacity, routers)
        return " ".join(sentences) or None

    def to_json(self, facts: ModelFacts) -> Json:
        """The settings as they appear in a view of the model `facts`."""
        reason = self.off_reason(facts.routers)
        is_intervened = self.intervention is not None or bool(self.ablated_experts)
        return {
            "top_k": facts.top_k if self.top_k is None else self.top_k,
            "capacity": self.capacity,
            "intervention": self.intervention and intervention_json(self.intervention),
            "noise": self.noise,
            "away": [[change.layer, change.expert] for change in self.ablated_experts],
            "off_distribution": is_intervened or reason is not None,
            "off_reason": reason,
        }


def _for_each_layer(
    net: nn.Module, kind: Literal["top_k", "capacity"], **value: Any
) -> list[Intervention]:
    """The intervention on each layer of `net` whose router supports it."""
    layers = numbered_layers(net)
    supported = [number for number, layer in layers.items() if refusal(kind, layer.router) is None]
    # If no layer supports it, all are listed: applying it then raises an error with the first layer's reason.
    return [Intervention(kind, layer=number, **value) for number in supported or layers]


def _top_k_sentences(k: int, routers: Sequence[LayerFacts]) -> list[str]:
    """One sentence if some router was trained with another k, else none."""
    routers = [router for router in routers if "top_k" not in router.refused]
    if all(router.top_k == k for router in routers):
        return []
    trained = {router.k_text: None for router in routers}  # each text once, in order of depth
    if len(trained) > 1:
        trained = {f"{router.k_text} in {router.name}": None for router in routers}
    return [f"Trained with {', '.join(trained)}; shown is k = {k}."]


def _capacity_sentences(factor: float, routers: Sequence[LayerFacts]) -> list[str]:
    """A sentence on token-choice routers and one on expert-choice routers, each if it was trained otherwise."""
    routers = [router for router in routers if "capacity" not in router.refused]
    trained = {router.train_capacity for router in routers if router.kind == "token_choice"}
    sentences = []
    if trained - {factor}:
        texts = ["no limit" if limit is None else f"capacity factor {limit:g}" for limit in trained]
        trained_text = " and ".join(sorted(texts))
        sentences.append(f"Trained with {trained_text}; shown is capacity factor {factor:g}.")
    if factor != 1 and any(router.kind == "expert_choice" for router in routers):
        sentences.append(f"Experts take {factor:g} times as many patches as trained.")
    return sentences


def intervention_json(change: Intervention) -> Json:
    """An intervention as JSON, as in the explorer's requests and answers; only a swap has the field `other`."""
    names = ["kind", "layer", "expert", "fill", "seed"]
    if change.kind == "swap":
        names.append("other")
    return {name: getattr(change, name) for name in names}


TOP = 10  # classes listed of a prediction
LENS_TOP = 2  # classes listed after each block


@dataclass(frozen=True)
class LayerView:
    """How one MoE layer routed the patches of the image."""

    facts: LayerFacts  # of the layer; `top_k` and `steps` are those of this view, which may differ from the training
    expert_index: Array  # int64 [P, K] experts of each patch, best first
    combine_weight: Floats  # [P, K] their weights in the output
    kept: Array  # bool [P, K], False where a capacity dropped the choice, or the expert chose other patches
    probs: Floats  # [P, E] router probabilities, summing to 1
    # float64 [E, P] weight of each patch in an expert's input, mean over its slots; Soft MoE only
    reads: Array | None = None
    computation: Computation | None = None  # norms and channels of the activations

    @property
    def margin(self) -> Any:
        """[P] best minus second-best router probability; with one expert its probability."""
        ordered = np.sort(self.probs)
        second = ordered[:, -2:-1].sum(1)  # 0 where there is none
        return ordered[:, -1] - second

    @property
    def entropy_bits(self) -> Any:
        """[P] entropy of the router's probabilities, in bits."""
        return entr(self.probs.astype(np.float64)).sum(1) / np.log(2)

    @property
    def counts(self) -> Array:
        """[E] how many patches (Soft MoE: slots) each expert computes."""
        if self.facts.slots is not None:
            return np.full(self.facts.num_experts, self.facts.slots, np.int64)
        return np.bincount(self.expert_index[self.kept], minlength=self.facts.num_experts)

    @property
    def requested(self) -> Array:
        """[E] the same with choices that a capacity dropped."""
        if self.facts.kind != "token_choice":
            return self.counts
        return np.bincount(self.expert_index.ravel(), minlength=self.facts.num_experts)

    def to_json(self) -> Json:
        """The layer as JSON, floats rounded to four decimals; for expert choice, only the experts that took a patch."""
        facts = self.facts.to_json()
        del facts["refused"]  # about the model, not about this image

        counts = self.counts
        max_over_mean = counts.max() / counts.mean() if counts.any() else 0.0
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
            "slowest": round(float(max_over_mean), 4),
            "computation": self.computation and self.computation.to_json(),
            "reads": None if self.reads is None else np.round(self.reads, 5).tolist(),
        }

    def _choices(self, values: Array) -> Any:
        """Values [P, K] as nested lists; for expert choice, only where `kept`."""
        if self.facts.kind != "expert_choice":
            return values.tolist()
        return [row[is_kept].tolist() for row, is_kept in zip(values, self.kept, strict=True)]


@dataclass(frozen=True)
class RoutingView:
    """The routing of one image in every MoE layer, and the model's prediction.

    Attributes:
        model: about the model.
        picture: the image as the model saw it.
        layers: one entry per MoE layer, in order of depth.
        probabilities: [C] predicted by the MoE.
        dense_probabilities: [C] predicted by its dense twin; None without one.
        settings: changes to the routing.
        lens: [blocks, C] logit-lens probabilities after each block (see `lens`); None for a network without blocks.
        shares: [P] of each patch in the likeliest class's logit minus the second's; None where the classifier has none.
    """

    model: ModelFacts
    picture: PictureFacts
    layers: tuple[LayerView, ...] = field(repr=False)
    probabilities: Floats = field(repr=False)
    dense_probabilities: Floats | None = field(default=None, repr=False)
    settings: Settings = field(default_factory=Settings)
    lens: Floats | None = field(default=None, repr=False)
    shares: Floats | None = field(default=None, repr=False)

    def layer(self, block_index: int) -> LayerView:
        """The view of the MoE layer in that block."""
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
            "shares": None if self.shares is None else _round(self.shares).tolist(),
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
    """Route one image, and return the routing of every patch.

    Args:
        model: a MoE model, or its folder or timm address.
        image: a PIL image, uint8 [H, W, 3] RGB pixels, or an image file; made square by the model's own framing.
        dense: the dense twin, of the same image size; the view then has its prediction too.
        dense_probabilities: [C] its prediction for this image, if it is already known; `dense` replaces it.
        settings: changes to the routing; none if None.
        facts: description of the model for the view; made from the model if None.
        picture: description of the image for the view; its pixels are replaced by those that the model saw.

    Raises:
        UserError: if the model has no MoE layer, the image can't be read, or the logits aren't finite.
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

    blocks = dict(enumerate(getattr(model.net, "blocks", ())))
    # `_layer_view` may call the routers again: until then no other thread may switch on noise in this network.
    with routing_lock(model.net):
        with (
            settings.applied(model.net),
            capture_activations(model.net) as activations,
            record_modules(model.net, blocks) as (_, outputs_of_blocks),
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

    outputs = list(outputs_of_blocks.values())  # [blocks] of [1, N, D]
    lens_probabilities = None
    if outputs:
        lens_logits = lens(model.net, outputs)
        lens_probabilities = to_numpy(model.probabilities(lens_logits))
    if dense is not None:
        dense_logits, _ = route_batch(dense, pixels[None])
        dense_probabilities = to_numpy(dense.probabilities(dense_logits.float()))[0]
    return RoutingView(
        model=facts,
        picture=replace(picture, pixels=pixels),
        layers=tuple(layers),
        probabilities=to_numpy(model.probabilities(logits.float()))[0],
        dense_probabilities=dense_probabilities,
        settings=settings,
        lens=lens_probabilities,
        shares=margin_shares(model, outputs),
    )


def top_classes(names: Sequence[str], probabilities: Floats, count: int = TOP) -> list[Json]:
    """The `count` most probable of the classes `names`, best first, as `{"class": name, "p": probability}`."""
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [{"class": names[index], "p": round(float(probabilities[index]), 4)} for index in best]


def _layer_view(
    routing: Routing, facts: LayerFacts, settings: Settings, activations: LayerActivations
) -> LayerView:
    """The view of one layer from its routing of a batch of one image."""
    top_k = facts.top_k
    if settings.top_k is not None and "top_k" not in facts.refused:
        top_k = settings.top_k
    capacity = None if "capacity" in facts.refused else settings.capacity
    noisy = settings.noise is not None and facts.noise != "none"
    explanation = activations.layer.router.explain(noisy=noisy, top_k=top_k, capacity=capacity)
    first_patch = routing.num_prefix_tokens
    return LayerView(
        facts=replace(facts, top_k=top_k, steps=explanation),
        expert_index=routing.expert_index[0, first_patch:].cpu().numpy(),
        combine_weight=to_numpy(routing.combine_weight[0, first_patch:]),
        kept=routing.kept[0, first_patch:].cpu().numpy(),
        probs=to_numpy(routing.probs[0, first_patch:]),
        reads=_reads(routing) if isinstance(routing, SoftRouting) else None,
        computation=activations.computation(routing, noisy=noisy),
    )


# ---- logit lens (nostalgebraist, "interpreting GPT", 2020)
#
# The model's final norm, pooling and head are applied to the output of every block. They were trained on the output of
# the last block only, so that for earlier blocks they are an untrained readout.


@torch.inference_mode()
def lens(net: Any, outputs: list[Tensor]) -> Tensor:
    """Logits [blocks, C] of the head after each block, of outputs [1, N, D]; the last row is the model's prediction."""
    return torch.cat([net.forward_head(net.norm(output)) for output in outputs])


@torch.inference_mode()
def margin_shares(model: SavedModel, outputs: list[Tensor]) -> Floats | None:
    """[P] share of each patch in the margin of the answer, of outputs [1, N, D] of the blocks; None without any.

    Labels that don't exclude one another have no such margin.
    """
    net: Any = model.net
    if model.thresholds or shares_refusal(net) is not None:
        return None
    return to_numpy(patch_shares(net, net.norm(outputs[-1])).margins()[0])


def _reads(routing: SoftRouting) -> Array:
    """[E, P] weight of each patch in an expert's input, mean over its slots, for a batch of one image."""
    weight = routing.dispatch_weight[0, routing.num_prefix_tokens :]  # [P, E, S]
    return weight.double().mean(2).T.cpu().numpy()


def _round(values: Array) -> Array:
    return np.round(values.astype(np.float64), 4)


# ---- the numbers of an MoE layer's computation: scores, outputs of the experts, their sum, the residual stream
#
# `capture_activations` stores what the layers compute anyway (the experts' rows, the output, the residual stream before
# and after), so that no second pass is needed.

MAX_CHANNELS = 8  # of a vector; more can't be drawn legibly


@dataclass(frozen=True, kw_only=True)
class Channels:
    """A few channels of each vector, with which a reader can recompute the layer's sums.

    They are the channels that the layer changes most in this image. The layer's output for a patch is
    `Σ weight · outputs + shared = total`, and the residual stream becomes `before + scale · total = after`. `scale`,
    `before` and `after` are None unless the layer reads a norm in a residual branch.
    """

    of: int  # D
    hidden: int  # width of an expert's hidden layer
    index: list[int]  # [V] indices of the shown channels, increasing
    scale: Floats | None  # [V] the block's layer scale; 1 if it has none
    read: Floats  # [P, V] input of the router and the experts
    outputs: Floats  # [P, K, V] unweighted output of each chosen expert
    shared: Floats | None = None  # [P, V] output of the shared experts; None without them
    total: Floats  # [P, V] output of the layer
    before: Floats | None = None  # [P, V] residual stream that enters the block's MLP branch
    after: Floats | None = None  # [P, V] residual stream after the block


@dataclass(frozen=True, kw_only=True)
class Computation:
    """The numbers of one layer for the patches of one image; norms are Euclidean, over the width D.

    `before` and `after` are None unless the layer reads a norm in a residual branch.
    """

    scores: Floats  # [P, E] the router's logits without noise
    noise: Floats | None  # [P, E] training noise that was added to them; None without noise
    bias: Floats | None  # [E] added to affinities for the choice, not for the weights; None without
    # [P, K] norm of the unweighted output of each chosen expert. Soft MoE: of the weighted mean of the expert's slots.
    # Expert choice: 0 where the expert didn't take the patch.
    outputs: Floats
    shared: Floats | None = None  # [P] norm of the output of the shared experts; None without them
    total: Floats  # [P] norm of the layer's output, shared experts included
    before: Floats | None = (
        None  # [P] norm of the residual stream that enters the block's MLP branch
    )
    after: Floats | None = None  # [P] norm of the residual stream after the block
    channels: Channels  # the same vectors by channel, for a few channels

    def to_json(self) -> Json:
        """The fields by name, arrays encoded by `encode_float32`; `channels` is a nested object."""
        return {**_encode_arrays(self), "channels": _encode_arrays(self.channels)}


@dataclass
class LayerActivations:
    """What went into and came out of one MoE layer, its parts and its block, by `record_modules`.

    By name: `layer` [1, N, D], `experts` [R, D] sorted by expert, `shared` [N, D], `norm` (the block's second) and
    `block` [1, N, D]; those that the model has.
    """

    layer: MoEMlp
    block: nn.Module | None  # that contains the layer
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def in_residual_branch(self) -> bool:
        """Whether the layer is in a residual branch, right after a norm: its input is the norm's output tensor."""
        return self.outputs.get("norm") is self.inputs["layer"]

    @torch.inference_mode()
    def computation(self, routing: Routing, *, noisy: bool = False) -> Computation:
        """The numbers of the image's patches; `routing` must come from the same forward pass.

        `noisy` says whether the router drew noise in that pass. By now it must be in evaluation mode again.
        """
        first_patch = routing.num_prefix_tokens
        router = self.layer.router
        vectors = self._patch_vectors(routing)

        clean_logits = routing.logits  # [1, N, E]
        noise = None
        if noisy:
            # Jitter changes the router's input, and with it `routing.logits`: route again without noise.
            clean_logits = router(self.inputs["layer"]).logits
            noise = to_numpy((routing.noisy_logits - clean_logits)[0, first_patch:])

        bias = getattr(router, "bias", None)
        norms: dict[str, Any] = {
            name: to_numpy(torch.linalg.vector_norm(vector.float(), dim=-1))
            for name, vector in vectors.items()
        }
        return Computation(
            scores=to_numpy(clean_logits[0, first_patch:]),
            noise=noise,
            bias=to_numpy(bias) if isinstance(bias, Tensor) else None,
            **norms,
            channels=self._largest_channels(vectors, first_patch),
        )

    def _patch_vectors(self, routing: Routing) -> dict[str, Tensor]:
        """The available vectors of the patches by field of `Computation`: [P, D], but `outputs` [P, K, D]."""
        activations = {"total": self.outputs["layer"]}
        if self.layer.shared is not None:
            activations["shared"] = self.outputs["shared"]
        if self.in_residual_branch:
            activations["before"] = self.inputs["norm"]
            activations["after"] = self.outputs["block"]

        first_patch = routing.num_prefix_tokens
        vectors = {"outputs": self._expert_outputs(routing)[first_patch:]}
        for name, activation in activations.items():
            vectors[name] = activation.flatten(0, -2)[first_patch:]  # [N, D] -> [P, D]
        return vectors

    def _largest_channels(self, vectors: dict[str, Tensor], first_patch: int) -> Channels:
        """Those channels of `vectors` (`_patch_vectors`) that the layer changes most, by mean absolute change."""
        change = vectors["total"]
        if self.in_residual_branch:
            change = vectors["after"] - vectors["before"]
        mean_change = change.float().abs().mean(0)  # [D]
        largest = mean_change.topk(min(MAX_CHANNELS, len(mean_change)))
        index = largest.indices.sort().values  # [V]

        scale = None
        if self.in_residual_branch:
            gamma = getattr(getattr(self.block, "ls2", None), "gamma", torch.ones_like(mean_change))
            scale = to_numpy(gamma[index])

        patches = self.inputs["layer"].flatten(0, -2)[first_patch:]  # [P, D]; one image
        channels: dict[str, Any] = {
            name: to_numpy(vector[..., index]) for name, vector in vectors.items()
        }
        return Channels(
            of=patches.shape[-1],
            hidden=self.layer.experts.fc1.out_features,
            index=index.tolist(),
            scale=scale,
            read=to_numpy(patches[:, index]),
            **channels,
        )

    def _expert_outputs(self, routing: Routing) -> Tensor:
        """[N, K, D] unweighted output of each chosen expert, in the order of `routing.expert_index`."""
        tokens = self.inputs["layer"].flatten(0, -2)  # [N, D]; one image
        experts = self.layer.experts
        inputs = tokens.to(experts.compute_dtype(tokens))
        dispatched = self.layer.dispatcher.dispatch(inputs, routing)
        rows = self.outputs.get("experts")  # [R, D]
        if rows is None:  # the dense backend doesn't call this module
            rows = experts(dispatched.rows, dispatched.counts)

        if isinstance(routing, SoftRouting):
            by_expert = _slot_means(rows, routing)  # [N, E, D]
        elif isinstance(routing, ExpertChoiceRouting):
            by_expert = _scatter_to_tokens(rows, routing)  # [N, E, D]
        else:
            # Token choice: `position` [N, K] says in which row each choice was computed.
            assert dispatched.position is not None
            return rows[dispatched.position]

        # From order of expert to order of choice.
        index = routing.expert_index[0].unsqueeze(-1)  # [N, K, 1]
        return by_expert.gather(1, index.expand(-1, -1, by_expert.shape[-1]))


@contextmanager
def capture_activations(net: nn.Module) -> Iterator[list[LayerActivations]]:
    """Within the context, store the activations of the MoE layers of `net` for one image.

    It yields one `LayerActivations` per MoE layer, in order of depth; they are filled while the model runs.
    """
    parent_of = {child: module for module in net.modules() for child in module.children()}
    activations = []
    with ExitStack() as scopes:
        for layer in moe_layers(net):
            block = parent_of.get(layer)
            parts = {
                "layer": layer,
                "experts": layer.experts,
                "shared": layer.shared,
                "norm": getattr(block, "norm2", None),
                "block": block,
            }
            modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
            inputs, outputs = scopes.enter_context(record_modules(net, modules))
            activations.append(LayerActivations(layer, block, inputs, outputs))
        yield activations


def _slot_means(rows: Tensor, routing: SoftRouting) -> Tensor:
    """[N, E, D] for each token the weighted mean of each expert's slots; rows are [E · S, D]."""
    weight = routing.slot_weight[0].to(rows.dtype)  # [N, E, S]
    slots = rows.view(routing.num_experts, -1, rows.shape[-1])  # [E, S, D]
    smallest = torch.finfo(rows.dtype).tiny  # against 0 / 0
    weight_sum = weight.sum(-1, keepdim=True).clamp_min(smallest)  # [N, E, 1]
    return torch.einsum("nes,esd->ned", weight, slots) / weight_sum


def _scatter_to_tokens(rows: Tensor, routing: ExpertChoiceRouting) -> Tensor:
    """[N, E, D] output of each expert for each token, 0 where the expert didn't take it; rows are [E · C, D]."""
    _, num_tokens, num_experts = routing.logits.shape
    width = rows.shape[-1]
    by_expert = rows.new_zeros(num_experts, num_tokens, width)  # [E, N, D]
    token_index = routing.token_index[0]  # [E, C]
    index = token_index.unsqueeze(-1).expand(-1, -1, width)  # [E, C, D]
    by_expert.scatter_(1, index, rows.view(*token_index.shape, width))
    return by_expert.transpose(0, 1)


def _encode_arrays(numbers: Channels | Computation) -> Json:
    """The fields by name, arrays encoded by `encode_float32`."""
    fields = dict(vars(numbers))
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = encode_float32(value)
    return fields
