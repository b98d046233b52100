"""Random numbers by key: a pure function of integers, whatever was drawn before, elsewhere, or in which process.

A generator that is asked in turn ties each picture's numbers to how many pictures came before it. Here the numbers of
a picture follow from its key alone (a counter-based generator, as in Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), so those of a whole batch are computed at once and don't depend on how the batch was put
together. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014, fig. 16).

Axis legend: B keys, n numbers per key.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

Key = int | npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hash_u64(*values: int) -> int:
    """Mix integers into one unsigned 64-bit number, the same on every machine and in every process.

    SplitMix64's finaliser, chained over the values; Python's ``hash`` is not promised to be stable.

    Args:
        values: any integers; their order matters.

    Returns:
        An integer in [0, 2**64), fit for ``torch.Generator.manual_seed``.
    """
    state = 0
    for value in values:
        state = (state + value + _GAMMA) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state


def hash_u64_array(*values: Key) -> npt.NDArray[np.uint64]:
    """`hash_u64` of every element of integers and integer arrays, which are broadcast against each other.

    Returns:
        uint64, in the common shape of the values.
    """
    state = np.zeros((), np.uint64)
    for value in values:
        # a negative number counts modulo 2**64, as it does in hash_u64
        term = np.uint64(value & _MASK) if isinstance(value, int) else value.astype(np.uint64)
        state = np.atleast_1d(state + term)  # arrays wrap around silently, NumPy's scalars warn
        state += np.uint64(_GAMMA)
        state ^= state >> np.uint64(30)
        state *= np.uint64(_FIRST)
        state ^= state >> np.uint64(27)
        state *= np.uint64(_SECOND)
        state ^= state >> np.uint64(31)
    return state


def uniform(count: int, *key: Key) -> npt.NDArray[np.float64]:
    """Numbers that are uniform in [0, 1), drawn for each key: the upper 53 bits of ``hash_u64(*key, number)``.

    Args:
        count: how many numbers each key gets, n.
        key: integers, or arrays [B] of them.

    Returns:
        float64 [B, n].
    """
    columns = [part if isinstance(part, int) else part[:, None] for part in key]
    bits = hash_u64_array(*columns, np.arange(count)[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@contextmanager
def seeded_torch(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator from ``key`` inside the block and put its state back afterwards.

    ``torch.manual_seed`` isn't used because it would reseed the GPU generators too, and so tie the dropout
    of the model to the last picture that was loaded.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(hash_u64(*key))
    try:
        yield
    finally:
        generator.set_state(state)
