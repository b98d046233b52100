"""Peak memory of training one model, in a process of its own, beyond what the process held before.

On a CPU it is the high-water mark of the resident set (VmHWM, set back through /proc/self/clear_refs) over the resident
set before the model was built, libraries and kernels loaded by a tiny step beforehand; on CUDA the allocator's peak.
Most of the peak is known exactly: weights, their gradients, the optimizer's moments, and the activations that autograd
keeps for the backward pass, which are counted in one more step. The rest is temporary copies, kernels that are compiled
for the shapes that occur, and what the allocator holds in reserve.

How much of it is tensors is measured besides: the most bytes of them at any one moment of a step, by torch's profiler.
On CUDA the allocator counts just that, so this is the figure to compare between a CPU and a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import in_a_process
from benchmarks.subject import Subject, TrainingStep, Which, noise_batch
from benchmarks.timing import reason, rounded
from moevision import limits

STEPS = 6  # the optimizer's moments exist from the first on; what is kept between steps has settled by then
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): set the high-water mark of the resident set to its present value


def memory_of(
    subject: Subject,
    which: Which = "moe",
    *,
    precision: str,
    device: torch.device | str = "cpu",
    runs: int = 3,
) -> dict[str, Any]:
    """Measure one model, each time in a fresh process.

    Returns:
        `peak_mib` (the median) and its parts `weights_mib`, `gradients_mib`, `optimizer_mib`, `activations_mib` and
        `other_mib`; `tensors_mib`, the peak of tensors alone; and `peaks_mib` of all runs; or `error`.
    """
    task = (subject, which, precision, str(device), torch.get_num_threads())
    try:
        measured = [in_a_process(measure, *task) for _ in range(runs)]
    except Exception as error:
        return {"error": f"not measured: {reason(error)}"}
    found = sorted(measured, key=lambda run: run["peak_mib"])
    return {**found[(runs - 1) // 2], "peaks_mib": [run["peak_mib"] for run in found]}


def measure(
    subject: Subject, which: Which, precision: str, device: str, threads: int
) -> dict[str, float]:
    """What the process of its own does; see `memory_of`."""
    torch.set_num_threads(threads)
    limits.keep_freed_memory()  # as in `moevision fit`
    tiny = Subject("tiny", {"name": "test_vit_moe"}, image_size=32, batch_size=4)
    TrainingStep(tiny, "moe", precision, device)(*noise_batch(tiny, device))
    kept: list[TrainingStep] = []

    def train() -> None:
        kept.append(TrainingStep(subject, which, precision, device))
        for seed in range(STEPS):
            kept[0](*noise_batch(subject, device, seed))

    peak = peak_bytes(train, device)
    parts = _parts(kept[0].net, kept[0].optimizer)
    parts["activations"] = saved_bytes(lambda: kept[0](*noise_batch(subject, device)), kept[0].net)
    sizes = {"peak": peak, **parts, "other": peak - sum(parts.values()), "tensors": peak}
    if torch.device(device).type == "cpu":
        in_a_step = tensors_peak_bytes(lambda: kept[0](*noise_batch(subject, device, STEPS)))
        sizes["tensors"] = parts["weights"] + parts["optimizer"] + in_a_step
    return {f"{name}_mib": rounded(size / 2**20) for name, size in sizes.items()}


def beside_twin(moe: Mapping[str, Any], twin: Mapping[str, Any]) -> dict[str, float]:
    """The MoE model's peak ÷ its twin's, whole, and without what its extra weights themselves need.

    Returns:
        `whole`; `beyond_extra_weights_and_optimizer`: less the extra weights and their moments;
        `beyond_extra_state`: less their gradients too; and `tensors_beyond_extra_weights_and_optimizer`: of the peak of
        tensors alone.
    """
    weights, optimizer, gradients = (
        moe[f"{name}_mib"] - twin[f"{name}_mib"] for name in ("weights", "optimizer", "gradients")
    )
    stored, peak = weights + optimizer, twin["peak_mib"]
    tensors = (moe["tensors_mib"] - stored) / twin["tensors_mib"]
    return {
        "whole": rounded(moe["peak_mib"] / peak),
        "beyond_extra_weights_and_optimizer": rounded((moe["peak_mib"] - stored) / peak),
        "beyond_extra_state": rounded((moe["peak_mib"] - stored - gradients) / peak),
        "tensors_beyond_extra_weights_and_optimizer": rounded(tensors),
    }


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Peak memory of `work` beyond what is held before it, in bytes; on a CPU from /proc of Linux."""
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Return freed memory to the system, so that work doesn't begin on pages that count already (glibc).
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    _CLEAR.write_text(_RESET_PEAK)
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def saved_bytes(work: Callable[[], object], net: nn.Module) -> int:
    """Bytes that autograd keeps of a forward pass of `net`; its weights don't count, views of one tensor once."""
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no storage is made anew at the same place

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept.setdefault(storage._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def tensors_peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors on a CPU that `work` held at any one moment, those from before it not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        run.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    cpu = 0  # c10::DeviceType
    held = (event["args"] for event in events if event["name"] == "[memory]")
    return max((one["Total Allocated"] for one in held if one["Device Type"] == cpu), default=0)


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _parts(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state."""
    weights = [*net.parameters(), *net.buffers()]
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for states in optimizer.state.values() for value in states.values()]
    moments = [value for value in state if isinstance(value, Tensor)]
    return {
        "weights": sum(tensor.nbytes for tensor in weights),
        "gradients": sum(tensor.nbytes for tensor in learning),
        "optimizer": sum(tensor.nbytes for tensor in moments),
    }
