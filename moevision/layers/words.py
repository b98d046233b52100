"""What each router does with a patch, in sentences (`Router.explain`): the explorer's computation card.

They are read off the router and its options, for evaluation, under the k and the capacity that the explorer shows.
"""

from __future__ import annotations

from typing import Any, Final

from moevision.layers.routing import JITTER, Explanation, routed_unit

ONE_DIRECTION: Final = "The patch is compared with one learned direction per expert."
ANGLE: Final = (
    "The angle between the patch and one learned direction per expert, times a learned scale."
)


def by_softmax(
    router: Any, *, noisy: bool, top_k: int, capacity: float | None, scores: str = ONE_DIRECTION
) -> Explanation:
    """Of a `TopKRouter`; `scores` says how a patch is scored."""
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


def by_sigmoid(router: Any, *, noisy: bool, top_k: int, capacity: float | None) -> Explanation:
    """Of a `SigmoidRouter`."""
    choice = "The highest are kept; the others don't run."
    if router.bias is not None:
        choice = "The highest affinity plus bias is kept: the bias keeps the load even, and enters no weight."
    weights = "Each kept affinity is the weight; the weights needn't add up to 1."
    if router.normalizes(top_k):
        weights = "The kept affinities, divided by their sum: the weights add up to 1."
    return {
        "scores": _unit(router) + ONE_DIRECTION,
        "shares": "A sigmoid for each score alone gives an affinity from 0 to 1: experts don't compete here.",
        "kept": choice + _capacity(router, capacity),
        "weights": weights,
    }


def by_experts(router: Any, *, noisy: bool, top_k: int, capacity: float | None) -> Explanation:
    """Of an `ExpertChoiceRouter`."""
    weights = "The share of each expert that took the patch is its weight. The rest is left out."
    if router.options.normalize_gates:
        weights = "The shares, divided by their sum over the experts that took the patch, are the weights."
    return {
        "scores": ONE_DIRECTION + _noise(router, noisy),
        "shares": "Softmax turns the scores into shares that add up to 1.",
        "kept": "Experts choose patches: each takes the patches of the image with its largest shares, all experts "
        "equally many. A patch may get several experts, or none.",
        "weights": weights,
    }


def by_slots(router: Any, **_: Any) -> Explanation:
    """Of a `SoftRouter`."""
    return {
        "scores": "The patch is compared with every slot of every expert; an expert's score sums up its slots.",
        "shares": "Softmax over all slots: the patch's shares add up to 1.",
        "kept": "Nothing is left out: experts compute slots, means of all patches, and every patch takes from all.",
        "weights": "The shares are the weights; they add up to 1.",
    }


def by_rule(
    router: Any, *, noisy: bool, top_k: int, capacity: float | None, rule: str = "A rule"
) -> Explanation:
    """Of a `HandmadeRouter`, for which nobody learned anything; `rule` says where the expert comes from."""
    choice = "The rule's expert is kept, and the next ones in cyclic order if there are several."
    if capacity is not None:
        choice += _full(capacity, "the last patches")  # all weights are the same
    return {
        "scores": f"Nothing is learned here. {rule} decides.",
        "shares": "No shares: the rule has decided already.",
        "kept": choice,
        "weights": "Every kept expert gets the same weight; the weights add up to 1.",
    }


def _noise(router: Any, noisy: bool) -> str:
    """What training adds to the scores, and whether it is on here."""
    if router.noise == "none":
        return ""
    descriptions = {
        "learned": "noise, as strong as a second learned map says for this patch",
        "fixed": f"noise of size 1/{router.num_experts}",
        "jitter": f"noise: it shakes the patch by up to {JITTER:.0%} first",
    }
    noise = descriptions[router.noise]
    if noisy:
        return f" As in training, with {noise}."
    return f" Training adds {noise}; here it is off."


def _unit(router: Any) -> str:
    if routed_unit(router) == "token":
        return ""
    return "The image is routed as a whole: the mean of its patches decides for all of them. "


def _capacity(router: Any, capacity: float | None) -> str:
    """What a capacity drops: that of an intervention, which goes by weights, or the router's own."""
    if capacity is not None:
        return _full(capacity, "the smallest weights")
    options = router.options
    if options.eval_capacity_factor is None:
        return ""
    dropped = "the smallest weights" if options.batch_priority else "the last patches"
    return _full(options.eval_capacity_factor, dropped)


def _full(factor: float, dropped: str) -> str:
    return f" A full expert (capacity factor {factor:g}) turns away {dropped}."
