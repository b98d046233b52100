"""Two levers of training on a CPU, each on and off: freed memory that is kept, and attention without the fused kernel.

    python benchmarks/cpu_levers.py cifar10 --out benchmarks/cpu_levers.json

Whether memory is kept can't be changed in a running process, so every turn is a process of its own: some steps to warm
up, then the median time of `--steps` training steps (`moevision.commands.benchmark.step`, bf16, a batch of noise). All
combinations take turns, `--rounds` times; a ratio is taken within a round, against the round's turn without either.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch

from moevision.allocator import SWITCH, keep_freed_memory
from moevision.commands.benchmark.record import new_record
from moevision.commands.benchmark.step import TrainingStep, noise_batch
from moevision.commands.benchmark.subject import find_subject
from moevision.files import write_json_atomic
from moevision.models.attention import set_fused_attention

WARM_UP = 20
COMBINATIONS = {
    "neither": (False, True),
    "memory kept": (True, True),
    "attention unfused": (False, False),
    "both": (True, False),
}


def turn(config: str, which: Any, fused: bool, steps: int) -> None:
    """Print the median seconds of a step and the pages that one step touches first."""
    keep_freed_memory()
    torch.manual_seed(0)
    subject = find_subject(config, batch_size=None, image_size=None, num_classes=None)
    device = torch.device("cpu")
    step, batch = TrainingStep(subject, which, "bf16", device), noise_batch(subject, device)
    set_fused_attention(step.net, fused)
    seconds = []
    for count in range(WARM_UP + steps):
        if count == WARM_UP:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        step(*batch)
        seconds.append(time.perf_counter() - start)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) // steps
    print(json.dumps({"step_s": statistics.median(seconds[WARM_UP:]), "page_faults": faults}))


def in_a_process(config: str, which: str, kept: bool, fused: bool, steps: int) -> dict[str, float]:
    """One turn."""
    command = [sys.executable, __file__, config, "--turn", which, "--steps", str(steps), *(["--fused"] if fused else [])]
    environment = {**os.environ, SWITCH: "1" if kept else "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print and record."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turn", choices=("moe", "active_flops"))
    parser.add_argument("--fused", action="store_true")
    options = parser.parse_args()
    if options.turn:
        turn(options.config, options.turn, options.fused, options.steps)
        return
    record = new_record("cpu_levers", " ".join(sys.argv), torch.device("cpu"), {"config": options.config})
    for which in ("moe", "active_flops"):
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in COMBINATIONS}
        for _ in range(options.rounds):
            for name, (kept, fused) in COMBINATIONS.items():
                turns[name].append(in_a_process(options.config, which, kept, fused, options.steps))
        plain = [found["step_s"] for found in turns["neither"]]
        record[which] = {
            name: {
                "step_s": [found["step_s"] for found in all_found],
                "page_faults": statistics.median(found["page_faults"] for found in all_found),
                "speed_against_neither": statistics.median(
                    before / found["step_s"] for before, found in zip(plain, all_found, strict=True)
                ),
            }
            for name, all_found in turns.items()
        }
        for name, found in record[which].items():
            print(f"{which:12} {name:18} x {found['speed_against_neither']:.2f}, {found['page_faults']:.0f} page faults")
    if options.out:
        write_json_atomic(options.out, record)


if __name__ == "__main__":
    main()
