"""How routing formed: what a model did with a few fixed images at some moments of its training.

`fit` writes `routing_history.safetensors` into the run folder, of test images or of those in a folder; bundled models
carry the history of the images that the explorer shows. The last moment is of the saved weights. One safetensors file:

- metadata `history`, a JSON object: `schema` (`moevision.history/1`), `steps` ([T] optimizer steps done at each moment,
  0 before the training), `total_steps` (of the whole training), `image_names` ([I]), `class_names` ([C]), `layers` ([L]
  block numbers), `grid` ([rows, columns] of patches), `pretrained` (whether the training began from such weights);
- `probabilities` [T, I, C] float16, and for each layer `L<block>.weights` [T, I, P, E] float16: the weight that each
  patch gives to each expert, 0 where it is not routed.

Axes: T moments, I images, P patches (row-major, prefix tokens left out), E experts, C classes, L MoE layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

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
from moevision.types import Ints

SCHEMA = "moevision.history/1"
"""Version of the file; a change that an older reader would misread raises the number."""
FILE = "routing_history.safetensors"
_BATCH_SIZE = 16  # images of a forward pass
Half = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Moment:
    """What a model does with the images at one moment."""

    probabilities: Half  # [I, C]
    weights: dict[int, Half]  # [I, P, E] by block number
    grid: tuple[int, int]  # rows and columns of patches


@torch.no_grad()
def moment_of(
    net: nn.Module,
    images: Tensor,
    activation: Callable[[Tensor], Tensor] = nn.Softmax(-1),  # noqa: B008 (it holds nothing)
) -> Moment:
    """Route images [I, 3, H, W] through a model in evaluation mode; every module's mode is left as it was.

    `activation` makes probabilities of logits [B, C].
    """
    probabilities = []  # [batch, C] for each batch
    weights = defaultdict(list)  # [batch, P, E] for each layer and batch
    with evaluating(net):
        for batch in images.split(_BATCH_SIZE):
            logits, routings = forward_routing(net, batch)
            probabilities.append(activation(logits.float()))
            for routing in routings:
                patch_weights = routing.expert_weights()[:, routing.num_prefix_tokens :]
                weights[cast(int, routing.layer)].append(patch_weights)

    return Moment(
        probabilities=_to_half(probabilities),
        weights={layer: _to_half(batches) for layer, batches in weights.items()},
        grid=cast(tuple[int, int], routings[0].grid),  # the same in all layers of a ViT
    )


def _to_half(batches: list[Tensor]) -> Half:
    return torch.cat(batches).half().cpu().numpy()


@dataclass(frozen=True, eq=False)
class RoutingHistory:
    """The routing of some images at moments of a training, in order."""

    image_names: tuple[str, ...]  # [I] names, such as paths below a folder
    class_names: tuple[str, ...]  # [C] names
    total_steps: int  # optimizer steps of the whole training
    pretrained: bool = False  # whether the training began from pretrained weights
    steps: tuple[int, ...] = ()  # [T] optimizer steps done at each moment
    # rows and columns of patches; (0, 0) as long as there is no moment
    grid: tuple[int, int] = (0, 0)
    # [T, I, C]
    probabilities: Half = field(default_factory=lambda: np.zeros((0, 0, 0), np.float16), repr=False)
    # [T, I, P, E] by block number
    weights: Mapping[int, Half] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Number of moments."""
        return len(self.steps)

    @property
    def layers(self) -> list[int]:
        """Block numbers of the MoE layers."""
        return list(self.weights)

    def first_choice(self, layer: int) -> Ints:
        """[T, I, P]: the expert that each patch gives the most weight; -1 where it is not routed."""
        weights = self.weights[layer]
        return np.where(weights.any(-1), weights.argmax(-1), -1)

    def plus(self, step: int, moment: Moment) -> RoutingHistory:
        """With one more moment, after `step` optimizer steps."""
        weights = {}
        for layer, now in moment.weights.items():
            before = self.weights.get(layer, ())
            weights[layer] = np.stack([*before, now])
        return replace(
            self,
            steps=(*self.steps, step),
            grid=moment.grid,
            probabilities=np.stack([*self.probabilities, moment.probabilities]),
            weights=weights,
        )

    def until(self, step: int) -> RoutingHistory:
        """The moments at and before `step`."""
        num_moments = bisect_right(self.steps, step)
        return replace(
            self,
            steps=self.steps[:num_moments],
            probabilities=self.probabilities[:num_moments],
            weights={layer: weights[:num_moments] for layer, weights in self.weights.items()},
        )

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {"probabilities": np.ascontiguousarray(self.probabilities)}
        for layer, weights in self.weights.items():
            tensors[f"L{layer}.weights"] = np.ascontiguousarray(weights)
        header = {"schema": SCHEMA} | {name: getattr(self, name) for name in _HEADER_FIELDS}
        # All in one entry: safetensors keeps no order of several, and equal histories must give equal files.
        write_bytes_atomic(path, save(tensors, {_METADATA_KEY: json_text(header)}))

    @classmethod
    def load(cls, path: str | Path) -> RoutingHistory:
        """Read a file."""
        try:
            # Raises ValueError for a header that is too large, or that describes more bytes than the file has.
            read_header(path)
            header = parse_json(read_metadata(path)[_METADATA_KEY].encode(), _METADATA_KEY)
            if header["schema"] != SCHEMA:
                raise ValueError(
                    f"its schema is {header['schema']!r}, and this version reads {SCHEMA}"
                )
            return cls._from_file(load_file(path), header)
        except FileNotFoundError as error:
            raise UserError(f"There is no {path}: record one with moevision fit.") from error
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path} is no routing history, or it is damaged ({error}): record it again."
            ) from error

    @classmethod
    def _from_file(cls, tensors: Mapping[str, Half], header: Mapping[str, Any]) -> RoutingHistory:
        rows, columns = header["grid"]
        history = cls(
            image_names=tuple(map(escape_controls, header["image_names"])),
            class_names=tuple(map(escape_controls, header["class_names"])),
            total_steps=int(header["total_steps"]),
            pretrained=bool(header.get("pretrained")),
            steps=tuple(map(int, header["steps"])),
            grid=(int(rows), int(columns)),
            probabilities=tensors["probabilities"],
            weights={int(layer): tensors[f"L{layer}.weights"] for layer in header["layers"]},
        )

        leading_shape = (len(history.steps), len(history.image_names))  # T, I
        shapes_fit = history.probabilities.shape == (*leading_shape, len(history.class_names))
        for weights in history.weights.values():
            shapes_fit &= weights.ndim == 4 and weights.shape[:3] == (
                *leading_shape,
                rows * columns,
            )
        if not shapes_fit:
            raise ValueError("its arrays don't fit its header")
        if list(history.steps) != sorted(set(history.steps)):
            raise ValueError("its steps don't rise")
        return history


_METADATA_KEY = "history"
_HEADER_FIELDS = (
    "steps",
    "total_steps",
    "pretrained",
    "image_names",
    "class_names",
    "layers",
    "grid",
)


def planned_moments(total_steps: int, num_moments: int) -> list[int]:
    """Steps from 0 to the last one, close together at first, where routing changes most: total · (i / (n - 1))².

    n is `num_moments`, at least 2, and i counts from 0 to n - 1.
    """
    fractions = [number / (num_moments - 1) for number in range(num_moments)]
    return sorted({round(total_steps * fraction**2) for fraction in fractions})
