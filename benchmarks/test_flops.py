"""Counted FLOPs are the closed form, for every router and every backend, forward and backward."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import moevision.models  # noqa: F401 (registers the names)
from benchmarks.flops import inference_flops, recomputed_attention_flops, training_flops
from moevision import dense_twin, forward_routing
from moevision.efficiency import flop_counter
from moevision.layers import ROUTERS, LocalDispatcher, moe_layers

BACKENDS = [
    ("loop", None),
    ("loop", torch.bfloat16),
    ("grouped", None),
    ("grouped", torch.bfloat16),
    ("dense", None),
]
BATCH, SIDE, PATCH, DIM, HIDDEN, EXPERTS, CLASSES = 3, 32, 8, 32, 48, 4, 5
BLOCKS, MOE_BLOCKS = 4, 2
TOKENS = (SIDE // PATCH) ** 2


def count_flops(function):
    """FLOPs that one call executes, backward passes in it included."""
    with flop_counter() as counter:
        function()
    return int(counter.get_total_flops())


def build(router="vmoe_top_k", **kwargs):
    """Without rows that the dispatcher adds; those have a test of their own."""
    options = {"stem": "patch", "num_classes": CLASSES, "expert_hidden": HIDDEN, **kwargs}
    model = timm.create_model("test_vit_moe", router=router, **options)
    for layer in moe_layers(model):
        layer.dispatcher = LocalDispatcher(row_multiple=1)
    return model


def pictures(count=BATCH, side=SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def router_flops(router, training):
    """One multiply-add for each weight of the router, per token; the colour router's distances don't count."""
    if router in ("hash", "random", "position", "colour"):
        return 0
    if router == "cosine":  # a projection to min(256, D) features, then one embedding per expert
        return 2 * DIM * min(256, DIM) + 2 * min(256, DIM) * EXPERTS
    if router == "soft":  # scores of E · P slots, with E · P = K · N
        return 2 * DIM * 2 * TOKENS
    noise = router == "noisy_top_k" and training
    return 2 * DIM * EXPERTS * (2 if noise else 1)


def rows_of(router, backend):
    """Rows through one expert, in one layer."""
    tokens = BATCH * TOKENS
    if router == "soft":
        return BATCH * 2 * TOKENS
    if backend == "dense":
        return tokens * EXPERTS
    if router == "expert_choice":
        return BATCH * EXPERTS * math.ceil(TOKENS * 2 / EXPERTS)
    return tokens * (1 if router == "switch" else 2)


def closed_form(router, backend, training, rows=None):
    """(patch embedding, attention's two products, everything else) of one forward pass."""
    tokens = BATCH * TOKENS
    patches = 2 * tokens * PATCH * PATCH * 3 * DIM
    attention = BLOCKS * 2 * 2 * BATCH * TOKENS * TOKENS * DIM
    projections = BLOCKS * 2 * tokens * (3 * DIM * DIM + DIM * DIM)
    dense = (BLOCKS - MOE_BLOCKS) * 2 * tokens * 2 * DIM * 4 * DIM
    rows = rows_of(router, backend) if rows is None else rows
    moe = MOE_BLOCKS * (2 * rows * 2 * DIM * HIDDEN + tokens * router_flops(router, training))
    if router == "soft":  # slots from tokens and tokens from slots
        moe += MOE_BLOCKS * 2 * 2 * tokens * 2 * TOKENS * DIM
    return patches, attention, projections + dense + moe + 2 * BATCH * DIM * CLASSES


@pytest.mark.parametrize(("backend", "autocast"), BACKENDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_counts_are_the_closed_form(router, backend, autocast):
    """In training each product has two gradients, but the pixels need none; fused attention computes its scores again.

    So backward = patches + 2.5 · attention + 2 · the rest, and 2 · attention is what is needed.
    """
    model = build(router, backend=backend)
    by_token = MOE_BLOCKS * BATCH * TOKENS
    found = inference_flops(model, pictures(), autocast=autocast)
    assert found.executed == sum(closed_form(router, backend, training=False))
    assert found.useful == sum(closed_form(router, "loop", training=False))
    assert found.router == by_token * router_flops(router, training=False)
    waste = 1 - rows_of(router, "loop") / rows_of(router, backend)
    assert found.padding_waste == pytest.approx(waste, abs=1e-12)
    found = training_flops(model, pictures(), autocast=autocast)
    patches, attention, rest = closed_form(router, backend, training=True)
    assert found.executed == 2 * patches + 7 * attention // 2 + 3 * rest
    patches, attention, rest = closed_form(router, "loop", training=True)
    assert found.useful == 2 * patches + 3 * attention + 3 * rest
    assert found.router == 3 * by_token * router_flops(router, training=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_costs_what_a_loop_costs(dtype):
    """Forward, rows' gradient and weights' gradient, counted apart: each is 2 · R · K · N."""
    rows = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 16, 24, dtype=dtype, requires_grad=True)
    ends = torch.tensor([8, 8, 40], dtype=torch.int32)

    def both():
        F.grouped_mm(rows, weight, offs=ends).square().sum().backward()

    assert count_flops(lambda: F.grouped_mm(rows, weight, offs=ends)) == 2 * 40 * 16 * 24
    assert count_flops(both) == 3 * 2 * 40 * 16 * 24
    assert (
        count_flops(lambda: F.grouped_mm(weight.detach(), weight.detach().mT))
        == 2 * 3 * 16 * 24 * 16
    )


def test_rows_that_the_dispatcher_adds_are_waste():
    """Groups rounded up to 32 rows; how long they were, the routing says."""
    torch.manual_seed(0)
    model = build(backend="loop", patch_size=2).eval()
    for layer in moe_layers(model):
        layer.dispatcher = LocalDispatcher(row_multiple=32)
    images = pictures(2)
    _, routings = forward_routing(model, images)
    executed = sum(
        -(-count // 32) * 32 for routing in routings for count in routing.counts().tolist()
    )
    kept = 2 * 2 * 256 * 2  # layers · images · tokens · K
    assert executed > kept
    for found, passes in ((inference_flops(model, images), 1), (training_flops(model, images), 3)):
        assert found.experts_useful == passes * kept * 2 * 2 * DIM * HIDDEN
        if passes == 1:  # noise moves tokens in training
            assert found.experts_executed == executed * 2 * 2 * DIM * HIDDEN
            assert found.padding_waste == 1 - kept / executed
        assert found.experts_executed > found.experts_useful
        assert (
            0 < found.waste < found.padding_waste + 1 / 7
        )  # 1/7: scores computed again, of attention alone


def test_what_a_capacity_drops_is_waste():
    model = build("vmoe_top_k", backend="loop", eval_capacity_factor=0.5).eval()
    _, routings = forward_routing(model, pictures())
    kept = sum(int(routing.counts().sum()) for routing in routings)
    chosen = MOE_BLOCKS * BATCH * TOKENS * 2
    assert 0 < kept <= chosen // 2
    found = inference_flops(model, pictures())
    assert found.experts_executed == chosen * 2 * 2 * DIM * HIDDEN
    assert found.padding_waste == 1 - kept / chosen


@pytest.mark.parametrize("backend", ["loop", "grouped", "dense"])
def test_shared_experts_and_a_convolutional_stem_are_no_routed_experts(backend):
    """The stem's first convolution has no gradient of the pixels, its others have both."""
    model = build(backend=backend, stem="conv", num_shared_experts=1)
    rows = rows_of("vmoe_top_k", backend)
    found = training_flops(model, pictures())
    assert found.experts_executed == 3 * MOE_BLOCKS * rows * 2 * 2 * DIM * HIDDEN
    # 32 px -> 16 -> 8 -> 4 by 3 x 3 with 3, 16, 16, 32 channels, then 1 x 1.
    first = 2 * 16 * 16 * 9 * 3 * 16
    stem = first + 2 * 8 * 8 * 9 * 16 * 16 + 2 * 4 * 4 * 9 * 16 * 32 + 2 * 4 * 4 * 32 * 32
    _, attention, rest = closed_form("vmoe_top_k", "loop", training=True)
    rest += MOE_BLOCKS * BATCH * TOKENS * 2 * 2 * DIM * HIDDEN
    assert found.useful == BATCH * (3 * stem - first) + 3 * attention + 3 * rest


def test_frozen_weights_cost_no_gradient_and_pass_it_on():
    """First only the head learns: one gradient of its product. Then all but the second layer of the experts."""
    model = build(backend="grouped").requires_grad_(False)
    model.head.requires_grad_(True)
    patches, attention, rest = closed_form("vmoe_top_k", "loop", training=True)
    forward = patches + attention + rest
    assert training_flops(model, pictures()).useful == forward + 2 * BATCH * DIM * CLASSES
    model = build(backend="dense")
    for layer in moe_layers(model):
        layer.experts.fc2.requires_grad_(False)
    found, product = training_flops(model, pictures()), 2 * DIM * HIDDEN
    chosen = MOE_BLOCKS * BATCH * TOKENS * 2
    assert found.experts_useful == chosen * (3 + 2) * product
    assert found.useful == 2 * patches + 3 * attention + 3 * rest - chosen * product


def test_checkpointing_is_executed_but_not_useful():
    """Every block's forward pass runs twice, less a dense block's last product, which no gradient needs.

    timm checkpoints blocks, not the stem or the head.
    """
    plain, checkpointed = build(backend="loop"), build(backend="loop")
    checkpointed.set_grad_checkpointing()
    without, found = training_flops(plain, pictures()), training_flops(checkpointed, pictures())
    assert found.useful == without.useful
    _, attention, rest = closed_form("vmoe_top_k", "loop", training=True)
    last = (BLOCKS - MOE_BLOCKS) * 2 * BATCH * TOKENS * 4 * DIM * DIM
    assert found.executed - without.executed == attention + rest - last - 2 * BATCH * DIM * CLASSES


def test_dense_models_waste_nothing():
    twin = dense_twin(build(), "active_flops")
    found = inference_flops(twin, pictures())
    assert (found.waste, found.padding_waste, found.router) == (0, 0, 0)
    moe = inference_flops(build(), pictures())
    assert found.useful == moe.useful - moe.router


def test_counting_leaves_the_model_alone():
    torch.manual_seed(0)
    model = build("noisy_top_k", stem="conv").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    training_flops(model, pictures())
    inference_flops(model, pictures())
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
        inference_flops(model, pictures())


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


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_counted_too(whole):
    """On an uncompiled copy, since compiled code shows its products to nobody."""
    model = build(backend="loop")
    expected = training_flops(model, pictures())
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        for block in model.blocks:
            block.compile(backend="eager")
    assert training_flops(model, pictures()) == expected
    assert inference_flops(model, pictures()).useful == sum(
        closed_form("vmoe_top_k", "loop", training=False)
    )
