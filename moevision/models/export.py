"""A finished model as one ONNX file, checked against the model that it came from.

A model that knows how far an image lies from its classes (`moevision.models.ood`) tells that beside the logits.
With `routes` the file also tells where the patches went, and takes experts away (`_WithRoutes`).

It holds the network in eval mode for any batch size, and what is needed to use it: class names and the preparation of
an image. Experts are computed by the `dense` backend, all E of them for every token, since ONNX has no operation for
rows sorted by expert. Sparse in its weights, such a file is not sparse in its work.

Axes: B images, C classes, S side of an image in pixels; M MoE layers, P patches, E experts, K choices of a patch.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from moevision.errors import UserError
from moevision.files import write_bytes_atomic
from moevision.layers import Backend, Routing, moe_layers, record_routing, routing_lock
from moevision.models.io import SavedModel
from moevision.models.ood import REFUSED, MahalanobisOOD, answers

Dtype = Literal["fp32", "fp16"]
Runner = Callable[..., Any]
OPSET = 20  # by default; from here on GELU is one of the operators

TOLERANCE: dict[Dtype, float] = {"fp32": 1e-4, "fp16": 5e-2}
"""Largest difference of a logit that passes; the last digit of a logit of 32 in fp16 is 0.03."""

_NOISE, _DRAWS = (
    4,
    3,
)  # images of seeded noise; draws of them, in case rounding chooses another expert in one
_OPSETS = range(18, 24)  # what torch 2.13 writes
_MAX_ONNX_BYTES = 2_000_000_000  # a protobuf ends at 2 GiB


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near it is to the model."""

    path: Path
    size_bytes: int
    pictures: int  # how many were compared, four of seeded noise and the given ones
    max_logit_delta: float  # largest difference of a logit on the noise, and of a distance of 1
    top1_agreement: float  # share of all images for which file and model name the same class


def export_onnx(
    model: SavedModel,
    path: str | Path,
    *,
    opset: int = OPSET,
    dtype: Dtype = "fp32",
    pictures: Tensor | None = None,
    routes: bool = False,
) -> ExportReport:
    """Write the model as ONNX: input `image` float32 [B, 3, S, S], outputs `logits` [B, C] and `distance` [B], any B.

    The distance is left out of a model that was saved without. With `dtype` fp16 weights and arithmetic are that;
    images, logits, distance and routers stay float32. With `routes`, which only patches that choose have, there are
    three more outputs for the MoE layer of each block, of which 3 is an example: `experts.3` int64 [B, P, K], best
    first, their gates `weights.3` [B, P, K], and the router's affinities `probs.3` [B, P, E]. A second input then takes
    experts away from all images: `away` bool [M, E], one row per MoE layer in order of depth, E of the layer that has
    most. Their tokens go to the next best, as under `moevision.analysis.Intervention("ablate", …)`; a choice for which
    no expert is left has the weight 0.

    What `exported_facts(model)` gives are the file's `metadata_props`, each as JSON. The file is run by onnxruntime and
    compared with the model on four images of seeded noise and the prepared `pictures` [n, 3, S, S] before it takes its
    name, in the place of an existing file; the model itself is not changed.

    Raises:
        UserError: if the extra `export` is not installed, the model can't be exported, or the file would answer
            differently by more than `TOLERANCE`; no file is left then.
        OSError: if the file can't be written.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require_extra(name)
    if opset not in _OPSETS:
        raise UserError(f"opset={opset} can't be written: choose {_OPSETS[0]} to {_OPSETS[-1]}.")
    if sum(4 * tensor.numel() for tensor in model.net.state_dict().values()) > _MAX_ONNX_BYTES:
        raise UserError("The model is larger than the 2 GB that one ONNX file can hold.")
    _refuse_layers(model.net, routes)
    with routing_lock(model.net):
        net = copy.deepcopy(model.net)  # an open recorder or intervention is no part of a copy
    net = net.cpu().float().eval().requires_grad_(False)

    halved = copy.deepcopy(net).half() if dtype == "fp16" else net
    written, net = (
        _WithRoutes(told) if routes else told
        for told in (_Exported(own, model.strangers) for own in (halved, net))
    )
    tolerance = TOLERANCE[dtype]
    inputs: list[Tensor] = []  # behind the image
    if isinstance(net, _WithRoutes):
        inputs = [
            torch.zeros(
                len(net.layers),
                max(layer.router.num_experts for layer in net.layers),
                dtype=torch.bool,
            )
        ]
    generator = torch.Generator().manual_seed(0)
    given = (
        torch.zeros(0, 3, model.image_size, model.image_size)
        if pictures is None
        else pictures.cpu().float()
    )
    try:
        data = _to_bytes(_with_backend(written, "dense"), inputs, exported_facts(model), opset)
        run = load_exported(data)
        _with_backend(net, "loop")
        for _ in range(_DRAWS):
            noise = torch.randn(_NOISE, 3, model.image_size, model.image_size, generator=generator)
            # One image alone, then several together: the file is for any batch size.
            parts = [noise[:1], noise[1:], *(given.split(32) if len(given) else ())]
            logits, told = (
                torch.cat([_columns(each(part, *inputs), model) for part in parts])
                for each in (torch.no_grad()(net.__call__), run)
            )  # [n, C], or [n, C + 1] with the distance
            delta = float((told - logits)[:_NOISE].abs().max())
            if delta <= tolerance:  # NaN isn't
                break
    except Exception as error:  # exporters and runtimes fail in many ways; the cause stays attached
        raise UserError(
            f"{type(model.net).__name__} can't be exported ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): try another opset."
        ) from error
    if not delta <= tolerance:
        raise UserError(
            f"The exported file differs from the model by {delta:.2g} in a logit, more than {tolerance:g}, and was not "
            "kept: try another opset."
        )
    path = Path(path)
    write_bytes_atomic(path, data)
    classes = len(model.class_names)
    agreement = float(
        (told[:, :classes].argmax(-1) == logits[:, :classes].argmax(-1)).double().mean()
    )
    return ExportReport(path, len(data), len(logits), delta, agreement)


def _refuse_layers(net: nn.Module, routes: bool) -> None:
    for layer in moe_layers(net):
        if routes and layer.router.kind != "token_choice":
            raise UserError(
                "Routes are exported where patches choose experts: leave them out for this model."
            )
        options = getattr(layer.router, "options", None)
        if (
            options is not None
            and options.eval_capacity_factor is not None
            and options.capacity_group == "batch"
        ):
            raise UserError(
                "With capacity_group='batch' a prediction depends on which images share its batch, so an exported "
                "file would give no definite answer: set capacity_group='image', or leave eval_capacity_factor out."
            )


def exported_facts(model: SavedModel) -> dict[str, Any]:
    """What travels in the file, JSON-ready: the classes, the preparation of an image, and the MoE's shape."""
    # As `square_pixels` does for training and predict; timm's configuration tells what others did with its weights.
    side, crop, interpolation = model.image_size, 1.0, "bicubic"
    resized = {
        "crop": f"resize the short side to {side} px ({interpolation}, antialiased); cut out the central {side} x "
        f"{side} px",
        "pad": f"resize the long side to {side} px ({interpolation}, antialiased); center it on {side} x {side} px of "
        "the colour mean",
        "squash": f"resize to {side} x {side} px ({interpolation}, antialiased)",
    }
    return {
        "class_names": model.class_names,
        "image_size": side,
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": interpolation,
        "crop_pct": crop,
        "fit": model.fit,
        "preprocessing": "Upright RGB of 8 bits: 16-bit grey divided by 257, what is transparent on white; "
        f"{resized[model.fit]}; divide by 255; subtract mean and divide by std, one "
        f"number per channel; float32 [batch, 3, {side}, {side}].",
        "distance": None
        if model.strangers is None
        else "The second output, [batch]: how far an image lies from the nearest class; above 1 lie "
        f"{REFUSED:.0%} of the validation images, and images of other things.",
        "architecture": cast(dict[str, Any], getattr(model.net, "pretrained_cfg", {})).get(
            "architecture"
        ),
        "moe_config": getattr(model.net, "moe_config", None),
    }


class _Exported(nn.Module):
    """A network between images and logits in float32; a second output is the distance from the nearest class."""

    def __init__(self, net: nn.Module, strangers: MahalanobisOOD | None) -> None:
        super().__init__()
        self.net, self.strangers, self.dtype = net, strangers, next(net.parameters()).dtype

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        image = image.to(self.dtype)
        if self.strangers is None:
            return cast(Tensor, self.net(image)).float()
        logits, distance = answers(self.net, self.strangers, image)
        return logits.float(), distance


class _WithRoutes(nn.Module):
    """A network that also tells the routes of the patches, and from which experts can be taken away."""

    def __init__(self, net: _Exported) -> None:
        super().__init__()
        self.net, self.layers = net, moe_layers(net)
        named = {str(layer.layer_index): layer for layer in self.layers}
        self.outputs = [
            f"{what}.{number}" for number in named for what in ("experts", "weights", "probs")
        ]

    def forward(self, image: Tensor, away: Tensor) -> tuple[Tensor, ...]:
        first = int(getattr(self.net.net, "num_prefix_tokens", 0))
        for layer, gone in zip(self.layers, away, strict=True):
            layer.intervention = partial(_without, layer.router, gone[: layer.router.num_experts])
        try:
            with record_routing(self.net) as routings:
                found = self.net(image)
        finally:
            for layer in self.layers:
                layer.intervention = None
        told = [(one.expert_index, one.combine_weight * one.kept, one.probs) for one in routings]
        answer = (found,) if isinstance(found, Tensor) else found
        return (*answer, *(values[:, first:] for layer in told for values in layer))


def _without(router: Any, away: Tensor, routing: Routing) -> Routing:
    """A decision of tokens without some experts, away bool [E]: the next best take their places, at their own gates."""
    index = (
        routing.noisy_logits.masked_fill(away, -torch.inf).topk(routing.top_k).indices
    )  # [B, N, K]
    gate_logits = router.gate_logits(routing)
    top_logits = gate_logits.gather(-1, index).masked_fill(away[index], -torch.inf)
    left = ~away[index]  # fewer than K may be
    gates = router.gates(gate_logits, top_logits).masked_fill(~left, 0.0)
    if hasattr(router, "keep"):  # a rule knows no capacity
        left = left & router.keep(index, gate_logits, top_logits)
    return replace(routing, expert_index=index, combine_weight=gates, kept=left)


def _columns(found: Any, model: SavedModel) -> Tensor:
    """The logits [B, C] of an answer, with the distance behind them [B, C + 1] if the model tells one."""
    if isinstance(found, Tensor):
        return found
    return found[0] if model.strangers is None else torch.cat([found[0], found[1][:, None]], 1)


def _with_backend(net: nn.Module, backend: Backend) -> nn.Module:
    for layer in moe_layers(net):
        layer.experts.backend = backend
    return net


def _to_bytes(net: nn.Module, inputs: list[Tensor], facts: dict[str, Any], opset: int) -> bytes:
    side = int(facts["image_size"])
    with _quiet(), torch.no_grad():
        program = torch.export.export(
            net,
            (
                torch.zeros(2, 3, side, side),
                *inputs,
            ),  # two images: a batch of 1 would be taken for a constant
            dynamic_shapes=({0: Dim("batch", min=1)}, *(None for _ in inputs)),
            strict=False,
            # Soft MoE's reshapes hold for every batch, but torch can't prove it.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # it holds paths of this machine
        told = ["logits"] if facts["distance"] is None else ["logits", "distance"]
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["image", "away"][: 1 + len(inputs)],
            output_names=[*told, *(net.outputs if isinstance(net, _WithRoutes) else ())],
            dynamic_shapes=({0: "batch"}, *(None for _ in inputs)),
            opset_version=opset,
            custom_translation_table=_translations(),
            verbose=False,
        )
        assert onnx_program is not None  # None is for the older exporter
        for name, value in facts.items():
            onnx_program.model.metadata_props[name] = json.dumps(value, ensure_ascii=False)
        return cast(bytes, onnx_program.model_proto.SerializeToString())


def _translations() -> dict[Any, Callable[..., Any]]:
    """Operations of our routers that torch's exporter has no ONNX for."""
    op = require_extra("onnxscript").opset18

    def stable_sort(
        self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False
    ) -> Any:
        # ONNX's TopK is defined to be stable: of equal values the lower index comes first.
        size = op.Shape(self, start=dim, end=dim + 1 if dim != -1 else None)
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def distance(x1: Any, x2: Any, p: float, compute_mode: int | None) -> Any:
        assert p == 2
        apart = op.Sub(op.Unsqueeze(x1, [-2]), op.Unsqueeze(x2, [-3]))
        return op.Sqrt(op.ReduceSum(op.Mul(apart, apart), [-1], keepdims=0))

    return {
        torch.ops.aten.sort.stable: stable_sort,
        torch.ops.aten._cdist_forward.default: distance,
    }


def load_exported(source: bytes | str | Path) -> Runner:
    """The function that a file computes, on the CPU with torch's thread count.

    It takes images [B, 3, S, S] and gives logits [B, C], or a tuple of them and the distances [B]; of a file with
    routes it also takes who is `away` (nobody, if that is left out), and gives the routes.
    """
    runtime = require_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    data = source if isinstance(source, bytes) else str(source)
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Any:
        asked = session.get_inputs()
        nobody = [torch.zeros(one.shape).bool() for one in asked[len(inputs) :]]
        feeds = {
            one.name: given.numpy() for one, given in zip(asked, [*inputs, *nobody], strict=True)
        }
        found = [torch.from_numpy(each) for each in session.run(None, feeds)]
        return found[0] if len(found) == 1 else tuple(found)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    optimizer = logging.getLogger("onnxscript.optimizer")
    level = optimizer.level
    optimizer.setLevel(logging.ERROR)  # it warns of constants that it can't fold
    try:
        with warnings.catch_warnings():
            # torch 2.13 asks its own pytree in a way that it has deprecated.
            warnings.filterwarnings(
                "ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning
            )
            # Colour gates look at the image of each pass before they read what they saw.
            warnings.filterwarnings(
                "ignore", message=r"The tensor attributes?.*\._colours ", category=UserWarning
            )
            yield
    finally:
        optimizer.setLevel(level)


def require_extra(name: str) -> Any:
    """Import a package of the optional extra `export`, or raise a UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"ONNX needs {name}, which is not installed: pip install onnx onnxscript onnxruntime."
        ) from error
