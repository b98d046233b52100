"""The model card: README.md of a published model, with the header that huggingface.co reads.

Every number comes from `CardFacts`, that is from a finished run, from an analysis or from the model itself. What is not
known is said to be unknown, and what was not measured to be not measured, since a reader can't see what was left out.

Sources: model cards (Mitchell et al. 2019, arXiv:1810.03993); the header's fields as huggingface_hub's `ModelCardData`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from moevision.data.named import UNKNOWN, DataTerms, terms_of
from moevision.train.card_facts import UNKNOWN_LICENCE, CardFacts, Start
from moevision.train.card_limits import limits_section, without_example
from moevision.train.card_specialization import specialization_section
from moevision.train.card_usage import usage_section
from moevision.train.intervals import accuracy_interval
from moevision.train.markdown import cell, percent, table
from moevision.train.report import cost_rows, cost_section, experts_section, scores_section, twin_section
from moevision.train.run_summary import RunSummary

TAGS = ("image-classification", "timm", "moevision", "mixture-of-experts", "vision-transformer")
_MOST_CLASSES = 20  # named in the card; config.json has them all


def model_card(facts: CardFacts) -> str:
    """The card as Markdown; the same facts always give the same text.

    Args:
        facts: from `gather_facts`.
    """
    summary = facts.summary
    sections = [
        _front_matter(facts),
        _what_it_is(facts),
        usage_section(facts),
        _model_section(facts),
        cost_section(summary) if summary else _cost(facts),
        _data_section(facts),
        scores_section(summary.test) if summary else "## Test results\n\nAccuracy: not measured.",
        _other_seeds(summary, facts.others) if summary else "",
        _twin(facts),
        _loads(facts),
        specialization_section(facts),
        _training_section(facts),
        limits_section(facts),
        _software_section(facts),
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def _front_matter(facts: CardFacts) -> str:
    summary, start = facts.summary, facts.start or Start()
    terms = terms_of(summary.data) if summary else None
    results = None if summary is None or terms is None else [_result(summary, terms)]
    header = ModelCardData(
        license=facts.licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=list(TAGS if facts.blocks else [tag for tag in TAGS if tag != "mixture-of-experts"]),
        datasets=[terms.hub_id] if terms and terms.hub_id else None,
        base_model=start.hub_id or None,
        metrics=["accuracy"] if results else None,
        model_name=facts.name if results else None,
        eval_results=results,
    )
    return f"---\n{header.to_yaml()}\n---"


def _result(summary: RunSummary, terms: DataTerms) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=terms.hub_id or terms.kind,
        dataset_name=terms.title,
        dataset_split="test",
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=round(summary.test.correct / summary.test.total, 4),
    )


def _what_it_is(facts: CardFacts) -> str:
    kind = "A Mixture-of-Experts vision transformer" if facts.blocks else "A vision transformer without experts"
    size = f"{facts.image_size} × {facts.image_size}"
    lines = [
        f"# {cell(facts.name)}",
        f"{kind} (timm, moevision) that sorts pictures of {size} pixels into {len(facts.class_names)} classes.",
        _headline(facts),
    ]
    return "\n\n".join(lines)


def _headline(facts: CardFacts) -> str:
    summary = facts.summary
    if summary is None:
        return "**Its accuracy was not measured.** This card was made from the model alone, without the run behind it."
    test = summary.test
    low, high = accuracy_interval(test.correct, test.total)
    text = (
        f"**{percent(test.correct / test.total)} of {test.total:,} test images recognised** (95 % interval "
        f"{percent(low)} to {percent(high)})"
    )
    if not facts.blocks:
        return f"{text}."
    if summary.twin is None:
        return f"{text}. A dense model of the same cost: not measured."
    return f"{text}; its dense twin: {percent(summary.twin.correct / summary.twin.difference.n)} of the same images."


def _model_section(facts: CardFacts) -> str:
    names = [cell(name) for name in facts.class_names]
    listed = ", ".join(names[:_MOST_CLASSES])
    if len(names) > _MOST_CLASSES:
        listed += f" and {len(names) - _MOST_CLASSES} more (`label_names` in config.json)"
    rows = [
        ["architecture", facts.architecture],
        ["input", f"{facts.image_size} × {facts.image_size} pixels, RGB"],
        *([name.replace("_", " "), _value(value)] for name, value in facts.options.items()),
    ]
    text = f"## The model\n\n{table(['what', 'value'], rows, 'll')}\n\nClasses: {listed}."
    if not facts.blocks:
        return text
    blocks = [[f"block {each.block}", each.router, str(each.num_experts), str(each.top_k)] for each in facts.blocks]
    depth = "" if facts.depth is None else f"Of its {facts.depth} blocks (counted from 0), these have experts. "
    words = f"{depth}Active parameters are those that one token passes through.{_reading_k(facts)}"
    return f"{text}\n\n{words}\n\n{table(['MoE layer', 'router', 'experts', 'per token'], blocks, 'llrr')}"


def _value(value: Any) -> str:
    """One value for all MoE layers, or one for each; a dash where a layer has none."""
    return ", ".join("–" if each is None else str(each) for each in (value if isinstance(value, list) else [value]))


def _reading_k(facts: CardFacts) -> str:
    """What "per token" means where experts choose tokens, or every token takes from all experts."""
    words = {
        "expert_choice": " With `expert_choice` the number per token is a mean: each expert takes its fixed share.",
        "soft": " With `soft` every token takes a part of all experts, at the cost of the number per token.",
    }
    return "".join(text for router, text in words.items() if any(each.router == router for each in facts.blocks))


def _cost(facts: CardFacts) -> str:
    return "## Size and cost\n\n" + table(["quantity", "value"], cost_rows(facts.cost))


def _data_section(facts: CardFacts) -> str:
    summary = facts.summary
    lines = ["## Data and licences\n"]
    if summary is None:
        lines.append("- Training data: not known to this card.")
        lines.append(f"- Licence of the data: {UNKNOWN}.")
    else:
        terms = terms_of(summary.data)
        images = ", ".join(f"{sum(split.values()):,} {name}" for name, split in summary.class_counts.items())
        lines.append(f"- Training data: {cell(terms.title)}; {images} images.")
        lines.append(f"- Licence of the data: {terms.terms}.")
    lines.append(f"- Started from: {_start(facts.start)}.")
    chosen = facts.licence if facts.licence != UNKNOWN_LICENCE else "not chosen"
    lines.append(f"- Licence of these weights: {chosen}.")
    if summary is not None:
        lines.append(f"\n{without_example(summary.split_note.strip())}")
    return "\n".join(lines)


def _start(start: Start | None) -> str:
    if start is None:
        return "not recorded"
    if not start.name:
        return "random weights"
    licence = f"as timm records it: {start.licence}" if start.licence else UNKNOWN
    return f"the weights of {cell(start.name)} (their licence, {licence})"


def _other_seeds(summary: RunSummary, others: Sequence[RunSummary]) -> str:
    if not others:
        return ""
    rows: list[list[str]] = []
    for run, name in [(summary, "this model"), *((other, other.name) for other in others)]:
        low, high = accuracy_interval(run.test.correct, run.test.total)
        accuracy = percent(run.test.correct / run.test.total)
        rows.append([name, str(run.seed), accuracy, f"{percent(low)} to {percent(high)}", f"{run.test.total:,}"])
    heads = ["run", "seed", "test accuracy", "95 % interval", "images"]
    return f"## Other trainings of the recipe\n\n{table(heads, rows)}"


def _twin(facts: CardFacts) -> str:
    if not facts.blocks:
        return ""
    if facts.summary is None or facts.summary.twin is None:
        return "## Beside its dense twin\n\nNot measured: how good a dense model of the same cost is."
    return twin_section(facts.summary, facts.summary.twin)


def _loads(facts: CardFacts) -> str:
    if facts.summary is None and facts.blocks:
        return "## Experts\n\nLoad of the experts: not measured."
    return experts_section(facts.summary.layers if facts.summary else ())


def _training_section(facts: CardFacts) -> str:
    summary = facts.summary
    if summary is None:
        return "## Training\n\nNot known to this card: seed, recipe, time and machine."
    seed = "none was set" if summary.seed is None else str(summary.seed)
    command = f"\n\nCommand (paths shortened):\n\n    {_shell(facts.command)}" if facts.command else ""
    return f"## Training\n\nSeed: {seed}.{command}"


def _shell(command: Sequence[str]) -> str:
    return " ".join(word if "…" in word else shlex.quote(word) for word in command)


def _software_section(facts: CardFacts) -> str:
    when = "trained and measured" if facts.summary else "described"
    rows: list[list[Any]] = [[name, version] for name, version in facts.versions.items()]
    return f"## Software\n\nWith which it was {when}:\n\n{table(['library', 'version'], rows, 'll')}"
