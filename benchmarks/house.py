"""How large the house is: modules, lines and statements by folder, modules that one other imports, import cycles.

    python benchmarks/house.py                  # of this checkout
    python benchmarks/house.py path/to/checkout

Lines are those of the files; statements (of the syntax tree, docstrings left out) don't change when a line is broken.
An import inside a function or under TYPE_CHECKING is an edge too, but cycles count only what runs at import.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

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


def main() -> None:
    """Count and print."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    known = modules(root)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in known.items()}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in known.items()}
    folders = Counter(str(path.parent.relative_to(root)) for path in known.values())
    print(f"{'folder':32} {'modules':>7} {'lines':>7} {'statements':>10}")
    for folder in sorted(folders):
        inside = [name for name, path in known.items() if str(path.parent.relative_to(root)) == folder]
        amount = sum(statements(trees[name]) for name in inside)
        print(f"{folder:32} {len(inside):7} {sum(lines[name] for name in inside):7} {amount:10}")
    total = sum(map(statements, trees.values()))
    print(f"{'all':32} {len(known):7} {sum(lines.values()):7} {total:10}")
    graph = {name: imports(tree, known, at_import=False) - {name} for name, tree in trees.items()}
    importers = Counter(other for others in graph.values() for other in others)
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    print(f"largest folder: {max(folders.values())} modules")
    print(f"imported by exactly one other: {sum(importers[name] == 1 for name in known.keys() - packages)} modules")
    eager = {name: imports(tree, known, at_import=True) - {name} for name, tree in trees.items()}
    print(f"import cycle: {' -> '.join(cycle(eager)) or 'none'}")


if __name__ == "__main__":
    main()
