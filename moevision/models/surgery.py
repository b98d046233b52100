"""Expert surgery: prune or merge the experts of a trained model, or collapse it to a dense one, without training.

What the operations decide on is an `ExpertUse` per layer (`measure_use`), which should come from other images than
those on which the result is tested. All return a new model, which saves and reloads under its registered name.

An MLP computes the same whatever the order of its hidden units, so the plain average of two experts that do alike
things may be neither. Each expert is first permuted to come as close as possible to a reference expert.

Sources
    Li et al. 2024 (M-SMoE), arXiv:2310.01334: the most used experts stay, each other one joins the one whose router
    logits are most like its own; the weights of a group are aligned and averaged by use.
    Ainsworth et al. 2023 (Git Re-Basin), arXiv:2209.04836: matching hidden units by their weights is a linear
    assignment problem.

Axes: B images, N tokens, E experts, K choices of a token, H hidden units of one expert, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import timm
import torch
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import MoEMlp, Routing, forward_routing, moe_layers
from moevision.models.convert import convert_to_moe, make_dense, one_or_list
from moevision.models.vit_moe import MOE_ARGUMENTS

How = Literal["average", "most_used"]
Groups = Sequence[Sequence[int]]

State = dict[str, Tensor]
"""State of an `Experts` module: fc1.weight [E, H, D], fc1.bias [E, H], fc2.weight [E, D, H], fc2.bias [E, D]; biases
only where there are some."""


@dataclass(frozen=True)
class ExpertUse:
    """What the tokens of some images gave to the experts of one layer."""

    counts: Tensor  # [E] int64, choices that each expert computed (slots, where experts have slots)
    gate_sum: Tensor  # [E] float64, the sum over tokens of the weight that each expert had in their output
    tokens: int  # number of tokens, prefix tokens included: they are routed too
    # [E, E] float64, Pearson correlation of the experts' clean router logits over tokens; 0 where a logit never
    # changes. Experts that are alike are wanted by the same tokens.
    alike: Tensor

    @property
    def gate_total(self) -> float:
        """Mean over tokens of the sum of a token's gates: 1 where gates are normalised and nothing is dropped."""
        return float(self.gate_sum.sum()) / self.tokens


Use = Mapping[int, ExpertUse]


@torch.no_grad()
def measure_use(model: nn.Module, batches: Iterable[Tensor]) -> dict[int, ExpertUse]:
    """Block index -> what the experts of each MoE layer do for some batches of images [B, 3, H, W], on its device.

    Raises:
        UserError: if the model is in training mode (noise and dropout would count), has no MoE layer, or there is no
        image.
    """
    if model.training:
        raise UserError("The use of experts is counted in eval mode: call model.eval() first.")
    if not moe_layers(model):
        raise UserError(f"{type(model).__name__} has no MoE layer, so it has no experts to count: give a MoE model.")
    sums: dict[int, _Sums] = {}
    for images in batches:
        for place, routing in enumerate(forward_routing(model, images)[1]):
            block = place if routing.layer is None else routing.layer
            sums.setdefault(block, _Sums(routing)).add(routing)
    if not sums:
        raise UserError("There is no image to count the use of experts on: give at least one batch.")
    return {block: layer.use() for block, layer in sums.items()}


class _Sums:
    """Running sums of one layer, in float64."""

    def __init__(self, first: Routing) -> None:
        self.shift = first.logits[0, 0].double().cpu()  # correlation doesn't change by it; large offsets lose no digits
        self.counts: Any = 0
        self.gate_sum: Any = 0
        self.logit_sum: Any = 0
        self.product_sum: Any = 0
        self.tokens = 0

    def add(self, routing: Routing) -> None:
        logits = routing.logits.flatten(0, 1).double().cpu() - self.shift
        self.counts += routing.counts().cpu()
        self.gate_sum += routing.expert_weights().double().sum((0, 1)).cpu()
        self.logit_sum += logits.sum(0)
        self.product_sum += logits.T @ logits
        self.tokens += len(logits)

    def use(self) -> ExpertUse:
        mean = self.logit_sum / self.tokens
        covariance = self.product_sum / self.tokens - mean.outer(mean)
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        scale = deviation.outer(deviation)
        alike = torch.where(scale > 0, covariance / scale.clamp_min(1e-300), torch.zeros_like(scale))
        return ExpertUse(self.counts, self.gate_sum, self.tokens, alike.clamp(-1, 1))


def prune_experts(
    model: nn.Module,
    keep: Mapping[int, Sequence[int]] | None = None,
    *,
    remove: int | None = None,
    use: Use | None = None,
) -> nn.Module:
    """A new model without some experts and their router rows; a token that chose one goes to its next-best expert.

    Where gates are a softmax over all experts (`vmoe_top_k`), those of the others grow by 1 / (1 - its probability).

    Args:
        model: a converted model.
        keep: block index -> experts to keep, whose order stays; layers that aren't named stay as they are.
        remove: instead of `keep`: remove so many experts in every layer, those with the fewest choices in `use`.
        use: what `remove` decides on.

    Raises:
        UserError: if there is no such layer or expert, fewer than K experts would be left, or the router can't do with
            fewer experts (slots, hand-made gates).
    """
    layers = layers_by_block(model)
    if keep is None and remove is not None and remove >= 0:
        left = {block: max(layer.router.num_experts - remove, 0) for block, layer in layers.items()}
        keep = {block: most_used(use_of(use, block, layer), left[block]) for block, layer in layers.items()}
    elif keep is None or remove is not None:
        raise UserError("Say which experts to prune: keep={block: [experts]}, or remove=N, a number from 0.")
    return regrouped(model, {block: [[one] for one in experts] for block, experts in keep.items()}, None, align=False)


def merge_experts(
    model: nn.Module,
    groups: Mapping[int, Groups] | None = None,
    *,
    to: int | None = None,
    use: Use | None = None,
    align: bool = True,
) -> nn.Module:
    """A new model in which groups of experts are replaced by their averages.

    Weights, router rows and whatever else the router has for each expert are averaged with the experts' choices as
    weights (equally without `use`), hidden units aligned first. One row can't say what several did: a merged expert is
    chosen less often than its members together (docs/reference/conversions.md).

    Args:
        model: a converted model.
        groups: block index -> groups of all its experts. Layers that aren't named stay as they are.
        to: instead of `groups`: leave so many experts in every layer, grouped by `similar_groups`.
        use: what `to` decides on, and the weights of the averages.
        align: bring the hidden units of each expert into the order of the group's most used one first.

    Raises:
        UserError: if the groups are no partition of a layer's experts, fewer than K experts would be left, or the
            router can't do with fewer experts (slots, hand-made gates).
    """
    layers = layers_by_block(model)
    if groups is None and to is not None and to > 0:
        groups = {block: similar_groups(use_of(use, block, layer), to) for block, layer in layers.items()}
    elif groups is None or to is not None:
        raise UserError("Say which experts to merge: groups={block: [[experts], ...]}, or to=N, a number from 1.")
    for block, parts in groups.items():
        everyone = set(range(layers[block].router.num_experts)) if block in layers else set()
        missing = sorted(everyone - {expert for part in parts for expert in part})
        if missing or not all(parts):
            what = f"leave out the experts {missing}" if missing else "include an empty one"
            raise UserError(f"The groups of block {block} {what}: put each expert into one group.")
    return regrouped(model, groups, use, align=align)


def similar_groups(use: ExpertUse, number: int) -> list[list[int]]:
    """M-SMoE's `number` groups of one layer: its most used experts, each first of those that are most like it.

    Alike are experts whose router logits correlate over tokens (`ExpertUse.alike`).
    """
    dominant = most_used(use, number)
    groups = {expert: [expert] for expert in dominant}
    for expert in range(len(use.counts)):
        if expert not in groups:
            groups[dominant[int(use.alike[expert, dominant].argmax())]].append(expert)
    return list(groups.values())


def most_used(use: ExpertUse, number: int) -> list[int]:
    """The `number` experts with the most choices, of equal ones the earlier, in ascending order."""
    order: list[int] = use.counts.argsort(descending=True, stable=True).tolist()
    return sorted(order[:number])


def collapse_to_dense(
    model: nn.Module, how: How = "average", *, use: Use | None = None, align: bool = True
) -> nn.Module:
    """A new dense model: every MoE layer becomes one plain MLP of an expert's hidden width.

    With `use` experts count by the gates that they had, and the output is scaled by the mean sum of a token's gates,
    which V-MoE's router keeps below 1. Without `use` experts count equally and nothing is scaled. Shared experts are
    kept exactly, as further hidden units. `how` is the `average` of all experts (`align`: with hidden units in the
    order of the most used one), or the `most_used`, that with the largest sum of gates. Where the MLPs are as wide as
    those of the dense architecture the model is that architecture, else it saves under the same name with the hidden
    widths as `twin`.

    Raises:
        UserError: if the model has no MoE layer, `how` is unknown, or `most_used` has no `use`.
    """
    layers = layers_by_block(model)
    if how not in get_args(How):
        raise UserError(f"There is no way to collapse named {how!r}: choose {' or '.join(get_args(How))}.")
    mlps = {}
    for block, layer in layers.items():
        known = use_of(use, block, layer) if use is not None or how == "most_used" else None
        experts = state_of(layer.experts)
        gates = torch.ones(layer.router.num_experts) if known is None else known.gate_sum
        if how == "most_used":
            mlp = expert_of(experts, int(gates.argmax()))
        else:
            mlp = average_experts(experts, range(len(gates)), gates, align=align)
        if known is not None:
            mlp = {name: value * known.gate_total if name.startswith("fc2.") else value for name, value in mlp.items()}
        mlps[block] = mlp if layer.shared is None else side_by_side(mlp, state_of(layer.shared))
    return with_mlps(model, mlps)


def side_by_side(first: State, second: State) -> State:
    """The MLP whose output is the sum of two: their hidden units side by side, their output biases added."""
    both = {"fc2.weight": torch.cat([first["fc2.weight"], second["fc2.weight"]], dim=1)}
    both |= {name: torch.cat([first[name], second[name]]) for name in ("fc1.weight", "fc1.bias") if name in first}
    return both | {name: first[name] + second[name] for name in ("fc2.bias",) if name in first}


def regrouped(model: nn.Module, groups: Mapping[int, Groups], use: Use | None, *, align: bool) -> nn.Module:
    """A copy of the model whose experts are averages of groups of its experts, by block.

    Experts in no group are gone, layers that aren't named stay as they are. New experts stand in the order of the first
    expert of each group. They are averaged by their choices; equally without `use`.
    """
    layers = layers_by_block(model)
    strangers = sorted(set(groups) - set(layers))
    if strangers:
        raise UserError(f"Block {strangers[0]} is no MoE layer: choose among {', '.join(map(str, layers))}.")
    parts = {
        # Sorted, so that a layer of as many experts as before is the same layer.
        block: sorted(map(list, groups.get(block, [[expert] for expert in range(layer.router.num_experts)])))
        for block, layer in layers.items()
    }
    for block, layer in layers.items():
        number, top_k, left = layer.router.num_experts, layer.router.top_k, len(parts[block])
        members = [expert for group in parts[block] for expert in group]
        if len(set(members)) < len(members) or not set(members) <= set(range(number)):
            raise UserError(f"Block {block} has the experts 0 to {number - 1}, not {members}: name each at most once.")
        if left < top_k:
            raise UserError(
                f"Block {block} would have {left} experts and a token takes {top_k}: leave at least {top_k}, or "
                "collapse the model to a dense one."
            )
        if left < number and layer.router.rows is None:
            raise UserError(
                f"The router of block {block} ({type(layer.router).__name__}) can't do with fewer experts: no token "
                "chooses one by a learned row. Collapse the model to a dense one instead."
            )
    given = {
        "num_experts": one_or_list([len(parts[block]) for block in layers], None),
        # As a number: by default it would follow from K and the width of the dense MLP.
        "expert_hidden": one_or_list([layer.experts.fc1.out_features for layer in layers.values()], None),
    }
    new = copy.deepcopy(model)
    config = {**cast(Any, model).moe_config, **given}
    with torch.random.fork_rng(devices=[]):
        make_dense(new, "active_flops")  # convert_to_moe reads widths, biases and dropout from dense MLPs
        convert_to_moe(new, config.pop("moe_layers"), **config)
    for block, layer in layers.items():
        weights = torch.ones(layer.router.num_experts) if use is None else use_of(use, block, layer).counts
        target: MoEMlp = cast(Any, new).blocks[block].mlp
        if layer.shared is not None and target.shared is not None:
            target.shared.drop.p = layer.shared.drop.p  # not that of the experts, which convert_to_moe has seen
        target.load_state_dict(_averaged_state(layer, target, parts[block], weights, align))
    return new


@torch.no_grad()
def _averaged_state(old: MoEMlp, new: MoEMlp, groups: Groups, weights: Tensor, align: bool) -> State:
    """State of the new layer: what there is for each expert is averaged by group, the rest copied."""
    experts = state_of(old.experts)
    merged = [average_experts(experts, group, weights[list(group)], align=align) for group in groups]
    state = {f"experts.{name}": torch.stack([one[name] for one in merged]) for name in experts}
    mixing = torch.zeros(len(groups), old.router.num_experts, dtype=torch.float64)
    for place, group in enumerate(groups):
        mixing[place, group] = shares(weights[list(group)])
    before = state_of(old)
    for name, tensor in new.state_dict().items():
        if name in state:
            continue
        if tensor.shape == before[name].shape:  # it doesn't depend on E, or E is as before
            state[name] = before[name]
        else:
            rows = before[name].double()
            state[name] = torch.tensordot(mixing.to(rows.device), rows, dims=1).to(tensor.dtype)
    return state


def with_mlps(model: nn.Module, mlps: Mapping[int, State]) -> nn.Module:
    """A copy of the model with plain MLPs of these weights in its MoE blocks; it saves and reloads."""
    new = copy.deepcopy(model)
    widths = [len(mlps[block]["fc1.weight"]) for block in layers_by_block(model)]
    with torch.random.fork_rng(devices=[]):
        make_dense(new, widths)
        arguments = getattr(model, "_model_args", {})
        for block, state in mlps.items():
            cast(Any, new).blocks[block].mlp.load_state_dict(state)
        cast(Any, new)._model_args = {**arguments, "twin": widths}
        if not getattr(model, "pretrained_cfg", None):
            return new
        # Where the architecture without experts has MLPs of the same widths, the model becomes that architecture.
        state = cast(Any, new)
        own = {name: value for name, value in arguments.items() if name not in (*MOE_ARGUMENTS, "moe_layers", "twin")}
        name = own.pop("base", None)
        if name is None:
            name, own["moe_layers"] = state.pretrained_cfg["architecture"], []
        plain: Any = timm.create_model(name, **{**own, "num_classes": state.num_classes})
    pairs = list(zip(state.blocks, plain.blocks, strict=True))
    if all(block.mlp.fc1.out_features == its.mlp.fc1.out_features for block, its in pairs):
        for block, its in pairs:  # experts may have had another dropout
            block.mlp.drop1.p, block.mlp.drop2.p = its.mlp.drop1.p, its.mlp.drop2.p
        state._model_args = own
        state.pretrained_cfg = state.default_cfg = {**state.pretrained_cfg, "architecture": name}
        del state.moe_config
        if hasattr(plain, "moe_config"):
            state.moe_config = plain.moe_config
    return new


def average_experts(experts: State, members: Sequence[int], weights: Tensor, *, align: bool = True) -> State:
    """One expert out of some of a layer's, in their dtype: averaged by `shares` of the weights [len(members)].

    The first one with the largest weight is the reference of the alignment.
    """
    chosen = [expert_of(experts, member) for member in members]
    reference = chosen[int(weights.argmax())]
    if align:
        chosen = [one if one is reference else reordered(one, matching_units(one, reference)) for one in chosen]
    # Summed in float64, so that the average of equal weights is that weight, bit for bit.
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in reference.items()}
    for part, one in zip(shares(weights).tolist(), chosen, strict=True):
        for name, value in one.items():
            total[name] += part * value.double()
    return {name: value.to(reference[name].dtype) for name, value in total.items()}


def shares(weights: Tensor) -> Tensor:
    """Weights over their sum, in float64; equal ones where all are 0."""
    weights = weights.double()
    return weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / len(weights))


def matching_units(expert: State, reference: State) -> Tensor:
    """[H] int64: the order of an expert's hidden units that brings them closest to those of another expert.

    A unit is its incoming weights, its bias and its outgoing weights. The sum of squared distances between matched
    units is smallest where the sum of their inner products is largest, since an order changes no length.
    """
    from scipy.optimize import linear_sum_assignment  # not at import: it takes half a second

    products = _units(reference) @ _units(expert).T
    _, order = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return torch.as_tensor(order, device=products.device)


def _units(expert: State) -> Tensor:
    parts = [expert["fc1.weight"], expert["fc2.weight"].T]
    if "fc1.bias" in expert:
        parts.append(expert["fc1.bias"].unsqueeze(1))
    return torch.cat(parts, dim=1).double()


def reordered(expert: State, order: Tensor) -> State:
    """The same expert with its hidden units in another order: it computes the same."""
    permuted = {**expert, "fc1.weight": expert["fc1.weight"][order], "fc2.weight": expert["fc2.weight"][:, order]}
    if "fc1.bias" in expert:
        permuted["fc1.bias"] = expert["fc1.bias"][order]
    return permuted


def expert_of(experts: State, index: int) -> State:
    """The weights of one expert, named as those of a timm Mlp."""
    return {name: packed[index] for name, packed in experts.items()}


def layers_by_block(model: nn.Module) -> dict[int, MoEMlp]:
    """The MoE layers by block index.

    Raises:
        UserError: if the model isn't a converted one.
    """
    layers = moe_layers(model)
    if not layers or not hasattr(model, "moe_config"):
        raise UserError(f"{type(model).__name__} has no experts to operate on: give a MoE model, not a dense one.")
    return {cast(int, layer.layer_index): layer for layer in layers}


def use_of(use: Use | None, block: int, layer: MoEMlp) -> ExpertUse:
    """The use of one layer's experts."""
    if use is None or block not in use:
        raise UserError(
            f"How the experts of block {block} are used must be known: give use=measure_use(model, images)."
        )
    known, number = len(use[block].counts), layer.router.num_experts
    if known != number:
        raise UserError(f"The use of block {block} is of {known} experts, not {number}: measure it on this model.")
    return use[block]


def state_of(module: nn.Module) -> State:
    """A module's state, detached."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}
