"""Auxiliary losses of routers (pure functions of a `Routing`), their weighted sum for any training loop, and a metric.

- importance and load: Shazeer et al. 2017, arXiv:1701.06538, §4 and appendix A; V-MoE's variants of both
  (arXiv:2106.05974, appendix A) under `rule="vmoe"`.
- load balancing: GShard, arXiv:2006.16668, algorithm 1; Switch Transformer, arXiv:2101.03961, eq. 4-6.
- router z-loss: ST-MoE, arXiv:2202.08906, eq. 5.
- label: cross-entropy of the router against the class, with experts assigned to classes (benchmarks/cats_and_dogs).

Every loss is a function of sums over tokens. Its value is therefore exact for a batch that is split over processes or
micro-batches: `Balance` adds up the sums and only then applies the function. The gradient is exact over processes, and
approximate over micro-batches in the way that `Balance` describes.

Axes: B images, N tokens, C classes, E experts, K choices, L MoE layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from moevision.config import AuxLossWeights
from moevision.config import Rule as Rule
from moevision.errors import UserError
from moevision.layers import LayerLoad, MoEMlp, Routing, moe_layers, update_router_bias


def importance_loss(routing: Routing, rule: Rule = "shazeer") -> Tensor:
    """CV² of the experts' importance (arXiv:1701.06538, eq. 6-7); 0 when all experts get the same total weight.

    Args:
        routing: one layer's decision.
        rule: `shazeer` sums the gates that were used (sparse, noisy); `vmoe` sums the noise-free softmax over all E.
    """
    return cv_squared(_importance(routing, rule))


def load_loss(routing: Routing, rule: Rule = "shazeer") -> Tensor:
    """CV² of the smooth load Σ_x P(x, i) (arXiv:1701.06538, eq. 8-11); 0 where it is undefined (E = 1 or K = E).

    P(x, i) is the probability that expert i is among the K chosen when only its own noise is drawn again.

    Args:
        routing: one layer's decision, made in training mode.
        rule: `shazeer` compares with the K-th best of the *other* noisy scores, so that Σ_i P(x, i) averages K;
            `vmoe` compares with the K-th best of all of them, as V-MoE's code does.

    Raises:
        UserError: if the routing has no noise and K < E.
    """
    return cv_squared(_load(routing, rule))


def load_balancing_loss(routing: Routing) -> Tensor:
    """E · Σ_i f_i P_i of GShard and Switch; 1 when routing is uniform.

    f_i is the share of all choices that fell on expert i (for K = 1 Switch's eq. 5), P_i the mean router probability.
    """
    return _load_balancing_value(_load_balancing_sums(routing, "shazeer"))


def z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(clean logits)², which keeps router logits small (arXiv:2202.08906, eq. 5)."""
    return _mean(_z_sums(routing, "shazeer"))


def label_loss(routing: Routing, target: Tensor) -> Tensor:
    """Cross-entropy of the router's clean scores against the class of the image, mean over tokens.

    Each class has E / C consecutive experts; the logit of a class is the logsumexp of their logits. Where tokens are
    routed one by one, the target of a token is the class of its image. With `route_by="image"` all tokens of an image
    share one decision, so that the mean over tokens is the mean over images.

    Args:
        routing: one layer's decision.
        target: [B, C] share of each class in each image: `F.one_hot(labels, C)`, or the soft targets of Mixup.
    """
    return _mean(_label_sums(routing, target))


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation var / mean² of x [E], population variance.

    Computed from the variance, not from the standard deviation, whose gradient is infinite at perfect balance.
    """
    mean = x.mean()
    return (x - mean).square().mean() / mean.square()


def _importance(routing: Routing, rule: Rule) -> Tensor:
    """[E] sum of the gates or probabilities over all tokens."""
    weights = routing.expert_weights() if rule == "shazeer" else routing.probs  # [B, N, E]
    return weights.flatten(0, -2).sum(0)


def _load(routing: Routing, rule: Rule) -> Tensor:
    """[E] sum over all tokens of the probability that an expert is chosen when its noise is drawn again."""
    if routing.top_k == routing.num_experts:
        return torch.ones_like(routing.logits[0, 0])  # perfectly balanced: CV² = 0
    if routing.noise_std is None:
        raise UserError(
            "The load loss needs router noise: use a router with noise, in training mode."
        )

    k = routing.top_k
    top_logits = routing.noisy_logits.topk(k + 1, dim=-1).values  # [B, N, K + 1]
    kth = top_logits[..., k - 1 : k]  # [B, N, 1]
    next_best = top_logits[..., k:]  # [B, N, 1]
    threshold = kth
    if rule == "shazeer":
        # The K-th best of the other scores: a chosen expert would be replaced by the next best.
        is_chosen = torch.zeros_like(routing.logits, dtype=torch.bool)
        is_chosen = is_chosen.scatter(-1, routing.expert_index, True)  # [B, N, E]
        threshold = torch.where(is_chosen, next_best, kth)  # [B, N, E]

    # P(logit + std · z > threshold) for standard normal z. Learned noise can shrink to zero: below 1e-6 the probability
    # is a step function, and its gradient 0 · ∞.
    std = routing.noise_std.clamp_min(1e-6)
    probability: Tensor = torch.special.ndtr((routing.logits - threshold) / std)  # [B, N, E]
    return probability.flatten(0, -2).sum(0)


def _load_balancing_sums(routing: Routing, _rule: Rule) -> Tensor:
    """[2, E] numbers of choices, and sums of probabilities; there is one rule."""
    counts = routing.requested_counts().to(routing.probs.dtype)
    return torch.stack([counts, routing.probs.flatten(0, -2).sum(0)])


def _load_balancing_value(sums: Tensor) -> Tensor:
    """E · Σ_i f_i P_i from the sums [2, E]."""
    choices, probs = sums.unbind()  # [E] each
    choice_shares = choices / choices.sum()
    mean_probs = probs / probs.sum()
    return len(choices) * (choice_shares * mean_probs).sum()


def _z_sums(routing: Routing, _rule: Rule) -> Tensor:
    """[2] sum of logsumexp², and number of tokens; there is one rule."""
    return _sum_and_count(routing.logits.logsumexp(-1).square())  # of [B, N]


def _label_sums(routing: Routing, target: Tensor) -> Tensor:
    """[2] sum of the cross-entropy, and number of tokens."""
    num_classes = target.shape[-1]
    logits = routing.logits.unflatten(-1, (num_classes, -1)).logsumexp(-1)  # [B, N, C]
    cross_entropy = -(target.unsqueeze(1) * logits.log_softmax(-1)).sum(-1)  # [B, N]
    return _sum_and_count(cross_entropy)


def _sum_and_count(values: Tensor) -> Tensor:
    """[2] the sum of the values, and their number."""
    return torch.stack([values.sum(), values.new_tensor(values.numel())])


def _mean(sums: Tensor) -> Tensor:
    """The mean from [2], a sum and a count."""
    return sums[0] / sums[1]


class _Loss(NamedTuple):
    # (routing, rule), or (routing, target) for `label` -> sums, additive over tokens
    sums: Callable[..., Tensor]
    value: Callable[[Tensor], Tensor]  # sums -> the loss, a scalar


_LOSSES = {
    "importance": _Loss(_importance, cv_squared),
    "load": _Loss(_load, cv_squared),
    "load_balancing": _Loss(_load_balancing_sums, _load_balancing_value),
    "z": _Loss(_z_sums, _mean),
    "label": _Loss(_label_sums, _mean),
}


class Balance:
    """Balance losses and router biases for any loop: `loss` before every backward pass, `step` after the optimizer's.

    The loss is the mean over MoE layers of the weighted sum of losses, over all images of one optimizer step. Call both
    methods on every process. `counts` is, for each MoE layer, [E] choices of each expert in this process since the step
    began; `values` are the losses of the last micro-batch by name, each the mean over its layers, for a log.

    An accumulation window is the micro-batches of one optimizer step. The loss of its m-th micro-batch is computed from
    S_1 + ... + S_m: the sums of its own tokens, S_m, plus the detached ones of the earlier micro-batches. With
    `torch.distributed` these sums are added over ranks by an all-reduce whose backward also sums, so that DDP's mean
    over ranks is the gradient of the whole batch: one all-reduce in each direction for all losses and layers.

    S_m is about 1 / m of these sums, so its gradient is multiplied by m. When the loop divides by M (as Lightning
    does), the gradients then add up to that of the whole batch; without the factor they would shrink to
    (1 + 1/2 + ... + 1/M) / M of it. This is exact where all micro-batches have the same sums. Else the direction is
    approximate, as a micro-batch doesn't know the later ones (benchmarks/accumulation).

    Args:
        model: any module with MoE layers; also wrapped in `DistributedDataParallel`.
        weights: the weight of each loss; a weight of None is the router's own default.
        num_classes: C of the targets, for the label loss.

    Raises:
        UserError: if a weighted loss can't be supplied by one of the routers.

    Examples:
        >>> from moevision import MoEMlp, record_routing
        >>> layer = MoEMlp(32, 64, router="bias_balanced")
        >>> balance = Balance(layer)
        >>> with record_routing(layer) as routings:
        ...     loss = layer(torch.randn(2, 9, 32)).square().mean()
        >>> (loss + balance.loss(routings)).backward()  # then optimizer.step()
        >>> balance.step()
        >>> int(layer.router.bias.count_nonzero())  # every bias has moved once
        8
    """

    def __init__(
        self,
        model: nn.Module,
        weights: AuxLossWeights | None = None,
        num_classes: int | None = None,
    ) -> None:
        settings = asdict(weights or AuxLossWeights())
        self.rule: Rule = settings.pop("rule")
        self.weights: dict[str, float] = {
            name: float(weight) for name, weight in settings.items() if weight is not None
        }
        self.model = model
        layers = moe_layers(model)
        self._layer_weights = [self._weights_of(layer, num_classes) for layer in layers]
        self._needs_load = any(layer.router.needs_load for layer in layers)
        self.start_window()

    def _weights_of(self, layer: MoEMlp, num_classes: int | None) -> dict[str, float]:
        """Weights, by name, of the losses of one layer that have a weight other than 0."""
        router = layer.router
        weights = {**router.default_losses, **self.weights}
        weights = {name: weight for name, weight in weights.items() if weight}

        supported = set(router.losses)
        if "z" in supported:
            # Routers with learned logits can supply the z-loss, and the label loss needs nothing else.
            supported.add("label")
        missing = weights.keys() - supported
        if missing:
            has = "it needs none"
            if router.losses:
                has = f"it has {', '.join(sorted(router.losses))}"
            raise UserError(
                f"The router of block {layer.layer_index} can't supply the {', '.join(sorted(missing))} loss "
                f"({has}): set its weight to 0, leave it out, or choose a router with noise, such as vmoe_top_k."
            )
        if "label" in weights:
            if num_classes is None:
                raise UserError(
                    "The label loss needs the number of classes: give Balance num_classes, and its loss the target."
                )
            if router.num_experts % num_classes:
                raise UserError(
                    f"The label loss gives each of {num_classes} classes as many experts, which {router.num_experts} "
                    f"experts can't be: use a multiple of {num_classes} (--model.arch.num_experts)."
                )
        return weights

    def start_window(self) -> None:
        """Forget earlier micro-batches: the next one is the first of an optimizer step."""
        self.counts: list[Tensor] = []
        # (loss, index of the layer) -> detached sums so far
        self._window: dict[tuple[str, int], Tensor] = {}
        self._micro_batches = 0
        self._step_is_done = False

    def loss(self, routings: Sequence[Routing], target: Tensor | None = None) -> Tensor:
        """The weighted sum of the balance losses, a scalar; 0 without MoE layers or weights.

        Args:
            routings: what the MoE layers decided, by `forward_routing` or `record_routing`.
            target: [B, C] for the label loss, as in `label_loss`.

        Raises:
            UserError: if there isn't one routing for each MoE layer of the model.
        """
        if len(routings) != len(self._layer_weights):
            raise UserError(
                f"The forward pass recorded {len(routings)} of the model's {len(self._layer_weights)} MoE layers: run "
                "it inside record_routing(model), or by forward_routing, with the model that Balance was given."
            )
        if self._step_is_done:
            self.start_window()
        self._micro_batches += 1
        counts = [routing.requested_counts() for routing in routings]  # [E] of each layer
        if self.counts:
            pairs = zip(self.counts, counts, strict=True)
            counts = [earlier + new for earlier, new in pairs]
        self.counts = counts

        terms: list[tuple[str, float]] = []  # name and weight of each loss of each layer
        sums = []  # of each term
        layers = zip(routings, self._layer_weights, strict=True)
        for index, (routing, weights) in enumerate(layers):
            for name, weight in weights.items():
                terms.append((name, weight))
                sums.append(self._window_sums(name, index, routing, target))

        self.values: dict[str, Tensor] = {}
        if not terms:
            return torch.zeros((), device=counts[0].device if counts else None)

        weighted = []
        values: defaultdict[str, list[Tensor]] = defaultdict(list)  # name -> loss of each layer
        for (name, weight), total in zip(terms, sum_over_ranks(sums), strict=True):
            value = _LOSSES[name].value(total)
            weighted.append(weight * value)
            values[name].append(value.detach())
        self.values = {name: torch.stack(per_layer).mean() for name, per_layer in values.items()}
        return torch.stack(weighted).sum() / len(routings)

    def _window_sums(
        self, name: str, layer: int, routing: Routing, target: Tensor | None
    ) -> Tensor:
        """The sums of one loss of one layer, over the window so far in this process."""
        sums = _LOSSES[name].sums(routing, target if name == "label" else self.rule)
        earlier = self._window.get((name, layer))
        if earlier is not None:
            # This term is 0 and only adds gradient: in all m times that of this micro-batch's own sums.
            extra_gradient = (self._micro_batches - 1) * (sums - sums.detach())
            sums = earlier + sums + extra_gradient
        self._window[name, layer] = sums.detach()
        return sums

    def step(self, applied: bool = True) -> None:
        """Update router biases from the load of this step; the next call of `loss` begins another step.

        Args:
            applied: False if the optimizer's update was skipped, as by a loss scaler: then no bias is updated.
        """
        self._step_is_done = True
        if applied and self._needs_load and self.counts:
            update_router_bias(self.model, sum_over_ranks(self.counts))


def several_processes() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each of the tensors, all of one dtype, summed over ranks: one all-reduce in forward, and one in backward."""
    if not tensors or not several_processes():
        return list(tensors)

    flat = torch.cat([x.flatten() for x in tensors])
    total: Tensor = _AllReduce.apply(flat)  # type: ignore[no-untyped-call]
    sizes = [x.numel() for x in tensors]
    parts = total.split(sizes)
    return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]


class _AllReduce(torch.autograd.Function):
    """Sum over ranks whose backward sums too; torch's own differentiable all-reduce is deprecated since 2.13."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total: Tensor = _AllReduce.apply(gradients[0])  # type: ignore[no-untyped-call]
        return total


class RoutingStatistics(Metric):
    """Load, entropy and drops of every MoE layer, from counts of assignments over all tokens (prefix tokens too).

    `layers` are the block indices of the L MoE layers in order of depth, `num_experts` is E of each.
    """

    full_state_update = False
    counts: Tensor  # [L, E] tokens that an expert computed
    count_squares: Tensor  # [L, E] sum over images of the squared number of such tokens
    requested: Tensor  # [L, E] tokens assigned to an expert by the router, before any drops
    entropy_bits: Tensor  # [L] sum over tokens of the entropy of the router's probabilities
    tokens: Tensor  # [L]
    images: Tensor  # [L]
    unrouted: Tensor  # [L] tokens that no expert computed

    def __init__(self, layers: Sequence[int], num_experts: Sequence[int]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.num_experts = list(num_experts)
        # The rows of layers with fewer experts than `most_experts` end in zeros.
        depth = len(self.layers)
        most_experts = max(self.num_experts, default=0)
        add_sums = partial(self.add_state, dist_reduce_fx="sum")
        for name in ("counts", "count_squares", "requested"):
            add_sums(name, torch.zeros((depth, most_experts), dtype=torch.int64))
        for name in ("tokens", "images", "unrouted"):
            add_sums(name, torch.zeros(depth, dtype=torch.int64))
        add_sums("entropy_bits", torch.zeros(depth, dtype=torch.float64))

    def update(self, routings: Sequence[Routing]) -> None:
        """Add one batch: the `Routing` of every MoE layer, in order of depth."""
        for row, routing in enumerate(routings):
            experts = slice(routing.num_experts)
            self.counts[row, experts] += routing.counts()
            self.count_squares[row, experts] += routing.image_counts().square().sum(0)
            self.requested[row, experts] += routing.requested_counts()

            probs = routing.probs.detach()  # [B, N, E]
            entropy_nats = torch.special.entr(probs).sum()
            self.entropy_bits[row] += entropy_nats.double() / math.log(2)

            images, tokens, _ = probs.shape
            self.images[row] += images
            self.tokens[row] += images * tokens
            is_routed = routing.kept.any(-1)  # [B, N]
            self.unrouted[row] += (~is_routed).sum()

    def compute(self) -> dict[str, Tensor]:
        """Sums per MoE layer by name: `counts`, `count_squares` and `requested` [L, E], the others [L]."""
        return cast(dict[str, Tensor], dict(self.metric_state))

    def layer_loads(self) -> list[LayerLoad]:
        """Load statistics of each MoE layer, over all ranks."""
        # torchmetrics squeezes a state of one element, such as `tokens` with a single layer.
        sums = {name: value.reshape(len(self.layers), -1) for name, value in self.compute().items()}
        loads = []
        for row, (layer, num_experts) in enumerate(zip(self.layers, self.num_experts, strict=True)):
            of_layer = {
                name: value[row, :num_experts] for name, value in sums.items()
            }  # [E] or [1]
            loads.append(LayerLoad.from_sums(layer, **of_layer))
        return loads
