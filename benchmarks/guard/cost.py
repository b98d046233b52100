"""What the stability guard costs: training steps with and without it, interleaved in one process.

    OMP_NUM_THREADS=1 python -m benchmarks guard-cost quickstart --steps 60 --out benchmarks/guard/cost.json

Two Lightning trainings of one config's model on noise take turns, step by step, each in a thread of its own; one has
the guard and the router health log, the other neither. Everything between the first callback of a step and its last is
counted, in CPU seconds of that thread, which other programs on the machine don't enter.
The ratio of pairs can't tell a cost below the noise of a step, so the hooks of both callbacks are timed by themselves
too; and a snapshot, which comes once in `snapshot_every` updates and is shared out over them. Quote `cost_percent`
(hooks and snapshots) beside the median ratio and its quartiles; the absolute figures belong to the machine.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from benchmarks.harness import about, argument_parser, write_result
from benchmarks.subject import Subject, find_subject, noise_batch
from moevision.train.guard import GuardConfig, StabilityGuard, TrainingSnapshot
from moevision.train.health import RouterHealth
from moevision.train.recipe import default_precision
from tests.train.quiet import quiet_trainer

WARM_UP = 5  # the first steps allocate the moments


class Turns:
    """Two threads alternate."""

    def __init__(self) -> None:
        self.whose, self.changed = 0, threading.Condition()

    def wait_for(self, own: int) -> None:
        """Until it is this one's turn, or it has the machine for itself."""
        with self.changed:
            self.changed.wait_for(lambda: self.whose in (own, None))

    def hand_over(self, own: int) -> None:
        """To the other one."""
        with self.changed:
            self.whose = None if self.whose is None else 1 - own
            self.changed.notify_all()

    def leave(self) -> None:
        """The other one goes on alone."""
        with self.changed:
            self.whose = None
            self.changed.notify_all()


class Begin(L.Callback):
    """First of all callbacks: wait for the turn, then start the clocks."""

    def __init__(self, turns: Turns, own: int) -> None:
        self.turns, self.own = turns, own
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.turns.wait_for(self.own)
        self.started = time.thread_time()


class End(L.Callback):
    """Last of all callbacks: stop the clocks, and time one snapshot at the end."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.cpu_s: list[float] = []
        self.snapshot_s: list[float] = []
        self.guard_s: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.cpu_s.append(time.thread_time() - self.begin.started)
        self.begin.turns.hand_over(self.begin.own)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Time snapshots, which no turn includes."""
        for _ in range(5):
            start = time.thread_time()
            TrainingSnapshot(trainer, pl_module)
            self.snapshot_s.append(time.thread_time() - start)


def timed(callback: L.Callback, hooks: list[str], spent_s: list[float]) -> L.Callback:
    """Let a callback write down the CPU seconds of every call of its hooks."""

    def wrap(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return hook(*arguments)
            finally:
                spent_s.append(time.thread_time() - start)

        return run

    for name in hooks:
        setattr(callback, name, wrap(getattr(callback, name)))
    return callback


def training(
    subject: Subject, steps: int, turns: Turns, own: int
) -> tuple[End, Callable[[], None]]:
    """One of the two trainings (the second has the guard), ready to run."""
    torch.manual_seed(0)
    task = subject.task()
    images, labels = noise_batch(subject)
    rows = {"image": images, "label": labels, "index": torch.arange(len(labels))}
    begin = Begin(turns, own)
    end = End(begin)
    # Snapshots are timed by themselves.
    guard, health = StabilityGuard(GuardConfig(snapshot_every=10**9)), RouterHealth()
    watching = [
        timed(guard, ["on_train_batch_start", "_refuses", "on_train_batch_end"], end.guard_s),
        timed(health, ["on_before_optimizer_step", "on_train_batch_end"], end.guard_s),
    ]
    folder = tempfile.mkdtemp()
    trainer = quiet_trainer(
        precision=default_precision(),
        max_steps=steps + WARM_UP,
        limit_val_batches=0,
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        log_every_n_steps=10,
        callbacks=[begin, *(watching if own else []), end],
    )

    def run() -> None:
        try:
            loader = DataLoader([rows] * (steps + WARM_UP), batch_size=None)
            trainer.fit(task, loader, loader)
        finally:
            turns.leave()

    return end, run


def main() -> None:
    """Measure and print."""
    parser = argument_parser("guard-cost", __doc__)
    parser.add_argument("config", help="name or file of a config")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    origin, subject, turns = about(), find_subject(options.config), Turns()
    ends, runs = zip(*(training(subject, options.steps, turns, own) for own in (0, 1)), strict=True)
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain, guarded = (end.cpu_s[WARM_UP:] for end in ends)
    step_s, snapshot_s = statistics.median(plain), statistics.median(ends[1].snapshot_s)
    pairs = [guard / alone for alone, guard in zip(plain, guarded, strict=True)]
    every = GuardConfig().snapshot_every
    hooks_percent = 100 * sum(ends[1].guard_s) / sum(ends[1].cpu_s)
    snapshots_percent = 100 * snapshot_s / (every * step_s)
    result = {
        **origin,
        "config": options.config,
        "batch": subject.batch_size,
        "precision": default_precision(),
        "steps": options.steps,
        "step_ms": round(1000 * step_s, 2),
        "cost_percent": round(hooks_percent + snapshots_percent, 2),
        "of_that_hooks_percent": round(hooks_percent, 3),
        "of_that_snapshots_percent": round(snapshots_percent, 3),
        "snapshot_ms": round(1000 * snapshot_s, 2),
        "snapshot_every": every,
        "pair_ratio_median": round(statistics.median(pairs), 4),
        "pair_ratio_quartiles": [
            round(quartile, 4) for quartile in statistics.quantiles(pairs, n=4)[::2]
        ],
    }
    write_result(options.out, result)
