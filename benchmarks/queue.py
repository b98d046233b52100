"""A queue of runs that a protocol lists: one record each, and two queues side by side never take the same one.

A record is a line of `runs.jsonl`. A run is claimed by a lock that ends with its process, so that nothing is left to
clean up where one was killed.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout

import moevision
from benchmarks.harness import HERE
from moevision.errors import UserError
from moevision.train.provenance import git_state

WAIT_S = 30.0  # before a queue looks again whether another one has decided something


class Named(Protocol):
    """What the queue knows of a run."""

    @property
    def name(self) -> str:
        """What its record is called."""


T = TypeVar("T", bound=Named)


def read_records(out: Path) -> list[dict[str, Any]]:
    """All records, a line each; none where there is no file yet."""
    return (
        [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        if out.exists()
        else []
    )


def write_run(out: Path, name: str, record: dict[str, Any]) -> None:
    """Add the record of a finished run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open(
        "a", encoding="utf-8"
    ) as file:  # one write, in append mode: lines of two queues don't mix
        file.write(json.dumps({"name": name, **record}, ensure_ascii=False, allow_nan=False) + "\n")


def is_recorded(out: Path, name: str) -> bool:
    """Whether a run has its record."""
    return any(record["name"] == name for record in read_records(out))


def next_run(
    jobs: Callable[[list[dict[str, Any]]], Iterable[T]], out: Path, work: Path
) -> tuple[T | None, FileLock | None]:
    """The first run without a record, and its claim; None where none is left, after waiting for what other queues do.

    `jobs` gives all runs in order, as far as the records of the file `out` decide them; `work` is where the locks are.
    """
    while True:
        busy = False
        for job in jobs(read_records(out)):
            if is_recorded(out, job.name):
                continue
            try:
                held = claim_file(work / f"{job.name}.lock")
            except Timeout:
                busy = True
                continue
            if not is_recorded(out, job.name):  # it may have been finished since
                return job, held
            held.release()
        if not busy:
            return None, None
        time.sleep(WAIT_S)


def do_runs(
    jobs: Callable[[list[dict[str, Any]]], Iterable[T]],
    run: Callable[[T, Namespace], dict[str, Any]],
    told: Callable[[T, dict[str, Any]], str],
    options: Namespace,
) -> None:
    """Do the next runs, `options.limit` of them or, for 0, all that are left; see `next_run` for `out` and `work`.

    `run` does one and gives its record, `told` a line about it.
    """
    done = 0
    while not options.limit or done < options.limit:
        job, held = next_run(jobs, options.out, options.work)
        if job is None:
            print("Nothing is left to do here.", file=sys.stderr)
            return
        try:
            record = run(job, options)
            write_run(options.out, job.name, record)
        finally:
            held.release()
        done += 1
        print(told(job, record), flush=True)


def claim_file(lock: Path) -> FileLock:
    """Claim by a file, which is made; the claim ends by its `release`, or with the process.

    Raises:
        Timeout: if another process has it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=0)
    held.acquire()
    return held


def refuse_changes(protocol: Path, *, allowed: bool) -> None:
    """Runs come from a committed tree.

    Raises:
        UserError: if the package, the benchmarks, the configs or the protocol have uncommitted changes.
    """
    package, configs = Path(moevision.__file__).parent, HERE.parent / "configs"
    code = git_state(package, HERE / "*.py", configs, protocol)
    if (not code or code["dirty"]) and not allowed:
        raise UserError(
            "The tree has uncommitted changes: commit them, or try things out with --allow-dirty."
        )


def rate_beyond(tried: dict[float, float]) -> float | None:
    """The next learning rate if the best so far is the largest or the smallest one, None if it lies between."""
    best = max(tried, key=lambda lr: tried[lr])
    return 2 * best if best == max(tried) else best / 2 if best == min(tried) else None
