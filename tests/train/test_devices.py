"""What a device computes is what a CPU computes: layers, sharding on one device, and the command line.

Every test runs on the CPU, so that it is known to work, and where there is CUDA on that (`pytest -m gpu`).
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.data import ImageDataModule
from moevision.files import read_csv
from moevision.layers import ROUTERS, forward_routing
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import load_model
from moevision.train.checkpoint import SafeCheckpointIO
from moevision.train.health import WeightEMA
from moevision.train.optim import OptimizerConfig, build_optimizer
from moevision.train.parallel import Layout, parts, shard
from moevision.train.parallel.parts import (
    clip,
    divide,
    gathered,
    is_sharded,
    like_these,
    to_full_tensor,
    total_norm,
)
from moevision.train.processes import callback_of
from tests.shared import free_port
from tests.train.guarded import Averaged, Run, batches, whole_tensors
from tests.train.test_parallel import kinds

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here"),
    ],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def build(router: str, **options: Any) -> nn.Module:
    """A float64 network without dropout or noise; its router is far from ties."""
    torch.manual_seed(0)
    if router in ("noisy_top_k", "vmoe_top_k", "cosine", "expert_choice"):
        options["noise"] = "none"
    net = build_model(MoEConfig("test_vit_moe", router=router, num_experts=4, **options), 5, 32)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".router." in name and router != "cosine":
                parameter.mul_(20)
    return net.double().train()


def step(net: nn.Module, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one batch, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 32, 32, generator=generator, dtype=torch.float64).to(device)
    labels = torch.randint(5, (6,), generator=generator).to(device)
    logits, _ = forward_routing(net, images)
    F.cross_entropy(logits, labels).backward()
    gradients = {
        name: to_full_tensor(p.grad).cpu()
        for name, p in net.named_parameters()
        if p.grad is not None
    }
    return logits.detach().cpu(), gradients


def differs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest number."""
    assert found.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    return (
        max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) / scale
    )


@DEVICES
@pytest.mark.parametrize("router", sorted({*ROUTERS} - {"random"}))
def test_a_network_computes_as_on_the_cpu(router, device):
    """With the backend that the device gets, beside a loop over experts; logits and every gradient."""
    plain = build(router, backend="loop")
    moved = build(router).to(device)
    logits, gradients = step(moved, device)
    expected, of_loop = step(plain, "cpu")
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert differs(gradients, of_loop) < 1e-9


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[str]:
    """A process group of this process alone."""
    device: str = request.param
    dist.init_process_group(
        BACKENDS[device], init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    yield device
    dist.destroy_process_group()


@pytest.mark.deep
@pytest.mark.parametrize("group", ["cpu", CUDA], indirect=True)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("replicated", "offload"), [(False, False), (True, False), (False, True)])
def test_a_sharded_network_trains_as_a_plain_one(group, optimizer, replicated, offload):
    """Three clipped steps, FSDP2 on one device: its hooks, DTensors, fused AdamW and gathered matrices of Muon."""
    plain = build("switch", num_shared_experts=1)
    sharded = copy.deepcopy(plain).to(group)
    shard(sharded, Layout.of(group, replicated=replicated), offload=offload)
    assert is_sharded(sharded)
    assert {p.device.type for p in sharded.parameters()} == {"cpu" if offload else group}
    for net, device in ((plain, "cpu"), (sharded, group)):
        updates, _ = build_optimizer(
            net,
            OptimizerConfig(optimizer, lr=1e-2),
            total_steps=9,
            fused=True,
            optimizer_classes=kinds(net),
        )
        for _ in range(3):
            updates.zero_grad()
            step(net, device)
            learning = [parameter for parameter in net.parameters() if parameter.grad is not None]
            clip(learning, 0.5, total_norm([parameter.grad for parameter in learning]))
            updates.step()
    found = {name: to_full_tensor(tensor).cpu() for name, tensor in sharded.state_dict().items()}
    assert differs(found, plain.state_dict()) < 1e-8


@pytest.mark.deep
@pytest.mark.parametrize("group", ["cpu", CUDA], indirect=True)
def test_experts_that_are_gathered_in_bf16_give_the_same_logits(group):
    """Autocast rounds them in any case, before they travel or after; gradients are rounded once more or not."""
    plain = build("switch").float().to(group)
    sharded = copy.deepcopy(plain)
    shard(sharded, Layout.of(group), torch.bfloat16)
    found = []
    for net in (plain, sharded):
        with torch.autocast(group, torch.bfloat16):
            logits = net(torch.ones(4, 3, 32, 32, device=group).cumsum(-1) / 32)
        logits.float().square().mean().backward()
        gradients = {
            name: to_full_tensor(p.grad).cpu()
            for name, p in net.named_parameters()
            if p.grad is not None
        }
        found.append((logits, gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert differs(found[1][1], found[0][1]) < 2**-7


@pytest.mark.deep
@pytest.mark.parametrize("group", ["cpu", CUDA], indirect=True)
def test_a_checkpoint_of_parts_comes_back(group, tmp_path):
    """Weights and moments, from a file into another network on the device."""
    files, states = SafeCheckpointIO(), []
    for number in range(2):
        net = build("switch").to(group)
        shard(net, Layout.of(group))
        updates, _ = build_optimizer(
            net, OptimizerConfig(lr=1e-2), total_steps=9, fused=True, optimizer_classes=kinds(net)
        )
        learning = [parameter for each in updates.param_groups for parameter in each["params"]]
        if number == 0:
            step(net, group)
            updates.step()
            named = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
            whole = {
                "state_dict": named,
                "optimizer_states": [updates.state_dict()],
                "global_step": 1,
            }
            files.save_checkpoint(gathered(whole), tmp_path / "one.ckpt")
        else:
            like = like_these(
                {f"net.{name}": parameter for name, parameter in net.named_parameters()}, learning
            )
            read = divide(files.load_checkpoint(tmp_path / "one.ckpt"), like)
            net.load_state_dict(
                {name.removeprefix("net."): tensor for name, tensor in read["state_dict"].items()}
            )
            updates.load_state_dict(read["optimizer_states"][0])
        moments = [
            to_full_tensor(updates.state[parameter][name])
            for parameter in learning
            for name in ("exp_avg", "exp_avg_sq")
        ]
        states.append([*(to_full_tensor(tensor) for tensor in net.state_dict().values()), *moments])
    assert len(states[0]) == len(states[1])
    assert all(
        a.device.type == b.device.type == group and torch.equal(a, b)
        for a, b in zip(*states, strict=True)
    )


class Kept(L.Callback):
    """Weights and their average after every batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        average = callback_of(trainer, WeightEMA)
        of_average = {
            f"average {name}": tensor for name, tensor in whole_tensors(average.network).items()
        }
        self.states.append(whole_tensors(pl_module.net) | of_average)


@pytest.mark.deep
@DEVICES
@pytest.mark.parametrize("expert", [None, 1])
def test_an_update_that_is_not_finite_changes_nothing(device, expert, tmp_path):
    """The third of four; weights, statistics and average, with FSDP2 (1) and without."""
    kept, averaged = Kept(), Averaged()
    try:
        callbacks = (kept, averaged)
        run = Run(
            tmp_path,
            batches(4),
            faults="nan_loss@3",
            callbacks=callbacks,
            expert=expert,
            accelerator=device,
            devices=1,
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert (run.record.skipped, run.record.rollbacks) == (1, 0)
    second, third, fourth = kept.states[1:]
    assert all(torch.equal(third[name], tensor) for name, tensor in second.items())
    assert not all(torch.equal(fourth[name], tensor) for name, tensor in third.items())
    assert averaged.difference < 1e-6


@DEVICES
def test_fit_trains_there_and_its_model_answers_here(device, cli, tiny, own_folder):
    """In fp32: a CPU gives the test images the classes that were written at the end of the training."""
    options = (
        "--data.train_size=32",
        "--data.val_size=8",
        "--data.test_size=8",
        f"--trainer.accelerator={device}",
    )
    assert cli("fit", "synthetic_pets", *tiny, *options, "--name=there").code == 0
    summary = json.loads(Path("runs/there/summary.json").read_text())
    assert summary["steps"] == 8
    assert (
        (summary["gpu_peak_bytes"] is None)
        if device == "cpu"
        else (summary["gpu_peak_bytes"] > 2**20)
    )
    said = [row["prediction"] for row in read_csv(Path("runs/there/predictions_test.csv"))]
    data = ImageDataModule("synthetic_pets", image_size=32, train_size=32, val_size=8, test_size=8)
    data.setup("test")
    model, batch = load_model("runs/there"), next(iter(data.test_dataloader()))
    with torch.inference_mode():
        assert [model.class_names[index] for index in model.net(batch["image"]).argmax(-1)] == said


@pytest.mark.deep
@pytest.mark.parametrize("group", ["cpu", CUDA], indirect=True)
def test_muon_gathers_no_experts(group, monkeypatch):
    """Experts [E, out, in] that are divided along E are whole matrices already."""
    gathered_dims: list[int] = []
    monkeypatch.setattr(
        parts, "to_full_tensor", lambda x: gathered_dims.append(x.ndim) or to_full_tensor(x)
    )
    net = build("switch").to(group)
    shard(net, Layout.of(group))
    updates, _ = build_optimizer(
        net, OptimizerConfig("muon"), total_steps=9, optimizer_classes=kinds(net)
    )
    step(net, group)
    updates.step()
    assert set(gathered_dims) == {2, 4}, "matrices and the first convolution"
