"""What a model card says that it does not know: everything that was not measured, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moevision.names import shown
from moevision.train.card_facts import CardFacts

_NEVER_MEASURED = (
    "Pictures of another kind than the training data (other cameras, places, styles; adversarial ones): not measured.",
    "Whether it errs more on some groups of people or things than on others, beyond the classes above: not measured.",
    "Energy, and speed or memory on other machines: not measured.",
)

_ORACLE = (
    "It routes by the true class, which it has to be told (`moevision.layers.label_oracle`): made for comparison, it "
    "can't classify a picture, and its accuracy counts for nothing."
)


def limits_section(facts: CardFacts) -> str:
    """A list of what was not measured, and of what went otherwise than asked in the run."""
    lines = [
        "It knows its own classes only, and gives any picture one of them.",
        *([_ORACLE] if any(block.router == "label" for block in facts.blocks) else []),
        *_not_measured(facts),
        *_NEVER_MEASURED,
        *_of_the_run(facts),
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def without_example(sentence: str) -> str:
    """A sentence about the data without the file name that it gives as an example, which may be private."""
    return re.sub(r" \(for example .*\)", "", shown(sentence))  # to the last bracket: names have brackets too


def _not_measured(facts: CardFacts) -> Iterator[str]:
    if facts.summary is None:
        yield "Accuracy, calibration and accuracy per class: not measured."
    if facts.blocks and (facts.summary is None or facts.summary.twin is None):
        yield "Whether experts helped, against a dense twin of the same cost: not measured."
    if not facts.others:
        yield "The spread over seeds: not measured. One training gives no ranking of recipes."
    if facts.blocks and facts.summary is None:
        yield "Load of the experts and dead experts: not measured."
    if facts.blocks and facts.analysis is None:
        yield "What the experts specialize in: not measured."


def _of_the_run(facts: CardFacts) -> Iterator[str]:
    if facts.summary is None:
        return
    for note in facts.summary.notes:
        yield without_example(note)
    if facts.summary.bad_images:
        count = len(facts.summary.bad_images)
        yield f"{count:,} file{'s' if count > 1 else ''} of the data could not be read and took no part."
