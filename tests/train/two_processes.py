"""Train a tiny model for a few optimizer steps; run as a script, in the two processes of a DDP training.

`python two_processes.py FOLDER` with torch's MASTER_ADDR and MASTER_PORT writes `FOLDER/CASE-RANK.pt`, one for each
case of `CASES` and process. `train` in one process is what it has to equal. `FOLDER/loss-RANK.pt` holds the losses of
`evaluated_loss`.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moevision.data.loader import eval_batches
from moevision.layers import update_router_bias
from moevision.losses import AuxLossWeights
from moevision.models.config import MoEConfig
from moevision.train.health import RouterHealth
from moevision.train.task import ClassificationTask

STEPS, IMAGES, CLASSES = 3, 16, 4

# name: options of the model, weights of the losses, micro-batches per optimizer step. The balance losses' gradients
# are the full batch's over processes; over micro-batches only z's and label's are, and all where those are alike.
CASES: dict[str, tuple[dict[str, Any], dict[str, float], int]] = {
    "bias": ({"router": "bias_balanced", "bias_rate": 0.05}, {}, 2),
    "losses": (
        {"router": "vmoe_top_k", "noise": "none"},
        {"importance": 0.5, "load_balancing": 0.5, "load": 0.0},
        1,
    ),
    "z over micro-batches": ({"router": "switch"}, {"load_balancing": 0.0, "z": 0.5}, 2),
    "micro-batches alike": (
        {"router": "vmoe_top_k", "noise": "none"},
        {"importance": 0.5, "load_balancing": 0.5, "load": 0.0},
        2,
    ),
    "label over micro-batches": (
        {"router": "vmoe_top_k", "noise": "none", "route_by": "image"},
        {"importance": 0.0, "load": 0.0, "label": 0.5},
        2,
    ),
    "soft": ({"router": "soft"}, {}, 2),
    "class weights": (
        {"router": "vmoe_top_k", "noise": "none"},
        {"importance": 0.0, "load": 0.0},
        2,
    ),
    "expert choice": ({"router": "expert_choice", "noise": "none"}, {}, 1),
}


def batches(parts: int, alike: bool = False) -> list[dict[str, Tensor]]:
    """STEPS batches of IMAGES images, each cut into parts in order; `alike`: its quarters are the same images."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        image = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64) + 0.5
        label = torch.randint(CLASSES, (IMAGES,), generator=generator)
        if alike:
            image, label = image[: IMAGES // 4].repeat(4, 1, 1, 1), label[: IMAGES // 4].repeat(4)
        for rows in torch.arange(IMAGES).chunk(parts):
            found.append({"image": image[rows], "label": label[rows], "index": rows})
    return found


def trainer_of(folder: Path, processes: int, **options: Any) -> L.Trainer:
    """A Trainer on the CPU that logs and keeps nothing; DDP where there are several processes."""
    return L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def train(
    case: str, folder: Path, processes: int = 1, rank: int = 0, micro_batches: int = 1
) -> dict[str, Tensor]:
    """The network's state after STEPS optimizer steps in float64, what the last one logged, and two more.

    `counts` [2, E] is what the routers' biases were last moved by, if they have some, `reduced` the sizes of all
    all-reduces but those of DDP's gradients, and Lightning's own, of one number.
    """
    options, weights, _ = CASES[case]
    L.seed_everything(0, verbose=False)
    task = ClassificationTask(
        arch=MoEConfig(name="test_vit_moe", stem="patch", **options),
        aux=AuxLossWeights(**weights),
        num_classes=CLASSES,
        image_size=32,
    )
    if case == "class weights":
        task.class_weight = torch.tensor([0.2, 1.0, 5.0, 0.4])
    task.double()
    # Micro-batches go round the processes: the batches of a process are every P-th of a step's M · P parts.
    mine = batches(processes * micro_batches, case == "micro-batches alike")[rank::processes]
    trainer = trainer_of(
        folder,
        processes,
        precision="64-true",
        max_epochs=1,
        limit_val_batches=0,
        accumulate_grad_batches=micro_batches,
        log_every_n_steps=1,
        callbacks=[RouterHealth()],
    )
    loader = DataLoader(mine, batch_size=None)
    reduced: list[int] = []
    given: list[Tensor] = []
    all_reduce = dist.all_reduce

    def noted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.extend([tensor.numel()] if tensor.numel() > 1 else [])
        return all_reduce(tensor, *args, **kwargs)

    def noted_update(net: nn.Module, counts: list[Tensor]) -> None:
        given[:] = counts
        update_router_bias(net, counts)

    with (
        patch.object(dist, "all_reduce", noted_reduce),
        patch("moevision.losses.update_router_bias", noted_update),
    ):
        trainer.fit(task, loader, loader)
    assert trainer.global_step == STEPS
    logged = {name: value for name, value in trainer.callback_metrics.items() if name != "epoch"}
    counts = {"counts": torch.stack(given)} if given else {}
    return {**task.net.state_dict(), **logged, **counts, "reduced": torch.tensor(reduced)}


def evaluated_loss(folder: Path, processes: int = 1, rank: int = 0) -> dict[str, Tensor]:
    """`val/loss` of 11 images in batches of at most 4, as `ImageDataModule` deals them out; and the loss of each image.

    Two processes have batches of 3 and 3, and of 2 and 3 images.
    """
    L.seed_everything(0, verbose=False)
    task = ClassificationTask(
        arch=MoEConfig(name="test_vit_moe"), num_classes=CLASSES, image_size=32
    )
    nn.init.normal_(
        cast(Any, task.net).head.weight, std=0.5
    )  # confident, hence very different losses
    images, labels = torch.randn(11, 3, 32, 32), torch.arange(11) % CLASSES
    rows = eval_batches(11, 4, rank, processes)
    batches = [
        {"image": images[own], "label": labels[own], "index": torch.tensor(own)} for own in rows
    ]
    trainer = trainer_of(folder, processes)
    (found,) = trainer.validate(
        task, DataLoader(cast(Any, batches), batch_size=None), verbose=False
    )
    with torch.no_grad():
        each = -task.eval()(images).log_softmax(-1)[torch.arange(11), labels]
    return {
        "loss": torch.tensor(found["val/loss"]),
        "each": each,
        "sizes": torch.tensor([len(own) for own in rows]),
    }


def one_of_two(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    warnings.simplefilter("ignore")  # Lightning's advice on speed
    torch.set_num_threads(1)
    for case, (_, _, micro_batches) in CASES.items():
        torch.save(train(case, folder, 2, rank, micro_batches), folder / f"{case}-{rank}.pt")
    torch.save(evaluated_loss(folder, 2, rank), folder / f"loss-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # forks, so that torch and Lightning are imported once for both
    torch.multiprocessing.start_processes(
        one_of_two, (Path(sys.argv[1]),), nprocs=2, start_method="fork"
    )
