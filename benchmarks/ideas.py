"""The table of docs/results.md: each idea, whether it holds, and what the records say.

    python -m benchmarks ideas

Nothing is typed by hand but the names: verdicts and sentences are the studies' own, chosen by their records, and what
has no record is "not run yet".
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cats_and_dogs import report as cats_and_dogs
from benchmarks.curve.shares import is_as_good, with_interval
from benchmarks.curve.shares import table as curve_table
from benchmarks.equal_time import report as equal_time
from benchmarks.harness import HERE, argument_parser
from benchmarks.queue import fill_readme, read_records
from benchmarks.small import report as small
from benchmarks.sparsity.arms import EPOCHS
from benchmarks.sparsity.report import DEVICES
from benchmarks.sparsity.verdict import Result, finished, gap_of, judge, runs_of
from benchmarks.specialization.arms import CLASS, DATA_SETS
from benchmarks.specialization.rule import settings_of
from benchmarks.study import Row, contrasts
from benchmarks.upcycling import report as upcycling
from moevision.analysis.questions import YES

PAGE = HERE.parent / "docs" / "results.md"
NOT_RUN = "Not run yet"
_SHARE = 0.7  # of the images, for the sentence of the curve
NO, OPEN = "no", "not shown"
UNDECIDED = "undecided"
VERDICTS = {"above": YES, "below": NO, "not told apart": OPEN}
Json = dict[str, Any]
Records = Mapping[str, Any]
Answer = tuple[str, str]
"""Whether the idea holds, empty where that isn't what was measured; and the numbers."""


def read_all(root: Path = HERE) -> dict[str, Any]:
    """The records of all studies, by study: one record, or a list of runs."""
    lists = {"scratch": "specialization/scratch.jsonl"}
    names = ("sparsity", "specialization", "small", "waiting", "scratch", "cats_and_dogs", "equal_time")
    found: dict[str, Any] = {name: read_records(root / lists.get(name, f"{name}/runs.jsonl")) for name in names}
    single = {"curve": "curve/record", "upcycling": "upcycling/record",
              "performance": "train/cifar10/benchmark-train"}  # fmt: skip
    for name, place in single.items():
        file = root / f"{place}.json"
        found[name] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    found["small"] = small.counted(found["small"])
    return found


def ideas(records: Records) -> str:
    """The table as Markdown."""
    rows: list[tuple[str, Answer]] = [
        ("Experts specialize", said(records, "specialization", partial(specialization, trained=records["scratch"]))),
        ("Expert 1 focuses on cats, expert 2 on dogs", said(records, "cats_and_dogs", cats_and_dogs.answer)),
        ("More parameters help at equal compute", said(records, "sparsity", equal_steps)),
        ("They help at equal time too", said(records, "equal_time", full_length, "sparsity", one_epoch)),
        ("The more of the compute is sparse, the more it helps", said(records, "sparsity", hypothesis("H3"))),
        ("A learned router beats fixed rules", said(records, "sparsity", hypothesis("H4", "H6"))),
        ("Balance costs at most a point of accuracy", said(records, "sparsity", hypothesis("H5"))),
        ("Uneven experts make others wait", said(records, "waiting", waits)),
        ("Sparse training is unstable", said(records, "small", small.rates_answer)),
        ("Sparse training wants large batches", said(records, "small", small.batches_answer)),
        ("[Experts improve a trained dense model](guides/dense-sparse.md)", said(records, "upcycling", upcycled)),
        ("It saves energy", said(records, "performance", work)),
        ("[Fewer images, well chosen, are enough](guides/good-data.md)", said(records, "curve", fewer_images)),
    ]  # fmt: skip
    table = "\n".join(["| idea | holds | what the records say |", "|---|---|---|", *(
        f"| {idea} | {verdict} | {text} |" for idea, (verdict, text) in rows
    )])  # fmt: skip
    return table.replace("not told apart from", "not shown to differ from").replace(
        "not told apart", "no difference shown"
    )


def said(records: Records, *parts: Any) -> Answer:
    """A verdict, and what each study says, with links: parts are names of studies, each before what asks it.

    The first study that decided is asked for the verdict. Beside what was measured, what wasn't isn't named.
    """
    verdicts, texts = [], []
    for study, ask in zip(parts[::2], parts[1::2], strict=True):
        verdict, text = ask(records[study]) if records[study] else ("", NOT_RUN)
        verdicts += [verdict] * bool(verdict)
        texts.append(f"{text.rstrip('.')} ([{study}](../benchmarks/{study}/README.md)).")
    verdicts.sort(key=lambda verdict: verdict == UNDECIDED)
    measured = [text for text in texts if not text.startswith(NOT_RUN)]
    return (verdicts or [NOT_RUN.lower()])[0], " ".join(measured or texts)


def hypothesis(*names: str) -> Callable[[Sequence[Json]], Answer]:
    """Asks for the sentences of the sparsity study's protocol, on each device that has runs, and for `beside`.

    A yes names its length of training; a no to one of several rivals names the rival.
    """

    def ask(runs: Sequence[Json]) -> Answer:
        found, verdicts = [], []
        several = len({run["device"] for run in runs}) > 1
        for device, title in DEVICES.items():
            yes = f"after {EPOCHS[device]} epoch{'s' * (EPOCHS[device] > 1)}"
            for result in judge(runs, device):
                if result.hypothesis.name not in names or not (contrast := result.contrast):
                    continue
                no = f"not `{contrast.second}`" if result.hypothesis.seconds[1:] else NO
                verdicts.append({"positive": yes, "negative": no, "tie": OPEN}.get(result.verdict, UNDECIDED))
                found += [f"{title}: " * several + result.sentence, *beside(runs, device, result)]
        return (verdicts or [""])[0], " ".join(found) or NOT_RUN

    return ask


def equal_steps(runs: Sequence[Json]) -> Answer:
    """More parameters at equal steps, and the same with places read: a lead that is then gone is the mean's."""
    (verdict, text), (control, beside_it) = (hypothesis(name)(runs) for name in ("H1", "H7"))
    if beside_it == NOT_RUN:
        return verdict, text
    only = verdict.startswith("after") and not control.startswith("after")
    return small.ONLY_MEAN if only else verdict, f"{text} {beside_it}"


def one_epoch(runs: Sequence[Json]) -> Answer:
    """The same question after one epoch."""
    verdict, text = hypothesis("H2")(runs)
    return verdict, text if text == NOT_RUN else f"After one epoch: {text[0].lower()}{text[1:]}"


def full_length(runs: Sequence[Json]) -> Answer:
    """The verdict of the study at full length; nothing is said before a look has given it."""
    look = equal_time.decided(runs)
    if look is None:
        return "", NOT_RUN
    verdicts = {"pays": YES, "doesn't pay here": NO, "undecided": UNDECIDED}
    return verdicts[equal_time.verdict(look)], " ".join([equal_time.answer(runs), *equal_time.limits(runs)])


_UNASKED = {
    "H1": ("twin-time", "twin", "{more:.0%} more steps give the twin {gap}."),
    "H4": ("moe", "hash", "Against `hash` alone, unadjusted: {gap}."),
}  # fmt: skip
"""Beside a hypothesis: two arms whose difference none asked for, and what is said of it."""


def beside(runs: Sequence[Json], device: str, result: Result) -> list[str]:
    """A difference that no hypothesis asked for, said beside one."""
    found = []
    if result.hypothesis.name in _UNASKED:
        first, second, text = _UNASKED[result.hypothesis.name]
        if gap := gap_of(runs, device, first, second):
            steps = [next(iter(finished(runs_of(runs, device, arm)).values()))["steps"] for arm in (first, second)]
            points = f"{gap.interval.removesuffix(')')}; {len(gap.gaps)} seeds)"
            found.append(text.format(gap=points, more=steps[0] / steps[1] - 1).replace("%", " %"))
    return found


def specialization(runs: Sequence[Json], trained: Sequence[Json]) -> Answer:
    """In how many settings of upcycled models the first two questions are answered with yes in every seed.

    The third is also asked of experts that were trained for long: in how many layers the answer is yes, and in how many
    a class's favourite, exchanged, costs more log-loss than any two others at the same share of moved choices. A
    question is answered with yes if most are, the third if most of the bundled and most of the small model's are.
    """
    settings = {name: settings_of(runs, name, CLASS) for name in DATA_SETS}
    asked = [each for own in settings.values() for each in own]

    def counted(question: int, each: Sequence[Any]) -> str:
        return f"{sum(setting.answer(question) == YES for setting in each)} of {len(each)}"

    def long(small: bool) -> tuple[int, int, int]:
        layers = [layer for run in trained if ("seed" in run) == small for layer in run["layers"]]
        by_log_loss = sum(layer["swap"]["more"]["log_loss"]["low"] > 0 for layer in layers)
        return sum(layer["answer"] == YES for layer in layers), len(layers), by_log_loss

    differ = ", ".join(f"{counted(0, own)} on {name}" for name, own in settings.items())
    differ = differ.replace(" on ", " settings on ", 1)
    (bundled, of_bundled, bundled_loss), (small, of_small, small_loss) = long(False), long(True)
    most = [sum(each.answer(question) == YES for each in asked) > len(asked) / 2 for question in (0, 1)]
    both = bundled > of_bundled / 2 and small > of_small / 2
    part = ", another in part" if not both and bundled + small else ""
    return f"{sum(most) + both} of 3 questions{part}", (
        f"Do classes go to different experts? In upcycled models yes in {differ}. Did training the router add to that? "
        f"In {counted(1, asked)}. Do experts do different things, by class? In {counted(2, asked)}; in trained models "
        f"yes in {bundled} of {of_bundled} layers of bundled ones (by log-loss alone {bundled_loss}), {small} of "
        f"{of_small} of small ones ({small_loss})."
    )


def upcycled(record: Json) -> Answer:
    """The upcycled model beside the dense one: trained on for as many steps, and in one schedule of as many."""
    names = {
        "upcycled": "upcycled",
        "continued": "dense, trained on",
        "in one": "dense in one schedule of as many steps",
    }
    rows = {name: Row(name, 0.0, list(upcycling.runs_of(record, arm).values())).by_seed for arm, name in names.items()}
    own, *others = names.values()
    found = contrasts(rows, [(own, other) for other in others])
    texts = [f"minus {each.second}: {each.interval}, {each.verdict}" for each in found]
    return VERDICTS[found[0].verdict], f"{own} {'; '.join(texts)}"


def waits(runs: Sequence[Json]) -> Answer:
    """Rows and waiting with a learned router; yes if waiting is longer without a balance loss by either measure."""
    arms = {arm: [row for run in runs for row in run["rows"] if row["arm"] == arm] for arm in ("no loss", "loss")}
    longer = sum(row["wait_ms"] > other["wait_ms"] for row, other in zip(*arms.values(), strict=True))
    ratios = [[row["wait_over_even"] for row in rows] for rows in arms.values()]
    rows = [f"{statistics.fmean(row['busiest_over_mean'] for row in each):.2f}" for each in arms.values()]
    always = min(ratios[0]) > max(ratios[1]) and longer == len(runs)
    return YES if always else OPEN, (
        f"Without a balance loss the busier of two processes computes {rows[0]} times the mean rows, with "
        f"one {rows[1]}; waits are longer without in {longer} of {len(runs)} runs by mean ms"
    )


def work(record: Json) -> Answer:
    """CPU time of a training step beside either dense twin's; no joules."""
    twin, large = (1 / record["rows"][0]["speed_to"][row["name"]]["median"] for row in record["rows"][1:])
    return "not measured", (
        "There was no counter of joules. Of CPU time, which energy roughly follows, a training step of CIFAR-10's "
        f"recipe takes {twin:.1f} times that of its dense twin and {large:.1f} times that of a dense model with as "
        "many parameters"
    )


def fewer_images(record: Json) -> Answer:
    """What 70 % of the images cost, by method, and which is shown to be worse than all or as good."""
    rows = [row for row in curve_table(record["trainings"], record["methods"]) if row.share == _SHARE]
    good = [row.by for row in rows if is_as_good(row.beside_all, record["margin"])]
    worse = [row.by for row in rows if row.by not in good and row.beside_all.high < 0]
    costs = ", ".join(f"{row.by} {with_interval(row.beside_all)}" for row in rows).replace("-", "−")
    return (YES if good else OPEN), (
        f"{_SHARE:.0%} of the images less all: {costs} points; to be worse is shown for "
        f"{' and '.join(worse) or 'none'}, to be as good to within {record['margin']:g} point for "
        f"{' and '.join(good) or 'none'}"
    ).replace("%", " %")


def main() -> None:
    """Write the table into the page."""
    parser = argument_parser("ideas", __doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the marks (%(default)s)")
    fill_readme(parser.parse_args().page, [ideas(read_all())])
