"""Blocks that are computed again: the same gradients, fewer bytes, the same names, and copies of their own."""

import copy

import pytest
import timm
import torch
from torch import nn

from moevision.layers import forward_routing
from moevision.models.vit_moe import checkpoint_blocks


def trained(net: nn.Module) -> tuple[list[torch.Tensor], int]:
    """Gradients of one step, routers' noise and dropped patches included; and how often block 1 computed."""
    calls = []
    handle = net.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    logits, routings = forward_routing(net, torch.randn(4, 3, 32, 32))
    (
        logits.square().mean()
        + torch.stack([routing.probs.square().mean() for routing in routings]).sum()
    ).backward()
    handle.remove()
    return [p.grad for p in net.parameters()], len(calls)


def checkpointed_blocks(net: nn.Module) -> tuple[int, ...]:
    """Indices of the blocks that are computed again in the backward pass."""
    if net.grad_checkpointing:
        return tuple(range(len(net.blocks)))
    return tuple(index for index, block in enumerate(net.blocks) if "forward" in vars(block))


def bytes_for_backward(net: nn.Module, images: torch.Tensor) -> int:
    """Of the tensors that autograd keeps, a storage once; weights don't count."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept = []  # held, so that no storage is made anew at the same place
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        net(images)
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for place, size in sizes.items() if place not in weights)


def build() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit_moe", proj_drop_rate=0.2, drop_path_rate=0.2).train()


@pytest.mark.parametrize(
    ("blocks", "calls"), [(False, 1), (True, 2), ([1, 2], 2), ([0], 1), ([], 1)]
)
def test_gradients_are_the_same(blocks: bool | list[int], calls: int) -> None:
    net = build()
    names = list(net.state_dict())
    checkpoint_blocks(net, blocks)
    assert list(net.state_dict()) == names
    assert checkpointed_blocks(net) == (tuple(range(4)) if blocks is True else tuple(blocks or ()))
    found, times = trained(net)
    expected, _ = trained(build())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert times == calls


def test_chosen_blocks_keep_less() -> None:
    def kept(blocks: bool | list[int]) -> int:
        net = build()
        checkpoint_blocks(net, blocks)
        return bytes_for_backward(net, torch.randn(4, 3, 32, 32))

    assert kept(True) == kept([0, 1, 2, 3]) < kept([1, 3]) < kept([1]) < kept(False)


def test_a_copy_computes_with_weights_of_its_own() -> None:
    net = build().eval()
    checkpoint_blocks(net, [1])
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(
        copied(torch.ones(1, 3, 32, 32)), torch.zeros_like(copied(torch.ones(1, 3, 32, 32)))
    )
    assert checkpointed_blocks(copied) == (1,)
    checkpoint_blocks(copied, False)
    assert (checkpointed_blocks(copied), checkpointed_blocks(net)) == ((), (1,))
