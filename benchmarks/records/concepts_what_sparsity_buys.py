"""docs/concepts/what-sparsity-buys.md: its table is what `python -m benchmarks ideas` makes of the records."""

from typing import Any

from benchmarks.ideas import ideas, read_all
from benchmarks.records import (
    Claim,
    Definition,
    accuracy,
    performance,
    small,
    sparsity,
    specialization,
    upcycling,
    waiting,
)
from benchmarks.records.studies import shown

FILES = (
    *(*sparsity.FILES, *specialization.FILES, *specialization.BUNDLED, *specialization.SEEDS, waiting.RUNS),
    *(performance.TRAIN.format("cifar10"), accuracy.TWIN, *accuracy.CIFAR, upcycling.STUDY, small.FILES),
)


def _rows(*_: Any) -> list[dict[str, str]]:
    return shown(line for line in ideas(read_all()).splitlines() if "--" not in line)


CLAIMS = [
    Claim(FILES, "{text}", _rows),
    Claim(FILES, "with {moe:.0%} of a model's FLOPs in experts.", sparsity.shares),
    Claim(FILES, "The shipped models have {least_percent:.0f} to {most:.0%}.", sparsity.shares),
]
DEFINITIONS = [
    Definition("in brackets 95 % intervals over seeds", "the level of `benchmarks/study.py`"),
]
