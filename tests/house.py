"""How large the package is and how dense its sentences are, counted at one fixed layout.

Whatever layout the repository has, a copy of the package is formatted first (`ruff`, 120 columns, magic trailing commas
skipped, no `# fmt: skip`), so that a number moves only when the code says something else.

- Tokens are those of Python's tokenizer without docstrings, comments, line breaks and indents; an f-string is one.
- A line of code is a line that holds such a token.
- The density of a function is its body's tokens a line: without decorators and signature, nested functions included.
- An import inside a function or under TYPE_CHECKING counts as any other, also in circles.
"""

import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.sparse.csgraph import connected_components

PACKAGE = "moevision"

LAYOUT = ("--isolated", "--line-length", "120", "--config", "format.skip-magic-trailing-comma=true")
SHORT_FUNCTION = 8  # lines of code below which a function's density isn't counted
LONG_FUNCTION = 400  # tokens of its body above which a function is long

_UNCOUNTED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
# From Python 3.12 on an f-string is many tokens.
_FSTRING_START = getattr(tokenize, "FSTRING_START", -1)
_FSTRING_END = getattr(tokenize, "FSTRING_END", -1)


# ---- modules and their source


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package below `root` by its dotted name."""
    paths = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def sources_at_fixed_layout(paths: dict[str, Path]) -> dict[str, str]:
    """Source of each module by its name, formatted by `LAYOUT`."""
    with tempfile.TemporaryDirectory() as folder:
        copies = {name: Path(folder, f"{name}.py") for name in paths}
        for name, copy in copies.items():
            source = paths[name].read_text(encoding="utf-8")
            copy.write_text(re.sub(r"\s*# fmt: (skip|off|on)\b", "", source), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "ruff", "format", "--quiet", *LAYOUT, folder], check=True
        )
        return {name: copy.read_text(encoding="utf-8") for name, copy in copies.items()}


# ---- tokens


def token_lines(source: str) -> list[tuple[int, int]]:
    """First and last line of every token that says something, in order."""
    docstrings = {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    lines, open_fstrings = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == _FSTRING_END:
            open_fstrings -= 1
            continue
        is_docstring = token.type == tokenize.STRING and token.start in docstrings
        if not (open_fstrings or is_docstring or token.type in _UNCOUNTED):
            lines.append((token.start[0], token.end[0]))
        open_fstrings += token.type == _FSTRING_START
    return lines


def tokens(source: str) -> int:
    """What the code says, however its lines are broken."""
    return len(token_lines(source))


def code_lines(tokens_of_code: list[tuple[int, int]]) -> int:
    """Lines that hold at least one of these tokens."""
    return len({line for first, last in tokens_of_code for line in range(first, last + 1)})


# ---- functions


@dataclass(frozen=True)
class Function:
    """A function with its lines of code and, of its body, tokens and lines of code."""

    name: str
    lines: int
    body_tokens: int
    body_lines: int

    @property
    def density(self) -> float:
        """Tokens of the body a line of code."""
        return self.body_tokens / self.body_lines


def functions(module: str, source: str) -> Iterator[Function]:
    """Every function and method of a module, nested ones too; those without a statement are left out."""
    all_tokens = token_lines(source)

    def between(first: int, last: int) -> list[tuple[int, int]]:
        return [token for token in all_tokens if first <= token[0] <= last]

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            body = between(node.body[0].lineno, node.end_lineno)
            if body:
                whole = between(node.lineno, node.end_lineno)
                yield Function(
                    f"{module}.{node.name}", code_lines(whole), len(body), code_lines(body)
                )


# ---- imports


def imports(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, wherever in it the import stands."""
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            imported |= submodules or {node.module}
    return imported & known.keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, by some way, every other of its group."""
    names = sorted(graph)
    edges = np.array([[other in graph[name] for other in names] for name in names])
    _, group = connected_components(edges, connection="strong")
    return [
        [names[i] for i in np.flatnonzero(group == g)]
        for g in np.flatnonzero(np.bincount(group) > 1)
    ]


# ---- everything that is counted


def count(root: Path) -> dict[str, Any]:
    """Sizes and densities of the package below `root`; `folders` has modules, lines of code and tokens of each."""
    paths = modules(root)
    sources = sources_at_fixed_layout(paths)
    trees = {name: ast.parse(source) for name, source in sources.items()}

    folders: dict[str, Counter[str]] = {}
    for name, path in paths.items():
        module_tokens = token_lines(sources[name])
        size = Counter(modules=1, code_lines=code_lines(module_tokens), tokens=len(module_tokens))
        folders.setdefault(str(path.parent.relative_to(root)), Counter()).update(size)
    total = sum(folders.values(), Counter())

    every_function = [
        function for name, source in sources.items() for function in functions(name, source)
    ]
    densities = [
        function.density for function in every_function if function.lines >= SHORT_FUNCTION
    ]
    long_functions = {
        each.name: each.body_tokens for each in every_function if each.body_tokens > LONG_FUNCTION
    }
    conditionals = sum(
        isinstance(node, ast.IfExp) for tree in trees.values() for node in ast.walk(tree)
    )

    graph = {name: imports(tree, paths) - {name} for name, tree in trees.items()}
    importers = Counter(other for others in graph.values() for other in others)
    packages = {name for name, path in paths.items() if path.name == "__init__.py"}
    return {
        **total,
        "tokens_a_line": total["tokens"] / total["code_lines"],
        "median_tokens_a_line_of_functions": median(densities),
        "long_functions": dict(sorted(long_functions.items(), key=lambda item: -item[1])),
        "conditional_expressions_per_1000_lines": 1000 * conditionals / total["code_lines"],
        "folders": {name: dict(size) for name, size in sorted(folders.items())},
        "largest_folder": max(size["modules"] for size in folders.values()),
        "single_importers": sum(importers[name] == 1 for name in paths.keys() - packages),
        "circles": circles(graph),
    }
