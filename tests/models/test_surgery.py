"""Expert surgery: exact where it can be, by its stated rules elsewhere, and every result saves and reloads."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from moevision import UserError, convert_to_moe, forward_routing
from moevision.layers import MoEMlp, moe_layers
from moevision.models.io import SavedModel, load_model, save_model
from moevision.models.surgery import (
    ExpertUse,
    average_experts,
    collapse_to_dense,
    expert_of,
    matching_units,
    measure_use,
    merge_experts,
    most_used,
    prune_experts,
    reordered,
    side_by_side,
    similar_groups,
    state_of,
)

BLOCKS = (1, 3)  # MoE blocks of test_vit_moe: 4 experts of hidden 64, 2 per token, D 32
LEARNED = ("noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "bias_balanced", "cosine")


def images(count: int = 4, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def layer_of(model: nn.Module, block: int) -> MoEMlp:
    return next(layer for layer in moe_layers(model) if layer.layer_index == block)


@torch.no_grad()
def tiny(**options: Any) -> nn.Module:
    """A model whose routers and experts all differ: a learned-noise router starts at zero, biases too."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit_moe", num_classes=3, **options).eval()
    for layer in moe_layers(model):
        for parameter in (*layer.router.parameters(), *layer.experts.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def without_tokens(model: nn.Module, expert: int) -> nn.Module:
    """The model with all tokens kept from one expert: its bias lies far below the others'."""
    for layer in moe_layers(model):
        layer.router.bias[expert] = -100.0
    return model


def assert_same_function(one: nn.Module, other: nn.Module) -> None:
    """Equal logits, of two models whose products have other shapes, which no processor promises to round alike.

    In float64: logits of order 1 may differ by some 1e-15, while an expert that left a trace moves them by far more.
    """
    one, other = copy.deepcopy(one).double(), copy.deepcopy(other).double()
    torch.testing.assert_close(one(images().double()), other(images().double()), rtol=0, atol=1e-12)


def use_from(counts: list[int], gates: list[float] | None = None, tokens: int = 100) -> ExpertUse:
    gate_sum = torch.tensor(counts if gates is None else gates, dtype=torch.float64)
    return ExpertUse(torch.tensor(counts), gate_sum, tokens, torch.eye(len(counts), dtype=torch.float64))


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    save_model(SavedModel(model, ["a", "b", "c"], 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), folder)
    return load_model(str(folder)).net


# ---- what experts are used for


def test_use_is_what_the_routings_say() -> None:
    model = tiny(router="vmoe_top_k")
    use = measure_use(model, [images()[:1], images()[1:]])  # in two batches of different size
    _, routings = forward_routing(model, images())
    for routing in routings:
        found = use[routing.layer]
        assert found.counts.tolist() == routing.counts().tolist()
        assert found.tokens == 4 * 16
        torch.testing.assert_close(found.gate_sum, routing.expert_weights().double().sum((0, 1)), rtol=1e-5, atol=1e-5)
        assert found.gate_total == pytest.approx(routing.combine_weight.sum(-1).mean().item(), rel=1e-6)
        expected = torch.corrcoef(routing.logits.flatten(0, 1).double().T)
        torch.testing.assert_close(found.alike, expected, atol=1e-6, rtol=0)


def test_gates_of_a_token_sum_to_one_where_they_are_normalised() -> None:
    for block in BLOCKS:
        assert measure_use(tiny(), [images()])[block].gate_total == pytest.approx(1, abs=1e-6)


def test_use_needs_a_model_with_experts_in_eval_mode() -> None:
    with pytest.raises(UserError, match=r"call model\.eval\(\) first"):
        measure_use(tiny().train(), [images()])
    with pytest.raises(UserError, match="no MoE layer"):
        measure_use(timm.create_model("test_vit").eval(), [images(size=160)])
    with pytest.raises(UserError, match="at least one batch"):
        measure_use(tiny(), [])


# ---- pruning


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_an_expert_that_no_token_uses_leaves_without_a_trace(expert: int) -> None:
    model = without_tokens(tiny(router="bias_balanced"), expert)
    assert all(use.counts[expert] == 0 for use in measure_use(model, [images()]).values())
    keep = [other for other in range(4) if other != expert]
    pruned = prune_experts(model, dict.fromkeys(BLOCKS, keep))
    assert [layer.router.num_experts for layer in moe_layers(pruned)] == [3, 3]
    assert_same_function(pruned, model)


def test_an_unused_expert_of_shazeers_router_too() -> None:
    """Two rows that always win, by the token's mean: the rows (1, ..., 1) and (-1, ..., -1) of a shifted input."""
    model = tiny()
    with torch.no_grad():
        for block in BLOCKS:
            model.blocks[block].norm2.weight.fill_(0.1)
            model.blocks[block].norm2.bias.fill_(1.0)  # every token lies near (1, ..., 1)
            rows = torch.tensor([1.0, -1.0, 0.9, -1.0]).unsqueeze(1)
            layer_of(model, block).router.weight.copy_(rows.expand(-1, 32))
    assert all(use.counts.tolist() == [64, 0, 64, 0] for use in measure_use(model, [images()]).values())
    pruned = prune_experts(model, remove=2, use=measure_use(model, [images()]))
    assert_same_function(pruned, model)


@pytest.mark.parametrize("router", LEARNED)
def test_a_pruned_layer_is_the_layer_without_the_expert(router: str) -> None:
    """The other experts' logits stay, so that a token's choices are the best of what is left."""
    model = tiny(router=router)
    layer = layer_of(model, 1)
    pruned = layer_of(prune_experts(model, {1: [0, 1, 3]}), 1)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    before, after = layer.router(x), pruned.router(x)
    left = before.noisy_logits[..., [0, 1, 3]]
    torch.testing.assert_close(after.noisy_logits, left)
    assert torch.equal(after.expert_index, left.topk(layer.router.top_k).indices)
    for name, weight in pruned.experts.state_dict().items():
        assert torch.equal(weight, layer.experts.state_dict()[name][[0, 1, 3]])


def test_gates_over_all_experts_grow_by_the_probability_that_left() -> None:
    """softmax over 3 of 4 logits = softmax over 4 / (1 - p of the fourth)."""
    layer = layer_of(model := tiny(router="vmoe_top_k"), 1)
    pruned = layer_of(prune_experts(model, {1: [0, 1, 2]}), 1)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    probs = layer.router(x).probs
    torch.testing.assert_close(pruned.router(x).probs, probs[..., :3] / (1 - probs[..., 3:]))


def test_the_least_used_are_pruned() -> None:
    use = {1: use_from([5, 9, 5, 7]), 3: use_from([1, 2, 3, 4])}
    assert most_used(use[1], 3) == [0, 1, 3]  # of the equal ones the later goes
    assert most_used(use[1], 1) == [1]
    model = tiny()
    pruned = prune_experts(model, remove=2, use=use)
    for block, kept in ((1, [1, 3]), (3, [2, 3])):
        assert torch.equal(layer_of(pruned, block).router.weight, layer_of(model, block).router.weight[kept])
    assert torch.equal(prune_experts(model, remove=0, use=use)(images()), model(images()))


def test_layers_that_are_not_named_stay() -> None:
    model = tiny()
    pruned = prune_experts(model, {3: [3, 1, 0]})
    assert [layer.router.num_experts for layer in moe_layers(pruned)] == [4, 3]
    assert pruned.moe_config["num_experts"] == [4, 3]
    assert torch.equal(layer_of(pruned, 1).experts.fc1.weight, layer_of(model, 1).experts.fc1.weight)
    # Experts keep their order.
    assert torch.equal(layer_of(pruned, 3).experts.fc1.weight, layer_of(model, 3).experts.fc1.weight[[0, 1, 3]])


def test_the_model_itself_is_left_alone() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments, config = dict(model._model_args), dict(model.moe_config)
    generator = torch.get_rng_state()
    use = measure_use(model, [images()])
    prune_experts(model, remove=1, use=use)
    merge_experts(model, to=2, use=use)
    collapse_to_dense(model, use=use)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert (model._model_args, model.moe_config) == (arguments, config)
    assert torch.equal(torch.get_rng_state(), generator)


# ---- merging


def test_hidden_units_are_brought_back_into_order() -> None:
    experts = state_of(layer_of(tiny(), 1).experts)
    one = expert_of(experts, 0)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    other = reordered(one, shuffle)
    assert not torch.equal(other["fc1.weight"], one["fc1.weight"])
    x = torch.randn(5, 32)
    torch.testing.assert_close(run_mlp(other, x), run_mlp(one, x))  # the order of hidden units doesn't matter
    restored = reordered(other, matching_units(other, one))
    assert all(torch.equal(restored[name], one[name]) for name in one)


def run_mlp(mlp: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = nn.functional.gelu(x @ mlp["fc1.weight"].T + mlp["fc1.bias"])
    return hidden @ mlp["fc2.weight"].T + mlp["fc2.bias"]


def test_merging_an_expert_with_its_shuffled_self_gives_itself() -> None:
    """Without the alignment the average is another function."""
    one = expert_of(state_of(layer_of(tiny(), 1).experts), 0)
    shuffled = reordered(one, torch.randperm(64, generator=torch.Generator().manual_seed(0)))
    both = {name: torch.stack([one[name], shuffled[name]]) for name in one}
    weights = torch.tensor([3.0, 1.0])
    aligned = average_experts(both, [0, 1], weights)
    assert all(torch.equal(aligned[name], one[name]) for name in one)
    plain = average_experts(both, [0, 1], weights, align=False)
    torch.testing.assert_close(plain["fc1.bias"], 0.75 * one["fc1.bias"] + 0.25 * shuffled["fc1.bias"])
    x = torch.randn(5, 32)
    assert (run_mlp(plain, x) - run_mlp(one, x)).abs().max() > 0.01


@torch.no_grad()
def make_equal(layer: MoEMlp, expert: int, other: int) -> None:
    """Turn `other` into `expert`: its row and its weights, with the hidden units in another order."""
    for tensor in layer.router.state_dict().values():
        if tensor.ndim and len(tensor) == 4:  # one entry for each expert
            tensor[other] = tensor[expert]
    packed = layer.experts.state_dict()
    one = expert_of(packed, expert)
    order = torch.randperm(len(one["fc1.bias"]), generator=torch.Generator().manual_seed(other))
    for name, tensor in reordered(one, order).items():
        packed[name][other] = tensor


@pytest.mark.parametrize("router", ["noisy_top_k", "vmoe_top_k", "sigmoid", "bias_balanced", "cosine"])
def test_merging_equal_experts_with_equal_rows_changes_nothing(router: str) -> None:
    """One expert per token, gate 1: whichever of the equals a token took, it takes the merged one."""
    model = tiny(router=router, top_k=1, normalize_gates=True)
    pairs = {}
    for block in BLOCKS:  # a layer's tokens depend on the layers before it
        counts = measure_use(model, [images()])[block].counts
        pairs[block] = int(counts.argmax()), int(counts.argmin())
        make_equal(layer_of(model, block), *pairs[block])
    use = measure_use(model, [images()])
    assert all(use[block].counts[list(pair)].sum() >= 16 for block, pair in pairs.items())
    groups = {
        block: [list(pair), *([expert] for expert in range(4) if expert not in pair)] for block, pair in pairs.items()
    }
    merged = merge_experts(model, groups, use=use)
    assert [layer.router.num_experts for layer in moe_layers(merged)] == [3, 3]
    torch.testing.assert_close(merged(images()), model(images()), rtol=0, atol=1e-6)
    unaligned = merge_experts(model, groups, align=False)
    assert (unaligned(images()) - model(images())).abs().max() > 1e-4


def test_merging_to_fewer_experts_that_are_all_equal_changes_nothing() -> None:
    """An upcycled model: its experts are copies, whatever their rows, and Shazeer's gates sum to 1."""
    dense = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    expected = dense(images())
    model = convert_to_moe(dense, num_experts=4, top_k=2, copy_weights=True)
    randomise_routers(model)
    merged = merge_experts(model, to=2, use=measure_use(model, [images()]))
    assert {layer.router.num_experts for layer in moe_layers(merged)} == {2}
    torch.testing.assert_close(merged(images()), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def randomise_routers(model: nn.Module) -> None:
    for seed, layer in enumerate(moe_layers(model)):
        layer.router.weight.normal_(generator=torch.Generator().manual_seed(seed))


def test_a_merged_expert_is_the_average_by_use_with_its_row() -> None:
    model = tiny()
    use = {1: use_from([6, 1, 1, 2]), 3: use_from([1, 1, 1, 1])}
    merged = merge_experts(model, {1: [[0, 3], [1, 2]]}, use=use, align=False)
    old, new = layer_of(model, 1), layer_of(merged, 1)
    for before, after in (
        (old.router.weight, new.router.weight),
        (old.router.noise_weight, new.router.noise_weight),
        (old.experts.fc1.weight, new.experts.fc1.weight),
        (old.experts.fc2.bias, new.experts.fc2.bias),
    ):
        torch.testing.assert_close(after[0], 0.75 * before[0] + 0.25 * before[3])  # 6 and 2 choices
        torch.testing.assert_close(after[1], 0.5 * before[1] + 0.5 * before[2])


def test_the_row_is_a_mean_because_a_logsumexp_is_no_row() -> None:
    """Two equal rows: the mean keeps their logit l, the softmax would need l + log 2, and no row adds a constant."""
    model = tiny(router="vmoe_top_k")
    make_equal(layer_of(model, 1), 0, 1)
    merged = merge_experts(model, {1: [[0, 1], [2], [3]]})
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    before, after = layer_of(model, 1).router(x), layer_of(merged, 1).router(x)
    torch.testing.assert_close(after.logits, before.logits[..., [0, 2, 3]])
    together = before.probs[..., :2].sum(-1)
    torch.testing.assert_close(after.probs[..., 0], (together / 2) / (1 - together / 2))
    assert (after.probs[..., 0] < together).all()


def test_groups_form_around_the_most_used() -> None:
    """Correlations by hand: 0 is most like 3 (.2), and 2 most like 1 (.9)."""
    alike = torch.eye(4, dtype=torch.float64)
    for a, b, value in ((0, 1, -0.5), (0, 3, 0.2), (2, 1, 0.9), (2, 3, 0.3)):
        alike[a, b] = alike[b, a] = value
    counts = torch.tensor([3, 10, 2, 8])
    use = ExpertUse(counts, counts.double(), 23, alike)
    assert similar_groups(use, 2) == [[1, 2], [3, 0]]
    assert similar_groups(use, 4) == [[0], [1], [2], [3]]
    assert similar_groups(use, 1) == [[1, 0, 2, 3]]
    assert similar_groups(use, 9) == similar_groups(use, 4)


# ---- collapsing


def upcycled(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A dense model, and it with experts that are copies of its MLPs."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
    dense = timm.create_model("vit_tiny_patch16_224", **size).eval()
    model = timm.create_model("vit_tiny_patch16_224", **size).eval()
    model.load_state_dict(dense.state_dict())
    model = convert_to_moe(model, num_experts=4, copy_weights=True, **options)
    return dense, model.eval()


@pytest.mark.parametrize("how", ["average", "most_used"])
@pytest.mark.parametrize("router", ["noisy_top_k", "soft", "position"])
def test_a_fresh_upcycled_model_collapses_to_the_dense_one(how: Any, router: str, tmp_path: Path) -> None:
    dense, model = upcycled(router=router)
    if router == "noisy_top_k":
        randomise_routers(model)
    collapsed = collapse_to_dense(model, how, use=measure_use(model, [images()]))
    assert not moe_layers(collapsed)
    torch.testing.assert_close(collapsed(images()), dense(images()), rtol=0, atol=1e-6)
    # It is the dense architecture again, which needs no moevision.
    assert type(collapsed) is type(dense)
    assert not hasattr(collapsed, "moe_config")
    assert collapsed.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
    assert torch.equal(reloaded(collapsed, tmp_path)(images()), collapsed(images()))
    assert '"architecture": "vit_tiny_patch16_224"' in (tmp_path / "config.json").read_text()
    assert "num_experts" not in (tmp_path / "config.json").read_text()


def test_without_use_copies_collapse_exactly() -> None:
    dense, model = upcycled()
    assert torch.equal(collapse_to_dense(model)(images()), dense(images()))


def test_output_is_scaled_by_the_gates_that_tokens_had() -> None:
    """Equal experts, gates that sum to g(x): the MoE gives g(x) f(x), and the collapsed layer mean(g) f(x)."""
    dense, model = upcycled(router="vmoe_top_k")
    use = measure_use(model, [images()])
    layer, mlp = layer_of(model, 1), collapse_to_dense(model, use=use).blocks[1].mlp
    x = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(1))
    gates = layer.router(x).combine_weight.sum(-1, keepdim=True)
    assert 0.5 < use[1].gate_total < 0.95
    torch.testing.assert_close(layer(x), gates * dense.blocks[1].mlp(x))
    torch.testing.assert_close(mlp(x), use[1].gate_total * dense.blocks[1].mlp(x))
    unscaled = collapse_to_dense(model).blocks[1].mlp
    torch.testing.assert_close(unscaled(x), dense.blocks[1].mlp(x))


def test_experts_count_by_their_gates() -> None:
    """fc1 is the average by gates 1 : 2 : 0 : 1, fc2 too, times gates per token, 4 / 10."""
    model = tiny()
    use = dict.fromkeys(BLOCKS, use_from([9, 1, 1, 1], [1.0, 2.0, 0.0, 1.0], tokens=10))
    experts = layer_of(model, 1).experts
    mlp = collapse_to_dense(model, use=use, align=False).blocks[1].mlp
    weights = torch.tensor([0.25, 0.5, 0.0, 0.25])
    torch.testing.assert_close(mlp.fc1.weight, torch.einsum("e,ehd->hd", weights, experts.fc1.weight))
    torch.testing.assert_close(mlp.fc2.weight, 0.4 * torch.einsum("e,edh->dh", weights, experts.fc2.weight))
    torch.testing.assert_close(mlp.fc2.bias, 0.4 * weights @ experts.fc2.bias)
    one = collapse_to_dense(model, "most_used", use=use).blocks[1].mlp  # 1: most gates, though not most choices
    assert torch.equal(one.fc1.weight, experts.fc1.weight[1])
    assert torch.equal(one.fc2.weight, experts.fc2.weight[1] * 0.4)


@pytest.mark.parametrize("bias", [True, False])
def test_side_by_side_is_the_sum(bias: bool) -> None:
    first, second = (Mlp(8, hidden, 8, bias=bias).double() for hidden in (5, 7))
    both = Mlp(8, 12, 8, bias=bias).double()
    both.load_state_dict(side_by_side(state_of(first), state_of(second)))
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(both(x), first(x) + second(x), rtol=1e-12, atol=1e-12)


def test_shared_experts_are_kept() -> None:
    """One expert and a shared one: nothing is averaged, so the dense layer computes what the MoE layer did."""
    model = tiny(num_experts=1, top_k=1, num_shared_experts=2, normalize_gates=True)
    collapsed = collapse_to_dense(model, use=measure_use(model, [images()]))
    assert collapsed.blocks[1].mlp.fc1.out_features == 3 * layer_of(model, 1).experts.fc1.out_features
    torch.testing.assert_close(collapsed(images()), model(images()), rtol=0, atol=1e-6)
    pruned = prune_experts(model := tiny(num_shared_experts=1), {1: [0, 1]})
    assert torch.equal(layer_of(pruned, 1).shared.fc1.weight, layer_of(model, 1).shared.fc1.weight)


# ---- saving


OPTIONS: dict[str, dict[str, Any]] = {
    **{router: {"router": router} for router in LEARNED},
    "per layer": {"top_k": [1, 2], "num_experts": [4, 6], "router": ["switch", "noisy_top_k"]},
    "shared": {"num_shared_experts": 1, "expert_drop": 0.1},
    "capacity": {"eval_capacity_factor": 1.0, "batch_priority": True},
    "all blocks": {"moe_layers": "all"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_results_save_and_reload(case: str, tmp_path: Path) -> None:
    model = tiny(**OPTIONS[case])
    use = measure_use(model, [images()])
    results = {
        "pruned": prune_experts(model, remove=1, use=use),
        "merged": merge_experts(model, to=2, use=use),
        "collapsed": collapse_to_dense(model, use=use),
    }
    for name, net in results.items():
        back = reloaded(net, tmp_path / name)
        assert torch.equal(back(images()), net(images())), name
        assert back.moe_config == net.moe_config


def dropouts(model: nn.Module) -> dict[str, float]:
    return {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


def test_dropout_stays_what_it_was() -> None:
    """.1 in experts, .2 in shared ones and after the layer; .2 in a plain ViT, .1 in the MLP that was an expert."""
    model = tiny(num_shared_experts=1, expert_drop=0.1, proj_drop_rate=0.2)
    assert dropouts(prune_experts(model, {1: [0, 1]})) == dropouts(model)
    narrow = collapse_to_dense(model).blocks[1].mlp
    assert (narrow.drop1.p, narrow.drop2.p) == (0.1, 0.2)
    plain = collapse_to_dense(tiny(router="switch", expert_drop=0.1, proj_drop_rate=0.2)).blocks[1].mlp
    assert (plain.drop1.p, plain.drop2.p) == (0.2, 0.2)


def test_a_converted_model_saves_under_its_base(tmp_path: Path) -> None:
    _, model = upcycled()
    pruned = prune_experts(model, {1: [0, 2, 3], 3: [0, 1]})
    back = reloaded(pruned, tmp_path)
    assert [layer.router.num_experts for layer in moe_layers(back)] == [3, 2]
    assert [layer.experts.fc1.out_features for layer in moe_layers(back)] == [128, 128]
    assert torch.equal(back(images()), pruned(images()))


def test_a_narrower_dense_model_remembers_its_widths(tmp_path: Path) -> None:
    """Experts of 64 hidden units, and 32 where all four are chosen, in a ViT with MLPs of 128."""
    model = tiny(top_k=[2, 4])
    collapsed = collapse_to_dense(model)
    assert [block.mlp.fc1.out_features for block in collapsed.blocks] == [128, 64, 128, 32]
    assert collapsed._model_args["twin"] == [64, 32]
    back = reloaded(collapsed, tmp_path)
    assert torch.equal(back(images()), collapsed(images()))
    assert back.moe_config["twin"] == [64, 32]


def test_an_own_architecture_without_experts_is_found_again(tmp_path: Path) -> None:
    """k = 1: an expert is as wide as the MLP, and the model is test_vit_moe without MoE layers."""
    collapsed = collapse_to_dense(tiny(router="switch"))
    assert collapsed._model_args == {"num_classes": 3, "moe_layers": []}
    assert torch.equal(reloaded(collapsed, tmp_path)(images()), collapsed(images()))


def test_results_can_be_operated_on_again() -> None:
    model = tiny()
    use = measure_use(model, [images()])
    once = prune_experts(prune_experts(model, {1: [0, 1, 2]}), {1: [0, 1]})
    assert torch.equal(once(images()), prune_experts(model, {1: [0, 1]})(images()))
    with pytest.raises(UserError, match="of 4 experts, not 3: measure it on this model"):
        merge_experts(prune_experts(model, {1: [0, 1, 2]}), to=2, use=use)
    with pytest.raises(UserError, match="no experts to operate on"):
        prune_experts(collapse_to_dense(model), remove=1, use=use)


# ---- what can't be done


@pytest.mark.parametrize("router", ["expert_choice", "soft", "hash", "random", "position"])
def test_routers_without_rows_can_only_be_collapsed(router: str) -> None:
    model = timm.create_model("test_vit_moe", num_classes=3, router=router).eval()
    use = measure_use(model, [images()])
    for operate in (
        lambda: prune_experts(model, {1: [0, 1, 2]}),
        lambda: merge_experts(model, to=2, use=use),
    ):
        with pytest.raises(UserError, match=r"Router\) can't do with fewer experts: .*Collapse the model"):
            operate()
    collapsed = collapse_to_dense(model, use=use)
    assert not moe_layers(collapsed)
    assert torch.equal(collapsed.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("operate", "words"),
    [
        (lambda model: prune_experts(model), "keep=.*or remove=N"),
        (lambda model: prune_experts(model, {1: [0]}, remove=1), "keep=.*or remove=N"),
        (lambda model: prune_experts(model, remove=-1), "keep=.*or remove=N"),
        (lambda model: prune_experts(model, remove=1), "give use=measure_use"),
        (lambda model: prune_experts(model, {2: [0, 1]}), "Block 2 is no MoE layer: choose among 1, 3"),
        (lambda model: prune_experts(model, {1: [0, 1, 4]}), "has the experts 0 to 3"),
        (lambda model: prune_experts(model, {1: [0, 1, 1]}), "name each at most once"),
        (lambda model: prune_experts(model, {1: [0]}), "a token takes 2: leave at least 2"),
        (lambda model: merge_experts(model), "groups=.*or to=N"),
        (lambda model: merge_experts(model, to=0), "groups=.*or to=N"),
        (lambda model: merge_experts(model, to=2), "give use=measure_use"),
        (lambda model: merge_experts(model, {1: [[0, 1], [2]]}), r"leave out the experts \[3\]"),
        (lambda model: merge_experts(model, {1: [[0, 1], [], [2, 3]]}), "include an empty one"),
        (lambda model: merge_experts(model, {1: [[0, 1], [1, 2, 3]]}), "name each at most once"),
        (lambda model: merge_experts(model, {2: [[0, 1], [2, 3]]}), "Block 2 is no MoE layer"),
        (lambda model: merge_experts(model, {1: [[0, 1, 2, 3]]}), "or collapse the model"),
        (lambda model: collapse_to_dense(model, "best"), "choose average or most_used"),
        (lambda model: collapse_to_dense(model, "most_used"), "give use=measure_use"),
        (lambda model: collapse_to_dense(timm.create_model("test_vit")), "not a dense one"),
    ],
)
def test_mistakes(operate: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        operate(tiny())
