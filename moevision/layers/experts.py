"""Experts: E two-layer MLPs with packed weights, applied to rows sorted by expert.

Three backends compute the same thing:

- `loop`: one expert after the other on its slice of the rows; any dtype, any shape, the fastest on a CPU, where
  `cpu.grouped_mlps` writes the gradients, and in an exported file.
- `grouped`: `torch.nn.functional.grouped_mm`; needs float32/float16/bfloat16 and row strides of 16 bytes.
- `dense`: every expert on every token, the routed sum taken afterwards; E times the work, no sorting, no
  data-dependent shape. It is the reference in tests.

Axes: R rows (copies of tokens, or slots), T tokens, P slots of an expert, D width, H hidden width, E experts,
E' experts in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers.cpu import grouped_mlps

Backend = Literal["auto", "loop", "grouped", "dense"]
# Elementwise, without parameters or randomness, as the hand-written gradients of `grouped_mlps` need.
_PLAIN_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid)


def local(x: Tensor) -> Tensor:
    """The part of a tensor in this process: its shard if it is a DTensor, else all of it."""
    return cast(Any, x).to_local() if hasattr(x, "to_local") else x


def has_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class PackedLinear(nn.Module):
    """E linear maps in one weight [E, out, in] and one bias [E, out]; `placement` are device and dtype.

    timm's `param_groups_layer_decay` (like any rule that goes by the number of dimensions) would apply weight decay to
    the two-dimensional bias: therefore `convert_to_moe` adds it to the model's `no_weight_decay()`.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        **placement: Any,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.empty(num_experts, out_features, in_features, **placement)
        self.weight = nn.Parameter(weight)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, out_features, **placement))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, std 0.02, and zero biases: timm's own ViT initialisation."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def local_weights(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight [E', out, in] and bias [E', out] of the E' experts in this process, in `dtype` if one is given.

        Every backend gets the parameters from here, so that a matrix product never has a sharded operand. E' is E
        unless experts are distributed over processes (`moevision.train.parallel`).
        """
        weight = local(self.weight)
        bias = None if self.bias is None else local(self.bias)
        if dtype is None:
            return weight, bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"num_experts={self.num_experts}, {self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Experts(nn.Module):
    """E MLPs `fc2(dropout(act(fc1(x))))`, as timm's Mlp but one for each expert; D -> H -> out_features.

    `placement` are device and dtype.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: tuple[bool, bool] = (True, True),
        drop: float = 0.0,
        backend: Backend = "auto",
        **placement: Any,
    ) -> None:
        super().__init__()
        if backend not in get_args(Backend):
            raise UserError(
                f"There is no expert backend {backend!r}; choose one of {', '.join(get_args(Backend))}."
            )
        self.num_experts = num_experts
        self.backend = backend
        self._widths = (in_features, hidden_features, out_features)
        self.fc1 = PackedLinear(
            num_experts, in_features, hidden_features, bias=bias[0], **placement
        )
        self.act = act_layer()
        # Exact types only, since a subclass may compute anything; an in-place one overwrites what the gradient needs.
        inplace = getattr(self.act, "inplace", False)
        self._act_is_plain = type(self.act) in _PLAIN_ACTIVATIONS and not inplace
        self.drop = nn.Dropout(drop)
        self.fc2 = PackedLinear(
            num_experts, hidden_features, out_features, bias=bias[1], **placement
        )

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Apply the e-th expert to the e-th group of rows [R, D], which are in `compute_dtype`: [R, out_features].

        `counts` [E'] int64 has the length of each group, one for each expert in this process; any may be zero.
        """
        if self._use_grouped(rows):
            return self._grouped(rows, counts)
        return self._loop(rows, counts.tolist())

    def _loop(self, rows: Tensor, counts: list[int]) -> Tensor:
        has_dropout = self.training and self.drop.p > 0
        if self._act_is_plain and not has_dropout and not torch.compiler.is_compiling():
            w1, b1 = self.fc1.local_weights()
            w2, b2 = self.fc2.local_weights()
            return grouped_mlps(rows, counts, self.act, w1, b1, w2, b2)

        w1s, b1s = _unbind(*self.fc1.local_weights(rows.dtype))
        w2s, b2s = _unbind(*self.fc2.local_weights(rows.dtype))
        outputs = []
        for expert, group in enumerate(rows.split(counts)):
            hidden = self.act(F.linear(group, w1s[expert], b1s[expert]))  # [rows, H]
            outputs.append(F.linear(self.drop(hidden), w2s[expert], b2s[expert]))
        return torch.cat(outputs)

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        w1, b1 = self.fc1.local_weights(rows.dtype)
        hidden = self.act(_grouped_linear(rows, counts, w1, b1))  # [R, H]
        hidden = self.drop(hidden)

        w2, b2 = self.fc2.local_weights(hidden.dtype)
        return _grouped_linear(hidden, counts, w2, b2)

    def on_all_tokens(self, x: Tensor) -> Tensor:
        """Every expert on every token: x [T, D] -> [T, E, out_features] (the dense backend)."""
        x = x.to(self.compute_dtype(x))
        outputs = self.on_slots(x.expand(self.num_experts, -1, -1))  # [E, T, out]
        return outputs.transpose(0, 1)

    def on_slots(self, slots: Tensor) -> Tensor:
        """Each expert on its own P rows: [E, P, D] -> [E, P, out_features] (dense backend of Soft MoE)."""
        w1, b1 = self.fc1.local_weights(slots.dtype)
        w2, b2 = self.fc2.local_weights(slots.dtype)

        hidden = self.drop(self.act(_batched_linear(slots, w1, b1)))  # [E, P, H]
        return _batched_linear(hidden, w2, b2)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the experts compute in: autocast's if it is on, else that of their weights."""
        if has_autocast(x):
            return torch.get_autocast_dtype(x.device.type)
        return self.fc1.weight.dtype

    def _use_grouped(self, rows: Tensor) -> bool:
        """Whether the rows are computed by `grouped_mm`."""
        if self.backend != "auto":
            return self.backend == "grouped"

        # backend="auto", by measurements: bf16 grouped_mm is one fused kernel on SM90+; elsewhere it is a loop with
        # host synchronisations. `_loop` splits by values of `counts`, which doesn't compile; bf16 grouped_mm does.
        is_aligned = all(width * rows.element_size() % 16 == 0 for width in self._widths)
        if rows.dtype != torch.bfloat16 or not is_aligned:
            return False
        if torch.compiler.is_compiling():
            return True
        return rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= (9, 0)


def _unbind(
    weight: Tensor, bias: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Split weight [E, out, in] and bias [E, out] into those of each expert, [out, in] and [out].

    By one `unbind`: the gradient of each indexing `weight[e]` would be a zero tensor of full size, O(E²) work in all.
    """
    if bias is None:
        return weight.unbind(), len(weight) * [None]
    return weight.unbind(), bias.unbind()


def _grouped_linear(rows: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows_e · weight_eᵀ + bias_e for the group of each expert e, in one kernel: [R, in] -> [R, out]."""
    ends = counts.cumsum(0).to(torch.int32)  # [E'] where each group ends
    out = F.grouped_mm(rows, weight.mT, offs=ends)
    if bias is None:
        return out

    # At least in float32: the gradient of a bias is a sum over all rows of its expert.
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    bias_of_row = bias.repeat_interleave(counts, dim=0, output_size=rows.shape[0])  # [R, out]
    return out + bias_of_row.to(out.dtype)


def _batched_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows_e · weight_eᵀ + bias_e for equally many rows of each expert e: [E, P, in] -> [E, P, out]."""
    out = rows @ weight.mT
    return out if bias is None else out + bias.unsqueeze(1)
