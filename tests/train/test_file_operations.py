"""Every file operation of a save, one by one: the disk refuses it, the process dies in it, or the power goes after it.

In the spirit of SQLite's tests (https://www.sqlite.org/testing.html, §3): a shim stands in for `os` in
`moevision/files.py`, where all of a training's files are written, numbers the operations and strikes at the n-th. For
the power cut the operations are recorded and replayed: what no fsync has made lasting may be there or not. A file's
bytes that weren't flushed are missing, half there or all there; of the names that weren't flushed with their folder
(made, renamed, folders too) any subset is there. That is harsher than any file system we know.

    python tests/train/test_file_operations.py    # writes benchmarks/reliability/file_operations.json
"""

import csv
import errno
import hashlib
import io
import itertools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from moevision import files as files_module
from moevision.files import write_json_atomic
from moevision.train.checkpoint import BEST, LAST, PREVIOUS, SafeCheckpointIO, newest_valid, verify
from moevision.train.health import MetricsFile
from moevision.train.resume import find_start

pytestmark = pytest.mark.deep

RECORD = Path(__file__).parents[2] / "benchmarks" / "reliability" / "file_operations.json"
BEFORE, NOW = 2, 3  # optimizer steps: of the checkpoint that is there, and of the one that is saved
DIED = 9
Operation = tuple[str, ...]


class Training:
    """What a training does with files between two steps: a row of metrics, last.ckpt, and the epoch's best.ckpt."""

    def __init__(self, run: Path) -> None:
        self.run, self.files, self.metrics = run, SafeCheckpointIO(), MetricsFile(run / "metrics.csv")
        self.saved: list[str] = []

    def save(self, step: int, done: Callable[[str], None] = lambda name: None, columns: int = 1) -> None:
        self.metrics.log_metrics({f"loss{column}": float(step) for column in range(columns)}, step)
        self.metrics.save()
        for name in (LAST, BEST):
            state = {"w": torch.full((50,), float(step))}
            checkpoint = {"global_step": step, "state_dict": state, "rows": self.metrics.sync()}
            path = self.run / "checkpoints" / name
            self.files.save_checkpoint(checkpoint, path)
            if path.resolve() not in self.files.refused:
                done(name)


def begun(run: Path) -> Path:
    """A run with two checkpoints, and all of it on the disk."""
    files_module.make_folder(run)
    training = Training(run)
    for step in range(1, BEFORE + 1):
        training.save(step)
    return run


def unborn(run: Path) -> Path:
    """A run that has saved nothing yet; the folders above it are on the disk."""
    run.parent.mkdir(parents=True)
    return run


# What is there before, the earliest step that must be found when nothing new was completed, and columns of the new row.
STARTS: dict[str, tuple[Callable[[Path], Path], int, int]] = {
    "a save": (begun, BEFORE, 1),
    "a save with a new column in metrics.csv": (begun, BEFORE, 2),
    "the first save": (unborn, 0, 1),
}


def lost(run: Path, least: int) -> str:
    """What a next start would miss, in words; "" if it finds a valid checkpoint of at least this step and all rows."""
    with suppress_sentences():
        start = find_start(run, fresh_if_none=True)
    if start.step < least:
        return f"step {start.step}"
    if left := [path.name for path in run.rglob("*.tmp")]:
        return f"left over: {left}"
    rows = 0
    if start.checkpoint is not None:
        _, refused = newest_valid(start.checkpoint.parent)
        if refused:
            return f"{refused[0].path.name} {refused[0].fault}"
        rows = SafeCheckpointIO().load_checkpoint(start.checkpoint)["rows"]
    training = Training(run)
    if training.metrics.rows < rows:
        return f"{rows - training.metrics.rows} rows of metrics.csv"
    training.metrics.cut(rows)
    steps = [row["step"] for row in csv.DictReader(io.StringIO(training.metrics._read()))] if rows else []
    if rows and steps != [str(step) for step in range(1, start.step + 1)][-rows:]:
        return "rows of metrics.csv are others"
    resumable = any((run / "checkpoints" / name).exists() for name in (LAST, PREVIOUS))
    training.save(NOW + 1)
    found, refused = newest_valid(run / "checkpoints")
    if found is None or refused or (found.path.name, found.step) != (LAST, NOW + 1):
        return "it can't be gone on with"
    return "" if not resumable or has_previous(run) else "the second one to go on from"


def has_previous(run: Path) -> bool:
    previous = verify(run / "checkpoints" / PREVIOUS)
    return previous.fault is None and previous.step in (BEFORE, NOW)


@contextmanager
def suppress_sentences() -> Iterator[None]:
    from contextlib import redirect_stderr

    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


class Disk:
    """Stands in for `os`: names the operations that change files, and calls `strike` before each.

    `strike(number, operation, half)` may raise or end the process; `half()` does half of a write.
    """

    def __init__(self, strike: Callable[[int, Operation, Callable[[], None]], None]) -> None:
        self.strike, self.count, self.paths = strike, 0, dict[int, str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _next(self, *operation: Any, half: Callable[[], None] = lambda: None) -> None:
        self.count += 1
        self.strike(self.count, tuple(map(str, operation)), half)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._next("create", path)
        descriptor = os.open(path, flags, mode)
        self.paths[descriptor] = str(path)
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        self._next(
            "write", self.paths[descriptor], len(data), half=lambda: os.write(descriptor, data[: len(data) // 2])
        )
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        self._next("fsync", self.paths[descriptor])
        os.fsync(descriptor)

    def replace(self, path: Any, target: Any) -> None:
        self._next("rename", path, target)
        os.replace(path, target)

    def unlink(self, path: Any) -> None:
        self._next("unlink", path)
        os.unlink(path)

    def mkdir(self, path: Any) -> None:
        self._next("mkdir", path)
        os.mkdir(path)


@contextmanager
def disk(strike: Callable[[int, Operation, Callable[[], None]], None]) -> Iterator[Disk]:
    shim = Disk(strike)
    files_module.os = shim  # type: ignore[attr-defined]
    try:
        yield shim
    finally:
        files_module.os = os  # type: ignore[attr-defined]


def recorded(run: Path, columns: int) -> list[Operation]:
    """The operations of one save, `("saved", NAME)` where a checkpoint is reported as written, and bytes for writes."""
    operations: list[Operation] = []

    def note(number: int, operation: Operation, half: Callable[[], None]) -> None:
        operations.append(operation)

    with disk(note):
        Training(run).save(NOW, lambda name: operations.append(("saved", name)), columns)
    return operations


def shown(operation: Operation, run: Path) -> str:
    """An operation in words, without folders and process numbers."""
    name = operation[0]
    if name == "fsync" and not Path(operation[1]).suffix:
        name = "fsync folder"
    return " ".join([name, *(_plain(each, run) for each in operation[1:] if not each.isdecimal())])


def _plain(path: str, run: Path) -> str:
    relative = os.path.relpath(path, run)
    if relative.startswith(".."):
        return "above"
    name = Path(relative).name
    return f"{name.rsplit('.', 3)[0]}.tmp" if name.endswith(".tmp") else relative.replace("checkpoints/", "")


# -- the disk refuses


def refused(run: Path, at: int, columns: int, code: int, *, for_good: bool, least: int) -> str:
    """The n-th operation fails, or from it on every one; then the disk works again. What was lost, in words."""

    def strike(number: int, operation: Operation, half: Callable[[], None]) -> None:
        if number == at or (for_good and number > at):
            half()
            raise OSError(code, os.strerror(code))

    training = Training(run)
    with suppress_sentences():
        try:
            with disk(strike):
                training.save(NOW, columns=columns)
        except OSError:
            return "the training ended"
        found, damaged = newest_valid(run / "checkpoints")
        if (0 if found is None else found.step) < least or damaged:
            return "a checkpoint, until the disk works again"
        training.metrics.sync()
    return lost(run, NOW if training.files.refused.keys() <= {run.resolve() / "checkpoints" / BEST} else least)


# -- the process dies


def killed(run: Path, at: int, columns: int, least: int) -> str:
    """A process of its own dies at the n-th operation (in the middle of it, if it is a write)."""
    child = os.fork()
    if child == 0:

        def strike(number: int, operation: Operation, half: Callable[[], None]) -> None:
            if number == at:
                half()
                os._exit(DIED)

        with suppress(BaseException), disk(strike):
            Training(run).save(NOW, lambda name: (run.parent / f"saved-{name}").touch(), columns)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == DIED
    return lost(run, NOW if (run.parent / f"saved-{LAST}").exists() else least)


# -- the power goes


class Replay:
    """A file system that remembers what is lasting: files by number, names by folder."""

    def __init__(self, root: Path) -> None:
        """Begin with what is in `root`, all of it lasting."""
        self.root = root
        self.bytes: list[bytes] = []  # of each file, as written
        self.lasting: list[int] = []  # how many of them were flushed
        self.names: dict[str, int | None] = {str(root): None}  # path -> file; None for a folder
        for path in sorted(root.rglob("*")):
            self.names[str(path)] = None if path.is_dir() else self._new(path.read_bytes())
        self.now = dict(self.names)
        self.pending: list[Operation] = []  # changes of names that no fsync of their folder has made lasting

    def _new(self, data: bytes) -> int:
        self.bytes.append(data)
        self.lasting.append(len(data))
        return len(self.bytes) - 1

    def do(self, operation: Operation, data: bytes = b"") -> None:
        kind, path = operation[:2]
        if kind == "write":
            self.bytes[self.now[path]] += data  # type: ignore[index]
        elif kind == "fsync" and self.now.get(path) is not None:
            self.lasting[self.now[path]] = len(self.bytes[self.now[path]])  # type: ignore[index]
        elif kind == "fsync":
            kept = [change for change in self.pending if os.path.dirname(change[1]) != path]
            for change in self.pending:
                if change not in kept:
                    _change(self.names, change)
            self.pending = kept
        elif kind != "saved":
            number = self._new(b"") if kind == "create" else self.now.get(path)
            change = (*operation, str(number))
            _change(self.now, change)
            self.pending.append(change)

    def outcomes(self) -> Iterator[dict[str, bytes | None]]:
        """Every state in which a power cut now may leave the folders: path -> bytes, None for a folder."""
        for many in range(len(self.pending) + 1):
            for subset in itertools.combinations(self.pending, many):
                names = dict(self.names)
                for change in subset:
                    _change(names, change)
                for share in (0.0, 0.5, 1.0):
                    yield {
                        path: None if number is None else self._left(number, share)
                        for path, number in names.items()
                        if all(str(folder) in names for folder in Path(path).parents if self.root in folder.parents)
                    }

    def _left(self, number: int, share: float) -> bytes:
        whole, lasting = self.bytes[number], self.lasting[number]
        return whole[: lasting + int(share * (len(whole) - lasting))]


def _change(names: dict[str, int | None], change: Operation) -> None:
    kind, path, number = change[0], change[1], None if change[-1] == "None" else int(change[-1])
    if kind in ("create", "mkdir"):
        names[path] = number
    elif kind == "unlink":
        names.pop(path, None)
    else:
        names.pop(path, None)
        names[change[2]] = number


def power_cuts(
    root: Path, run: Path, operations: list[Operation], written: list[bytes], least: int, tried: dict[str, str]
) -> Iterator[Counter]:
    """What was lost after each operation, over all states that a power cut may leave then; "" is nothing.

    One operation after the other: without flushes the states double with every new name.

    `tried` remembers states, for the same `root` and `run`.
    """
    replay, data = Replay(root), iter(written)
    for operation in operations:
        replay.do(operation, next(data) if operation[0] == "write" else b"")
        if operation == ("saved", LAST):
            least = NOW
        outcomes: Counter = Counter()
        for state in replay.outcomes():
            key = hashlib.sha256(repr((least, sorted(state.items()))).encode()).hexdigest()
            if key not in tried:
                tried[key] = _lost_in(state, root, run, least)
            outcomes[tried[key]] += 1
        yield outcomes


def _lost_in(state: dict[str, bytes | None], root: Path, run: Path, least: int) -> str:
    with tempfile.TemporaryDirectory() as elsewhere:
        for path, content in sorted(state.items()):
            place = Path(elsewhere, os.path.relpath(path, root))
            place.mkdir(exist_ok=True) if content is None else place.write_bytes(content)
        return lost(Path(elsewhere, os.path.relpath(run, root)), least)


def recorded_with_bytes(run: Path, columns: int) -> tuple[list[Operation], list[bytes]]:
    """As `recorded`, and what each write wrote."""
    written: list[bytes] = []
    real = Disk.write

    def write(self: Disk, descriptor: int, data: Any) -> int:
        written.append(bytes(data))
        return real(self, descriptor, data)

    Disk.write = write  # type: ignore[method-assign]
    try:
        return recorded(run, columns), written
    finally:
        Disk.write = real  # type: ignore[method-assign]


# -- the tests


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> tuple[Callable[[Path], Path], int, int]:
    return STARTS[request.param]


def count(tmp_path: Path, start: tuple[Callable[[Path], Path], int, int]) -> int:
    make, _, columns = start
    return len([each for each in recorded(make(tmp_path / "count" / "run"), columns) if each[0] != "saved"])


def test_all_files_are_written_in_one_place(tmp_path, start):
    """Whatever Python itself sees of changes below the folder, the shim has seen."""
    make, _, columns = start
    run, seen, listening = make(tmp_path / "runs" / "run"), Counter(), [True]
    kinds = {"os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir", "os.truncate": "truncate"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and str(arguments[:1]).find(str(run)) >= 0:
            if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                seen["create" if arguments[2] & os.O_CREAT else "append"] += 1
            elif event in kinds:
                seen[kinds[event]] += 1

    sys.addaudithook(hook)
    try:
        operations = recorded(run, columns)
    finally:
        listening.clear()
    by_the_shim = Counter(each[0] for each in operations)
    del seen["append"]
    assert seen == {kind: by_the_shim[kind] for kind in ("create", "rename", "unlink", "mkdir") if by_the_shim[kind]}
    assert by_the_shim["create"] >= 6, "metrics or not, two checkpoints and the manifest twice for each"


@pytest.mark.parametrize(
    ("code", "for_good"), [(errno.ENOSPC, False), (errno.EIO, False), (errno.EIO, True)], ids=["full", "once", "dead"]
)
def test_the_disk_refuses_any_operation(tmp_path, start, code, for_good):
    make, least, columns = start
    found = {
        at: refused(make(tmp_path / str(at) / "run"), at, columns, code, for_good=for_good, least=least)
        for at in range(1, count(tmp_path, start) + 1)
    }
    assert {at: words for at, words in found.items() if words} == {}


def test_the_process_dies_in_any_operation(tmp_path, start):
    make, least, columns = start
    found = {
        at: killed(make(tmp_path / str(at) / "run"), at, columns, least) for at in range(1, count(tmp_path, start) + 1)
    }
    assert {at: words for at, words in found.items() if words} == {}


def test_the_power_goes_after_any_operation(tmp_path, start):
    make, least, columns = start
    run = make(tmp_path / "runs" / "run")
    replay_root = Path(shutil.copytree(tmp_path / "runs", tmp_path / "before"))
    operations, written = recorded_with_bytes(run, columns)
    shutil.rmtree(tmp_path / "runs")
    shutil.move(replay_root, tmp_path / "runs")
    found = power_cuts(tmp_path / "runs", run, operations, written, least, tried := {})
    for number, outcomes in enumerate(found):
        assert set(outcomes) == {""}, f"after operation {number}"
    for kind in ("fsync of files", "fsync of folders"):
        is_folder = kind.endswith("folders")
        fewer = [each for each in operations if each[0] != "fsync" or bool(Path(each[1]).suffix) == is_folder]
        found = power_cuts(tmp_path / "runs", run, fewer, written, least, tried)
        assert any(set(outcomes) != {""} for outcomes in found), f"a missing {kind} shows"


# -- the record


def record(root: Path) -> dict[str, Any]:
    """Every start and operation: what each kind of failure loses ("nothing", or what), in plain words."""
    found = {}
    for name, (make, least, columns) in STARTS.items():
        place = root / name.replace(" ", "-")
        run = make(place / "runs" / "run")
        shutil.copytree(place / "runs", place / "before")
        operations, written = recorded_with_bytes(run, columns)
        shutil.rmtree(place / "runs")
        shutil.move(place / "before", place / "runs")
        cuts = list(power_cuts(place / "runs", run, operations, written, least, tried := {}))
        rows, at = [], 0
        for number, (operation, states) in enumerate(zip(operations, cuts, strict=True)):
            if operation[0] == "saved":
                continue
            at += 1
            fresh = (make(place / f"{at}-{kind}" / "run") for kind in itertools.count())
            row = {"operation": at, "name": shown(operation, run)}
            for words, code, for_good in (("full", errno.ENOSPC, False), ("EIO", errno.EIO, False)):
                row[words] = refused(next(fresh), at, columns, code, for_good=for_good, least=least) or "nothing"
            row["EIO for good"] = refused(next(fresh), at, columns, errno.EIO, for_good=True, least=least) or "nothing"
            row["killed"] = killed(next(fresh), at, columns, least) or "nothing"
            row["power cut"] = {words or "nothing": states[words] for words in states}
            if operation[0] == "fsync":
                without = [each for index, each in enumerate(operations) if index != number]
                kinds = sum(power_cuts(place / "runs", run, without, written, least, tried), Counter())
                row["without it"] = {words: kinds[words] for words in kinds if words}
            rows.append(row)
            print(name, row, flush=True)
        found[name] = rows
    return found


if __name__ == "__main__":
    from moevision.train.provenance import collect_provenance

    about = collect_provenance(command=sys.argv, seed=None, data_sha256=None)
    with tempfile.TemporaryDirectory() as folder:
        write_json_atomic(RECORD, {"starts": record(Path(folder)), "provenance": about})
