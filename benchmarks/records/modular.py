"""benchmarks/modular/README.md: its numbers, and between its marks the report of the committed runs."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from benchmarks.modular.domains import SETS, runs_of
from benchmarks.modular.report import (
    DECIDES,
    Gap,
    accuracy,
    before_and_after,
    having,
    mebibytes,
    parts_of,
    right,
    seconds,
    split,
)
from benchmarks.records import Claim, Definition
from benchmarks.records.studies import shown
from moevision.words import points

FILES = "benchmarks/modular/runs.jsonl"


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in parts_of(runs) if not part.startswith("#"))


def gaps(*runs: Any, pair: tuple[str, str] = DECIDES) -> dict[str, Any]:
    """Set -> the difference of two arms; `exact`: that of `sources`, in points."""
    found = {name: Gap(having(runs_of(runs, name), *pair), *pair) for name in SETS}
    return {**{name: gap.over_images for name, gap in found.items()}, "exact": 100 * found["sources"].mean}


def untuned(*runs: Any) -> dict[str, Any]:
    """Beside heads of ten passes."""
    return gaps(*runs, pair=("joined", "heads only"))


def without_experts(*runs: Any) -> dict[str, Any]:
    """Beside what needs no router."""
    return {
        "one": gaps(*runs, pair=("joined", "one head, tuned"))["imagenette"],
        "lda": gaps(*runs, pair=("joined", "no training"))["imagenette"],
    }


def beside_the_rule(*runs: Any) -> dict[str, Any]:
    """Joined experts, and tuned heads, less the linear rule."""
    own = {arm: gaps(*runs, pair=(arm, "no training")) for arm in ("joined", "heads only, tuned")}
    return {"joined": own["joined"], "heads": own["heads only, tuned"]}


def beside_joint(*runs: Any) -> dict[str, Any]:
    """All data at once."""
    return gaps(*runs, pair=("joined", "dense joint"))


def beside_replay(*runs: Any) -> dict[str, Any]:
    """One domain after another, with the router."""
    return gaps(*runs, pair=("joined", "dense with replay, masked"))


def above_the_rule(*runs: Any) -> str:
    """Whether joined experts are more accurate than LDA, which needs no training, on every set of domains."""
    pair = "joined", "no training"
    gaps = [Gap(having(runs_of(runs, name), *pair), *pair) for name in SETS]
    return "on every set" if all(gap.mean - gap.half > 0 for gap in gaps) else "not on every set"


def apart(*runs: Any) -> dict[str, float]:
    """Accuracy of the experts of `sources`, domain given: means over seeds."""
    own = runs_of(runs, "sources")
    parts = [split(run, right(run, "joined, domain given")) for run in own]
    return {name: fmean(float(part[place].mean()) for part in parts) for place, name in
            enumerate(("cats", "imagenette", "cifar"))}  # fmt: skip


def later(*runs: Any) -> dict[str, str]:
    """Set -> what others lose when the last domain's expert is added."""
    own = {name: [before_and_after(run, "joined") for run in runs_of(runs, name)] for name in SETS}
    return {name: points(fmean(after - before for before, after in pairs)) for name, pairs in own.items()}


def prices(*runs: Any) -> Mapping[str, Any]:
    """CPU seconds and MiB on `sources`."""
    own = runs_of(runs, "sources")
    _, experts, heads, statistics = mebibytes(own[0])
    return {"experts": seconds(own, "expert"), "cheap": seconds(own, "tuned head") + seconds(own, "router"),
            "expert_mib": experts / len(SETS["sources"]), "cheap_mib": heads + statistics}  # fmt: skip


def reached(*runs: Any) -> dict[str, dict[str, float]]:
    """Arm -> set -> per cent, means over domains and seeds."""
    arms = {"rule": "no training", "heads": "heads only, tuned", "joined": "joined"}
    own = {name: having(runs_of(runs, name), *arms.values()) for name in SETS}
    return {
        short: {name: 100 * fmean(accuracy(run, arm) for run in found) for name, found in own.items()}
        for short, arm in arms.items()
    }


CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim(FILES, "{sources} points on `sources`, {far} on `far`, {imagenette} on `imagenette`", gaps),
    Claim(FILES, "the mean is {exact:.3f} points", gaps),
    Claim(FILES, "{sources}, {far} and {imagenette} points", untuned),
    Claim(FILES, "a head of all classes ({one} points) nor from LDA ({lda})", without_experts),
    Claim(FILES, "all the data at once by {sources}, {far} and {imagenette} points", beside_joint),
    Claim(FILES, "masked by the router, by {sources}, {far} and {imagenette}", beside_replay),
    Claim(FILES, "cats and dogs {cats:.1%}, Imagenette {imagenette:.1%}, eight classes of CIFAR-10 {cifar:.1%}", apart),
    Claim(FILES, "{sources} points on `sources`, {far} on `far` and {imagenette} on `imagenette`, by", later),
    Claim(FILES, "{cheap:.0f} CPU seconds and {cheap_mib:.1f} MiB", prices),
    Claim(FILES, "{experts:.0f} CPU seconds in all and {expert_mib:.1f} MiB each", prices),
]
DEFINITIONS = [
    Definition("at least 2 points", "the rule of the protocol"),
    Definition("97 %", "an aim"),
    Definition("95 %", "an aim"),
]
