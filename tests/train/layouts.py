"""Train a small network in 1, 2 and 4 processes under every layout; run as a script, which compares them.

`python layouts.py FOLDER` trains each case of `CASES` in this process and then, in one group of 4 and one of 2 forks,
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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from moevision.files import file_sha256
from moevision.layers import ColourRouter, forward_routing, moe_layers, update_router_bias
from moevision.losses import AuxLossWeights, Balance
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import describe, save_model
from moevision.models.vit_moe import checkpoint_blocks
from moevision.train.checkpoint import SafeCheckpointIO
from moevision.train.optim import OptimizerConfig, OptimizerName, build_optimizer
from moevision.train.parallel import Layout, same_everywhere, shard
from moevision.train.parallel.parts import (
    SHARDED,
    clip,
    divide,
    filled,
    gathered,
    is_sharded,
    like_these,
    local_shard,
    outline,
    shard_like,
    to_full_tensor,
    total_norm,
)
from tests.shared import free_port

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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
