"""Where a trace's arrays are put row by row: memory here, a file in `trace_file.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class TensorSpec(NamedTuple):
    """Type and shape of an array; the first axis counts rows."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * prod(self.shape[1:])

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self.dtype.itemsize * prod(self.shape)


class TensorSink(ABC):
    """Takes arrays row by row.

    Args:
        specs: array name -> type and shape.
        metadata: what stands beside the arrays.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.specs, self.metadata = dict(specs), dict(metadata)

    def __enter__(self) -> Self:
        """Ready for `write`."""
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Complete the arrays, or drop them after an error."""

    @abstractmethod
    def write(self, rows: Mapping[str, Array], start: int) -> None:
        """Put rows into their place: array name -> rows of the array's type, and the index of the first."""

    @abstractmethod
    def shrink(self, rows: int, metadata: Mapping[str, str]) -> None:
        """Keep only the first rows, and say something else beside them."""

    @abstractmethod
    def result(self) -> tuple[dict[str, Array], dict[str, str]]:
        """The arrays and what stands beside them, after the `with` block."""


class ArrayBuffer(TensorSink):
    """Arrays in memory that fill row by row."""

    def __init__(self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        super().__init__(specs, metadata)
        self._arrays = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}

    def write(self, rows: Mapping[str, Array], start: int) -> None:
        """Copy rows into their place."""
        for name, values in rows.items():
            self._arrays[name][start : start + len(values)] = values

    def shrink(self, rows: int, metadata: Mapping[str, str]) -> None:
        """Keep only the first rows."""
        self._arrays = {name: array[:rows] for name, array in self._arrays.items()}
        self.metadata = dict(metadata)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is left to do."""

    def result(self) -> tuple[dict[str, Array], dict[str, str]]:
        """The arrays and the metadata."""
        return self._arrays, self.metadata
