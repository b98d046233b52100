"""Routers in which every token picks its K best experts, and the table of all routers by name.

Each is exactly as its source defines it:

- `noisy_top_k`: Shazeer et al. 2017, arXiv:1701.06538, §2.1 and appendix A.
- `vmoe_top_k`: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, §2 and its released code.
- `switch`: Fedus et al. 2021, arXiv:2101.03961, §2.1.
- `cosine`: Chi et al. 2022 (X-MoE), arXiv:2204.09179, §3.2, with the numbers of Swin-MoE (Tutel).
- `sigmoid`, `bias_balanced`: DeepSeek-V3, arXiv:2412.19437, §2.1.2; the bias is Wang et al. 2024, arXiv:2408.15664.

A router of your own is a `Router`, which returns a `Routing` for tokens [B, N, D], and a row of `ROUTERS`.

Axes: B images, N tokens, D width, E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, partialmethod
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.config import Noise, RouterOptions
from moevision.errors import UserError
from moevision.layers.baselines import ColourRouter, HashRouter, PositionRouter, RandomRouter
from moevision.layers.cpu import best, softmax_over_experts
from moevision.layers.routers_soft import ExpertChoiceRouter, SoftRouter
from moevision.layers.routing import (
    JITTER,
    Router,
    Routing,
    at_least_float32,
    check_top_k,
    full_precision,
    within_capacity,
)
from moevision.layers.words import ANGLE, by_sigmoid, by_softmax

_MAX_SCALE = 100.0  # Tutel clamps the learned logit scale at ln 100
# arXiv:2101.03961, §2.2 has 0.01 for every layer, added up; ours is a mean over layers. 0.01 of that left max/mean
# loads of up to 2.0 where 0.05 keeps them below 1.5 (benchmarks/routers).
_LOAD_BALANCING = 0.05
_BIAS_RATE = 1e-3  # γ of arXiv:2412.19437, §4.2


class TopKRouter(Router):
    """Each token chooses its K best experts by a linear score plus noise (noise in training only).

    With `softmax_over="kept"` this is Shazeer's noisy top-k gating (eq. 3-5): `H = x W_gate + N(0, 1) ·
    softplus(x W_noise)`, `gates = softmax(keep_top_k(H))`. With k = 1 that softmax is the constant 1 and the router
    would never learn, so the gate is then the full-softmax probability of the noisy logits (our deviation).

    With `softmax_over="all"` and `noise="fixed"` this is V-MoE's `TOP_k(softmax(x W + ε))`, ε ~ N(0, 1/E²): the
    softmax comes before the choice and is not renormalised.

    The scores are computed in at least float32 whatever autocast says, since a near tie decided in bfloat16 sends
    tokens to arbitrary experts (Switch Transformer, arXiv:2101.03961, §2.4); float64 stays float64. On CUDA the
    products of a 32-true training are in TF32, these too.

    With `route_by="image"` the router sees one token per image, the mean of all its tokens, and decides once for all of
    them (Mobile V-MoEs, arXiv:2309.04354, route images too, once for all layers). Class and register tokens are part of
    the mean: the same experts compute them, and a layer needn't know where patches begin. Noise is drawn once per
    image, and a capacity (of the batch) counts images.

    K lies between 1 and E, else a UserError. `noise` is `learned` (a second linear map gives each token's), `fixed`
    (σ = 1/E), `jitter` or `none`; the one in `options`, `RouterOptions`, wins. `default_losses` are weights of the
    balance losses where the user gives none.
    """

    explain = by_softmax
    noise_weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        noise: Noise = "learned",
        softmax_over: Literal["kept", "all"] = "kept",
        options: RouterOptions = RouterOptions(),  # noqa: B008 (never changed)
        default_losses: Mapping[str, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.noise = options.noise or noise
        self.softmax_over = softmax_over
        self.options = options
        self._default_losses = default_losses or {}
        self.noise_weight = None
        self.make_parameters(device, dtype)
        self.reset_parameters()

    def make_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """The maps from a token to its scores and to the noise on them, [E, D] each."""
        shape = (self.num_experts, self.dim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if self.noise == "learned":
            self.noise_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Zeros where noise is learned (Shazeer, appendix A: "no signal and some noise"); else LeCun normal.

        A router without learned noise must not start at zero: exact ties would send every token to the same experts.
        """
        if self.noise_weight is None:
            nn.init.normal_(self.weight, std=self.dim**-0.5)
        else:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.noise_weight)

    @property
    def rows(self) -> nn.Parameter:
        """[E, features]: the row of each expert, by which tokens choose it."""
        return self.weight

    def features(self, x: Tensor) -> Tensor:
        """[..., features]: what is multiplied with a row of each expert, of tokens x [..., D]."""
        return x

    @torch.no_grad()
    def start_rows(self, centroids: Tensor, features: Tensor) -> None:
        """Set the rows so that each token goes to its nearest centroid.

        From unit vectors [E, features] and the features [T, features] of the tokens that they are centroids of. What
        all centroids have in common is taken off, which changes no choice, and one factor gives the logits of a token
        the standard deviation 1 over experts, about that of random rows.
        """
        rows = centroids - centroids.mean(0)
        spread = F.linear(features, rows).std(-1, correction=0).mean()
        self.rows.copy_(rows / spread.clamp_min(1e-12))

    @property
    def losses(self) -> frozenset[str]:
        """As for every router; the load loss needs Gaussian noise."""
        if self.noise in ("learned", "fixed"):
            return frozenset({"importance", "load", "load_balancing", "z"})
        return frozenset({"importance", "load_balancing", "z"})

    @property
    def default_losses(self) -> dict[str, float]:
        """Those of the constructor that it can supply."""
        weights = self._default_losses
        return {name: weight for name, weight in weights.items() if name in self.losses}

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [B, N, D]."""
        by_image = self.options.route_by == "image"
        with full_precision(x):
            units = mean_token(x) if by_image else at_least_float32(x)
            logits, noise_std = self.scores(units)
            routing = self.choose(logits, noise_std)
        return routing.for_tokens(x.shape[1]) if by_image else routing

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Clean logits [B, N, E] of tokens [B, N, D], and the standard deviation of their Gaussian noise if any."""
        weight = self.weight.to(x.dtype)
        learned = self.training and self.noise == "learned"
        if learned and self.noise_weight is not None:
            # One matrix product for both maps: x is read once.
            noise_weight = self.noise_weight.to(x.dtype)
            both = F.linear(x, torch.cat([weight, noise_weight]))  # [B, N, 2·E]
            logits, raw_std = both.split(self.num_experts, dim=-1)
            return logits, F.softplus(raw_std)

        logits = F.linear(self.add_jitter(x), weight)
        return logits, self.fixed_std(logits)

    def add_jitter(self, x: Tensor) -> Tensor:
        """Tokens times U(0.99, 1.01), a noise of the input without clean logits: where it is on."""
        if not (self.training and self.noise == "jitter"):
            return x
        return x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER)

    def fixed_std(self, logits: Tensor) -> Tensor | None:
        """[1, 1, 1]: σ = 1/E, the same for all logits [B, N, E], where that noise is on; else None."""
        if not (self.training and self.noise == "fixed"):
            return None
        return logits.new_full((1, 1, 1), 1 / logits.shape[-1])

    def choose(self, logits: Tensor, noise_std: Tensor | None) -> Routing:
        """The K best of the noisy logits [B, N, E], with gates by softmax."""
        noisy_logits = logits
        if noise_std is not None:
            noisy_logits = logits + torch.randn_like(logits) * noise_std

        probs = softmax_over_experts(logits)  # [B, N, E]
        top_logits, expert_index = best(noisy_logits, self.top_k)  # [B, N, K]

        # Without gradients and noise the gates can be read from `probs`: one call in the place of a dozen.
        if noise_std is not None or torch.is_grad_enabled() or self.normalizes(self.top_k):
            gates = self.gates(noisy_logits, top_logits)
        else:
            gates = probs.gather(-1, expert_index)

        return Routing(
            logits=logits,
            noisy_logits=noisy_logits,
            probs=probs,
            noise_std=noise_std,
            expert_index=expert_index,
            combine_weight=gates,
            kept=self.keep(expert_index, noisy_logits, top_logits),
        )

    def gate_logits(self, routing: Routing) -> Tensor:
        """[B, N, E]: the scores that this router makes gates of, which needn't be those that it chooses by."""
        return routing.noisy_logits

    def gates(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """[B, N, k]: combine weights of chosen experts, by this router's rule.

        From `gate_logits` [B, N, E] and those of the chosen experts [B, N, k]; k is `top_k` unless an intervention
        chose otherwise.
        """
        normalize = self.normalizes(top_logits.shape[-1])
        return softmax_gates(gate_logits, top_logits, normalize=normalize)

    def normalizes(self, top_k: int) -> bool:
        """Whether the gates of `top_k` experts are made to sum to 1."""
        if self.options.normalize_gates is not None:
            return self.options.normalize_gates
        return self.softmax_over == "kept" and top_k > 1

    @torch.no_grad()
    def priority(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """[B, N, k]: by what batch priority routing orders tokens; arguments as for `gates`.

        The gates before normalisation, as in Tutel: .9 beside .09 is surer than .5 beside .01, and a normalised gate of
        one expert is always 1.
        """
        return softmax_gates(gate_logits, top_logits, normalize=False)

    def keep(self, expert_index: Tensor, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """[B, N, K] bool: which choices the capacity of this mode keeps; all without one."""
        kept = torch.ones_like(expert_index, dtype=torch.bool)
        options = self.options
        factor = options.capacity_factor if self.training else options.eval_capacity_factor
        if factor is None:
            return kept
        return within_capacity(
            expert_index,
            self.priority(gate_logits, top_logits),
            kept,
            self.num_experts,
            factor,
            priority=bool(options.batch_priority),
            whole_batch=options.capacity_group == "batch",
        )

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        settings = {"noise": self.noise, **self.options.non_default()}
        texts = [f"{name}={value!r}" for name, value in settings.items()]
        return ", ".join([str(self.dim), super().extra_repr(), *texts])


class CosineRouter(TopKRouter):
    """Scores are scaled cosines between a projection of the token and one embedding per expert.

    `logits_i = min(exp(temperature), 100) · cos(x P + b, e_i)`, then as V-MoE. The projection has min(256, D)
    features and the scale starts at 2, as in Swin-MoE.
    """

    explain = partialmethod(by_softmax, scores=ANGLE)

    def make_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """The projection, an embedding [E, features] and the logarithm of the scale."""
        if self.noise == "learned":
            raise UserError(
                "The router 'cosine' has no learned noise: use noise 'fixed', 'jitter' or 'none'."
            )
        features = min(256, self.dim)
        self.proj = nn.Linear(self.dim, features, device=device, dtype=dtype)
        embedding = torch.empty(self.num_experts, features, device=device, dtype=dtype)
        self.expert_embedding = nn.Parameter(embedding)
        # One element, not a scalar: FSDP2 shards no scalars.
        self.temperature = nn.Parameter(torch.empty(1, device=device, dtype=dtype))

    @property
    def rows(self) -> nn.Parameter:
        """[E, features]: the embeddings, which are compared with projected tokens."""
        return self.expert_embedding

    def features(self, x: Tensor) -> Tensor:
        """Projected tokens of length 1."""
        weight = self.proj.weight.to(x.dtype)
        bias = self.proj.bias.to(x.dtype)
        return F.normalize(F.linear(x, weight, bias), dim=-1)

    @torch.no_grad()
    def start_rows(self, centroids: Tensor, features: Tensor) -> None:
        """As long as they were: only the direction of a row counts."""
        self.rows.copy_(centroids * self.rows.to(centroids).norm(dim=-1).mean())

    def reset_parameters(self) -> None:
        """Embeddings drawn small (only their direction counts), scale 2."""
        self.proj.reset_parameters()
        nn.init.normal_(self.expert_embedding, std=0.01)
        nn.init.constant_(self.temperature, math.log(2))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As those of `TopKRouter`."""
        query = self.features(self.add_jitter(x))  # [B, N, features]
        embedding = F.normalize(self.expert_embedding.to(x.dtype), dim=-1)  # [E, features]
        scale = self.temperature.to(x.dtype).exp().clamp_max(_MAX_SCALE)
        logits = F.linear(query, embedding) * scale  # [B, N, E]
        return logits, self.fixed_std(logits)


class SigmoidRouter(TopKRouter):
    """Affinities are sigmoids, each on its own, instead of one softmax: experts don't compete for the score.

    `s = sigmoid(x W)`; the K best by s + b; gates are the chosen s over their sum (s itself for k = 1). Without a bias
    rate γ b is absent. With one, b is DeepSeek-V3's: it takes part in the choice only, has no gradient, and
    `update_router_bias` moves it by γ after an optimizer step, up for experts with less than the mean load. There is no
    noise; the other arguments are those of `TopKRouter`.
    """

    explain = partialmethod(by_sigmoid)
    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        bias_rate: float | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, noise="none", device=device, **options)
        self.bias_rate = bias_rate
        self.register_buffer("bias", None)
        if bias_rate is not None:
            self.bias = torch.zeros(num_experts, device=device, dtype=torch.float32)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """As torch, but the bias stays in float32: in bfloat16 its small steps would soon be lost."""
        before = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is None or self.bias is None:
            return self
        if self.bias.dtype.itemsize < before.dtype.itemsize:
            self.bias = before.to(self.bias.device)
        return self

    def reset_parameters(self) -> None:
        """As those of `TopKRouter`, and a bias of 0."""
        super().reset_parameters()
        bias = getattr(self, "bias", None)  # the constructor makes it later
        if bias is not None:
            bias.zero_()

    @property
    def needs_load(self) -> bool:
        """For the bias."""
        return self.bias is not None

    @torch.no_grad()
    def after_step(self, load: Tensor) -> None:
        """`b += δ - mean(δ)`, δ = γ · sign(mean load - load), unless the router is frozen (arXiv:2408.15664, alg. 1).

        It is re-centred, so that the biases keep their mean of 0.
        """
        if self.bias is None or self.bias_rate is None or not self.weight.requires_grad:
            return
        load = load.to(self.bias.device, torch.float64)
        step = self.bias_rate * torch.sign(load.mean() - load)
        self.bias += (step - step.mean()).to(self.bias.dtype)

    def choose(self, logits: Tensor, noise_std: Tensor | None) -> Routing:
        """The K best by sigmoid and bias, with gates of the sigmoids alone."""
        scores = logits.sigmoid()  # [B, N, E]
        if self.bias is not None:
            scores = scores + self.bias.to(scores.dtype)

        # s / Σ s, also where each s is too small for a float.
        probs = F.logsigmoid(logits).softmax(-1)

        _, expert_index = best(scores, self.top_k)  # [B, N, K]
        top_logits = logits.gather(-1, expert_index)
        return Routing(
            logits=logits,
            noisy_logits=scores,
            probs=probs,
            noise_std=None,
            expert_index=expert_index,
            combine_weight=self.gates(logits, top_logits),
            kept=self.keep(expert_index, logits, top_logits),
        )

    def gate_logits(self, routing: Routing) -> Tensor:
        """[B, N, E]: the clean logits; the bias never reaches a gate."""
        return routing.logits

    def gates(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """As those of `TopKRouter`."""
        return sigmoid_gates(top_logits, normalize=self.normalizes(top_logits.shape[-1]))

    @torch.no_grad()
    def priority(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """As that of `TopKRouter`."""
        return sigmoid_gates(top_logits, normalize=False)


def softmax_gates(gate_logits: Tensor, top_logits: Tensor, *, normalize: bool) -> Tensor:
    """Softmax of the chosen logits [B, N, k]: over all experts [B, N, E], or over the chosen ones (`normalize`)."""
    if normalize and top_logits.shape[-1] > 1:
        return top_logits.softmax(-1)
    probability = (top_logits - gate_logits.logsumexp(-1, keepdim=True)).exp()  # [B, N, k]
    return straight_through(probability) if normalize else probability


def sigmoid_gates(top_logits: Tensor, *, normalize: bool) -> Tensor:
    """Sigmoids of the chosen logits [B, N, k], divided by their sum if `normalize`."""
    if normalize and top_logits.shape[-1] > 1:
        return F.logsigmoid(top_logits).softmax(-1)  # s / Σ s
    affinity = top_logits.sigmoid()
    return straight_through(affinity) if normalize else affinity


def straight_through(probability: Tensor) -> Tensor:
    """The value 1 with the gradient of `probability`: what k = 1 needs to sum to 1 and still learn."""
    return probability + (1 - probability).detach()


def mean_token(x: Tensor) -> Tensor:
    """[B, 1, D]: the mean of each image's tokens [B, N, D], added up in at least float32."""
    return x.mean(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


# ---- the table


@dataclass(frozen=True)
class RouterKind:
    """A router's name in the table."""

    make: Callable[..., Any]  # constructor (dim, E, K, options, device, dtype)
    options: tuple[str, ...] = ()  # the `RouterOptions` that it has a use for
    top_k: int = 2  # K where the user gives none


_IMPORTANCE_AND_LOAD = {"importance": 0.05, "load": 0.05}
_BALANCING = {"load_balancing": _LOAD_BALANCING}


def _switch(dim: int, num_experts: int, top_k: int, **options: Any) -> TopKRouter:
    if top_k != 1:
        raise UserError(
            f"The router 'switch' sends a token to one expert: top_k={top_k} must be 1, or left out."
        )
    return TopKRouter(
        dim,
        num_experts,
        top_k,
        noise="none",
        softmax_over="all",
        default_losses=_BALANCING,
        **options,
    )


def _bias_balanced(
    dim: int, num_experts: int, top_k: int, options: RouterOptions, **factory: Any
) -> SigmoidRouter:
    bias_rate = options.bias_rate or _BIAS_RATE
    return SigmoidRouter(dim, num_experts, top_k, bias_rate=bias_rate, options=options, **factory)


_VMOE: dict[str, Any] = {
    "noise": "fixed",
    "softmax_over": "all",
    "default_losses": _IMPORTANCE_AND_LOAD,
}
_SIGMOID = (
    "route_by",
    "normalize_gates",
    "capacity_factor",
    "eval_capacity_factor",
    "batch_priority",
    "capacity_group",
)
_TOKEN_CHOICE = ("noise", *_SIGMOID)
ROUTERS: dict[str, RouterKind] = {
    "noisy_top_k": RouterKind(
        partial(TopKRouter, default_losses=_IMPORTANCE_AND_LOAD), _TOKEN_CHOICE
    ),
    "vmoe_top_k": RouterKind(partial(TopKRouter, **_VMOE), _TOKEN_CHOICE),
    "switch": RouterKind(_switch, _TOKEN_CHOICE, top_k=1),
    "sigmoid": RouterKind(partial(SigmoidRouter, default_losses=_BALANCING), _SIGMOID),
    "bias_balanced": RouterKind(_bias_balanced, (*_SIGMOID, "bias_rate")),
    "cosine": RouterKind(partial(CosineRouter, **_VMOE), _TOKEN_CHOICE),
    "expert_choice": RouterKind(ExpertChoiceRouter, ("noise", "normalize_gates")),
    "soft": RouterKind(SoftRouter, ("slots_per_expert",)),
    "hash": RouterKind(HashRouter),
    "random": RouterKind(RandomRouter),
    "position": RouterKind(PositionRouter),
    "colour": RouterKind(ColourRouter),
}


def router_kind(name: str) -> RouterKind:
    """The table's row of a name; a UserError if there is none."""
    if name not in ROUTERS:
        raise UserError(f"There is no router {name!r}; choose one of {', '.join(ROUTERS)}.")
    return ROUTERS[name]


def build_router(
    name: str,
    dim: int,
    num_experts: int,
    top_k: int | None = None,
    *,
    options: RouterOptions = RouterOptions(),  # noqa: B008 (never changed)
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The router of that name of `ROUTERS`; K is its own if None."""
    kind = router_kind(name)
    if top_k is None:
        top_k = kind.top_k
    options = options.only(name, kind.options)
    return kind.make(dim, num_experts, top_k, options=options, device=device, dtype=dtype)
