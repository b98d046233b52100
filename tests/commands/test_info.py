"""`info`: its numbers equal a count by hand, and every model that the MoE is compared with is there."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from moevision.commands.info import compare_costs, load_any
from tests.shared import assert_names

# test_vit_moe at 32 px: 16 tokens, width 32, MLP 128, four blocks, MoE in blocks 1 and 3, 2 of 4 experts of hidden 64.
N, D, HIDDEN, BLOCKS, MOE_BLOCKS, E, K = 16, 32, 128, 4, 2, 4, 2
CLASSES = 2
NAMES = [
    "this model",
    "dense twin, same active FLOPs",
    "dense twin, same parameters",
    "the plain ViT",
]


@pytest.fixture(scope="module")
def facts(cli, tiny_run):
    outcome = cli("info", tiny_run / "model", "--format=json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_json_and_the_table_describe_the_model(cli, facts, tiny_run):
    assert (facts["classes"], facts["image_size"], facts["moe_blocks"]) == (CLASSES, 32, [1, 3])
    assert (facts["num_experts"], facts["top_k"]) == (E, K)
    assert list(facts["costs"]) == NAMES
    out = cli("info", tiny_run).out
    assert_names(out, "2 classes, 32 px", "4 experts, 2 per", "noisy_top_k", "blocks 1, 3")
    for cost in facts["costs"].values():
        assert f"{cost['total_parameters']:,}" in out


def test_parameters_of_the_model_are_those_of_its_file(facts, tiny_run):
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    weights = {
        name: tensor.numel()
        for name, tensor in load_file(tiny_run / "model" / "model.safetensors").items()
        if not name.endswith(buffers)
    }
    cost = facts["costs"]["this model"]
    assert cost["total_parameters"] == sum(weights.values())
    experts = sum(count for name, count in weights.items() if ".experts." in name)
    assert cost["active_parameters"] == sum(weights.values()) - experts * (E - K) // E


def test_parameters_of_the_dense_models(facts):
    """An MLP of hidden width H has 2 D H + H + D parameters; a router has two matrices of D x E (logits and noise)."""

    def mlp(hidden):
        return 2 * D * hidden + hidden + D

    moe = facts["costs"]["this model"]["total_parameters"] - MOE_BLOCKS * (
        E * mlp(HIDDEN // K) + 2 * D * E
    )
    expected = {NAMES[1]: mlp(HIDDEN), NAMES[2]: mlp(E * HIDDEN // K), NAMES[3]: mlp(HIDDEN)}
    for name, each in expected.items():
        cost = facts["costs"][name]
        assert cost["total_parameters"] == cost["active_parameters"] == moe + MOE_BLOCKS * each


def stem_flops(model):
    """Of the convolutions before the blocks, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        model.eval().patch_embed(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def test_flops_by_formula(facts):
    """Two FLOPs per multiply-add: qkv and projection 4 N D², scores and values 2 N² D, MLP 2 N D H, head D C."""
    model = timm.create_model("test_vit_moe", num_classes=CLASSES)
    attention = 2 * (4 * N * D * D + 2 * N * N * D)
    dense = stem_flops(model) + BLOCKS * (attention + 2 * 2 * N * D * HIDDEN) + 2 * D * CLASSES
    costs = facts["costs"]
    assert costs["the plain ViT"]["flops_per_image"] == dense
    assert costs[NAMES[1]]["flops_per_image"] == dense
    assert (
        costs["this model"]["flops_per_image"] == dense
    )  # K experts of hidden 128 / K cost what one MLP costs
    wider = MOE_BLOCKS * 2 * 2 * N * D * (E * HIDDEN // K - HIDDEN)
    assert costs[NAMES[2]]["flops_per_image"] == dense + wider
    # In evaluation the router multiplies by one matrix: without noise.
    assert costs["this model"]["router_flops_per_image"] == MOE_BLOCKS * 2 * N * D * E
    assert all(costs[name]["router_flops_per_image"] == 0 for name in NAMES[1:])


def test_names_need_no_weights(cli):
    facts = json.loads(cli("info", "vit_moe_micro_patch4_32", "--format=json").out)
    assert facts["num_experts"] == 8
    assert list(facts["costs"]) == NAMES
    dense = json.loads(cli("info", "test_vit", "--format=json").out)
    assert list(dense["costs"]) == ["this model"]
    parameters = sum(p.numel() for p in timm.create_model("test_vit").parameters())
    assert dense["costs"]["this model"]["total_parameters"] == parameters


def test_the_model_is_left_as_it_was(tiny_run):
    saved = load_any(str(tiny_run))
    before = {name: tensor.clone() for name, tensor in saved.net.state_dict().items()}
    backends = [module.backend for module in saved.net.modules() if hasattr(module, "backend")]
    compare_costs(saved.net, saved.image_size)
    assert all(tensor.equal(before[name]) for name, tensor in saved.net.state_dict().items())
    assert [
        module.backend for module in saved.net.modules() if hasattr(module, "backend")
    ] == backends
