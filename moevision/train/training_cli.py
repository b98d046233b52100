"""`moevision fit | validate | test` for LightningCLI: a run folder, where training begins, and what watches it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.files import sync_file, sync_folder
from moevision.models.config import build_model
from moevision.names import shown
from moevision.train.allowlist import restrict_configurations
from moevision.train.callbacks import RunLogger, ScheduleCheck, Stopwatch
from moevision.train.checkpoint import SafeCheckpointIO, check_checkpoint
from moevision.train.console import SentenceParser
from moevision.train.finish import RunResult, finish_run
from moevision.train.optim import freeze_parameters
from moevision.train.processes import tell
from moevision.train.provenance import differences, fingerprint
from moevision.train.recipe import default_precision, describe_plan, memory_advice, new_run_folder, run_name
from moevision.train.resume import EpochEnd, ResumePoint, Session, Start, note_session, resume_command
from moevision.train.run_options import add_run_options, watching
from moevision.train.task import ClassificationTask

_NO_SUBTYPE = "Does not validate against any of the Union subtypes"  # jsonargparse's words
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "devices": 1,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the plan says it in one line
    "use_distributed_sampler": False,  # ImageDataModule shards by itself, and resumes where it stopped
}


class _KeptConfig(SaveConfigCallback):
    """Flushes the config to the disk: after a power cut a checkpoint without it could not be gone on from."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it as Lightning does, and flush it."""
        saves = not self.already_saved
        super().setup(trainer, pl_module, stage)
        if not saves:
            return
        file = Path(cast(str, trainer.log_dir)) / self.config_filename  # asking for it is a broadcast
        if trainer.is_global_zero:
            sync_file(file)
            sync_folder(file.parent)


class TrainingCLI(LightningCLI):
    """The three training verbs; one run folder holds everything that a `fit` leaves.

    Args:
        arguments: what LightningCLI reads.
        session: this process's share of the run.
        start: where training begins; None: the session finds out.
    """

    run_dir: Path | None = None

    def __init__(self, arguments: list[str], session: Session, start: Start | None = None) -> None:
        self.session, self.start = session, start
        self.files = SafeCheckpointIO()
        self.stopwatch = Stopwatch(session.clock)
        self.started = datetime.now(UTC)
        restrict_configurations()
        with self._no_trace_of_a_failed_start():
            super().__init__(
                ClassificationTask,
                ImageDataModule,
                args=arguments,
                trainer_defaults={**TRAINER_DEFAULTS, "precision": default_precision()},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                save_config_callback=_KeptConfig,
                save_config_kwargs={"overwrite": True},
                parser_class=SentenceParser,
                parser_kwargs={"prog": "moevision"},
            )

    @contextmanager
    def _no_trace_of_a_failed_start(self) -> Iterator[None]:
        """Take a new run folder away again if all ends before one batch was trained on: nothing of worth is in it."""
        try:
            yield
        except BaseException:
            self._forget_failed_start()
            raise

    def _forget_failed_start(self) -> None:
        if self.run_dir is not None and self.stopwatch.images == 0 and self.start is None:
            if self.session.processes.first:
                shutil.rmtree(self.run_dir, ignore_errors=True)
            self.session.interruption.command = None

    def _another_ended(self) -> str:
        self._forget_failed_start()
        return self.session.another_ended()

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
        add_run_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the arguments; a checkpoint among them is looked at before anything is made of it."""
        super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        name = settings["ckpt_path"]
        if settings["resume"] is not None:
            raise UserError("resume belongs on the command line, not into a config: moevision fit --resume RUN.")
        if name is not None and self.config["subcommand"] == "fit":
            run_dir = Path(name).parent.parent
            raise UserError(f"To go on with a training, give its folder: moevision fit --resume {run_dir}.")
        if name is not None:
            check_checkpoint(str(name))
        if self.start is None and self.config["subcommand"] == "fit":
            self.config, self.start = self.session.begin(parser, self.config)
        if self.start is not None and self.start.checkpoint is not None:  # the run's config stays as it is
            count = len(list(self.start.run_dir.glob("config*.yaml"))) + 1
            self.save_config_kwargs["config_filename"] = f"config-{count}.yaml"
            if not self.session.notes:
                self.save_config_callback = None

    def instantiate_classes(self) -> None:
        """Make what the configuration names, such as a strategy by the path of its class.

        Raises:
            UserError: if one of them doesn't take its arguments.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if _NO_SUBTYPE not in str(error):
                raise
            reasons = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
            raise UserError(f"The Trainer does not take these options: {'; '.join(reasons)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A Trainer that logs to and saves in the run folder."""
        name = self._get(self.config, "name") or run_name(self._get(self.config, "data")["path"])
        verb = str(self.subcommand)
        if self.start is not None:
            self.run_dir = self.start.run_dir
        else:
            name, root = name if verb == "fit" else f"{name}-{verb}", Path(self._get(self.config, "runs_root"))
            new = self.session.processes.decide(lambda: str(self.session.claim(new_run_folder(name, root))))
            self.run_dir = Path(new)
        trainer_config = self._get(self.config_init, "trainer")
        callbacks = list(trainer_config.get("callbacks") or [])
        if verb == "fit":
            self.point = self._resume_point()
            callbacks += [self.stopwatch, ScheduleCheck(), LearningRateMonitor("step"), self._checkpoints()]
            callbacks += watching(**{name: self._get(self.config_init, name) for name in ("fault", "ema", "guard")})
            callbacks = [self.point, *callbacks, EpochEnd(self.point)]
        try:
            trainer = super().instantiate_trainer(
                default_root_dir=str(self.run_dir),
                logger=trainer_config.get("logger") or RunLogger(self.run_dir),
                callbacks=callbacks,
                plugins=[*_as_list(trainer_config.get("plugins")), self.files],
                **kwargs,
            )
        except (MisconfigurationException, ValueError) as error:  # such as an accelerator that is not there
            raise UserError(f"The Trainer does not take these options: {error}") from error
        device = trainer.strategy.root_device
        try:  # one that a strategy's arguments name, which Lightning doesn't look at
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA has an assertion for it
            raise UserError(
                f"The device {device} can't be used ({' '.join(str(error).split())[:200]}): choose another one by "
                "--trainer.strategy, --trainer.accelerator or --trainer.devices."
            ) from error
        self.session.processes.watch(trainer, self._another_ended)
        return trainer

    def _checkpoints(self) -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=cast(Path, self.run_dir) / "checkpoints",
            filename="best",
            monitor="val/top1",
            mode="max",
            enable_version_counter=False,
        )

    def _resume_point(self) -> ResumePoint:
        run_dir, interruption = cast(Path, self.run_dir), self.session.interruption
        if interruption.command is None:  # the twin's turn comes when the run itself goes on
            interruption.command = resume_command(run_dir)
        every = self._get(self.config_init, "checkpoint")
        return ResumePoint(run_dir / "checkpoints", self.files, every, interruption, self.session.clock)

    def before_fit(self) -> None:
        """Read the data, build the model, and say what is going to happen."""
        self.datamodule.run_dir = self._split_folder()
        with self.session.processes.first_one_first():
            self.datamodule.setup("fit")
        fresh = self.start is None or self.start.checkpoint is None
        if not hasattr(self.model, "net"):  # what goes on from a checkpoint needs no pretrained weights
            self.model.build(self.datamodule.num_classes, self.datamodule.image_size, load_pretrained=fresh)
        if self._get(self.config, "with_twin"):  # better now than after the first training
            twin = replace(self.model.arch, twin="active_flops")
            with torch.random.fork_rng(devices=[]):  # the run must not depend on being compared
                net = build_model(twin, self.datamodule.num_classes, self.datamodule.image_size, load_pretrained=False)
                freeze_parameters(net, self.model.optim.freeze)
        if self.trainer.is_global_zero:
            print(self.datamodule.describe())
            with memory_advice(self.datamodule.batch_size, self.trainer.accumulate_grad_batches):
                print(describe_plan(self.model, self.datamodule, self.trainer))
            print(f"run folder: {shown(str(self.run_dir))}\n", flush=True)
        if not self.fast_dev_run:
            self._compare_with_start()

    def _compare_with_start(self) -> None:
        """Say what can't be as it was, before anything starts; and write down that training starts."""
        start = self.start or Start(cast(Path, self.run_dir))
        data = self.datamodule
        self.point.fingerprint = fingerprint(
            self.trainer, self.model, data.file_list_sha256(), data.file_sizes_sha256()
        )
        other = differences(start.fingerprint, self.point.fingerprint)
        if other:
            tell(f"warning: this can't end bit-identical to an uninterrupted run: {'; '.join(other)}.")
        if self.trainer.is_global_zero:
            note_session(start, self.session.command, [*self.session.notes, *other])

    def fit(self, **kwargs: Any) -> None:
        """Train; a checkpoint is never unpickled."""
        kwargs["ckpt_path"] = None if self.start is None else self.start.checkpoint
        strategy = self._get(self.config, "trainer")["strategy"]
        try:
            with memory_advice(self.datamodule.batch_size, self.trainer.accumulate_grad_batches):
                self.trainer.fit(**kwargs, weights_only=True)
        except Exception as error:  # a class of Lightning's fails in every type on arguments that don't fit
            if self.point.began or isinstance(strategy, str) or isinstance(error, (UserError, OSError)):
                raise
            name, reason = type(self.trainer.strategy).__name__, " ".join(str(error).split())[:200]
            raise UserError(
                f"The training can't begin under {name} ({type(error).__name__}: {reason}): mend its arguments, or say "
                "--trainer.strategy auto or ddp."
            ) from error

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

    def finish(self, command: Sequence[str]) -> RunResult | None:
        """Test the best checkpoint, export the model and write the report; None on all processes but the first."""
        return finish_run(
            task=self.model,
            data=self.datamodule,
            trainer=self.trainer,
            run_dir=cast(Path, self.run_dir),
            command=command,
            started=self.started,
            seed=self._get(self.config, "seed_everything"),
            duration_s=self.stopwatch.run_s,
            train_s=self.stopwatch.train_s,
            images=self.stopwatch.images,
        )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
