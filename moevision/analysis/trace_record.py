"""`RoutingTrace`: what every MoE layer of a model decided about every patch of a set of pictures.

Axes: I images, P patches (row-major in a grid of rows x columns; class and register tokens are left out), K choices
best first, E experts, C classes. An expert is named by block and index, both counted from 0: "L4·E3".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.trace_file import TensorFile, read_tensors
from moevision.analysis.trace_layer import LAYER_ARRAYS, LayerTrace, chunks
from moevision.analysis.trace_sink import Array, TensorSpec
from moevision.errors import UserError
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.safe_files import parse_json
from moevision.names import shown

SCHEMA = "moevision.trace/1"
"""Version of the file; a change that an older reader would misread raises the number."""

IMAGE_ARRAYS = ("labels", "predictions", "probabilities")


@dataclass(frozen=True)
class RoutingTrace:
    """What a model decided about a set of pictures: one `LayerTrace` per MoE layer, labels and predictions.

    Attributes:
        layers: in order of depth.
        labels: [I] int64, indices into `class_names`; -1 where the class isn't known.
        predictions: [I] int64, indices into `prediction_names`; -1 for a model without a head.
        probabilities: [I, C] float32, softmax of the model's output.
        picture_names: [I] stable names: paths relative to the data, never absolute ones.
        class_names: names of the labels. Where the model knows all classes of the data they are the model's.
        grid: (rows, columns) of the patches.
        model: what the model is.
        data: what the pictures are.
        provenance: JSON primitives: versions, date, hash of the weights, how many pictures could not be read ...
        prediction_names: [C] names of the model's outputs; `class_names` if left out.
    """

    layers: tuple[LayerTrace, ...]
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]
    picture_names: tuple[str, ...]
    class_names: tuple[str, ...]
    grid: tuple[int, int]
    model: str
    data: str
    provenance: dict[str, Any] = field(default_factory=dict)
    prediction_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Arrays that don't belong together are refused here, not somewhere in a statistic."""
        if self.prediction_names is None:
            object.__setattr__(self, "prediction_names", self.class_names)
        images, patches = len(self.picture_names), self.grid[0] * self.grid[1]
        lengths = {len(array) for array in (self.labels, self.predictions, self.probabilities)}
        shapes = {array.shape[:2] for layer in self.layers for array in layer.arrays().values()}
        if not self.layers or lengths != {images} or shapes != {(images, patches)}:
            raise UserError(
                f"This trace's arrays are not all about {images} pictures of {patches} patches: collect it again."
            )

    def __len__(self) -> int:
        """I, the number of pictures."""
        return len(self.picture_names)

    @property
    def accuracy(self) -> float | None:
        """Share of the labelled pictures that are classified correctly; None where labels and outputs differ in name.

        None also stands where no picture has a label.
        """
        known = self.labels >= 0
        if self.prediction_names != self.class_names or not known.any():
            return None
        return float((self.predictions == self.labels)[known].mean())

    def layer(self, block_index: int) -> LayerTrace:
        """The MoE layer in the block of that index.

        Raises:
            UserError: if that block has no MoE layer.
        """
        for layer in self.layers:
            if layer.layer == block_index:
                return layer
        names = ", ".join(str(layer.layer) for layer in self.layers)
        raise UserError(f"Block {block_index} has no MoE layer: choose one of {names}.")

    def select(self, images: Sequence[int] | npt.NDArray[Any] | slice) -> RoutingTrace:
        """The trace of some pictures: by index, by a mask [I] of bools, or by a slice."""
        # An empty list would become an array of floats.
        wanted = images if isinstance(images, slice) or len(images) else np.zeros(0, np.int64)
        chosen = wanted if isinstance(wanted, slice) else np.arange(len(self))[np.asarray(wanted)]
        return replace(
            self,
            layers=tuple(layer.select(chosen) for layer in self.layers),
            **{name: getattr(self, name)[chosen] for name in IMAGE_ARRAYS},
            picture_names=tuple(self.picture_names[index] for index in np.arange(len(self))[chosen]),
        )

    def arrays(self) -> dict[str, Array]:
        """All arrays under their names in the file, such as "L4.probs" and "labels"."""
        arrays: dict[str, Array] = {name: getattr(self, name) for name in IMAGE_ARRAYS}
        for layer in self.layers:
            arrays |= {f"{layer.name}.{name}": array for name, array in layer.arrays().items()}
        return arrays

    def metadata(self) -> dict[str, str]:
        """What the file says beside the arrays."""
        fields = ("picture_names", "class_names", "prediction_names", "grid", "model", "data", "provenance")
        layers, kinds = [layer.layer for layer in self.layers], [layer.kind for layer in self.layers]
        return describe_trace(layers=layers, kinds=kinds, **{name: getattr(self, name) for name in fields})

    def save(self, path: str | Path) -> None:
        """Write the trace to one safetensors file, whole or not at all.

        Raises:
            UserError: if the file can't be written.
        """
        arrays = self.arrays()
        specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
        with TensorFile(path, specs, self.metadata()) as file:
            for part in chunks(len(self)):
                file.write({name: array[part] for name, array in arrays.items()}, part.start)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Open a trace; its arrays are mapped from the file (read-only) and not read before they are used.

        Raises:
            UserError: if there is no such file, it is damaged, or another version wrote it.
        """
        arrays, metadata = read_tensors(path)
        schema = metadata.get("schema")
        if schema != SCHEMA:
            what = f"has the schema {schema!r}" if schema else "is no routing trace"
            raise UserError(f"{path} {what}, and this version reads {SCHEMA}: collect the trace again.")
        try:
            return cls.from_arrays(arrays, metadata)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"The trace {path} is damaged ({error}): collect it again.") from error

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> RoutingTrace:
        """Put a trace together from `arrays()` and `metadata()`."""
        words = {name: parse_json(value.encode(), name) for name, value in metadata.items() if name != "schema"}
        indices = words.pop("layers")
        kinds = words.pop("kinds", ["token_choice"] * len(indices))
        layers = tuple(
            LayerTrace(
                index,
                kind=kind,
                read_weight=arrays[f"L{index}.read_weight"] if kind == "soft" else None,
                **{name: arrays[f"L{index}.{name}"] for name in LAYER_ARRAYS},
            )
            for index, kind in zip(indices, kinds, strict=True)
        )
        images: dict[str, Any] = {name: arrays[name] for name in IMAGE_ARRAYS}
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in words.items()
        }
        for name in {"class_names", "prediction_names"} & tuples.keys():  # an older trace has folder names as they are
            tuples[name] = tuple(map(shown, tuples[name]))
        return cls(layers=layers, **images, **tuples)


def describe_trace(
    *,
    layers: Sequence[int],
    kinds: Sequence[RoutingKind],
    picture_names: Sequence[str],
    class_names: Sequence[str],
    prediction_names: Sequence[str],
    grid: tuple[int, int],
    model: str,
    data: str,
    provenance: Mapping[str, Any],
) -> dict[str, str]:
    """The metadata of a trace's file: its schema, and the arguments (as in `RoutingTrace`) in JSON.

    `kinds` stands there only where tokens don't choose in some layer: all other traces are as they always were.
    """
    words: dict[str, Any] = {
        "layers": layers,
        "picture_names": picture_names,
        "class_names": class_names,
        "prediction_names": prediction_names,
        "grid": grid,
        "model": model,
        "data": data,
        "provenance": provenance,
    }
    if set(kinds) != {"token_choice"}:
        words["kinds"] = kinds
    return {"schema": SCHEMA, **{name: json.dumps(value) for name, value in words.items()}}
