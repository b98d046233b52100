"""The optimizer under a one-cycle schedule: AdamW, or Muon for matrices with AdamW for the rest; and what is frozen.

Layer-wise decay as in BEiT (arXiv:2106.08254, appendix), in timm's form: with L blocks, the classifier learns at lr,
block i (from 0) at lr · layer_decay^(L - i), the embeddings at lr · layer_decay^(L + 1).

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a weight matrix by the
nearest semi-orthogonal matrix. A step is scaled by 0.2 · sqrt(max(out, in)) (Liu et al. 2025, arXiv:2502.16982, §2.2):
it is then about as large as one of AdamW. A matrix is one linear map [out, in]; a convolution is [out, in · h · w],
experts [E, out, in] are E maps, where timm's own `Muon` (1.0.31) takes them for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.optim.muon import _COEFFICIENTS, get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from moevision.config import FreezeAllBut, OptimizerConfig, OptimizerName
from moevision.errors import UserError
from moevision.layers import PackedLinear, moe_layers
from moevision.types import Keywords, TimmModel

# Coefficients of five Newton-Schulz iterations, x <- a x + b (x xᵀ) x + c (x xᵀ)² x, each fitted to what the one
# before leaves (https://leloykun.github.io/ponder/muon-opt-coeffs).
_NEWTON_SCHULZ = _COEFFICIENTS["quintic"]


def build_optimizer(
    net: nn.Module,
    config: OptimizerConfig,
    *,
    total_steps: int,
    fused: bool = False,
    bfloat16: bool = False,
    optimizer_classes: Mapping[OptimizerName, type[AdamW]] | None = None,
) -> tuple[AdamW, OneCycleLR]:
    """The optimizer of the parameters that learn, and its schedule.

    `total_steps` are those of the whole training. One step has the schedule of two, since the rate of the last one is
    nearly 0. `bfloat16`: whether the training runs under its autocast; Muon then multiplies in it, too.
    `optimizer_classes` take the place of `LOCAL.optimizers` where parameters are sharded.
    """
    groups = parameter_groups(net, config)
    options: Keywords = {"bfloat16": bfloat16} if config.name == "muon" else {}
    optimizer_class = (optimizer_classes or LOCAL.optimizers)[config.name]
    optimizer = optimizer_class(
        groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused, **options
    )

    total_steps = max(2, total_steps)
    warmup = config.warmup_fraction
    if warmup * total_steps in (1, total_steps):
        # OneCycleLR (torch 2.13) divides by the length of each phase, here 0: move the border by next to nothing.
        warmup *= 1 - 1e-9
    schedule = OneCycleLR(
        optimizer,
        max_lr=[float(group["lr"]) for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=float(warmup),
        cycle_momentum=False,
    )
    return optimizer, schedule


def parameter_groups(net: TimmModel, config: OptimizerConfig) -> list[Keywords]:
    """Parameters that learn, grouped by weight decay; with layer_decay also by learning rate, the classifier's first.

    Under Muon, groups with `matrices: True` hold what it updates.
    """
    without_decay = net.no_weight_decay()
    groups: list[Keywords]
    if config.layer_decay is None:
        # By keyword: what the third place means differs between timm releases.
        groups = param_groups_weight_decay(
            net, config.weight_decay, no_weight_decay_list=without_decay
        )
    else:
        groups = param_groups_layer_decay(
            net,
            config.weight_decay,
            no_weight_decay_list=without_decay,
            layer_decay=config.layer_decay,
        )
        # The classifier first: reports that show one learning rate show the first group's.
        groups.reverse()
        for group in groups:
            group["lr"] = config.lr * group["lr_scale"]
    if config.name != "muon":
        return groups
    return _split_matrices(groups, net)


def _split_matrices(groups: list[Keywords], net: nn.Module) -> list[Keywords]:
    """Each group cut in two: what AdamW updates, and the matrices that Muon updates."""
    names = matrices_of(net)
    matrices = {id(parameter) for name, parameter in net.named_parameters() if name in names}
    split_groups = []
    for group in groups:
        for is_muon in (False, True):
            parameters = [p for p in group["params"] if (id(p) in matrices) == is_muon]
            if parameters:
                split_groups.append({**group, "params": parameters, "matrices": is_muon})
    return split_groups


def freeze_parameters(net: nn.Module, freeze: int | FreezeAllBut | None) -> nn.Module:
    """Freeze parameters by `OptimizerConfig.freeze`, in place."""
    if freeze is None:
        return net
    if isinstance(freeze, int):
        learning = _parameters_after(net, freeze)
    elif freeze in get_args(FreezeAllBut):
        learning = (
            _heads_and_experts(net) if freeze == "all_but_experts" else _parameters(_heads(net))
        )
    else:
        raise UserError(
            f"There is no freeze={freeze!r}: a number, {' or '.join(get_args(FreezeAllBut))}."
        )
    for parameter in net.parameters():
        if parameter not in learning:
            parameter.requires_grad_(False)
    hold_frozen_statistics(net)
    return net


def _parameters_after(net: TimmModel, frozen: int) -> set[nn.Parameter]:
    """The parameters after the embedding and the first `frozen` blocks."""
    depth = len(net.blocks)
    if not 0 <= frozen <= depth:
        raise UserError(
            f"freeze={frozen} does not fit {depth} blocks: give 0 (the embedding only) to {depth}."
        )
    # timm's layers: 0 is the embedding, 1 to depth are the blocks, then comes the classifier.
    layer_of = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    return {parameter for name, parameter in net.named_parameters() if layer_of[name] > frozen}


def _heads_and_experts(net: nn.Module) -> set[nn.Parameter]:
    layers = moe_layers(net)
    if not layers:
        raise UserError(
            "freeze=all_but_experts needs a model with experts, which a dense one or a twin has not."
        )
    return _parameters([*_heads(net), *layers])


def _parameters(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _heads(net: TimmModel) -> list[nn.Module]:
    classifier = net.get_classifier()
    # A distilled DeiT has two.
    return list(classifier) if isinstance(classifier, tuple) else [classifier]


def hold_frozen_statistics(net: nn.Module) -> None:
    """Put frozen BatchNorm layers into eval mode, so that they neither use nor collect the statistics of batches."""
    for module in net.modules():
        learning = [parameter.requires_grad for parameter in module.parameters()]
        if isinstance(module, _BatchNorm) and learning and not any(learning):
            module.eval()


class Muon(AdamW):
    """Muon for groups with `matrices: True`, AdamW for the others.

    An expert without a gradient, which no token chose, only decays. `betas` are AdamW's, `momentum` is Muon's, with
    Nesterov's look ahead. `bfloat16`: orthogonalise in it on a CPU, too, for trainings under its autocast.
    """

    bfloat16 = False  # for copies and pickles of an optimizer, which restore groups and state alone

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        *,
        bfloat16: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, **kwargs)
        self.bfloat16 = bfloat16
        for group in self.param_groups:
            group.setdefault("matrices", False)
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)
        # AdamW's step, on the other groups only.
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _step_matrices(self, group: Keywords) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
                # AdamW.load_state_dict expects `step` in every state.
                state["step"] = torch.zeros(())
            state["step"] += 1
            average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
            update = weight.grad.lerp(average, momentum)
            scale = get_lr_scale(as_matrices(update).shape)  # 0.2 · sqrt(max(out, in))
            update = self._direction(update, weight.grad)
            weight.mul_(1 - lr * group["weight_decay"])
            weight.add_(update, alpha=-lr * scale)

    def _direction(self, update: Tensor, gradient: Tensor) -> Tensor:
        """The orthogonal maps of an update [out, in], [E, out, in] or [out, in, h, w]; zero for idle experts."""
        if update.ndim == 3:
            # Orthogonal maps have one size: an idle expert's faded momentum would move it as far as a gradient does.
            idle = (gradient == 0).flatten(1).all(1)  # [E]
            update = update.masked_fill(idle[:, None, None], 0)
        return orthogonal(as_matrices(update), self.bfloat16).view_as(update)


def as_matrices(weight: Tensor) -> Tensor:
    """The linear maps of a weight: [out, in] and [E, out, in] as they are, a convolution as [out, in · h · w]."""
    return weight.flatten(1) if weight.ndim == 4 else weight


def orthogonal(matrices: Tensor, bfloat16: bool = False) -> Tensor:
    """The nearest semi-orthogonal matrix of each [out, in] or [E, out, in]: singular values within a few percent of 1.

    Those that are zero, as of an unused expert's gradient, stay zero.
    """
    if not matrices.numel():  # a process that holds no part of these experts
        return matrices
    # bfloat16 suffices where it is multiplied fast: GPUs before Ampere and a CPU with AVX2 are faster in float32.
    if matrices.is_cuda:
        bfloat16 |= torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    if bfloat16:
        dtype = torch.bfloat16
    maps = zeropower_via_newtonschulz(matrices, len(_NEWTON_SCHULZ), _NEWTON_SCHULZ, dtype=dtype)
    return maps.to(matrices.dtype)


def matrices_of(net: nn.Module) -> set[str]:
    """Names of the weights that Muon updates: the linear maps and convolutions between the image and the classifier.

    Left to AdamW are the classifier, the first convolution (it reads colours), routers (a row is an expert), and
    everything that is no linear map: embeddings, norms and biases.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    routers = [layer.router for layer in moe_layers(net)]
    left_to_adamw: set[nn.Module] = set()
    for module in (*_heads(net), *convolutions[:1], *routers):
        left_to_adamw.update(module.modules())
    names = set()
    for name, module in net.named_modules():
        is_matrix = isinstance(module, nn.Linear | nn.Conv2d | PackedLinear)
        if is_matrix and module not in left_to_adamw:
            names.add(f"{name}.weight")
    return names


class TensorOperations(NamedTuple):
    """Operations on lists of weights or gradients, and optimizers: `LOCAL`, or `parallel.parts.SHARDED` for shards."""

    total_norm: Callable[[list[Tensor]], Tensor]  # 2-norm over all of them, a scalar
    # Scales gradients in place so that their norm, the last argument, becomes at most a limit.
    clip: Callable[[list[nn.Parameter], float, Tensor], Any]
    optimizers: Mapping[OptimizerName, type[AdamW]]


LOCAL = TensorOperations(
    torch.nn.utils.get_total_norm,
    torch.nn.utils.clip_grads_with_norm_,
    {"adamw": AdamW, "muon": Muon},
)
