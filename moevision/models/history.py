"""How routing formed: what a model did with a few fixed images at some moments of its training.

`fit` writes `routing_history.safetensors` into the run folder, of test images or of those in a folder; bundled models
carry the history of the images that the explorer shows. The last moment is the saved model. One safetensors file:

- metadata `history`, a JSON object: `schema` (`moevision.history/1`), `steps` ([T] optimizer steps done at each moment,
  0 before the training), `total_steps` (of the whole training), `image_names` ([I]), `class_names` ([C]), `layers` ([L]
  block numbers), `grid` ([rows, columns] of patches), `pretrained` (whether layers had been trained before the step 0);
- `probabilities` [T, I, C] float16, and for each layer `L<block>.weights` [T, I, P, E] float16: the weight that each
  patch gives to each expert, 0 where it is not routed.

Axes: T moments, I images, P patches (row-major, prefix tokens left out), E experts, C classes, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from moevision.errors import UserError, escape_controls, json_text
from moevision.files import write_bytes_atomic
from moevision.layers import forward_routing
from moevision.layers.routing import evaluating
from moevision.models.safe_files import parse_json, read_header, read_metadata

SCHEMA: Final = "moevision.history/1"
"""Version of the file; a change that an older reader would misread raises the number."""
FILE: Final = "routing_history.safetensors"
_BATCH = 16
Half = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Moment:
    """What a model does with the images at one moment."""

    probabilities: Half  # [I, C]
    weights: dict[int, Half]  # [I, P, E] by block number
    grid: tuple[int, int]  # rows and columns of patches


@torch.no_grad()
def moment_of(net: nn.Module, images: Tensor) -> Moment:
    """Route images [I, 3, H, W] through a model in evaluation mode; every module's mode is left as it was."""
    with evaluating(net):
        passes = [forward_routing(net, batch) for batch in images.split(_BATCH)]
    weights = {}
    first = passes[0][1]
    for place, routing in enumerate(first):
        of_patches = [
            each[place].expert_weights()[:, routing.num_prefix_tokens :] for _, each in passes
        ]
        weights[int(routing.layer or 0)] = _half(torch.cat(of_patches))
    probabilities = torch.cat([logits.float().softmax(-1) for logits, _ in passes])
    return Moment(
        _half(probabilities),
        weights,
        first[0].grid or (1, weights[int(first[0].layer or 0)].shape[1]),
    )


def _half(values: Tensor) -> Half:
    return values.half().cpu().numpy()


@dataclass(frozen=True, eq=False)
class RoutingHistory:
    """The routing of some images at moments of a training, in order."""

    image_names: tuple[str, ...]  # [I] names, such as paths below a folder
    class_names: tuple[str, ...]  # [C] names
    total_steps: int  # optimizer steps of the whole training
    pretrained: bool = False  # whether the training began with pretrained layers
    steps: tuple[int, ...] = ()  # [T] optimizer steps done at each moment
    grid: tuple[int, int] = (
        0,
        0,
    )  # rows and columns of patches; (0, 0) as long as there is no moment
    probabilities: Half = field(
        default_factory=lambda: np.zeros((0, 0, 0), np.float16), repr=False
    )  # [T, I, C]
    weights: Mapping[int, Half] = field(
        default_factory=dict, repr=False
    )  # [T, I, P, E] by block number

    def __len__(self) -> int:
        """Number of moments."""
        return len(self.steps)

    @property
    def layers(self) -> list[int]:
        """Block numbers of the MoE layers."""
        return list(self.weights)

    def first_choice(self, layer: int) -> npt.NDArray[np.int64]:
        """[T, I, P]: the expert that each patch gives the most weight; -1 where it is not routed."""
        weights = self.weights[layer]
        return np.where(weights.any(-1), weights.argmax(-1), -1)

    def plus(self, step: int, moment: Moment) -> RoutingHistory:
        """With one more moment, after `step` optimizer steps."""
        return replace(
            self,
            steps=(*self.steps, step),
            grid=moment.grid,
            probabilities=np.stack([*self.probabilities, moment.probabilities]),
            weights={
                layer: np.stack([*self.weights.get(layer, ()), own])
                for layer, own in moment.weights.items()
            },
        )

    def until(self, step: int) -> RoutingHistory:
        """Without the moments after `step`."""
        kept = sum(each <= step for each in self.steps)
        return replace(
            self,
            steps=self.steps[:kept],
            probabilities=self.probabilities[:kept],
            weights={layer: own[:kept] for layer, own in self.weights.items()},
        )

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {"probabilities": np.ascontiguousarray(self.probabilities)}
        tensors |= {
            f"L{layer}.weights": np.ascontiguousarray(own) for layer, own in self.weights.items()
        }
        words: dict[str, Any] = {"schema": SCHEMA, **{name: getattr(self, name) for name in _WORDS}}
        # One entry: safetensors writes several in any order, and equal histories shall be equal files.
        write_bytes_atomic(path, save(tensors, {_KEY: json_text(words)}))

    @classmethod
    def load(cls, path: str | Path) -> RoutingHistory:
        """Read a file."""
        try:
            read_header(path)  # within limits, and no more than the file holds
            metadata = read_metadata(path)
        except FileNotFoundError as error:
            raise UserError(f"There is no {path}: record one with moevision fit.") from error
        if _KEY not in metadata:
            raise UserError(f"{path} is no routing history: give one that moevision fit wrote.")
        words = parse_json(metadata[_KEY].encode(), _KEY)
        schema = words.get("schema") if isinstance(words, dict) else None
        if schema != SCHEMA:
            raise UserError(
                f"{path} has the schema {schema!r}, and this version reads {SCHEMA}: record it again."
            )
        try:
            return cls._of(load_file(path), words)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(
                f"The routing history {path} is damaged ({error}): record it again."
            ) from error

    @classmethod
    def _of(cls, tensors: Mapping[str, Any], words: Mapping[str, Any]) -> RoutingHistory:
        rows, columns = words["grid"]
        moments, images = len(words["steps"]), len(words["image_names"])
        history = cls(
            image_names=tuple(map(escape_controls, words["image_names"])),
            class_names=tuple(map(escape_controls, words["class_names"])),
            total_steps=int(words["total_steps"]),
            pretrained=bool(words.get("pretrained")),
            steps=tuple(map(int, words["steps"])),
            grid=(int(rows), int(columns)),
            probabilities=tensors["probabilities"],
            weights={int(layer): tensors[f"L{layer}.weights"] for layer in words["layers"]},
        )
        wanted = (moments, images, len(history.class_names))
        if history.probabilities.shape != wanted or any(
            own.ndim != 4 or own.shape[:3] != (moments, images, rows * columns)
            for own in history.weights.values()
        ):
            raise ValueError("its arrays don't fit its header")
        if list(history.steps) != sorted(set(history.steps)):
            raise ValueError("its moments are in no order")
        return history


_KEY: Final = "history"
_WORDS: Final = (
    "steps",
    "total_steps",
    "pretrained",
    "image_names",
    "class_names",
    "layers",
    "grid",
)


def planned_moments(total_steps: int, moments: int) -> list[int]:
    """Steps from 0 to the last one, close together at first, where routing changes most: total · (i / (n - 1))²."""
    steps: Sequence[int] = [round(total_steps * (i / (moments - 1)) ** 2) for i in range(moments)]
    return sorted(set(steps))
