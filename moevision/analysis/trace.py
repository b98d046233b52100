"""`RoutingTrace`: the decision of every MoE layer about every patch of a set of images, and the file that stores it.

Two numbers describe a patch and an expert. For token choice they are equal: 1 for each choice that was kept.

- `dispatch_share`: how much of the patch the expert reads. Expert choice: 1 where the expert took the patch. Soft MoE:
  the dispatch weight, summed over the expert's slots. In every image the sum over patches is the same for all experts,
  so it tells where and what an expert reads, but nothing about the class of the image.
- `combine_share`: how much of the patch's output comes from the expert. Expert choice and Soft MoE: the combine weight.
  Its sum differs between images, so the analysis of classes uses it.

Axes: I images, P patches (row-major in a grid of rows x columns; class and register tokens are left out), K choices
of a patch, best first (all E experts for expert choice and Soft MoE), E experts, C classes. An expert is named by block
and index, both counted from 0: "L4·E3".

The file is one safetensors file. It is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from moevision.errors import UserError, escape_controls
from moevision.files import write_bytes_atomic
from moevision.layers.routing import Kind as RoutingKind
from moevision.layers.routing import RouteBy
from moevision.models.safe_files import parse_json, read_metadata
from moevision.types import Array, Flags, Floats, Ints, Json

LAYER_ARRAYS = ("expert_index", "kept", "combine_weight", "probs", "margin", "entropy_bits")


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer's decisions about all patches."""

    layer: int  # index of the transformer block, counted from 0
    # [I, P, K] int16, the requested experts (before any capacity), best first. Expert choice: experts that took the
    # patch come first. Soft MoE: in order of combine weight, the largest first.
    expert_index: Ints
    # [I, P, K] bool, whether the expert computes the patch: False where its capacity dropped the choice; expert choice:
    # where it did not take the patch
    kept: Flags
    combine_weight: (
        Floats  # [I, P, K] float32, the gate weight of each choice, dropped ones included
    )
    # [I, P, E] float16, the router's probabilities without noise (softmax of its scores). Rounding to float16 changes
    # one by at most one part in 2048 (below 6.1e-5 by at most 3e-8). `margin` and `entropy_bits` are not affected.
    probs: Floats
    margin: Floats  # [I, P] float32, the best minus the second-best router probability; 1 with a single expert
    entropy_bits: Floats  # [I, P] float32, entropy of the router's probabilities, 0 to log2 E bits
    kind: RoutingKind = "token_choice"  # who chooses: tokens, experts, or (Soft MoE) nobody
    # [I, P, K] float32, Soft MoE only: how much of the patch the slots of each expert read
    read_weight: Floats | None = None
    # what is routed: each `token`, or each `image`; then all patches of an image have the same values
    route_by: RouteBy = "token"

    @property
    def name(self) -> str:
        """The layer's name in results, such as "L4"."""
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
        """[I, P, K] how much of the patch each expert of `expert_index` reads, see the module's text."""
        return self.kept if self.read_weight is None else self.read_weight * self.kept

    @property
    def combine_share(self) -> Array:
        """[I, P, K] how much of the patch's output comes from each expert, see the module's text."""
        return self.kept if self.kind == "token_choice" else self.combine_weight * self.kept

    @property
    def requested_share(self) -> Array | None:
        """[I, P, K] the `dispatch_share` before any capacity; None means 1 for each expert of `expert_index`."""
        return None if self.kind == "token_choice" else self.dispatch_share

    def arrays(self) -> dict[str, Array]:
        """The layer's arrays by name."""
        arrays: dict[str, Array] = {name: getattr(self, name) for name in LAYER_ARRAYS}
        if self.read_weight is not None:
            arrays["read_weight"] = self.read_weight
        return arrays

    def select(self, images: slice | Ints) -> LayerTrace:
        """The same layer with some of the images only."""
        arrays: dict[str, Any] = {name: array[images] for name, array in self.arrays().items()}
        return replace(self, **arrays)

    def counts(self) -> Array:
        """[I, E]: the load, int64: how many choices of each image every expert computes.

        Soft MoE: float64, the sum of the `combine_share`, since all experts compute the same number of slots.
        """
        return self._sum_by_expert(
            self.combine_share if self.kind == "soft" else self.dispatch_share
        )

    def image_takes(self) -> Array:
        """[I, E]: `combine_share` summed over the patches of each image; the analysis of classes uses it."""
        return self._sum_by_expert(self.combine_share)

    def _sum_by_expert(self, share: Array) -> Array:
        """[I, E]: shares [I, P, K] summed over patches, by image and expert; int64 of booleans, else float64."""
        dtype = np.int64 if share.dtype == bool else np.float64
        sums = []
        for expert in range(self.num_experts):
            is_chosen = self.expert_index == expert
            sums.append(share.sum((1, 2), dtype, where=is_chosen))
        return np.stack(sums, axis=-1)


SCHEMA = "moevision.trace/1"
"""Version of the file format; the number is raised with a change that older versions would misread."""

IMAGE_ARRAYS = ("labels", "predictions", "probabilities")
# Attributes of the trace, and of its layers under the name of a list of them, that are stored as JSON metadata.
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
        class_names: names of the labels; the model's own class names if it knows all classes of the data.
        grid: (rows, columns) of the patches.
        model: description of the model.
        data: description of the images.
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
    provenance: Json = field(default_factory=dict)
    prediction_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Raise a UserError if the arrays have different numbers of images or patches."""
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
        """Share of the labelled images that are classified correctly.

        None if no image is labelled, or if the classes of labels and of predictions have different names.
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
        indices = np.arange(len(self))[images]
        arrays: dict[str, Any] = {name: getattr(self, name)[indices] for name in IMAGE_ARRAYS}
        return replace(
            self,
            layers=tuple(layer.select(indices) for layer in self.layers),
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
        """The file's metadata: everything except the arrays."""
        values = {name: getattr(self, name) for name in _METADATA}
        for name, attribute in _LAYER_METADATA.items():
            values[name] = [getattr(layer, attribute) for layer in self.layers]
        return metadata_of(values)

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
        """Make a trace from what `arrays()` and `metadata()` returned."""
        fields: dict[str, Any] = {
            name: parse_json(value.encode(), name)
            for name, value in metadata.items()
            if name != "schema"
        }

        indices = fields.pop("layers")  # of the blocks
        kinds = fields.pop("kinds", ["token_choice"] * len(indices))
        routed_units = fields.pop("route_by", ["token"] * len(indices))
        layers = []
        for index, kind, routed_unit in zip(indices, kinds, routed_units, strict=True):
            layer_arrays = {name: arrays[f"L{index}.{name}"] for name in LAYER_ARRAYS}
            if kind == "soft":
                layer_arrays["read_weight"] = arrays[f"L{index}.read_weight"]
            layers.append(LayerTrace(index, kind=kind, route_by=routed_unit, **layer_arrays))

        fields |= {name: arrays[name] for name in IMAGE_ARRAYS}
        fields["picture_names"] = tuple(fields["picture_names"])
        fields["grid"] = tuple(fields["grid"])
        # Older traces store class names without escaped control characters.
        for name in fields.keys() & {"class_names", "prediction_names"}:
            fields[name] = tuple(map(escape_controls, fields[name]))
        return cls(layers=tuple(layers), **fields)


def metadata_of(about: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a trace's file: its schema, and the attributes of `RoutingTrace` without its arrays as JSON.

    `kinds` is written only if some layer isn't token choice, `route_by` only if some layer routes images. Other files
    have the same metadata as in earlier versions.
    """
    defaults = {"kinds": {"token_choice"}, "route_by": {"token"}}
    metadata = {"schema": SCHEMA}
    for name, value in about.items():
        if name not in defaults or set(value) != defaults[name]:
            metadata[name] = json.dumps(value)
    return metadata
