"""Several processes under every layout (DDP, FSDP2, expert parallelism, both) train like one."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from moevision.layers import moe_layers
from moevision.models.config import MoEConfig, build_model
from moevision.train.checkpoint import newest_valid
from moevision.train.parallel.parts import filled, first_index, outline, total_norm
from tests.forks import Forked
from tests.train import layouts
from tests.train.layouts import (
    CASES,
    CLASSES,
    COUNTED,
    DDP,
    EP2,
    EP4,
    FSDP,
    IMAGES,
    REPLICATED,
    build,
)

pytestmark = pytest.mark.deep

COMPARED = [(name, size, layout) for name, case in CASES.items() for size, layout in case.layouts]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes."""
    folder = tmp_path_factory.mktemp("layouts")
    process = Forked([layouts.__file__, str(folder)], folder, dict(os.environ))
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said[-6000:]
    assert "Warning" not in said, said[-6000:]
    return folder


@pytest.mark.parametrize(("name", "size", "layout"), COMPARED)
def test_layouts_train_like_one_process(name, size, layout, compared):
    """16 images a step, float64, clipped: logits, balance loss, every gradient, their norm and the weights.

    AdamW divides by the root of the second moment, so that rounding in a gradient near 0 shows in its weight.
    """
    found = json.loads((compared / f"errors-{size}.json").read_text())[f"{name}, {layout}"]
    if CASES[name].precision == "bf16":
        # One process rounds a gradient of bfloat16 (8 bits) once, several once each before they are summed.
        assert found["gradients"] < 2**-7
        assert found["logits"] < 2**-7
        assert found["norm"] < 2**-7
        plain = f"bf16, {layout}"  # weights of experts that were rounded before they were gathered are the same
        if CASES[name].gathered and plain in (
            others := json.loads((compared / f"errors-{size}.json").read_text())
        ):
            assert found["logits"] == others[plain]["logits"]
        return
    assert found["logits"] < 1e-10
    assert found["aux"] < 1e-10
    assert found["gradients"] < 1e-10
    assert found["norm"] < 1e-10
    assert found["weights"] < 1e-8


def planned_traffic(net: nn.Module, processes: int, layout: int) -> dict[str, list[float]]:
    """Bytes, collectives and messages of one process in a step, by kind: docs/reference/memory-and-traffic.md.

    Weights are gathered in 32 bits (those of experts in 16) and gradients reduced in 32; everything outside of blocks
    is a unit of its own.
    """
    n, blocks, moe = max(layout % REPLICATED, 1), list(net.blocks), moe_layers(net)
    expert_parameters = sum(p.numel() for layer in moe for p in layer.experts.parameters())
    other_parameters = sum(p.numel() for p in net.parameters()) - expert_parameters
    rows, units = IMAGES // processes * len(net.pos_embed[0]), len(blocks) + 1
    planned: dict[str, list[float]] = {}

    def add(kind: str, tensor_bytes: float, calls: int, group: int, times: int = 1) -> None:
        if group == 1:
            return
        before = planned.get(kind, [0, 0, 0])
        more = (times * tensor_bytes * (group - 1) / group, calls, times * calls * (group - 1))
        planned[kind] = [sum(pair) for pair in zip(before, more, strict=True)]

    if layout == DDP:
        add(
            "all_reduce", 4 * (other_parameters + expert_parameters), 1, processes, times=2
        )  # in one bucket
    elif layout > REPLICATED:
        add("all_reduce", 4 * other_parameters, units, processes, times=2)
        add("all_reduce", 4 * expert_parameters / n, len(moe), processes // n, times=2)
    else:
        add("all_gather", 2 * 4 * other_parameters, 2 * units, processes)
        add("all_gather", 2 * 2 * expert_parameters / n, 2 * len(moe), processes // n)
        add("reduce_scatter", 4 * other_parameters, units, processes)
        add("reduce_scatter", 4 * expert_parameters / n, len(moe), processes // n)
    if n > 1:
        # Rows to the experts and back, forward and backward, in 16 bits; and once the numbers of rows.
        add("all_to_all", 4 * len(moe) * rows * net.embed_dim * 2, 5 * len(moe), n)
    return planned


@pytest.mark.parametrize(("size", "layout"), CASES[COUNTED].layouts)
def test_a_step_sends_what_is_planned(size, layout, compared):
    """Counted in the collectives of one process: bytes, to the last one, collectives and messages.

    The plan has no padding, and no collective of a few numbers. Of those a step here has two or three: the counts of
    the router's bias, the test's own maximum of errors, and the norm where gradients are in parts.
    """
    sent = json.loads((compared / f"sent-{size}.json").read_text())[str(layout)]
    planned = planned_traffic(build(CASES[COUNTED]), size, layout)
    if layout in (FSDP, EP2, EP4):
        # The bias of the head has 5 numbers in fp32: one more makes 6 for 2 processes, three more make 8 for 4.
        padding = 4 * (-CLASSES % size) * (size - 1) / size
        planned["all_gather"][0] += 2 * padding
        planned["reduce_scatter"][0] += padding
    small = 2 if layout == DDP else 3
    assert sent.pop("small")[1:] == [small, small * 2 * (size - 1)]
    assert sent == planned


def test_a_checkpoint_goes_from_4_processes_to_2_to_1_to_4(compared):
    """Weights and both moments, by SHA-256; EP2 x FSDP2, EP2, none, EP2 + DDP, EP4.

    And the weights that each of them exports as a plain model.
    """
    states, exports = zip(*json.loads((compared / "digests.json").read_text()), strict=True)
    assert len(states) == 5
    assert len(set(states)) == len(set(exports)) == 1
    assert newest_valid(compared / "checkpoints")[1] == []


def test_norm_without_processes():
    """3, 4 and 12: a 2-norm of 13."""
    assert float(total_norm([torch.tensor([3.0, 4.0]), torch.tensor([12.0])])) == 13


def test_an_outline_takes_no_memory_and_is_filled_again():
    net = build_model(MoEConfig("test_vit_moe"), 4, 32).eval()
    empty = outline(net)
    assert all(parameter.is_meta for parameter in empty.parameters())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(filled(empty, net.state_dict())(x), net(x))


def test_the_part_of_the_second_process_begins_where_that_of_the_first_ends():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        part = torch.zeros(2, 3)
        divided = DTensor.from_local(part, init_device_mesh("cpu", (2,)), [Shard(0)])
        assert (first_index(divided), first_index(part)) == ((2, 0), (0, 0))
    finally:
        dist.destroy_process_group()
