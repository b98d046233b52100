"""Training behaves: loss at the start, overfitting, a golden curve, accumulation, and two processes like one."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import pytest
import timm
import torch
from torch.utils.data import DataLoader

from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.layers import forward_routing, moe_layers
from moevision.losses import AuxLossWeights, label_loss
from moevision.models.config import MoEConfig, build_model
from moevision.train.recipe import describe_plan, expected_seconds
from moevision.train.task import ClassificationTask, OptimizerConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "loss_curve.json"


def task_of(
    classes: int = 8, stem: Literal["patch", "conv"] | None = None, **options: Any
) -> ClassificationTask:
    L.seed_everything(0, verbose=False)
    arch = MoEConfig(name="test_vit_moe", stem=stem)
    return ClassificationTask(arch=arch, num_classes=classes, image_size=32, **options)


def pets(size: int = 64, **options: Any) -> ImageDataModule:
    return ImageDataModule(
        "synthetic_pets",
        image_size=32,
        batch_size=16,
        train_size=size,
        val_size=16,
        test_size=16,
        **options,
    )


def trainer_of(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False}
    return L.Trainer(
        default_root_dir=folder, use_distributed_sampler=False, **{**quiet, **defaults, **options}
    )


class Losses(L.Callback):
    """Keeps the training loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.values.append(float(outputs["loss"]))


def loss_curve(folder: Path) -> list[float]:
    """20 steps on drawn pets, float32, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        losses = Losses()
        trainer = trainer_of(
            folder, max_epochs=5, max_steps=20, limit_val_batches=0, callbacks=[losses]
        )
        trainer.fit(task_of(optim=OptimizerConfig(lr=3e-3)), pets())
    finally:
        torch.set_num_threads(threads)
    return losses.values


def test_golden_loss_curve(tmp_path):
    """Any change of model, loss, data, schedule or seed shows here; `python -m tests.golden.make` writes it anew."""
    expected = json.loads(GOLDEN.read_text())["losses"]
    assert loss_curve(tmp_path) == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0] - 0.05


def test_training_step_adds_the_weighted_balance_losses(tmp_path):
    """Logged loss = cross-entropy + 0.3 · importance + 0.2 · load, from the logged parts."""
    task = task_of(aux=AuxLossWeights(importance=0.3, load=0.2))
    trainer = trainer_of(tmp_path, max_steps=1, limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(task, pets())
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    expected = (
        logged["train/cross_entropy"]
        + 0.3 * logged["train/importance_loss"]
        + 0.2 * logged["train/load_loss"]
    )
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["train/importance_loss"] > 0
    names = ["router of block 1", "router of block 3", "importance loss", "load loss"]
    assert [*task.evidence[0]] == [*names, "cross-entropy", "loss"]


@pytest.mark.parametrize("mixup", [0.0, 0.4], ids=["labels", "Mixup"])
def test_training_step_tells_the_routers_the_class(mixup, tmp_path):
    """Logged loss = cross-entropy + 0.3 · label loss; with Mixup it is told the shares of both classes."""
    aux = AuxLossWeights(importance=0, load=0, label=0.3)
    task = ClassificationTask(arch=MoEConfig(name="test_vit_moe", num_experts=16), aux=aux)
    seen: list[tuple[torch.Tensor, list[Any]]] = []
    task.observer = lambda batch, logits, routings: seen.append(
        (batch.get("target", batch["label"]), list(routings))
    )
    trainer = trainer_of(tmp_path, max_steps=1, limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(task, pets(mixup=mixup))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    ((target, routings),) = seen
    assert (target.ndim == 2) is (mixup > 0)
    shares = target if mixup else torch.eye(8)[target]
    expected = sum(label_loss(routing, shares).item() for routing in routings) / 2  # two layers
    assert logged["train/label_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["train/loss"] == pytest.approx(
        logged["train/cross_entropy"] + 0.3 * expected, rel=1e-5
    )


def test_evaluation_counts_every_choice(tmp_path):
    """16 test images of 16 patches with K = 2 are 512 choices in each of the layers 1 and 3."""
    task, data = task_of(), pets()
    trainer = trainer_of(tmp_path)
    trainer.test(task, data, verbose=False)
    assert [load.layer for load in task.test_loads] == [1, 3]
    assert all(sum(load.counts) == 512 for load in task.test_loads)
    assert all(
        load.cv_squared_floor == 0 for load in task.test_loads
    )  # untrained scores tie: all images route alike
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    _, routings = forward_routing(task.net.eval(), batch["image"])
    assert task.test_loads[0].counts == routings[0].counts().tolist()
    predictions = torch.cat([output["prediction"] for output in task.test_outputs])
    accuracy = (predictions == batch["label"]).float().mean()
    assert float(trainer.callback_metrics["test/top1"]) == pytest.approx(float(accuracy))


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_loss_is_a_mean_over_images(split, tmp_path):
    """18 images in batches of 16 and 2: each image counts alike, so the mean over the two batches is another number."""
    task = task_of()
    torch.nn.init.normal_(
        cast(Any, task.net).head.weight, std=0.5
    )  # confident, hence very different losses
    data = ImageDataModule(
        "synthetic_pets", image_size=32, batch_size=16, train_size=16, val_size=18, test_size=18
    )
    trainer = trainer_of(tmp_path)
    (trainer.validate if split == "val" else trainer.test)(task, data, verbose=False)
    batches = list(data.val_dataloader() if split == "val" else data.test_dataloader())
    task.eval()
    with torch.no_grad():
        probs = [task(batch["image"]).softmax(-1) for batch in batches]
    losses = [
        [-math.log(float(row[label])) for row, label in zip(p, batch["label"], strict=True)]
        for p, batch in zip(probs, batches, strict=True)
    ]
    assert [len(batch) for batch in losses] == [16, 2]
    of_images = (sum(losses[0]) + sum(losses[1])) / 18
    of_batches = (sum(losses[0]) / 16 + sum(losses[1]) / 2) / 2
    assert abs(of_batches - of_images) > 0.1
    assert float(trainer.callback_metrics[f"{split}/loss"]) == pytest.approx(of_images, rel=1e-5)


def test_one_image_of_nan_makes_the_loss_nan(tmp_path):
    """18 images in batches of 16 and 2; one of the last two isn't finite."""
    task = task_of()
    rows = [
        {"image": torch.randn(n, 3, 32, 32), "label": torch.arange(n) % 8, "index": torch.arange(n)}
        for n in (16, 2)
    ]
    rows[1]["image"][1] = math.nan
    (found,) = trainer_of(tmp_path).validate(
        task, DataLoader(cast(Any, rows), batch_size=None), verbose=False
    )
    assert math.isnan(found["val/loss"])


def test_a_checkpoint_is_self_contained_and_plain(tmp_path):
    """It loads under weights_only=True, given NumPy's numbers, too, and rebuilds the task with its dataclasses."""
    optim = OptimizerConfig(lr=np.float64(1e-3), weight_decay=np.float32(0.5))
    task = task_of(aux=AuxLossWeights(importance=0.3), optim=optim)
    trainer = trainer_of(tmp_path, max_steps=1, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(task, pets())
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    loaded = ClassificationTask.load_from_checkpoint(path, weights_only=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), task.eval()(x))
    assert loaded.aux_weights == AuxLossWeights(importance=0.3)
    assert loaded.optim == OptimizerConfig(lr=1e-3, weight_decay=0.5)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "Mixup"])
def test_class_weights_weigh_the_loss_of_an_image(soft):
    """By hand: the mean over images of - Σ_c w_c · t_c · log p_c, with smoothed targets t = .9 · target + .1 / C."""
    task = task_of(3)
    task.class_weight = torch.tensor([0.5, 1.0, 4.0])
    logits, labels = torch.randn(5, 3), torch.tensor([0, 0, 1, 2, 1])
    target = torch.nn.functional.one_hot(labels, 3).float()
    if soft:
        target = 0.7 * target + 0.3 * target.flip(0)
    each = -(task.class_weight * (0.9 * target + 0.1 / 3) * logits.log_softmax(-1)).sum(-1)  # [B]
    loss = task._cross_entropy(logits, target if soft else labels)
    torch.testing.assert_close(loss, each.sum() / 5)


def test_classes_and_size_must_agree(tmp_path):
    other = ClassificationTask(MoEConfig(name="test_vit_moe"), num_classes=8, image_size=16)
    with pytest.raises(UserError, match=r"16 px, .* 8 and 32 px: .* --data\.image_size 16"):
        trainer_of(tmp_path).test(other, pets(), verbose=False)
    with pytest.raises(UserError, match=r"5 classes .* data has 8"):
        trainer_of(tmp_path).test(task_of(5), pets(), verbose=False)
    with pytest.raises(UserError, match="num_classes and image_size"):
        trainer_of(tmp_path).test(ClassificationTask(), DataLoader([{}]))  # type: ignore[arg-type]


def test_experts_that_are_there_already_stay_as_they_are(tmp_path):
    """What they have may be said again; anything else would be ignored, and is refused."""
    net = timm.create_model("test_vit_moe", num_classes=3, img_size=32)
    timm.models.save_for_hf(net, tmp_path, safe_serialization=True)
    own = {
        "num_experts": [4] * len(moe_layers(net)),
        "top_k": moe_layers(net)[0].router.top_k,
        "moe_layers": "every2",
    }
    config = MoEConfig(
        pretrained=str(tmp_path), **own, expert_hidden=moe_layers(net)[0].experts.fc1.out_features
    )
    built = build_model(config, num_classes=3, image_size=32)
    assert torch.equal(moe_layers(built)[0].router.weight, moe_layers(net)[0].router.weight)
    for options, words in (
        ({"num_experts": 16}, r"give --model\.arch\.num_experts null \(it is 16; there: 4\), or"),
        (
            {"moe_layers": "all", "router": "soft"},
            r"moe_layers null \(it is all; there: \[1, 3\]\), --model\.arch\.router null \(it is soft; there: n",
        ),
        ({"upcycle_reinit": 0.1}, r"upcycle_reinit null \(it is 0\.1; there: not set\)"),
        ({"twin": "active_flops"}, "no dense weights for --with-twin or --dense: leave it out"),
    ):
        other = MoEConfig(pretrained=str(tmp_path), **options)
        with pytest.raises(UserError, match=words):
            build_model(other, num_classes=3, image_size=32)
    config = MoEConfig(
        pretrained=str(tmp_path), num_experts=16
    )  # of a run of an earlier version, which goes on
    assert len(moe_layers(build_model(config, 3, 32, load_pretrained=False))) == len(
        moe_layers(net)
    )


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks at it after a graph break
def test_each_block_is_compiled_and_trains_alike(tmp_path, monkeypatch):
    """By dynamo alone: what inductor makes of it on a CPU takes minutes."""
    compiled: list[torch.nn.Module] = []
    real = torch.nn.Module.compile

    def compile_(module: torch.nn.Module) -> None:
        compiled.append(module)
        real(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    seen = {}
    for wanted in (False, True):
        task, losses = task_of(compile=wanted), Losses()
        trainer_of(tmp_path, callbacks=[losses], limit_val_batches=0, max_steps=2).fit(task, pets())
        seen[wanted] = losses.values
    assert compiled == list(task.net.blocks)  # type: ignore[arg-type]
    assert len(seen[True]) == 2
    assert seen[True] == pytest.approx(seen[False], rel=0.05)  # compiled code draws other noise


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, True),
        ({"moe_layers": [0]}, False),
        ({"global_pool": "avg"}, False),
        ({"route_by": "image"}, False),  # the class token goes with its image
        ({"router": "soft"}, False),  # its slots mix all tokens
    ],
)
def test_the_plan_says_where_routes_change_no_answer(tmp_path, options, said):
    """timm's `test_vit` classifies by its class token, which reads no patch of the last block."""
    task = ClassificationTask(
        arch=MoEConfig(name="vit_moe", base="test_vit", **{"moe_layers": "all", **options}),
        num_classes=3,
        image_size=32,
    )
    data = cast(
        Any,
        SimpleNamespace(
            contents=SimpleNamespace(datasets={"train": range(8)}),
            batch_size=4,
            train_batches=lambda world: 2,
        ),
    )
    assert ("routes of patches" in describe_plan(task, data, trainer_of(tmp_path))) is said


@pytest.mark.parametrize(
    ("options", "batches", "words"),
    [
        (
            {"max_epochs": 3},
            15,
            "3 epochs of 44 images",
        ),  # each leaves 4 images out, which fill no batch
        ({"max_epochs": 1}, 5, "1 epoch of 44 images"),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6, "3 epochs of 16 images"),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 6, "3 epochs of 16 images"),
        ({"max_epochs": 3, "max_steps": 4}, 4, "4 steps of 8 images"),
        # five batches make three steps, of which the last has one: 5 and 2
        (
            {"max_epochs": -1, "max_steps": 4, "accumulate_grad_batches": 2},
            7,
            "4 steps of 16 images",
        ),
        ({"max_epochs": 3, "max_steps": 40}, 15, "3 epochs of 44 images"),
    ],
)
def test_the_plan_counts_what_will_be_trained(tmp_path, monkeypatch, options, batches, words):
    """44 images in batches of 8, each of which takes a minute, and a tenth more."""
    monkeypatch.setattr("moevision.train.recipe.seconds_per_batch", lambda *_: 60.0)
    data = cast(
        Any,
        SimpleNamespace(
            contents=SimpleNamespace(datasets={"train": range(44)}),
            batch_size=8,
            train_batches=lambda world: 44 // 8 // world,
        ),
    )
    task, trainer = task_of(), trainer_of(tmp_path, **options)
    seconds = expected_seconds(task, data, trainer)
    assert seconds == pytest.approx(66 * batches)
    assert f"plan: {words}, about {seconds / 60:.0f} min at " in describe_plan(
        task, data, trainer, seconds
    )
    assert f"{words}, less than a minute" in describe_plan(task, data, trainer, 29.0)
