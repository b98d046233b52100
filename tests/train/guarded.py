"""What the tests of the stability guard share: a tiny training with everything that a forward pass can move.

Run as a script (`python guarded.py FOLDER`, with torch's MASTER_ADDR and MASTER_PORT) it trains in two processes: they
write `FOLDER/CASE-RANK.pt`, one for each case of `TWO_PROCESS_CASES`.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn

from moevision.models.config import MoEConfig
from moevision.train.guard import GuardConfig, GuardRecord, StabilityGuard
from moevision.train.health import EmaConfig, WeightEMA
from moevision.train.optim import OptimizerConfig, OptimizerName
from moevision.train.parallel import MoEParallelStrategy
from moevision.train.parallel.parts import to_full_tensor
from moevision.train.processes import callback_of
from moevision.train.task import ClassificationTask
from tests.train.faults import FaultInjector
from tests.train.quiet import quiet_trainer

CLASSES = 4
# Router noise, dropout in three places, stochastic depth, and a BatchNorm stem; or a router with a bias beside it.
NOISY = {"router": "noisy_top_k"}
BIASED = {"router": "bias_balanced", "bias_rate": 0.05}
MUON = {**NOISY, "optimizer": "muon"}
TWO_PROCESS_CASES = {
    "clean": "",
    "loss": "nan_loss@3:rank1",
    "gradient": "inf_grad@3:expert2:rank1",
    "weight": "nan_weight@3:rank1",
    "buffer of the first": "nan_buffer@3:block1:rank0",
    "buffer of another": "nan_buffer@3:block1:rank1",
    "average": "nan_ema@3:rank1",
    "spike": "spike@7x1000:rank1",
}
# The same with weights sharded over both processes: two experts of four in each of them, or FSDP2 alone.
SHARDED_CASES = {
    **{
        f"EP 2, {case}": TWO_PROCESS_CASES[case]
        for case in ("loss", "gradient", "weight", "average", "spike")
    },
    **{f"FSDP2, {case}": TWO_PROCESS_CASES[case] for case in ("loss", "weight", "average")},
}
# Snapshots within the 6 batches of a process, and spikes within 12.
TWO_PROCESS_GUARD = GuardConfig(snapshot_every=2, spike_warmup=4, spike_updates=2)


def batches(count: int, size: int = 8) -> list[dict[str, Tensor]]:
    """Pictures with a colour per class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in range(count):
        label = torch.randint(CLASSES, (size,), generator=generator)
        image = torch.randn(size, 3, 32, 32, generator=generator)
        image[torch.arange(size), label % 3] += 1.0 + (label > 2).float().view(-1, 1, 1)
        found.append({"image": image, "label": label, "index": torch.arange(size) + size * batch})
    return found


def tiny_task(
    lr: float = 3e-3, optimizer: OptimizerName = "adamw", **options: Any
) -> ClassificationTask:
    """4 experts in blocks 1 and 3, from seed 0."""
    L.seed_everything(0, verbose=False)
    always = {"name": "test_vit_moe", "stem": "conv"}
    drops = {"proj_drop_rate": 0.1, "drop_path_rate": 0.1, "expert_drop": 0.1}
    arch = MoEConfig(**{**always, **drops, **NOISY, **options})
    optim = OptimizerConfig(optimizer, lr=lr)
    return ClassificationTask(arch=arch, optim=optim, num_classes=CLASSES, image_size=32)


class Epochs:
    """A loader that goes on through the batches from epoch to epoch, instead of repeating them; it draws no number."""

    def __init__(self, every: list[dict[str, Tensor]], per_epoch: int) -> None:
        self.every, self.per_epoch, self.epoch = every, per_epoch, 0

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first = self.epoch * self.per_epoch
        self.epoch += 1
        yield from self.every[first : first + self.per_epoch]


class States(L.Callback):
    """Keeps the whole state after a number of applied updates; comes last, so that it sees what all others did."""

    def __init__(self, after: int) -> None:
        self.after, self.applied = after, 0
        self.state: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, ClassificationTask)
        self.applied += pl_module.update_applied
        if pl_module.update_applied and self.applied == self.after:
            self.state = whole_state(trainer, pl_module)
        if trainer.is_last_batch:
            self.last = whole_state(trainer, pl_module)


class Averaged(L.Callback):
    """The largest `difference` of a sharded moving average's second update from its formula, on whole tensors."""

    def __init__(self) -> None:
        self.difference = float("nan")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self.before = whole_tensors(callback_of(trainer, WeightEMA).network)  # type: ignore[union-attr]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            after, weights = (
                whole_tensors(callback_of(trainer, WeightEMA).network),
                whole_tensors(pl_module.net),
            )  # type: ignore[union-attr]
            kept = (
                1 - (1 + 1) ** -0.75
            )  # in warm-up 1 - (1 + n) ^ -3/4 after the first n updates, below 0.9
            parts = [
                kept * old + (1 - kept) * weights[name] - after[name]
                for name, old in self.before.items()
            ]
            self.difference = max(float(part.abs().max()) for part in parts)


def whole_tensors(net: nn.Module | None) -> dict[str, Tensor]:
    """Copies of the floating-point weights and buffers of a network, sharded or not; every process must call it."""
    assert net is not None
    state = {
        name: to_full_tensor(tensor.detach()).clone() for name, tensor in net.state_dict().items()
    }
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def whole_state(trainer: L.Trainer, task: ClassificationTask) -> dict[str, Any]:
    """Weights, buffers, moments and step counts, schedule, average, and the random generator."""
    average = callback_of(trainer, WeightEMA)
    network = None if average is None else average.network
    return deepcopy(
        {
            "net": dict(task.net.state_dict()),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "average": {} if network is None else dict(network.state_dict()),
            "updates": 0 if average is None else average.updates,
            "random": torch.get_rng_state(),
        }
    )


class Run:
    """A finished fit: its task, and the callbacks that say what happened."""

    def __init__(
        self,
        folder: Path,
        data: list[dict[str, Tensor]],
        *,
        faults: str = "",
        guard: GuardConfig | None = GuardConfig(),  # noqa: B008
        task: ClassificationTask | None = None,
        after: int = 0,
        val: list[dict[str, Tensor]] | None = None,
        callbacks: tuple[L.Callback, ...] = (),
        processes: int = 1,
        expert: int | None = None,
        **options: Any,
    ) -> None:
        self.task = task or tiny_task()
        self.injector, self.states = FaultInjector(faults), States(after)
        self.guard = None if guard is None else StabilityGuard(guard)
        watching = [] if self.guard is None else [self.guard]
        self.trainer = quiet_trainer(
            strategy=MoEParallelStrategy(expert) if expert else "ddp" if processes > 1 else "auto",
            default_root_dir=folder,
            limit_val_batches=None if val else 0,
            callbacks=[
                self.injector,
                WeightEMA(EmaConfig(decay=0.9)),
                *watching,
                *callbacks,
                self.states,
            ],
            **{"devices": processes, "max_epochs": 1, **options},
        )
        epochs = self.trainer.max_epochs or 1
        seen = val or data[:1]  # none of them without `val`
        self.trainer.fit(
            self.task, Epochs(data, len(data) // epochs), Epochs(seen * (epochs + 1), len(seen))
        )

    @property
    def record(self) -> GuardRecord:
        assert self.guard is not None
        return self.guard.record


def standing_trainer(task: ClassificationTask, **values: Any) -> Any:
    """What the guard and its snapshots ask of a trainer, at step 3 of a training; its other processes print."""
    optimizer = torch.optim.SGD(task.net.parameters(), lr=0.1)
    plugin = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    state = SimpleNamespace(fn=TrainerFn.FITTING, status=TrainerStatus.RUNNING)
    own = {
        "global_step": 3,
        "callbacks": [],
        "optimizers": [optimizer],
        "lr_scheduler_configs": [],
        "current_epoch": 0,
    }
    own |= {"is_global_zero": False, "datamodule": None, "default_root_dir": ".", "world_size": 1}
    return SimpleNamespace(**{**own, "precision_plugin": plugin, "state": state, **values})


def one_of_two(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    warnings.simplefilter("ignore")  # Lightning's advice, and the guard's own words
    torch.set_num_threads(1)
    for case, faults in {**TWO_PROCESS_CASES, **SHARDED_CASES}.items():
        mine, averaged = batches(24 if "spike" in faults else 12)[rank::2], Averaged()
        run = Run(
            folder / case,
            mine,
            faults=faults,
            task=tiny_task(**BIASED),
            processes=2,
            guard=TWO_PROCESS_GUARD,
            expert={"EP 2": 2, "FSDP2": 1}.get(case.split(",")[0]),
            callbacks=(averaged,),
        )
        torch.save(
            {
                "net": whole_tensors(run.task.net),
                "average": {
                    name: to_full_tensor(tensor)
                    for name, tensor in run.states.last["average"].items()
                },
                "record": run.record.state_dict(),
                "injected": dict(run.injector.injected),
                "averaged": averaged.difference,
            },
            folder / f"{case}-{rank}.pt",
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # forks, so that torch and Lightning are imported once for both
    torch.multiprocessing.start_processes(
        one_of_two, (Path(sys.argv[1]),), nprocs=2, start_method="fork"
    )
