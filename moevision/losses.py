"""Losses of routers, pure functions of a `Routing`; their weighted sum, for any training loop; loads as a metric.

- importance and load: Shazeer et al. 2017, arXiv:1701.06538, §4 and appendix A; V-MoE's variants of both
  (arXiv:2106.05974, appendix A) under `rule="vmoe"`.
- load balancing: GShard, arXiv:2006.16668, algorithm 1; Switch Transformer, arXiv:2101.03961, eq. 4-6.
- router z-loss: ST-MoE, arXiv:2202.08906, eq. 5.
- label: supervision, which experts belong to which class (benchmarks/cats_and_dogs).

Every loss is a function of sums over tokens. That is what makes its value exact for a batch that arrives in pieces,
from several processes or several micro-batches: `AuxLoss` adds up the sums and only then applies the function. Its
gradient is exact over processes; over micro-batches `AuxLoss` says what is approximate.

Axes: B images, N tokens, C classes, E experts, K choices, L MoE layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
        UserError: if the routing has no noise.
    """
    if routing.top_k == routing.num_experts:
        return routing.logits.new_zeros(())
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

    Experts belong to classes in order, E / C each; the logit of a class is the logsumexp of its experts'. A router by
    token is told the class of the image for each token. With `route_by="image"` all tokens share one decision, so that
    the mean is one over images.

    Args:
        routing: one layer's decision.
        target: [B, C] share of each class in each image: `F.one_hot(labels, C)`, or the soft targets of Mixup.

    Raises:
        UserError: if E is no multiple of C.
    """
    return _mean(_label_sums(routing, target))


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation var / mean² of x [E], population variance.

    Through the variance, never the standard deviation: its square root has no finite gradient at perfect balance.
    """
    mean = x.mean()
    return (x - mean).square().mean() / mean.square()


def _importance(routing: Routing, rule: Rule) -> Tensor:
    weights = routing.expert_weights() if rule == "shazeer" else routing.probs
    return weights.flatten(0, -2).sum(0)


def _load(routing: Routing, rule: Rule) -> Tensor:
    if routing.noise_std is None:
        raise UserError(
            "The load loss needs router noise: use a router with noise, in training mode."
        )
    if routing.top_k == routing.num_experts:
        return torch.ones_like(routing.logits[0, 0])  # perfectly balanced: CV² = 0
    k = routing.top_k
    best = routing.noisy_logits.topk(k + 1, dim=-1).values  # [B, N, K + 1]
    kth, next_best = best[..., k - 1 : k], best[..., k:]
    threshold = kth
    if rule == "shazeer":
        # The K-th best of the other scores: a chosen expert would be replaced by the next best.
        is_chosen = torch.zeros_like(routing.logits, dtype=torch.bool)
        is_chosen = is_chosen.scatter(-1, routing.expert_index, True)  # [B, N, E]
        threshold = torch.where(is_chosen, next_best, kth)
    # Learned noise can shrink to nothing; below 1e-6 the probability is a step and its gradient 0 · ∞.
    std = routing.noise_std.clamp_min(1e-6)
    probability: Tensor = torch.special.ndtr((routing.logits - threshold) / std)  # [B, N, E]
    return probability.flatten(0, -2).sum(0)


def _load_balancing_sums(routing: Routing, rule: Rule) -> Tensor:
    counts = routing.requested_counts().to(routing.probs.dtype)
    return torch.stack([counts, routing.probs.flatten(0, -2).sum(0)])


def _load_balancing_value(sums: Tensor) -> Tensor:
    choices, probs = sums.unbind()  # [E] each
    choice_shares = choices / choices.sum()
    mean_probs = probs / probs.sum()
    return len(choices) * (choice_shares * mean_probs).sum()


def _z_sums(routing: Routing, rule: Rule) -> Tensor:
    squares = routing.logits.logsumexp(-1).square()
    return torch.stack([squares.sum(), squares.new_tensor(squares.numel())])


def _label_sums(routing: Routing, target: Tensor) -> Tensor:
    num_classes = target.shape[-1]
    _check_experts_of_classes(routing.num_experts, num_classes)
    logits = routing.logits.unflatten(-1, (num_classes, -1)).logsumexp(-1)  # [B, N, C]
    cross_entropy = -(target.unsqueeze(1) * logits.log_softmax(-1)).sum(-1)  # [B, N]
    return torch.stack([cross_entropy.sum(), cross_entropy.new_tensor(cross_entropy.numel())])


def _check_experts_of_classes(num_experts: int, num_classes: int) -> None:
    if num_experts % num_classes:
        raise UserError(
            f"The label loss gives each of {num_classes} classes as many experts, which {num_experts} experts can't "
            f"be: use a multiple of {num_classes} (--model.arch.num_experts)."
        )


def _mean(sums: Tensor) -> Tensor:
    return sums[0] / sums[1]


class _Loss(NamedTuple):
    # Of a routing and the rule (`label`: the target), additive over tokens.
    sums: Callable[..., Tensor]
    value: Callable[[Tensor], Tensor]


_LOSSES = {
    "importance": _Loss(_importance, cv_squared),
    "load": _Loss(_load, cv_squared),
    "load_balancing": _Loss(_load_balancing_sums, _load_balancing_value),
    "z": _Loss(_z_sums, _mean),
    "label": _Loss(_label_sums, _mean),
}


class AuxLoss:
    """Mean over MoE layers of Σ_j w_j · loss j, over everything that one optimizer step sees.

    A weight that was left out is each layer's router's own once `check` has seen the model, and 0 without.

    The statistic of a micro-batch is the detached sum over the earlier micro-batches of its accumulation window plus
    its own. With `torch.distributed` it is summed over ranks by an all-reduce whose backward also sums, which makes
    DDP's mean over ranks the gradient of the whole batch: one all-reduce in each direction for all losses and layers.

    The m-th micro-batch has about 1/m of a part in that statistic, so its own part's gradient counts m times: divided
    by the number K of micro-batches (as Lightning does), the gradients then add up to the whole batch's, where they
    would fade to (1 + 1/2 + ... + 1/K) / K of it. That is exact where micro-batches have the same statistic; else the
    direction is approximate, because earlier ones can't know what later ones will add (benchmarks/accumulation).
    """

    def __init__(self, weights: AuxLossWeights) -> None:
        settings = asdict(weights)
        self.rule: Rule = settings.pop("rule")
        self.weights: dict[str, float] = {
            name: float(weight) for name, weight in settings.items() if weight is not None
        }
        self._layer_weights: list[dict[str, float]] = []
        self.start_window()

    def check(self, model: nn.Module, num_classes: int | None = None) -> None:
        """Take the weights that were left out from the routers of `model`; C is that of the label loss's targets.

        Raises:
            UserError: if a router can't supply a loss that has a weight.
        """
        self._layer_weights = [self._weights_of(layer, num_classes) for layer in moe_layers(model)]

    def _weights_of(self, layer: MoEMlp, num_classes: int | None) -> dict[str, float]:
        router = layer.router
        weights = {**router.default_losses, **self.weights}
        weights = {name: weight for name, weight in weights.items() if weight}

        supported = set(router.losses)
        if "z" in supported:
            supported.add("label")  # both are functions of scores that are learned
        missing = weights.keys() - supported
        if missing:
            able = "it needs none"
            if router.losses:
                able = f"it has {', '.join(sorted(router.losses))}"
            raise UserError(
                f"The router of block {layer.layer_index} can't supply the {', '.join(sorted(missing))} loss "
                f"({able}): set its weight to 0, leave it out, or choose a router with noise, such as vmoe_top_k."
            )
        if "label" in weights:
            if num_classes is None:
                raise UserError(
                    "The label loss needs the number of classes: give Balance num_classes, and its loss the target."
                )
            _check_experts_of_classes(router.num_experts, num_classes)
        return weights

    def start_window(self) -> None:
        """Forget earlier micro-batches; call it once per optimizer step."""
        self._window: dict[tuple[str, int], Tensor] = {}
        self._micro_batches = 0

    def __call__(
        self, routings: Sequence[Routing], target: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted sum (None without MoE layers or weights), and each loss's detached mean over its layers.

        The label loss needs `target`, as `label_loss` has it.
        """
        self._micro_batches += 1
        layer_weights = self._layer_weights or [self.weights] * len(routings)
        terms: list[tuple[str, float]] = []  # name and weight
        sums = []
        for index, (routing, weights) in enumerate(zip(routings, layer_weights, strict=True)):
            for name, weight in weights.items():
                if weight:
                    terms.append((name, weight))
                    sums.append(self._window_sums(name, index, routing, target))
        if not terms:
            return None, {}

        weighted = []
        values: defaultdict[str, list[Tensor]] = defaultdict(list)  # of each layer
        for (name, weight), total in zip(terms, sum_over_ranks(sums), strict=True):
            value = _LOSSES[name].value(total)
            weighted.append(weight * value)
            values[name].append(value.detach())
        loss = torch.stack(weighted).sum() / len(routings)
        means = {name: torch.stack(per_layer).mean() for name, per_layer in values.items()}
        return loss, means

    def _window_sums(
        self, name: str, layer: int, routing: Routing, target: Tensor | None
    ) -> Tensor:
        """The additive sums of one loss of one layer, over the window so far in this process."""
        sums = _LOSSES[name].sums(routing, target if name == "label" else self.rule)
        earlier = self._window.get((name, layer))
        if earlier is not None:
            # The value of the sum, and m times the gradient of this micro-batch's part.
            sums = earlier + sums + (self._micro_batches - 1) * (sums - sums.detach())
        self._window[name, layer] = sums.detach()
        return sums


class Balance:
    """Balance losses and router biases for any loop: `loss` before every backward pass, `step` after the optimizer's.

    Over several processes (`torch.distributed`) and micro-batches the statistics are those of the whole step, as
    `AuxLoss` says; call both on every process. `counts` [E] of each layer are the choices of this process's window,
    until the next one begins; `values` are the losses of the last micro-batch by name, for a log.

    Args:
        model: any module with MoE layers; also wrapped in `DistributedDataParallel`.
        weights: the weight of each loss; those that are left out are the routers' own.
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
        self.model = model
        self.counts: list[Tensor] = []
        self.values: dict[str, Tensor] = {}
        self._losses = AuxLoss(weights or AuxLossWeights())
        self._losses.check(model, num_classes)
        self._needs_load = any(layer.router.needs_load for layer in moe_layers(model))
        self._step_is_done = False

    def start_window(self) -> None:
        """Forget earlier micro-batches: the next one is the first of an optimizer step."""
        self.counts = []
        self._losses.start_window()
        self._step_is_done = False

    def loss(self, routings: Sequence[Routing], target: Tensor | None = None) -> Tensor:
        """The weighted sum of the balance losses, a scalar; 0 without MoE layers or weights.

        Args:
            routings: what the MoE layers decided, by `forward_routing` or `record_routing`.
            target: [B, C] for the label loss, as `label_loss` has it.
        """
        if self._step_is_done:
            self.start_window()
        counts = [routing.requested_counts() for routing in routings]  # [E] of each layer
        if self.counts:
            counts = [earlier + new for earlier, new in zip(self.counts, counts, strict=True)]
        self.counts = counts
        total, self.values = self._losses(routings, target)
        if total is None:
            return torch.zeros((), device=counts[0].device if counts else None)
        return total

    def step(self, applied: bool = True) -> None:
        """Update router biases by the step's load; the next `loss` begins another step.

        Args:
            applied: False where the update was left out, as a loss scaler does: then no router moves.
        """
        self._step_is_done = True
        if applied and self._needs_load and self.counts:
            update_router_bias(self.model, sum_over_ranks(self.counts))


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each of these tensors, of one dtype, summed over ranks: one all-reduce, and one in backward."""
    if not tensors or not dist.is_available() or not dist.is_initialized():
        return list(tensors)
    if dist.get_world_size() == 1:
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
    """Load, entropy and drops of every MoE layer, from hard counts over all tokens (prefix tokens too).

    `layers` are block indices in order of depth, `num_experts` is E of each.
    """

    full_state_update = False
    counts: Tensor
    count_squares: Tensor
    requested: Tensor
    entropy_bits: Tensor
    tokens: Tensor
    images: Tensor
    unrouted: Tensor

    def __init__(self, layers: Sequence[int], num_experts: Sequence[int]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.num_experts = list(num_experts)
        # A layer with fewer experts than others has zeros behind.
        depth, most_experts = len(self.layers), max(self.num_experts, default=0)
        for name in ("counts", "count_squares", "requested"):
            self._add_sums(name, torch.zeros((depth, most_experts), dtype=torch.int64))
        for name in ("tokens", "images", "unrouted"):
            self._add_sums(name, torch.zeros(depth, dtype=torch.int64))
        self._add_sums("entropy_bits", torch.zeros(depth, dtype=torch.float64))

    def _add_sums(self, name: str, zeros: Tensor) -> None:
        self.add_state(name, zeros, dist_reduce_fx="sum")

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
        # torchmetrics squeezes a state of one element, such as the tokens of the only layer.
        sums = {name: value.reshape(len(self.layers), -1) for name, value in self.compute().items()}
        loads = []
        for row, layer in enumerate(self.layers):
            experts = slice(self.num_experts[row])
            load = LayerLoad.from_sums(
                layer,
                counts=sums["counts"][row, experts],
                requested=sums["requested"][row, experts],
                entropy_bits=sums["entropy_bits"][row, 0],
                tokens=sums["tokens"][row, 0],
                unrouted=sums["unrouted"][row, 0],
                count_squares=sums["count_squares"][row, experts],
                images=sums["images"][row, 0],
            )
            loads.append(load)
        return loads
