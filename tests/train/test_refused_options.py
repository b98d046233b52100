"""Values that no training can use are refused in one sentence, which names the option, before anything is trained."""

import math
import re
from pathlib import Path

import pytest

from moevision import cli as program
from moevision.cli import parser_of
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

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "option", "values", "words"),
    [
        (OptimizerConfig, "lr", (0, -1, NAN, INF), "--model.optim.lr is {}: it must be above 0"),
        (
            OptimizerConfig,
            "weight_decay",
            (-1, NAN),
            "--model.optim.weight_decay is {}: it must be at least 0",
        ),
        (
            OptimizerConfig,
            "beta2",
            (-0.1, 1.0, NAN),
            "--model.optim.beta2 is {}: it must be at least 0 and less than 1",
        ),
        (
            OptimizerConfig,
            "warmup_fraction",
            (-0.1, 1.1, NAN),
            "--model.optim.warmup_fraction is {}: it must be between",
        ),
        (
            OptimizerConfig,
            "layer_decay",
            (0, 1.5, NAN),
            "--model.optim.layer_decay is {}: it must be above 0 and at",
        ),
        (
            AuxLossWeights,
            "importance",
            (-1, NAN, INF),
            "--model.aux.importance is {}: it must be at least 0",
        ),
        (AuxLossWeights, "load", (-1, NAN), "--model.aux.load is {}: it must be at least 0"),
        (
            AuxLossWeights,
            "load_balancing",
            (-1, NAN),
            "--model.aux.load_balancing is {}: it must be at least 0",
        ),
        (AuxLossWeights, "z", (-1, NAN), "--model.aux.z is {}: it must be at least 0"),
        (AuxLossWeights, "label", (-1, NAN), "--model.aux.label is {}: it must be at least 0"),
        (
            ClassificationTask,
            "label_smoothing",
            (-0.1, 1.5, NAN),
            "--model.label_smoothing is {}: it must be at least",
        ),
        (
            RouterOptions,
            "capacity_factor",
            (0, NAN, INF),
            "capacity_factor is {}: it must be above 0",
        ),
        (
            MoEConfig,
            "num_experts",
            (0, [4, 0]),
            "--model.arch.num_experts is 0: it must be at least 1",
        ),
        (
            MoEConfig,
            "upcycle_reinit",
            (-1, 1.5, NAN),
            "--model.arch.upcycle_reinit is {}: it must be at least 0 and",
        ),
        (ImageDataModule, "mixup", (-1, NAN, INF), "--data.mixup is {}: it must be at least 0"),
        (
            ImageDataModule,
            "num_workers",
            (-1, 257, 5000),
            "--data.num_workers is {}: it must be at least 0 and at mos",
        ),
        (
            ImageDataModule,
            "min_crop_scale",
            (-1, 2, NAN),
            "--data.min_crop_scale is {}: it must be between 0 and 1",
        ),
        (
            ImageDataModule,
            "seed",
            (-1, 2**32),
            "--data.seed is {}: it must be at least 0 and less than 2**32",
        ),
        (
            ImageDataModule,
            "std",
            ((NAN, 1, 1), (1, INF, 1)),
            "--data.std is {}: every channel's deviation must be",
        ),
        (
            CheckpointConfig,
            "every_minutes",
            (0, NAN),
            "--checkpoint.every_minutes is {}: it must be above 0",
        ),
        (
            lambda **o: StabilityGuard(GuardConfig(**o)),
            "spike_sigmas",
            (-1, NAN),
            "--guard.spike_sigmas is {}: it must",
        ),
        (
            lambda **o: WeightEMA(EmaConfig(**o)),
            "decay",
            (0, 1, NAN),
            "--ema.decay is {}: it must be between 0 and 1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_a_number_that_no_training_can_use(make, option, values, words):
    for value in values:
        with pytest.raises(UserError, match=re.escape(words.format(value))):
            make(**{option: value})


@pytest.mark.parametrize("weight", [0, -1, NAN, INF])
def test_the_weight_of_a_class_is_above_0(weight):
    """Images of a class without weight would teach nothing: they can be left out."""
    with pytest.raises(UserError, match=r"gives 'cat' the weight .*: use more than 0"):
        class_weight_tensor({"cat": weight}, {"cat": 2, "dog": 3})


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "--trainer.accumulate_grad_batches=0",
            "accumulate_grad_batches is 0: it must be at least 1",
        ),
        (
            "--trainer.check_val_every_n_epoch=0",
            "check_val_every_n_epoch is 0: it must be at least 1",
        ),
        ("--trainer.val_check_interval=0", "val_check_interval is 0: it must be above 0"),
        ("--trainer.gradient_clip_val=-1.5", "gradient_clip_val is -1.5: it must be at least 0"),
        ("--trainer.accelerator=tpu", "The Trainer does not take these options"),
        ("--model.optim.lr=-1", "lr is -1.0: it must be above 0"),
        ("--model.num_classes=0", "--model.num_classes is what the images say: leave it out"),
        (
            "--model.image_size=-1",
            "--model.image_size is what the images say: leave it out, and use --data.image_size",
        ),
        (
            "--data.image_column=x",
            "--data.image_column names a column of a table, and there is none in",
        ),
        (
            "--data.label_column=x",
            "--data.label_column names a column of a table, and there is none in",
        ),
        ("--data.path=other", " and --data.path other both name images: use one of them"),
        # 24 training images are three batches of 8.
        (
            "--trainer.accumulate_grad_batches=4",
            "accumulate_grad_batches is 4 and an epoch has 3 batches: use at most",
        ),
        ("--model.arch.num_experts=100000000", "Weights, gradients and moments of this model take"),
        (
            "--trainer.logger=false",
            "metrics.csv is always written, the report is made of it: leave --trainer.logger false",
        ),
        ("--trainer.default_root_dir=x", "there is no option 'trainer.default_root_dir'"),
        (
            "--seed_everything=-5",
            "seed_everything is -5: it must be at least 0 and less than 2**32",
        ),
        ("--seed_everything=99999999999999999999", "it must be at least 0 and less than 2**32"),
    ],
)
def test_fit_says_so(cli, tiny, drawn_pets, tmp_path, monkeypatch, option, words):
    monkeypatch.chdir(tmp_path)
    outcome = cli("fit", drawn_pets, "--pretrained=none", *tiny, option)
    assert outcome.code == 2, outcome.err
    sentence = outcome.err.splitlines()[-1]
    assert sentence.startswith("moevision: ")
    assert words in sentence
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("upcycle", ["x", "--out=y", "--reinit=nan"], "'nan' is no share between 0 and 1"),
        ("upcycle", ["x", "--out=y", "--seed=-1"], "'-1' is no seed: it must be at least 0"),
        ("analyze", ["x", "y", "--out=z", "--seed=99999999999"], "is no seed"),
    ],
)
def test_a_verb_says_so(capsys, verb, arguments, words):
    with pytest.raises(SystemExit):
        parser_of(verb).parse_args(arguments)
    assert words in capsys.readouterr().err


def test_data_prune_says_so(cli):
    outcome = cli("data", "prune", "run", "--by=aum", "--keep=0.5", "--seed=-1")
    assert outcome.code == 2
    assert "'-1' is no seed" in outcome.err


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
    outcome = cli("predict", "model", "images")
    assert outcome.code == 2
    assert outcome.err.startswith(
        "moevision: there is not enough memory for predict here: use a smaller model"
    )
    assert "Traceback" in cli("predict", "model", "images", "--traceback").err
