"""The two formats of an exported model: how a network becomes the bytes of a file, and how a file runs again.

ONNX (Open Neural Network Exchange, https://onnx.ai) is run by onnxruntime and many others; a torch.export program by
torch alone. What is written, and how it is checked, stands in `moevision.models.export`.

Axes: B images, C classes, S side of a picture in pixels.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moevision.errors import UserError

Format = Literal["onnx", "torch"]
Runner = Callable[[Tensor], Tensor]

SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
METADATA_FILE = "moevision.json"
"""Name of the description among the `extra_files` of a torch.export program."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


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
            # Colour gates look at the picture of each pass before they read what they saw.
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
