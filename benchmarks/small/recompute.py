"""Recompute every measured number of README.md's tables and answers from runs.jsonl, with NumPy and SciPy alone.

Questions to one small model: does a router by place win because the classifier forgets places? Is sparse training less
stable? Does it want large batches? The rules are in protocol.md.

Code: commits 9254b5f2, 628fc09a and c6bc30c1 ran the trainings, with benchmarks/small of then.

    python benchmarks/small/recompute.py
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_1samp

RATE, TUNING_SEED = 2e-3, 100
HEADS, COMPARED = ("mean", "places"), ("dense", "learned")
ARMS = ("dense", "learned", "position", "hash")
FACTORS, BATCHES, LARGE = (1, 4, 16), (16, 64, 256, 1024), (256, 1024)
A_POINT = 1.0
Run = dict[str, Any]
BySeed = dict[int, float]


def read_runs() -> list[Run]:
    """The runs that enter the tables: from a clean tree, not of tuning."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    runs = map(json.loads, text.splitlines())
    return [run for run in runs if not run["code"]["dirty"] and run["seed"] != TUNING_SEED]


def runs_with(runs: list[Run], **keys: Any) -> list[Run]:
    """The runs that have these keys."""
    return [run for run in runs if keys.items() <= run.items()]


def by_seed(runs: list[Run], quantity: str = "test_top1", **keys: Any) -> BySeed:
    """Seed -> accuracy of the finished runs that have these keys."""
    return {run["seed"]: run[quantity] for run in runs_with(runs, **keys) if not run["failed"]}


def less(first: BySeed, second: BySeed) -> BySeed:
    """Seed -> difference, of common seeds."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def lead(runs: list[Run], **keys: Any) -> BySeed:
    """Seed -> learned less dense, of the runs that have these keys."""
    return less(by_seed(runs, arm="learned", **keys), by_seed(runs, arm="dense", **keys))


def of_batch(head: str, batch: int) -> dict[str, Any]:
    """The keys of the third question's runs."""
    return {"question": "batches", "head": head, "batch": batch}


# ---- differences over seeds, and what is called above or below


class Contrast(NamedTuple):
    """One row less another over seeds, in points: Student's 95 % interval, and p, adjusted by Holm over its family."""

    name: str
    seeds: int
    mean: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """What is shown."""
        return "not told apart" if self.p >= 0.05 else "above" if self.mean > 0 else "below"

    @property
    def interval(self) -> str:
        """`+1.6 (+0.2 to +2.9)`, in points."""
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def contrasts(rows: dict[str, BySeed], pairs: Iterable[tuple[str, str]]) -> list[Contrast]:
    """The first of each pair less the second, judged together: Holm (1979)."""
    gaps = {f"{a} − {b}": list(less(rows[a], rows[b]).values()) for a, b in pairs}
    tests = {name: ttest_1samp(own, 0) for name, own in gaps.items()}
    # Equal in every seed: no p, and nothing to tell apart.
    own_p = {name: float(np.nan_to_num(test.pvalue, nan=1.0)) for name, test in tests.items()}
    names = sorted(own_p, key=own_p.__getitem__)
    scaled = [(len(names) - rank) * own_p[name] for rank, name in enumerate(names)]
    p = dict(zip(names, np.maximum.accumulate(scaled), strict=True))
    return [
        Contrast(
            name,
            len(own),
            100 * fmean(own),
            *(100 * end for end in tests[name].confidence_interval(0.95)),
            p[name],
        )
        for name, own in gaps.items()
    ]


# ---- the three questions' contrasts


def head_contrasts(runs: list[Run]) -> list[Contrast]:
    """By head the three routers less dense, then what the head gives dense, shifted or not."""
    rows = {}
    for head in HEADS:
        for arm in ARMS:
            rows[f"{arm}, {head}"] = by_seed(runs, question="heads", arm=arm, head=head)
        keys = {"question": "heads", "arm": "dense", "head": head}
        rows[f"dense, {head}, 4 px"] = by_seed(runs, "shifted_4", **keys)
    return contrasts(
        rows,
        [
            *((f"{a}, places", "dense, places") for a in ("position", "hash", "learned")),
            *((f"{a}, mean", "dense, mean") for a in ("position", "hash", "learned")),
            ("dense, places", "dense, mean"),
            ("dense, places, 4 px", "dense, mean, 4 px"),
        ],
    )


def common_contrasts(runs: list[Run]) -> list[Contrast]:
    """With places read, `position` and `hash` less dense, all at one rate."""
    rows = {arm: by_seed(runs, question="common", arm=arm) for arm in ("position", "hash")}
    rows["dense"] = by_seed(runs, question="heads", arm="dense", head="places", lr=RATE)
    return contrasts(rows, [("position", "dense"), ("hash", "dense")])


def rate_contrasts(runs: list[Run]) -> list[Contrast]:
    """The lead at high rates less that at the usual one; and what the guard is worth at × 16."""
    rows = {}
    for factor in FACTORS:
        keys = {"question": "rates", "lr": RATE * factor, "guard": False}
        rows[f"learned − dense at {factor}"] = lead(runs, **keys)
    for arm in COMPARED:
        for guard, name in ((True, "on"), (False, "off")):
            keys = {"question": "rates", "lr": RATE * 16, "guard": guard}
            rows[f"{arm} × 16, guard {name}"] = by_seed(runs, arm=arm, **keys)
    pairs = [(f"learned − dense at {factor}", "learned − dense at 1") for factor in FACTORS[1:]]
    pairs += [(f"{arm} × 16, guard on", f"{arm} × 16, guard off") for arm in COMPARED]
    return contrasts(rows, pairs)


def batch_contrasts(runs: list[Run], head: str) -> list[Contrast]:
    """The lead at each batch less that at 64."""
    rows = {f"learned − dense at {batch}": lead(runs, **of_batch(head, batch)) for batch in BATCHES}
    others = (16, *LARGE)
    return contrasts(rows, [(f"learned − dense at {b}", "learned − dense at 64") for b in others])


def leads_with_places(runs: list[Run]) -> list[Contrast]:
    """The lead at each batch, with places read."""
    rows = {
        f"{arm} at {batch}": by_seed(runs, arm=arm, **of_batch("places", batch))
        for arm in COMPARED
        for batch in BATCHES
    }
    return contrasts(rows, [(f"learned at {batch}", f"dense at {batch}") for batch in BATCHES])


def growth_by_head(runs: list[Run]) -> list[Contrast]:
    """How much the lead grows from 64 to a large batch: with the mean less with places read."""
    rows = {
        f"growth to {batch}, {head}": less(
            lead(runs, **of_batch(head, batch)), lead(runs, **of_batch(head, 64))
        )
        for head in HEADS
        for batch in LARGE
    }
    return contrasts(rows, [(f"growth to {b}, mean", f"growth to {b}, places") for b in LARGE])


# ---- tables


def spread(values: BySeed) -> str:
    """`46.2 ± 0.6`: mean and SD over seeds in per cent."""
    percents = [100 * value for value in values.values()]
    return f"{fmean(percents):.1f} ± {stdev(percents):.1f}"


def tables(runs: list[Run]) -> list[str]:
    """A row for each kind of run of the three questions, and for each contrast."""
    rows = []
    for head in HEADS:
        for arm in ARMS:
            own = runs_with(runs, question="heads", arm=arm, head=head)
            shifts = ("test_top1", "shifted_4", "shifted_8")
            cells = " | ".join(spread(by_seed(own, name)) for name in shifts)
            rows.append(f"| {arm} | {head} | {cells} | {len(own)} | {own[0]['lr']:g} |")
    for arm in COMPARED:
        for factor in FACTORS:
            for guard, name in ((False, "off"), (True, "on")):
                keys = {"arm": arm, "lr": RATE * factor, "guard": guard}
                own = runs_with(runs, question="rates", **keys)
                failed = sum(bool(run["failed"]) for run in own)
                refused, returns = (sum(run[key] for run in own) for key in ("refused", "returns"))
                counts = f"{len(own)} | {failed} | {refused} | {returns}"
                rows.append(f"| {arm} | × {factor} | {name} | {spread(by_seed(own))} | {counts} |")
    for head in HEADS:
        for batch in BATCHES:
            for arm in COMPARED:
                own = runs_with(runs, arm=arm, **of_batch(head, batch))
                cpu_s = fmean(run["cpu_s"] for run in own)
                cost = f"{own[0]['lr']:g} | {own[0]['steps']} | {cpu_s:.0f}"
                accuracy = f"{spread(by_seed(own))} | {len(own)}"
                rows.append(f"| {head} | {batch} | {arm} | {accuracy} | {cost} |")
    found = [*head_contrasts(runs), *common_contrasts(runs), *rate_contrasts(runs)]
    found += [each for head in HEADS for each in batch_contrasts(runs, head)]
    found += [*leads_with_places(runs), *growth_by_head(runs)]
    return rows + [f"| {c.name} | {c.interval} | {c.seeds} | {c.verdict} |" for c in found]


# ---- the protocol's verdicts, and the sentences with their numbers


def of_heads(runs: list[Run]) -> str:
    """Experts by place and learned ones beside dense, where the classifier reads places."""
    found = head_contrasts(runs)
    arms, gain = found[:3], found[6]
    none = all(contrast.verdict == "not told apart" for contrast in arms)
    gaps = ", ".join(f"{each.name.partition(',')[0]} {each.interval}" for each in arms)
    return (
        f"Reading every place, not their mean, gives a small dense model {gain.interval}; experts beside it, "
        f"{'not ' * none}told apart: {gaps}; {gain.seeds} seeds"
    )


def of_rates(runs: list[Run]) -> tuple[str, str]:
    """Whether sparse training is less stable, and the numbers."""
    own = runs_with(runs, question="rates", guard=False)
    failed = {arm: sum(bool(run["failed"]) for run in runs_with(own, arm=arm)) for arm in COMPARED}
    changes = rate_contrasts(runs)[:2]
    if failed["learned"] > failed["dense"] or any(each.verdict == "below" for each in changes):
        verdict = "yes"
    else:
        verdict = "no" if all(each.low > -A_POINT for each in changes) else "not shown"
    gaps = ", ".join(
        f"{each.interval} at × {factor}" for factor, each in zip(FACTORS[1:], changes, strict=True)
    )
    return verdict, (
        f"Without the guard, {failed['learned']} MoE and {failed['dense']} dense runs fail at up to 16 times the "
        f"learning rate; the MoE's lead over dense changes by so many points: {gaps}"
    )


def of_batches(runs: list[Run]) -> tuple[str, str]:
    """Whether sparse training wants large batches, by the rule with either head, and the numbers."""
    verdicts, texts = {}, []
    for head, words in (("mean", "with the mean"), ("places", "With places read")):
        changes = batch_contrasts(runs, head)
        is_no = all(each.high < A_POINT for each in changes[1:])
        verdicts[head] = "no" if is_no else "not shown"
        if any(each.verdict == "above" for each in changes[1:]):
            verdicts[head] = "yes"
        gaps = [f"{each.interval} at {b}" for b, each in zip((16, *LARGE), changes, strict=True)]
        texts.append(f"{words} {', '.join(gaps)}; {changes[0].seeds} seeds")
    falls = []
    for arm, words in (("dense", "dense goes"), ("learned", "the MoE")):
        ends = [by_seed(runs, arm=arm, **of_batch("mean", batch)).values() for batch in (64, 1024)]
        falls.append(f"{words} from {' to '.join(f'{100 * fmean(end):.0f}' for end in ends)} %")
    only = verdicts["mean"] == "yes" and verdicts["places"] != "yes"
    return "only with the mean" if only else verdicts["mean"], (
        f"Compared with batches of 64, the MoE's lead over dense changes by so many points: {'. '.join(texts)}. Of as "
        f"many images larger batches make fewer steps: from 64 to 1024, with the mean, {', '.join(falls)}"
    )


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the record."""
    runs = read_runs()
    position, hashed, learned, *_, gain, _ = head_contrasts(runs)
    common, _ = common_contrasts(runs)
    shifted = [
        fmean(by_seed(runs, "shifted_8", question="heads", arm="dense", head=head).values())
        for head in HEADS
    ]
    leads = leads_with_places(runs)
    means = [each.mean for each in leads]
    apart = sum(each.verdict != "not told apart" for each in leads)
    unstable, large = of_rates(runs), of_batches(runs)
    link = "([small](../benchmarks/small/README.md)). |"
    return {
        "benchmarks/small/README.md": [
            f"- **Heads.** {of_heads(runs)}.",
            f"- **Instability.** {unstable[1]}.",
            f"- **Large batches.** {large[1]}.",
            f"At the rate of the other rows, {RATE:g} (the amendment):",
            *tables(runs),
        ],
        "docs/results.md": [
            f"| Sparse training is unstable | {unstable[0]} | {unstable[1]} {link}",
            f"| Sparse training wants large batches | {large[0]} | {large[1]} {link}",
            f"the small model's experts then lead by {min(means):+.1f} to {max(means):+.1f} points at "
            f"{len(leads)} batch sizes, {apart or 'none'} of them shown to differ from 0",
        ],
        "benchmarks/routers/README.md": [
            f"gains {gain.mean:.1f} points ({gain.low:+.1f} to {gain.high:+.1f}; {gain.seeds} seeds)",
            f"`position` {position.interval}, `hash` {hashed.interval}, `vmoe_top_k` {learned.interval}; at the other "
            f"rows' learning rate `position` has {common.interval}",
            f"on images moved by 8 px it is {100 * (shifted[0] - shifted[1]):.1f} points below",
        ],
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
