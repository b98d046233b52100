"""The package's one-way imports."""

import ast
from pathlib import Path

import pytest

import moevision
from tests.house import imports, modules

PACKAGE = Path(moevision.__file__).parent

# layers -> {models, losses} -> efficiency; data -> {train, analysis} -> demo -> cli.
# config, errors, files, limits, stats, types and words are the floor that everyone stands on. Units of one brace
# don't import each other.
_FLOOR = {"config", "errors", "files", "limits", "stats", "types", "words"}
_MODELS = _FLOOR | {"layers"}
_NUMBERS = _MODELS | {"models", "losses"}
_TRAIN = _NUMBERS | {"efficiency", "data", "__init__"}
_DEMO = _TRAIN | {"train", "analysis"}
MAY_IMPORT: dict[str, set[str]] = {
    "words": set(),
    "limits": set(),
    "stats": {"types"},
    "types": set(),
    "errors": set(),
    "config": {"errors", "words"},
    "files": {"errors"},
    "layers": _FLOOR,
    "models": _MODELS,
    "losses": _MODELS,
    "efficiency": _NUMBERS,
    "data": _FLOOR,
    "train": _TRAIN,
    "analysis": _TRAIN,
    "demo": _DEMO,
    # The verbs name their modules in a table, demo's among them, which is imported when it is called.
    "commands": _DEMO | {"demo"},
    # Folders and names of runs are checked before torch is imported.
    "cli": {"__init__", "config", "data", "errors", "files", "words"},
    "__main__": {"cli"},
    "__init__": _NUMBERS | {"efficiency"},
}


def imported_modules(source: str, package: str) -> set[str]:
    """Dotted names of all moevision modules that a file imports, wherever in it the import stands.

    `package` is the dotted package that holds the file, from which relative imports are counted.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = above[: len(above) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # In `from moevision import data` the module stands after the word import.
            found |= (
                {f"{start}.{alias.name}" for alias in node.names}
                if start == "moevision"
                else {start}
            )
    return {name for name in found if name.split(".")[0] == "moevision"}


def units_of(modules: set[str]) -> set[str]:
    """The first level below moevision of each module; the package itself counts as `__init__`."""
    units = {[*name.split("."), "__init__"][1] for name in modules}
    # Anything else that is imported from the package is one of its public names, i.e. lives in __init__.
    return {unit if unit in MAY_IMPORT else "__init__" for unit in units}


def violations(unit: str, source: str, package: str) -> set[str]:
    return units_of(imported_modules(source, package)) - MAY_IMPORT[unit] - {unit}


def test_imports_point_one_way():
    offenders = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        below = path.relative_to(PACKAGE)
        unit = below.parts[0].removesuffix(".py")
        assert unit in MAY_IMPORT, f"give moevision.{unit} its place in MAY_IMPORT"
        package = ".".join(("moevision", *below.parent.parts))
        if found := violations(unit, path.read_text(encoding="utf-8"), package):
            offenders[str(below)] = found
    assert offenders == {}


@pytest.mark.parametrize(
    ("unit", "source", "package", "expected"),
    [
        ("layers", "from moevision.models import vit_moe", "moevision.layers", {"models"}),
        ("layers", "def f():\n    import moevision.train.task", "moevision.layers", {"train"}),
        (
            "models",
            "if TYPE_CHECKING:\n    from moevision.train.task import T",
            "moevision.models",
            {"train"},
        ),
        ("data", "from ..models import x", "moevision.data", {"models"}),
        ("data", "from .images import x\nfrom . import y\nimport torch", "moevision.data", set()),
        ("train", "from moevision import analysis", "moevision.train", {"analysis"}),
        ("models", "from moevision import MoEMlp", "moevision.models", {"__init__"}),
        ("train", "from moevision import __version__, cli", "moevision.train", {"cli"}),
        ("losses", "from moevision.data import x", "moevision", {"data"}),
        ("train", "import moevision.analysis.trace as t", "moevision.train", {"analysis"}),
        ("losses", "from .layers.routing import Routing", "moevision", set()),
        ("efficiency", "import moevision", "moevision", {"__init__"}),
    ],
)
def test_the_rule_sees_every_kind_of_import(unit, source, package, expected):
    assert violations(unit, source, package) == expected


def test_only_parallel_imports_what_divides_tensors():
    """Nothing of moevision.train.parallel is imported before somebody asks for it."""
    known, inside = modules(PACKAGE.parent), "moevision.train.parallel"
    for name, path in known.items():
        if not name.startswith(inside):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tree.body = [
                node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            found = imports(tree, known)
            assert not [other for other in found if other.startswith(inside)], name


def test_the_picture_has_no_cycle():
    order: list[str] = []
    left = dict(MAY_IMPORT)
    while left:
        free = [unit for unit, needs in left.items() if needs <= set(order)]
        assert free, f"these import each other: {sorted(left)}"
        order += free
        left = {unit: needs for unit, needs in left.items() if unit not in free}


def test_the_products_tests_stand_without_the_benchmarks():
    """Benchmarks use what is in tests/, not the other way round."""
    using = {}
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
        if found := {name for name in names if name.partition(".")[0] == "benchmarks"}:
            using[path.name] = found
    assert using == {}
