"""docs/export.md."""

from tests.records import Definition

DEFINITIONS = [
    Definition("holds at most 2 GB", "a limit of the format"),
    Definition("checked with 5.24", "a version"),
    Definition("moevision 0.1", "a version"),
]
