"""Texts that explain how each router treats a patch (`Router.explain`); the explorer shows them beside the numbers.

Each `by_*` function returns an `Explanation`, one text per step: "scores", "shares" (scores turned into affinities),
"kept" (which experts compute the patch) and "weights" (how their outputs are summed). The texts follow the router's
options and describe evaluation, under the `top_k` and capacity factor that the explorer shows; `noisy` says whether it
has switched the training noise on. `capacity` is the factor of an intervention; None leaves the router its own.

Texts that are appended to another one begin with a space and are empty where there is nothing to say.
"""

from __future__ import annotations

from typing import Any

from moevision.layers.routing import JITTER, Explanation, routed_unit

ONE_DIRECTION = "The patch is compared with one learned direction per expert."
ANGLE = "The angle between the patch and one learned direction per expert, times a learned scale."


def by_softmax(
    router: Any, *, noisy: bool, top_k: int, capacity: float | None, scores: str = ONE_DIRECTION
) -> Explanation:
    """Explain a `TopKRouter`; the text `scores` says how it scores a patch."""
    if router.softmax_over == "kept" and router.normalizes(top_k):
        weights = "Softmax over the kept scores alone: the weights add up to 1."
    elif router.normalizes(top_k):
        weights = "The kept shares, divided by their sum: the weights add up to 1."
    else:
        weights = "Each kept share is the weight. The rest belonged to the other experts, and is left out."
    return {
        "scores": _whole_image_text(router) + scores + _noise_text(router, noisy),
        "shares": "Softmax turns the scores into shares that add up to 1.",
        "kept": "The highest are kept; the others don't run." + _capacity_text(router, capacity),
        "weights": weights,
    }


def by_sigmoid(router: Any, *, noisy: bool, top_k: int, capacity: float | None) -> Explanation:
    """Explain a `SigmoidRouter`, which has no noise, so that `noisy` changes nothing."""
    kept = "The highest are kept; the others don't run."
    if router.bias is not None:
        kept = "The highest affinity plus bias is kept: the bias keeps the load even, and enters no weight."
    weights = "Each kept affinity is the weight; the weights needn't add up to 1."
    if router.normalizes(top_k):
        weights = "The kept affinities, divided by their sum: the weights add up to 1."
    return {
        "scores": _whole_image_text(router) + ONE_DIRECTION,
        "shares": "A sigmoid for each score alone gives an affinity from 0 to 1: experts don't compete here.",
        "kept": kept + _capacity_text(router, capacity),
        "weights": weights,
    }


def by_experts(router: Any, *, noisy: bool, top_k: int, capacity: float | None) -> Explanation:
    """Explain an `ExpertChoiceRouter`, where experts choose patches."""
    weights = "The share of each expert that took the patch is its weight. The rest is left out."
    if router.options.normalize_gates:
        weights = "The shares, divided by their sum over the experts that took the patch, are the weights."
    return {
        "scores": ONE_DIRECTION + _noise_text(router, noisy),
        "shares": "Softmax turns the scores into shares that add up to 1.",
        "kept": "Experts choose patches: each takes the patches of the image with its largest shares, all experts "
        "equally many. A patch may get several experts, or none.",
        "weights": weights,
    }


def by_slots(router: Any, **_: Any) -> Explanation:
    """Explain a `SoftRouter`, which has no options that matter here."""
    return {
        "scores": "The patch is compared with every slot of every expert; an expert's score sums up its slots.",
        "shares": "Softmax over all slots: the patch's shares add up to 1.",
        "kept": "Nothing is left out: experts compute slots, means of all patches, and every patch takes from all.",
        "weights": "The shares are the weights; they add up to 1.",
    }


def by_rule(
    router: Any, *, noisy: bool, top_k: int, capacity: float | None, rule: str = "A rule"
) -> Explanation:
    """Explain a `HandmadeRouter`, which learns nothing; `rule` is the subject of "… decides."."""
    kept = "The rule's expert is kept, and the next ones in cyclic order if there are several."
    if capacity is not None:
        # All weights are equal, so that the order of the patches decides which are dropped.
        kept += _full_expert_text(capacity, "the last patches")
    return {
        "scores": f"Nothing is learned here. {rule} decides.",
        "shares": "No shares: the rule has decided already.",
        "kept": kept,
        "weights": "Every kept expert gets the same weight; the weights add up to 1.",
    }


def _noise_text(router: Any, noisy: bool) -> str:
    """Which noise training adds to the scores, and whether it is switched on here."""
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


def _whole_image_text(router: Any) -> str:
    """A text to put in front, where the router decides about whole images."""
    if routed_unit(router) == "token":
        return ""
    return "The image is routed as a whole: the mean of its patches decides for all of them. "


def _capacity_text(router: Any, capacity: float | None) -> str:
    """Which choices a full expert drops: by weight under an intervention's capacity, else by the router's options."""
    if capacity is not None:
        return _full_expert_text(capacity, "the smallest weights")
    options = router.options
    if options.eval_capacity_factor is None:
        return ""
    dropped = "the smallest weights" if options.batch_priority else "the last patches"
    return _full_expert_text(options.eval_capacity_factor, dropped)


def _full_expert_text(factor: float, dropped: str) -> str:
    return f" A full expert (capacity factor {factor:g}) turns away {dropped}."
