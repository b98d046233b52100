"""What each router does with a patch, in its own words: the sentences of the computation card.

They are read off the layer's router and its options, for evaluation, under the k and the capacity that the explorer
shows; the numbers beside them are `computation.py`'s.
"""

from __future__ import annotations

from typing import Any, Final

from moevision.layers import ExpertChoiceRouter, HandmadeRouter, MoEMlp, SoftRouter, TopKRouter
from moevision.layers.routers import JITTER, CosineRouter, SigmoidRouter
from moevision.layers.routing import routed_unit

STEPS: Final = ("scores", "shares", "kept", "weights")
# Where a gate that nobody learned gets its expert from.
_RULES: Final = {
    "HashRouter": "A hash of the patch's position",
    "RandomRouter": "A draw that is fixed for each position (in training a new one each time)",
    "PositionRouter": "The patch's place, from top to bottom,",
    "ColourRouter": "The nearest of a few colours",
}


def steps(
    layer: MoEMlp, *, noisy: bool = False, top_k: int | None = None, capacity: float | None = None
) -> dict[str, str]:
    """One or two sentences for each of `STEPS`.

    Args:
        layer: whose router is described.
        noisy: whether the noise of training is on.
        top_k: K that is shown; None for the router's own.
        capacity: capacity factor that `limit_capacity` puts in the place of the router's own; None for that.
    """
    router: Any = layer.router
    top_k = router.top_k if top_k is None else top_k
    if isinstance(router, HandmadeRouter):
        return _by_rule(router, capacity)
    if isinstance(router, SoftRouter):
        return _soft()
    if isinstance(router, ExpertChoiceRouter):
        return _expert_choice(router, noisy)
    if isinstance(router, SigmoidRouter):
        return _sigmoid(router, top_k, capacity)
    if isinstance(router, TopKRouter):
        return _top_k(router, noisy, top_k, capacity)
    own = f"The router {type(router).__name__} gives each expert a number."
    return {"scores": own, "shares": "As shares of 1.", "kept": "It chooses experts.", "weights": "It gives weights."}


def _top_k(router: TopKRouter, noisy: bool, top_k: int, capacity: float | None) -> dict[str, str]:
    if isinstance(router, CosineRouter):
        scores = "The angle between the patch and one learned direction per expert, times a learned scale."
    else:
        scores = "The patch is compared with one learned direction per expert."
    if router.softmax_over == "kept" and router.normalizes(top_k):
        weights = "Softmax over the kept scores alone: the weights add up to 1."
    elif router.normalizes(top_k):
        weights = "The kept shares, divided by their sum: the weights add up to 1."
    else:
        weights = "Each kept share is the weight. The rest belonged to the other experts, and is left out."
    return {
        "scores": _unit(router) + scores + _noise(router, noisy),
        "shares": "Softmax turns the scores into shares that add up to 1.",
        "kept": "The highest are kept; the others don't run." + _capacity(router, capacity),
        "weights": weights,
    }


def _sigmoid(router: SigmoidRouter, top_k: int, capacity: float | None) -> dict[str, str]:
    balanced = router.bias is not None
    best = "The highest affinity plus bias is kept: the bias keeps the load even, and enters no weight."
    weights = (
        "The kept affinities, divided by their sum: the weights add up to 1."
        if router.normalizes(top_k)
        else "Each kept affinity is the weight; the weights needn't add up to 1."
    )
    return {
        "scores": _unit(router) + "The patch is compared with one learned direction per expert.",
        "shares": "A sigmoid for each score alone gives an affinity from 0 to 1: experts don't compete here.",
        "kept": (best if balanced else "The highest are kept; the others don't run.") + _capacity(router, capacity),
        "weights": weights,
    }


def _expert_choice(router: ExpertChoiceRouter, noisy: bool) -> dict[str, str]:
    return {
        "scores": "The patch is compared with one learned direction per expert." + _noise(router, noisy),
        "shares": "Softmax turns the scores into shares that add up to 1.",
        "kept": "Experts choose patches: each takes the patches of the image with its largest shares, all experts "
        "equally many. A patch may get several experts, or none.",
        "weights": "The shares, divided by their sum over the experts that took the patch, are the weights."
        if router.options.normalize_gates
        else "The share of each expert that took the patch is its weight. The rest is left out.",
    }


def _soft() -> dict[str, str]:
    return {
        "scores": "The patch is compared with every slot of every expert; an expert's score sums up its slots.",
        "shares": "Softmax over all slots: the patch's shares add up to 1.",
        "kept": "Nothing is left out: experts compute slots, means of all patches, and every patch takes from all.",
        "weights": "The shares are the weights; they add up to 1.",
    }


def _by_rule(router: HandmadeRouter, capacity: float | None) -> dict[str, str]:
    rule = _RULES.get(type(router).__name__, "A rule")
    return {
        "scores": f"Nothing is learned here. {rule} decides.",
        "shares": "No shares: the rule has decided already.",
        "kept": "The rule's expert is kept, and the next ones in cyclic order if there are several."
        + ("" if capacity is None else _full(capacity, "the last patches")),  # all weights are the same
        "weights": "Every kept expert gets the same weight; the weights add up to 1.",
    }


def _noise(router: TopKRouter | ExpertChoiceRouter, noisy: bool) -> str:
    """What training adds to the scores, and whether it is on here."""
    if router.noise == "none":
        return ""
    size = {
        "learned": "noise, as strong as a second learned map says for this patch",
        "fixed": f"noise of size 1/{router.num_experts}",
        "jitter": f"noise: it shakes the patch by up to {JITTER:.0%} first",
    }[router.noise]
    return f" As in training, with {size}." if noisy else f" Training adds {size}; here it is off."


def _unit(router: TopKRouter) -> str:
    if routed_unit(router) == "token":
        return ""
    return "The image is routed as a whole: the mean of its patches decides for all of them. "


def _capacity(router: TopKRouter, shown: float | None) -> str:
    options = router.options
    factor = options.eval_capacity_factor if shown is None else shown
    if factor is None:
        return ""
    by_weight = shown is not None or options.batch_priority
    return _full(factor, "the smallest weights" if by_weight else "the last patches")


def _full(factor: float, turned_away: str) -> str:
    return f" A full expert (capacity factor {factor:g}) turns away {turned_away}."
