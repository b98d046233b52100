"""`RoutingTrace`: what every MoE layer of a model decided about every patch of a set of images, and the file of it.

Two questions can be asked of a patch and an expert. Where tokens choose they are one: the choice counts 1.

- `dispatch_share`: how much of the patch does the expert compute? Expert choice: 1 where it took the patch. Soft MoE:
  the dispatch weight, summed over the expert's slots. Within an image these add up to the same for every expert, so
  they can say where and what an expert reads, and nothing about the class of the image.
- `combine_share`: how much of the patch's output comes from the expert? Expert choice and Soft MoE: its weight there.
  That differs between images, so questions about classes are asked of it.

Axes: I images, P patches (row-major in a grid of rows x columns; class and register tokens are left out), K choices
best first (all E experts where tokens don't choose), E experts, C classes. An expert is named by block and index, both
counted from 0: "L4·E3".

The file is one safetensors file, which appears under its name when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from moevision.analysis.information import Array, Flags, Floats, Ints
from moevision.errors import UserError, escape_controls
from moevision.files import write_bytes_atomic
from moevision.layers.routing import Kind as RoutingKind
from moevision.layers.routing import RouteBy
from moevision.models.safe_files import parse_json, read_metadata

LAYER_ARRAYS = ("expert_index", "kept", "combine_weight", "probs", "margin", "entropy_bits")
_CHUNK = 64  # images that are counted at once


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer's decisions about all patches."""

    layer: int  # index of the transformer block, counted from 0
    # [I, P, K] int16, the chosen experts, best first (requested: before any capacity). Expert choice: those that took
    # the patch come first. Soft MoE: the largest weight first.
    expert_index: Ints
    # [I, P, K] bool, whether the expert computes the patch: False where its capacity dropped the choice; expert choice:
    # where it did not take the patch
    kept: Flags
    combine_weight: Floats  # [I, P, K] float32, the gate weight of each choice; a dropped one keeps its number here
    # [I, P, E] float16, the router's clean affinities (softmax of its scores). Rounding changes one by at most one part
    # in 2048 (and those below 6.1e-5 by at most 3e-8); `margin` and `entropy_bits` are not affected.
    probs: Floats
    margin: Floats  # [I, P] float32, the best minus the second-best router probability; 1 with a single expert
    entropy_bits: Floats  # [I, P] float32, entropy of the router's probabilities, 0 to log2 E bits
    kind: RoutingKind = "token_choice"  # who chooses: tokens, experts, or (Soft MoE) nobody
    # [I, P, K] float32, Soft MoE only: how much of the patch the slots of each expert read
    read_weight: Floats | None = None
    # what is routed: each `token`, or the `image`, all of whose patches then have the same row
    route_by: RouteBy = "token"

    @property
    def name(self) -> str:
        """The layer as it is shown, such as "L4"."""
        return f"L{self.layer}"

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.probs.shape[-1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.expert_index.shape[-1])

    @property
    def experts_per_patch(self) -> float:
        """How many experts compute a patch, on average."""
        return float(self.kept.sum() / max(1, self.margin.size))

    @property
    def dispatch_share(self) -> Array:
        """[I, P, K] how much of the patch each of `expert_index` reads, see above."""
        return self.kept if self.read_weight is None else self.read_weight * self.kept

    @property
    def combine_share(self) -> Array:
        """[I, P, K] how much the patch takes from each of `expert_index`, see above."""
        return self.kept if self.kind == "token_choice" else self.combine_weight * self.kept

    @property
    def requested_share(self) -> Array | None:
        """[I, P, K] the `dispatch_share` before any capacity; None: each of `expert_index` counts 1."""
        return None if self.kind == "token_choice" else self.dispatch_share

    # Names of version 0.1, for one version.
    reads = dispatch_share
    takes = combine_share
    wanted = requested_share

    def arrays(self) -> dict[str, Array]:
        """Its arrays by name."""
        arrays: dict[str, Array] = {name: getattr(self, name) for name in LAYER_ARRAYS}
        if self.read_weight is not None:
            arrays["read_weight"] = self.read_weight
        return arrays

    def first_choice(self) -> Ints:
        """[I, P]: the expert that each patch wants most, kept or not.

        Expert choice: of those that took the patch the one with the largest weight; -1 where none did.
        """
        first = self.expert_index[:, :, 0]
        if self.kind != "expert_choice":
            return first
        return np.where(self.kept[:, :, 0], first, np.int16(-1))

    def select(self, images: slice | Ints) -> LayerTrace:
        """The same of some images."""
        arrays: dict[str, Any] = {name: array[images] for name, array in self.arrays().items()}
        return replace(self, **arrays)

    def counts(self) -> Array:
        """[I, E]: the load, int64: how many choices of each image every expert computes.

        Soft MoE, where every expert computes as many slots: float64, the sum of the weights that patches take.
        """
        return self._sums("combine_share" if self.kind == "soft" else "dispatch_share")

    def image_takes(self) -> Array:
        """[I, E]: what each image takes from every expert; what questions about classes are asked of."""
        return self._sums("combine_share")

    def _sums(self, share: str) -> Array:
        """[I, E] a share [I, P, K] by image and expert; int64 where it says whether a choice counts."""
        no_image = getattr(self.select(slice(0)), share)
        dtype = np.int64 if no_image.dtype == bool else np.float64
        sums = np.zeros((len(self.expert_index), self.num_experts), dtype)
        # A few images at a time, so that it takes no second trace's memory.
        for start in range(0, len(sums), _CHUNK):
            images = slice(start, start + _CHUNK)
            part = self.select(images)
            into = sums[images]
            first_cells = np.arange(len(into)) * self.num_experts
            cells = first_cells[:, None, None] + part.expert_index  # [I', P, K]
            weights = getattr(part, share)
            by_cell = np.bincount(cells.ravel(), weights.ravel(), into.size)
            into[:] = by_cell.reshape(into.shape)
        return sums


SCHEMA = "moevision.trace/1"
"""Version of the file; a change that an older reader would misread raises the number."""

IMAGE_ARRAYS = ("labels", "predictions", "probabilities")
_METADATA = (
    "picture_names",
    "class_names",
    "prediction_names",
    "grid",
    "model",
    "data",
    "provenance",
)
_LAYER_METADATA = {"layers": "layer", "kinds": "kind", "route_by": "route_by"}


@dataclass(frozen=True)
class RoutingTrace:
    """What a model decided about a set of images: one `LayerTrace` per MoE layer, labels and predictions.

    Attributes:
        layers: in order of depth.
        labels: [I] int64, indices into `class_names`; -1 where the class isn't known.
        predictions: [I] int64, indices into `prediction_names`; -1 for a model without a head.
        probabilities: [I, C] float32, softmax of the model's output.
        picture_names: [I] stable names: paths relative to the data, never absolute ones.
        class_names: names of the labels. Where the model knows all classes of the data they are the model's.
        grid: (rows, columns) of the patches.
        model: what the model is.
        data: what the images are.
        provenance: JSON primitives: versions, date, hash of the weights, how many images could not be read ...
        prediction_names: [C] names of the model's outputs; `class_names` if left out.
    """

    layers: tuple[LayerTrace, ...]
    labels: Ints
    predictions: Ints
    probabilities: Floats
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
        images = len(self)
        patches = self.grid[0] * self.grid[1]
        lengths = {len(array) for array in (self.labels, self.predictions, self.probabilities)}
        shapes = {array.shape[:2] for layer in self.layers for array in layer.arrays().values()}
        if lengths != {images} or shapes != {(images, patches)}:
            raise UserError(
                f"This trace's arrays are not all about {images} images of {patches} patches: collect it again."
            )

    def __len__(self) -> int:
        """I, the number of images."""
        return len(self.picture_names)

    @property
    def accuracy(self) -> float | None:
        """Share of the labelled images that are classified correctly; None where labels and outputs differ in name.

        None also stands where no image has a label.
        """
        labelled = self.labels >= 0
        if self.prediction_names != self.class_names or not labelled.any():
            return None
        return float((self.predictions == self.labels)[labelled].mean())

    def layer(self, block_index: int) -> LayerTrace:
        """The MoE layer in the block of that index; a UserError if that block has none."""
        for layer in self.layers:
            if layer.layer == block_index:
                return layer
        names = ", ".join(str(layer.layer) for layer in self.layers)
        raise UserError(f"Block {block_index} has no MoE layer: choose one of {names}.")

    def select(self, images: Sequence[int] | Array | slice) -> RoutingTrace:
        """The trace of some images: by index, by a mask [I] of bools, or by a slice."""
        if not isinstance(images, slice):
            images = list(images)
        indices = np.arange(len(self))[images]
        # A slice keeps the arrays as views.
        rows = images if isinstance(images, slice) else indices
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in IMAGE_ARRAYS}
        return replace(
            self,
            layers=tuple(layer.select(rows) for layer in self.layers),
            picture_names=tuple(self.picture_names[index] for index in indices),
            **arrays,
        )

    def arrays(self) -> dict[str, Array]:
        """All arrays under their names in the file, such as "L4.probs" and "labels"."""
        arrays: dict[str, Array] = {name: getattr(self, name) for name in IMAGE_ARRAYS}
        for layer in self.layers:
            arrays |= {f"{layer.name}.{name}": array for name, array in layer.arrays().items()}
        return arrays

    def metadata(self) -> dict[str, str]:
        """What the file says beside the arrays."""
        about = {name: getattr(self, name) for name in _METADATA}
        for name, attribute in _LAYER_METADATA.items():
            about[name] = [getattr(layer, attribute) for layer in self.layers]
        return metadata_of(about)

    def save(self, path: str | Path) -> None:
        """Write the trace to one safetensors file, whole or not at all; a UserError if it can't be written."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays().items()}
        try:
            write_bytes_atomic(path, save(arrays, self.metadata()))
        except OSError as error:
            raise UserError(
                f"{path} can't be written ({error.strerror}): give another place, or free some space."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read a trace; a UserError if there is no such file, it is damaged, or another version wrote it."""
        try:
            metadata, arrays = read_metadata(path), load_file(path)
        except FileNotFoundError as error:
            raise UserError(
                f"There is no file {path}: collect the routing again, or check the path."
            ) from error
        schema = metadata.get("schema")
        if schema != SCHEMA:
            problem = f"has the schema {schema!r}" if schema else "is no routing trace"
            raise UserError(
                f"{path} {problem}, and this version reads {SCHEMA}: collect the trace again."
            )
        try:
            return cls.from_arrays(arrays, metadata)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"The trace {path} is damaged ({error}): collect it again.") from error

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> RoutingTrace:
        """Put a trace together from `arrays()` and `metadata()`."""
        fields: dict[str, Any] = {
            name: parse_json(value.encode(), name)
            for name, value in metadata.items()
            if name != "schema"
        }
        indices = fields.pop("layers")
        kinds = fields.pop("kinds", ["token_choice"] * len(indices))
        units = fields.pop("route_by", ["token"] * len(indices))
        layers = []
        for index, kind, unit in zip(indices, kinds, units, strict=True):
            layer_arrays = {name: arrays[f"L{index}.{name}"] for name in LAYER_ARRAYS}
            if kind == "soft":
                layer_arrays["read_weight"] = arrays[f"L{index}.read_weight"]
            layers.append(LayerTrace(index, kind=kind, route_by=unit, **layer_arrays))

        fields |= {name: arrays[name] for name in IMAGE_ARRAYS}
        fields["picture_names"] = tuple(fields["picture_names"])
        fields["grid"] = tuple(fields["grid"])
        # An older trace has folder names as they are.
        for name in fields.keys() & {"class_names", "prediction_names"}:
            fields[name] = tuple(map(escape_controls, fields[name]))
        return cls(layers=tuple(layers), **fields)


def metadata_of(about: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a trace's file: its schema, and in JSON what `RoutingTrace` says beside the arrays.

    `kinds` is written only where tokens don't choose in some layer, `route_by` only where some layer routes images:
    other traces stay as earlier versions wrote them.
    """
    usual = {"kinds": {"token_choice"}, "route_by": {"token"}}
    metadata = {"schema": SCHEMA}
    for name, value in about.items():
        if name not in usual or set(value) != usual[name]:
            metadata[name] = json.dumps(value)
    return metadata
