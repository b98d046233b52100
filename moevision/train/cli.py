"""`moevision fit | validate | test` for LightningCLI: what the command line reads, and the training that it sets up.

A configuration is data, not a program. jsonargparse imports whatever a `class_path` or a function-valued option
names, and importing a module runs it. Here only Lightning's own parts and `moevision.train` may be imported; anything
else is refused before its import. A configuration can't be fetched from an address, nor use YAML's anchors, whose few
lines can stand for billions of values. Own classes work from Python: `Trainer(callbacks=[Mine()])`.
"""

from __future__ import annotations

import difflib
import logging
import re
import secrets
import shlex
import shutil
import sys
import warnings
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import lightning as L
import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import ActionYesNo, get_loader, set_loader, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger

from moevision.config import (
    CheckpointConfig,
    EarlyStoppingConfig,
    EmaConfig,
    GuardConfig,
    ParallelConfig,
    RecordRoutingConfig,
)
from moevision.data import ImageDataModule
from moevision.data.sources import DATASET_NAMES
from moevision.data.tables import HF
from moevision.errors import SEED, USER_ERROR, DataWarning, UserError, check_ranges
from moevision.files import newest_config, sync_file, sync_folder
from moevision.layers import moe_layers
from moevision.models.config import build_model, dense_start, keep_start
from moevision.models.safe_files import parse_yaml, read_yaml
from moevision.models.upcycle import START_IMAGES, start_routers
from moevision.names import shown
from moevision.train.calibration import Calibrate
from moevision.train.callbacks import RouterHealth, RunLogger, ScheduleCheck, StopEarly, Stopwatch, TimeLeft
from moevision.train.checkpoint import START, SafeCheckpointIO, check_checkpoint
from moevision.train.devices import trains_on
from moevision.train.guard import StabilityGuard
from moevision.train.loggers import MAX_KEYS, log_routers
from moevision.train.memory import check_memory, describe_memory
from moevision.train.optim import WeightEMA, freeze_parameters
from moevision.train.probe import fit_probe, start_with
from moevision.train.processes import tell
from moevision.train.provenance import differences, fingerprint
from moevision.train.recipe import (
    accelerator_of,
    default_precision,
    describe_plan,
    epoch_batches,
    expected_seconds,
    memory_advice,
    new_run_folder,
    refuse_among_images,
    run_name,
    run_of_checkpoint,
)
from moevision.train.record import RecordRouting
from moevision.train.report import BALANCED, is_unbalanced
from moevision.train.resume import EpochEnd, ResumePoint, Session, Start, note_session
from moevision.train.scores import ExampleScores
from moevision.train.strategy import MoEParallelStrategy, check_fit, describe_parallel, strategy_of
from moevision.train.task import ClassificationTask, check_trainer

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
# A class is imported by the name that is written and checked again by the module that it is defined in, hence fabric.
ALLOWED = (
    "moevision.train",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
    "lightning.fabric.loggers",
)
_YAML = get_loader("yaml")
ALL = "--help-all"
# What most people change; `--help-all` shows the rest.
SHORT = frozenset(
    [
        "help",
        "config",
        "print_config",
        "seed_everything",
        "name",
        "with_twin",
        "runs_root",
        "ckpt_path",
        "resume",
        "trainer.max_epochs",
        "trainer.accelerator",
        "trainer.devices",
        "parallel.layout",
        "parallel.expert",
        "trainer.precision",
        "trainer.accumulate_grad_batches",
        "model.arch.name",
        "model.arch.pretrained",
        "model.arch.num_experts",
        "model.arch.top_k",
        "model.arch.router",
        "model.arch.moe_layers",
        "model.optim.lr",
        "model.optim.freeze",
        "model.compile",
        "data.path",
        "data.image_size",
        "data.batch_size",
        "data.num_workers",
        "data.augment",
        "data.crop",
        "data.mixup",
        "data.group_by",
        "early_stopping.patience",
        "record_routing.images",
        "log_routers",
    ]
)
_ABOUT = {
    "fit": "Train a model on a folder of images, a dataset or a config; everything that it leaves is in runs/NAME/.",
    "validate": "Evaluate a checkpoint on the validation images, by its run's config.yaml unless --config is given.",
    "test": "Evaluate a checkpoint on the test images, by its run's config.yaml unless --config is given.",
}
# What changes an evaluation; the model, its training and the split are those of the run.
_EVALUATION = frozenset(
    [
        "help",
        "config",
        "print_config",
        "name",
        "runs_root",
        "ckpt_path",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.precision",
        "model.compile",
        "data.path",
        "data.batch_size",
        "data.num_workers",
    ]
)
_TRAIN = """\
  moevision fit --config quickstart
  moevision fit path/to/images --pretrained auto --with-twin
  moevision fit path/to/images --model.arch.num_experts 16 --model.arch.router expert_choice
"""
_EVALUATE = """\
  moevision {verb} --ckpt_path runs/pets/checkpoints/best.ckpt
"""
_START = """\
a pretrained start (fit FOLDER; by default below 20,000 images)
  --pretrained auto     weights that fit this device, from the hub's cache or downloaded unasked; a computer without a
                        network starts from scratch. Without --pretrained it asks on a terminal, and elsewhere takes
                        only what the cache has.
  --pretrained NAME     any timm ViT with plain MLPs, such as deit_tiny_patch16_224; also hf-hub:USER/NAME.
  --pretrained FILE     a .safetensors file in timm's names; its architecture is found out, or --model.arch.base NAME.
  --pretrained FOLDER   what timm or moevision saved.
  --pretrained none     from scratch.
  --dense               fine-tune the dense model, without experts; --with-twin trains both and says which to use.

in short
  --compile             --model.compile true: torch.compile for each block, for long trainings on a GPU (not measured).
  --force               --check_memory false: train a model that seems too large for the memory all the same.

"""
_BELOW = """\
{start}examples
{examples}
exit codes: 0 done; 2 something that you can mend, the last line says what; {diverged}130 Ctrl-C,
129 terminal closed, 143 SIGTERM, 138 SIGUSR1{saved}.

{all} shows every option: other routers' knobs (capacity, noise, shared experts), balance losses, data, Trainer.
"""
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)", re.IGNORECASE)
_KEY = re.compile(r'Parser key "([^"]+)":')
_VALUE = re.compile(r"(?:Got|Given) value: (.*)")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value.*)?$", re.MULTILINE)
_DENIED = re.compile(r"Importing '([^']+)' is not allowed")
_NOT_ACCEPTED = re.compile(r"does not accept option '([^']+)'")
# Lightning's warnings about what the verbs chose on purpose, or what nobody at the command line can change.
_CHATTER = (
    "LightningCLI's args parameter",  # we read the command line ourselves and hand it on
    "Experiment logs directory .* exists and is not empty",  # splits.csv lies there already; no log is deleted
    "The '.*dataloader' does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    r"(?s)\s.*(JsonargparseDeprecationWarning|was deprecated in v\d|instantiate_classes)",  # Lightning's own calls
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # evaluation needs none
    "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    r".ModelCheckpoint\(monitor='val/\w+'\). could not find the monitored key",  # a training of less than an epoch
    "You're resuming from a checkpoint that ended before the epoch ended",  # ImageDataModule can
    r"It is recommended to use .self\.log\('(val|test|moe)/.*, sync_dist=True",  # torchmetrics has summed them up
    r".isinstance\(treespec, LeafSpec\). is deprecated",
)


def _load_plain_yaml(text: str) -> Any:
    """Plain values, without the option that every run's config.yaml of version 0.1 has and that nobody set."""
    found = parse_yaml(text, load=_YAML)
    if isinstance(found, dict) and found.get("fault", "") is None:
        del found["fault"]
    return found


def restrict_configurations() -> None:
    """Let this process's configurations name nothing but `ALLOWED`, and hold nothing but plain values.

    It holds for all of jsonargparse in this process, so that only the command line calls it.
    """
    set_parsing_settings(
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,  # Lightning's command line turns it on
        import_path_denylist=["*"],
        import_path_allowlist=list(ALLOWED),
    )
    set_loader("yaml", _load_plain_yaml, exceptions=(yaml.YAMLError, RecursionError))


def hide_rare_options(parser: LightningArgumentParser) -> None:
    """Leave only what most people change in the help of a training verb."""
    verb = verb_of(parser)
    short = SHORT - {"ckpt_path"} if verb == "fit" else _EVALUATION
    for action in parser._actions:
        if action.dest not in short:
            action.help = SUPPRESS
        elif action.dest == "ckpt_path":  # Lightning's words are of keywords that mean nothing here
            action.help = "The checkpoint, such as runs/pets/checkpoints/best.ckpt."
    for group in parser._action_groups:
        if not any(action.dest in short for action in group._group_actions):
            group.description = None
        elif any(action.dest == "ckpt_path" for action in group._group_actions):  # that method's docstring, cut off
            group.title = "What is evaluated"
    needs = "[--config NAME]" if verb == "fit" else "--ckpt_path FILE"
    parser.usage = f"moevision {verb} [FOLDER] {needs} [options]"
    parser.description = _ABOUT[verb]


def verb_of(parser: LightningArgumentParser) -> str:
    """`fit`, `validate` or `test`."""
    return parser.prog.split()[-1]


def examples(verb: str) -> str:
    """What stands below the short help."""
    trains = verb == "fit"
    return _BELOW.format(
        start=_START if trains else "",
        examples=(_TRAIN if trains else _EVALUATE).format(verb=verb),
        all=ALL,
        diverged="3 diverged, see divergence.md; " if trains else "",
        saved=": saved, the last line goes on with it" if trains else "",
    )


class SentenceParser(LightningArgumentParser):
    """A parser that names the mistake in one sentence, with the option that was probably meant.

    Its help shows what most people need, unless `show_all` is set.
    """

    show_all = False

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The short help of a verb, or the long one."""
        if " " not in self.prog:
            return str(super().format_help(formatter))
        if SentenceParser.show_all:
            return f"{super().format_help(formatter)}\n{_START if verb_of(self) == 'fit' else ''}".rstrip() + "\n"
        hide_rare_options(self)
        return f"{super().format_help(formatter)}\n{examples(verb_of(self))}"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and leave with the exit code of a user's mistake."""
        if not self.exit_on_error:  # a helper parser of jsonargparse's own, whose caller tries something else then
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        verb = parser.prog.replace(" [options]", "")
        print(shown(f"moevision: {explain(message, options_of(parser))} See {verb} --help."), file=sys.stderr)
        self.exit(USER_ERROR)


def options_of(parser: LightningArgumentParser) -> list[str]:
    """All long options of a parser and of its verbs, without their dashes."""
    actions: list[Action] = list(parser._actions)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            actions += [inner for verb in action.choices.values() for inner in verb._actions]
    names = {name.removeprefix("--") for action in actions for name in action.option_strings if name.startswith("--")}
    return sorted(names)


def explain(message: str, options: list[str]) -> str:
    """The parser's message as one sentence; for an unknown option with its near ones.

    Args:
        message: what the parser found, in one or more lines.
        options: all options there are, without dashes.
    """
    if match := _DENIED.search(message):
        return (
            f"{match[1]!r} is not imported: options and configurations name only parts of Lightning and of "
            "moevision.train; use your own classes from Python."
        )
    if (match := _UNRECOGNIZED.search(message)) and not match[1].startswith("-"):
        return f"{match[1]!r} stands where an option is expected: a folder comes right after the verb."
    if match := match or _NOT_ACCEPTED.search(message):
        return _unknown_option(match[1].split("=")[0].lstrip("-"), options)
    if (key := _KEY.search(message)) and (value := _VALUE.search(message)):
        kinds = dict.fromkeys(_kind(kind) for kind in _EXPECTED.findall(message))
        return f"--{key[1]} is {value[1]!r}: it must be {' or '.join(kinds)}."
    return " ".join(message.split()).rstrip(".") + "."


def _kind(kind: str) -> str:
    """A type as people write its values: `<class 'int'>` -> int, `typing.Literal['a', 'b']` -> 'a', 'b'."""
    inner = re.fullmatch(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", kind)
    name = next(filter(None, inner.groups())) if inner else kind
    return "null" if name == "NoneType" else name


def _unknown_option(key: str, options: list[str]) -> str:
    near = difflib.get_close_matches(key, options, n=3)
    if not near:  # a mistyped group has its last part in common with the right one
        near = [name for name in options if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:3]
    hint = f", did you mean {', '.join(near)}?" if near else "."
    return f"there is no option {key!r}{hint}"


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's advertising and its remarks on deliberate choices; other warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _CHATTER:
            warnings.filterwarnings("ignore", message=message)
        warnings.simplefilter("ignore", DataWarning)  # the description of the data says it too
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def add_run_options(parser: LightningArgumentParser) -> None:
    """Resuming, checkpoints, guard, moving average, the name of the run and its twin."""
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="Resume an interrupted run: its folder, such as runs/pets; or auto: the run folder of this very "
        "command, if a valid checkpoint is there, else a fresh start. Images are compared with the run's by path, "
        "label and file size, not by content. For fit, on the command line only.",
    )
    parser.add_class_arguments(ParallelConfig, "parallel")
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    parser.add_class_arguments(GuardConfig, "guard")
    parser.add_class_arguments(EmaConfig, "ema")
    parser.add_class_arguments(EarlyStoppingConfig, "early_stopping")
    parser.add_class_arguments(RecordRoutingConfig, "record_routing")
    parser.add_argument(
        "--router_start",
        type=Literal["random", "cluster"],
        default="random",
        help="With --pretrained: routers start at random, or from clusters of what some training images give them, so "
        "that every expert is used from the first step on.",
    )
    parser.add_argument(
        "--log_routers",
        type=Literal["brief", "layers"],
        default="brief",
        help="What a logger of --trainer.logger gets about the routers: brief (worst load, mean entropy, dead experts "
        f"over all layers) or layers (each of them, up to {MAX_KEYS} numbers). metrics.csv always has all.",
    )
    parser.add_argument("--name", type=str, default=None, help="Name of the run folder, runs/NAME.")
    parser.add_argument(
        "--with-twin",
        action=ActionYesNo(yes_prefix="with-", no_prefix="without-"),
        help="Train the dense twin by the same recipe too, and compare both on the same test images.",
    )
    parser.add_argument(
        "--check_memory",
        type=bool,
        default=True,
        help="Refuse a model whose weights, gradients and moments alone are larger than the memory.",
    )
    parser.add_argument("--runs_root", type=str, default="runs", help="The folder in which run folders are made.")


def watching(ema: EmaConfig, guard: GuardConfig) -> list[L.Callback]:
    """Moving average, guard, router health, in this order: each sees what those before it did."""
    average = [WeightEMA(ema)] if ema.decay is not None else []
    guards = [StabilityGuard(guard)] if guard.enabled else []
    return [*average, *guards, RouterHealth()]


class _KeptConfig(SaveConfigCallback):
    """Flushes the config to the disk: without it a checkpoint could not be resumed after a power cut."""

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
        arguments: what LightningCLI reads, the verb first.
        session: this process's share of the run.
        start: where training begins; None: the session finds out.
    """

    run_dir: Path | None = None
    expected_s: float | None = None  # how long the training should take, as it was said before

    def __init__(self, arguments: list[str], session: Session, start: Start | None = None) -> None:
        self.session, self.start = session, start
        self.verb = arguments[0]
        self.files = SafeCheckpointIO()
        self.stopwatch = Stopwatch(session.clock)
        self.started = datetime.now(UTC)
        restrict_configurations()
        # `auto` would take Apple's GPU, which `instantiate_trainer` refuses.
        apple = {"accelerator": "cpu"} if torch.backends.mps.is_available() else {}
        with self._no_trace_of_a_failed_start(), trains_on(accelerator_of(arguments)):
            super().__init__(
                ClassificationTask,
                ImageDataModule,
                args=arguments,
                trainer_defaults={**TRAINER_DEFAULTS, **apple, "precision": default_precision()},
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
        """Remove a new run folder if everything ends before one batch was trained on."""
        try:
            yield
        except BaseException:
            self._forget_failed_start()
            raise

    def _forget_failed_start(self) -> None:
        new = self.run_dir is not None and self.stopwatch.images == 0 and self.start is None
        if new and self.session.processes.first:
            shutil.rmtree(cast(Path, self.run_dir), ignore_errors=True)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning asks the object
        """The verb that was asked for alone, since each costs a parser of all options.

        With the Trainer arguments that the command line supplies itself.
        """
        loaders = {"train_dataloaders", "val_dataloaders"} if self.verb == "fit" else {"dataloaders"}
        return {self.verb: {"model", "datamodule", "weights_only", *loaders}}

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
            run_dir = shlex.quote(str(Path(name).parent.parent))
            raise UserError(f"To resume a training, give its folder: moevision fit --resume {run_dir}.")
        if name is not None:
            check_checkpoint(str(name))
        if self.start is None and self.config["subcommand"] == "fit":
            self.config, self.start = self.session.begin(parser, self.config)
        if self.start is not None and self.start.checkpoint is not None:  # the run's config stays as it is
            count = len(list(self.start.run_dir.glob("config*.yaml"))) + 1
            self.save_config_kwargs["config_filename"] = f"config-{count}.yaml"
            if not self.session.notes:
                self.save_config_callback = None

    def _parse_ckpt_path(self) -> None:
        """Take the model's options from the checkpoint; its sizes are left to `_before_evaluation`, which builds it."""
        super()._parse_ckpt_path()
        if self.config["subcommand"] != "fit":
            model = self.config[self.config["subcommand"]]["model"]
            self.known_sizes = model["num_classes"], model["image_size"]
            model["num_classes"] = model["image_size"] = None

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

    def _set_seed(self) -> None:
        """Draw a seed for `true`, for which Lightning takes 0."""
        settings = self.config[str(self.subcommand)]
        if settings["seed_everything"] is True:
            settings["seed_everything"] = self.session.processes.decide(lambda: secrets.randbelow(2**31))
        check_ranges(settings, [(*SEED, ("seed_everything",))], "--")
        super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A Trainer that logs to and saves in the run folder."""
        name = self._get(self.config, "name") or run_name(self._get(self.config, "data")["path"])
        verb = str(self.subcommand)
        if self.start is not None:
            self.run_dir = self.start.run_dir
        else:
            name, root = name if verb == "fit" else f"{name}-{verb}", Path(self._get(self.config, "runs_root"))
            images = self._get(self.config, "data")["path"]

            def new() -> str:
                refuse_among_images(root / name, images)
                return str(self.session.claim(new_run_folder(name, root)))

            self.run_dir = Path(self.session.processes.decide(new))
        trainer_config = self._get(self.config_init, "trainer")
        if verb == "fit":  # one process suffices to evaluate
            kwargs |= strategy_of(self._get(self.config_init, "parallel"), trainer_config.get("strategy"))
        callbacks = list(trainer_config.get("callbacks") or [])
        if verb == "fit":
            self.point, self.best = self._resume_point(), self._checkpoints()
            callbacks += [
                self.stopwatch,
                TimeLeft(self.session.clock),
                ScheduleCheck(),
                LearningRateMonitor("step"),
                self.best,
            ]
            callbacks += [*StopEarly.of(self._get(self.config_init, "early_stopping")), Calibrate(), ExampleScores()]
            callbacks += watching(**{name: self._get(self.config_init, name) for name in ("ema", "guard")})
            callbacks += RecordRouting.of(self._get(self.config_init, "record_routing"), self.run_dir)
            callbacks = [self.point, *callbacks, EpochEnd(self.point)]
        try:
            trainer = super().instantiate_trainer(
                default_root_dir=str(self.run_dir),
                # the first one: Lightning takes the run folder from it
                logger=[RunLogger(self.run_dir), *self._other_loggers(trainer_config.get("logger"))],
                callbacks=callbacks,
                plugins=[*_as_list(trainer_config.get("plugins")), self.files],
                **kwargs,
            )
        except (MisconfigurationException, ValueError, ImportError) as error:  # such as an accelerator that isn't there
            raise UserError(f"The Trainer does not take these options: {error}") from error
        if (divided := MoEParallelStrategy.of(trainer)) is not None:
            divided.check(trainer)
        # On CUDA TF32 where all is float32. What autocast leaves in float32, such as routers, needs its digits.
        torch.set_float32_matmul_precision("high" if trainer.precision == "32-true" else "highest")
        device = trainer.strategy.root_device
        if device.type == "mps":
            raise UserError(
                "Apple's GPU can't be used: it has no float64, which the statistics of routing need. "
                "Use --trainer.accelerator cpu."
            )
        try:  # one that a strategy's arguments name, which Lightning doesn't look at
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA has an assertion for it
            raise UserError(
                f"The device {device} can't be used ({' '.join(str(error).split())[:200]}): choose another one by "
                "--trainer.strategy, --trainer.accelerator or --trainer.devices."
            ) from error
        self.session.processes.watch(trainer, self._forget_failed_start)
        return trainer

    def _other_loggers(self, asked: Any) -> list[Logger]:
        """What --trainer.logger names, besides metrics.csv."""
        per_layer = self._get(self.config, "log_routers") == "layers"
        return [log_routers(logger, per_layer=per_layer) for logger in _as_list(asked) if isinstance(logger, Logger)]

    def _checkpoints(self) -> ModelCheckpoint:
        return ModelCheckpoint(
            dirpath=cast(Path, self.run_dir) / "checkpoints",
            filename="best",
            monitor="val/top1",  # `_choose_monitor` knows the classes
            mode="max",
            enable_version_counter=False,
        )

    def _choose_order(self) -> None:
        """Another --seed_everything is another order, too; config.yaml keeps it for a run that goes on.

        A run of an earlier version goes on as it began: there the order followed --data.seed.
        """
        settings = self._get(self.config, "data")
        if self._fresh and settings["order_seed"] is None:
            seed = self._get(self.config, "seed_everything")
            settings["order_seed"] = self.datamodule.order_seed = None if seed is False else seed

    def _choose_monitor(self) -> None:
        """What best.ckpt, early stopping and the headline go by; config.yaml keeps it for a run that goes on."""
        settings, early = (self._get(self.config, name) for name in ("checkpoint", "early_stopping"))
        counts = self.datamodule.class_counts["train"].values()
        if settings["monitor"] is None:
            # A run of an earlier version goes on as it began.
            settings["monitor"] = BALANCED if self._fresh and is_unbalanced(counts) else "val/top1"
            if settings["monitor"] == BALANCED and self.trainer.is_global_zero:
                print(
                    f"Classes have {min(counts):,} to {max(counts):,} training images: best.ckpt is chosen by "
                    "val/balanced_acc, the mean recall of the classes (--checkpoint.monitor val/top1: by accuracy)."
                )
        self.monitor = settings["monitor"]
        for callback in cast(Any, self.trainer).callbacks:
            follows = isinstance(callback, StopEarly) and early["monitor"] is None
            if follows or callback is self.best:
                callback.monitor = self.monitor

    def _resume_point(self) -> ResumePoint:
        run_dir, interruption = cast(Path, self.run_dir), self.session.interruption
        if self.session.run_dir is None:  # the twin's turn comes when the run itself goes on
            self.session.run_dir = run_dir
        every = self._get(self.config_init, "checkpoint")
        return ResumePoint(run_dir / "checkpoints", self.files, every, interruption, self.session.clock)

    def before_fit(self) -> None:
        """Read the data, build the model, and print the plan."""
        if self._fresh and self._get(self.config, "router_start") == "cluster" and self.model.arch.pretrained is None:
            raise UserError(
                "--router_start cluster begins with clusters of what pretrained layers compute: say --pretrained too, "
                "or leave it out."
            )
        check_trainer(self.trainer)
        self._choose_order()
        self.datamodule.run_dir = self._split_folder()
        self._read_data()
        self._keep_the_step()
        self._check_limits("train", "val", "test")
        self._check_interval()
        self._build()
        while self.session.lines:  # the twin says nothing of its start, which is the run's
            line = self.session.lines.pop(0)
            if self._fresh:
                tell(line)
        if self.trainer.is_global_zero:
            print(self.datamodule.describe(), flush=True)
        self._choose_monitor()
        if self.trainer.is_global_zero:
            self._print_plan(before_s=self._prepare_weights())
        if not self.fast_dev_run:
            self._compare_with_start()

    def _read_data(self) -> None:
        data = self.datamodule
        data.processes = self.trainer.num_devices
        try:
            with self.session.processes.first_one_first():
                data.setup(str(self.subcommand))
        except UserError as error:
            known = data.path in DATASET_NAMES or data.path.startswith(HF) or Path(data.path).expanduser().exists()
            if known or (self.subcommand == "fit" and self._fresh):
                raise
            raise UserError(f"{str(error).rstrip('.')}; --data.path says where the run's images are now.") from error

    def _check_limits(self, *splits: str) -> None:
        """Refuse what Lightning would refuse later, after the training even: shares of these splits without a batch."""
        trainer, data = self.trainer, self.datamodule
        for split in splits:
            images = sum(data.class_counts.get(split, {}).values())
            held_out = ceil(images / (data.batch_size * trainer.world_size))
            batches = data.train_batches(trainer.world_size) if split == "train" else held_out
            limit = getattr(trainer, f"limit_{split}_batches")
            if isinstance(limit, float) and 0 < limit * batches < 1:
                raise UserError(f"--trainer.limit_{split}_batches {limit} leaves none of {batches} batches: raise it.")

    def _check_interval(self) -> None:
        """Refuse to validate after more batches than an epoch has."""
        trainer, batches = self.trainer, epoch_batches(self.datamodule, self.trainer)
        interval = trainer.val_check_interval
        if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and interval > batches:
            raise UserError(
                f"--trainer.val_check_interval {interval} is more than the {batches} batches of an epoch: lower it, or "
                "count over epochs, with --trainer.check_val_every_n_epoch null."
            )

    @property
    def _fresh(self) -> bool:
        """Whether training begins, and doesn't go on from a checkpoint."""
        return self.start is None or self.start.checkpoint is None

    @property
    def _kept(self) -> Path:
        """Where what the pretrained weights are of is kept for the run's checkpoints."""
        return cast(Path, self.run_dir) / "checkpoints" / START

    @property
    def _clusters(self) -> bool:
        """Whether the routers begin with clusters of their input."""
        return self._get(self.config, "router_start") == "cluster" and bool(moe_layers(self.model.net))

    def _build(self) -> None:
        """Make the model, and refuse what would fail in the training, or after it with the twin."""
        sizes = self.datamodule.num_classes, self.datamodule.image_size
        outlined = not hasattr(self.model, "net")
        if outlined:
            with torch.device("meta"):
                self.model.build(*sizes, load_pretrained=False, kept=self._kept)
        if self._get(self.config, "check_memory"):  # before memory is taken for it
            check_memory(self.model, self.trainer, goes_on=not self._fresh)
        if outlined:  # what goes on from a checkpoint needs no pretrained weights
            self.model.build(*sizes, load_pretrained=self._fresh, kept=self._kept)
            if self._fresh and self.trainer.is_global_zero:
                keep_start(self.model.arch, self._kept)
        if self._clusters:  # said in the saved model, also by a run that goes on from a checkpoint
            cast(Any, self.model.net).router_start = "cluster"
        if self._get(self.config, "with_twin"):
            with torch.random.fork_rng(devices=[]):  # the run must not depend on being compared
                twin = replace(self.model.arch, twin="active_flops")
                net = build_model(twin, *sizes, load_pretrained=False, kept=self._kept)
                freeze_parameters(net, self.model.optim.freeze)
        records = self._get(self.config, "record_routing")["images"] is not None
        check_fit(self.trainer, self.model, self.datamodule, records=records)

    def _prepare_weights(self) -> float:
        """Fit head and routers to a pretrained start; seconds that it took."""
        began_s = self.stopwatch.run_s
        if self._fresh and self.model.arch.pretrained is not None and not self.fast_dev_run:
            self._start_with_probe()
            if self._clusters:
                self._start_from_clusters()
        return self.stopwatch.run_s - began_s

    def _print_plan(self, before_s: float) -> None:
        with self._memory_advice():
            steps_s = None if self._divided else expected_seconds(self.model, self.datamodule, self.trainer)
            self.expected_s = None if steps_s is None else before_s + steps_s
            needed = describe_memory(self.model, self.trainer)
            print(describe_plan(self.model, self.datamodule, self.trainer, steps_s, needed, before_s))
            if (line := describe_parallel(self.trainer, self.model.net)) is not None:
                print(line)
        print(f"run folder: {shown(str(self.run_dir))}\n", flush=True)

    def _memory_advice(self) -> AbstractContextManager[None]:
        batch, accumulated = self.datamodule.batch_size, self.trainer.accumulate_grad_batches
        return memory_advice(batch, accumulated, goes_on=not self._fresh)

    def _keep_the_step(self) -> None:
        """On another number of processes: sum the gradients of as many batches as make a step of as many images."""
        known = {} if self.start is None else self.start.fingerprint
        images, at_once = known.get("images_per_step", 0), self.datamodule.batch_size * self.trainer.world_size
        parts = images // at_once
        if parts and not images % at_once and parts != self.trainer.accumulate_grad_batches:
            if self.trainer.accumulate_grad_batches == 1 and self.trainer.limit_train_batches == 1.0:
                # An epoch had whole steps only: it doesn't get a part of one at its end.
                batches = sum(self.datamodule.class_counts["train"].values()) // at_once
                self.trainer.limit_train_batches = max(parts, batches // parts * parts)
            self.trainer.accumulate_grad_batches = parts
            tell(f"note: a step sums the gradients of {parts} batches of a process: it has {images} images, as before.")

    @property
    def _divided(self) -> bool:
        """Whether processes share the model, so that the whole of it may not fit a device."""
        return MoEParallelStrategy.of(self.trainer) is not None

    @property
    def _device_before(self) -> torch.device:
        """Where the first process computes before the training begins."""
        return torch.device("cpu") if self._divided else self.trainer.strategy.root_device

    def _start_with_probe(self) -> None:
        """Head first: the classifier begins as a linear probe of the frozen features, which is reported too.

        In the first process alone: the others get its weights when the training begins.
        """
        known = self.session.probe
        if known is None:
            known = fit_probe(
                self._pretrained_net(),
                self.datamodule,
                self._device_before,
                self.trainer.strategy.precision_plugin.forward_context,
                self.session.clock.now,
            )
        else:  # the run's, which has its time: without it the twin would look the sooner trained
            self.stopwatch.add(known.seconds, known.cpu_s)
        if known is None:
            return
        self.session.probe = known
        if known.beats_the_head:
            start_with(self.model.net, known)
        known.write(cast(Path, self.run_dir))
        print(known.sentence(), flush=True)

    def _pretrained_net(self) -> torch.nn.Module:
        """The weights as they came: noise on copies, capacities and some routers make other features of them."""
        if moe_layers(self.model.net):
            with torch.random.fork_rng(devices=[]):  # its new classifier is drawn, too
                dense = dense_start(self.model.arch, self.datamodule.num_classes, self.datamodule.image_size)
            if dense is not None:
                return dense
        return cast(torch.nn.Module, self.model.net)

    def _start_from_clusters(self) -> None:
        """Set the routers from what training images give them; like the probe in the first process alone."""
        data, device = self.datamodule, self._device_before
        order = torch.randperm(len(data.contents.datasets["train"]), generator=torch.Generator().manual_seed(data.seed))
        some = order[:START_IMAGES].tolist()
        net = self.model.net.to(device)
        with self.trainer.strategy.precision_plugin.forward_context():
            images = (batch["image"].to(device) for batch in data.plain_loader("train", some))
            shares = start_routers(net, images, seed=data.seed)
        largest = ", ".join(f"{max(each) * len(each):.2f}" for each in shares.values())
        print(f"routers start from clusters of their input; largest over mean cluster {largest}", flush=True)

    def _compare_with_start(self) -> None:
        """Warn about what prevents a bit-identical result, and record this start in sessions.json."""
        start = self.start or Start(cast(Path, self.run_dir))
        data = self.datamodule
        self.point.fingerprint = fingerprint(
            self.trainer, self.model, data.batch_size, data.file_list_sha256(), data.file_sizes_sha256()
        )
        other = differences(start.fingerprint, self.point.fingerprint)
        if other:
            tell(f"warning: the result can't be bit-identical to an uninterrupted run: {'; '.join(other)}.")
        if self.trainer.is_global_zero:
            note_session(start, self.session.command, [*self.session.notes, *other])

    def fit(self, **kwargs: Any) -> None:
        """Train; a checkpoint is never unpickled."""
        kwargs["ckpt_path"] = None if self.start is None else self.start.checkpoint
        strategy = self._get(self.config, "trainer")["strategy"]
        try:
            with self._memory_advice():
                self.trainer.fit(**kwargs, weights_only=True)
        except Exception as error:  # a class of Lightning's fails in every type on arguments that don't fit
            if self.point.began or isinstance(error, (UserError, OSError)):
                raise
            if isinstance(error, MisconfigurationException):  # it checks some options only now
                raise UserError(f"The Trainer does not take these options: {error}") from error
            if isinstance(strategy, str):
                raise
            name, reason = type(self.trainer.strategy).__name__, " ".join(str(error).split())[:200]
            raise UserError(
                f"The training can't begin under {name} ({type(error).__name__}: {reason}): correct its arguments, or "
                "use --trainer.strategy auto or ddp."
            ) from error
        fault = self.files.refused.get(self.point.path.resolve())
        if fault is not None and not self.fast_dev_run:  # what would be tested now are the weights of an earlier step
            if not self.session.processes.first:
                raise SystemExit(0)
            command = self.session.resume_command
            raise UserError(
                f"The last steps can't be saved ({fault}): make room, or give write access, then "
                + (f"go on with {command}." if command else "start anew.")
            )

    def _before_evaluation(self) -> None:
        """Read the data, and build the model for the weights of a checkpoint."""
        if not self._get(self.config, "ckpt_path"):
            raise UserError(f"Say which weights to {self.subcommand}: --ckpt_path runs/NAME/checkpoints/best.ckpt.")
        self.datamodule.run_dir = self._split_folder()
        self._read_data()
        self._check_limits("val" if self.subcommand == "validate" else "test")
        kept = run_of_checkpoint(self._get(self.config, "ckpt_path")) / "checkpoints" / START
        own = self.datamodule.num_classes, self.datamodule.image_size
        classes, side = (known or own[place] for place, known in enumerate(self.known_sizes))
        self.model.build(classes, side, load_pretrained=False, kept=kept)
        if self.trainer.is_global_zero:
            print(self.datamodule.describe(), flush=True)

    before_validate = before_test = _before_evaluation

    def _split_folder(self) -> Path:
        """The run folder, with the split of the run whose checkpoint is used, if there is one."""
        run_dir = cast(Path, self.run_dir)
        checkpoint = self._get(self.config, "ckpt_path")
        origin = run_of_checkpoint(checkpoint) / "splits.csv" if checkpoint else None
        if origin is not None and origin.is_file():
            self._refuse_other_images(origin)
            shutil.copy(origin, run_dir / "splits.csv")
        return run_dir

    def _refuse_other_images(self, table: Path) -> None:
        """Raise a UserError where the images that a run's splits.csv lists aren't those that were asked for."""
        config = newest_config(table.parent)
        path, asked = (str(read_yaml(config)["data"]["path"]) if config.is_file() else ""), self.datamodule.path
        if path and not self.datamodule.is_of_run(table, path):
            model, folder = (shlex.quote(str(each)) for each in (table.with_name("model"), asked))
            raise UserError(
                f"{self.subcommand} takes the images that {table} lists, of {path} or a copy of it, and {asked} is "
                f"neither: leave it out, or see what the model says about it by moevision predict {model} {folder}."
            )

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the validation images."""
        self.trainer.validate(**kwargs, weights_only=True)

    def test(self, **kwargs: Any) -> None:
        """Evaluate on the test images."""
        self.trainer.test(**kwargs, weights_only=True)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
