"""Exports a trained model as one ONNX file, or a program of torch.export, and checks the file against the model.

The file holds the network in eval mode for any batch size, and what is needed to use it: class names and the
preparation of an image. If the model was saved with an out-of-distribution detector (`SavedModel.strangers`, see
`moevision.models.ood`), the file outputs the distance of an image from the nearest class beside the logits. With
`routes` it also outputs the routing of the patches, and an input disables experts (`_Exported`).

Experts are computed by the `dense` backend, all E of them for every token, since ONNX has no operation for rows sorted
by expert. So the file saves no computation, although the model is sparse. `export_program` writes the same network
for those who have torch: `torch.export.load` opens it without moevision.

Axes: B images, C classes, S side of an image in pixels; M MoE layers, N tokens, P patches, E experts, K choices of a
token.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from moevision.models.ood import REFUSED, MahalanobisOOD
from moevision.models.shares import patch_shares, shares_refusal
from moevision.types import Json

Dtype = Literal["fp32", "fp16"]
Runner = Callable[..., Any]
OPSET = 20  # the default; the first opset with GELU as an operator

TOLERANCE: dict[Dtype, float] = {"fp32": 1e-4, "fp16": 5e-2}
"""Largest accepted difference of a logit; one unit in the last place of an fp16 logit of 32 is 0.03."""

_NOISE_IMAGES = 4
_OPSETS = range(18, 24)  # those that torch 2.13 can write


@dataclass(frozen=True)
class ExportReport:
    """The written file, and how closely it reproduces the model."""

    path: Path
    size_bytes: int
    pictures: int  # number of compared images: four of seeded noise, and the caller's pictures
    max_logit_delta: float  # largest difference of a logit, or of the distance, on the noise
    top1_agreement: float  # share of all images for which file and model predict the same class
    run: Runner = field(compare=False, repr=False)  # the file's function, which was compared


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

    There is no `distance` for a model that was saved without a detector. With `dtype` fp16 weights and arithmetic are
    half precision; images, logits, distance and routers stay float32.

    With `routes`, which need routers by which tokens choose experts, each MoE layer has three more outputs. In block 3
    they are `experts.3` int64 [B, P, K], best first, their gates `weights.3` [B, P, K], and the router's affinities
    `probs.3` [B, P, E]. A second input disables experts for all images: `away` bool [M, E], one row per MoE layer in
    order of depth; E is the largest number of experts of any layer. Tokens of a disabled expert go to the next best,
    as under `moevision.analysis.Intervention("ablate", …)`; a choice for which no expert is left has the weight 0.
    The last output is `shares` [B, P], each patch's share in the margin of the answer, where a classifier has them
    (`moevision.models.shares`).

    The items of `exported_facts(model)` become the file's `metadata_props`, each as JSON. Before the file is written to
    `path`, onnxruntime runs it, and its outputs are compared with the model's on four images of seeded noise and on
    the prepared `pictures` [n, 3, S, S]. An existing file is replaced; the model itself is not changed.

    Raises:
        UserError: if the extra `export` is not installed, the model can't be exported, or the file would answer
            differently by more than `TOLERANCE`; no file is left then.
        OSError: if the file can't be written.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require_extra(name)
    if opset not in _OPSETS:
        raise UserError(f"opset={opset} can't be written: choose {_OPSETS[0]} to {_OPSETS[-1]}.")

    def write(net: _Exported) -> tuple[bytes, Runner]:
        data = _to_bytes(net, exported_facts(model), opset)
        return data, load_exported(data)

    return _export(
        model,
        Path(path),
        write,
        advice="try another opset",
        dtype=dtype,
        pictures=pictures,
        routes=routes,
    )


def export_program(
    model: SavedModel,
    path: str | Path,
    *,
    dtype: Dtype = "fp32",
    pictures: Tensor | None = None,
) -> ExportReport:
    """Write the model as a program of torch.export, which `torch.export.load` opens without moevision.

    The program takes `image` float32 [B, 3, S, S], any B, and returns (logits [B, C], distance [B]), or (logits,) for
    a model that was saved without a detector. Its extra file `about.json` has `exported_facts(model)`. Checks and
    arguments are those of `export_onnx`. moevision opens no such file: torch unpickles parts of some.

    Raises:
        UserError: if the model can't be exported, or the file would answer differently by more than `TOLERANCE`; no
            file is left then.
        OSError: if the file can't be written.
    """

    def write(net: _Exported) -> tuple[bytes, Runner]:
        data = _to_pt2(net, exported_facts(model))
        return data, torch.export.load(io.BytesIO(data)).module()

    return _export(
        model,
        Path(path),
        write,
        advice="try ONNX (--out NAME.onnx)",
        dtype=dtype,
        pictures=pictures,
    )


def _export(
    model: SavedModel,
    path: Path,
    write: Callable[[_Exported], tuple[bytes, Runner]],
    *,
    advice: str,
    dtype: Dtype,
    pictures: Tensor | None,
    routes: bool = False,
) -> ExportReport:
    """Write what `write` makes of the network, once its function has answered as the model does."""
    _check_exportable(model.net, routes)

    # A float32 copy as the reference, and the module to export. The lock keeps an active recorder or intervention out
    # of the copy.
    with routing_lock(model.net):
        net = copy.deepcopy(model.net)
    net = net.cpu().float().eval().requires_grad_(False)
    reference = _Exported(net, model.strangers, routes)
    exported = reference
    if dtype == "fp16":
        exported = _Exported(copy.deepcopy(net).half(), model.strangers, routes)

    if pictures is None:
        pictures = torch.zeros(0, 3, model.image_size, model.image_size)
    tolerance = TOLERANCE[dtype]
    has_distance = model.strangers is not None
    try:
        _set_backend(exported, "dense")
        data, run = write(exported)
        _set_backend(reference, "loop")
        images, max_delta, agreement = _compare(
            reference, run, pictures.cpu().float(), has_distance
        )
    except Exception as error:  # exporters and runtimes raise errors of many types
        raise UserError(
            f"{type(model.net).__name__} can't be exported ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): {advice}."
        ) from error
    if not max_delta <= tolerance:  # also true for NaN
        raise UserError(
            f"The exported file differs from the model by {max_delta:.2g} in a logit, more than "
            f"{tolerance:g}, and was not kept: {advice}."
        )

    write_bytes_atomic(path, data)
    return ExportReport(path, len(data), images, max_delta, agreement, run)


@torch.no_grad()
def _compare(
    reference: nn.Module, run: Runner, pictures: Tensor, has_distance: bool
) -> tuple[int, float, float]:
    """Number of compared images, largest difference on seeded noise, and agreement on noise and `pictures`."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISE_IMAGES, *pictures.shape[1:], generator=generator)
    # Batches of different sizes, since the file must work for any.
    batches = [noise[:1], noise[1:]]
    if len(pictures):
        batches += pictures.split(32)

    # [n, C], or [n, C + 1] with the distance
    expected = torch.cat([_compared(reference(batch), has_distance) for batch in batches])
    actual = torch.cat([_compared(run(batch), has_distance) for batch in batches])
    noise_deltas = (actual - expected)[:_NOISE_IMAGES].abs()

    num_classes = expected.shape[1] - int(has_distance)
    expected_class = expected[:, :num_classes].argmax(-1)  # [n]
    actual_class = actual[:, :num_classes].argmax(-1)  # [n]
    is_same = actual_class == expected_class
    return len(expected), float(noise_deltas.max()), float(is_same.double().mean())


def _compared(outputs: Any, has_distance: bool) -> Tensor:
    """The outputs that are compared: logits [B, C], or with the distance as the last column [B, C + 1]."""
    if isinstance(outputs, Tensor):
        return outputs
    return torch.column_stack(outputs[: 1 + has_distance])


def _check_exportable(net: nn.Module, routes: bool) -> None:
    """Raise a UserError for models that can't be exported, or not with their routes."""
    for layer in moe_layers(net):
        if routes and layer.router.kind != "token_choice":
            raise UserError(
                "Routes are exported where patches choose experts: leave them out for this model."
            )
        options = getattr(layer.router, "options", None)
        if options is None or options.eval_capacity_factor is None:
            continue
        if options.capacity_group == "batch":
            raise UserError(
                "With capacity_group='batch' a prediction depends on which images share its batch, so an exported "
                "file would give no definite answer: set capacity_group='image', or leave eval_capacity_factor out."
            )


def exported_facts(model: SavedModel) -> Json:
    """The file's metadata, JSON-ready: the classes, the preparation of an image, and the MoE's configuration."""
    # Images are prepared as `square_pixels` does it in training and prediction. The model's timm configuration isn't
    # used: it describes how the pretrained weights were trained.
    side = model.image_size
    interpolation = "bicubic"
    resizing = {
        "crop": f"resize the short side to {side} px ({interpolation}, antialiased); cut out the central {side} x "
        f"{side} px",
        "pad": f"resize the long side to {side} px ({interpolation}, antialiased); center it on {side} x {side} px of "
        "the colour mean",
        "squash": f"resize to {side} x {side} px ({interpolation}, antialiased)",
    }
    distance = None
    if model.strangers is not None:
        distance = (
            "The second output, [batch]: how far an image lies from the nearest class; above 1 lie "
            f"{REFUSED:.0%} of the validation images, and images of other things."
        )
    pretrained_cfg = cast(Json, getattr(model.net, "pretrained_cfg", {}))
    return {
        "class_names": model.class_names,
        "image_size": side,
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": interpolation,
        "crop_pct": 1.0,
        "fit": model.fit,
        "preprocessing": "Upright RGB of 8 bits: 16-bit grey divided by 257, what is transparent on white; "
        f"{resizing[model.fit]}; divide by 255; subtract mean and divide by std, one "
        f"number per channel; float32 [batch, 3, {side}, {side}].",
        "distance": distance,
        "architecture": pretrained_cfg.get("architecture"),
        "moe_config": getattr(model.net, "moe_config", None),
    }


class _Exported(nn.Module):
    """A network of any dtype that takes and returns float32.

    Besides logits it returns distances if there is a detector (`strangers`). With `routes` it also returns the routing
    of the patches, and takes an input that disables experts.
    """

    def __init__(self, net: nn.Module, strangers: MahalanobisOOD | None, routes: bool) -> None:
        super().__init__()
        self.net = net
        self.strangers = strangers
        self.dtype = next(net.parameters()).dtype
        self.layers = moe_layers(net) if routes else []
        self.has_shares = routes and shares_refusal(net) is None
        most_experts = max((layer.router.num_experts for layer in self.layers), default=0)
        self.none_away = torch.zeros(len(self.layers), most_experts, dtype=torch.bool)  # [M, E]

    def output_names(self) -> list[str]:
        """Names of the outputs."""
        names = ["logits"]
        if self.strangers is not None:
            names.append("distance")
        for layer in self.layers:
            names += [f"{kind}.{layer.layer_index}" for kind in ("experts", "weights", "probs")]
        if self.has_shares:
            names.append("shares")
        return names

    def forward(self, image: Tensor, away: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits [B, C], distances [B] if there are any, and the routing; `away` [M, E] marks disabled experts."""
        if away is None:
            away = self.none_away
        for position, layer in enumerate(self.layers):
            is_ablated = away[position, : layer.router.num_experts]
            layer.intervention = partial(_ablate, layer.router, is_ablated)

        image = image.to(self.dtype)
        try:
            with record_routing(self.net) as routings:
                net = cast(Any, self.net)
                tokens = net.forward_features(image)
                outputs = [net.forward_head(tokens).float()]
                if self.strangers is not None:
                    features = net.forward_head(tokens, pre_logits=True)
                    outputs.append(self.strangers(features))
        finally:
            for layer in self.layers:
                layer.intervention = None

        for routing in routings[: len(self.layers)]:
            weight = routing.combine_weight * routing.kept  # [B, N, K]
            # [B, N, K] or [B, N, E] -> the same of the patches, [B, P, ...]
            for token_values in (routing.expert_index, weight, routing.probs):
                outputs.append(token_values[:, routing.num_prefix_tokens :])
        if self.has_shares:
            outputs.append(patch_shares(net, tokens).margins().float())
        return tuple(outputs)


def _ablate(router: Any, is_ablated: Tensor, routing: Routing) -> Routing:
    """A routing without the ablated experts (bool [E]): the next best replace them, with gates of their own."""
    scores = routing.noisy_logits.masked_fill(is_ablated, -torch.inf)  # [B, N, E]
    index = scores.topk(routing.top_k).indices  # [B, N, K]
    kept = ~is_ablated[index]  # [B, N, K]; fewer than K experts may be left

    gate_logits = router.gate_logits(routing)  # [B, N, E]
    top_logits = gate_logits.gather(-1, index).masked_fill(~kept, -torch.inf)  # [B, N, K]
    gates = router.gates(gate_logits, top_logits).masked_fill(~kept, 0.0)
    if hasattr(router, "keep"):  # routers with a capacity; the rule-based ones have none
        kept = kept & router.keep(index, gate_logits, top_logits)
    return replace(routing, expert_index=index, combine_weight=gates, kept=kept)


def _set_backend(net: nn.Module, backend: Backend) -> None:
    for layer in moe_layers(net):
        layer.experts.backend = backend


def _to_program(net: _Exported, side: int) -> torch.export.ExportedProgram:
    """The network as a program of torch.export, for images [B, 3, side, side] of any B."""
    # Two images, since torch.export would take a batch size of 1 for a constant.
    inputs = [torch.zeros(2, 3, side, side)]
    if net.layers:
        inputs.append(net.none_away)

    with _quiet(), torch.no_grad():
        program = torch.export.export(
            net,
            tuple(inputs),
            dynamic_shapes=({0: Dim("batch", min=1)}, None)[: len(inputs)],
            strict=False,
            # Soft MoE's reshapes are valid for every batch size, but torch can't prove it.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    _remove_stack_traces(program)
    return program


def _to_pt2(net: _Exported, facts: Json) -> bytes:
    """The file of torch.export, with `facts` as its extra file `about.json`."""
    program = _to_program(net, int(facts["image_size"]))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"about.json": json.dumps(facts)})
    return file.getvalue()


def _to_bytes(net: _Exported, facts: Json, opset: int) -> bytes:
    """The ONNX file of a network, with `facts` as its metadata."""
    program = _to_program(net, int(facts["image_size"]))
    inputs = ["image", "away"] if net.layers else ["image"]

    with _quiet(), torch.no_grad():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            input_names=inputs,
            output_names=net.output_names(),
            dynamic_shapes=({0: "batch"}, None)[: len(inputs)],
            opset_version=opset,
            custom_translation_table={
                torch.ops.aten.sort.stable: _stable_sort,
                torch.ops.aten._cdist_forward.default: _euclidean_distance,
            },
            verbose=False,
        )

        assert onnx_program is not None  # only the exporter without dynamo returns None
        for name, value in facts.items():
            onnx_program.model.metadata_props[name] = json.dumps(value, ensure_ascii=False)
        result: bytes = onnx_program.model_proto.SerializeToString()
        return result


def _remove_stack_traces(program: torch.export.ExportedProgram) -> None:
    """Remove the stack traces from the graph: they hold paths of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


# ---- operations of our routers that torch's exporter can't translate; the functions have torch's arguments


def _stable_sort(
    self: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Any:
    """A sort as TopK of all values, which ONNX defines as stable: of equal values the lower index comes first."""
    op = require_extra("onnxscript").opset18
    end = None if dim == -1 else dim + 1
    size = op.Shape(self, start=dim, end=end)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _euclidean_distance(x1: Any, x2: Any, p: float, compute_mode: int | None) -> Any:
    """Distances [..., n, m] between the rows of x1 [..., n, D] and those of x2 [..., m, D]."""
    assert p == 2
    op = require_extra("onnxscript").opset18
    rows = op.Unsqueeze(x1, [-2])  # [..., n, 1, D]
    columns = op.Unsqueeze(x2, [-3])  # [..., 1, m, D]
    difference = op.Sub(rows, columns)
    squares = op.Mul(difference, difference)
    return op.Sqrt(op.ReduceSum(squares, [-1], keepdims=0))


# ---- running a file


def load_exported(source: bytes | str | Path) -> Runner:
    """The function that a file computes, on the CPU with torch's thread count.

    It takes images [B, 3, S, S] and returns logits [B, C], or a tuple of them and the distances [B]. With routes it
    also takes `away` [M, E] (default: no expert is disabled), and returns the outputs of the routing too.
    """
    runtime = require_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    data = source if isinstance(source, bytes) else str(source)
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return partial(_run, session)


def _run(session: Any, image: Tensor, away: Tensor | None = None) -> Any:
    arrays = {"image": image.numpy()}
    for entry in session.get_inputs()[1:]:  # `away`, if the file has routes
        none_away = torch.zeros(entry.shape, dtype=torch.bool)
        arrays[entry.name] = (none_away if away is None else away).numpy()
    outputs = [torch.from_numpy(array) for array in session.run(None, arrays)]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of the exporter that a user can't act on."""
    optimizer = logging.getLogger("onnxscript.optimizer")
    level = optimizer.level
    optimizer.setLevel(logging.ERROR)  # hides warnings of constants that it can't fold
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
