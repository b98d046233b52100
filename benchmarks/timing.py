"""Interleaved timing: all candidates take turns in one process, and ratios are taken pair by pair.

Machines drift, and shared ones drift by tens of percent in minutes. Candidates measured one after the other would
differ by that drift; here each round runs them all, in an order that rotates, and a ratio compares two times of one
round. Quote the median ratio with its quartiles; absolute times belong to the machine and the hour.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from moevision.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """Something to time: `reset` is called before and after each run, outside the measured time.

    Of an optional one, of libraries that aren't ours, a failure is reported and the others go on.
    """

    name: str
    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None
    optional: bool = False


@dataclass
class Timings:
    """Seconds of each candidate that ran to the end, one per repetition; and why others did not."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def interleave(
    candidates: Sequence[Candidate],
    *,
    repetitions: int,
    warm_up: int = 3,
    device: torch.device | str = "cpu",
    prepare: Callable[[int], object] = lambda repetition: None,
    title: str = "",
) -> Timings:
    """Time candidates in turns; whatever one that isn't optional raises, is raised.

    Args:
        candidates: what to time.
        repetitions: measured rounds.
        warm_up: rounds before them: kernels are compiled, optimizers allocate.
        device: an accelerator is waited for before a clock is read.
        prepare: called before each round with its number, such as to make a new input for all.
        title: of a progress bar in a terminal.
    """
    names = [candidate.name for candidate in candidates]
    timings = Timings({name: [] for name in names})
    running = list(candidates)
    rounds, console = range(warm_up + repetitions), Console(stderr=True)
    is_shown = bool(title) and console.is_terminal
    for repetition in track(rounds, title, console=console, transient=True, disable=not is_shown):
        prepare(repetition)
        first = repetition % max(1, len(running))
        for candidate in [*running[first:], *running[:first]]:
            candidate.reset()
            try:
                seconds = seconds_of(candidate.run, device)
            except Exception as error:
                if not candidate.optional:
                    raise
                timings.failures[candidate.name] = reason(error)
            else:
                if repetition >= warm_up:
                    timings.seconds[candidate.name].append(seconds)
            candidate.reset()
        running = [candidate for candidate in running if candidate.name not in timings.failures]
        gc.collect()  # between rounds, not within somebody's turn
    for name in timings.failures:
        del timings.seconds[name]
    return timings


def seconds_of(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Of one call, the accelerator's queue emptied before and after."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device | str) -> None:
    """Wait for what an accelerator was given to do; nothing on a CPU."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text[:240]}".rstrip(": ")


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float | int]:
    """Median and quartiles, and how many values they are of."""
    low, middle, high = scale * np.quantile(values, (0.25, 0.5, 0.75))
    quartiles = {"quartile_1": low, "median": middle, "quartile_3": high}
    return {**{name: rounded(value) for name, value in quartiles.items()}, "n": len(values)}


def ratio_of(times: Sequence[float], reference: Sequence[float]) -> dict[str, float | int]:
    """Spread of time ÷ time of the reference in the same round; above 1 is slower."""
    return spread([own / other for own, other in zip(times, reference, strict=True)])


def rounded(value: float, digits: int = 6) -> float:
    """Six significant digits: below what a clock resolves."""
    return float(f"{value:.{digits}g}")


def rows_of(
    timings: Timings,
    references: Sequence[str],
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One JSON object per candidate: its times, their spread, and its ratios to the references that ran.

    `facts` has more to say of a candidate, by name. `ratio_to` is time ÷ time, above 1 is slower, `speed_to` the
    inverse, pair by pair; of a failed one there is only its `error`.
    """
    # Rounded first, so that a reader of the record finds the same ratios.
    kept = {name: [rounded(value) for value in values] for name, values in timings.seconds.items()}
    rows: list[dict[str, Any]] = []
    for name, values in kept.items():
        others = {other: kept[other] for other in references if other in kept}
        row = {"name": name, **(facts or {}).get(name, {}), "time_ms": spread(values, 1e3)}
        row["ratio_to"] = {other: ratio_of(values, times) for other, times in others.items()}
        row["speed_to"] = {other: ratio_of(times, values) for other, times in others.items()}
        rows.append({**row, "seconds": values})
    return rows + [{"name": name, "error": why} for name, why in timings.failures.items()]
