"""Planned step times beside measured ones, of a small network in 1, 2 and 4 processes (gloo) of this machine.

    OMP_NUM_THREADS=1 python -m benchmarks planner --measure --out benchmarks/planner/measured.json

What a plan takes this machine for is measured in the same processes, all of them at once: matrix products and copies
(`benchmarks.planner.machine`), bytes per second of an all-reduce of 16 MiB, and the latency of one of 4 bytes. Then all
layouts that the processes allow take turns, step by step, on images of noise: forward and backward pass, fused AdamW. A
step begins when all processes are there; the slowest one's time counts, and the median over steps. The plan gets the
experts' loads that were counted.

Processes share cores where there are fewer of these: then rates are those under that load. `error` is planned over
measured, less one.

Axes: W processes, M MoE layers, E experts.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import about
from benchmarks.lines import write_lines
from benchmarks.markdown import table
from benchmarks.planner.footprint import shape_of
from benchmarks.planner.formulas import Job, Layout, ModelShape, layouts, plan
from benchmarks.planner.machine import Machine, measured_links, measured_machine, sheet_machine
from benchmarks.study import IMAGE_SIZE, MODEL
from moevision.layers import forward_routing
from moevision.models.config import MoEConfig, build_model
from moevision.train.optim import OptimizerConfig, build_optimizer
from moevision.train.parallel.layout import Layout as Processes
from moevision.train.parallel.layout import shard
from moevision.train.parallel.parts import DIVIDED

EXPERTS, CLASSES, WARM_UP = 8, 8, 3
RATES = ("matmul_flops", "memory_bytes_per_s", "link_bytes_per_s", "latency_s", "overlap")


def measure(processes: list[int], images: int, steps: int, out: Path | None) -> None:
    """Measure, print, and write a record.

    Args:
        processes: every W.
        images: of a process in a step.
        steps: of each layout, after the warm-up.
        out: of the record.
    """
    origin, rows, machines = about(), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for size in processes:
            torch.multiprocessing.spawn(_process, (size, Path(folder), images, steps), nprocs=size)
            found = torch.load(Path(folder) / f"{size}.pt")
            rows += found["rows"]
            machines[str(size)] = found["machine"]
    print(table_of(rows))
    cores = origin["machine"]["usable_cores"] or os.cpu_count()
    if (crowded := [size for size in processes if size > cores]) != []:
        print(f"{crowded} processes shared {cores} cores: their times say nothing about as many GPUs.")
    if out:
        settings = {"images": images, "steps": steps, "experts": EXPERTS, "model": MODEL, "precision": "32-true"}
        write_lines(out, {"settings": settings, "machines": machines, "rows": rows, "provenance": origin})


def table_of(rows: list[dict[str, Any]]) -> str:
    """A line for each number of processes and layout."""
    heads = ["processes", "layout", "planned ms", "measured ms", "error"]
    cells = [
        [
            str(row["processes"]),
            row["layout"],
            f"{row['planned_ms']:.1f}",
            f"{row['measured_ms']:.1f}",
            f"{100 * row['error']:+.0f} %",
        ]
        for row in rows
    ]
    return table(heads, cells)


def _process(rank: int, processes: int, folder: Path, images: int, steps: int) -> None:
    """One of W processes; the first one leaves their rows in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{processes}", rank=rank, world_size=processes)
    shape = shape_of(_network(), IMAGE_SIZE, dtype=torch.float32)
    machine = _machine(shape, images)
    arms = {layout: Arm(layout) for layout in layouts(shape, processes)}
    times: dict[Layout, list[float]] = {layout: [] for layout in arms}
    for step in range(WARM_UP + steps):
        for layout, arm in arms.items():
            times[layout].append(arm.step(step * processes + rank, images))
    rows = []
    for layout, arm in arms.items():
        loads = tuple(tuple(load) for load in arm.loads.tolist())
        planned = plan(shape, layout, Job(processes, images * processes, loads=loads), machine)
        measured_ms = 1e3 * median(times[layout][WARM_UP:])
        rows.append(
            {
                "processes": processes,
                "layout": planned.name,
                "planned_ms": planned.step_ms,
                "measured_ms": measured_ms,
                "error": planned.step_ms / measured_ms - 1,
                "parts_ms": {
                    name: getattr(planned, f"{name}_ms")
                    for name in ("compute", "wait", "cast", "exposed", "all_to_all", "optimizer")
                },
                "steps_ms": [1e3 * seconds for seconds in times[layout][WARM_UP:]],
            }
        )
    if rank == 0:
        known = {name: getattr(machine, name) for name in RATES}
        torch.save({"rows": rows, "machine": known}, folder / f"{processes}.pt")
    dist.destroy_process_group()


def _network() -> nn.Module:
    torch.manual_seed(0)
    arch = MoEConfig(**MODEL, router="switch", num_experts=EXPERTS, stem="patch")
    return build_model(arch, CLASSES, IMAGE_SIZE).train()


def _machine(shape: ModelShape, images: int) -> Machine:
    """This machine while all processes work: means of their rates, and what an all-reduce reaches."""
    layer, processes = shape.moe[0], dist.get_world_size()
    dist.barrier()
    found = measured_machine(
        sheet_machine("h100", processes),
        tokens=images * layer.rows_per_image,
        width=layer.width,
        hidden=layer.hidden,
        dtype=torch.float32,
    )
    rates = torch.tensor([found.matmul_flops, found.memory_bytes_per_s], dtype=torch.float64)
    dist.all_reduce(rates)
    matmul, copy = (rates / processes).tolist()
    # No stream runs beside the compute on a CPU: nothing is hidden.
    found = replace(found, matmul_flops=matmul, memory_bytes_per_s=copy, overlap=0.0)
    if processes == 1:
        return found
    return measured_links(found, torch.device("cpu"), one_node=True)


def _together_s(work: Callable[[], object]) -> float:
    """Seconds from the moment at which all processes are there until the slowest one has done its work."""
    dist.barrier()
    began = time.perf_counter()
    work()
    seconds = torch.tensor([time.perf_counter() - began])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


class Arm:
    """One network in training under a layout.

    Args:
        layout: as a plan has it.

    Attributes:
        loads: [M, E] assignments so far, of all processes.
    """

    def __init__(self, layout: Layout) -> None:
        net = _network()
        self.mean = layout.expert == 1 and layout.parallel == "ddp"
        self.module: nn.Module = _WithRoutings(net)
        if not self.mean:
            replicated = layout.parallel == "ddp"
            shard(net, Processes.of("cpu", layout.expert, replicated=replicated))
        elif dist.get_world_size() > 1:
            self.module = DistributedDataParallel(self.module)
        self.optimizer, _ = build_optimizer(
            net,
            OptimizerConfig(lr=1e-3, warmup_fraction=0.0),
            total_steps=10**6,
            fused=True,
            kinds=None if self.mean else DIVIDED.optimizers,
        )
        self.loads = torch.zeros(())

    def step(self, seed: int, images: int) -> float:
        """Seconds of one optimizer step on images of noise."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        y = torch.randint(CLASSES, (images,), generator=generator)
        counts: list[Tensor] = []

        def work() -> None:
            self.optimizer.zero_grad()
            logits, routings = self.module(x)
            counts.extend(routing.requested_counts() for routing in routings)
            (F.cross_entropy(logits, y) / (1 if self.mean else dist.get_world_size())).backward()
            self.optimizer.step()

        seconds = _together_s(work)
        total = torch.stack(counts).float()
        dist.all_reduce(total)
        self.loads = self.loads + total
        return seconds


class _WithRoutings(nn.Module):
    """Logits and routings as one output, as DDP wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return forward_routing(self.net, x)
