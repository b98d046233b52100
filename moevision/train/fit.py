"""`moevision fit | validate | test`: LightningCLI with a run folder, a FOLDER argument and a report at the end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from jsonargparse import ActionYesNo
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.models.config import build_model
from moevision.train.callbacks import ScheduleCheck, Stopwatch
from moevision.train.console import SentenceParser, quiet_lightning
from moevision.train.finish import RunResult, finish_run, write_comparison
from moevision.train.help import ALL
from moevision.train.optimizer import freeze_parameters
from moevision.train.plan import describe_plan, memory_advice
from moevision.train.recipe import default_precision, expand_arguments
from moevision.train.run_folder import check_checkpoint, new_run_folder
from moevision.train.task import ClassificationTask

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "devices": 1,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the plan says it in one line
    "use_distributed_sampler": False,  # ImageDataModule shards by itself, and resumes where it stopped
}


class TrainingCLI(LightningCLI):
    """The three training verbs; one run folder holds everything that a `fit` leaves."""

    run_dir: Path | None = None

    def __init__(self, arguments: list[str], run_dir: Path | None = None) -> None:
        self.run_dir = run_dir
        self.stopwatch = Stopwatch()
        self.started = datetime.now(UTC)
        with self._no_trace_of_a_failed_start():
            super().__init__(
                ClassificationTask,
                ImageDataModule,
                args=arguments,
                trainer_defaults={**TRAINER_DEFAULTS, "precision": default_precision()},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                save_config_kwargs={"overwrite": True},
                parser_class=SentenceParser,
                parser_kwargs={"prog": "moevision"},
            )

    @contextmanager
    def _no_trace_of_a_failed_start(self) -> Iterator[None]:
        """Take the run folder away again if all ends before one batch was trained on: nothing of worth is in it."""
        try:
            yield
        except BaseException:
            if self.run_dir is not None and self.stopwatch.images == 0:
                shutil.rmtree(self.run_dir, ignore_errors=True)
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and the Trainer arguments that the command line supplies itself."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
        }

    @property
    def fast_dev_run(self) -> bool:
        """Whether this is only a test that everything runs, which leaves nothing to report."""
        return bool(self._get(self.config, "trainer")["fast_dev_run"])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of our own."""
        parser.add_argument("--name", type=str, default=None, help="Name of the run folder, runs/NAME.")
        parser.add_argument(
            "--with-twin",
            action=ActionYesNo(yes_prefix="with-", no_prefix="without-"),
            help="Train the dense twin by the same recipe too, and compare both on the same test images.",
        )
        parser.add_argument("--runs_root", type=str, default="runs", help="The folder in which run folders are made.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the arguments; a checkpoint among them is looked at before anything is made of it."""
        super().parse_arguments(parser, args)
        name = self.config[self.config["subcommand"]]["ckpt_path"]
        if name is not None:
            check_checkpoint(str(name))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A Trainer that logs to and saves in the run folder."""
        name = self._get(self.config, "name") or Path(self._get(self.config, "data")["path"]).resolve().name
        verb = str(self.subcommand)
        if self.run_dir is None:
            self.run_dir = new_run_folder(
                name if verb == "fit" else f"{name}-{verb}", Path(self._get(self.config, "runs_root"))
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        trainer_config = self._get(self.config_init, "trainer")
        callbacks = list(trainer_config.get("callbacks") or [])
        if verb == "fit":
            callbacks += [self.stopwatch, ScheduleCheck(), LearningRateMonitor("step"), self._checkpoints()]
        try:
            return super().instantiate_trainer(
                default_root_dir=str(self.run_dir),
                logger=trainer_config.get("logger") or CSVLogger(self.run_dir, name="", version=""),
                callbacks=callbacks,
                **kwargs,
            )
        except (MisconfigurationException, ValueError) as error:  # such as an accelerator that is not there
            raise UserError(f"The Trainer does not take these options: {error}") from error

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
        self.datamodule.run_dir = self._split_folder()
        self.datamodule.setup("fit")
        if not hasattr(self.model, "net"):  # a checkpoint's model is built already, and needs no pretrained weights
            self.model.build(self.datamodule.num_classes, self.datamodule.image_size)
        if self._get(self.config, "with_twin"):  # better now than after the first training
            twin = replace(self.model.arch, twin="active_flops")
            with torch.random.fork_rng(devices=[]):  # the run must not depend on being compared
                net = build_model(twin, self.datamodule.num_classes, self.datamodule.image_size, load_pretrained=False)
                freeze_parameters(net, self.model.optim.freeze)
        print(self.datamodule.describe())
        with memory_advice(self.datamodule.batch_size, self.trainer.accumulate_grad_batches):
            print(describe_plan(self.model, self.datamodule, self.trainer))
        print(f"run folder: {self.run_dir}\n", flush=True)

    def fit(self, **kwargs: Any) -> None:
        """Train; a checkpoint is never unpickled."""
        with memory_advice(self.datamodule.batch_size, self.trainer.accumulate_grad_batches):
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

    def _split_folder(self) -> Path:
        """The run folder, with the split of the run whose checkpoint is used, if there is one."""
        run_dir = cast(Path, self.run_dir)
        checkpoint = self._get(self.config, "ckpt_path")
        origin = Path(checkpoint).parent.parent / "splits.csv" if checkpoint else None
        if origin is not None and origin.is_file():
            shutil.copy(origin, run_dir / "splits.csv")
        return run_dir

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
    SentenceParser.show_all = ALL in arguments
    arguments = ["--help" if argument == ALL else argument for argument in arguments]
    expanded = expand_arguments(verb, arguments)
    with quiet_lightning():
        cli = TrainingCLI([verb, *expanded])
        run_dir = cast(Path, cli.run_dir)
        if cli.fast_dev_run:  # logs nothing and saves nothing
            shutil.rmtree(run_dir)
            return
        if verb != "fit":
            return
        command = ["moevision", verb, *arguments]
        result = cli.finish(command)
        if cli._get(cli.config, "with_twin"):
            result = _train_twin(cli, expanded, command, result)
    print(f"\n{result.headline}\nEverything is in {run_dir}; start with {run_dir}/summary.md", file=sys.stderr)


def _train_twin(cli: TrainingCLI, arguments: Sequence[str], command: Sequence[str], result: RunResult) -> RunResult:
    run_dir = cast(Path, cli.run_dir)
    folder = run_dir / "twin"
    folder.mkdir()
    if (run_dir / "splits.csv").is_file():
        shutil.copy(run_dir / "splits.csv", folder / "splits.csv")
    print("\nNow the dense twin, by the same recipe.", flush=True)
    options = ["--model.arch.twin", "active_flops", "--without-twin"]
    resumed = cli._get(cli.config, "ckpt_path")
    if resumed:  # the twin goes on where it stopped, or begins if its turn had not come
        own = Path(resumed).parent.parent / "twin" / "checkpoints" / Path(resumed).name
        options += ["--ckpt_path", str(own) if own.is_file() else "null"]
    twin = TrainingCLI(["fit", *arguments, *options], run_dir=folder)
    # Experts that start as copies have the full width each, and the twin is the dense model they are copies of.
    match = "active FLOPs" if cli.model.arch.pretrained is None else "pretrained weights, but fewer FLOPs"
    return write_comparison(result, twin.finish([*command, *options]), match)
