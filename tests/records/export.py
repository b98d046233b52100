"""docs/export.md."""

from tests.records import Definition

DEFINITIONS = [Definition("holds at most 2 GB", "a limit of the format")]
