"""The planner: bytes and states against counts by hand, against real optimizers, and against what autograd keeps."""

import pytest
import timm
import torch

from benchmarks.planner.footprint import count_weights, saved_bytes, shape_of
from benchmarks.planner.formulas import (
    Job,
    Layout,
    Weights,
    busiest_over_mean,
    layouts,
    memory,
    plan,
    rank_imbalance,
    recommend,
    ring_seconds,
    traffic,
)
from benchmarks.planner.machine import GPUS, Machine, sheet_machine
from moevision.efficiency import measure_cost
from moevision.layers import forward_routing, moe_layers
from moevision.layers.moe import LocalDispatcher
from moevision.models.vit_moe import checkpoint_blocks
from moevision.train.optim import OptimizerConfig, build_optimizer

MACHINE = sheet_machine("h100")


@pytest.fixture(scope="module")
def tiny():
    """32 px, 16 tokens, D 32, depth 4, two MoE layers of E 4, K 2, H 64."""
    return timm.create_model("test_vit_moe", num_classes=2)


@pytest.fixture(scope="module")
def shape(tiny):
    return shape_of(tiny, 32)


def found(shape, layout, gpus, batch=32, **job):
    plans = traffic(shape, layout, Job(gpus, batch, **job), MACHINE)
    return {(each.kind, each.what): each for each in plans}


# ---- traffic


def test_all_to_all_by_hand(shape):
    """8 images a GPU: 8 · 16 · 2 = 256 rows of 32 bf16 numbers in each of 2 layers, 4 times; 3/4 leave the GPU."""
    sent = found(shape, Layout("fsdp", 4), 4)["all_to_all", "rows"]
    assert sent.bytes_per_step == 4 * 2 * 256 * 32 * 2 * 3 / 4 == 98_304
    # Rows to the experts and back, forward and backward, and the counts: 5 calls in each of 2 layers, to 3 GPUs each.
    assert (sent.calls, sent.messages) == (10, 30)


def test_all_to_all_is_what_a_routing_sends():
    """Of four GPUs, each with images of its own: rows whose expert lies elsewhere, counted one by one.

    The router goes by the place of a patch and gives every expert as many, as the plan assumes.
    """
    net = timm.create_model("test_vit_moe", router="position", top_k=1, num_classes=2).eval()
    sent = 0
    for gpu in range(4):
        _, routings = forward_routing(net, torch.randn(8, 3, 32, 32))
        for routing in routings:
            elsewhere = routing.expert_index != gpu  # E 4 on 4 GPUs: expert e lies on GPU e
            sent += 4 * int(elsewhere.sum()) * 32 * 2  # there and back, twice; D 32, two bytes
    planned = found(shape_of(net, 32), Layout("ddp", 4), 4)["all_to_all", "rows"]
    assert planned.bytes_per_step == sent / 4


def test_weights_and_gradients_by_hand(tiny, shape):
    everything = sum(p.numel() for p in tiny.parameters())
    experts = sum(p.numel() for layer in moe_layers(tiny) for p in layer.experts.parameters())
    dense = everything - experts
    assert found(shape, Layout(), 1) == {}
    ddp = found(shape, Layout("ddp"), 4)
    assert ddp["all_reduce", "dense"].bytes_per_step == 2 * 4 * everything * 3 / 4
    assert ddp["all_reduce", "dense"].messages == 2 * 3  # one bucket
    fsdp = found(shape, Layout("fsdp"), 4)
    gathered = sum(fsdp["all_gather", what].bytes_per_step for what in ("dense", "expert"))
    scattered = sum(fsdp["reduce_scatter", what].bytes_per_step for what in ("dense", "expert"))
    # Experts travel in 16 bits, everything else in 32
    assert (gathered, scattered) == (2 * (4 * dense + 2 * experts) * 3 / 4, 4 * everything * 3 / 4)
    both = found(shape, Layout("fsdp", 2), 4)  # each pair of GPUs holds every expert once: half of them each
    assert both["all_gather", "dense"].bytes_per_step == 2 * 4 * dense * 3 / 4
    assert both["all_gather", "expert"].bytes_per_step == 2 * 2 * (experts / 2) * 1 / 2
    apart = found(shape, Layout("ddp", 4), 4)  # nobody else has this GPU's expert
    assert ("all_reduce", "expert") not in apart
    pairs = found(shape, Layout("ddp", 2), 4, accumulate=2)  # reduced in both parts: 4 blocks and the rest, 2 layers
    assert [pairs["all_reduce", what].calls for what in ("dense", "expert")] == [2 * 5, 2 * 2]
    assert pairs["all_reduce", "expert"].bytes_per_step == 2 * 2 * 4 * (experts / 2) * 1 / 2
    twice = found(shape, Layout("fsdp"), 4, accumulate=2)
    assert twice["all_gather", "dense"].bytes_per_step == 2 * fsdp["all_gather", "dense"].bytes_per_step


def test_the_slower_of_link_and_network_counts():
    """800 bytes over 16 GPUs of two nodes: 700 over the link at 100 B/s, or half of each GPU's 100 at 5 B/s."""
    slow = Machine("", 1, 1, 1, 1, link_bytes_per_s=100, network_bytes_per_s=5)
    assert ring_seconds(800, 16, 1, slow) == 100 / 2 / 5
    assert ring_seconds(800, 8, 1, slow) == 700 / 100
    assert ring_seconds(800, 2, 8, slow) == 400 / 5  # every eighth GPU: one in each node


# ---- memory


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_states_are_those_of_a_real_optimizer(name):
    net = timm.create_model("test_vit_moe", num_classes=2)
    optimizer, _ = build_optimizer(net, OptimizerConfig(name=name), total_steps=2)
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    kept = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    planned = memory(shape_of(net, 32, optimizer=name), Layout(), Job(1, 8))
    assert planned.optimizer == sum(x.nbytes for x in kept)
    assert planned.weights == sum(p.nbytes for p in net.parameters())
    assert planned.gradients == sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
    assert planned.snapshots == 2 * (planned.weights + planned.optimizer)


def test_states_are_divided_by_hand():
    """1,000 dense and 8,000 expert parameters: 16 bytes each, and what DDP and autocast add."""
    dense, experts = Weights(1000, 1000, 2000), Weights(8000, 8000, 16000)
    net = timm.create_model("test_vit_moe", num_classes=2)
    shape = shape_of(net, 32)
    shape = type(shape)(**{**vars(shape), "dense": dense, "experts": experts})
    job = Job(8, 64)
    assert memory(shape, Layout("ddp"), job).states == 16 * 9000
    assert memory(shape, Layout("ddp", 4), job).states == 16 * (1000 + 2000)
    assert memory(shape, Layout("fsdp"), job).states == memory(shape, Layout("fsdp", 4), job).states == 16 * 9000 / 8
    assert (memory(shape, Layout("ddp"), job).copies, memory(shape, Layout("ddp"), job).buckets) == (18_000, 36_000)
    # 1000/4 dense and 8000/2 expert parameters of a block: two in fp32 or bf16, one gradient in fp32; copies in bf16.
    assert memory(shape, Layout("fsdp"), job).copies == 12 * 250 + 8 * 4000 + 2 * 1000


def test_frozen_weights_have_neither_gradient_nor_moments():
    net = timm.create_model("test_vit_moe", num_classes=2)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net.head.requires_grad_(True)  # 32 · 2 weights and 2 biases
    dense, experts = count_weights(net)
    assert (dense.learning, dense.moments, experts.learning) == (66, 132, 0)


def without_padding(net):
    for layer in moe_layers(net):
        layer.experts.backend, layer.dispatcher = "grouped", LocalDispatcher(row_multiple=1, max_padding=1.0)


@pytest.mark.parametrize(("router", "dtype"), [("vmoe_top_k", torch.bfloat16), ("expert_choice", torch.float32)])
def test_activations_are_what_autograd_keeps(router, dtype):
    """The same model with weights, computing: what 8 more images add, byte for byte."""
    net = timm.create_model("test_vit_moe", router=router).train()
    planned = shape_of(net, 32, dtype=dtype)
    without_padding(net)

    def kept(images):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return saved_bytes(lambda: net(torch.randn(images, 3, 32, 32)), net, net.blocks)

    whole, *of_blocks = ((more - less) / 8 for more, less in zip(kept(16), kept(8), strict=True))
    assert planned.activation_bytes + planned.row_bytes == whole
    rows = {layer.block: planned.row_bytes_of(layer) for layer in planned.moe}
    assert [size + rows.get(block, 0) for block, size in enumerate(planned.block_bytes)] == of_blocks


def test_activations_of_blocks_that_are_computed_again():
    """Blocks 1 and 2 keep their inputs, 16 tokens of 32 fp32 numbers, and all of the larger one, which has experts."""
    net = timm.create_model("test_vit_moe").train()
    checkpoint_blocks(net, [1, 2])
    planned = shape_of(net, 32, dtype=torch.float32)
    assert (planned.recomputed, [layer.block for layer in planned.moe]) == ((1, 2), [1, 3])
    without_padding(net)
    without = saved_bytes(lambda: net(torch.randn(16, 3, 32, 32)), net)[0]
    less = saved_bytes(lambda: net(torch.randn(8, 3, 32, 32)), net)[0]
    activations, rows = planned.kept_bytes()
    at_once = planned.block_bytes[1] + planned.row_bytes_of(planned.moe[0])
    assert planned.block_inputs_bytes == 4 * 16 * 32 * 4
    assert activations + rows - at_once == (without - less) / 8
    whole = shape_of(timm.create_model("test_vit_moe").train(), 32, dtype=torch.float32)
    assert activations == whole.activation_bytes - planned.block_bytes[2] + 2 * 16 * 32 * 4
    # A quarter of the forward pass each: experts of one of two layers, two of four blocks.
    again, once = (plan(shape, Layout(), Job(1, 8), MACHINE).compute_ms for shape in (planned, whole))
    assert 1 < again / once < 4 / 3


@pytest.mark.parametrize("router", ["switch", "expert_choice", "soft"])
def test_flops_and_parameters_are_those_of_info(router):
    net = timm.create_model("test_vit_moe", router=router)
    cost, planned = measure_cost(net, 32), shape_of(net, 32)
    assert planned.dense_flops + planned.expert_flops == cost.flops_per_image + cost.router_flops_per_image
    assert planned.dense.parameters + planned.experts.parameters == cost.total_parameters


# ---- waiting, layouts, what to do


def test_the_busiest_gpu(shape):
    assert rank_imbalance([6, 2, 0, 4], 2) == 8 / 6  # 6 + 2 and 0 + 4
    assert rank_imbalance([6, 2, 0, 4], 4) == 6 / 3
    loads = ((6.0, 2.0, 0.0, 4.0), (1.0, 1.0, 1.0, 1.0))
    assert busiest_over_mean(shape, Job(4, 32, loads=loads), 4) == (2 + 1) / 2
    assert busiest_over_mean(shape, Job(4, 32, loads=loads), 1) == 1
    # CV 0.5, one expert on each of 4 GPUs: 1 + 0.5 · sqrt(2 ln 4)
    assert busiest_over_mean(shape, Job(4, 32, cv=0.5), 4) == pytest.approx(1 + 0.5 * 1.66511)


def test_layouts_divide_gpus_and_experts(shape):
    names = [layout.name for layout in layouts(shape, 6)]  # E 4: only 2 divides both
    assert names == ["DDP", "FSDP2", "EP 2 + DDP", "EP 2 x FSDP2"]
    assert layouts(shape, 1) == [Layout()]


def test_a_batch_that_does_not_fit_is_computed_in_parts(shape):
    job = Job(1, 64)
    whole = memory(shape, Layout(), job)
    room = Machine("", 1, 1, 1, (whole.states + whole.copies) * 1.01 + whole.activations / 2, 1, 1, usable=1.0)
    assert plan(shape, Layout(), job, room).job.accumulate == 4  # rows don't fit beside half of the activations
    none = Machine("", 1, 1, 1, whole.states, 1, 1, usable=1.0)
    assert recommend([plan(shape, Layout(), job, none)]) is None


@pytest.mark.parametrize(("images", "fitting", "parts"), [(1000, 63, 20), (48, 1, 48), (64, 17, 4), (97, 96, 97)])
def test_parts_of_a_batch_have_as_many_images_each(shape, images, fitting, parts):
    """The fewest parts that fit and divide the batch: 1,000 images in parts of at most 63 are 20 of 50."""
    whole = memory(shape, Layout(), Job(1, images))
    each = (whole.activations + whole.rows) / images
    room = Machine("", 1, 1, 1, whole.states + whole.copies + (fitting + 0.5) * each, 1, 1, usable=1.0)
    assert plan(shape, Layout(), Job(1, images), room).job.accumulate == parts


def test_every_gpu_says_what_is_assumed_of_it():
    assert all(sheet_machine(name).assumed.keys() >= {"matmul_flops", "network_bytes_per_s"} for name in GPUS)


def test_what_lies_in_main_memory_is_no_longer_on_the_gpu(shape):
    """The sum on the GPU is that of the same layout without weights, gradients and moments."""
    job = Job(4, 64)
    here, there = memory(shape, Layout("fsdp"), job), memory(shape, Layout("fsdp", offload=True), job)
    assert there.states == here.states > 0
    assert there.total == pytest.approx(here.total - here.states)
