"""Do the tests notice a wrong line? A seeded sample of small changes, each against the tests that run that line.

    pip install coverage
    OMP_NUM_THREADS=1 python -m benchmarks mutation map                 # which test runs which line
    OMP_NUM_THREADS=1 python -m benchmarks mutation run --jobs 2        # goes on where it stopped
    python -m benchmarks mutation run --again TEST... --only TEXT       # survivors whose key holds TEXT; needs no map
    python -m benchmarks mutation table                                 # killed, survived, equivalent by area

A change (mutant) swaps a comparison, an arithmetic or a boolean operator, min and max, moves a number, turns a
condition round, or leaves a statement out. It is killed when a test fails, or runs far longer than it did. A mutant
that no test can tell from the original is equivalent: it stands in `mutation_equivalent.json` with the reason.

Not mutated: annotations, docstrings, strings, decorators and what is raised. The map is of the tests that `pytest`
runs; what survives them may meet deep ones by `--again`. Tests that start processes of their own count for no line.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "mutation.json"
EQUIVALENT = ROOT / "benchmarks" / "mutation_equivalent.json"
AREAS = {
    "layers": ["layers/*.py"],
    "losses": ["losses.py"],
    "task": ["train/task.py"],
    "guard": ["train/guard.py"],
    "resume": ["train/resume.py", "train/checkpoint.py"],
    "sharded": ["train/parallel/parts.py"],
    "scores": ["train/scores.py", "data/scores.py"],
    "splits": ["data/splits.py"],
    "tables": ["data/tables.py"],
    "transforms": ["data/transforms.py"],
    "finish": ["train/finish.py", "train/start.py"],
    "readings": ["analysis/readings.py", "analysis/images.py"],
    "swap": ["analysis/questions.py"],
    "intervention": ["analysis/intervention.py"],
}
TESTS = (
    *("layers", "models", "train", "data", "analysis", "commands"),
    *("test_losses.py", "test_metrics.py", "test_safety.py", "test_configs.py"),
)
SKIPPED_FOLDERS = shutil.ignore_patterns(".git", "__pycache__", "runs", ".*cache", "*.png", "*.jpg")
BUDGET_S = 10.0  # CPU seconds of tests that a mutant meets, as measured by `map`
AGAIN_S = 60.0  # that tests which are named may take

LOADED = (
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "torchmetrics",
    "scipy.stats",
    "hypothesis",
    "pytest",
)
# A plugin may come with what was loaded before forking.
_LOADED_BEFORE = "ignore::pytest.PytestAssertRewriteWarning"

_SWAPS: dict[type, type] = {}
"""Operator -> what stands in its place."""
for _one, _other in (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.BitAnd, ast.BitOr),
    (ast.And, ast.Or),
):
    _SWAPS |= {_one: _other, _other: _one}
_SWAPS |= {ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}
_NAMES |= {"floor": "ceil", "ceil": "floor", "clamp_min": "clamp_max", "clamp_max": "clamp_min"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: `old`, the bytes from `start` to `stop` of a function or class, becomes `new`."""

    area: str
    file: str
    line: int
    start: int
    stop: int
    old: str
    new: str
    function: str

    @property
    def key(self) -> str:
        """A name that outlives changes elsewhere in the file."""
        text = f"{self.file}:{self.function}:{self.old}->{self.new}"
        if len(text) < 160:
            return text
        return f"{text[:140]}…{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def swapped(node: Any, **changed: Any) -> str:
    """The same expression with other fields, in brackets."""
    fields = {name: getattr(node, name) for name in node._fields}
    return f"({ast.unparse(type(node)(**{**fields, **changed}))})"


def changes(node: ast.AST) -> Iterator[tuple[Any, str]]:
    """What may stand in the place of a node, or of its condition."""
    match node:
        case ast.AugAssign() | ast.Raise() | ast.Expr(value=ast.Call()):
            yield node, "pass"
        case ast.If(test=test) | ast.IfExp(test=test):
            yield test, f"(not ({ast.unparse(test)}))"
        case ast.Compare(ops=[first, *others]):
            yield node, swapped(node, ops=[_SWAPS[type(first)](), *others])
        case ast.BinOp(op=operator) if type(operator) in _SWAPS and not _is_text(node):
            yield node, swapped(node, op=_SWAPS[type(operator)]())
        case ast.BoolOp(op=operator):
            yield node, swapped(node, op=_SWAPS[type(operator)]())
        case ast.UnaryOp(op=ast.USub(), operand=operand) if _is_number(operand):
            return
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)):
            yield node, str(value + 1)
        case ast.Constant(value=float(value)):
            yield node, repr(value * 2 if value else 1.0)
        case ast.Attribute(attr=name) if name in _NAMES:
            yield node, f"{ast.unparse(node.value)}.{_NAMES[name]}"
        case ast.Name(id=name) if name in _NAMES:
            yield node, _NAMES[name]


def parts(node: ast.AST) -> Iterable[ast.AST]:
    """The nodes inside one that may change: no annotation, decorator, docstring or text."""
    match node:
        case ast.FunctionDef(args=arguments, body=body):
            return [*arguments.defaults, *filter(None, arguments.kw_defaults), *body]
        case ast.ClassDef(body=body):
            return body
        case ast.AnnAssign(value=value):
            return filter(None, [value])
        case ast.Assign(value=ast.Subscript() as value):
            is_type = ast.unparse(value).startswith(("Literal", "Callable"))
            return [] if is_type else [value]
        case (
            ast.Assign(value=value)
            | ast.AugAssign(value=value)
            | ast.Expr(value=ast.Call() as value)
        ):
            return [value]
        case ast.Raise() | ast.JoinedStr() | ast.Expr():
            return []
    return ast.iter_child_nodes(node)


def find_changes(node: ast.AST, scope: str = "") -> Iterator[tuple[Any, str, str]]:
    """Every change below a node: what is replaced, by which text, and the function or class around it."""
    if isinstance(node, ast.If | ast.IfExp) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        scope = f"{scope}.{node.name}".removeprefix(".")
    for target, new in changes(node):
        yield target, new, scope
    for part in parts(node):
        yield from find_changes(part, scope)


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr | ast.Constant) and not _is_number(side) for side in sides
    )


def mutants_of(area: str, path: Path) -> Iterator[Mutant]:
    """Every change of a file."""
    source = path.read_bytes()
    starts = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
    for node, new, scope in find_changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        old = source[start:stop].decode()
        if new != old:
            place = (area, str(path.relative_to(ROOT)), node.lineno, start, stop)
            yield Mutant(*place, old, new, scope)


def all_mutants() -> list[Mutant]:
    """Every change that the areas allow."""
    found = []
    for area, patterns in AREAS.items():
        for path in sorted(p for pattern in patterns for p in (ROOT / "moevision").glob(pattern)):
            found += mutants_of(area, path)
    return list({mutant.key: mutant for mutant in found}.values())


def sample(number: int, seed: int) -> list[Mutant]:
    """A third of the sample shared evenly by the areas, so that small ones count too, the rest from all lines alike."""
    chance = random.Random(seed)
    everything = all_mutants()
    chosen: dict[str, Mutant] = {}
    for area in AREAS:
        of_area = [mutant for mutant in everything if mutant.area == area]
        share = min(len(of_area), number // 3 // len(AREAS))
        chosen |= {m.key: m for m in chance.sample(of_area, share)}
    rest = [mutant for mutant in everything if mutant.key not in chosen]
    chosen |= {m.key: m for m in chance.sample(rest, number - len(chosen))}
    return sorted(chosen.values(), key=lambda m: (m.file, m.start))


class _Watch:
    """Switches coverage to each test's name and notes the CPU seconds it took."""

    def __init__(self, coverage: Any) -> None:
        self.coverage, self.seconds, self.failed = coverage, {}, set()

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.coverage.switch_context(nodeid)
        self.began = time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        self.seconds[nodeid] = time.process_time() - self.began

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.add(report.nodeid)


def make_map(file: Path) -> None:
    """Run the tests once and write which of them run which lines; tests that fail as it is are left out."""
    import coverage
    import pytest

    files = [
        str(ROOT / "moevision" / pattern) for patterns in AREAS.values() for pattern in patterns
    ]
    measure = coverage.Coverage(data_file=None, include=files)
    watch = _Watch(measure)
    sys.path.insert(0, str(ROOT))
    measure.start()
    measure.switch_context("import")
    paths = [f"tests/{name}" for name in TESTS if (ROOT / "tests" / name).exists()]
    tier = "not (alone or browser or deep or docs or studies)"  # what `pytest` runs
    pytest.main(["-q", "-n", "0", "-m", tier, "-p", "no:cacheprovider", *paths], plugins=[watch])
    measure.stop()
    data = measure.get_data()
    names = sorted(watch.seconds.keys() - watch.failed)
    number = {"import": -1} | {name: place for place, name in enumerate(names)}
    lines = {
        str(Path(path).relative_to(ROOT)): {
            line: sorted(number[name] for name in set(contexts) if name in number)
            for line, contexts in data.contexts_by_lineno(path).items()
        }
        for path in data.measured_files()
    }
    seconds = [watch.seconds[name] for name in names]
    file.write_text(json.dumps({"tests": names, "seconds": seconds, "lines": lines}))
    print(f"{len(names)} tests, left out because they fail: {sorted(watch.failed)}")


def covering(known: dict[str, Any], mutant: Mutant) -> list[str]:
    """The tests that run the mutant's line, those of its own folder first, then the quick ones.

    A line that runs at import is run by every test that runs any line of the file.
    """
    lines = known["lines"].get(mutant.file, {})
    numbers = set(lines.get(str(mutant.line), []))
    if numbers <= {-1}:
        numbers = {n for of_line in lines.values() for n in of_line}
    folder = mutant.file.removeprefix("moevision/").split("/")[0].removesuffix(".py")

    def order(n: int) -> tuple[bool, float]:
        return folder not in known["tests"][n], known["seconds"][n]

    return [known["tests"][n] for n in sorted(numbers - {-1}, key=order)]


def budgeted(known: dict[str, Any], tests: list[str], seconds: float) -> tuple[list[str], float]:
    """As many of the tests as take at most this long, at least one; and how long they take."""
    time_of = dict(zip(known["tests"], known["seconds"], strict=True))
    total, taken = 0.0, []
    for test in tests:
        if taken and total + time_of[test] > seconds:
            continue
        taken.append(test)
        total += time_of[test]
    return taken, total


def _in_child(tree: Path, tests: list[str], seconds: float) -> str:
    """Run tests in a fork of this process, which has torch loaded, on the moevision of `tree`."""
    child = os.fork()
    if child == 0:
        os.setsid()
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silent, descriptor)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path.insert(0, str(tree))
        for name in [name for name in sys.modules if name.partition(".")[0] == "moevision"]:
            del sys.modules[name]  # `python -m benchmarks` has loaded the unchanged one
        code = 99
        try:
            import pytest

            quiet = ["-x", "-q", "-p", "no:cacheprovider", "-W", _LOADED_BEFORE]
            code = int(pytest.main([*quiet, *tests]))
        finally:
            os._exit(code)
    limit = time.monotonic() + 40 + 4 * seconds
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end_group(child)
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.05)
    _end_group(child)
    os.waitpid(child, 0)
    return "timeout"


def _end_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def judge(home: Path, known: dict[str, Any], again: list[str], mutant: Mutant) -> dict[str, Any]:
    """Put the change into the worker's tree, run the tests that cover it (or those of `again`), and take it back."""
    tree = home / str(os.getpid())
    target = tree / mutant.file
    original = target.read_bytes()
    tests = [] if again else covering(known, mutant)
    some, seconds = (again, AGAIN_S) if again else budgeted(known, tests, BUDGET_S)
    began = time.monotonic()
    try:
        target.write_bytes(original[: mutant.start] + mutant.new.encode() + original[mutant.stop :])
        outcome = _in_child(tree, some, seconds) if some else "not covered"
    finally:
        target.write_bytes(original)
    facts = {k: v for k, v in asdict(mutant).items() if k not in ("start", "stop")}
    covered = {} if again else {"covering_tests": len(tests)}
    result = {"outcome": outcome, **covered, "ran": len(some)}
    return {"key": mutant.key, **facts, **result, "wall_s": round(time.monotonic() - began, 1)}


def left_to_judge(record: dict[str, Any], options: Namespace) -> list[Mutant]:
    """The mutants of the sample that have no outcome yet; with --again, those that no test has failed on."""
    if options.again:  # be it that a busy machine took too long; the code may have changed
        alive = {row["key"] for row in record["mutants"] if row["outcome"] != "killed"}
        left = [mutant for mutant in all_mutants() if mutant.key in alive]
    else:
        done = {row["key"] for row in record["mutants"]}
        left = [mutant for mutant in sample(options.number, options.seed) if mutant.key not in done]
    left = [mutant for mutant in left if options.only in mutant.key]
    random.Random(options.seed).shuffle(left)
    return left


def begin_worker(home: Path, known: dict[str, Any], again: list[str]) -> None:
    """Copy the tree for a worker, a process of its own. Nothing is judged unless tests pass on it as it is."""
    tree = home / str(os.getpid())
    shutil.copytree(ROOT, tree, ignore=SKIPPED_FOLDERS)
    tests, seconds = (again, AGAIN_S) if again else budgeted(known, known["tests"], 1.0)
    if _in_child(tree, tests, seconds) != "survived":
        raise RuntimeError(f"these tests don't pass on an unchanged copy: {tests}")


def run(options: Namespace) -> None:
    """Judge what is left; each worker is a fork of this process, with a copy of the tree of its own."""
    from benchmarks.lines import write_lines
    from moevision.train.provenance import git_state

    known = {} if options.again else json.loads(options.map.read_text())
    record = json.loads(options.out.read_text()) if options.out.exists() else {"mutants": []}
    left = left_to_judge(record, options)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in LOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as home:
        begin = (Path(home), known, options.again)
        judge_one = partial(judge, *begin)
        with get_context("fork").Pool(options.jobs, begin_worker, begin) as workers:
            for row in workers.imap_unordered(judge_one, left):
                rows = {each["key"]: each for each in record["mutants"]}
                rows[row["key"]] = rows.get(row["key"], {}) | row
                record["mutants"] = [rows[key] for key in sorted(rows)]
                record["code"] = git_state(ROOT)
                if not options.again:  # else the sample was drawn before, from what there was then
                    drawn = {"number": options.number, "of": len(all_mutants())}
                    record |= {"seed": options.seed, **drawn}
                write_lines(options.out, record)
                print(f"{row['outcome']:11s} {row['wall_s']:6.1f} s {row['key'][:110]}", flush=True)


def table(options: Namespace) -> str:
    """Markdown of the record; survivors that have no reason are told on standard error."""
    from benchmarks.records.trainings import mutants

    record, reasons = json.loads(options.out.read_text()), json.loads(EQUIVALENT.read_text())
    for row in record["mutants"]:
        if row["outcome"] in ("survived", "not covered") and row["key"] not in reasons:
            change = f"{row['function']}: {row['old']} -> {row['new']}"
            print(f"{row['outcome']}: {row['file']}:{row['line']} {change}", file=sys.stderr)
    head = "| area | mutants | killed | survived | equivalent | killed of the others |"
    line = "| {area} | {mutants} | {killed} | {survived} | {equivalent} | {share:.0%} |"
    rows = [line.format_map(row) for row in mutants(record, reasons)]
    return "\n".join([head, "|---|--:|--:|--:|--:|--:|", *rows])


def main() -> None:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["map", "run", "table"])
    tests_of_lines = ROOT / "runs" / "mutation-map.json"
    add("--map", type=Path, default=tests_of_lines, help="which test runs which line")
    add("--out", type=Path, default=RECORD, help="the record")
    add("--number", type=int, default=200, help="mutants in the sample")
    add("--seed", type=int, default=0, help="draws the sample")
    add("--jobs", type=int, default=1, help="mutants judged at a time")
    add("--only", default="", help="only mutants whose key holds this text")
    add("--again", nargs="+", default=[], metavar="TEST", help="judge survivors again, by these")
    options = parser.parse_args()
    options.map.parent.mkdir(parents=True, exist_ok=True)
    if options.what == "map":
        make_map(options.map)
    elif options.what == "run":
        run(options)
    else:
        print(table(options))
