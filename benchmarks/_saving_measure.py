"""What `saving.py` measures without training to the end: FLOPs, images/s and peak memory of every arm.

Speed: all arms take turns in one process, round by round, each on the same fresh batch; the arm that begins changes
from round to round. Two clocks run along. Wall time is what a user waits for, but it belongs to a machine that may be
doing other work; CPU time is what the processor really spent. With one thread on an idle machine both are the same, and
on a busy one only CPU time still says what an idle one would take.

Memory: each arm in a process of its own, because an allocator gives little back.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _study import provenance, training_step

from moevision.allocator import keep_freed_memory
from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.errors import UserError
from moevision.train.task import ClassificationTask

WARM_UP = 10  # rounds that allocate, and in which oneDNN compiles kernels
MEMORY_STEPS = 3  # the optimizer's moments are allocated at the end of the first
Clock = tuple[float, float]
"""Wall and CPU seconds; CPU seconds count all threads of the process."""


def now() -> Clock:
    """Both clocks."""
    return time.perf_counter(), time.process_time()


def timed(work: Callable[[], Any]) -> Clock:
    """Wall and CPU seconds of one call."""
    wall, cpu = now()
    work()
    wall_end, cpu_end = now()
    return wall_end - wall, cpu_end - cpu


def endless(data: ImageDataModule) -> Iterator[dict[str, torch.Tensor]]:
    """Training batches, epoch after epoch."""
    while True:
        yield from data.train_dataloader()


def inference(task: ClassificationTask, images: torch.Tensor) -> Callable[[], None]:
    """A function that classifies these images [B, 3, H, W] as `predict` would, under bf16 autocast."""

    def run() -> None:
        task.net.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            task.net(images)
        task.net.train()

    return run


def measure_speed(tasks: dict[str, ClassificationTask], data: ImageDataModule, rounds: int) -> dict[str, Any]:
    """Training and inference speed of every arm, and its ratio to the first arm, from `rounds` interleaved rounds.

    A training step is a batch from the loader (drawn once per round, its time added to every arm's), forward under
    bf16 autocast, losses, backward, clipping and AdamW.
    """
    load_average = os.getloadavg()[0]
    batches = endless(data)
    first = next(batches)
    images, labels = first["image"].clone(), first["label"].clone()
    works = {
        "train": {arm: training_step(task, images, labels) for arm, task in tasks.items()},
        "infer": {arm: inference(task, images) for arm, task in tasks.items()},
    }
    spent: dict[str, dict[str, list[Clock]]] = {phase: {arm: [] for arm in tasks} for phase in works}
    loading: list[Clock] = []
    for count in range(rounds + WARM_UP):
        start = now()
        batch = next(batches)
        images.copy_(batch["image"])
        labels.copy_(batch["label"])
        loader = tuple(end - begin for begin, end in zip(start, now(), strict=True))
        turn = count % len(tasks)
        order = [*list(tasks)[turn:], *list(tasks)[:turn]]
        for phase in works:
            for arm in order:
                own = timed(works[phase][arm])
                if phase == "train":
                    own = (own[0] + loader[0], own[1] + loader[1])
                if count >= WARM_UP:
                    spent[phase][arm].append(own)
        if count >= WARM_UP:
            loading.append((loader[0], loader[1]))
    return {
        "threads": torch.get_num_threads(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "rounds": rounds,
        "load_average": round(load_average, 2),
        "loading_ms": {"wall": quartiles_ms(loading, 0), "cpu": quartiles_ms(loading, 1)},
        **{phase: summary(arms) for phase, arms in spent.items()},
        **provenance(),
    }


def summary(arms: dict[str, list[Clock]]) -> dict[str, Any]:
    """Milliseconds per batch by both clocks, images/s relative to the first arm pair by pair: quartiles."""
    reference = next(iter(arms.values()))
    found = {}
    for arm, clocks in arms.items():
        entry: dict[str, Any] = {}
        for place, name in enumerate(("wall", "cpu")):
            ratios = [base[place] / own[place] for base, own in zip(reference, clocks, strict=True)]
            entry[f"{name}_ms"] = quartiles_ms(clocks, place)
            entry[f"{name}_ratio"] = [round(value, 3) for value in quartiles(ratios)]
        found[arm] = entry
    return found


def quartiles_ms(clocks: list[Clock], place: int) -> list[float]:
    """Quartiles of one of the clocks, in milliseconds."""
    return [round(1000 * value, 2) for value in quartiles([clock[place] for clock in clocks])]


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile, none outside of what was measured."""
    return statistics.quantiles(values, n=4, method="inclusive")


def measure_costs(tasks: dict[str, ClassificationTask], image_size: int) -> dict[str, dict[str, int]]:
    """Parameters and exact FLOPs per image of one forward pass in evaluation."""
    return {arm: vars(measure_cost(task.net, image_size)) for arm, task in tasks.items()}


def measure_memory(arms: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Peak resident memory in MiB of a few training steps of each arm, every time in a fresh process."""
    found: dict[str, dict[str, Any]] = {arm: {"peak_mib": [], "before_mib": []} for arm in arms}
    for _ in range(repeats):
        for arm in arms:
            command = [sys.executable, str(Path(__file__)), arm]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"Measuring the memory of {arm!r} failed:\n{done.stderr}")
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                found[arm][name].append(value)
    return found


def memory_mib(field: str) -> float:
    """VmHWM (peak) or VmRSS (now) of this process.

    Not `getrusage`: its maximum is handed on from the process that started this one.

    Raises:
        UserError: where /proc doesn't say (not Linux).
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise UserError("Peak memory is read from /proc/self/status, which this system lacks: run this stage on Linux.")


def main() -> None:
    """Print the memory of this process before and after it trained one arm, as JSON."""
    from saving import BATCH, CLASSES, IMAGE_SIZE, build

    torch.set_num_threads(1)
    keep_freed_memory()  # as `moevision fit` does
    # What importing needed must not hide what training needs: everything is loaded before the first reading.
    task = build(sys.argv[1], seed=0)
    images, labels = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(CLASSES, (BATCH,))
    before = memory_mib("VmRSS")
    step = training_step(task, images, labels)
    for _ in range(MEMORY_STEPS):
        step()
    print(json.dumps({"before_mib": before, "peak_mib": memory_mib("VmHWM")}))


if __name__ == "__main__":
    main()
