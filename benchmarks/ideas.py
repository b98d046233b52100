"""The table of docs/concepts/what-sparsity-buys.md: each idea, where it can be seen, and what the records say.

    python -m benchmarks ideas

Nothing is typed by hand but the names: sentences are the studies' own, chosen by their records, and what has no record
is "not run yet".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import HERE, argument_parser
from benchmarks.queue import fill_readme, read_records
from benchmarks.routers import report as routers
from benchmarks.saving import report as saving
from benchmarks.sparsity.report import DEVICES
from benchmarks.sparsity.verdict import finished, judge, runs_of
from benchmarks.specialization.arms import CLASS, DATA_SETS
from benchmarks.specialization.report import wanted
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
NOTEBOOK = "[live](../../notebooks/05_ideas.ipynb)"
Json = dict[str, Any]
Records = Mapping[str, Any]


def read_all(root: Path = HERE) -> dict[str, Any]:
    """The records of all studies, by study: one record, or a list of runs."""
    found: dict[str, Any] = {name: read_records(root / name / "runs") for name in ("sparsity", "specialization")}
    for place in ("curve/record", "guard/accuracy", "routers/record", "saving/record", "upcycling/record"):
        file = root / f"{place}.json"
        found[file.parent.name] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    for name, files in (("waiting", "waiting/*.json"), ("scratch", "specialization/scratch/*.json")):
        found[name] = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(root.glob(files))]
    return found


def ideas(records: Records) -> str:
    """The table as Markdown."""
    rows = [
        ["Experts specialize", NOTEBOOK,
         said(records, "specialization", partial(specialization, scratch=records["scratch"]))],
        ["More parameters help at equal compute", NOTEBOOK, said(records, "sparsity", hypothesis("H1"))],
        ["They help at equal time too", "", said(records, "sparsity", hypothesis("H2"), "saving", equal_time)],
        ["The more of the compute is sparse, the more it helps", "", said(records, "sparsity", hypothesis("H3"))],
        ["A learned gate beats fixed rules", NOTEBOOK,
         said(records, "sparsity", hypothesis("H4"), "routers", fixed_rules)],
        ["Balance costs no accuracy", NOTEBOOK, said(records, "sparsity", hypothesis("H5"))],
        ["Uneven experts make others wait", NOTEBOOK, said(records, "waiting", waits)],
        ["Sparse training is unstable", NOTEBOOK,
         said(records, "sparsity", arms("lr4", "lr16", "lr4-unguarded", "lr16-unguarded"), "guard", struck)],
        ["Sparse training wants large batches", NOTEBOOK,
         said(records, "sparsity", arms("batch32", "batch512", "batch1024", "batch512-accumulated"))],
        ["A dense model can become sparse", "[guide](../guides/dense-sparse.md)",
         said(records, "sparsity", hypothesis("F1", "F2"), "upcycling", upcycled)],
        ["It saves energy", NOTEBOOK, "Joules were not measured. " + said(records, "saving", work)],
        ["Fewer images, well chosen, are enough", "[notebook](../../notebooks/04_good_data.ipynb)",
         said(records, "curve", fewer_images)],
    ]  # fmt: skip
    return "\n".join(["| idea | see it | what the records say |", "|---|---|---|", *(
        f"| {idea} | {live} | {answer} |" for idea, live, answer in rows
    )])  # fmt: skip


def said(records: Records, *parts: Any) -> str:
    """What each study says, with a link to it: parts are names of studies, each before what asks its records.

    What was measured comes before what wasn't.
    """
    texts = []
    for study, ask in zip(parts[::2], parts[1::2], strict=True):
        answer = ask(records[study]) if records[study] else f"{NOT_RUN}."
        texts.append(f"{answer.rstrip('.')} ([{study}](../../benchmarks/{study}/README.md)).")
    return " ".join(sorted(texts, key=lambda text: text.startswith(NOT_RUN)))


def hypothesis(*names: str) -> Callable[[Sequence[Json]], str]:
    """Asks for the sentences of the sparsity study's protocol, on each device that has runs."""

    def ask(runs: Sequence[Json]) -> str:
        found = []
        for device, title in DEVICES.items():
            results = {result.hypothesis.name: result for result in judge(runs, device)}
            found += [f"{title}: {results[name].sentence}" for name in names if results[name].contrast]
        return " ".join(found) or NOT_RUN

    return ask


def arms(*names: str) -> Callable[[Sequence[Json]], str]:
    """Asks for the accuracy of arms that the sparsity study only describes, and for failed runs."""

    def ask(runs: Sequence[Json]) -> str:
        found = []
        for device, title in DEVICES.items():
            for name in names:
                own = runs_of(runs, device, name)
                done = finished(own)
                mean = percent(sum(run["test_top1"] for run in done.values()) / len(done)) if done else "none"
                failed = f", {len(own) - len(done)} failed" if len(done) < len(own) else ""
                found += [f"{title}, `{name}`: {mean} ({len(done)} seeds{failed})."] if own else []
        return " ".join(found) or NOT_RUN

    return ask


def specialization(runs: Sequence[Json], scratch: Sequence[Json]) -> str:
    """In how many settings each question is answered with yes in every seed, what the rule chooses; from scratch."""
    settings = {name: settings_of(runs, name, CLASS) for name in DATA_SETS}

    def yes(question: int, *names: str) -> str:
        asked = [each.answer(question) for name in names for each in settings[name]]
        return f"{asked.count(YES)} of {len(asked)}"

    differ = ", ".join(f"{yes(0, name)} on {name}" for name in DATA_SETS)
    answers = [layer["answers"][2]["answer"] for run in scratch for layer in run["layers"]]
    return (
        f"Of the settings of upcycled models, classes go to different experts in {differ}; training the router added "
        f"to that in {yes(1, *DATA_SETS)}; experts do different things in {yes(2, *DATA_SETS)}. {wanted(runs)[0]} From "
        f"scratch on CIFAR-10: experts do different things in {answers.count(YES)} of {len(answers)} layers."
    )


def equal_time(record: Json) -> str:
    """The MoE beside its dense twins after the same training time."""
    rows = saving.equal_time(record, saving.SAVING)
    pairs = [(saving.MOE, row.name) for row in rows[1:]]
    seconds = record["budget"]["budget_s"]
    return f"{seconds:.0f} s of one thread: {_brief(contrasts({row.name: row.by_seed for row in rows}, pairs))}"


def fixed_rules(record: Json) -> str:
    """The router of the recipes, and the rules, beside the dense twin and beside `hash`."""
    rows = routers.rows_of(record, "cifar10")
    to_twin, to_hash = routers.against(rows, routers.TWIN), routers.against(rows, routers.HASH)
    return _brief([to_twin["position"], to_twin["hash"], to_twin["vmoe_top_k"], to_hash["vmoe_top_k"]])


def upcycled(record: Json) -> str:
    """The upcycled model beside the dense one, trained on for as many steps."""
    arms = {"upcycled": "upcycled", "dense, trained on": "continued"}
    rows = {name: Row(name, 0.0, list(upcycling.runs_of(record, arm).values())) for name, arm in arms.items()}
    return _brief(contrasts({name: row.by_seed for name, row in rows.items()}, [("upcycled", "dense, trained on")]))


def _brief(found: Sequence[Contrast]) -> str:
    return "; ".join(f"{each.first} minus {each.second}: {each.interval} points, {each.verdict}" for each in found)


def waits(runs: Sequence[Json]) -> str:
    """Waiting for rows, over that of an even load, with a learned router."""
    spans = {}
    for arm in ("no loss", "loss"):
        values = [row["wait_over_even"] for run in runs for row in run["rows"] if row["arm"] == arm]
        spans[arm] = f"{min(values):.1f} to {max(values):.1f}"
    return (
        f"Two processes: {spans['no loss']} times an even load's waiting where an uneven router learns without a "
        f"balance loss, {spans['loss']} times with one"
    )


def work(record: Json) -> str:
    """FLOPs and speed beside either dense twin."""
    moe, small, large = saving.SAVING
    cost = {arm: record["cost"][arm]["flops_per_image"] + record["cost"][arm]["router_flops_per_image"]
            for arm in saving.SAVING}  # fmt: skip
    return (
        f"FLOPs: {1 - cost[moe] / cost[large]:.0%} fewer than a dense model of equal parameters, at "
        f"{1 / saving.speed_ratio(record, 'train', large):.2f} times its images/s in training; "
        f"{abs(cost[moe] / cost[small] - 1):.1%} more than one of equal FLOPs (the routers), at "
        f"{1 / saving.speed_ratio(record, 'train', small):.2f} times its images/s"
    ).replace("%", " %")


def struck(record: Json) -> str:
    """Guarded trainings with injected faults less the same ones without."""
    gap = Gap.of([100 * run["difference"] for run in record["runs"]])
    faults, updates = len(record["faults"].split(",")), record["updates"]
    return f"{faults} faults in {updates} guarded updates minus none: {gap.text} points, {gap.seeds} seeds"


def fewer_images(record: Json) -> str:
    """What 70 % of the images cost, by method, and for which it is shown to be as good as all."""
    rows = [row for row in curve_table(record["trainings"], record["methods"]) if row.share == _SHARE]
    good = [row.by for row in rows if is_as_good(row.beside_all, record["margin"])]
    costs = ", ".join(f"{row.by} {row.beside_all.text}" for row in rows)
    return (
        f"{_SHARE:.0%} of the images less all, for as many steps: {costs} points; as good to within "
        f"{record['margin']:g} point is shown for {' and '.join(good) or 'none'}"
    ).replace("%", " %")


def main() -> None:
    """Write the table into the page."""
    parser = argument_parser("ideas", __doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the marks (%(default)s)")
    fill_readme(parser.parse_args().page, [ideas(read_all())])
