"""Frozen studies: a page says what `recompute.py` computes of the record beside it, without any code of the project."""

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import ROOT, pattern, read_record, trees_of
from benchmarks.records.frozen import SCRIPTS, statements_of

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


Place = tuple[Any, Any]
"""A number of a record, or a text of digits such as predictions: its container and its key there."""


def places_of(value: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Place]]:
    """Each of them with the names that lead to it; entries of a list have none."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        path = (*names, key) if isinstance(key, str) else names
        if isinstance(entry, dict | list):
            yield from places_of(entry, path)
        elif type(entry) in (int, float) or (isinstance(entry, str) and entry.isdigit()):
            yield path, (value, key)


def records_of(script: Path) -> list[Path]:
    """The records beside a script that it reads."""
    code = script.read_text(encoding="utf-8")
    return [path for path in sorted(script.parent.glob("*.json*")) if path.name in code]


def write_record(path: Path, record: Any) -> None:
    """As `read_record` reads it."""
    lines = map(json.dumps, record) if path.suffix == ".jsonl" else [json.dumps(record)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_of_each_name(record: Any, code: str) -> list[Place]:
    """One number for each way of names through a record; first those whose names the code has."""
    first: dict[tuple[str, ...], Place] = {}
    for path, place in places_of(record):
        first.setdefault(path, place)
    return [
        first[path]
        for path in sorted(first, key=lambda path: sum(f'"{name}"' not in code for name in path))
    ]


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
    """In a copy, one number of each record is changed at a time, until a statement is another one."""
    before, copy = statements_of(script), tmp_path / script.parent.name
    shutil.copytree(script.parent, copy)
    assert statements_of(copy / script.name) == before
    assert records_of(script)
    code = script.read_text(encoding="utf-8")
    for path in records_of(copy / script.name):
        record = read_record(path)
        numbers = first_of_each_name(record, code)
        assert any(
            changes_a_statement(record, container, key, path, before) for container, key in numbers
        ), path.name
        shutil.copy(script.parent / path.name, path)


def changes_a_statement(
    record: Any, container: Any, key: str, path: Path, before: dict[str, list[str]]
) -> bool:
    """Whether a script says something else if one number of its record is another one, which is put back."""
    number = container[key]
    container[key] = number[1:] + number[:1] if isinstance(number, str) else 2 * number + 1
    write_record(path, record)
    container[key] = number
    try:
        return statements_of(path.with_name("recompute.py")) != before
    except (ArithmeticError, LookupError, ValueError, AssertionError, StopIteration):
        return False  # such as a seed that no other run has
