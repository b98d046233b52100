"""docs/results.md: its table is what `python -m benchmarks ideas` makes of the records."""

from typing import Any

from benchmarks.ideas import ideas, read_all
from benchmarks.records import (
    Claim,
    Definition,
    accuracy,
    equal_time,
    label_noise,
    performance,
    quickstart,
    reliability,
    small,
    sparsity,
    specialization,
    upcycling,
    waiting,
)
from benchmarks.records.studies import on_gpus, shown

TRAIN = performance.TRAIN.format("cifar10")
FILES = (
    *(*sparsity.FILES, *specialization.FILES, *specialization.BUNDLED, *specialization.SEEDS, waiting.RUNS),
    *(TRAIN, *accuracy.CIFAR, upcycling.STUDY, small.FILES, equal_time.FILES[0]),
)


def _rows(*_: Any) -> list[dict[str, str]]:
    return shown(line for line in ideas(read_all()).splitlines() if "--" not in line)


CLAIMS = [
    Claim(FILES, "{text}", _rows),
    Claim(FILES, "{text} measured.", lambda *records: {"text": "GPUs were" if on_gpus(*records) else "No GPU was"}),
    Claim(FILES, "with {moe:.0%} of a model's FLOPs in experts", sparsity.shares),
    Claim(FILES, "the shipped models have {least_percent:.0f} to {most:.0%}.", sparsity.shares),
    Claim(
        quickstart.NOW,
        "The quickstart's model reaches {tests} % (three seeds) on {total:,} test images",
        quickstart.of_command,
    ),
    Claim(
        quickstart.QUICKSTART,
        "the first has {most:.2f} times the mean load on its busiest expert",
        lambda record: {"most": max(float(value) for value in quickstart.loads(record)["slowest"].split(", "))},
    ),
    Claim(tuple(accuracy.CIFAR), "CIFAR-10 from scratch reaches {mean:.1%} (mean of three seeds)", accuracy.mean),
    Claim(
        (*accuracy.FOLDERS, accuracy.BOTH),
        "photos of cats and dogs reaches {least:.1f} to {most:.1%} (four trainings)",
        accuracy.of_folders,
    ),
    Claim(
        label_noise.FILES,
        "finds them with an AUROC of {random_aum:.2f} where CIFAR-10's labels were flipped at random, "
        "{similar_aum:.2f} where similar classes were mixed up, {cats_aum:.2f} on photos of cats and dogs and "
        "{folder_aum:.2f} on a folder of drawn animals",
        label_noise.of_moe,
    ),
    Claim(reliability.RESUME, "bit-identical in {equal} of {cells} cells", reliability.equal_cells),
    Claim(reliability.COST, "The guard costs {cost_percent:.2f} % of the CPU time of a step"),
]
DEFINITIONS = [
    Definition("Brackets are 95 % intervals over seeds", "the level of `benchmarks/study.py`"),
    Definition("`fit FOLDER` on 2,048 photos", "the data"),
]
