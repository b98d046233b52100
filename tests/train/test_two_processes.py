"""Two processes train like one: parameters, balance losses and router biases, over ranks and micro-batches.

`python test_two_processes.py FOLDER` with torch's MASTER_ADDR and MASTER_PORT trains in two and writes, for each case
of `CASES` and process, `FOLDER/CASE-RANK.pt`, and `FOLDER/loss-RANK.pt` with the losses of `evaluated_loss`.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import lightning as L
import pytest
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
from tests.forks import run_script
from tests.train.quiet import quiet_trainer

pytestmark = pytest.mark.deep

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
    strategy = "ddp" if processes > 1 else "auto"
    fixed = {
        "devices": processes,
        "strategy": strategy,
        "default_root_dir": folder,
        "gradient_clip_val": None,
    }
    return quiet_trainer(**fixed, **options)


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


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """What each of two processes had at the end of every case."""
    folder = tmp_path_factory.mktemp("two")
    run_script(__file__, folder)
    return {
        case: [torch.load(folder / f"{case}-{rank}.pt") for rank in range(2)]
        for case in (*CASES, "loss")
    }


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, two, tmp_path):
    """16 images per step: in one process at once, in two with one or two micro-batches each; float64, no noise.

    What is logged too, although the processes have different images: a mean over 8 here and 8 there is one over 16.
    """
    one, first, second = train(case, tmp_path), *two[case]
    assert one.pop("reduced").tolist() == []
    assert {"train/loss", "train/cross_entropy", "train/top1", "train/grad_norm"} <= one.keys()
    for name in one:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
        if (
            CASES[case][2] == 1 or name == "train/grad_norm" or not name.startswith("train/")
        ):  # else of a micro-batch
            torch.testing.assert_close(
                first[name], one[name], rtol=1e-6, atol=1e-8, check_dtype=False, msg=name
            )


def test_the_loss_of_two_processes_is_a_mean_over_images(two, tmp_path):
    """11 images, six in one process and five in the other, in batches of 3, 3, 3 and 2; in one, of 4, 4 and 3."""
    states = [*two["loss"], evaluated_loss(tmp_path)]
    assert [state["sizes"].tolist() for state in states] == [[3, 3], [3, 2], [4, 4, 3]]
    for state in states:
        assert float(state["loss"]) == pytest.approx(sum(state["each"].tolist()) / 11, rel=1e-5)


# Numbers of each all-reduce of a step, in order. Two layers of four experts; means are those of loss, cross-entropy
# and top-1; the last one is of the load that is logged.
MEANS, LOADS = 3, 2 * 4
REDUCED = {
    "bias": [MEANS, MEANS, LOADS, LOADS],  # a mean for each micro-batch; the bias's own loads
    # Importance is a function of E sums, load balancing of 2 E: one for both and all layers, and one backward.
    "losses": [2 * 3 * 4, MEANS, 2 * 3 * 4, LOADS],
    "z over micro-batches": [
        2 * 2,
        MEANS,
        2 * 2,
        2 * 2,
        MEANS,
        2 * 2,
        LOADS,
    ],  # a sum and a number of tokens
    "label over micro-batches": [2 * 2, MEANS, 2 * 2, 2 * 2, MEANS, 2 * 2, LOADS],
    "soft": [MEANS, MEANS, LOADS],
}


@pytest.mark.parametrize("case", REDUCED)
def test_reductions_are_bundled(case, two):
    assert [state["reduced"].tolist() for state in two[case]] == [STEPS * REDUCED[case]] * 2


if __name__ == "__main__":  # forks, so that torch and Lightning are imported once for both
    torch.multiprocessing.start_processes(
        one_of_two, (Path(sys.argv[1]),), nprocs=2, start_method="fork"
    )
