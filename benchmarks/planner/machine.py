"""What a plan takes a GPU and its links for: data sheets, or what this machine does. Needs torch only to measure.

`benchmarks.planner.formulas` computes with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Machine:
    """Speeds and sizes of one GPU and its links; what `assumed` names was not measured here.

    Attributes:
        name: of the GPU.
        peak_flops: per second in bf16 (fp16 where there is none), dense, from the data sheet; 0: not known.
        matmul_flops: per second that matrix products reach.
        memory_bytes_per_s: of a copy, read and written bytes together.
        memory_bytes: of one GPU.
        link_bytes_per_s: between GPUs of one node, per GPU and direction.
        network_bytes_per_s: between nodes, per GPU and direction.
        gpus_per_node: GPUs that the link joins.
        latency_s: what each collective costs at least.
        overlap: share of the compute behind which FSDP's traffic hides; DDP's hides behind the backward pass alone.
        usable: share of the memory that tensors can have; the rest is the driver's, libraries' and fragments'.
        assumed: field -> where its value comes from.
    """

    name: str
    peak_flops: float
    matmul_flops: float
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    gpus_per_node: int = 8
    latency_s: float = 25e-6
    overlap: float = 0.8
    usable: float = 0.9
    assumed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuSheet:
    """A GPU as its vendor's data sheet has it: dense tensor TFLOPS, GB/s, GB, GB/s per direction between GPUs."""

    title: str
    tflops: float
    memory_gb_per_s: float
    memory_gb: float
    link: str
    link_gb_per_s: float
    network_gbit_per_s: float  # per GPU; no data sheet says it: usual clusters


# NVIDIA's data sheets. Sparse TFLOPS halved; NVLink and PCIe halved (they are quoted for both directions together).
GPUS = {
    "h100": GpuSheet("H100 SXM", 989, 3350, 80, "NVLink 4", 450, 400),
    "h200": GpuSheet("H200 SXM", 989, 4800, 141, "NVLink 4", 450, 400),
    "a100-80": GpuSheet("A100 80 GB SXM", 312, 2039, 80, "NVLink 3", 300, 200),
    "a100-40": GpuSheet("A100 40 GB SXM", 312, 1555, 40, "NVLink 3", 300, 200),
    "l40s": GpuSheet("L40S", 362, 864, 48, "PCIe 4 x16", 32, 50),
    "rtx4090": GpuSheet("GeForce RTX 4090", 165, 1008, 24, "PCIe 4 x16", 32, 12.5),
    "t4": GpuSheet("T4 (fp16, it has no bf16)", 65, 320, 16, "PCIe 3 x16", 16, 12.5),
}
LINK_BYTES = 1 << 24  # of an all-reduce that shows the bandwidth
MATMUL_SHARE, COPY_SHARE, LINK_SHARE = 0.6, 0.8, 0.78  # of the data sheet's; see `sheet_machine`


def sheet_machine(gpu: str, gpus_per_node: int = 8) -> Machine:
    """A machine of data sheets: nothing of it is measured here.

    Matrix products are taken to reach 60 % of the peak, copies 80 % of the bandwidth, links 78 % (350 of NVLink 4's 450
    GB/s), networks 90 %.
    """
    sheet = GPUS[gpu]
    source = f"{sheet.title}, data sheet"
    return Machine(
        name=sheet.title,
        peak_flops=sheet.tflops * 1e12,
        matmul_flops=sheet.tflops * 1e12 * MATMUL_SHARE,
        memory_bytes_per_s=sheet.memory_gb_per_s * 1e9 * COPY_SHARE,
        memory_bytes=sheet.memory_gb * 1e9,
        link_bytes_per_s=sheet.link_gb_per_s * 1e9 * LINK_SHARE,
        network_bytes_per_s=sheet.network_gbit_per_s / 8 * 1e9 * 0.9,
        gpus_per_node=gpus_per_node,
        assumed={
            "peak_flops": source,
            "matmul_flops": f"{100 * MATMUL_SHARE:g} % of {source}",
            "memory_bytes_per_s": f"{100 * COPY_SHARE:g} % of {source}",
            "memory_bytes": source,
            "link_bytes_per_s": f"{100 * LINK_SHARE:g} % of {sheet.link}, per direction",
            "network_bytes_per_s": f"90 % of {sheet.network_gbit_per_s:g} Gbit/s per GPU",
            "gpus_per_node": "usual, or as asked",
            "latency_s": "per collective, whatever the number of GPUs",
            "overlap": "share of the compute behind which FSDP's traffic hides",
            "usable": "share of the memory",
        },
    )


def measured_machine(machine: Machine, *, tokens: int, width: int, hidden: int, dtype: torch.dtype) -> Machine:
    """The same machine with this one's memory, and its rates of matrix products and copies; links stay as they were.

    Products are those of an MLP: [T, D] by [D, H] and back. Medians of several runs; they belong to this hour, too.

    Args:
        machine: what the rest is taken from.
        tokens: T, of a micro-batch.
        width: D.
        hidden: H.
        dtype: of the products.
    """
    import torch

    from moevision.limits import usable_memory_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    up = torch.randn(width, hidden, device=device, dtype=dtype)
    down = torch.randn(hidden, width, device=device, dtype=dtype)
    mlp_s = _median_seconds(lambda: x @ up @ down, device)
    block = torch.zeros(2**25, device=device)  # 128 MiB: larger than any cache
    target = torch.empty_like(block)
    copy_s = _median_seconds(lambda: target.copy_(block), device)
    if device.type == "cuda":
        name, memory_bytes = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    else:
        name, memory_bytes = f"this CPU, {torch.get_num_threads()} threads", usable_memory_bytes() or 0
    measured = ("peak_flops", "matmul_flops", "memory_bytes_per_s", "memory_bytes")
    return replace(
        machine,
        name=name,
        peak_flops=0.0,
        matmul_flops=4 * tokens * width * hidden / mlp_s,
        memory_bytes_per_s=2 * block.nbytes / copy_s,
        memory_bytes=float(memory_bytes),
        assumed={field: source for field, source in machine.assumed.items() if field not in measured},
    )


def measured_links(machine: Machine, device: torch.device, *, one_node: bool) -> Machine:
    """The same machine with the latency of a collective, and the bandwidth of an all-reduce between all processes.

    Medians of ten, by the slowest process. Every process of the group must call it; there must be two at least.

    Args:
        machine: what the rest is taken from.
        device: where tensors that travel are.
        one_node: whether one node holds all processes: its link is measured then, else the network.
    """
    import torch
    import torch.distributed as dist

    def seconds(size: int) -> float:
        sent, times = torch.zeros(size // 4, device=device), []
        for _ in range(10):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(sent)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = torch.tensor([time.perf_counter() - began], device=device)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            times.append(float(took))
        return statistics.median(times)

    processes = dist.get_world_size()
    latency_s, block_s = seconds(4), seconds(LINK_BYTES)
    sent = 2 * LINK_BYTES * (processes - 1) / processes  # by each process, in a ring
    link = "link_bytes_per_s" if one_node else "network_bytes_per_s"
    assumed = {name: source for name, source in machine.assumed.items() if name not in ("latency_s", link)}
    found: dict[str, float] = {"latency_s": latency_s, link: sent / max(block_s - latency_s, 1e-9)}
    return replace(machine, assumed=assumed, **cast(Any, found))


def _median_seconds(work: Callable[[], object], device: torch.device, runs: int = 7) -> float:
    """Seconds of one call, after two that are not counted: kernels are compiled and caches filled in them."""
    import torch

    seconds: list[float] = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])
