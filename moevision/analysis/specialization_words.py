"""One sentence for one result of `specialization.py`: bits and their share first, then what they exceed, then p.

"Learned specialization" is said only above all comparisons; "no learned specialization found" names the comparison that
explains the number as well; and where a comparison is missing the sentence says which, instead of either.
"""

from __future__ import annotations

from collections.abc import Mapping

from moevision.analysis.estimate import Estimate
from moevision.layers.routing import Kind as RoutingKind

ABOUT_WORDS = {
    "class": "the class",
    "class_given_position": "the class, position held fixed",
    "position": "the position",
    "part": "the part, beyond what position tells",
}
BASELINE_WORDS = {
    "untrained": "the same model untrained",
    "hash": "a hash of the patch's pixels",
    "hash_position": "a hash of the patch's position",
    "kmeans_colour": "clusters of the patch's mean colour",
    "kmeans_input": "clusters of the layer's input (learned, but by no router)",
}
NOT_FOUND = "no learned specialization found"

Passed = tuple[bool, bool | None, bool | None]


def teller(about: str, kind: RoutingKind) -> str:
    """What tells something about the class, the position or the part, as the subject of a sentence."""
    if kind == "token_choice":
        return "the choice of expert tells"
    if about in ("class", "class_given_position"):
        return "how much patches take from each expert tells"
    return "which expert takes a patch tells" if kind == "expert_choice" else "how much each expert reads tells"


def sentence_of(
    layer: str,
    about: str,
    estimate: Estimate,
    baselines: Mapping[str, tuple[float, ...]],
    seeds: tuple[float, ...],
    passed: Passed,
    kind: RoutingKind = "token_choice",
) -> str:
    """The result in words.

    Args:
        layer: as it is shown, such as "L4".
        about: a key of `ABOUT_WORDS`.
        estimate: of the layer.
        baselines: name -> excess in bits of each seed.
        seeds: excess in bits of other trainings.
        passed: whether the layer is above the null, the baselines and, in every other training, both.
        kind: who chooses in the layer.
    """
    words, (above_null, above_baselines, above_seeds) = ABOUT_WORDS[about], passed
    told = _told(f"{layer}: {teller(about, kind)}", words, estimate)
    if not above_null:
        return f"{told} Shuffled pictures give as much: {NOT_FOUND} about {words}."
    if above_baselines is False:
        name, bits = max(((name, max(values)) for name, values in baselines.items()), key=lambda pair: pair[1])
        other = BASELINE_WORDS.get(name, name)
        how = "as much or more" if bits >= estimate.value_bits else "too close to tell apart"
        give = "give" if name.startswith("kmeans") else "gives"
        return (
            f"{told} That is more than shuffled pictures give, but {other} {give} "
            f"{_bits(bits)} bits, {how}: {NOT_FOUND} about {words}."
        )
    closest = max((bits for values in baselines.values() for bits in values), default=0.0)
    if above_seeds is False:
        return (
            f"{told} That is more than shuffled pictures and routing without learning give (at most {_bits(closest)} "
            f"bits), but other trainings of the same recipe ({_range(seeds)} bits) do not all exceed those: "
            f"{NOT_FOUND} about {words}."
        )
    missing = [
        name
        for name, value in (("routing without learning", above_baselines), ("other trainings", above_seeds))
        if value is None
    ]
    if missing:
        above = "shuffled pictures" if above_baselines is None else "shuffled pictures and routing without learning"
        return (
            f"{told} That is more than {above} give; it was not compared with {' and '.join(missing)}, so nothing is "
            "said about learned specialization."
        )
    return (
        f"{told} That is more than shuffled pictures (p = {estimate.p_value:.2g}) and every routing without learning "
        f"give (at most {_bits(closest)} bits), and {len(seeds)} other training{'s' if len(seeds) > 1 else ''} "
        f"repeat{'' if len(seeds) > 1 else 's'} it ({_range(seeds)} bits): learned specialization."
    )


def _told(tells: str, words: str, estimate: Estimate) -> str:
    interval, share = f"{_bits(estimate.low)} to {_bits(estimate.high)}", _percent(estimate.share_of_entropy)
    return (
        f"{tells} {_bits(estimate.value_bits)} bits about {words} (95 % interval "
        f"{interval}; {share} of all there is to tell; {estimate.n_images:,} pictures)."
    )


def _bits(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if round(value, 3) else "0.000"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-", "−") if round(100 * share, 1) else "0.0 %"


def _range(values: tuple[float, ...]) -> str:
    low, high = _bits(min(values)), _bits(max(values))
    return low if low == high else f"{low} to {high}"
