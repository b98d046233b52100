"""Frozen studies: what `recompute.py` says of the record beside it, page by page.

The code that ran a frozen study has left the tree; its README names the commit that has it. `benchmarks/test_frozen.py`
checks the scripts.
"""

import importlib.util
from collections import defaultdict
from functools import cache
from pathlib import Path

from benchmarks.records import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*/recompute.py"))


def statements_of(script: Path) -> dict[str, list[str]]:
    """What a script says now: page -> texts. It is loaded anew, so that a changed record is read."""
    spec = importlib.util.spec_from_file_location(f"frozen_{script.parent.name}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    statements: dict[str, list[str]] = module.statements()
    return statements


@cache
def statements_by_page() -> dict[str, list[str]]:
    """What all of them say."""
    by_page: dict[str, list[str]] = defaultdict(list)
    for script in SCRIPTS:
        for page, texts in statements_of(script).items():
            by_page[page] += texts
    return by_page
