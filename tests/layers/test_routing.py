"""The recording scope: nesting, threads, exceptions."""

import threading

import pytest
import timm
import torch
from torch import nn

import moevision
from moevision import forward_routing, record_routing


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model("test_vit_moe", num_classes=3).eval()
    assert isinstance(net, moevision.VisionTransformerMoE)
    return net


def test_forward_routing_returns_what_each_layer_decided(model):
    x = torch.randn(2, 3, 32, 32)
    logits, routings = forward_routing(model, x)
    assert torch.equal(logits, model(x))
    assert [routing.layer for routing in routings] == [1, 3]
    assert all(routing.grid == (4, 4) and routing.num_prefix_tokens == 0 for routing in routings)
    assert all(routing.counts().sum() == 2 * 16 * 2 for routing in routings)


def test_patch_dropping_leaves_no_grid():
    net = timm.create_model("test_vit_moe", patch_drop_rate=0.5).train()
    _, routings = forward_routing(net, torch.randn(1, 3, 32, 32))
    assert routings[0].logits.shape[1] == 8
    assert routings[0].grid is None


def test_scopes_nest(model):
    x = torch.randn(1, 3, 32, 32)
    with record_routing(model) as outer:
        model(x)
        with record_routing(model) as inner:
            model(x)
        model(x)
    assert len(inner) == 2
    assert len(outer) == 6
    assert outer[2] is inner[0]


def test_an_exception_closes_the_scope(model):
    with pytest.raises(RuntimeError), record_routing(model):
        model(torch.randn(1, 5, 32, 32))  # five channels
    model(torch.randn(1, 3, 32, 32))
    with record_routing(model) as routings:
        pass
    assert routings == []


def test_threads_do_not_mix_their_records(model):
    """Each thread routes images of its own and must see exactly those."""
    pictures = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    expected = [forward_routing(model, picture)[1] for picture in pictures]
    wrong: list[int] = []

    def work(thread: int) -> None:
        for _ in range(10):
            _, routings = forward_routing(model, pictures[thread])
            same = len(routings) == 2 and all(
                torch.equal(a.logits, b.logits)
                for a, b in zip(routings, expected[thread], strict=True)
            )
            if not same:
                wrong.append(thread)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_detached_records_hold_no_graph(model):
    _, routings = forward_routing(model.train(), torch.randn(1, 3, 32, 32))
    model.eval()
    assert routings[0].logits.requires_grad
    kept = routings[0].detach()
    tensors = (kept.logits, kept.noisy_logits, kept.probs, kept.noise_std, kept.combine_weight)
    assert not any(tensor.requires_grad for tensor in tensors if tensor is not None)
