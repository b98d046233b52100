"""Frozen studies: a page says what `recompute.py` computes of the record beside it, without any code of the project."""

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import (
    ROOT,
    SCRIPTS,
    parts_of,
    pattern,
    read_record,
    statements_of,
    trees_of,
)

ALLOWED = sys.stdlib_module_names | {"numpy", "scipy"}
each_study = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)


def imported(code: str) -> set[str]:
    """The packages that code imports, wherever in it; `.` for one beside it."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else str(node.module).partition(".")[0])
    return names


def missing(statements: dict[str, list[str]], root: Path = ROOT) -> list[tuple[str, str]]:
    """Texts that don't stand in their page."""
    pages = {page: (root / page).read_text(encoding="utf-8") for page in statements}
    return [
        (page, text)
        for page, texts in statements.items()
        for text in texts
        if not pattern(text).search(pages[page])
    ]


def changed(value: Any, name: str, inside: bool = False) -> Any:
    """A record in which every number below this name is another one; also in texts of digits such as predictions."""
    if isinstance(value, dict):
        return {key: changed(entry, name, inside or key == name) for key, entry in value.items()}
    if isinstance(value, list):
        return [changed(entry, name, inside) for entry in value]
    if inside and isinstance(value, str) and value.isdigit():
        return value[1:] + value[:1]
    return 2 * value + 1 if inside and type(value) in (int, float) else value


def records_of(script: Path) -> list[Path]:
    """The records beside a script that it reads."""
    code = script.read_text(encoding="utf-8")
    return [path for path in sorted(script.parent.glob("*.json*")) if path.name in code]


def names_in(record: Any, code: str) -> list[str]:
    """The names of a record, first those that the code has."""
    names = dict.fromkeys(name for part in parts_of(record) for name in part)
    return sorted(names, key=lambda name: f'"{name}"' not in code)


@each_study
def test_a_script_imports_no_code_of_the_project(script: Path) -> None:
    assert imported(script.read_text(encoding="utf-8")) <= ALLOWED


def test_an_import_is_noticed_wherever_it_stands() -> None:
    assert imported("def f():\n    import moevision.stats\n    from . import x\n") == {
        "moevision",
        ".",
    }


@each_study
def test_records_come_from_committed_trees(script: Path) -> None:
    """Each names its commit, or beside it one record does."""
    trees = [tree for path in records_of(script) for tree in trees_of(path)]
    assert trees
    assert [tree for tree in trees if tree["dirty"]] == []


@each_study
def test_pages_say_what_a_script_computes(script: Path) -> None:
    statements = statements_of(script)
    own_page = str((script.parent / "README.md").relative_to(ROOT))
    assert statements[own_page]
    assert missing(statements) == []


def test_another_number_is_missed(tmp_path: Path) -> None:
    """Words may break elsewhere, and the minus may be the true one; a digit may not differ."""
    (tmp_path / "page.md").write_text("It gains\n−2.5 points here.")
    assert missing({"page.md": ["It gains -2.5 points"]}, tmp_path) == []
    assert missing({"page.md": ["It gains -2.4 points"]}, tmp_path) == [
        ("page.md", "It gains -2.4 points")
    ]


@each_study
def test_another_number_in_a_record_is_another_statement(script: Path, tmp_path: Path) -> None:
    """In a copy, the numbers below one name of each record are changed, until a statement is another one."""
    before, copy = statements_of(script), tmp_path / script.parent.name
    shutil.copytree(script.parent, copy)
    assert statements_of(copy / script.name) == before
    assert records_of(script)
    code = script.read_text(encoding="utf-8")
    for path in records_of(copy / script.name):
        record = read_record(path)
        names = names_in(record, code)
        assert any(says_otherwise(path, changed(record, name), before) for name in names), path.name
        shutil.copy(script.parent / path.name, path)


def says_otherwise(path: Path, record: Any, before: dict[str, list[str]]) -> bool:
    """Whether a script says something else of this record."""
    lines = map(json.dumps, record) if path.suffix == ".jsonl" else [json.dumps(record)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        return statements_of(path.with_name("recompute.py")) != before
    except (
        ArithmeticError,
        LookupError,
        ValueError,
        AssertionError,
        StopIteration,
        RuntimeWarning,
    ):
        return False  # such as a seed that no other run has
