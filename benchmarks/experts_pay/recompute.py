"""Pages of emoji: do experts pay, have they names, and are they missed?

    python benchmarks/experts_pay/recompute.py

prints every measured number of README.md, from runs.jsonl and both files of prices, and what other pages quote of them.
The code that ran the study is benchmarks/experts_pay of the commits that the records name; it has left the tree. Arms,
rules and the verdict are in protocol.md.

A record is one training of one arm with one seed, on pages of groups or of kinds. Runs with seed 100 tune an arm's
learning rate by the accuracy on "val" and count nowhere else. Arms are compared by test accuracy, seed by seed, with
Student's t.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_1samp

FOLDER = Path(__file__).parent
STUDY = "benchmarks/experts_pay/README.md"
TUNING_SEED = 100
MISSED_BEYOND = (("away", "random"), ("named", "others"))  # losses, each with its control
STEMS = ("patch", "conv", "conv_patch")
REFERENCE = "patch-dense-4"  # its step was timed with the first stems', and with the third's
RECIPE = "conv_patch-moe-8"  # what `moevision fit --config emoji` trains
CONTROLS = ("input_clusters", "pixel_clusters", "untrained_router")
GROUPS = (
    *("smileys", "people", "animals", "food", "travel"),
    *("activities", "objects", "symbols", "flags"),
)
Run = dict[str, Any]


class Interval(NamedTuple):
    """A mean and both ends of Student's 95 % interval, as shares."""

    mean: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """`+4.6 (+4.1 to +5.2)`, in points."""
        mean, low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in self)
        return f"{mean} ({low} to {high})"


def interval(values: Sequence[float]) -> Interval:
    """The mean of values and its 95 % interval."""
    return Interval(fmean(values), *ttest_1samp(values, 0).confidence_interval(0.95))


def read_runs() -> list[Run]:
    """All records."""
    lines = (FOLDER / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def stem_of(arm: str) -> str:
    """The stem that an arm's name begins with."""
    return arm.split("-")[0]


class Task:
    """The runs of one task: "groups" or "kinds"."""

    def __init__(self, runs: Sequence[Run], name: str) -> None:
        self.name = name
        self.runs = [run for run in runs if run["task"] == name]
        self.arms = list(dict.fromkeys(run["arm"] for run in self.runs))
        self.moe = [arm for arm in self.arms if "-moe-" in arm]
        self.strongest = self.strongest_dense("")

    def tuned(self, arm: str) -> dict[float, float]:
        """Learning rate -> accuracy on the tuning pages."""
        tuning = [r for r in self.runs if r["arm"] == arm and r["seed"] == TUNING_SEED]
        return {run["lr"]: run["val_top1"] for run in sorted(tuning, key=lambda run: run["lr"])}

    def strongest_dense(self, stem: str) -> str:
        """The dense arm, of a stem or of all, that is best on the tuning pages at its own rate."""
        dense = [arm for arm in self.arms if "-dense-" in arm and stem in ("", stem_of(arm))]
        return max(dense, key=lambda arm: max(self.tuned(arm).values()))

    def of_arm(self, arm: str) -> list[Run]:
        """The runs of an arm that count, by seed."""
        counted = [r for r in self.runs if r["arm"] == arm and r["seed"] != TUNING_SEED]
        return sorted(counted, key=lambda run: run["seed"])

    def contrast(self, arm: str, dense: str, split: str = "test") -> list[float]:
        """An arm's accuracy minus a dense one's, in every seed."""
        control = {run["seed"]: run[f"{split}_top1"] for run in self.of_arm(dense)}
        return [run[f"{split}_top1"] - control[run["seed"]] for run in self.of_arm(arm)]


# ---- names, and what is missed


def names_of(table: Sequence[Sequence[int]]) -> list[int]:
    """The group that more than half of an expert's emoji are of; -1: mixed."""
    counts = np.array(table)
    share = counts.max(1) / np.maximum(counts.sum(1), 1)
    return np.where(share > 0.5, counts.argmax(1), -1).tolist()


def named_share(table: Sequence[Sequence[int]]) -> float:
    """The share of experts that have a name."""
    return fmean(name >= 0 for name in names_of(table))


def missed(run: Run, first: str, second: str) -> float:
    """The mean over a run's named groups of one loss minus another."""
    return fmean(group[first] - group[second] for group in run["knock_out"]["without"].values())


def named_runs(task: Task, arm: str) -> list[Run]:
    """The runs of an arm in which some expert has a name."""
    return [run for run in task.of_arm(arm) if run["knock_out"]["without"]]


def is_missed(task: Task, arm: str) -> bool:
    """The protocol's (b): both lower ends are above 0, and every seed has a named expert."""
    runs = named_runs(task, arm)
    if len(runs) < len(task.of_arm(arm)):
        return False
    return all(interval([missed(run, *pair) for run in runs]).low > 0 for pair in MISSED_BEYOND)


def half_named(task: Task, arm: str) -> int:
    """In how many seeds at least half of the experts have a name."""
    return sum(named_share(run["experts"]) >= 0.5 for run in task.of_arm(arm))


def ships(task: Task) -> list[str]:
    """The arms for which the gate holds and half are named in 6 of 8 seeds."""
    return [
        arm
        for arm in task.moe
        if interval(task.contrast(arm, task.strongest)).low > 0
        and is_missed(task, arm)
        and half_named(task, arm) >= 6
    ]


# ---- tables


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def percent(values: Sequence[float], digits: int = 1) -> str:
    """`84.1 ± .3`: mean and standard deviation, in percent."""
    return f"{100 * fmean(values):.{digits}f} ± {100 * stdev(values):.{digits}f}"


def tuning_rows(task: Task) -> list[str]:
    """Accuracy on the tuning pages by learning rate."""
    rates = sorted({lr for arm in task.arms for lr in task.tuned(arm)})
    rows = [row(["arm", *(f"{lr:g}" for lr in rates)])]
    for arm in task.arms:
        found = task.tuned(arm)
        cells = (f"{100 * found[lr]:.1f}" if lr in found else "" for lr in rates)
        rows.append(row([f"`{arm}`", *cells]))
    return rows


def accuracy_rows(task: Task) -> list[str]:
    """Accuracy of the dense controls and of the experts, and the contrasts with both."""
    adjusted = holm([ttest_1samp(task.contrast(arm, task.strongest), 0).pvalue for arm in task.moe])
    beside = {
        arm: [
            interval(task.contrast(arm, task.strongest_dense(stem_of(arm)))).text,
            interval(task.contrast(arm, task.strongest)).text,
            f"{p:.1g}",
        ]
        for arm, p in zip(task.moe, adjusted, strict=True)
    }
    rows = []
    for arm in (*map(task.strongest_dense, STEMS), *task.moe):
        runs = task.of_arm(arm)
        size = f"{runs[0]['lr']:g} | {runs[0]['steps']} | {runs[0]['parameters'] / 1e6:.2f} M"
        right = (percent([run[f"{split}_top1"] for run in runs]) for split in ("test", "unseen"))
        rows.append(row([f"`{arm}`", size, *right, *beside.get(arm, [""] * 3)]))
    return rows


def missed_rows(task: Task) -> list[str]:
    """What own pages lose beyond the two controls, and how many experts have names."""
    rows = []
    for arm in task.moe:
        runs = named_runs(task, arm)
        shares = [named_share(run["experts"]) for run in task.of_arm(arm)]
        named = [", ".join(f"{100 * share:.0f}" for share in shares)]
        named.append(f"{half_named(task, arm)} of {len(shares)}")
        for control in CONTROLS:
            clusters = fmean(named_share(run["controls"][control]) for run in task.of_arm(arm))
            named.append(f"{100 * clusters:.0f}")
        lost = [[missed(run, *pair) for run in runs] for pair in MISSED_BEYOND]
        texts = (interval(values).text if len(runs) > 1 else "" for values in lost)
        rows.append(row([f"`{arm}`", *named, *texts]))
    return rows


def bits_rows(task: Task) -> list[str]:
    """Bits that an expert says about the group of an emoji, beside the controls."""
    rows = []
    for arm in task.moe:
        runs = task.of_arm(arm)
        controls = (fmean(run["control_bits"][name] for run in runs) for name in CONTROLS)
        bits = fmean(run["bits"] for run in runs)
        rows.append(row([f"`{arm}`", f"{bits:.2f}", *(f"{control:.2f}" for control in controls)]))
    return rows


def knock_out_rows(task: Task, arm: str) -> list[str]:
    """For each group, over the seeds in which it has an expert: own and other pages without it."""
    groups = list(dict.fromkeys(g for run in task.of_arm(arm) for g in run["knock_out"]["without"]))
    rows = []
    for group in sorted(groups, key=lambda name: list(GROUPS).index(name)):
        index = GROUPS.index(group)
        runs = [run for run in task.of_arm(arm) if group in run["knock_out"]["without"]]
        before = [run["knock_out"]["with_all"] for run in runs]
        found = [run["knock_out"]["without"][group] for run in runs]
        after = [entry["accuracy_by_class"] for entry in found]
        own = change([r[index] for r in before], [r[index] for r in after])
        other = change([others(r, index) for r in before], [others(r, index) for r in after])
        at_random = 100 * fmean(entry["random"] for entry in found)
        rows.append(row([group, f"{len(runs)}", own, other, f"{at_random:.1f}"]))
    return rows


def change(before: Sequence[float], after: Sequence[float]) -> str:
    """`90 → 54`, in percent."""
    return f"{100 * fmean(before):.0f} → {100 * fmean(after):.0f}"


def others(by_class: Sequence[float], index: int) -> float:
    """Accuracy on the pages of all other classes, which have equally many pages."""
    return fmean(value for label, value in enumerate(by_class) if label != index)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm 1979)."""
    order = np.argsort(p_values)
    scaled = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    return np.minimum(np.maximum.accumulate(scaled), 1.0)[order.argsort()].tolist()


def price_rows() -> list[str]:
    """CPU milliseconds of a training step, and of the same stem's dense model of the usual width."""
    first, third = (
        json.loads((FOLDER / name).read_text(encoding="utf-8"))["step_ms"]
        for name in ("prices.json", "prices_conv_patch.json")
    )
    slower = third.pop(REFERENCE) / first[REFERENCE]  # the machine, on the other day
    step_ms = first | {arm: ms / slower for arm, ms in third.items()}
    return [
        row([f"`{arm}`", f"{ms:.1f}", f"{ms / step_ms[stem_of(arm) + '-dense-4']:.2f}"])
        for arm, ms in step_ms.items()
    ]


# ---- sentences


def best_moe(task: Task) -> str:
    """The arm with experts that is best on the tuning pages at its own rate."""
    return max(task.moe, key=lambda arm: max(task.tuned(arm).values()))


def named_arm(task: Task) -> str:
    """The arm with the fewest experts of which at least half have names in 6 of 8 seeds; else with the most named."""
    by_experts = sorted(task.moe, key=lambda arm: int(arm.split("-")[-1]))
    enough = [arm for arm in by_experts if half_named(task, arm) >= 6]
    return enough[0] if enough else max(task.moe, key=lambda arm: half_named(task, arm))


def pays(task: Task, arm: str) -> Interval:
    """An arm's accuracy minus that of the strongest dense one."""
    return interval(task.contrast(arm, task.strongest))


def verb(found: Interval) -> str:
    """What an interval shows."""
    return (
        "are ahead"
        if found.low > 0
        else "are behind"
        if found.high < 0
        else "aren't shown to differ"
    )


def headline(groups: Task, kinds: Task) -> str:
    """Both contrasts in one sentence, each of the arm that tuning chose."""
    many, few = pays(kinds, best_moe(kinds)), pays(groups, best_moe(groups))
    return (
        f"at equal time, experts minus the strongest dense model: {many.text} points where 55 kinds of emoji are "
        f"the classes, {few.text} where nine groups are (8 seeds)"
    )


def of_pays(groups: Task, kinds: Task) -> list[str]:
    """Whether experts pay, with either stem."""
    named, best = named_arm(groups), best_moe(groups)
    found = pays(groups, named)
    same_stem = interval(groups.contrast(best, groups.strongest_dense("patch")))
    return [
        f"Of nine groups `{best}` is {same_stem.text} points from the strongest dense model of its own stem, and "
        f"{pays(groups, best).text} from the strongest of both, whose step costs more",
        f"Behind convolutions experts {verb(found)}: `{named}` {found.text}",
        f"Of 55 kinds `{best_moe(kinds)}` is {pays(kinds, best_moe(kinds)).text} points from the strongest dense model",
    ]


def of_width(kinds: Task) -> str:
    """Whether a wider dense model is better at equal time: the three widths of the strongest one's stem."""
    stem, _, _ = kinds.strongest.split("-")
    best = [100 * max(kinds.tuned(f"{stem}-dense-{width}").values()) for width in (2, 4, 8)]
    return "dense MLPs of 128, 256 and 512 units reach {:.1f}, {:.1f} and {:.1f} %".format(*best)


def of_recipe(groups: Task) -> str:
    """What the recipe gains over dense models in the time of the study."""
    same_stem = interval(groups.contrast(RECIPE, groups.strongest_dense(stem_of(RECIPE))))
    return (
        f"in 15 CPU seconds these experts are {same_stem.text} points from the best dense model behind the same "
        f"convolutions, and {pays(groups, RECIPE).text} from the best behind more of them"
    )


def of_needed(groups: Task) -> str:
    """What the recipe's layer is needed for: right answers with it and without, and of groups with a named expert."""
    runs = groups.of_arm(RECIPE)
    with_layer = fmean(fmean(run["knock_out"]["with_all"]) for run in runs)
    without = fmean(run["knock_out"]["without_layer"] for run in runs)
    away = interval([missed(run, "away", "random") for run in runs])
    emoji = interval([missed(run, "named", "others") for run in runs])
    shares = fmean(named_share(run["experts"]) for run in runs)
    return (
        f"`{RECIPE}` is right on {100 * with_layer:.1f} % of the pages, on {100 * without:.1f} % without any expert. "
        f"{100 * shares:.0f} % of its experts have names; without them a group's pages lose {away.text} points more "
        f"than with as many emoji moved at random, and the same emoji lose {emoji.text} points more away from them "
        "than away from other experts"
    )


def of_names(groups: Task) -> list[str]:
    """How many experts have names, beside clusters, and where."""
    named, best = named_arm(groups), best_moe(groups)
    shares = [named_share(run["experts"]) for run in groups.of_arm(named)]
    clusters = fmean(named_share(run["controls"]["input_clusters"]) for run in groups.of_arm(named))
    others = fmean(named_share(run["experts"]) for run in groups.of_arm(best))
    return [
        f"Of `{named}` at least half have names in {half_named(groups, named)} of {len(shares)} seeds "
        f"({100 * fmean(shares):.0f} % in the mean), and of clusters of what the layer reads {100 * clusters:.0f} %",
        f"Of `{best}` {100 * others:.0f} % have names",
    ]


def of_missed(groups: Task) -> list[str]:
    """What the named experts' groups lose."""
    named = named_arm(groups)
    runs = named_runs(groups, named)
    away = interval([missed(run, "away", "random") for run in runs])
    emoji = interval([missed(run, "named", "others") for run in runs])
    return [
        f"Without its experts a group's pages lose {away.text} points more than with as many emoji moved at random, "
        f"and the same emoji lose {emoji.text} points more away from them than away from other experts"
    ]


def of_verdict(groups: Task) -> str:
    """What the gate says."""
    found = ships(groups)
    does = ", ".join(f"`{arm}`" for arm in found) if found else "No arm"
    return f"{does} does all three"


def is_shown(kinds: Task) -> bool:
    """Whether experts pay where 55 kinds are the classes."""
    return pays(kinds, best_moe(kinds)).low > 0


def row_of_results(kinds: Task, said: str, cost: str) -> str:
    """The row of docs/results.md."""
    verdict = "yes, on pages made for it" if is_shown(kinds) else "not shown"
    return (
        f"| They help where much must be remembered | {verdict} | On pages of emoji, {said}; "
        f"{cost} ([experts_pay](../benchmarks/experts_pay/README.md)). |"
    )


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the records."""
    runs = read_runs()
    groups, kinds = Task(runs, "groups"), Task(runs, "kinds")
    said = headline(groups, kinds)
    cost = of_recipe(groups)
    return {
        STUDY: [
            said,
            *of_pays(groups, kinds),
            of_width(kinds),
            *of_names(groups),
            *of_missed(groups),
            of_needed(groups),
            of_recipe(groups),
            of_verdict(groups),
            *price_rows(),
            *tuning_rows(groups),
            *tuning_rows(kinds),
            *accuracy_rows(groups),
            *accuracy_rows(kinds),
            *missed_rows(groups),
            *bits_rows(groups),
            *knock_out_rows(groups, named_arm(groups)),
            *knock_out_rows(groups, RECIPE),
        ],
        "README.md": [said, of_recipe(groups)],
        "docs/results.md": [row_of_results(kinds, said, cost)],
        "docs/guides/when-experts.md": [said],
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
