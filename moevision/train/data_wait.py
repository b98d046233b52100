"""When the model waits for its pictures: how much of that is too much, and what to do about it."""

from __future__ import annotations

from typing import Final

from moevision.data import ImageDataModule

MAX_DATA_WAIT: Final = 0.03
"""Share of the training time above which waiting for data is worth a remedy."""


def data_wait_advice(share: float | None, data: ImageDataModule) -> list[str]:
    """A sentence that says what to change, if training waited for data longer than it should.

    Args:
        share: part of the training time spent waiting, in [0, 1]; None if it wasn't measured.
        data: what was waited for.
    """
    if share is None or share <= MAX_DATA_WAIT:
        return []
    remedies = [f"raise --data.num_workers (now {data.num_workers})"]
    if not data.contents.fits_memory:
        remedies.insert(0, f"let the decoded pictures stay in memory (--data.cache_mb above {data.cache_mb})")
    if data.augment in ("randaugment", "trivialaugment"):
        remedies.append("choose --data.augment light")
    return [f"Training waited for data during {100 * share:.0f} % of its time: {', or '.join(remedies)}."]
