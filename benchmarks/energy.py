"""Energy of repeated work on one NVIDIA card, from the counter of its board (NVML); elsewhere "not measured".

What can't be measured is said with the reason: it is never 0, and never time multiplied by a nominal power. The idle
power is measured right before the work and subtracted. The counter covers all programs on the card, so nothing else
should run, and one run is an anecdote: three are reported.

Source: NVML, `nvmlDeviceGetTotalEnergyConsumption`: mJ of the whole board since the driver was loaded, Volta and newer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import rounded

RUNS, RUN_S, IDLE_S = 3, 5.0, 5.0  # counters tick slowly: a run must be long beside their step


class NotMeasured(Exception):  # noqa: N818 (no error: most machines have no counter)
    """Energy can't be read here, and why."""


def open_counter(device: torch.device) -> Callable[[], float]:
    """What reads the joules of a card so far.

    Raises:
        NotMeasured: if there is no counter, or it can't be read.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        raise NotMeasured(f"no energy counter is read of {device.type} devices")
    try:
        import pynvml
    except ImportError as error:
        raise NotMeasured("nvidia-ml-py isn't installed: pip install nvidia-ml-py") from error
    card = torch.cuda.get_device_properties(device)

    def joules() -> float:
        torch.cuda.synchronize(device)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    try:  # by UUID: NVML numbers all cards and knows nothing of CUDA_VISIBLE_DEVICES
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{card.uuid}")
        joules()
    except pynvml.NVMLError as error:
        reason = f"NVML tells no energy of {card.name} ({error})"
        raise NotMeasured(f"{reason}: cards before Volta and MIG slices have no counter") from error
    return joules


def energy_of(run: Callable[[], object], images: int, device: torch.device) -> dict[str, Any]:
    """Energy of repeated work above the machine's idle power, by image of which each pass has so many.

    Returns:
        `joules_per_image` of each of three runs with their median, `source` and `domain`; or `energy`: "not measured"
        with the `reason`.
    """
    try:
        joules = open_counter(device)
    except NotMeasured as reason:
        return {"energy": "not measured", "reason": str(reason)}
    per_image = []
    for _ in range(RUNS):
        before, start = joules(), time.perf_counter()
        time.sleep(IDLE_S)
        idle_watts = (joules() - before) / (time.perf_counter() - start)
        before, start, passes = joules(), time.perf_counter(), 0
        while time.perf_counter() - start < RUN_S or passes == 0:
            run()
            passes += 1
        above_idle = joules() - before - idle_watts * (time.perf_counter() - start)
        per_image.append(rounded(above_idle / (passes * images)))
    name = torch.cuda.get_device_properties(device).name
    return {
        "energy": "measured",
        "joules_per_image": per_image,
        "median": statistics.median(per_image),
        "source": "nvml",
        "domain": f"GPU board {name}, without the host",
    }


def energy_text(energy: dict[str, Any]) -> str:
    """In words."""
    if energy["energy"] == "measured":
        return f"{energy['median']:.3g} J/image above idle ({energy['domain']})"
    return f"not measured ({energy['reason']})"
