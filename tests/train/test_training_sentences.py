"""A row: a mistake in a training, and what its sentence must name: option or file, the value, the way on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moevision.config import EarlyStoppingConfig, GuardConfig, MoEConfig, OptimizerConfig
from moevision.errors import UserError
from moevision.layers import Backend, moe_layers
from moevision.models.config import build_model
from moevision.train.checkpoint import check_checkpoint, load_trained
from moevision.train.guard import StabilityGuard
from moevision.train.optim import freeze_parameters, parameter_groups
from moevision.train.parallel import check_divides, check_network
from moevision.train.report import read_summary
from tests.shared import missing
from tests.train.guarded import Run, batches, tiny_task

DENSE = "active_flops"


def network(twin: Any = None, backend: Backend | None = None) -> torch.nn.Module:
    """A model with 8 experts in blocks 1 and 3 of 4, or its dense twin."""
    net = build_model(MoEConfig("test_vit_moe", num_experts=8, twin=twin), 4, 32)
    for layer in moe_layers(net):
        layer.experts.backend = backend or layer.experts.backend
    return net


def frozen(freeze: Any, twin: str | None = None) -> None:
    config = OptimizerConfig(freeze=freeze)
    parameter_groups(freeze_parameters(network(twin), config.freeze), config)


def begun_with_nan(folder: Path) -> None:
    task = tiny_task()
    head: Any = task.net.head
    torch.nn.init.constant_(head.weight, float("nan"))
    Run(folder, batches(2), task=task)


ROWS: list[tuple[Callable[[Path], Any], tuple[str, ...]]] = [
    # Options of a training
    (lambda _: EarlyStoppingConfig(patience=0), ("patience is 0", "at least 1")),
    (
        lambda _: StabilityGuard(GuardConfig(snapshot_every=0)),
        ("--guard.snapshot_every is 0", "at least 1"),
    ),
    (
        lambda _: StabilityGuard(GuardConfig(spike_warmup=1)),
        ("--guard.spike_warmup is 1", "at least 2"),
    ),
    (lambda _: frozen(5), ("freeze=5", "4 blocks", "to 4")),
    (lambda _: frozen(-1), ("freeze=-1", "4 blocks", "0 (the embedding")),
    (lambda _: frozen("most"), ("freeze='most'", "all_but_experts or all_but_head")),
    (lambda _: frozen("all_but_experts", DENSE), ("freeze=all_but_experts", "with experts")),
    # A training that can't begin
    (begun_with_nan, ("not finite", "weight of head.weight")),
    # Parallel layouts
    (lambda _: check_divides(3, 4), ("--parallel.expert is 3", "4 processes", "divisor of 4")),
    (
        lambda _: check_network(network(), 3),
        ("--parallel.expert is 3", "8 experts", "block 1", "divisor of 8"),
    ),
    (
        lambda _: check_network(network(backend="dense"), 2),
        ("dense backend", "--parallel.expert or --model.arch.backend"),
    ),
    (lambda _: check_network(network(DENSE), 2), ("--parallel.expert", "leave it out")),
    # Files
    (lambda folder: read_summary(folder / "no.json"), ("no.json", "summary of", "run folder")),
    (lambda folder: check_checkpoint(str(folder / "no.ckpt")), ("no.ckpt", "checkpoints/")),
    (lambda folder: load_trained(str(folder / "no.ckpt")), ("no.ckpt", "checkpoints/")),
]


@pytest.mark.parametrize(("mistake", "names"), ROWS)
def test_a_mistake_is_named(mistake, names, tmp_path):
    with pytest.raises(UserError) as error:
        mistake(tmp_path)
    assert not missing(str(error.value), *names), str(error.value)


def test_the_same_without_the_mistake():
    StabilityGuard(GuardConfig(spike_warmup=2))
    check_divides(2, 4)
    for net in (network(), network(backend="dense"), network(DENSE)):
        check_network(net, 1)
