"""When is a loss a spike: running statistics of the losses of applied updates.

A loss is suspicious when it lies above `mean + max(sigmas · std, 25 % of the mean, 0.1)` of the last 128 good ones.
The window is OLMo-core's (SkipStepOptimizer, 128 steps, 6 σ), with what its users met mended: a number that isn't
finite never gets into it (it would make the deviation NaN, and every later step suspicious), nor does a suspicious
one (it would widen the deviation until the spike looks normal). The two floors keep a flat curve, whose deviation is
tiny, from crying wolf.
"""

from __future__ import annotations

from collections import deque
from math import fsum, sqrt
from typing import Any

_WINDOW = 128
_MIN_RISE = 0.1  # nats
_MIN_RELATIVE_RISE = 0.25


class LossHistory:
    """Judges one loss after the other.

    Args:
        sigmas: how many standard deviations above the mean are suspicious; 0 finds nothing suspicious.
        patience: how many suspicious losses in a row are a lasting spike.
        warmup: how many good losses must be known before one can be suspicious.

    Attributes:
        suspicious: suspicious losses in a row up to now.
    """

    def __init__(self, sigmas: float, patience: int, warmup: int) -> None:
        self.sigmas, self.patience, self.warmup = sigmas, patience, warmup
        self.suspicious = 0
        self._good: deque[float] = deque(maxlen=_WINDOW)

    @property
    def threshold(self) -> float:
        """Losses above it are suspicious; infinite during the warm-up."""
        if not self.sigmas or len(self._good) < self.warmup:
            return float("inf")
        mean = self.mean
        deviation = sqrt(fsum((loss - mean) ** 2 for loss in self._good) / len(self._good))
        return mean + max(self.sigmas * deviation, _MIN_RELATIVE_RISE * mean, _MIN_RISE)

    @property
    def mean(self) -> float:
        """Mean of the good losses that are remembered."""
        return fsum(self._good) / len(self._good)

    def add(self, loss: float) -> bool:
        """Take the finite loss of an applied update; whether it makes a lasting spike."""
        if loss > self.threshold:
            self.suspicious += 1
        else:
            self.suspicious = 0
            self._good.append(loss)
        return self.suspicious >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint or a snapshot."""
        return {"good": list(self._good), "suspicious": self.suspicious}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to it."""
        self._good = deque(state["good"], maxlen=_WINDOW)
        self.suspicious = int(state["suspicious"])
