"""Joules per image, where the machine has a counter to read; otherwise the reason why there are none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import rounded
from moevision.efficiency import EnergyMeter, joules_per_image

RUNS = 3
_RUN_S = 5.0  # counters tick slowly: a run must be long beside their step


def energy_of(run: Callable[[], object], images: int, device: torch.device) -> dict[str, Any]:
    """Energy of repeated work above the machine's idle power.

    Args:
        run: one pass, such as a training step.
        images: images that one pass works on.
        device: whose counters are read.

    Returns:
        `joules_per_image` of each of three runs with their median, `source` and `domain`; or `energy`: "not measured"
        with the `reason`.
    """
    with EnergyMeter(device, idle_s=0.01) as meter:
        pass
    per_image: list[float] = []
    for _ in range(RUNS if meter.reading.energy_j is not None else 0):
        passes, start = 0, time.perf_counter()
        with EnergyMeter(device) as meter:
            while time.perf_counter() - start < _RUN_S or passes == 0:
                run()
                passes += 1
        if (value := joules_per_image(meter.reading, passes * images)) is None:
            break
        per_image.append(rounded(value))
    if meter.reading.energy_j is None:
        return {"energy": "not measured", "reason": meter.reading.reason}
    return {
        "energy": "measured",
        "joules_per_image": per_image,
        "median": statistics.median(per_image),
        "source": meter.reading.source,
        "domain": meter.reading.domain,
    }


def energy_text(energy: dict[str, Any]) -> str:
    """In words."""
    if energy["energy"] == "measured":
        return f"{energy['median']:.3g} J/image above idle ({energy['domain']})"
    return f"not measured ({energy['reason']})"
