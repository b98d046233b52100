"""The first thing that the report says: whether the experts of each layer have learned to specialize, in plain words.

Nothing is decided here: each `LayerSpecialization` carries its verdict and its sentence. There are three answers, each
of which is a result: found; not found; and open, where everything was passed but other trainings were not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from moevision.analysis.specialization_words import ABOUT_WORDS

if TYPE_CHECKING:
    from moevision.analysis.specialization import LayerSpecialization

Json = dict[str, Any]

FOUND, NOT_FOUND, OPEN = "found", "not_found", "open"

HEADLINES: Final = {
    FOUND: "Learned specialization in {layers}: its experts tell {about}",
    OPEN: "Open: {layers} passes every comparison that was made, but no other training was given",
    NOT_FOUND: "No learned specialization found",
}
_FOUND_WORDS: Final = (
    "That is said only of layers whose experts tell more than chance, than the same model untrained, than routing by a "
    "hash and than clusters of colour and of the layer's own input, and where other trainings of the recipe repeat it. "
    "It does not say that the answer needs these experts: that is measured by taking them away, further down."
)
_OPEN_WORDS: Final = (
    "The experts tell more than anything that needs no learning. Whether that belongs to the recipe or is the luck of "
    "this one training can only be seen in other trainings of it: train with another --seed_everything and give the "
    "runs to --seeds."
)
_NOT_FOUND_WORDS: Final = (
    "Experts do get different patches, and that is not random: the galleries below show it. But what this tells is "
    "{reason}. This is a result, not a failure. Experts add room to a model whether or not any of them "
    "stands for something that has a name, and a pattern that a router finds without learning is no evidence that it "
    "has learned one."
)


def verdict_of(entries: Sequence[LayerSpecialization], layer_names: Sequence[tuple[int, str]]) -> Json:
    """The answer, its headline and explanation, and sentences for each layer.

    Args:
        entries: specialization of every layer, about everything that was asked.
        layer_names: (block index, name) of every MoE layer, in order of depth.
    """
    layers = [
        {"layer": layer, "name": name, **_of_layer([entry for entry in entries if entry.layer == layer])}
        for layer, name in layer_names
    ]
    answers = [layer["answer"] for layer in layers]
    answer = next((each for each in (FOUND, OPEN) if each in answers), NOT_FOUND)
    names = [layer["name"] for layer in layers if layer["answer"] == answer]
    about = dict.fromkeys(ABOUT_WORDS[entry.about] for entry in entries if entry.verdict)
    headline = HEADLINES[answer].format(layers=listed(names), about=listed(list(about)))
    if len(names) > 1:
        headline = headline.replace(": its experts", ": their experts").replace(" passes ", " pass ")
    words = {FOUND: _FOUND_WORDS, OPEN: _OPEN_WORDS, NOT_FOUND: _NOT_FOUND_WORDS}[answer]
    explanation = words.format(reason=", or ".join(_reasons(entries))) if answer == NOT_FOUND else words
    return {"answer": answer, "headline": headline, "explanation": explanation, "layers": layers}


def _of_layer(own: Sequence[LayerSpecialization]) -> Json:
    """A layer's answer, and the sentences of what it learned or came closest to; about the class in any case."""
    learned, undecided = [entry for entry in own if entry.verdict], [entry for entry in own if is_open(entry)]
    close = [entry for entry in own if entry.above_null and entry.above_baselines]
    told = [entry for entry in own if entry.about == "class" or entry in (learned or undecided or close)] or list(own)
    sentences = [entry.sentence for entry in told] or ["Nothing was asked of this layer."]
    return {"answer": FOUND if learned else OPEN if undecided else NOT_FOUND, "sentences": sentences}


def is_open(entry: LayerSpecialization) -> bool:
    """Whether everything was passed that was looked at, and other trainings were not."""
    return entry.above_null and bool(entry.above_baselines) and entry.above_seeds is None


def _reasons(entries: Sequence[LayerSpecialization]) -> list[str]:
    """What stood in the way, in words."""
    above_null = [entry for entry in entries if entry.above_null]
    if not above_null:
        most = max((entry.estimate.high for entry in entries), default=0.0)
        return [f"no more than shuffled pictures give by chance (these pictures leave room for up to {most:.3f} bits)"]
    reasons = []
    if any(entry.above_baselines is False for entry in above_null):
        reasons.append(
            "matched by routing in which no router has learned anything, such as clusters of similar patches"
        )
    if any(entry.above_baselines is None for entry in above_null):
        reasons.append("compared with nothing that needs no learning")
    if any(entry.above_baselines and entry.above_seeds is False for entry in above_null):
        reasons.append("not repeated by other trainings of the same recipe")
    return reasons


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
