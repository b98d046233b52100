"""Several processes under every layout (DDP, FSDP2, expert parallelism, both) train like one.

`python test_parallel.py FOLDER` trains each case of `CASES` in this process and then, in groups of 4 and of 2 forks,
under its layouts, and writes `FOLDER/errors-W.json`: for each case and layout the largest differences from the one
process, over all steps and processes, relative to the largest number of their kind. `FOLDER/sent-W.json` has the
bytes, collectives and messages of a process in a step of the case "counted", by layout and kind of collective.

`FOLDER/digests.json` has hashes of a checkpoint that goes from 4 processes to 2, 1 and 4, of its weights and moments
and of a plain export, from each.
"""

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from moevision.files import file_sha256
from moevision.layers import ColourRouter, forward_routing, moe_layers, update_router_bias
from moevision.losses import AuxLossWeights, Balance
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import describe, save_model
from moevision.models.vit_moe import checkpoint_blocks
from moevision.train.checkpoint import SafeCheckpointIO, newest_valid
from moevision.train.optim import OptimizerConfig, OptimizerName, build_optimizer
from moevision.train.parallel import Layout, same_everywhere, shard
from moevision.train.parallel.parts import (
    SHARDED,
    clip,
    divide,
    filled,
    first_index,
    gathered,
    is_sharded,
    like_these,
    local_shard,
    outline,
    shard_like,
    to_full_tensor,
    total_norm,
)
from tests.forks import run_script
from tests.shared import free_port

pytestmark = pytest.mark.deep

IMAGES, CLASSES, CLIP = 16, 5, 0.5
DDP, FSDP, EP2, EP4, REPLICATED = 0, 1, 2, 4, 8
"""Layouts: torch's DDP, or `Layout.of` with so many processes per set of experts; REPLICATED: only they are divided."""
EVERY = (
    *((2, layout) for layout in (DDP, FSDP, EP2, EP2 + REPLICATED)),
    *((4, layout) for layout in (DDP, FSDP, EP2, EP4, EP2 + REPLICATED, EP4 + REPLICATED)),
)
"""Processes and layout; (4, EP2) is EP x FSDP: 2 processes hold the same experts and shard them."""
ONE, FOUR = ((2, EP2),), ((2, FSDP), (4, EP2))
COUNTED = "counted"


@dataclass(frozen=True)
class Case:
    """What is trained, and under which layouts."""

    arch: dict[str, Any]
    layouts: tuple[tuple[int, int], ...] = ONE
    losses: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    micro_batches: int = 1
    optimizer: OptimizerName = "adamw"
    precision: str = "64"
    gathered: bool = False  # in bf16
    forced: tuple[int, ...] = ()  # experts that every token is sent to
    shares: tuple[int, ...] = ()  # images of each process; equally many if empty
    checkpointing: bool | list[int] = False
    offload: bool = False


BALANCE = {"load_balancing": 0.05, "z": 0.01}
CASES = {
    "every layout": Case({"router": "switch", "num_shared_experts": 1}, EVERY, BALANCE, steps=4),
    "noisy_top_k": Case({"router": "noisy_top_k"}, losses={"importance": 0.1, "load": 0.0}),
    "vmoe_top_k": Case({"router": "vmoe_top_k"}, losses={"importance": 0.1, "load": 0.0}),
    "bias_balanced": Case({"router": "bias_balanced", "bias_rate": 0.01}, FOUR),
    "sigmoid": Case({"router": "sigmoid"}),
    "cosine": Case({"router": "cosine"}),
    "expert choice": Case({"router": "expert_choice"}, FOUR, losses={"z": 0.01}),
    "soft": Case({"router": "soft"}, FOUR),
    "hash": Case({"router": "hash"}),
    "colour": Case({"router": "colour"}),
    "by image": Case({"router": "switch", "route_by": "image"}, FOUR, BALANCE),
    # Half of the choices are dropped. A capacity of the batch is of each process's own images: it isn't equal.
    "capacity by image": Case(
        {"router": "switch", "capacity_factor": 0.5, "capacity_group": "image"},
        ((2, DDP), *FOUR),
        BALANCE,
    ),
    "accumulation": Case(
        {"router": "switch"}, ((2, FSDP), (4, EP2), (4, EP2 + REPLICATED)), BALANCE, micro_batches=2
    ),
    "recomputed": Case(
        {"router": "switch", "num_shared_experts": 1}, ONE, BALANCE, checkpointing=True
    ),
    "one block recomputed": Case(
        {"router": "switch", "num_shared_experts": 1}, ONE, BALANCE, checkpointing=[1]
    ),
    "fewer experts than processes": Case(
        {"router": "switch", "num_experts": 2}, ((4, FSDP), (4, EP2)), BALANCE
    ),
    "all rows on one process": Case({"router": "vmoe_top_k"}, ((2, EP2), (4, EP4)), forced=(0, 1)),
    "other numbers of images": Case(
        {"router": "switch"}, ((2, EP2), (2, FSDP)), BALANCE, shares=(13, 3)
    ),
    "muon": Case(
        {"router": "switch"},
        ((2, FSDP), (4, EP2), (2, EP2 + REPLICATED)),
        BALANCE,
        steps=3,
        optimizer="muon",
    ),
    "muon, fewer experts than processes": Case(  # so that experts are cut within their matrices
        {"router": "switch", "num_experts": 2},
        ((4, FSDP), (4, EP2)),
        BALANCE,
        steps=3,
        optimizer="muon",
    ),
    "in main memory": Case({"router": "switch"}, FOUR, BALANCE, optimizer="muon", offload=True),
    "bf16": Case(
        {"router": "vmoe_top_k"}, ((2, DDP), (2, FSDP), (4, EP2)), steps=1, precision="bf16"
    ),
    "bf16, gathered": Case(
        {"router": "vmoe_top_k"},
        ((2, FSDP), (4, EP2), (2, EP2 + REPLICATED)),
        steps=1,
        precision="bf16",
        gathered=True,
    ),
    # Goes by the place of a patch, so that all experts have as many rows.
    COUNTED: Case(
        {"router": "position", "top_k": 1},
        ((2, DDP), (2, FSDP), (4, FSDP), (4, EP2), (4, EP4), (4, EP2 + REPLICATED)),
        steps=1,
        precision="bf16",
        gathered=True,
    ),
}


class Sent(TorchDispatchMode):
    """Counts in `found` what this process sends while it is entered, as a ring does it.

    Bytes, collectives and messages by kind; those of a few numbers (norms, loads, losses) are "small".
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match func.__name__.split(".")[0], func.namespace:
            case "_allgather_base_", "c10d":  # whole, own part, group
                self._ring("all_gather", args[0].nbytes, args[2])
            case "_reduce_scatter_base_", "c10d":  # own part, whole, group
                self._ring("reduce_scatter", args[1].nbytes, args[2])
            case "allreduce_", "c10d":
                self._ring("all_reduce", sum(x.nbytes for x in args[0]), args[1], times=2)
            case "alltoall_base_", "c10d":  # numbers of rows, which are not counted as bytes
                self._count("all_to_all", 0, dist.ProcessGroup.unbox(args[2]).size() - 1)
            case "all_to_all_single", "_c10d_functional":  # rows, numbers received and sent, group
                rows, _, numbers, name = args
                own = dist.get_rank(dist.distributed_c10d._resolve_process_group(name))
                leaving = sum(numbers) - numbers[own]
                messages = sum(
                    number > 0 for process, number in enumerate(numbers) if process != own
                )
                self._count("all_to_all", leaving * rows[:1].nbytes, messages)
        return func(*args, **(kwargs or {}))

    def _ring(self, kind: str, size: int, group: Any, times: int = 1) -> None:
        processes = dist.ProcessGroup.unbox(group).size()
        kind = kind if size > 500 else "small"
        self._count(kind, times * size * (processes - 1) / processes, times * (processes - 1))

    def _count(self, kind: str, size: float, messages: int) -> None:
        before = self.found.get(kind, [0.0, 0, 0])
        self.found[kind] = [
            sum_ + each for sum_, each in zip(before, (size, 1, messages), strict=True)
        ]


class Step(NamedTuple):
    """What one optimizer step had; gradients and weights of the first and the last step only."""

    logits: Tensor
    aux: Tensor
    norm: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]  # at the beginning of the step


def build(case: Case) -> nn.Module:
    """A network whose routers, far from zero, send different numbers of tokens to different experts."""
    torch.manual_seed(0)
    noisy = ("noisy_top_k", "vmoe_top_k", "cosine", "expert_choice")
    noise: dict[str, Any] = {"noise": "none"} if case.arch["router"] in noisy else {}
    arch = {"num_experts": 8, **noise, **case.arch}
    net = build_model(MoEConfig("test_vit_moe", stem="patch", **arch), CLASSES, 32)
    net = net.to(torch.float64 if case.precision == "64" else torch.float32).train()
    checkpoint_blocks(net, case.checkpointing)
    with torch.no_grad():
        for layer in moe_layers(net):
            if isinstance(
                layer.router, ColourRouter
            ):  # which would take the first process's images
                layer.router.centroids.normal_(std=0.1)
                layer.router.fitted.fill_(True)
            for name, parameter in layer.router.named_parameters():
                if (
                    name != "scale" and case.arch["router"] != "cosine"
                ):  # whose scores don't grow with weights
                    parameter.mul_(20)
            if case.forced:
                layer.intervention = lambda routing: replace(
                    routing, expert_index=torch.tensor(case.forced).expand_as(routing.expert_index)
                )
    return net


def kinds(net: nn.Module) -> Any:
    """The optimizers for a network, sharded or not."""
    return SHARDED.optimizers if is_sharded(net) else None


def train(
    case: Case,
    net: nn.Module,
    forward: Callable[[Tensor], Any],
    mine: Callable[[Tensor], Tensor],
    record: Callable[[Step], None],
    *,
    mean: bool,
) -> None:
    """Train and hand every step to `record`, before the update, with gradients that aren't clipped yet.

    `forward` computes logits and routings, `mine` takes this process's rows of a micro-batch; `mean`: gradients are the
    mean over processes (DDP), else their sum, for which the loss is divided.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    generator = torch.Generator().manual_seed(1)
    dtype = next(net.parameters()).dtype
    balance = Balance(net, AuxLossWeights(**case.losses))
    optimizer, _ = build_optimizer(
        net,
        OptimizerConfig(case.optimizer, lr=1e-2),
        total_steps=10**6,
        fused=True,
        optimizer_classes=kinds(net),
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-2  # of the schedule's first step otherwise, which is small
    for number in range(case.steps):
        images = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
        balance.start_window()
        optimizer.zero_grad()
        logits, counts = [], []
        for x, y in zip(
            images.chunk(case.micro_batches), labels.chunk(case.micro_batches), strict=True
        ):
            with (
                torch.autocast("cpu", torch.bfloat16) if case.precision == "bf16" else nullcontext()
            ):
                out, routings = forward(mine(x))
            aux = balance.loss(routings)
            # The mean over all images of the micro-batch is the mean over processes of this.
            loss = F.cross_entropy(out.to(dtype), mine(y), reduction="sum") * processes / len(y)
            loss = (loss + aux) / case.micro_batches
            (loss if mean else loss / processes).backward()
            logits.append(out.detach())
            counts.append(torch.stack([routing.requested_counts() for routing in routings]))
        learning = [(name, p) for name, p in net.named_parameters() if p.grad is not None]
        parameters = [parameter for _, parameter in learning]
        norm = total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        gradients, weights = {}, {}
        if number in (0, case.steps - 1):
            gradients = {name: cast(Tensor, parameter.grad) for name, parameter in learning}
            weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
        record(Step(torch.cat(logits), aux.detach(), norm, gradients, weights))
        clip(parameters, CLIP, norm)
        optimizer.step()
        total = torch.stack(counts).sum(0)
        if processes > 1:
            dist.all_reduce(total)
        update_router_bias(net, list(total))


def alone(case: Case) -> list[Step]:
    """The steps of one process."""
    steps: list[Step] = []
    net = build(case)
    train(
        case,
        net,
        lambda x: forward_routing(net, x),
        lambda x: x,
        lambda s: steps.append(deepcopy(s)),
        mean=True,
    )
    return steps


def compare(
    case: Case, layout: int, known: list[Step], layouts: dict[int, Layout]
) -> dict[str, float]:
    """Train under a layout; the largest relative differences from the steps of one process, of each kind."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    net = build(case)
    if rank:  # the first process's weights count
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
    same_everywhere(net, torch.device("cpu"))
    plain = outline(net) if case.layouts is EVERY else net
    if layout == DDP:
        wrapped = DistributedDataParallel(_Both(net))
        forward: Callable[[Tensor], Any] = wrapped
    else:
        shard(net, layouts[layout], torch.bfloat16 if case.gathered else None, offload=case.offload)
        expected = torch.bfloat16 if case.gathered else next(net.parameters()).dtype
        for layer in moe_layers(net):
            layer.experts.register_forward_pre_hook(
                lambda experts, _: _check_dtype(experts, expected)
            )
        if not layouts[layout].replicated:
            even = [p for p in net.parameters() if any(size % processes == 0 for size in p.shape)]
            held = sum(local_shard(parameter).numel() for parameter in even)
            assert held == sum(parameter.numel() for parameter in even) / processes, (
                "some hold more than others"
            )

        def forward(x: Tensor) -> Any:
            return forward_routing(net, x)

    def mine(x: Tensor) -> Tensor:
        return x.split(list(case.shares))[rank] if case.shares else x.chunk(processes)[rank]

    worst: dict[str, float] = {}

    def differ(kind: str, found: Tensor, expected: Tensor, scale: float | None = None) -> None:
        expected = expected.double()  # a buffer may be of truth values
        scale = max(float(expected.abs().max()), 1e-30) if scale is None else scale
        difference = local_shard(found).double() - local_shard(
            shard_like(expected, found)
        )  # of this process's part
        if difference.numel():
            worst[kind] = max(worst.get(kind, 0.0), float(difference.abs().max()) / scale)

    steps = iter(known)

    def record(step: Step) -> None:
        expected = next(steps)
        own = torch.cat([mine(part) for part in expected.logits.chunk(case.micro_batches)])
        differ("logits", step.logits, own)
        differ("aux", step.aux, expected.aux)
        differ("norm", step.norm, expected.norm)
        scale = max(
            (float(gradient.abs().max()) for gradient in expected.gradients.values()), default=0.0
        )
        assert step.gradients.keys() == expected.gradients.keys()
        for name, gradient in step.gradients.items():
            differ("gradients", gradient, expected.gradients[name], scale)
        for name, weight in step.weights.items():
            differ("weights", weight, expected.weights[name])

    train(case, net, forward, mine, record, mean=layout == DDP)
    if case.layouts is EVERY:
        _check_boundary(net, plain)
    errors = torch.tensor([worst[kind] for kind in sorted(worst)], dtype=torch.float64)
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    return dict(zip(sorted(worst), errors.tolist(), strict=True))


def _check_dtype(experts: nn.Module, expected: torch.dtype) -> None:
    assert {weight.dtype for weight in experts.parameters()} == {expected}, (
        "gathered in another dtype"
    )


def _check_boundary(net: nn.Module, plain: nn.Module) -> None:
    """Whole tensors, parts and copies of a network agree."""
    for parameter in net.parameters():
        again = shard_like(to_full_tensor(parameter.detach()), parameter)
        assert torch.equal(local_shard(again), local_shard(parameter))
    copied = filled(
        plain, {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    )
    assert all(
        torch.equal(local_shard(a), local_shard(b))
        for a, b in zip(copied.parameters(), net.parameters(), strict=True)
    )
    whole = gathered(net.state_dict())
    assert all((tensor is not None) == (dist.get_rank() == 0) for tensor in whole.values())
    if dist.get_rank() == 0:
        filled(plain, whole)(torch.zeros(1, 3, 32, 32, dtype=next(iter(whole.values())).dtype))


class _Both(nn.Module):
    """Logits and routings as one output, as DDP wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return forward_routing(self.net, x)


def one_of(
    rank: int, processes: int, port: int, known: dict[str, list[Step]], folder: Path
) -> None:
    """All cases of one group of processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=600),
    )
    found, sent = {}, {}
    layouts = {size: Layout.of("cpu", size) for size in (FSDP, EP2, EP4) if size <= processes}
    replicated = {
        size: Layout.of("cpu", size, replicated=True) for size in (EP2, EP4) if size <= processes
    }
    layouts |= {size + REPLICATED: layout for size, layout in replicated.items()}
    for name, case in CASES.items():
        for size, layout in case.layouts:
            if size == processes:
                with Sent() if name == COUNTED else nullcontext() as counter:
                    found[f"{name}, {layout}"] = compare(case, layout, known[name], layouts)
                if counter is not None:
                    sent[layout] = counter.found
    before = {4: None, 2: "four.ckpt"}[processes]
    carry_on(folder, before, {4: "four.ckpt", 2: "two.ckpt"}[processes], layouts[EP2])
    if rank == 0:
        (folder / f"errors-{processes}.json").write_text(json.dumps(found))
        (folder / f"sent-{processes}.json").write_text(json.dumps(sent))
    dist.destroy_process_group()


def carry_on(folder: Path, before: str | None, after: str | None, layout: Layout | None) -> None:
    """Read a checkpoint (None: train one step instead), note its hash, and write it again."""
    net, files = build(CASES["expert choice"]), SafeCheckpointIO()
    plain = outline(net)
    if layout is not None:
        shard(net, layout)
    optimizer, _ = build_optimizer(
        net, OptimizerConfig(), total_steps=2, fused=True, optimizer_classes=kinds(net)
    )
    if before is None:
        net(torch.ones(4, 3, 32, 32, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    else:
        names = {f"net.{name}": parameter for name, parameter in net.named_parameters()}
        like = like_these(names, [p for group in optimizer.param_groups for p in group["params"]])
        path = folder / "checkpoints" / before
        state = divide(files.load_checkpoint(path), like)
        net.load_state_dict(
            {name.removeprefix("net."): tensor for name, tensor in state["state_dict"].items()}
        )
        optimizer.load_state_dict(state["optimizer_states"][0])
    digest = hashlib.sha256()
    for _, parameter in net.named_parameters():
        moments = optimizer.state[parameter]
        for tensor in (parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"]):
            digest.update(to_full_tensor(tensor).contiguous().numpy().tobytes())
    state = {
        "state_dict": {f"net.{name}": tensor for name, tensor in net.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "global_step": 1,
    }
    whole = net.state_dict() if layout is None else gathered(net.state_dict())
    state = state if layout is None else gathered(state)
    if layout is None or dist.get_rank() == 0:
        if after is not None:
            files.save_checkpoint(state, folder / "checkpoints" / after)
        save_model(describe(filled(plain, whole)), folder / "plain")
        file = folder / "digests.json"
        known = json.loads(file.read_text()) if file.is_file() else []
        exported = file_sha256(folder / "plain" / "model.safetensors")
        file.write_text(json.dumps([*known, [digest.hexdigest(), exported]]))


def last_of(rank: int, port: int, folder: Path) -> None:
    """What one process has written, in four others that divide it among all of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    carry_on(folder, "one.ckpt", "replicated.ckpt", Layout.of("cpu", EP2, replicated=True))
    carry_on(folder, "replicated.ckpt", None, Layout.of("cpu", EP4))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Compare all; the steps of one process are computed once, and forks have them."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    known = {name: alone(case) for name, case in CASES.items()}
    start = partial(torch.multiprocessing.start_processes, start_method="fork")  # type: ignore[attr-defined]
    for processes in (4, 2):
        start(one_of, (processes, free_port(), known, folder), nprocs=processes)
    carry_on(folder, "two.ckpt", "one.ckpt", None)
    start(last_of, (free_port(), folder), nprocs=4)


COMPARED = [(name, size, layout) for name, case in CASES.items() for size, layout in case.layouts]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes."""
    folder = tmp_path_factory.mktemp("layouts")
    said = run_script(__file__, folder)
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
