"""What does sparsity buy an image classifier? The queue of runs that protocol.md lists, and their report.

    nice -n 19 python -m benchmarks sparsity run --data path/to/cifar10 --limit 0   # all runs; two such queues may run
    python -m benchmarks sparsity speed --data path/to/cifar10                      # on an idle machine, three times
    python -m benchmarks sparsity status
    python -m benchmarks sparsity report                                            # README.md's tables and the figure

`run` takes the next run that has no record and that no other queue is at, in a process of its own. A signal stops it
after the step at hand; the same command goes on. It refuses a tree with uncommitted changes.
"""

from __future__ import annotations

import functools
import json
import signal
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import HERE, about, argument_parser, positive, print_line, print_table
from benchmarks.lines import write_lines
from benchmarks.memory import memory_of
from benchmarks.queue import add_study, next_run, read_records, refuse_changes, write_run
from benchmarks.sparsity.arms import (
    ARMS,
    EPOCHS,
    STAGES,
    STEPS_PER_EPOCH,
    TIERS,
    Job,
    cost_of,
    progress,
    queue,
    rate_of,
)
from benchmarks.sparsity.report import idle, write_report
from benchmarks.sparsity.training import PROTOCOL, train
from benchmarks.study import open_data
from benchmarks.subject import TrainingStep
from benchmarks.timing import Candidate, interleave, ratio_of, spread
from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.limits import keep_freed_memory

FOLDER = HERE / "sparsity"
NOTHING_LEFT = 4  # exit code
WARM_UP = 10
IDLE = 0.5  # load average below which a machine is
MEASUREMENTS = 3  # of speed, before the steps of `twin-time` are fixed
MEASURED = list(ARMS)


# ---- the queue


def runs_to_do(records: list[dict[str, Any]], options: Namespace) -> Iterator[Job]:
    """What this command line can do of the queue, in order."""
    for job in queue(records, options.device, options.tier):
        known = job.lr is not None and (job.arm != "twin-time" or options.twin_steps is not None)  # H2's steps
        if known and (not options.only or job.arm in options.only):
            yield job


def run(options: Namespace) -> None:
    """Do the next run, or `limit` of them in processes of their own."""
    refuse_changes(PROTOCOL, allowed=options.allow_dirty)
    if options.limit != 1:
        sys.exit(run_many(options.limit))
    options.twin_steps = twin_steps(options.out, options.speed, options.device)
    # What another queue does may decide a learning rate, so it is waited for.
    job, held = next_run(functools.partial(runs_to_do, options=options), options.out, options.work)
    if job is None:
        print("Nothing is left to do here: see `python -m benchmarks sparsity status`.", file=sys.stderr)
        sys.exit(NOTHING_LEFT)
    torch.set_num_threads(options.threads)
    try:
        record = train(job, options)
        write_run(options.out, job.name, record)
    finally:
        held.release()
    result = record["failed"] or f"val {record['val_top1']:.3f}, {record['cpu_s']:.0f} s CPU"
    print(f"{job.name}: {result}", flush=True)


def run_many(limit: int) -> int:
    """Repeat the command for one run at a time, until `limit` (0: all) are done or one ends badly; the exit code."""
    command, done = [sys.executable, "-m", "benchmarks", "sparsity", *sys.argv[1:], "--limit", "1"], 0
    while not limit or done < limit:
        # A session of its own: a signal reaches it through this process, and only once.
        child = subprocess.Popen(command, start_new_session=True)
        earlier = {
            number: signal.signal(number, lambda number, _, child=child: child.send_signal(number))  # type: ignore[misc]
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        code = child.wait()
        for number, handler in earlier.items():
            signal.signal(number, handler)
        if code == NOTHING_LEFT:
            return 0
        if code:
            return code if code > 0 else 128 - code  # killed by a signal before it listened
        done += 1
    return 0


# ---- equal time


def endless(data: ImageDataModule) -> Iterator[dict[str, torch.Tensor]]:
    """Training batches, epoch after epoch."""
    while True:
        yield from data.train_dataloader()


def twin_steps(out: Path, speed: Path, device: str) -> int | None:
    """Steps of `twin-time`: those of its first record, else from three measured ratios; None without either."""
    known = {
        run["steps"]
        for run in read_records(out)
        if (run["arm"], run["device"]) == ("twin-time", device) and not run["failed"]
    }
    if known:
        return int(min(known))
    ratios = [each["ratio"]["median"] for each in idle(read_speed(speed), device)]
    if len(ratios) < MEASUREMENTS:
        return None
    return round(EPOCHS[device] * STEPS_PER_EPOCH * statistics.median(ratios))


def read_speed(speed: Path) -> list[dict[str, Any]]:
    """The measurements so far."""
    return list(json.loads(speed.read_text(encoding="utf-8"))) if speed.exists() else []


def measure_speed(options: Namespace) -> None:
    """Add one measurement of all arms: time of a training step with its loading, memory, FLOPs and ρ.

    Raises:
        UserError: if the machine isn't idle.
    """
    torch.set_float32_matmul_precision("high")  # as in `training.train`
    keep_freed_memory()
    origin = {**about(), "command": "python -m benchmarks sparsity speed"}
    load = origin["machine"]["load_average_before"]
    if load is not None and load > IDLE and not options.busy:
        raise UserError(f"The load average is {load}: wait until nothing else runs (below {IDLE}).")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    data = open_data("cifar10", str(options.data))
    data.batch_size = ARMS["moe"].batch
    batches = endless(data)
    loading: list[float] = []
    arms = options.only or MEASURED
    steps = {arm: TrainingStep(ARMS[arm].subject(arm), precision="fp32", device=device) for arm in arms}
    batch: dict[str, torch.Tensor] = {}

    def load_batch(_: int) -> None:
        clock = time.process_time if options.device == "cpu" else time.perf_counter
        start = clock()
        batch.update(next(batches))
        loading.append(clock() - start)
        batch.update({name: batch[name].to(device) for name in ("image", "label")})

    candidates = [
        Candidate(arm, lambda step=step: step(batch["image"], batch["label"]))  # type: ignore[misc]
        for arm, step in steps.items()
    ]
    rounds = {"repetitions": options.rounds, "warm_up": WARM_UP}
    timings = interleave(candidates, **rounds, device=device, prepare=load_batch)
    times = timings.cpu if options.device == "cpu" else timings.seconds
    spent = {arm: [a + b for a, b in zip(times[arm], loading[WARM_UP:], strict=True)] for arm in arms}
    memory = functools.partial(memory_of, precision="fp32", device=options.device, runs=1)
    found = {
        arm: {"ms": spread(spent[arm], 1e3), "memory": memory(ARMS[arm].subject(arm)), **cost_of(arm)} for arm in arms
    }
    ratio = ratio_of(spent["moe"], spent["twin"])
    measurement = {"device": options.device, "busy": options.busy, "ratio": ratio, "arms": found, **origin}
    write_lines(options.speed, [*read_speed(options.speed), measurement])
    print(f"moe ÷ twin: {measurement['ratio']}", flush=True)


# ---- the state


def status(options: Namespace) -> None:
    """Print for every arm what is done and what is missing."""
    records = read_records(options.out)
    jobs = list(queue(records, options.device, options.tier))
    done = {(run["arm"], run["seed"], run["lr"]): run for run in records if run["device"] == options.device}
    rows = []
    for tier, arms, seeds in STAGES:
        for arm in arms if tier in options.tier else ():
            lr = rate_of(records, options.device, arm)
            own = [done[arm, seed, lr] for seed in seeds if (arm, seed, lr) in done]
            tuning = [job for job in jobs if job.arm == arm and job.seed in ARMS[arm].tuning_seeds]
            tuned = sum((job.arm, job.seed, job.lr) in done for job in tuning)
            rows.append([
                f"{tier}  {arm}",
                f"{tuned} of {len(tuning)}" if tuning else ARMS[arm].tuned_as or "",
                "" if lr is None else f"{lr:g}",
                f"{len(own)} of {len(seeds)}",
                str(sum(bool(run["failed"]) for run in own)),
            ])  # fmt: skip
    print_table("runs of the sparsity study", ["tier  arm", "tuning", "lr", "seeds", "failed"], rows)
    complete, left = progress(records, options.device, options.tier)
    print_line(f"{complete} runs done, {left} missing (further learning rates not counted).")


def parser() -> ArgumentParser:
    """The command line."""
    found = argument_parser("sparsity", __doc__)
    found.add_argument("verb", choices=("run", "speed", "status", "report"))
    found.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10 as a folder")
    found.add_argument("--tier", type=int, nargs="+", choices=TIERS, default=TIERS, help="(all)")
    found.add_argument("--only", nargs="+", choices=ARMS, metavar="ARM", help="these arms only")
    found.add_argument("--device", choices=tuple(EPOCHS), default="cpu", help="(%(default)s)")
    found.add_argument("--threads", type=positive, default=1, help="the protocol has %(default)s")
    found.add_argument("--speed", type=Path, default=FOLDER / "speed.json", help="measured speeds (%(default)s)")
    found.add_argument("--rounds", type=positive, default=40, help="of speed (%(default)s)")
    found.add_argument("--busy", action="store_true", help="speed: try it out on a machine that isn't idle")
    add_study(found, FOLDER)
    return found


def main() -> None:
    """Run, measure, tell or report."""
    options = parser().parse_args()
    if options.verb in ("run", "speed") and options.data is None:
        raise UserError("Say where CIFAR-10 is: --data path/to/cifar10.")
    options.config, options.epochs = "cifar10", EPOCHS
    if options.verb == "report":
        write_report(read_records(options.out), read_speed(options.speed), options.readme)
    else:
        {"run": run, "speed": measure_speed, "status": status}[options.verb](options)
