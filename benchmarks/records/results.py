"""docs/results.md: rows and sentences on what can be measured again; the others come from frozen studies."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.records import (
    Claim,
    Definition,
    accuracy,
    performance,
    quickstart,
    reliability,
    small,
)
from benchmarks.records.studies import on_gpus, shares
from benchmarks.small.report import batch_leads, batches_answer, counted, rates_answer

TRAIN = performance.TRAIN.format("cifar10")
FROZEN = tuple(
    f"benchmarks/{study}/runs.jsonl"
    for study in ("sparsity", "specialization", "waiting", "equal_time")
)


def of_small(answer: Callable[..., tuple[str, str]], *runs: Any) -> dict[str, str]:
    """Whether an idea about the small model holds, and the numbers."""
    verdict, text = answer(counted(runs))
    return {"verdict": verdict, "text": text.replace("not told apart", "no difference shown")}


def leads_with_places(*runs: Any) -> dict[str, Any]:
    """Smallest and largest lead of the small model's experts over batch sizes, with places read; and the verdicts."""
    leads = batch_leads(counted(runs), "places")
    means = [100 * each.mean for each in leads]
    apart = sum(each.verdict != "not told apart" for each in leads)
    return {
        "least": min(means),
        "most": max(means),
        "batches": len(leads),
        "apart": apart or "none",
    }


def cpu_time(record: Any) -> dict[str, float]:
    """CPU time of a training step beside that of either dense twin."""
    twin, large = (
        1 / record["rows"][0]["speed_to"][row["name"]]["median"] for row in record["rows"][1:]
    )
    return {"twin": twin, "large": large}


CLAIMS = [
    *(
        Claim(
            small.FILES,
            f"| {idea} | {{verdict}} | {{text}} ([small](../benchmarks/small/README.md)). |",
            partial(of_small, answer),
        )
        for idea, answer in (
            ("Sparse training is unstable", rates_answer),
            ("Sparse training wants large batches", batches_answer),
        )
    ),
    Claim(
        small.FILES,
        "the small model's experts then lead by {least:+.1f} to {most:+.1f} points at {batches} batch sizes, {apart} "
        "of them shown to differ from 0",
        leads_with_places,
    ),
    Claim(
        TRAIN,
        "| It saves energy | not measured | There was no counter of joules. Of CPU time, which energy roughly follows, "
        "a training step of CIFAR-10's recipe takes {twin:.1f} times that of its dense twin and {large:.1f} times that "
        "of a dense model with as many parameters ([performance](../benchmarks/performance/README.md)). |",
        cpu_time,
    ),
    Claim(
        (*FROZEN, small.FILES, TRAIN, *accuracy.CIFAR),
        "{text} measured.",
        lambda *records: {"text": "GPUs were" if on_gpus(*records) else "No GPU was"},
    ),
    Claim((), "the shipped models have {least_percent:.0f} to {most:.0%}.", shares),
    Claim(
        quickstart.NOW,
        "The quickstart's model reaches {tests} % (three seeds) on {total:,} test images",
        quickstart.of_command,
    ),
    Claim(
        quickstart.QUICKSTART,
        "the first has {most:.2f} times the mean load on its busiest expert",
        lambda record: {
            "most": max(float(value) for value in quickstart.loads(record)["slowest"].split(", "))
        },
    ),
    Claim(
        tuple(accuracy.CIFAR),
        "CIFAR-10 from scratch reaches {mean:.1%} (mean of three seeds)",
        accuracy.mean,
    ),
    Claim(
        (*accuracy.FOLDERS, accuracy.BOTH),
        "photos of cats and dogs reaches {least:.1f} to {most:.1%} (four trainings)",
        accuracy.of_folders,
    ),
    Claim(reliability.RESUME, "bit-identical in {equal} of {cells} cells", reliability.equal_cells),
    Claim(reliability.COST, "The guard costs {cost_percent:.2f} % of the CPU time of a step"),
]
DEFINITIONS = [
    Definition("Brackets are 95 % intervals over seeds", "the level of `benchmarks/study.py`"),
    Definition("`fit FOLDER` on 2,048 photos", "the data"),
]
