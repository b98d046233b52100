"""Gates, capacity and shared experts on numbers that were derived by hand.

Expert e multiplies its input by e + 1, and the token is its own logits.
"""

from __future__ import annotations

import pytest
import torch

from moevision.layers import MoEMlp, within_capacity
from tests.layers.linear_experts import close, run, times_e_plus_1, tokens

X = tokens([4.0, 2.0, 1.0]).log()  # softmax: 4/7, 2/7, 1/7


def test_straight_through_gate_of_one_choice() -> None:
    """Value 1, gradient of p_0 = 4/7: ∂p_0/∂logits = p_0 (δ - p) = 12/49, -8/49, -4/49."""
    layer = times_e_plus_1("vmoe_top_k", 3, top_k=1, normalize_gates=True)
    x = X.clone().requires_grad_()
    out, routing = run(layer, x)
    assert routing.combine_weight.tolist() == [[[1.0]]]
    assert torch.equal(out, X)
    routing.combine_weight.sum().backward()
    close(x.grad, [[[12 / 49, -8 / 49, -4 / 49]]])


# Four tokens that all prefer expert 0 of 2, with probabilities .6, .9, .7, .8.
CROWD = tokens([6, 4], [9, 1], [7, 3], [8, 2]).log()


@pytest.mark.parametrize(("priority", "kept"), [(False, [1, 1, 0, 0]), (True, [0, 1, 0, 1])])
def test_capacity(priority: bool, kept: list[int]) -> None:
    """C = ceil(1 · 4 · 1 / 2) = 2: the first two tokens stay, or with batch priority the two surest (.9 and .8)."""
    layer = times_e_plus_1(
        "vmoe_top_k", 2, top_k=1, eval_capacity_factor=1.0, batch_priority=priority
    )
    out, routing = run(layer, CROWD)
    assert routing.kept[0, :, 0].int().tolist() == kept
    assert (routing.requested_counts().tolist(), routing.counts().tolist()) == ([4, 0], [2, 0])
    close(
        routing.combine_weight[0, :, 0], [0.6, 0.9, 0.7, 0.8]
    )  # a dropped choice keeps its weight on record
    expected = torch.tensor([0.6, 0.9, 0.7, 0.8], dtype=torch.float64) * torch.tensor(kept)
    close(out, expected.view(1, 4, 1) * CROWD)


# Tenths; first choices are experts 0, 1, 0, second ones 1, 0, 2; largest gates .5, .6, .7.
THREE = tokens([5, 4, 1], [3, 6, 1], [7, 1, 2]).log()


@pytest.mark.parametrize(
    ("priority", "kept"),
    [
        # First choices in order: 0 -> 0, 1 -> 1, and 2 finds 0 full. Then 0 -> 1 full, 1 -> 0 full, 2 -> 2.
        # (Token by token instead, token 0 would also take expert 1, and token 1 would be lost.)
        (False, [[1, 0], [1, 0], [0, 1]]),
        # In the order 2, 1, 0: 2 -> 0, 1 -> 1, and 0 finds 0 full. Then 2 -> 2, 1 -> 0 full, 0 -> 1 full.
        (True, [[0, 0], [1, 0], [1, 1]]),
    ],
)
def test_first_choices_precede_second_ones(priority: bool, kept: list[list[int]]) -> None:
    """C = ceil(.5 · 3 · 2 / 3) = 1. What is lost is not redistributed."""
    options = {"top_k": 2, "eval_capacity_factor": 0.5, "batch_priority": priority}
    routing = run(times_e_plus_1("vmoe_top_k", 3, **options), THREE)[1]
    assert routing.expert_index.tolist() == [[[0, 1], [1, 0], [0, 2]]]
    assert routing.kept[0].int().tolist() == kept
    close(routing.combine_weight, [[[0.5, 0.4], [0.6, 0.3], [0.7, 0.2]]])


def test_capacity_has_a_factor_for_training_and_one_for_evaluation() -> None:
    """`eval_capacity_factor=None` is dropless, whatever training does."""
    layer = times_e_plus_1("vmoe_top_k", 2, top_k=1, capacity_factor=0.5, noise="none")
    assert run(layer, CROWD)[1].counts().tolist() == [4, 0]
    assert run(layer.train(), CROWD)[1].counts().tolist() == [1, 0]  # ceil(.5 · 4 / 2)
    both = times_e_plus_1(
        "vmoe_top_k", 2, top_k=1, capacity_factor=0.5, eval_capacity_factor=1.5, noise="none"
    )
    assert run(both, CROWD)[1].counts().tolist() == [3, 0]
    assert run(both.train(), CROWD)[1].counts().tolist() == [1, 0]


def test_a_dropped_token_still_passes_the_shared_expert() -> None:
    """shared(x) = x here, so the first token is .6 x + x, the last one only x."""
    layer = times_e_plus_1("vmoe_top_k", 2, top_k=1, eval_capacity_factor=0.5, num_shared_experts=1)
    with torch.no_grad():
        layer.shared.fc1.weight.copy_(torch.eye(2))
        layer.shared.fc2.weight.copy_(torch.eye(2))
    out, routing = run(layer, CROWD)
    assert routing.kept[0, :, 0].tolist() == [True, False, False, False]
    close(out, torch.tensor([1.6, 1, 1, 1], dtype=torch.float64).view(1, 4, 1) * CROWD)


def test_shared_experts_are_one_dense_mlp_of_their_width() -> None:
    layer = MoEMlp(8, 6, num_experts=4, top_k=2, num_shared_experts=3)
    assert (layer.shared.fc1.in_features, layer.shared.fc1.out_features) == (8, 18)
    assert (layer.shared.fc2.in_features, layer.shared.fc2.out_features) == (18, 8)
    assert MoEMlp(8, 6, num_experts=4).shared is None


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("whole_batch", [False, True])
def test_choices_that_were_dropped_before_take_no_room(priority: bool, whole_batch: bool) -> None:
    """All four want expert 0 of 2, which computes C = ceil(1 · 4 / 2) = 2; without the first one the next two fit."""
    kept = torch.tensor([[[False], [True], [True], [True]]])
    left = within_capacity(
        torch.zeros(1, 4, 1, dtype=torch.int64),
        torch.tensor([[[0.9], [0.8], [0.7], [0.6]]]),
        kept,
        num_experts=2,
        factor=1.0,
        priority=priority,
        whole_batch=whole_batch,
    )
    assert left.flatten().tolist() == [False, True, True, False]
