"""How large the house is: modules, lines, tokens and statements by folder, single importers, import circles.

    python -m benchmarks counts                  # of this checkout
    python -m benchmarks counts path/to/checkout

Lines are those of the files. Tokens are those of Python's tokenizer without docstrings, comments, line breaks and
indents; an f-string is one. They and statements (of the syntax tree, docstrings left out) don't change when a line is
broken. An import inside a function or under TYPE_CHECKING counts as any other, also in circles.
"""

from __future__ import annotations

import ast
import io
import tokenize
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.csgraph import connected_components

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


_UNCOUNTED = {*(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)}
# From Python 3.12 an f-string is many tokens.
_F_BEGIN, _F_END = getattr(tokenize, "FSTRING_START", -1), getattr(tokenize, "FSTRING_END", -1)


def tokens(source: str) -> int:
    """What the code says, however its lines are broken."""
    texts = {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    found = inside = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        inside -= token.type == _F_END
        docstring = token.type == tokenize.STRING and token.start in texts
        found += not (inside or docstring or token.type in _UNCOUNTED or token.type == _F_END)
        inside += token.type == _F_BEGIN
    return found


def imports(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known.keys()) or {node.module}
    return found & known.keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, by some way, every other of its group."""
    names = sorted(graph)
    edges = np.array([[other in graph[name] for other in names] for name in names])
    _, group = connected_components(edges, connection="strong")
    return [[names[i] for i in np.flatnonzero(group == g)] for g in np.flatnonzero(np.bincount(group) > 1)]


def count(root: Path) -> dict[str, Any]:
    """What the table shows, of the checkout in `root`."""
    known = modules(root)
    sources = {name: path.read_text(encoding="utf-8") for name, path in known.items()}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    folders: dict[str, Counter[str]] = {}
    for name, path in known.items():
        lines = len(sources[name].splitlines())
        size = Counter(modules=1, lines=lines, tokens=tokens(sources[name]), statements=statements(trees[name]))
        folders.setdefault(str(path.parent.relative_to(root)), Counter()).update(size)
    graph = {name: imports(tree, known) - {name} for name, tree in trees.items()}
    importers = Counter(other for others in graph.values() for other in others)
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    return {
        **sum(folders.values(), Counter()),
        "folders": {name: dict(size) for name, size in sorted(folders.items())},
        "largest_folder": max(size["modules"] for size in folders.values()),
        "single_importers": sum(importers[name] == 1 for name in known.keys() - packages),
        "circles": circles(graph),
    }


def main() -> None:
    """Count and print."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--record", metavar="NAME", help="write into benchmarks/house/record.json, such as `after`")
    options = parser.parse_args()
    found = count(options.checkout)
    print(f"{'folder':32} {'modules':>7} {'lines':>7} {'tokens':>7} {'statements':>10}")
    for name, size in (*found["folders"].items(), ("all", found)):
        print(f"{name:32} {size['modules']:7} {size['lines']:7} {size['tokens']:7} {size['statements']:10}")
    print(f"largest folder: {found['largest_folder']} modules")
    print(f"imported by exactly one other: {found['single_importers']} modules")
    for circle in found["circles"]:
        print(f"import circle: {', '.join(circle)}")
    if options.record:
        put(options.record, "counts", found, options.checkout / PACKAGE)


if __name__ == "__main__":
    main()
