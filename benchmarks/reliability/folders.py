"""Damaged and hostile checkpoint folders: does each end in one sentence?

    python -m benchmarks folders --out benchmarks/reliability/folders.json      # about 3 minutes

A training of two processes (`--parallel fsdp --parallel.expert 2`) leaves a checkpoint folder. Each case is a copy
with one seeded change of a kind below, read in a fork as `predict`, `export` and `fit --resume` read it. Where the
change is in the folder, manifest.json vouches for it, as whoever may write there can make it do. Outcomes:

- `one sentence`: a UserError;
- `read as before`, `read otherwise`: the checkpoint is read, equal to the one before the change or not (a flipped bit
  of a field that isn't used; a changed weight);
- `code`, `outside`, `memory`, `hang`, `traceback`: a planted program ran, a file outside the folder was read, more
  memory was asked for than twice the files and `SLACK_MB`, no end within `PATIENCE_S`, another error. None may occur.

Memory is the growth of the address space, which RLIMIT_AS holds, and of what is resident; that is recorded, also for
the folder as it is (`unchanged_mb`), since a fork that reads anything has pages of its own. Linux only.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import about, argument_parser, positive, write_result
from moevision.errors import UserError
from moevision.train.checkpoint import Entry, SafeCheckpointIO, newest_valid, sha256_of, write_manifest
from moevision.train.resume import load_trained

FIT = (
    *("--name=run", "--model.arch.name=test_vit_moe", "--model.arch.embed_dim=96", "--model.arch.depth=4"),
    *("--data.image_size=32", "--data.batch_size=8", "--data.train_size=32", "--data.val_size=16"),
    *("--data.test_size=16", "--ema.decay=0.9", "--trainer.precision=32-true", "--trainer.max_epochs=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.devices=2"),
    *("--parallel=fsdp", "--parallel.expert=2"),
)
NAME, REST, PARTS = "last.ckpt", "rest.pt", ("part-0.pt", "part-1.pt")
FILES = (REST, *PARTS)
SLACK_MB, PATIENCE_S = 256, 30
SENTENCE, SAME, OTHER = "one sentence", "read as before", "read otherwise"
Change = Callable[[random.Random, Path], None]


class Planted:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


class Announced:
    """A pickle that takes memory before it has any: a call of bytearray."""

    def __reduce__(self) -> tuple[object, ...]:
        return bytearray, (2**40,)


# ---- changes of a checkpoint's folder, each by the numbers that `draw` gives


def edit(draw: random.Random, file: Path) -> None:
    """Flip bits, cut the end off, put bytes at the end or into the middle, or leave zeros or nothing."""
    data = bytearray(file.read_bytes())
    where = draw.randrange(len(data))
    match draw.randrange(6):
        case 0 | 1:
            for _ in range(draw.choice((1, 1, 1, 8, 64))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 2:
            del data[where:]
        case 3:
            data += draw.randbytes(draw.choice((1, 100, 10_000)))
        case 4:
            data[where:where] = draw.randbytes(draw.choice((1, 8, 1000)))
        case _:
            data[where:] = bytes(draw.choice((0, len(data) - where)))
    replace(file, bytes(data))


def replace(file: Path, data: bytes) -> None:
    """Write a file anew: the other name of its bytes, which are linked, keeps them."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def describe(draw: random.Random, folder: Path) -> None:
    """Wrong shapes, places, keys and tensors in a part that is sound as an archive."""
    file = folder / draw.choice(PARTS)
    parts = torch.load(file, weights_only=True)
    key = draw.choice(sorted(parts))
    shape, begin, part = parts[key]
    huge = draw.choice((3 * 2**30, 2**40, 2**62, -1, 0, 1.0, None, "1", 10**30))
    match draw.randrange(10):
        case 0:
            shape = draw.choice(([huge], [2**31, 2**8], [huge, *shape[1:]], [1] * 100, None))
        case 1:
            begin = draw.choice(([huge], [2**40], [], [huge, *begin[1:]], None))
        case 2:  # one number for a large tensor
            part = torch.zeros(1).expand(draw.choice((2**31, 2**40)))
            shape, begin = list(part.shape), [0]
        case 3:
            part = torch.sparse_coo_tensor(size=(2**40,), check_invariants=True)
            shape, begin = [2**40], [0]
        case 4:
            part = draw.choice((part.double(), part.to(torch.int8), part.flatten(), part[:0], huge, [part]))
        case 5:
            other = draw.choice(
                ('"x"', "{", "[]", '["nope", "a"]', '["epoch"]', '["state_dict", "new"]', "[" * 5000, '["a", 1e999]', 7)
            )
            parts[other] = parts.pop(key)
            key = other
        case 6:
            del parts[key]
        case 7:  # one part for all: a small file would become a large model
            parts = {each: (list(part.shape), [0] * part.dim(), part) for each in parts}
        case 8:
            parts = draw.choice(([], {key: None}, {key: (shape, begin)}, 5))
        case _:
            parts = {**parts, key: draw.choice(((shape,), (shape, begin, part, part), [shape, begin, part], "x"))}
    if isinstance(parts, dict) and type(parts.get(key)) is tuple and len(parts[key]) == 3:
        parts[key] = shape, begin, part
    replace(file, saved(parts))


def other_pickle(draw: random.Random, folder: Path) -> None:
    """Pickles of other classes, and those that run something or announce memory, as a part or as the rest."""
    planted = Planted(folder.parent / "planted")
    file = folder / draw.choice(FILES)
    match draw.randrange(4):
        case 0:
            value = draw.choice((planted, os.system, {"a": 1}, [], io.BytesIO(b"x"), random.Random(0), bytearray(9)))
            replace(file, pickle.dumps(value, protocol=draw.randrange(2, 6)))
        case 1:  # a bytearray of a terabyte; a memo, a text and a frame of that many
            code = draw.choice((b"\x96", b"r\xff\xff\xff\x7f", b"\x8d", b"\x95", b"\x8e"))
            replace(file, b"\x80\x05]" + code + (2**40).to_bytes(8, "little") + b".")
        case 2:
            value = draw.choice((planted, Announced(), {"state_dict": planted}, [1], 5, {"state_dict": 5}))
            replace(file, saved(value) if type(value) is not Announced else pickle.dumps(value))
        case _:  # 64 MB of zeros in 64 KB
            memory = io.BytesIO()
            with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", bytes(2**26))
            replace(file, memory.getvalue())


def saved(value: Any) -> bytes:
    """As torch.save writes it."""
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def link(draw: random.Random, folder: Path) -> None:
    """A link in the place of a file, or beside the files."""
    file = folder / draw.choice((*FILES, "more.pt"))
    file.unlink(missing_ok=True)
    targets = ("/dev/zero", "/etc/passwd", "nowhere", draw.choice(FILES), file.name, "..", "../outside.pt")
    file.symlink_to(draw.choice(targets))


def pipe(draw: random.Random, folder: Path) -> None:
    """A pipe or a folder in the place of a file, beside the files, or in the place of the whole."""
    file = draw.choice((*(folder / name for name in FILES), folder / "more.pt", folder))
    if file == folder:
        shutil.rmtree(folder)
    file.unlink(missing_ok=True)
    if file == folder or draw.random() < 0.7:
        os.mkfifo(file)
    else:
        file.mkdir()


def values(draw: random.Random, folder: Path) -> None:
    """A value of rest.pt: another one in its place, or none."""
    rest = torch.load(folder / REST, weights_only=True)
    part = draw.choice((rest, rest["moevision"], rest["moevision"]["data"], rest["hyper_parameters"]))
    part = draw.choice((part, rest["hyper_parameters"]["arch"]))
    key = draw.choice(sorted(part))
    odd = (None, True, -1, 0, 1e308, 2**70, 10**6, "x", [], {}, [1], {"a": 1}, [[1, 2, 3], [0, 0, 0]], torch.ones(2))
    if draw.random() < 0.2:
        del part[key]
    else:
        part[key] = draw.choice(odd)
    replace(folder / REST, saved(rest))


def manifest(draw: random.Random, folder: Path) -> None:
    """Bytes or values of manifest.json; or a pipe, a link or a folder in its place."""
    file = folder.parent / "manifest.json"
    match draw.randrange(4):
        case 0:
            edit(draw, file)
        case 1:
            file.unlink()
            what = draw.randrange(3)
            (os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir)[what](file)
        case _:
            known = json.loads(file.read_text())
            odd = draw.choice((None, True, -1, 1e300, 2**70, "", "x", [], {}, [1], {"a": 1}))
            entry = draw.choice(known["files"])
            if draw.random() < 0.1:
                known["files"] = odd
            elif draw.random() < 0.2:
                del entry[draw.choice(sorted(entry))]
            else:
                entry[draw.choice(sorted(entry))] = odd
            file.write_text(json.dumps(known))


CHANGES: dict[str, Change] = {
    "bytes of a part": lambda draw, folder: edit(draw, folder / draw.choice(PARTS)),
    "bytes of rest.pt": lambda draw, folder: edit(draw, folder / REST),
    "shapes, places, keys": describe,
    "other pickles": other_pickle,
    "values of rest.pt": values,
    "links": link,
    "pipes and folders": pipe,
    "manifest.json": manifest,
}
REFUSED = ("other pickles", "links", "pipes and folders")
"""Kinds of which nothing may be read."""

# ---- a case


def try_one(kind: str, seed: int, whole: Path, place: Path, expected: Any) -> dict[str, Any]:
    """Change a copy, read it in a fork, and say what came of it.

    Args:
        kind: a name in `CHANGES`, or another one for no change.
        seed: of the change.
        whole: the folder that is copied, with its manifest beside it.
        place: an empty folder to work in.
        expected: what reading the whole one gives.
    """
    folder = place / "checkpoints" / NAME
    shutil.copytree(whole, folder, copy_function=os.link)
    shutil.copy(whole / PARTS[0], place / "checkpoints" / "outside.pt")
    vouch(folder)
    if kind in CHANGES:
        CHANGES[kind](random.Random(seed), folder)
    if kind != "manifest.json":
        with suppress(OSError):  # none can be made for a pipe
            vouch(folder)
    size = sum(each.stat().st_size for each in whole.iterdir())
    said = place / "said.json"
    if (pid := os.fork()) == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.alarm(PATIENCE_S)
            before = resident_mb()
            room = memory_mb("VmSize") + 2 * size / 1e6 + SLACK_MB
            resource.setrlimit(resource.RLIMIT_AS, (int(room * 1e6), resource.RLIM_INFINITY))
            found = read(folder, expected)
            found["grown_mb"] = round(memory_mb("VmHWM") - before, 1)
            said.write_text(json.dumps(found))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    found = json.loads(said.read_text()) if said.is_file() else {"outcome": "hang", "words": "no end"}
    if (place / "checkpoints" / "planted").exists():
        found["outcome"] = "code"
    if kind in REFUSED and found["outcome"] in (SAME, OTHER):
        found["outcome"] = "outside"
    return {"kind": kind, "seed": seed, **found}


def vouch(folder: Path) -> None:
    """Write the manifest of what the folder holds now."""
    entry = Entry(NAME, sha256_of(folder), 2, 0, 1, True, "2026-01-01T00:00:00+00:00")
    write_manifest(folder.parent, [entry])


def read(folder: Path, expected: Any) -> dict[str, Any]:
    """Read a checkpoint as the verbs do; the outcome, and an error's words."""
    try:
        newest_valid(folder.parent)
        load_trained(str(folder))
        same = equal(SafeCheckpointIO().load_checkpoint(folder), expected)
        return {"outcome": SAME if same else OTHER, "words": ""}
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        words = f"{type(error).__name__}: {error}"
        if any(isinstance(each, MemoryError) or "llocate" in str(each) for each in chain):
            return {"outcome": "memory", "words": words}
        plain = isinstance(error, UserError) and "\n" not in str(error)
        return {"outcome": SENTENCE if plain else "traceback", "words": words}


def equal(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def memory_mb(name: str) -> float:
    """A field of /proc/self/status."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024 / 1e6


def resident_mb() -> float:
    """What this process holds now."""
    return memory_mb("VmRSS")


def try_all(whole: Path, count: int, seed: int) -> dict[str, Any]:
    """So many cases, the kinds in turn; counts of outcomes, and what was said in each case that may not occur."""
    expected = SafeCheckpointIO().load_checkpoint(whole)
    load_trained(str(whole))  # imports what forks need
    cases = []
    for number in range(-1, count):
        kind = "nothing" if number < 0 else list(CHANGES)[number % len(CHANGES)]
        with tempfile.TemporaryDirectory(dir=whole.parent.parent) as place:
            cases.append(try_one(kind, seed * count + number, whole, Path(place), expected))
    unchanged = cases.pop(0)
    assert unchanged["outcome"] == SAME, unchanged
    table = {kind: dict(Counter(case["outcome"] for case in cases if case["kind"] == kind)) for kind in CHANGES}
    return {
        "cases": count,
        "files_mb": round(sum(each.stat().st_size for each in whole.iterdir()) / 1e6, 1),
        "unchanged_mb": unchanged["grown_mb"],
        "grown_mb": max(case.get("grown_mb", 0) for case in cases),
        "outcomes": table,
        "forbidden": [case for case in cases if case["outcome"] not in (SENTENCE, SAME, OTHER)],
    }


def train(home: Path) -> Path:
    """The checkpoint folder that a small training in two processes leaves."""
    command = [sys.executable, "-m", "moevision", "fit", "synthetic_pets", *FIT, f"--runs_root={home}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return home / "run" / "checkpoints" / NAME


def main(arguments: Sequence[str] | None = None) -> None:
    """Try as many as the command line asks for."""
    parser = argument_parser("folders", __doc__)
    parser.add_argument("--count", type=positive, default=500, help="cases (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder of two processes; trained unless given")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork has no others
    origin = about()
    with tempfile.TemporaryDirectory() as home:
        whole = options.checkpoint or train(Path(home))
        found = try_all(whole, options.count, options.seed)
    write_result(options.out, {**origin, **found})
    if found["forbidden"]:
        sys.exit(1)
