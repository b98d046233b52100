"""The table of docs/concepts/what-sparsity-buys.md: each idea, whether it holds, and what the records say.

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

from benchmarks.harness import HERE, argument_parser
from benchmarks.queue import fill_readme, read_records
from benchmarks.saving import report as saving
from benchmarks.sparsity.report import DEVICES
from benchmarks.sparsity.verdict import finished, judge, runs_of
from benchmarks.specialization.arms import CLASS, DATA_SETS
from benchmarks.specialization.rule import settings_of
from benchmarks.study import Contrast, Row, contrasts
from benchmarks.upcycling import report as upcycling
from moevision.analysis.questions import YES
from moevision.commands.curve import is_as_good
from moevision.commands.curve import table as curve_table
from moevision.train.differences import Gap
from moevision.train.report import percent

PAGE = HERE.parent / "docs" / "concepts" / "what-sparsity-buys.md"
NOT_RUN = "Not run yet"
_SHARE = 0.7  # of the images, for the sentence of the curve
LEVELS = (0.7, 0.8, 0.85)  # of validation accuracy, for the sentence of energy
NOTEBOOK = "[live](../../notebooks/05_ideas.ipynb)"
NO, OPEN = "no", "not shown"
OPEN_STILL = UNDECIDED, DESCRIBED = "undecided", "described"
VERDICTS = {"positive": YES, "negative": NO, "tie": OPEN, "above": YES, "below": NO, "not told apart": OPEN}
Json = dict[str, Any]
Records = Mapping[str, Any]
Answer = tuple[str, str]
"""Whether the idea holds, empty where that isn't what was measured; and the numbers."""


def read_all(root: Path = HERE) -> dict[str, Any]:
    """The records of all studies, by study: one record, or a list of runs."""
    found: dict[str, Any] = {name: read_records(root / name / "runs") for name in ("sparsity", "specialization")}
    for place in ("curve/record", "guard/accuracy", "saving/record", "upcycling/record"):
        file = root / f"{place}.json"
        found[file.parent.name] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    lists = {"waiting": "waiting/*.json", "scratch": "specialization/scratch/*.json",
             "accuracy": "accuracy/cifar10*-s?.json"}  # fmt: skip
    for name, files in lists.items():
        found[name] = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(root.glob(files))]
    return found


def ideas(records: Records) -> str:
    """The table as Markdown."""
    rows: list[tuple[str, str, Answer]] = [
        ("Experts specialize", NOTEBOOK,
         said(records, "specialization", partial(specialization, trained=records["scratch"]))),
        ("More parameters help at equal compute", NOTEBOOK, said(records, "sparsity", hypothesis("H1"))),
        ("They help at equal time too", "", said(records, "sparsity", hypothesis("H2"))),
        ("The more of the compute is sparse, the more it helps", "", said(records, "sparsity", hypothesis("H3"))),
        ("A learned gate beats fixed rules", NOTEBOOK, said(records, "sparsity", hypothesis("H4"))),
        ("Balance costs at most a point of accuracy", NOTEBOOK, said(records, "sparsity", hypothesis("H5"))),
        ("Uneven experts make others wait", NOTEBOOK, said(records, "waiting", waits)),
        ("Sparse training is unstable", NOTEBOOK,
         said(records, "sparsity", arms("lr4", "lr16", "lr4-unguarded", "lr16-unguarded"), "guard", struck)),
        ("Sparse training wants large batches", NOTEBOOK,
         said(records, "sparsity", arms("batch32", "batch512", "batch1024", "batch512-accumulated"))),
        ("Experts improve a trained dense model", "[guide](../guides/dense-sparse.md)",
         said(records, "sparsity", hypothesis("F1", "F2"), "upcycling", upcycled)),
        ("It saves energy", NOTEBOOK, said(records, "saving", work, "accuracy", reached)),
        ("Fewer images, well chosen, are enough", "[notebook](../../notebooks/04_good_data.ipynb)",
         said(records, "curve", fewer_images)),
    ]  # fmt: skip
    return "\n".join(["| idea | holds | see it | what the records say |", "|---|---|---|---|", *(
        f"| {idea} | {verdict} | {live} | {text} |" for idea, live, (verdict, text) in rows
    )])  # fmt: skip


def said(records: Records, *parts: Any) -> Answer:
    """A verdict, and what each study says, with links: parts are names of studies, each before what asks it.

    The first study that decided is asked for the verdict. Beside what was measured, what wasn't isn't named.
    """
    verdicts, texts = [], []
    for study, ask in zip(parts[::2], parts[1::2], strict=True):
        verdict, text = ask(records[study]) if records[study] else ("", NOT_RUN)
        verdicts += [verdict] * bool(verdict)
        links = f"[{study}](../../benchmarks/{study}/README.md)"
        if text != NOT_RUN and (HERE / study / f"{study}.png").is_file():
            links += f", [figure](../../benchmarks/{study}/{study}.png)"
        texts.append(f"{text.rstrip('.')} ({links}).")
    verdicts.sort(key=lambda verdict: verdict in OPEN_STILL)
    measured = [text for text in texts if not text.startswith(NOT_RUN)]
    return (verdicts or [NOT_RUN.lower()])[0], " ".join(measured or texts)


def hypothesis(*names: str) -> Callable[[Sequence[Json]], Answer]:
    """Asks for the sentences of the sparsity study's protocol, on each device that has runs."""

    def ask(runs: Sequence[Json]) -> Answer:
        found, verdicts = [], []
        for device, title in DEVICES.items():
            results = [result for result in judge(runs, device) if result.hypothesis.name in names and result.contrast]
            found += [f"{title}: {result.sentence}" for result in results]
            verdicts += [VERDICTS.get(result.verdict, UNDECIDED) for result in results]
        return (verdicts or [""])[0], " ".join(found) or NOT_RUN

    return ask


def arms(*names: str) -> Callable[[Sequence[Json]], Answer]:
    """Asks for the accuracy of arms that the sparsity study only describes, and for failed runs."""

    def ask(runs: Sequence[Json]) -> Answer:
        found = []
        for device, title in DEVICES.items():
            for name in names:
                own = runs_of(runs, device, name)
                done = finished(own)
                mean = percent(sum(run["test_top1"] for run in done.values()) / len(done)) if done else "none"
                failed = f", {len(own) - len(done)} failed" if len(done) < len(own) else ""
                found += [f"{title}, `{name}`: {mean} ({len(done)} seeds{failed})."] if own else []
        return DESCRIBED * bool(found), " ".join(found) or NOT_RUN

    return ask


def specialization(runs: Sequence[Json], trained: Sequence[Json]) -> Answer:
    """In how many settings of upcycled models the first two questions are answered with yes in every seed.

    The third is asked of experts that were trained for long: in how many layers a class's favourite, exchanged, costs
    more log-loss than any two others at the same share of moved choices. A question is answered with yes if most are,
    the third if most of the bundled and most of the small model's are.
    """
    settings = {name: settings_of(runs, name, CLASS) for name in DATA_SETS}
    asked = [each for own in settings.values() for each in own]

    def counted(question: int, each: Sequence[Any]) -> str:
        return f"{sum(setting.answer(question) == YES for setting in each)} of {len(each)}"

    def above(small: bool) -> tuple[int, int]:
        layers = [layer for run in trained if ("seed" in run) == small for layer in run["layers"]]
        return sum(layer["swap"]["more"]["log_loss"]["low"] > 0 for layer in layers), len(layers)

    differ = ", ".join(f"{counted(0, own)} on {name}" for name, own in settings.items())
    (bundled, of_bundled), (small, of_small) = above(False), above(True)
    most = [sum(each.answer(question) == YES for each in asked) > len(asked) / 2 for question in (0, 1)]
    both = bundled > of_bundled / 2 and small > of_small / 2
    part = ", 1 in part" if not both and bundled + small else ""
    return f"{sum(most) + both} of 3 questions{part}", (
        f"Upcycled: classes go to different experts in {differ}; routers tell more than clusters of their input in "
        f"{counted(1, asked)}. A class's favourite costs more than as many choices of any two experts in "
        f"{bundled} of {of_bundled} bundled layers, {small} of {of_small} small ones."
    )


def upcycled(record: Json) -> Answer:
    """The upcycled model beside the dense one, trained on for as many steps."""
    arms = {"upcycled": "upcycled", "dense, trained on": "continued"}
    rows = {name: Row(name, 0.0, list(upcycling.runs_of(record, arm).values())) for name, arm in arms.items()}
    return _brief(contrasts({name: row.by_seed for name, row in rows.items()}, [("upcycled", "dense, trained on")]))


def _brief(found: Sequence[Contrast]) -> Answer:
    """All of them, and the verdict of the first."""
    texts = [f"{each.first} minus {each.second}: {each.interval} points, {each.verdict}" for each in found]
    return VERDICTS[found[0].verdict], "; ".join(texts)


def waits(runs: Sequence[Json]) -> Answer:
    """Waiting for rows, over that of an even load, with a learned router; yes if it is always longer without a loss."""
    without, beside = (
        [row["wait_over_even"] for run in runs for row in run["rows"] if row["arm"] == arm]
        for arm in ("no loss", "loss")
    )
    return (YES if min(without) > max(beside) else OPEN), (
        f"Two processes: {min(without):.1f} to {max(without):.1f} times an even load's waiting where an uneven router "
        f"learns without a balance loss, {min(beside):.1f} to {max(beside):.1f} times with one"
    )


def work(record: Json) -> Answer:
    """FLOPs beside either dense twin; no joules."""
    moe, small, large = saving.SAVING
    cost = {arm: record["cost"][arm]["flops_per_image"] + record["cost"][arm]["router_flops_per_image"]
            for arm in saving.SAVING}  # fmt: skip
    return "not measured", (
        f"Joules were not measured. FLOPs: {1 - cost[moe] / cost[large]:.0%} fewer than a dense model of equal "
        f"parameters, {abs(cost[moe] / cost[small] - 1):.1%} more than one of equal FLOPs (the routers)"
    ).replace("%", " %")


def reached(runs: Sequence[Json]) -> Answer:
    """FLOPs and CPU seconds until the CIFAR-10 recipe and its dense twin have some accuracies, in whole epochs."""
    texts = []
    for name, start in (("CIFAR-10's recipe", "cifar10-s"), ("its dense twin", "cifar10-dense-s")):
        own = [run for run in runs if run["name"].rstrip("0123456789") == start]
        spent: dict[str, list[float]] = {"training_flops": [], "cpu_s": []}
        for level in LEVELS:
            for unit, means in spent.items():
                means.append(statistics.fmean(_share_until(run, level) * run["cost"][unit] for run in own))
        work = ", ".join(f"{flops / 1e15:.2f}" for flops in spent["training_flops"])
        seconds = ", ".join(f"{each:,.0f}" for each in spent["cpu_s"])
        texts.append(f"{name} takes {work} PFLOP, {seconds} CPU seconds (seeds: {len(own)})")
    levels = ", ".join(f"{level:.0%}" for level in LEVELS).replace("%", "")
    return "", f"To reach {levels} % of validation, in whole epochs, {' and '.join(texts)}"


def _share_until(run: Json, level: float) -> float:
    """The share of a training after which validation first has an accuracy."""
    return next(place for place, (_, top1, _) in enumerate(run["curve"], 1) if top1 >= level) / len(run["curve"])


def struck(record: Json) -> Answer:
    """Guarded trainings with injected faults less the same ones without: that says nothing of how often they occur."""
    gap = Gap.of([100 * run["difference"] for run in record["runs"]])
    faults, updates = len(record["faults"].split(",")), record["updates"]
    return "", (
        f"With {faults} planted faults in {updates} updates a guarded training differs from one without by "
        f"{gap.text} points ({gap.seeds} seeds)"
    ).replace("-", "−")


def fewer_images(record: Json) -> Answer:
    """What 70 % of the images cost, by method, and for which it is shown to be as good as all."""
    rows = [row for row in curve_table(record["trainings"], record["methods"]) if row.share == _SHARE]
    good = [row.by for row in rows if is_as_good(row.beside_all, record["margin"])]
    costs = ", ".join(f"{row.by} {row.beside_all.text}" for row in rows).replace("-", "−")
    return (YES if good else OPEN), (
        f"{_SHARE:.0%} of the images less all, for as many steps: {costs} points; as good to within "
        f"{record['margin']:g} point is shown for {' and '.join(good) or 'none'}"
    ).replace("%", " %")


def main() -> None:
    """Write the table into the page."""
    parser = argument_parser("ideas", __doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the marks (%(default)s)")
    fill_readme(parser.parse_args().page, [ideas(read_all())])
