"""What a plan needs to know about a model, counted in the model itself without its memory and without computing.

- Parameters: what is there, what learns, and how many moments the optimizer keeps of it.
- FLOPs: one image, as in training (without the patches that are left out there), through a copy of the model without
  storage (torch's meta device) under torch's counter.
- Activations: two passes of such a copy on torch's fake tensors, under autocast, with a note of every tensor that
  autograd keeps for the backward pass; what a second pair of images adds, halved, is one image's.

Choices depend on data, which isn't there. All experts run where FLOPs are counted, and those of the rows that a routing
asks for are told by their number; where activations are counted, none runs, since a row's part is known
(`formulas.ModelShape.row_bytes`).

Axes: B images, N tokens, D width, H hidden width, E experts, K choices, T = B·N tokens, R rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.planner.formulas import ModelShape, MoEShape, Weights
from moevision.efficiency import count_layers, flop_counter
from moevision.layers import ExpertChoiceRouting, SoftRouting, moe_layers
from moevision.layers.cpu import take_rows
from moevision.layers.moe import Dispatched, LocalDispatcher
from moevision.layers.routing import Routing
from moevision.models.vit_moe import checkpoint_blocks
from moevision.train.optim import matrices_of

if TYPE_CHECKING:
    from moevision.train.optim import OptimizerName


def checkpointed_blocks(net: nn.Module) -> tuple[int, ...]:
    """Indices of the blocks that are computed again in the backward pass."""
    blocks: Any = cast(Any, net).blocks
    if getattr(net, "grad_checkpointing", False):
        return tuple(range(len(blocks)))
    return tuple(index for index, block in enumerate(blocks) if "forward" in vars(block))


def shape_of(
    net: nn.Module,
    image_size: int,
    *,
    name: str = "model",
    optimizer: OptimizerName = "adamw",
    dtype: torch.dtype = torch.bfloat16,
) -> ModelShape:
    """Count a model; it is left as it is.

    Args:
        net: a timm ViT, MoE or dense, with or without weights; what is frozen counts as such, and so does which blocks
            are computed again in the backward pass.
        image_size: side of the input in pixels.
        name: what it is called.
        optimizer: whose moments are counted.
        dtype: of autocast; float32 for none.
    """
    dense, experts = count_weights(net, optimizer)
    dense_flops, expert_flops, moe = _flops(net, image_size)
    kept, of_blocks, inputs = kept_bytes_per_image(net, image_size, dtype)
    shape = ModelShape(
        name=name,
        image_size=image_size,
        dense=dense,
        experts=experts,
        moe=moe,
        dense_flops=dense_flops,
        expert_flops=expert_flops,
        activation_bytes=kept,
        block_bytes=tuple(of_blocks),
        block_inputs_bytes=inputs,
        compute_bytes=dtype.itemsize,
        recomputed=checkpointed_blocks(net),
    )
    # Combining keeps the experts' output, which the rows have already.
    for layer in moe:
        of_blocks[layer.block] -= shape.sent_by(layer)
    return replace(shape, activation_bytes=kept - sum(map(shape.sent_by, moe)), block_bytes=tuple(of_blocks))


def count_weights(net: nn.Module, optimizer: OptimizerName = "adamw") -> tuple[Weights, Weights]:
    """Parameters of everything but the experts, and of the experts."""
    of_experts = {id(p) for layer in moe_layers(net) for p in layer.experts.parameters()}
    matrices = matrices_of(net) if optimizer == "muon" else set[str]()
    dense, experts = (
        [(name, p) for name, p in net.named_parameters() if (id(p) in of_experts) is chosen] for chosen in (False, True)
    )
    return _weights(dense, matrices), _weights(experts, matrices)


def _weights(named: list[tuple[str, nn.Parameter]], matrices: set[str]) -> Weights:
    learning = [(name, p.numel()) for name, p in named if p.requires_grad]
    moments = sum(size if name in matrices else 2 * size for name, size in learning)
    return Weights(sum(p.numel() for _, p in named), sum(size for _, size in learning), moments)


def _blank_copy(net: nn.Module, device: str) -> nn.Module:
    """The same model with empty tensors; the weights are never copied."""
    empty: dict[int, Any] = {}
    for tensor in chain(net.parameters(), net.buffers()):
        blank = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        is_weight = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(blank, requires_grad=tensor.requires_grad) if is_weight else blank
    blank_net = copy.deepcopy(net, empty)
    checkpoint_blocks(blank_net, False)
    return blank_net


# ---- FLOPs


def _flops(net: nn.Module, image_size: int) -> tuple[int, int, tuple[MoEShape, ...]]:
    """FLOPs of one image without the experts and through the chosen ones, and what the MoE layers are like."""
    blank = _blank_copy(net, "meta").train()
    for layer in moe_layers(blank):
        layer.experts.backend = "dense"
    image = torch.empty(2, 3, image_size, image_size, device="meta")  # BatchNorm wants more than one value
    with torch.no_grad(), flop_counter() as counter:
        _, layers = count_layers(blank, counter, lambda: blank(image))
    moe = tuple(
        MoEShape(
            block=cast(int, count.layer.layer_index),
            num_experts=count.routing.num_experts,
            rows_per_image=_rows(count.routing),
            width=count.layer.experts.fc1.in_features,
            hidden=count.layer.experts.fc1.out_features,
        )
        for count in layers
    )
    chosen = sum(_rows(count.routing) * count.per_row for count in layers)
    dense = int(counter.get_total_flops()) - sum(count.experts for count in layers)
    return dense // len(image), chosen, moe


def _rows(routing: Routing) -> int:
    """R of one image: T·K, or what experts take, or slots."""
    if isinstance(routing, SoftRouting):
        return int(routing.slot_weight.shape[2] * routing.slot_weight.shape[3])
    if isinstance(routing, ExpertChoiceRouting):
        return int(routing.token_index[0].numel())
    return int(routing.expert_index[0].numel())


# ---- activations


class _EvenDispatcher(LocalDispatcher):
    """Sends rows in the order of their tokens: how many there are does not depend on the choices."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        if isinstance(routing, (SoftRouting, ExpertChoiceRouting)):
            return super().dispatch(x, routing)
        position = torch.arange(len(x) * routing.top_k, device=x.device).view(len(x), routing.top_k)  # [T, K]
        token = position.flatten() // routing.top_k  # [R]
        counts = torch.zeros(routing.num_experts, dtype=torch.int64, device=x.device)
        return Dispatched(take_rows(x, token, position), counts, token, position)


def kept_bytes_per_image(net: nn.Module, image_size: int, dtype: torch.dtype) -> tuple[float, list[float], float]:
    """Bytes that autograd keeps of one image, without what the experts keep themselves.

    Returns:
        Of the whole model, of each block, and of the blocks' inputs.
    """
    with FakeTensorMode():
        blank = _blank_copy(net, "cpu").train()
        for layer in moe_layers(blank):
            layer.dispatcher = _EvenDispatcher()
            if layer.router.rows is None and layer.router.kind == "token_choice":
                # Hand-made: nothing is kept of it, and colours need real images to train.
                layer.router.eval()
            cast(Any, layer.experts).forward = lambda rows, counts: rows + 0  # another tensor, and nothing kept
        inputs: list[int] = []
        blocks = list(cast(Any, blank).blocks)
        for block in blocks:
            block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].nbytes))

        def kept(images: int) -> list[int]:
            image = torch.empty(images, 3, image_size, image_size)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return saved_bytes(lambda: blank(image), blank, blocks)

        of_two, of_four = kept(2), kept(4)
    whole, *of_blocks = ((four - two) / 2 for two, four in zip(of_two, of_four, strict=True))
    return whole, of_blocks, sum(inputs[len(blocks) :]) / 4


def saved_bytes(work: Callable[[], object], net: nn.Module, parts: Sequence[nn.Module] = ()) -> list[int]:
    """Bytes of the tensors that autograd keeps for a backward pass; weights don't count, views of one tensor once.

    Args:
        work: a forward pass.
        net: what it computes.
        parts: modules of it.

    Returns:
        Of all, and what is kept first in each part.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}
    size, of_parts = 0, [0] * len(parts)

    def pack(tensor: Tensor) -> Tensor:
        nonlocal size
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in kept:
            kept[storage._cdata] = tensor  # held, so that its storage isn't made anew at the same place
            size += storage.nbytes()
        return tensor

    def begin(place: int) -> None:
        of_parts[place] -= size

    def end(place: int) -> None:
        of_parts[place] += size

    with ExitStack() as hooks:
        for place, part in enumerate(parts):
            for hook in (
                part.register_forward_pre_hook(lambda *_, place=place: begin(place)),
                part.register_forward_hook(lambda *_, place=place: end(place)),
            ):
                hooks.callback(hook.remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work()
    return [size, *of_parts]
