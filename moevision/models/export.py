"""A finished model as one file, checked against the model that it came from: ONNX, or a torch.export program.

ONNX (Open Neural Network Exchange, https://onnx.ai) is run by onnxruntime and many others; a torch.export program by
torch alone. Both hold the network in fp32 and eval mode for any batch size, and what is needed to use it: class names
and the preparation of an image. Experts are computed by the `dense` backend, all E of them for every token, since
neither format has an operation for rows sorted by expert. Sparse in its weights, such a file is not sparse in its work.

Axes: B images, C classes, S side of an image in pixels, E experts, K choices of a token, N tokens.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moevision.errors import UserError
from moevision.files import write_bytes_atomic
from moevision.layers import Backend, ExpertChoiceRouting, Routing, forward_routing, moe_layers, routing_lock
from moevision.models.io import SavedModel

Format = Literal["onnx", "torch"]
Runner = Callable[[Tensor], Tensor]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 20  # by default

METADATA_FILE = "moevision.json"
"""Name of the description among the `extra_files` of a torch.export program."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

TOLERANCE = 1e-4
"""Largest difference of a logit that passes."""

_TIE = 1e-5  # scores closer than this may be ordered otherwise by other arithmetic
_CHECKED = 4  # images of seeded noise: one alone, then three together
_OPSETS = range(18, 24)  # what torch 2.13 writes
_MAX_ONNX_BYTES = 2_000_000_000  # a protobuf ends at 2 GiB


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near it is to the model.

    Attributes:
        path: the file.
        format: `onnx` or `torch`.
        size_bytes: its size.
        pictures: how many were compared, four of seeded noise and the given ones.
        max_logit_delta: largest difference of a logit, over all images without a near tie.
        top1_agreement: share of all images for which file and model name the same class.
        near_ties: given images on which two scores of a router are so close that rounding chooses the expert.
        near_tie_delta: largest difference of a logit over those; 0 if there are none.
    """

    path: Path
    format: Format
    size_bytes: int
    pictures: int
    max_logit_delta: float
    top1_agreement: float
    near_ties: int
    near_tie_delta: float


def export_onnx(
    model: SavedModel, path: str | Path, *, opset: int = OPSET, pictures: Tensor | None = None
) -> ExportReport:
    """Write the model as ONNX: input `image` float32 [B, 3, S, S], output `logits` float32 [B, C], any B.

    The facts of `describe(model)` are the file's `metadata_props`, each as JSON. The file is run by onnxruntime and
    compared with the model before it gets its name; the model itself is not changed.

    Args:
        model: a loaded model.
        path: file to write; an existing one is replaced.
        opset: version of ONNX's operators, 18 to 23; from 20 on GELU is one of them.
        pictures: [n, 3, S, S] prepared images to compare too, besides four of seeded noise.

    Raises:
        UserError: if the extra `export` is not installed, the model can't be exported, or the file would answer
            differently by more than 1e-4; no file is left then.
        OSError: if the file can't be written.
    """
    for name in ONNX_PACKAGES:
        require_extra(name)
    if opset not in _OPSETS:
        raise UserError(f"opset={opset} can't be written: choose {_OPSETS[0]} to {_OPSETS[-1]}.")
    if sum(4 * tensor.numel() for tensor in model.net.state_dict().values()) > _MAX_ONNX_BYTES:
        raise UserError("The model is larger than the 2 GB that one ONNX file can hold: export it as torch.")
    return _export(model, Path(path), "onnx", opset, pictures)


def export_torch(model: SavedModel, path: str | Path, *, pictures: Tensor | None = None) -> ExportReport:
    """Write the model as a torch.export program, which runs with torch alone (neither timm nor moevision).

    `describe(model)` is the JSON of the extra file `moevision.json`. The rest is as for `export_onnx`.
    """
    return _export(model, Path(path), "torch", 0, pictures)


def describe(model: SavedModel) -> dict[str, Any]:
    """What travels in the file, JSON-ready: the classes, the preparation of an image, and the MoE's shape."""
    # As `square_pixels` does for training and predict; timm's configuration tells what others did with its weights.
    side, crop, interpolation = model.image_size, 1.0, "bicubic"
    sentence = (
        f"Upright RGB; resize the short side to {side} px ({interpolation}, antialiased); cut out "
        f"the central {side} x {side} px; divide by 255; subtract mean and divide by std, one number per channel; "
        f"float32 [batch, 3, {side}, {side}]."
    )
    return {
        "class_names": model.class_names,
        "image_size": side,
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": interpolation,
        "crop_pct": crop,
        "preprocessing": sentence,
        "architecture": cast(dict[str, Any], getattr(model.net, "pretrained_cfg", {})).get("architecture"),
        "moe_config": getattr(model.net, "moe_config", None),
    }


def check_exportable(net: nn.Module) -> None:
    """Raise a UserError that says why a model can't be exported, if it is of a kind that can't."""
    for layer in moe_layers(net):
        options = getattr(layer.router, "options", None)
        if options is not None and options.eval_capacity_factor is not None and options.capacity_group == "batch":
            raise UserError(
                "With capacity_group='batch' a prediction depends on which images share its batch, so an exported "
                "file would give no definite answer: set capacity_group='image', or leave eval_capacity_factor out."
            )


def _export(model: SavedModel, path: Path, format: Format, opset: int, pictures: Tensor | None) -> ExportReport:
    check_exportable(model.net)
    with routing_lock(model.net):
        net = copy.deepcopy(model.net)  # an open recorder or intervention is no part of a copy
    net = _with_backend(net.cpu().float().eval().requires_grad_(False), "loop")
    images = _decided_noise(net, model.image_size)
    if pictures is not None:
        images = torch.cat([images, pictures.cpu().float()])
    logits, margin = _answers(net, images)
    try:
        data = to_bytes(_with_backend(net, "dense"), model.image_size, format, describe(model), opset)
        run = load_exported(data, format)
        batches = [images[:1], images[1:_CHECKED], *images[_CHECKED:].split(32)]
        answers = torch.cat([run(batch) for batch in batches if len(batch)])
    except Exception as error:  # exporters and runtimes fail in many ways; the cause stays attached
        raise UserError(
            f"{type(net).__name__} can't be exported as {format} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): try the other format."
        ) from error
    decided = margin > _TIE
    differences = (answers - logits).abs().amax(-1)
    delta = float(differences[decided].max())
    if not delta <= TOLERANCE:  # NaN too
        raise UserError(
            f"The exported file differs from the model by {delta:.2g} in a logit, more than {TOLERANCE:g}, and was not "
            "kept: try the other format, or another opset."
        )
    write_bytes_atomic(path, data)
    agreement = float((answers.argmax(-1) == logits.argmax(-1)).double().mean())
    ties = differences[~decided]
    near_tie_delta = float(ties.max()) if len(ties) else 0.0
    return ExportReport(path, format, len(data), len(images), delta, agreement, len(ties), near_tie_delta)


def _with_backend(net: nn.Module, backend: Backend) -> nn.Module:
    for layer in moe_layers(net):
        layer.experts.backend = backend
    return net


def _decided_noise(net: nn.Module, side: int) -> Tensor:
    """[4, 3, S, S] seeded noise on which no router's choice is a near tie."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(0, 3, side, side)
    for _ in range(8):
        noise = torch.randn(_CHECKED, 3, side, side, generator=generator)
        found = torch.cat([found, noise[_answers(net, noise)[1] > _TIE]])[:_CHECKED]
        if len(found) == _CHECKED:
            return found
    raise UserError(
        "Scores of a router tie, so that rounding chooses the experts and no two programs agree (an untrained "
        "noisy_top_k does this): train the model before exporting it."
    )


@torch.no_grad()
def _answers(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The model's logits [n, C], and for each image [n] how close the closest choice of a router was."""
    logits, margins = [], []
    for part in images.split(32):
        part_logits, routings = forward_routing(net, part)
        logits.append(part_logits)
        margins.append(torch.stack([torch.full((len(part),), torch.inf), *map(choice_margin, routings)]).amin(0))
    return torch.cat(logits), torch.cat(margins)


def choice_margin(routing: Routing) -> Tensor:
    """[B]: the least that the last score that was chosen lies above the first that was not, over an image."""
    scores, chosen = routing.noisy_logits, routing.top_k
    if isinstance(routing, ExpertChoiceRouting):
        scores, chosen = routing.noisy_logits.softmax(-1).mT, routing.token_index.shape[-1]
    if chosen == scores.shape[-1]:  # Soft MoE chooses nothing either
        return torch.full((len(scores),), torch.inf)
    ranked = scores.topk(chosen + 1, dim=-1).values
    return (ranked[..., chosen - 1] - ranked[..., chosen]).flatten(1).amin(1)


def to_bytes(net: nn.Module, side: int, format: Format, metadata: Mapping[str, Any], opset: int) -> bytes:
    """The file of a network in eval mode on the CPU, whose experts have the `dense` backend.

    Args:
        net: images [B, 3, S, S] -> logits [B, C].
        side: S.
        format: `onnx` or `torch`.
        metadata: JSON-ready facts that travel in the file.
        opset: version of ONNX's operators.
    """
    with _quiet(), torch.no_grad():
        program = _trace(net, side)
        return _to_onnx(program, metadata, opset) if format == "onnx" else _to_torch(program, metadata)


def _trace(net: nn.Module, side: int) -> ExportedProgram:
    program = torch.export.export(
        net,
        (torch.zeros(2, 3, side, side),),  # two images: a batch of 1 would be taken for a constant
        dynamic_shapes=({0: Dim("batch", min=1)},),
        strict=False,
        # Soft MoE's reshapes hold for every batch, but torch can't prove it.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it holds paths of this machine
    return program


def _to_torch(program: ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata, ensure_ascii=False)})
    return file.getvalue()


def _to_onnx(program: ExportedProgram, metadata: Mapping[str, Any], opset: int) -> bytes:
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        opset_version=opset,
        custom_translation_table=_translations(),
        verbose=False,
    )
    assert onnx_program is not None  # None is for the older exporter
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items()}
    onnx_program.model.metadata_props.update(texts)
    return cast(bytes, onnx_program.model_proto.SerializeToString())


def _translations() -> dict[Any, Callable[..., Any]]:
    """Operations of our routers that torch's exporter has no ONNX for."""
    op = require_extra("onnxscript").opset18

    def stable_sort(self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # ONNX's TopK is defined to be stable: of equal values the lower index comes first.
        size = op.Shape(self, start=dim, end=dim + 1 if dim != -1 else None)
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def distance(x1: Any, x2: Any, p: float, compute_mode: int | None) -> Any:
        if p != 2:
            raise NotImplementedError(f"distance of order {p}")
        apart = op.Sub(op.Unsqueeze(x1, [-2]), op.Unsqueeze(x2, [-3]))
        return op.Sqrt(op.ReduceSum(op.Mul(apart, apart), [-1], keepdims=0))

    return {torch.ops.aten.sort.stable: stable_sort, torch.ops.aten._cdist_forward.default: distance}


def load_exported(source: bytes | str | Path, format: Format) -> Runner:
    """The function images [B, 3, S, S] -> logits [B, C] that a file computes, on the CPU with torch's thread count.

    Loading a torch program can run code that is hidden in it: open only files of people you trust.
    """
    if format == "torch":
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        program = torch.export.load(file).module()
        return torch.no_grad()(lambda images: cast(Tensor, program(images)))
    runtime = require_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    data = source if isinstance(source, bytes) else str(source)
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    optimizer = logging.getLogger("onnxscript.optimizer")
    level = optimizer.level
    optimizer.setLevel(logging.ERROR)  # it warns of constants that it can't fold
    try:
        with warnings.catch_warnings():
            # torch 2.13 asks its own pytree in a way that it has deprecated.
            warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
            # Colour gates look at the image of each pass before they read what they saw.
            warnings.filterwarnings("ignore", message=r"The tensor attributes?.*\._colours ", category=UserWarning)
            yield
    finally:
        optimizer.setLevel(level)


def require_extra(name: str) -> Any:
    """Import a package of the optional extra `export`, or raise a UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'ONNX needs {name}, which is not installed: pip install "moevision[export]".') from error
