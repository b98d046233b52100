"""`moevision fit | validate | test`: LightningCLI with a run folder, a plain FOLDER argument and a report at the end."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.train.finish import RunResult, finish_run, write_comparison
from moevision.train.plan import describe_plan
from moevision.train.recipe import default_precision, expand_arguments
from moevision.train.run_folder import new_run_folder
from moevision.train.task import ClassificationTask

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "devices": 1,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,  # ImageDataModule shards by itself, and resumes where it stopped
}


class Stopwatch(L.Callback):
    """Seconds and images of training proper: validation is left out."""

    def __init__(self) -> None:
        self.train_s = 0.0
        self.images = 0
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of this batch, over all ranks."""
        self.images += len(batch["label"]) * trainer.world_size
        now = time.perf_counter()
        self.train_s += now - self._started
        self._started = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on after validation."""
        self._started = time.perf_counter()


class TrainingCLI(LightningCLI):
    """The three training verbs; one run folder holds everything that a `fit` leaves."""

    run_dir: Path | None = None

    def __init__(self, arguments: list[str], run_dir: Path | None = None) -> None:
        self.run_dir = run_dir
        self.stopwatch = Stopwatch()
        self.started = datetime.now(UTC)
        with warnings.catch_warnings():
            # We do read the command line ourselves and hand it on.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(
                ClassificationTask,
                ImageDataModule,
                args=arguments,
                trainer_defaults={**TRAINER_DEFAULTS, "precision": default_precision()},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"prog": "moevision"},
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and the Trainer arguments that the command line supplies itself."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of our own."""
        parser.add_argument("--name", type=str, default=None, help="Name of the run folder, runs/NAME.")
        parser.add_argument(
            "--with-twin",
            action="store_true",
            help="Train the dense twin by the same recipe too, and compare both on the same test images.",
        )
        parser.add_argument(
            "--runs_root", type=str, default="runs", help="The folder in which run folders are made."
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A Trainer that logs to and saves in the run folder."""
        name = self._get(self.config, "name") or Path(self._get(self.config, "data")["path"]).name
        verb = str(self.subcommand)
        if self.run_dir is None:
            self.run_dir = new_run_folder(name if verb == "fit" else f"{name}-{verb}", Path(self._get(self.config, "runs_root")))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        trainer_config = self._get(self.config_init, "trainer")
        callbacks = list(trainer_config.get("callbacks") or [])
        if verb == "fit":
            callbacks += [self.stopwatch, LearningRateMonitor("step"), self._checkpoints()]
        return super().instantiate_trainer(
            default_root_dir=str(self.run_dir),
            logger=trainer_config.get("logger") or CSVLogger(self.run_dir, name="", version=""),
            callbacks=callbacks,
            **kwargs,
        )

    def _checkpoints(self) -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=cast(Path, self.run_dir) / "checkpoints",
            filename="best",
            monitor="val/top1",
            mode="max",
            save_last=True,
            enable_version_counter=False,
        )

    def before_fit(self) -> None:
        """Read the data, build the model, and say what is going to happen."""
        self.datamodule.run_dir = self.run_dir
        self.datamodule.setup("fit")
        self.model.build(self.datamodule.num_classes, self.datamodule.image_size)
        print(self.datamodule.describe())
        print(describe_plan(self.model, self.datamodule, self.trainer))
        print(f"run folder: {self.run_dir}\n", flush=True)

    def fit(self, **kwargs: Any) -> None:
        """Train; a checkpoint is never unpickled."""
        self.trainer.fit(**kwargs, weights_only=True)

    def before_validate(self) -> None:
        """Read the data."""
        self._before_evaluation()

    def before_test(self) -> None:
        """Read the data."""
        self._before_evaluation()

    def _before_evaluation(self) -> None:
        if not self._get(self.config, "ckpt_path"):
            raise UserError(f"Say which weights to {self.subcommand}: --ckpt_path runs/NAME/checkpoints/best.ckpt.")
        self.datamodule.run_dir = self._split_folder()

    def _split_folder(self) -> Path | None:
        """The folder of the run that made the checkpoint: its split is used again."""
        checkpoint = Path(self._get(self.config, "ckpt_path"))
        origin = checkpoint.parent.parent / "splits.csv"
        if origin.is_file() and self.run_dir is not None:
            shutil.copy(origin, self.run_dir / "splits.csv")
        return self.run_dir

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the validation images."""
        self.trainer.validate(**kwargs, weights_only=True)

    def test(self, **kwargs: Any) -> None:
        """Evaluate on the test images."""
        self.trainer.test(**kwargs, weights_only=True)

    def finish(self, command: Sequence[str]) -> RunResult:
        """Test the best checkpoint, export the model and write the report."""
        return finish_run(
            task=self.model,
            data=self.datamodule,
            trainer=self.trainer,
            run_dir=cast(Path, self.run_dir),
            command=command,
            started=self.started,
            seed=self._get(self.config, "seed_everything"),
            train_s=self.stopwatch.train_s,
            images=self.stopwatch.images,
        )


def run(verb: str, arguments: Sequence[str]) -> None:
    """Run `fit`, `validate` or `test` with command-line arguments.

    Raises:
        UserError: for anything that the user can mend.
    """
    torch.set_float32_matmul_precision("high")
    expanded = expand_arguments(verb, arguments)
    check_checkpoint(expanded)
    cli = TrainingCLI([verb, *expanded])
    if verb != "fit" or cli.trainer.fast_dev_run:
        return
    command = ["moevision", verb, *arguments]
    result = cli.finish(command)
    if cli._get(cli.config, "with_twin"):
        result = _train_twin(cli, expanded, command, result)
    print(f"\n{result.headline}\nEverything is in {cli.run_dir}; start with {cli.run_dir}/summary.md", file=sys.stderr)


def check_checkpoint(arguments: Sequence[str]) -> None:
    """Raise a UserError if `--ckpt_path` names a file that is missing, damaged, or of another program."""
    joined = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--ckpt_path="))
    pairs = dict(pairwise(arguments))
    name = joined.get("--ckpt_path") or pairs.get("--ckpt_path")
    if name is None:
        return
    if not Path(name).is_file():
        raise UserError(f"There is no checkpoint {name}: look in runs/NAME/checkpoints/.")
    try:
        checkpoint = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and OS errors alike; the cause stays attached
        raise UserError(
            f"The checkpoint {name} can't be read ({type(error).__name__}): it is damaged, or no checkpoint. "
            "Use another one of the run, such as last.ckpt or best.ckpt."
        ) from error
    if "arch" not in checkpoint.get("hyper_parameters", {}):
        raise UserError(f"The checkpoint {name} was not written by moevision: use one from runs/NAME/checkpoints/.")


def _train_twin(cli: TrainingCLI, arguments: Sequence[str], command: Sequence[str], result: RunResult) -> RunResult:
    run_dir = cast(Path, cli.run_dir)
    folder = run_dir / "twin"
    folder.mkdir()
    if (run_dir / "splits.csv").is_file():
        shutil.copy(run_dir / "splits.csv", folder / "splits.csv")
    print("\nNow the dense twin, by the same recipe.", flush=True)
    twin = TrainingCLI(["fit", *arguments, "--model.arch.twin", "active_flops"], run_dir=folder)
    return write_comparison(result, twin.finish([*command, "--model.arch.twin", "active_flops"]))
