"""What `fit` says and refuses of memory before it starts: weights, gradients and moments against the device."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from moevision.errors import UserError
from moevision.models.config import MoEConfig
from moevision.train import recipe as memory
from moevision.train.health import EmaConfig, WeightEMA
from moevision.train.optim import OptimizerConfig, build_optimizer
from moevision.train.parallel import MoEParallelStrategy
from moevision.train.task import ClassificationTask


def task_of(**arch: Any) -> ClassificationTask:
    return ClassificationTask(MoEConfig(name="test_vit_moe", **arch), num_classes=2, image_size=32)


def trainer_of(**options: Any) -> L.Trainer:
    return L.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_states_are_those_of_a_real_optimizer(name):
    task = ClassificationTask(
        MoEConfig(name="test_vit_moe"),
        num_classes=2,
        image_size=32,
        optim=OptimizerConfig(name=name),
    )
    optimizer, _ = build_optimizer(task.net, task.optim, total_steps=2)
    task.net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moments = sum(
        x.nbytes for state in optimizer.state.values() for key, x in state.items() if key != "step"
    )
    weights = sum(p.nbytes for p in task.net.parameters())
    gradients = sum(p.grad.nbytes for p in task.net.parameters() if p.grad is not None)
    assert sum(memory.state_bytes(task, trainer_of())) == weights + gradients + moments
    averaged = trainer_of(callbacks=[WeightEMA(EmaConfig(decay=0.9))])
    assert sum(memory.state_bytes(task, averaged)) == 2 * weights + gradients + moments


def test_frozen_weights_have_neither_gradient_nor_moments():
    task = task_of()
    for parameter in task.net.parameters():
        parameter.requires_grad_(False)
    task.net.head.requires_grad_(
        True
    )  # 32 · 2 weights and 2 biases, each with a gradient and two moments
    weights = sum(p.nbytes for p in task.net.parameters())
    assert sum(memory.state_bytes(task, trainer_of())) == weights + 3 * 4 * 66


def test_the_line_of_the_plan(monkeypatch):
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: 8_000_000_000)
    task, trainer = task_of(), trainer_of(devices=2, strategy="ddp")  # each has half of the memory
    size = 16 * sum(p.numel() for p in task.net.parameters()) / 1e9
    said = f"memory: weights, gradients and moments {size:.2f} of 4.0 GB, without activations"
    assert memory.describe_memory(task, trainer) == said
    assert memory.describe_memory(task, trainer_of(precision="64-true")) is None
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: None)
    assert memory.describe_memory(task, trainer) is None


def test_fit_refuses_what_its_states_alone_exceed(monkeypatch):
    task, trainer = task_of(), trainer_of()
    needs = 16 * sum(p.numel() for p in task.net.parameters())
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: needs)
    memory.check_memory(task, trainer)
    with pytest.raises(UserError, match="--force"):  # each has half of the memory
        memory.check_memory(task, trainer_of(devices=2, strategy="ddp"))
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: needs - 1)
    with pytest.raises(UserError, match=r"--model.arch.num_experts.* smaller model; --force"):
        memory.check_memory(task, trainer)
    with pytest.raises(UserError, match="more memory; --force"):
        memory.check_memory(task, trainer, goes_on=True)


def test_a_gpu_gets_shards_as_a_way_on(monkeypatch):
    """A card of a third of what is needed: three processes under FSDP2; with a fifth, two of them offload."""
    task = task_of(num_experts=2)
    needs = 16 * sum(p.numel() for p in task.net.parameters())
    monkeypatch.setattr(memory, "device_name", lambda trainer: "Card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, capacity))
    capacity = -(-needs // 3)
    alone = trainer_of()
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"--parallel fsdp on 3 GPUs .*--force"):
        memory.check_memory(task, alone)
    capacity = -(-needs // 5)
    monkeypatch.setattr(MoEParallelStrategy, "root_device", torch.device("cuda", 0))
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    sharded = trainer_of(devices=2, strategy=MoEParallelStrategy())
    with pytest.raises(UserError, match=r"5 GPUs .*--parallel.offload true.*--force"):
        memory.check_memory(task, sharded)
    monkeypatch.setattr(
        memory, "memory_limit_bytes", lambda: needs
    )  # half of it holds a half of everything
    memory.check_memory(task, trainer_of(devices=2, strategy=MoEParallelStrategy(offload=True)))


def test_what_a_process_keeps(monkeypatch):
    """1,000 bytes of all but the experts and 8,000 of the experts, in four processes."""
    monkeypatch.setattr(L.Trainer, "world_size", 4)
    kept = {
        "ddp": (1000, 8000),
        MoEParallelStrategy(2, replicated=True): (1000, 4000),
        MoEParallelStrategy(): (250, 2000),
        MoEParallelStrategy(4): (250, 2000),
    }
    for strategy, expected in kept.items():
        assert (
            memory._bytes_of_process((1000, 8000), trainer_of(devices=4, strategy=strategy))
            == expected
        )
