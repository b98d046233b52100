"""README.md's tables, from the records alone; differences are called by the rule in `study.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.markdown import table
from benchmarks.queue import is_dirty
from benchmarks.study import Contrast, contrasts, holm

Runs = Sequence[dict[str, Any]]
BASE_LR, TUNING_SEED = 2e-3, 100
HEADS = ("mean", "places")
COMPARED, FACTORS, BATCHES, LARGE = (
    ("dense", "learned"),
    (1, 4, 16),
    (16, 64, 256, 1024),
    (256, 1024),
)


def parts_of(runs: Runs) -> list[str]:
    """All sentences and tables as Markdown."""
    clean = counted(runs)
    said = [f"- **{name}.** {answer(clean)[1]}." for name, answer in ANSWERS.items()]
    return ["\n".join(said), *heads(clean), *rates(clean), *batches(clean)]


def counted(runs: Runs) -> list[dict[str, Any]]:
    """The runs that enter the tables: from a clean tree, not of tuning."""
    return [run for run in runs if not is_dirty(run) and run["seed"] != TUNING_SEED]


def by_seed(runs: Runs, quantity: str = "test_top1", **keys: Any) -> dict[int, float]:
    """Seed -> accuracy of the finished runs that have these keys."""
    return {
        run["seed"]: run[quantity]
        for run in runs
        if not run["failed"] and keys.items() <= run.items()
    }


def mean(values: dict[int, float]) -> str:
    """`46.2 ± 0.6`: mean and SD over seeds in per cent."""
    if not values:
        return "not run"
    own = [100 * value for value in values.values()]
    return f"{statistics.fmean(own):.1f}" + (
        f" ± {statistics.stdev(own):.1f}" if len(own) > 1 else ""
    )


def said(contrast: Contrast) -> list[str]:
    """A line of a table of contrasts."""
    return [
        f"{contrast.first} − {contrast.second}",
        contrast.interval,
        str(len(contrast.gaps)),
        contrast.verdict,
    ]


def contrast_table(found: Sequence[Contrast]) -> str:
    """All of them."""
    return table(
        ["contrast", "points (95 %)", "seeds", "verdict"], [said(each) for each in found], "lrrl"
    )


def head_contrasts(runs: Runs) -> list[Contrast]:
    """The protocol's eight: by head the three routers less dense, then what the head gives dense, shifted or not."""
    own = {
        f"{arm}, {head}": by_seed(runs, question="heads", arm=arm, head=head)
        for head in ("mean", "places")
        for arm in ("dense", "learned", "position", "hash")
    }
    own |= {
        f"dense, {head}, 4 px": by_seed(runs, "shifted_4", question="heads", arm="dense", head=head)
        for head in ("mean", "places")
    }
    pairs = [
        (f"{arm}, {head}", f"dense, {head}")
        for head in ("places", "mean")
        for arm in ("position", "hash", "learned")
    ]
    return contrasts(
        own,
        [*pairs, ("dense, places", "dense, mean"), ("dense, places, 4 px", "dense, mean, 4 px")],
    )


def heads(runs: Runs) -> list[str]:
    """Question 1."""
    lines = []
    for head in ("mean", "places"):
        for arm in ("dense", "learned", "position", "hash"):
            keys = {"question": "heads", "arm": arm, "head": head}
            own = [run for run in runs if keys.items() <= run.items()]
            columns = [mean(by_seed(own, name)) for name in ("test_top1", "shifted_4", "shifted_8")]
            lines.append([arm, head, *columns, str(len(own)), f"{own[0]['lr']:g}" if own else ""])
    names = ["arm", "head", "test top-1, % ± SD", "shifted by 4 px", "by 8 px", "seeds", "lr"]
    return [
        "### Heads",
        table(names, lines),
        contrast_table(head_contrasts(runs)),
        f"At the rate of the other rows, {BASE_LR:g} (the amendment):",
        contrast_table(common_contrasts(runs)),
    ]


def common_contrasts(runs: Runs) -> list[Contrast]:
    """With places read, `position` and `hash` less dense, all at one rate."""
    own = {arm: by_seed(runs, question="common", arm=arm) for arm in ("position", "hash")}
    own["dense"] = by_seed(runs, question="heads", arm="dense", head="places", lr=BASE_LR)
    return contrasts(own, [("position", "dense"), ("hash", "dense")])


def lead(runs: Runs, **keys: Any) -> dict[int, float]:
    """Seed -> learned less dense, of the runs that have these keys."""
    return less(*(by_seed(runs, arm=arm, **keys) for arm in ("learned", "dense")))


def less(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
    """Seed -> difference, of common seeds."""
    return {seed: first[seed] - second[seed] for seed in first.keys() & second.keys()}


def interactions(
    runs: Runs, keys: Callable[[Any], dict[str, Any]], base: Any, others: Sequence[Any]
) -> list[Contrast]:
    """(learned − dense at each of `others`) less the same at `base`, seed by seed, judged together."""
    names = {value: f"learned − dense at {value}" for value in (base, *others)}
    leads = {name: lead(runs, **keys(value)) for value, name in names.items()}
    return contrasts(leads, [(names[value], names[base]) for value in others])


def rates(runs: Runs) -> list[str]:
    """Question 2."""
    lines = []
    for arm in COMPARED:
        for factor in FACTORS:
            for guard in (False, True):
                keys = {"question": "rates", "arm": arm, "lr": BASE_LR * factor, "guard": guard}
                own = [run for run in runs if keys.items() <= run.items()]
                counts = [
                    str(sum(value(run) for run in own))
                    for value in (
                        lambda run: bool(run["failed"]),
                        lambda run: run["refused"],
                        lambda run: run["returns"],
                    )
                ]
                lines.append(
                    [
                        arm,
                        f"× {factor}",
                        "on" if guard else "off",
                        mean(by_seed(own)),
                        str(len(own)),
                        *counts,
                    ]
                )
    names = [
        "arm",
        "learning rate",
        "guard",
        "test top-1, % ± SD",
        "runs",
        "failed",
        "updates refused",
        "returns",
    ]
    return ["### Instability", table(names, lines), contrast_table(rate_contrasts(runs))]


def rate_contrasts(runs: Runs) -> list[Contrast]:
    """Learned less dense at high rates, beside the same at the usual one; and what the guard is worth at × 16."""

    def keys(factor: Any) -> dict[str, Any]:
        return {"question": "rates", "lr": BASE_LR * factor, "guard": False}

    found = interactions(runs, keys, 1, (4, 16))
    own = {
        f"{arm} × 16, guard {'on' if guard else 'off'}": by_seed(
            runs, arm=arm, **{**keys(16), "guard": guard}
        )
        for arm in ("dense", "learned")
        for guard in (False, True)
    }
    found += contrasts(
        own, [(f"{arm} × 16, guard on", f"{arm} × 16, guard off") for arm in ("dense", "learned")]
    )
    adjusted = holm([each.own_p for each in found])  # one family
    return [
        Contrast(each.first, each.second, each.gaps, p)
        for each, p in zip(found, adjusted, strict=True)
    ]


def batches(runs: Runs) -> list[str]:
    """Question 3, with either head."""
    lines = []
    for head in HEADS:
        for batch in BATCHES:
            for arm in COMPARED:
                keys = {"question": "batches", "head": head, "arm": arm, "batch": batch}
                own = [run for run in runs if keys.items() <= run.items()]
                values = [f"{own[0]['lr']:g}", str(own[0]["steps"])] if own else ["", ""]
                seconds = f"{statistics.fmean(run['cpu_s'] for run in own):.0f}" if own else ""
                lines.append(
                    [head, str(batch), arm, mean(by_seed(own)), str(len(own)), *values, seconds]
                )
    names = ["head", "batch", "arm", "test top-1, % ± SD", "seeds", "lr", "steps", "CPU s, busy"]
    return [
        "### Large batches",
        table(names, lines),
        "With the mean:",
        contrast_table(batch_contrasts(runs)),
        "With places read (the second amendment):",
        contrast_table(batch_contrasts(runs, "places")),
        "The lead itself, with places read:",
        contrast_table(batch_leads(runs, "places")),
        "What reading places takes from the lead's growth:",
        contrast_table(growth_by_head(runs)),
    ]


def batch_contrasts(runs: Runs, head: str = "mean") -> list[Contrast]:
    """Learned less dense at each batch, beside the same at 64."""
    return interactions(runs, lambda batch: of_batch(head, batch), 64, (16, *LARGE))


def of_batch(head: str, batch: int) -> dict[str, Any]:
    """The keys of question 3's runs."""
    return {"question": "batches", "head": head, "batch": batch}


def batch_leads(runs: Runs, head: str) -> list[Contrast]:
    """Learned less dense at each batch."""
    own = {
        f"{arm} at {batch}": by_seed(runs, arm=arm, **of_batch(head, batch))
        for arm in COMPARED
        for batch in BATCHES
    }
    return contrasts(own, [(f"learned at {batch}", f"dense at {batch}") for batch in BATCHES])


def growth_by_head(runs: Runs) -> list[Contrast]:
    """How much the lead grows from 64 to a large batch: with the mean less with places read."""
    leads = {
        (head, batch): lead(runs, **of_batch(head, batch)) for head in HEADS for batch in BATCHES
    }
    grown = {
        f"growth to {batch}, {head}": less(leads[head, batch], leads[head, 64])
        for head in HEADS
        for batch in LARGE
    }
    return contrasts(
        grown, [(f"growth to {batch}, mean", f"growth to {batch}, places") for batch in LARGE]
    )


# ---- the protocol's verdicts: yes, no or not shown of the idea; the sentence with its numbers

YES, NO, OPEN, ONLY_MEAN = "yes", "no", "not shown", "only with the mean"
MARGIN = 0.01
NOT_RUN = "", "Not run yet"


def places_answer(runs: Runs) -> tuple[str, str]:
    """Question 1: experts by place and learned ones beside dense, where the classifier reads places."""
    found = {(each.first, each.second): each for each in head_contrasts(runs)}
    arms = [(f"{arm}, places", "dense, places") for arm in ("position", "hash", "learned")]
    head = ("dense, places", "dense, mean")
    if not found.keys() >= {*arms, head}:
        return NOT_RUN
    gaps = ", ".join(
        f"{first.partition(',')[0]} {found[first, second].interval}" for first, second in arms
    )
    none = all(found[pair].verdict == "not told apart" for pair in arms)
    return OPEN if none else "", (
        f"Reading every place, not their mean, gives a small dense model {found[head].interval}; "
        f"experts beside it, {'not ' * none}told apart: {gaps}; {len(found[head].gaps)} seeds"
    )


def rates_answer(runs: Runs) -> tuple[str, str]:
    """Question 2."""
    found = rate_contrasts(runs)
    own = [run for run in runs if run["question"] == "rates" and not run["guard"]]
    failed = {
        arm: sum(bool(run["failed"]) for run in own if run["arm"] == arm)
        for arm in ("dense", "learned")
    }
    if len(found) < 4 and not any(failed.values()):
        return NOT_RUN
    at = {each.first.rpartition(" ")[2]: each for each in found[:2]}
    less = failed["learned"] > failed["dense"] or any(
        each.verdict == "below" for each in at.values()
    )
    stable = not less and all(each.mean - each.half > -MARGIN for each in at.values())
    gaps = ", ".join(f"{each.interval} at × {factor}" for factor, each in at.items())
    return YES if less else NO if stable else OPEN, (
        f"Without the guard, {failed['learned']} MoE and {failed['dense']} dense runs fail at up to 16 times the "
        f"learning rate; the MoE's lead over dense changes by so many points: {gaps}"
    )


def batches_answer(runs: Runs) -> tuple[str, str]:
    """Question 3: by the rule with the mean and, once that has run, with places read; "only" where they differ."""
    verdicts, texts = [], []
    for head, where in (("mean", "with the mean"), ("places", "with places read")):
        found = {each.first.rpartition(" ")[2]: each for each in batch_contrasts(runs, head)}
        large = [found[str(batch)] for batch in LARGE if str(batch) in found]
        if len(large) < len(LARGE):
            break
        wants = any(each.verdict == "above" for each in large)
        without = not wants and all(each.mean + each.half < MARGIN for each in large)
        verdicts.append(YES if wants else NO if without else OPEN)
        gaps = ", ".join(f"{each.interval} at {batch}" for batch, each in found.items())
        texts.append(
            f"{where[0].upper() if texts else where[0]}{where[1:]} {gaps}; {len(large[0].gaps)} seeds"
        )
    if not verdicts:
        return NOT_RUN
    falls = []
    for arm, name in (("dense", "dense goes"), ("learned", "the MoE")):
        ends = [
            by_seed(runs, arm=arm, **of_batch("mean", batch)).values() for batch in (64, LARGE[-1])
        ]
        falls.append(
            f"{name} from {' to '.join(f'{100 * statistics.fmean(end):.0f}' for end in ends)} %"
        )
    only = verdicts[0] == YES and verdicts[1:] != [YES]  # also as long as places haven't been asked
    return ONLY_MEAN if only else verdicts[0], (
        f"Compared with batches of 64, the MoE's lead over dense changes by so many points: {'. '.join(texts)}. "
        f"Of as many images larger batches make fewer steps: from 64 to {LARGE[-1]}, with the mean, {', '.join(falls)}"
    )


ANSWERS = {"Heads": places_answer, "Instability": rates_answer, "Large batches": batches_answer}
