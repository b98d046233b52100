"""What no training can use is refused in one sentence before anything is trained; it names option or file, and value.

A row is a mistake, and what its sentence must name, with the way on.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_utilities.core.imports import RequirementCache

from moevision import cli as program
from moevision.config import EarlyStoppingConfig
from moevision.data import ImageDataModule
from moevision.data.module import class_weight_tensor
from moevision.errors import UserError
from moevision.layers import Backend, RouterOptions, moe_layers
from moevision.losses import AuxLossWeights
from moevision.models.config import MoEConfig, build_model
from moevision.train import fit as training
from moevision.train.checkpoint import check_checkpoint, load_trained
from moevision.train.guard import GuardConfig, StabilityGuard
from moevision.train.health import EmaConfig, RecordRoutingConfig, WeightEMA
from moevision.train.optim import OptimizerConfig, freeze_parameters, parameter_groups
from moevision.train.parallel import check_divides, check_network
from moevision.train.report import read_summary
from moevision.train.resume import CheckpointConfig
from moevision.train.task import ClassificationTask
from tests.shared import assert_names, refused
from tests.train.guarded import Run, batches, tiny_task

NAN, INF = math.nan, math.inf


RANGES = [
    (OptimizerConfig, "model.optim.lr", (0, -1, NAN, INF), "above 0"),
    (OptimizerConfig, "model.optim.weight_decay", (-1, NAN), "at least 0"),
    (OptimizerConfig, "model.optim.beta2", (-0.1, 1.0, NAN), "less than 1"),
    (OptimizerConfig, "model.optim.warmup_fraction", (-0.1, 1.1, NAN), "between 0"),
    (OptimizerConfig, "model.optim.layer_decay", (0, 1.5, NAN), "above 0 and at"),
    (AuxLossWeights, "model.aux.importance", (-1, NAN, INF), "at least 0"),
    (AuxLossWeights, "model.aux.load", (-1, NAN), "at least 0"),
    (AuxLossWeights, "model.aux.load_balancing", (-1, NAN), "at least 0"),
    (AuxLossWeights, "model.aux.z", (-1, NAN), "at least 0"),
    (AuxLossWeights, "model.aux.label", (-1, NAN), "at least 0"),
    (ClassificationTask, "model.label_smoothing", (-0.1, 1.5, NAN), "at least 0"),
    (RouterOptions, "capacity_factor", (0, NAN, INF), "above 0"),
    (MoEConfig, "model.arch.num_experts", (0,), "at least 1"),
    (MoEConfig, "model.arch.upcycle_reinit", (-1, 1.5, NAN), "at most 1"),
    (ImageDataModule, "data.mixup", (-1, NAN, INF), "at least 0"),
    (ImageDataModule, "data.num_workers", (-1, 257, 5000), "at least 0"),
    (ImageDataModule, "data.min_crop_scale", (-1, 2, NAN), "between 0"),
    (ImageDataModule, "data.seed", (-1, 2**32), "less than 2**32"),
    (ImageDataModule, "data.std", ((NAN, 1, 1), (1, INF, 1)), "every channel's deviation"),
    (CheckpointConfig, "checkpoint.every_minutes", (0, NAN), "above 0"),
    (CheckpointConfig, "checkpoint.every_steps", (0,), "at least 1"),
    (RecordRoutingConfig, "record_routing.moments", (1,), "at least 2"),
    (lambda **o: StabilityGuard(GuardConfig(**o)), "guard.spike_sigmas", (-1, NAN), "at least 0"),
    (lambda **o: WeightEMA(EmaConfig(**o)), "ema.decay", (0, 1, 1.5, NAN), "between 0"),
]


@pytest.mark.parametrize(
    ("make", "option", "values", "limit"), RANGES, ids=[row[1] for row in RANGES]
)
def test_a_number_that_no_training_can_use(make, option, values, limit):
    name = option.rpartition(".")[2]
    for value in values:
        with pytest.raises(UserError) as caught:
            make(**{name: value})
        assert_names(str(caught.value), f"{option} is {value}: ", limit)


def test_a_number_in_a_list():
    with pytest.raises(UserError, match="num_experts is 0"):
        MoEConfig(num_experts=[4, 0])


NO_STRATEGY = json.dumps(
    {
        "class_path": "lightning.pytorch.strategies.SingleDeviceStrategy",
        "init_args": {"device": "nonsense"},
    }
)
STARTS = {
    "--trainer.accumulate_grad_batches=0": ["accumulate_grad_batches is 0", "at least 1"],
    "--trainer.check_val_every_n_epoch=0": ["check_val_every_n_epoch is 0", "at least 1"],
    "--trainer.val_check_interval=0": ["val_check_interval is 0", "above 0"],
    "--trainer.gradient_clip_val=-1.5": ["gradient_clip_val is -1.5", "at least 0"],
    "--trainer.accelerator=tpu": ["The Trainer", "these options"],
    "--model.optim.lr=-1": ["lr is -1.0", "above 0"],
    "--model.num_classes=0": ["--model.num_classes", "leave it out"],
    "--model.image_size=-1": ["--model.image_size", "use --data.image_size"],
    "--data.image_column=x": ["--data.image_column", "column", "leave it out"],
    "--data.label_column=x": ["--data.label_column", "column", "leave it out"],
    "--data.path=other": ["--data.path other", "one of them"],
    # 24 training images are three batches of 8.
    "--trainer.accumulate_grad_batches=4": ["accumulate_grad_batches is 4", "3 batches", "at most"],
    "--model.arch.num_experts=100000000": ["Weights, gradients", "--force"],
    "--trainer.limit_train_batches=0.01": ["The Trainer", "these options"],
    "--trainer.limit_val_batches=0.01": ["The Trainer", "these options"],
    "--trainer.val_check_interval=500": ["The Trainer", "these options"],
    f"--trainer.strategy={NO_STRATEGY}": ["The Trainer", "these options"],
    "--record_routing.images=empty": ["holds 0 images"],
    "--record_routing.images=nowhere": ["holds 0 images"],
    "--record_routing.images=bad": ["use the image"],
    "--trainer.logger=false": ["metrics.csv", "--trainer.logger false"],
    "--trainer.logger=tensorboard": ["names no class", "by tensorboard", "TensorBoardLogger"],
    "--trainer.default_root_dir=x": ["no option", "'trainer.default_root_dir'"],
    "--seed_everything=-5": ["seed_everything is -5", "less than 2**32"],
    "--seed_everything=99999999999999999999": ["less than 2**32"],
}


@pytest.mark.parametrize("option", STARTS)
def test_fit_says_so(cli, tiny, drawn_pets, option, own_folder):
    for folder in ("empty", "bad"):
        Path(folder).mkdir()
    Path("bad/cat.png").write_bytes(b"no image")
    refused(cli("fit", drawn_pets, "--pretrained=none", *tiny, option), *STARTS[option])
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("logger", "package"),
    [
        ("WandbLogger", "wandb"),
        ("[MLFlowLogger]", "mlflow"),
        ("CometLogger", "comet-ml"),
        ("{class_path: TensorBoardLogger, init_args: {save_dir: logs}}", "tensorboard"),
    ],
)
def test_a_logger_whose_package_is_not_installed(
    cli, tiny, drawn_pets, own_folder, monkeypatch, logger, package
):
    """As where none of these packages is: Lightning asks these names."""
    for name in ("tensorboard._TENSORBOARD_AVAILABLE", "tensorboard._TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.{name}", False)
    for name in ("comet._COMET", "mlflow._MLFLOW", "wandb._WANDB"):
        where = f"lightning.pytorch.loggers.{name}_AVAILABLE"
        missing = RequirementCache(f"{package}>=999")
        monkeypatch.setattr(where, missing)
    ending = cli("fit", drawn_pets, "--pretrained=none", *tiny, f"--trainer.logger={logger}")
    refused(ending, "--trainer.logger", f"needs the package {package}", f"pip install {package}")
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
    ],
    ids=["cpu", "gpu", "python"],
)
def test_memory_that_is_not_there(cli, monkeypatch, error):
    """Of whatever verb, wherever it is missed: one sentence; with --traceback where."""

    def fail(name, arguments):
        raise error

    monkeypatch.setattr(program, "_call", fail)
    refused(cli("predict", "model", "images"), "not enough memory", "for predict", "smaller model")
    assert "Traceback" in cli("predict", "model", "images", "--traceback").err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--parallel.expert=2"], "say --parallel fsdp or --parallel ddp"),
        (["--parallel", "fsdp"], "there is one: say --trainer.devices N"),
        (
            ["--parallel=ddp", "--parallel.offload=true", "--trainer.devices=2"],
            "what --parallel fsdp has divided",
        ),
        (["--parallel=fsdp", "--trainer.strategy=ddp"], "are two ways to say it"),
        (
            ["--parallel=fsdp", "--parallel.expert=2", "--trainer.devices=3"],
            "does not divide the 3 processes",
        ),
        (
            ["--parallel=fsdp", "--parallel.expert=3", "--trainer.devices=3"],
            "does not divide the 4 experts of block",
        ),
        (
            ["--parallel=fsdp", "--trainer.devices=2", "--trainer.precision=bf16-true"],
            "not in bf16-true",
        ),
        (
            ["--parallel=fsdp", "--trainer.devices=2", "--model.compile=true"],
            "--model.compile has no tests",
        ),
        (
            ["--parallel=fsdp", "--trainer.devices=3", "--data.batch_size=1"],
            "8 val images in batches of 1 leave one",
        ),
    ],
)
def test_processes_that_can_not_work_together(options, says, cli, monkeypatch, own_folder):
    monkeypatch.setattr(
        training, "start_processes", lambda number: None
    )  # this one stands for each
    monkeypatch.setattr(training, "_check_processes", lambda trainer: None)
    sizes = [
        "--data.train_size=16",
        "--data.val_size=8",
        "--data.test_size=8",
        "--data.image_size=32",
    ]
    model = ["--model.arch.name=test_vit_moe", "--trainer.accelerator=cpu"]
    refused(cli("fit", "synthetic_pets", *model, *sizes, *options), says)
    assert not list(Path("runs").glob("*/*"))


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
    *(
        (
            lambda _, weight=weight: class_weight_tensor({"cat": weight}, {"cat": 2, "dog": 3}),
            ("'cat'", ": use more than"),
        )
        for weight in (0, -1, NAN, INF)
    ),  # images of a class without weight would teach nothing: leave them out
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
    with pytest.raises(UserError) as caught:
        mistake(tmp_path)
    assert_names(str(caught.value), *names)


def test_the_same_without_the_mistake():
    StabilityGuard(GuardConfig(spike_warmup=2))
    check_divides(2, 4)
    for net in (network(), network(backend="dense"), network(DENSE)):
        check_network(net, 1)
