"""How large the house is: modules, lines and statements by folder, modules that one other imports, import cycles.

    python -m benchmarks counts                  # of this checkout
    python -m benchmarks counts path/to/checkout

Lines are those of the files; statements (of the syntax tree, docstrings left out) don't change when a line is broken.
An import inside a function or under TYPE_CHECKING is an edge too, but cycles count only what runs at import.
"""

from __future__ import annotations

import ast
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from benchmarks.house import put

PACKAGE = "moevision"


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    names = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def statements(tree: ast.AST) -> int:
    """Statements that do something: docstrings don't."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in found)


def imports(tree: ast.AST, known: dict[str, Path], at_import: bool) -> set[str]:
    """Modules of the package that a module imports."""
    found: set[str] = set()
    for node in _visited(tree, at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known.keys()) or {node.module}
    return found & known.keys()


def _visited(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _visited(child, at_import)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; none if there is no such circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def count(root: Path) -> dict[str, Any]:
    """What the table shows, of the checkout in `root`."""
    known = modules(root)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in known.items()}
    folders: dict[str, Counter[str]] = {}
    for name, path in known.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        size = Counter(modules=1, lines=lines, statements=statements(trees[name]))
        folders.setdefault(str(path.parent.relative_to(root)), Counter()).update(size)
    graph = {name: imports(tree, known, at_import=False) - {name} for name, tree in trees.items()}
    importers = Counter(other for others in graph.values() for other in others)
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    eager = {name: imports(tree, known, at_import=True) - {name} for name, tree in trees.items()}
    return {
        **sum(folders.values(), Counter()),
        "folders": {name: dict(size) for name, size in sorted(folders.items())},
        "largest_folder": max(size["modules"] for size in folders.values()),
        "single_importers": sum(importers[name] == 1 for name in known.keys() - packages),
        "cycle": cycle(eager),
    }


def main() -> None:
    """Count and print."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--record", metavar="NAME", help="write into benchmarks/house/record.json, such as `after`")
    options = parser.parse_args()
    found = count(options.checkout)
    print(f"{'folder':32} {'modules':>7} {'lines':>7} {'statements':>10}")
    for name, size in (*found["folders"].items(), ("all", found)):
        print(f"{name:32} {size['modules']:7} {size['lines']:7} {size['statements']:10}")
    print(f"largest folder: {found['largest_folder']} modules")
    print(f"imported by exactly one other: {found['single_importers']} modules")
    print(f"import cycle: {' -> '.join(found['cycle']) or 'none'}")
    if options.record:
        put(options.record, "counts", found, options.checkout / PACKAGE)


if __name__ == "__main__":
    main()
