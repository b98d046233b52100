"""Counted useful FLOPs of training are the closed form, for every router and every backend."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import moevision.models  # noqa: F401 (registers the names)
from benchmarks.flops import recomputed_attention_flops, training_flops
from moevision import dense_twin
from moevision.efficiency import flop_counter
from moevision.layers import ROUTERS, LocalDispatcher, cpu, moe_layers

BATCH, SIDE, PATCH, DIM, HIDDEN, EXPERTS, CLASSES = 3, 32, 8, 32, 48, 4, 5
BLOCKS, MOE_BLOCKS = 4, 2
TOKENS = (SIDE // PATCH) ** 2


def build(router="vmoe_top_k", **kwargs):
    """Without rows that the dispatcher adds; those have a test of their own."""
    options = {"stem": "patch", "num_classes": CLASSES, "expert_hidden": HIDDEN, **kwargs}
    model = timm.create_model("test_vit_moe", router=router, **options)
    for layer in moe_layers(model):
        layer.dispatcher = LocalDispatcher(pad=False)
    return model


def pictures(count=BATCH, side=SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def router_flops(router):
    """One multiply-add for each weight of the router, per token; the colour router's distances don't count."""
    if router in ("hash", "random", "position", "colour"):
        return 0
    if router == "cosine":  # a projection to min(256, D) features, then one embedding per expert
        return 2 * DIM * min(256, DIM) + 2 * min(256, DIM) * EXPERTS
    if router == "soft":  # scores of E · P slots, with E · P = K · N
        return 2 * DIM * 2 * TOKENS
    return 2 * DIM * EXPERTS * (2 if router == "noisy_top_k" else 1)  # and the noise's


def rows_of(router):
    """Rows that the experts of one layer are asked to compute."""
    if router == "soft":
        return BATCH * 2 * TOKENS
    if router == "expert_choice":
        return BATCH * EXPERTS * math.ceil(TOKENS * 2 / EXPERTS)
    return BATCH * TOKENS * (1 if router == "switch" else 2)


def closed_form(router="vmoe_top_k"):
    """(patch embedding, everything else) of one forward pass."""
    tokens = BATCH * TOKENS
    patches = 2 * tokens * PATCH * PATCH * 3 * DIM
    attention = BLOCKS * 2 * 2 * BATCH * TOKENS * TOKENS * DIM
    projections = BLOCKS * 2 * tokens * (3 * DIM * DIM + DIM * DIM)
    dense = (BLOCKS - MOE_BLOCKS) * 2 * tokens * 2 * DIM * 4 * DIM
    moe = MOE_BLOCKS * (2 * rows_of(router) * 2 * DIM * HIDDEN + tokens * router_flops(router))
    if router == "soft":  # slots from tokens and tokens from slots
        moe += MOE_BLOCKS * 2 * 2 * tokens * 2 * TOKENS * DIM
    return patches, attention + projections + dense + moe + 2 * BATCH * DIM * CLASSES


@pytest.mark.parametrize("backend", ["loop", "grouped", "dense"])
@pytest.mark.parametrize("router", ROUTERS)
def test_useful_flops_are_the_closed_form(router, backend):
    """Each product has two gradients, but the pixels need none; nothing that is computed twice counts."""
    patches, rest = closed_form(router)
    assert training_flops(build(router, backend=backend), pictures()) == 2 * patches + 3 * rest


@pytest.mark.parametrize("change", ["rows", "compiled", "blocks compiled", "checkpointed"])
def test_what_is_computed_twice_or_out_of_sight_changes_nothing(change, monkeypatch):
    """Groups rounded up to 32 rows; compiled code, which shows its products to nobody; blocks that run twice."""
    model = build(backend="loop")
    if change == "rows":
        monkeypatch.setattr(
            cpu, "_padded_lengths", lambda sizes, x: [-(-n // 32) * 32 for n in sizes]
        )
        for layer in moe_layers(model):
            layer.dispatcher = LocalDispatcher()
    elif change == "compiled":
        model = torch.compile(model, backend="eager")
    elif change == "blocks compiled":
        for block in model.blocks:
            block.compile(backend="eager")
    else:
        model.set_grad_checkpointing()
    patches, rest = closed_form()
    assert training_flops(model, pictures()) == 2 * patches + 3 * rest


def test_what_a_capacity_drops_is_not_useful():
    whole, cut = (
        training_flops(build(backend="loop", capacity_factor=factor), pictures())
        for factor in (None, 0.5)
    )
    row = 3 * 2 * 2 * DIM * HIDDEN
    dropped, rest = divmod(whole - cut, row)
    assert rest == 0
    assert dropped >= MOE_BLOCKS * BATCH * TOKENS * 2 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_costs_what_a_loop_costs(dtype):
    """Forward, rows' gradient and weights' gradient: each is 2 · R · K · N."""
    rows = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 16, 24, dtype=dtype, requires_grad=True)
    with flop_counter() as counter:
        output = F.grouped_mm(rows, weight, offs=torch.tensor([8, 8, 40], dtype=torch.int32))
        assert counter.get_total_flops() == 2 * 40 * 16 * 24
        output.square().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 16 * 24
    with flop_counter() as counter:
        F.grouped_mm(weight.detach(), weight.detach().mT)
    assert counter.get_total_flops() == 2 * 3 * 16 * 24 * 16


@pytest.mark.parametrize("backend", ["loop", "grouped", "dense"])
def test_shared_experts_and_a_convolutional_stem_are_no_routed_experts(backend):
    """The stem's first convolution has no gradient of the pixels, its others have both."""
    model = build(backend=backend, stem="conv", num_shared_experts=1)
    # 32 px -> 16 -> 8 -> 4 by 3 x 3 with 3, 16, 16, 32 channels, then 1 x 1.
    first = 2 * 16 * 16 * 9 * 3 * 16
    stem = first + 2 * 8 * 8 * 9 * 16 * 16 + 2 * 4 * 4 * 9 * 16 * 32 + 2 * 4 * 4 * 32 * 32
    shared = MOE_BLOCKS * BATCH * TOKENS * 2 * 2 * DIM * HIDDEN
    expected = BATCH * (3 * stem - first) + 3 * (closed_form()[1] + shared)
    assert training_flops(model, pictures()) == expected


def test_frozen_weights_cost_no_gradient_and_pass_it_on():
    """First only the head learns: one gradient of its product. Then all but the second layer of the experts."""
    patches, rest = closed_form()
    model = build(backend="grouped").requires_grad_(False)
    model.head.requires_grad_(True)
    assert training_flops(model, pictures()) == patches + rest + 2 * BATCH * DIM * CLASSES
    model = build(backend="dense")
    for layer in moe_layers(model):
        layer.experts.fc2.requires_grad_(False)
    product = MOE_BLOCKS * BATCH * TOKENS * 2 * 2 * DIM * HIDDEN
    assert training_flops(model, pictures()) == 2 * patches + 3 * rest - product


def test_a_dense_twin_has_no_router():
    router = 3 * MOE_BLOCKS * BATCH * TOKENS * 2 * DIM * EXPERTS
    twin = training_flops(dense_twin(build(), "active_flops"), pictures())
    assert twin == training_flops(build(), pictures()) - router


def test_counting_leaves_the_model_alone():
    torch.manual_seed(0)
    model = build("noisy_top_k", stem="conv").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    training_flops(model, pictures())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_operation_without_a_formula_is_an_error():
    """Experts that compute out of the counter's sight: the count must be refused, not reported."""
    model = build(backend="loop")
    for layer in moe_layers(model):
        layer.experts.forward = lambda rows, counts: rows.clone()
    with pytest.raises(RuntimeError, match="no FLOP formula"):
        training_flops(model, pictures())


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("_scaled_dot_product_flash_attention", ()),
        ("_scaled_dot_product_efficient_attention", (None, True)),
        ("_scaled_dot_product_cudnn_attention", (None, True)),
        ("_scaled_dot_product_flash_attention_for_cpu", ()),
    ],
)
def test_every_fused_attention_is_counted(operation, arguments):
    """Those of CUDA too, on tensors without data: 2 products forward, 5 backward of which one computes scores again."""
    batch, heads, tokens, width = 2, 3, 64, 16
    product = 2 * batch * heads * tokens * tokens * width
    query = torch.empty(
        batch, heads, tokens, width, dtype=torch.bfloat16, device="meta", requires_grad=True
    )
    with flop_counter() as counter:
        getattr(torch.ops.aten, operation)(query, query, query, *arguments)[
            0
        ].square().sum().backward()
    assert counter.get_total_flops() == 7 * product
    assert recomputed_attention_flops(counter) == product
