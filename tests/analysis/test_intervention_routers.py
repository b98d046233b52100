"""What interventions mean for every router: identity bit for bit, experts that choose or mix tokens, own capacity."""

from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from moevision import UserError, forward_routing
from moevision.analysis.intervention import Intervention, Kind, apply_edits, refusal
from moevision.layers import (
    ROUTERS,
    ExpertChoiceRouting,
    MoEMlp,
    Routing,
    SoftRouting,
    moe_layers,
)
from tests.analysis.models import random_layer, random_tensor, routed, small_net
from tests.scopes import ablate, limit_capacity, random_route, swap, use_top_k

TOKEN_CHOICE = [name for name in ROUTERS if name not in ("expert_choice", "soft")]
OPTIONS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in ROUTERS),
    ("noisy_top_k", {"eval_capacity_factor": 0.75}),
    ("vmoe_top_k", {"eval_capacity_factor": 0.75, "batch_priority": True, "normalize_gates": True}),
    ("switch", {"eval_capacity_factor": 0.75, "batch_priority": True, "normalize_gates": True}),
    ("sigmoid", {"eval_capacity_factor": 0.5, "batch_priority": True, "capacity_group": "batch"}),
    ("expert_choice", {"normalize_gates": True}),
    ("soft", {"slots_per_expert": 3}),
]
IDS = ["-".join([name, *options]) for name, options in OPTIONS]


def make_model(router: str | list[str], **options: object) -> nn.Module:
    """Two MoE layers (blocks 1 and 3) on a 4 x 4 grid; the routers are no longer the initial ones."""
    model = small_net(router, **{"num_classes": 3, "expert_hidden": 24, **options})
    for layer in moe_layers(model):
        if getattr(layer.router, "bias", None) is not None:
            layer.router.bias.copy_(torch.tensor([0.3, -0.1, 0.0, -0.2]))
    return model


def images() -> Tensor:
    return random_tensor(3, 3, 32, 32, seed=2, dtype=torch.float32)


def layer_of(router: str, **options: object) -> MoEMlp:
    """A float64 layer of 4 experts in eval mode."""
    return random_layer(
        MoEMlp(8, 6, num_experts=4, router=router, dtype=torch.float64, **options), 0.7
    )


def tokens() -> Tensor:
    return random_tensor(2, 9, 8, seed=1)


def outputs_of_all(layer: MoEMlp, x: Tensor) -> Tensor:
    """[B, N, E, D]: what each expert makes of each token."""
    with torch.no_grad():
        return layer.experts.on_all_tokens(x.flatten(0, 1)).view(*x.shape[:2], 4, -1)


def same_bits(one: Routing, other: Routing) -> bool:
    tensors = {name: value for name, value in vars(one).items() if isinstance(value, Tensor)}
    return all(torch.equal(value, getattr(other, name)) for name, value in tensors.items())


@pytest.mark.parametrize(("router", "options"), OPTIONS, ids=IDS)
def test_an_open_scope_that_changes_nothing_changes_no_bit(router, options):
    model, x = make_model(router, **options), images()
    expected, before = forward_routing(model, x)
    with apply_edits(model, dict.fromkeys(moe_layers(model), lambda decision: decision)):
        actual, after = forward_routing(model, x)
    assert torch.equal(actual, expected)
    assert all(type(a) is type(b) and same_bits(a, b) for a, b in zip(before, after, strict=True))
    dropped = any(not routing.kept.all() for routing in before)
    assert dropped == ("eval_capacity_factor" in options or router == "expert_choice")


@pytest.mark.parametrize("fill", ["next_best", "zero"])
@pytest.mark.parametrize(
    "router", [name for name in TOKEN_CHOICE if name != "colour"]
)  # which needs an image
def test_tokens_without_the_ablated_expert_keep_their_output(router, fill):
    """So an expert that no token uses changes nothing; the others' products have more rows, and may round otherwise."""
    layer = layer_of(router)
    before, routing = routed(layer, tokens())
    with ablate(layer, 0, 2, fill):
        after, without = routed(layer, tokens())
    uses = (routing.expert_index == 2).any(-1)
    torch.testing.assert_close(after[~uses], before[~uses], rtol=0, atol=1e-6)
    assert uses.any()
    assert without.counts()[2] == 0
    if fill == "zero":
        part = outputs_of_all(layer, tokens())[:, :, 2] * routing.expert_weights()[..., 2:3]
        torch.testing.assert_close(after, before - part)


def test_a_bias_chooses_and_makes_no_gate():
    """bias_balanced: the next best is found by s + b, the gates are s over the sum of the chosen s."""
    layer = layer_of("bias_balanced")
    layer.router.bias.copy_(torch.tensor([0.5, 0.0, -0.5, 0.25]))
    x = tokens()
    with ablate(layer, 0, 0):
        _, routing = routed(layer, x)
    affinity = (x @ layer.router.weight.T).sigmoid().detach()
    chosen_by = affinity + torch.tensor([-9.0, 0.0, -0.5, 0.25])  # without expert 0
    index = chosen_by.argsort(-1, descending=True)[..., :2]
    gates = affinity.gather(-1, index)
    assert torch.equal(routing.expert_index, index)
    torch.testing.assert_close(routing.combine_weight.detach(), gates / gates.sum(-1, keepdim=True))


def choice_of_experts(x: Tensor, layer: MoEMlp, count: int) -> tuple[Tensor, Tensor]:
    """By definition: affinities [B, N, E], and which tokens each expert takes, bool [B, N, E]."""
    affinity = (x @ layer.router.weight.T).softmax(-1).detach()
    rank = affinity.argsort(1, descending=True).argsort(1)
    return affinity, rank < count


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("fill", ["next_best", "zero"])
def test_an_ablated_expert_takes_no_token_and_nobody_takes_its_place(fill, normalize):
    """9 tokens, 4 experts, K = 2: each takes ceil(4.5) = 5."""
    layer, x = layer_of("expert_choice", normalize_gates=normalize), tokens()
    before, _ = routed(layer, x)
    with ablate(layer, 0, 1, fill):
        after, routing = routed(layer, x)
    affinity, taken = choice_of_experts(x, layer, 5)
    left = taken.clone()
    left[..., 1] = False
    among = left if fill == "next_best" else taken  # whose weights sum to 1, where they do
    total = (affinity * among).sum(-1, keepdim=True) if normalize else torch.ones(1)
    weights = torch.where(left, affinity / total, 0.0)
    torch.testing.assert_close(routing.expert_weights(), weights)
    assert routing.counts().tolist() == [10, 0, 10, 10]
    torch.testing.assert_close(after, (outputs_of_all(layer, x) * weights.unsqueeze(-1)).sum(2))
    torch.testing.assert_close(after[~taken[..., 1]], before[~taken[..., 1]], rtol=0, atol=1e-6)
    layer.experts.backend = "dense"
    with ablate(layer, 0, 1, fill):
        torch.testing.assert_close(routed(layer, x)[0], after)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [30, 3000])
def test_experts_that_choose_by_tiny_weights(scale, normalize):
    """1 + w = 1, or w = 0, for most softmaxes w: an open scope changes no bit, an ablation divides no 0 by 0."""
    layer, x = layer_of("expert_choice", normalize_gates=normalize), scale * tokens()
    _, before = routed(layer, x)
    with apply_edits(layer, {layer: lambda decision: decision}):
        assert same_bits(routed(layer, x)[1], before)
    with ablate(layer, 0, 1):
        assert routed(layer, x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("scope", "count"), [(use_top_k, {1: 3, 3: 7, 4: 9}), (limit_capacity, {0.5: 3, 1.5: 7})]
)
def test_another_k_and_another_capacity_are_other_numbers_of_tokens(scope, count):
    """9 tokens, 4 experts: ceil(9 k / 4) for another k, ceil(f · 9 · 2 / 4) for a factor."""
    layer, x = layer_of("expert_choice"), tokens()
    for value, wanted in count.items():
        with scope(layer, value):
            _, routing = routed(layer, x)
        affinity, taken = choice_of_experts(x, layer, wanted)
        assert isinstance(routing, ExpertChoiceRouting)
        assert routing.token_index.shape == (2, 4, wanted)
        torch.testing.assert_close(routing.expert_weights(), affinity * taken)
    built = layer_of("expert_choice", top_k=3)
    built.load_state_dict(layer.state_dict())
    with use_top_k(layer, 3):
        assert torch.equal(routed(layer, x)[0], routed(built, x)[0])


@pytest.mark.parametrize("router", ["noisy_top_k", "expert_choice", "soft"])
def test_swap_is_exchanging_the_experts_weights(router):
    layer, x = layer_of(router), tokens()
    before, _ = routed(layer, x)
    with swap(layer, 0, 1, 3):
        actual, _ = routed(layer, x)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[[1, 3]] = parameter[[3, 1]]
    torch.testing.assert_close(actual, routed(layer, x)[0])
    assert not torch.allclose(before, actual)


def test_random_patches_for_experts():
    """As many as before, the same for every image, weights by rank, and other ones for another seed."""
    layer, x = layer_of("expert_choice"), tokens()
    _, free = routed(layer, x)
    seen = set()
    for seed in range(20):
        with random_route(layer, seed=seed):
            _, routing = routed(layer, x)
        assert isinstance(routing, ExpertChoiceRouting)
        assert torch.equal(routing.token_index[0], routing.token_index[1])
        assert torch.equal(routing.token_weight, free.token_weight)
        assert all(len(set(taken)) == 5 for taken in routing.token_index[0].tolist())
        seen.add(tuple(routing.token_index[0].flatten().tolist()))
    assert len(seen) == 20


def soft_output(
    layer: MoEMlp, x: Tensor, reads: Tensor, takes: Tensor, expert_of_slot: Tensor
) -> Tensor:
    """Soft MoE by definition, slot after slot: reads and takes are [B, N, S], expert_of_slot [S]."""
    out = torch.zeros_like(x)
    for slot, expert in enumerate(expert_of_slot.tolist()):
        read = torch.einsum("bn,bnd->bd", reads[..., slot], x)
        made = layer.experts.on_all_tokens(read)[:, expert]
        out += takes[..., slot, None] * made[:, None]
    return out.detach()


@pytest.mark.parametrize("fill", ["next_best", "zero"])
def test_without_an_expert_of_soft_moe(fill):
    """No token takes from its slots; `next_best` is the softmax over the other slots, `zero` leaves theirs."""
    layer, x = layer_of("soft", slots_per_expert=3), tokens()
    _, free = routed(layer, x)
    assert isinstance(free, SoftRouting)
    with ablate(layer, 0, 2, fill):
        out, routing = routed(layer, x)
    takes = free.slot_weight.clone()
    takes[:, :, 2] = 0
    if fill == "next_best":
        takes /= takes.sum((2, 3), keepdim=True)
    experts = torch.arange(4).repeat_interleave(3)
    expected = soft_output(layer, x, free.dispatch_weight.flatten(2), takes.flatten(2), experts)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(routing.expert_weights(), takes.sum(-1))
    assert (routing.expert_index[..., 3] == 2).all()  # the last, and not kept
    assert (routing.kept == torch.tensor([True, True, True, False])).all()


def test_slots_dealt_out_at_random():
    """What slots read and give stays; which expert computes them changes, and every expert has as many as before."""
    layer, x = layer_of("soft", slots_per_expert=3), tokens()
    _, free = routed(layer, x)
    assert isinstance(free, SoftRouting)
    with random_route(layer, seed=5):
        out, dealt = routed(layer, x)
    assert isinstance(dealt, SoftRouting)
    old, new = (routing.dispatch_weight[0].flatten(1).T for routing in (free, dealt))
    place = torch.tensor(
        [int((new == slot).all(-1).nonzero()) for slot in old]
    )  # where each slot went
    assert sorted(place.tolist()) == list(range(12))
    assert (place != torch.arange(12)).any()
    expected = soft_output(
        layer, x, free.dispatch_weight.flatten(2), free.slot_weight.flatten(2), place // 3
    )
    torch.testing.assert_close(out, expected)


def test_an_ablated_expert_stays_away_whatever_else_is_open():
    for router in ("expert_choice", "soft"):
        layer = layer_of(router)
        with ablate(layer, 0, 2), swap(layer, 0, 1, 2), random_route(layer, seed=1):
            _, routing = routed(layer, tokens())
        assert not routing.expert_weights()[..., 2].any()
        assert routing.expert_weights()[..., 1].any()


def test_a_capacity_of_the_models_own_is_applied_to_what_is_left():
    """Tokens are their own logits; 4 tokens, 3 experts, k = 1, room for ceil(0.75 · 4 / 3) = 1; earlier ones first.

    Experts wanted: 0, 0, 1, 1, then 2. Tokens 0 and 2 have a place. Without expert 0 the first two want 1 (their second
    best): the place there goes to token 0 now, token 2 loses its own, and nobody's place is left unused by the scope.
    """
    layer = MoEMlp(
        3, 4, num_experts=3, router="switch", eval_capacity_factor=0.75, dtype=torch.float64
    ).eval()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
    x = torch.tensor(
        [[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]], dtype=torch.float64
    )
    _, free = routed(layer, x)
    assert free.kept[0, :, 0].tolist() == [True, False, True, False]
    with ablate(layer, 0, 0):
        _, without = routed(layer, x)
    assert without.expert_index[0, :, 0].tolist() == [1, 1, 1, 1]
    assert without.kept[0, :, 0].tolist() == [True, False, False, False]
    with limit_capacity(layer, 1.5):  # in its place: room for 2
        assert routed(layer, x)[1].kept.all()


@pytest.mark.parametrize(
    ("router", "meaningless"),
    [("switch", []), ("expert_choice", ["force"]), ("soft", ["force", "top_k", "capacity"])],
)
def test_what_has_no_meaning_is_refused(router, meaningless):
    layer = layer_of(router)
    assert [kind for kind in get_args(Kind) if refusal(kind, layer.router)] == meaningless
    for kind in get_args(Kind):
        change = Intervention(kind, layer=0, expert=1, other=2, top_k=1, factor=1.0)
        with pytest.raises(UserError) if kind in meaningless else nullcontext():
            change.edits(layer)
