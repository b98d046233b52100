"""Values that no training can use are refused in one sentence, which names the option, before anything is trained."""

import math
from pathlib import Path

import pytest

from moevision import cli as program
from moevision.data import ImageDataModule
from moevision.data.module import class_weight_tensor
from moevision.errors import UserError
from moevision.layers import RouterOptions
from moevision.losses import AuxLossWeights
from moevision.models.config import MoEConfig
from moevision.train.guard import GuardConfig, StabilityGuard
from moevision.train.health import EmaConfig, WeightEMA
from moevision.train.optim import OptimizerConfig
from moevision.train.resume import CheckpointConfig
from moevision.train.task import ClassificationTask
from tests.shared import assert_names, refused

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
    (lambda **o: StabilityGuard(GuardConfig(**o)), "guard.spike_sigmas", (-1, NAN), "at least 0"),
    (lambda **o: WeightEMA(EmaConfig(**o)), "ema.decay", (0, 1, NAN), "between 0"),
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


@pytest.mark.parametrize("weight", [0, -1, NAN, INF])
def test_the_weight_of_a_class_is_above_0(weight):
    """Images of a class without weight would teach nothing: they can be left out."""
    with pytest.raises(UserError, match=r"'cat' .*: use more than"):
        class_weight_tensor({"cat": weight}, {"cat": 2, "dog": 3})


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
    "--trainer.logger=false": ["metrics.csv", "--trainer.logger false"],
    "--trainer.default_root_dir=x": ["no option", "'trainer.default_root_dir'"],
    "--seed_everything=-5": ["seed_everything is -5", "less than 2**32"],
    "--seed_everything=99999999999999999999": ["less than 2**32"],
}


@pytest.mark.parametrize("option", STARTS)
def test_fit_says_so(cli, tiny, drawn_pets, option, own_folder):
    refused(cli("fit", drawn_pets, "--pretrained=none", *tiny, option), *STARTS[option])
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
