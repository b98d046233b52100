"""What a model card says about what the experts do, from the numbers of `moevision analyze`.

Only the report's own sentences and numbers are repeated: this module reads its JSON and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moevision.train.card_facts import CardFacts
from moevision.train.markdown import cell, table

Json = Mapping[str, Any]
_TITLE = "## What the experts do"
_READING = (
    "Bits that the routing (the choice of expert, or its weights) tells about the class, beyond what pictures with "
    "shuffled labels give. Routing without learning is the strongest of: the same model untrained, hashes, and "
    "clusters of colour or of the layer's input. Specialization is claimed only above all of these and where other "
    "trainings repeat it."
)


def specialization_section(facts: CardFacts) -> str:
    """The verdict with its comparisons; empty for a model without experts."""
    if not facts.blocks:
        return ""
    if facts.analysis is None:
        return f"{_TITLE}\n\nNot measured. `moevision analyze` measures it beside what chance and other trainings give."
    numbers = facts.analysis
    verdict, data = numbers["verdict"], numbers["data"]
    rows = [_row(entry) for entry in numbers["specialization"] if entry["about"] == "class"]
    heads = ["layer", "bits", "95 % interval", "p", "routing without learning", "other trainings"]
    sentences = [f"- {cell(sentence)}" for layer in verdict["layers"] for sentence in layer["sentences"]]
    parts = [
        _TITLE,
        f"**{cell(verdict['headline'])}.**",
        "\n".join(sentences),
        f"{_READING}\n\n{table(heads, rows)}" if rows else "",
        _without_experts(numbers["effects"]),
        f"Measured by `moevision analyze` on {data['n_images']:,} pictures.",
    ]
    return "\n\n".join(filter(None, parts))


def _row(entry: Json) -> list[str]:
    baselines = [(max(values), name) for name, values in entry["baselines"].items() if values]
    strongest = "not measured"
    if baselines:
        bits, name = max(baselines)
        strongest = f"{_bits(bits)} ({name.replace('_', ' ')})"
    seeds = [_bits(value) for value in entry["seeds"]]
    return [
        entry["name"],
        _bits(entry["value_bits"]),
        f"{_bits(entry['low'])} to {_bits(entry['high'])}",
        f"{entry['p_value']:.2g}",
        strongest,
        ", ".join(seeds) or "not measured",
    ]


def _without_experts(effects: Json) -> str:
    """The expert whose absence changes most, beside its control."""
    if not effects["experts"]:
        return f"Taking experts away: not measured ({effects['why']})." if effects["why"] else ""
    most = max(effects["experts"], key=lambda each: abs(each["delta_logit"]))
    return (
        f"Taking experts away one at a time ({effects['pictures_per_class']} pictures per class): {most['name']} "
        f"matters most, and changes the logit of the true class by {_signed(most['delta_logit'])} on average (the "
        f"control, another expert taken away at random: {_signed(most['control_delta_logit'])})."
    )


def _bits(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if round(value, 3) else "0.000"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
