"""The report as one HTML page: everything inside it, nothing fetched, readable on screen, in the dark and on paper.

The page is a function of `report.json` and of the figures' PNGs; it computes nothing, so it can't say another number
than the file does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from string import Template
from typing import Any

from moevision.analysis.report.parts import (
    definitions,
    each,
    experts_per_patch,
    figure,
    interval,
    number,
    paragraph,
    section,
    table,
    tag,
    text,
)
from moevision.analysis.report.text import (
    ABOUT,
    BASELINE_COLUMNS,
    COMPARISONS_TEXT,
    EFFECTS_TEXT,
    LIMITS,
    SIMILARITY_TEXT,
    STABLE_TEXT,
)

Numbers = Mapping[str, Any]
Pictures = Mapping[str, bytes]


def render(numbers: Numbers, pictures: Pictures) -> str:
    """The page.

    Args:
        numbers: what `report.json` holds.
        pictures: file name -> PNG of every figure that it lists.
    """
    template = Template(files("moevision.analysis.report").joinpath("assets/report.html").read_text(encoding="utf-8"))
    drawn = {name: (title, write(numbers, pictures)) for name, (title, write) in SECTIONS.items()}
    shown = {name: (title, body) for name, (title, body) in drawn.items() if body}
    contents = "".join(f'<li><a href="#{name}">{text(title)}</a></li>' for name, (title, _) in shown.items())
    return template.substitute(
        title=text(numbers["title"]),
        version=text(numbers["provenance"]["moevision"]),
        header=_header(numbers),
        contents=f"<ol>{contents}</ol>",
        body="".join(section(name, title, body) for name, (title, body) in shown.items()),
    )


def _header(numbers: Numbers) -> str:
    model, data = numbers["model"], numbers["data"]
    facts = {
        "test pictures" if "test" in data["name"] else "pictures": number(data["n_images"]),
        "classified correctly": number(data["accuracy"], ".1%"),
        "MoE layers": number(len(model["moe_blocks"])),
        "experts per layer": each(model["num_experts"]),
        "experts per patch": experts_per_patch(model),
    }
    lead = (
        f"{text(model['name'])} on {text(data['name'])}. Which expert does each patch go to, what are the experts for, "
        "and is any of it more than chance?"
    )
    return (
        f'<header><p class="kicker">Routing report</p><h1>{text(numbers["title"])}</h1><p class="lead">{lead}</p>'
        f"{definitions(facts, 'facts')}</header>"
    )


def _verdict(numbers: Numbers, pictures: Pictures) -> str:
    verdict = numbers["verdict"]
    box = f"<h3>{text(verdict['headline'])}</h3>"
    sentences = [(layer["name"], sentence) for layer in verdict["layers"] for sentence in layer["sentences"]]
    box += "".join(paragraph(_statement(name, sentence)) for name, sentence in sentences)
    box += paragraph(text(verdict["explanation"]))
    notes = "".join(paragraph(f"{text(entry['what'])}: {text(entry['why'])}.") for entry in numbers["skipped"])
    note = f'<div class="note">{notes}</div>' if notes else ""
    return f'<div class="verdict {text(verdict["answer"])}">{box}</div>{note}'


def _statement(name: str, sentence: str) -> str:
    """A sentence that begins with its layer's name, the name in bold."""
    rest = sentence.removeprefix(f"{name}: ")
    return f"<b>{text(name)}</b> {text(rest[:1].upper() + rest[1:])}"


def _pictures(numbers: Numbers, pictures: Pictures) -> str:
    words = paragraph("Pictures drawn at random from all classes, not chosen to look good.")
    return words + _figures(numbers, pictures, "overlay", "path", "certainty")


def _specialization(numbers: Numbers, pictures: Pictures) -> str:
    entries = numbers["specialization"]
    names = list(dict.fromkeys(name for entry in entries for name in entry["baselines"]))
    rows = [
        [
            f"{text(entry['name'])} {text(ABOUT[entry['about']])}",
            number(entry["value_bits"], ".3f"),
            interval(entry["low"], entry["high"]),
            number(entry["share_of_entropy"], ".1%"),
            *(number(max(entry["baselines"].get(name) or [None]), ".3f") for name in names),
            "<br>".join(number(value, ".3f") for value in entry["seeds"]) or number(None),
            number(entry["p_value"], ".2g"),
            tag(entry["verdict"], "yes", "open" if entry["open"] else "no"),
        ]
        for entry in entries
    ]
    columns = [BASELINE_COLUMNS.get(name, name) for name in names]
    header = ["about", "bits", "interval", "share of all", *columns, "other trainings", "p", "learned?"]
    caption = (
        "Excess mutual information in bits, chance taken off; of several untrained models, hashes and clusterings the "
        "largest. p is about chance alone, and comes last on purpose."
    )
    found = [entry["verdict"] for entry in entries]
    return (
        paragraph(text(COMPARISONS_TEXT))
        + _figures(numbers, pictures, "comparisons")
        + (table(header, rows, caption, found=found, style="dense") if rows else "")
        + _figures(numbers, pictures, "class_experts", "positions", "parts")
    )


def _experts(numbers: Numbers, pictures: Pictures) -> str:
    return _figures(numbers, pictures, "gallery")


def _load(numbers: Numbers, pictures: Pictures) -> str:
    rows = [
        [
            text(layer["name"]),
            number(layer["slowest"], ".2f"),
            number(layer["cv_squared"], ".2g"),
            number(layer["cv_squared_floor"], ".1g"),
            number(layer["dead"]),
            number(layer["dropped"], ".1%"),
            number(layer["unrouted"], ".1%"),
            f"{number(layer['entropy_bits'], '.2f')} of {number(layer['entropy_bits_most'], '.3g')}",
            number(layer["margin"], ".2f"),
        ]
        for layer in numbers["layers"]
    ]
    header = ["layer", "slowest ÷ mean", "CV²", "CV² by chance", "dead experts", "choices dropped",
              "patches without expert", "entropy, bits", "margin"]  # fmt: skip
    caption = (
        "Over all patches of all pictures, in evaluation. The health of the router; nothing here says what it does."
    )
    if any(layer["kind"] != "token_choice" for layer in numbers["layers"]):
        caption += " Where tokens don't choose, every expert computes as much by construction, and nothing is dropped."
    figures = _figures(numbers, pictures, "load", "experts_per_patch", "gate_weights", "co_activation")
    return table(header, rows, caption) + figures


def _effects(numbers: Numbers, pictures: Pictures) -> str:
    if not numbers["effects"]["experts"]:
        return ""
    rows = [
        [
            text(row["name"]),
            number(row["share"], ".1%"),
            number(row["delta_logit"], "+.2f"),
            number(row["control_delta_logit"], "+.2f"),
            number(row["delta_p"], "+.3f"),
            text(row["strongest_class"]),
            number(row["strongest_delta_logit"], "+.2f"),
            number(row["strongest_control_delta_logit"], "+.2f"),
        ]
        for row in numbers["effects"]["experts"]
    ]
    header = [
        "taken away", "share of choices", "Δ logit", "at random", "Δ probability", "most changed class", "its Δ logit",
        "at random",
    ]  # fmt: skip
    caption = (
        f"Means over the classes; {numbers['effects']['what']}. “At random”: as many choices of the same layer "
        "from all experts, treated alike."
    )
    return (
        paragraph(text(EFFECTS_TEXT)) + _figures(numbers, pictures, "effects") + table(header, rows, caption, words=[5])
    )


def _stability(numbers: Numbers, pictures: Pictures) -> str:
    rows = []
    for layer in numbers["stability"]:
        changes = {change["change"]: change for change in layer["consistency"]}
        agreement = [
            f"{number(changes[name]['kappa'], '.2f')} ({interval(changes[name]['low'], changes[name]['high'], '.2f')})"
            for name in ("flip", "shift")
        ]
        others = ", ".join(number(match["kappa"], ".2f") for match in layer["matches"]) or number(None)
        most = f"{number(layer['similarity_most'], '.2f')} ({text(layer['most_similar'])})"
        rows.append([text(layer["name"]), *agreement, others, number(layer["similarity_mean"], ".2f"), most])
    header = ["layer", "κ mirrored", "κ moved by a patch", "κ other trainings", "CKA, mean pair", "CKA, closest pair"]
    words = paragraph(text(STABLE_TEXT)) + paragraph(text(SIMILARITY_TEXT))
    return words + table(header, rows, words=[5]) if rows else ""


def _limits(numbers: Numbers, pictures: Pictures) -> str:
    return f"<ul>{''.join(f'<li>{text(limit)}</li>' for limit in LIMITS)}</ul>"


def _classes(numbers: Numbers, pictures: Pictures) -> str:
    rows = [
        [text(row["class"]), number(row["n"]), number(row["correct"]), number(row["accuracy"], ".1%")]
        for row in numbers["data"]["classes"]
    ]
    return table(["class", "pictures", "correct", "accuracy"], rows)


def _provenance(numbers: Numbers, pictures: Pictures) -> str:
    facts = numbers["provenance"]
    pairs = {
        "command": f"<code>{text(facts['command'])}</code>",
        "model": f"<code>{text(numbers['model']['address'])}</code>",
        "weights, SHA-256": f"<code>{text(facts['weights_sha256'])}</code>",
        "pictures": text(numbers["data"]["name"]),
        "seed": number(facts["seed"]),
        "shuffles": number(numbers["settings"]["permutations"]),
        "started": text(facts["started_utc"]),
        "took": f"{number(facts['seconds'], ',.0f')} s",
        "software": text(", ".join(f"{name} {version}" for name, version in facts["libraries"].items())),
        "machine": text(facts["machine"]),
    }
    words = paragraph(
        "Every number of this page, unrounded, and more stand in <code>report.json</code>; the routing of every patch "
        "in <code>trace.safetensors</code>, to be opened with <code>moevision.analysis.RoutingTrace.load</code>."
    )
    return words + definitions({name: value for name, value in pairs.items() if value})


def _figures(numbers: Numbers, pictures: Pictures, *kinds: str) -> str:
    """The figures of these kinds; those of one kind share a caption."""
    series = ([entry for entry in numbers["figures"] if entry["kind"] == kind] for kind in kinds)
    return "".join(figure(entries, [pictures[entry["file"]] for entry in entries]) for entries in series if entries)


SECTIONS: dict[str, tuple[str, Callable[[Numbers, Pictures], str]]] = {
    "verdict": ("In short", _verdict),
    "pictures": ("Where each patch goes", _pictures),
    "specialization": ("Specialization", _specialization),
    "experts": ("What each expert gets", _experts),
    "effects": ("Without an expert", _effects),
    "stability": ("Does it hold?", _stability),
    "load": ("Load and certainty", _load),
    "classes": ("Accuracy by class", _classes),
    "limits": ("What routing does not show", _limits),
    "provenance": ("How this was made", _provenance),
}
"""Anchor -> title and writer, in the order of the page; a section that comes back empty is left out."""
