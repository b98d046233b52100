"""Routers in which every token picks its K best experts, and the table of all routers by name.

Each is exactly as its source defines it:

- `noisy_top_k`: Shazeer et al. 2017, arXiv:1701.06538, §2.1 and appendix A.
- `vmoe_top_k`: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, §2 and its released code.
- `switch`: Fedus et al. 2021, arXiv:2101.03961, §2.1.
- `cosine`: Chi et al. 2022 (X-MoE), arXiv:2204.09179, §3.2, with the numbers of Swin-MoE (Tutel).
- `sigmoid`, `bias_balanced`: DeepSeek-V3, arXiv:2412.19437, §2.1.2; the bias is Wang et al. 2024, arXiv:2408.15664.

To add a router, write a subclass of `Router`, which returns a `Routing` for tokens [B, N, D], and a row of `ROUTERS`.

Axes: B images, N tokens of an image, T tokens, D width, E experts, K choices of a token (k where it may differ).
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
from moevision.layers.cpu import softmax_over_experts, top_k_scores
from moevision.layers.routers_soft import ExpertChoiceRouter, SoftRouter
from moevision.layers.routing import (
    JITTER,
    Router,
    Routing,
    at_least_float32,
    full_precision,
    within_capacity,
)
from moevision.layers.words import ANGLE, by_sigmoid, by_softmax

_MAX_SCALE = 100.0  # Tutel clamps the learned logit scale at ln 100
# Default weight of the loss. arXiv:2101.03961, §2.2 has 0.01 and adds the layers' losses, while ours is their mean.
# With 0.01 of the mean max/mean loads reached 2.0, with 0.05 they stay below 1.5 (benchmarks/routers).
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

    `noise` is `learned` (a second linear map gives the standard deviation for each token and expert), `fixed` (σ =
    1/E), `jitter` (of the router's input) or `none`; `options.noise` overrides it. `default_losses` are weights of the
    balance losses, used if the user gives none.
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
        """[E, features]: a vector per expert; its product with a token's `features` gives the expert's score."""
        return self.weight

    def features(self, x: Tensor) -> Tensor:
        """[..., features]: the features of tokens x [..., D] that are multiplied with `rows`."""
        return x

    @torch.no_grad()
    def start_rows(self, centroids: Tensor, features: Tensor) -> None:
        """Initialise `rows` so that each token goes to its nearest centroid.

        The mean of the centroids is subtracted, which changes no choice. The rows are scaled so that a token's logits
        have a standard deviation over experts of 1, about that of random rows.

        Args:
            centroids: [E, features] unit vectors.
            features: [T, features] of the tokens that were clustered.
        """
        rows = centroids - centroids.mean(0)  # [E, features]
        logits = F.linear(features, rows)  # [T, E]
        std = logits.std(-1, correction=0).mean()
        self.rows.copy_(rows / std.clamp_min(1e-12))

    @property
    def losses(self) -> frozenset[str]:
        """The losses that this router supports; the load loss needs Gaussian noise."""
        if self.noise in ("learned", "fixed"):
            return frozenset({"importance", "load", "load_balancing", "z"})
        return frozenset({"importance", "load_balancing", "z"})

    @property
    def default_losses(self) -> dict[str, float]:
        """Those of the constructor that are in `losses`."""
        weights = self._default_losses
        return {name: weight for name, weight in weights.items() if name in self.losses}

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [B, N, D]."""
        by_image = self.options.route_by == "image"
        with full_precision(x):
            routed = mean_token(x) if by_image else at_least_float32(x)  # [B, 1 or N, D]
            logits, noise_std = self.scores(routed)
            routing = self.choose(logits, noise_std)
        return routing.for_tokens(x.shape[1]) if by_image else routing

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Clean logits [B, N, E] of tokens x [B, N, D], and the standard deviation of their Gaussian noise, if any.

        That is [B, N, E] for learned noise, [1, 1, 1] for fixed noise.
        """
        weight = self.weight.to(x.dtype)
        has_learned_noise = self.training and self.noise == "learned"
        if has_learned_noise and self.noise_weight is not None:
            # One matrix product for both maps: x is read once.
            noise_weight = self.noise_weight.to(x.dtype)
            outputs = F.linear(x, torch.cat([weight, noise_weight]))  # [B, N, 2·E]
            logits, raw_std = outputs.split(self.num_experts, dim=-1)  # [B, N, E] each
            return logits, F.softplus(raw_std)

        logits = F.linear(self.add_jitter(x), weight)
        return logits, self.fixed_std(logits)

    def add_jitter(self, x: Tensor) -> Tensor:
        """Tokens times U(0.99, 1.01) where jitter is on; unlike other noise it leaves no clean logits."""
        if not (self.training and self.noise == "jitter"):
            return x
        return x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER)

    def fixed_std(self, logits: Tensor) -> Tensor | None:
        """[1, 1, 1]: σ = 1/E for all logits [B, N, E] if fixed noise is on; else None."""
        if not (self.training and self.noise == "fixed"):
            return None
        return logits.new_full((1, 1, 1), 1 / logits.shape[-1])

    def choose(self, logits: Tensor, noise_std: Tensor | None) -> Routing:
        """The K best of the noisy logits [B, N, E], with gates by softmax."""
        noisy_logits = logits
        if noise_std is not None:
            noisy_logits = logits + torch.randn_like(logits) * noise_std

        probs = softmax_over_experts(logits)  # [B, N, E]
        top_logits, expert_index = top_k_scores(noisy_logits, self.top_k)  # [B, N, K]

        # Without gradients, noise and normalisation these gates are the chosen `probs`: one call instead of a dozen.
        plain = type(self).gates is TopKRouter.gates and not self.normalizes(self.top_k)
        if plain and noise_std is None and not torch.is_grad_enabled():
            gates = probs.gather(-1, expert_index)
        else:
            gates = self.gates(noisy_logits, top_logits)

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
        """[B, N, E]: the scores that gates are computed of, which needn't be those that experts are chosen by."""
        return routing.noisy_logits

    def gates(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """[B, N, k]: combine weights of chosen experts, by this router's rule.

        From `gate_logits` [B, N, E] and those of the chosen experts [B, N, k]; k is `top_k` unless an intervention
        chose otherwise.
        """
        normalize = self.normalizes(top_logits.shape[-1])
        return softmax_gates(gate_logits, top_logits, normalize=normalize)

    def normalizes(self, top_k: int) -> bool:
        """Whether the gates of a token that has `top_k` experts are normalised to sum to 1."""
        if self.options.normalize_gates is not None:
            return self.options.normalize_gates
        return self.softmax_over == "kept" and top_k > 1

    @torch.no_grad()
    def priority(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """[B, N, k]: the priorities of tokens in batch priority routing; arguments as for `gates`.

        The gates before normalisation, as in Tutel: with gates .9 and .09 a token should come before one with .5 and
        .01, and for k = 1 normalised gates are all 1.
        """
        return softmax_gates(gate_logits, top_logits, normalize=False)

    def keep(self, expert_index: Tensor, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
        """[B, N, K] bool: which choices are within the capacity for training or evaluation; all if there is none."""
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
        """The projection, an embedding [E, features], and the logarithm of the scale (`temperature`)."""
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
        """[..., features]: projected tokens, scaled to length 1."""
        weight = self.proj.weight.to(x.dtype)
        bias = self.proj.bias.to(x.dtype)
        return F.normalize(F.linear(x, weight, bias), dim=-1)

    @torch.no_grad()
    def start_rows(self, centroids: Tensor, features: Tensor) -> None:
        """Initialise `rows` with the centroids, at the mean length of the rows: only their directions count."""
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
    """Affinities are a sigmoid of each logit instead of a softmax: an expert's score doesn't depend on other experts.

    `s = sigmoid(x W)`; the K best by s + b are chosen; gates are the chosen s divided by their sum (s itself for k =
    1). The bias b is DeepSeek-V3's, and absent without a `bias_rate` γ (`options.bias_rate` overrides it): it affects
    the choice only, has no gradient, and `update_router_bias` changes it by γ after an optimizer step, upwards for
    experts with less than the mean load. There is no noise; the other arguments are those of `TopKRouter`.
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
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, noise="none", **options)
        self.bias_rate = self.options.bias_rate or bias_rate
        self.register_buffer("bias", None)
        if self.bias_rate is not None:
            self.bias = torch.zeros(num_experts, device=self.weight.device, dtype=torch.float32)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """As in torch, but the bias never loses precision: in bfloat16 its small steps would be rounded away."""
        old_bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if old_bias is None or self.bias is None:
            return self
        if self.bias.dtype.itemsize < old_bias.dtype.itemsize:
            self.bias = old_bias.to(self.bias.device)
        return self

    def reset_parameters(self) -> None:
        """As those of `TopKRouter`, and a bias of 0."""
        super().reset_parameters()
        bias = getattr(self, "bias", None)  # the base constructor calls this before it exists
        if bias is not None:
            bias.zero_()

    @property
    def needs_load(self) -> bool:
        """Whether `after_step` needs the experts' load: only for the bias."""
        return self.bias is not None

    @torch.no_grad()
    def after_step(self, load: Tensor) -> None:
        """`b += δ - mean(δ)`, δ = γ · sign(mean load - load), unless the router is frozen (arXiv:2408.15664, alg. 1).

        `load` [E] counts the choices of each expert. Subtracting mean(δ) keeps the mean of the biases at 0.
        """
        if self.bias is None or self.bias_rate is None or not self.weight.requires_grad:
            return
        load = load.to(self.bias.device, torch.float64)
        step = self.bias_rate * torch.sign(load.mean() - load)  # [E] δ
        self.bias += (step - step.mean()).to(self.bias.dtype)

    def choose(self, logits: Tensor, noise_std: Tensor | None) -> Routing:
        """The K best by sigmoid plus bias; gates are computed without the bias."""
        scores = logits.sigmoid()  # [B, N, E]
        if self.bias is not None:
            scores = scores + self.bias.to(scores.dtype)

        # Equals s / Σ s, and is finite also if every s underflows.
        probs = F.logsigmoid(logits).softmax(-1)  # [B, N, E]

        _, expert_index = top_k_scores(scores, self.top_k)  # [B, N, K]
        top_logits = logits.gather(-1, expert_index)  # [B, N, K]
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
    """[B, N, k]: softmax of the chosen logits [B, N, k], over the chosen experts (`normalize`) or all [B, N, E]."""
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
    """The value 1 with the gradient of `probability`: for k = 1 a normalised gate is 1, but the router must learn."""
    return probability + (1 - probability).detach()


def mean_token(x: Tensor) -> Tensor:
    """[B, 1, D]: the mean of each image's tokens [B, N, D], added up in at least float32."""
    return x.mean(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


# ---- the table


@dataclass(frozen=True)
class RouterKind:
    """A row of the table `ROUTERS`."""

    make: Callable[..., Any]  # constructor (dim, E, K, options, device, dtype)
    options: tuple[str, ...] = ()  # the fields of `RouterOptions` that this router uses
    top_k: int = 2  # K if the user gives none


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


_VMOE: dict[str, Any] = {
    "noise": "fixed",
    "softmax_over": "all",
    "default_losses": _IMPORTANCE_AND_LOAD,
}
# The options of each kind of router.
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
    "bias_balanced": RouterKind(
        partial(SigmoidRouter, bias_rate=_BIAS_RATE), (*_SIGMOID, "bias_rate")
    ),
    "cosine": RouterKind(partial(CosineRouter, **_VMOE), _TOKEN_CHOICE),
    "expert_choice": RouterKind(ExpertChoiceRouter, ("noise", "normalize_gates")),
    "soft": RouterKind(SoftRouter, ("slots_per_expert",)),
    "hash": RouterKind(HashRouter),
    "random": RouterKind(RandomRouter),
    "position": RouterKind(PositionRouter),
    "colour": RouterKind(ColourRouter),
}


def router_kind(name: str) -> RouterKind:
    """The row of `ROUTERS` with this name; a UserError if there is none."""
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
    **placement: Any,
) -> Any:
    """Build the router `name` of `ROUTERS`; without `top_k` it gets its default K. `placement` are device and dtype.

    Raises:
        UserError: for an unknown name, a K that isn't between 1 and E, or an option that the router has no use for.
    """
    kind = router_kind(name)
    if top_k is None:
        top_k = kind.top_k
    if num_experts < 1:
        raise UserError(f"num_experts is {num_experts}: it must be at least 1.")
    if not 1 <= top_k <= num_experts:
        raise UserError(
            f"top_k={top_k} does not fit num_experts={num_experts}: choose top_k between 1 and {num_experts}."
        )
    options = options.check_supported(name, kind.options)
    return kind.make(dim, num_experts, top_k, options=options, **placement)
