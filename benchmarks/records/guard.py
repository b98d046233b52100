"""benchmarks/guard/README.md."""

from benchmarks.records import Definition

DEFINITIONS = [
    Definition("6 standard deviations, 25 % and 0.1", "defaults of `moevision/train/guard.py`")
]
