"""`moevision fit`, `validate` and `test`, in the order of reading.

`fit` is the verb: `train` has Trainer, data, model, start, plan and the training itself, `finish.finish` tests and
exports, and the dense twin comes after that by the same steps. `evaluate` is `validate` and `test`.

A configuration is data, not a program. Of the classes that `trainer` may name only Lightning's own parts and those of
`moevision.train` are imported; anything else is refused before its import. Own classes work from Python:
`Trainer(callbacks=[Mine()])`.
"""

from __future__ import annotations

import copy
import logging
import re
import secrets
import shutil
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from moevision.config import (
    CLASS_ARGUMENTS,
    EmaConfig,
    GuardConfig,
    OptionValues,
    ParsedArgs,
    Settings,
    flatten,
    parse_config,
    to_settings,
)
from moevision.data import ImageDataModule
from moevision.data.folder import DATASET_NAMES, HF
from moevision.data.scores import FILE as SCORES_FILE
from moevision.errors import SEED, USER_ERROR, DataWarning, UserError, check_ranges, escape_controls
from moevision.files import newest_config, write_text_atomic
from moevision.layers import moe_layers
from moevision.limits import keep_freed_memory
from moevision.models.config import build_model, dense_start, save_pretrained_config
from moevision.models.io import from_cache_only
from moevision.models.upcycle import START_IMAGES, start_routers
from moevision.train.checkpoint import MARK, PRETRAINED_CONFIG, SafeCheckpointIO, check_checkpoint
from moevision.train.finish import (
    RunResult,
    Training,
    checkpoint_of_run,
    describe_sets,
    finish,
    write_comparison,
)
from moevision.train.guard import StabilityGuard, TrainingDiverged
from moevision.train.health import (
    Calibrate,
    EpochLines,
    RecordRouting,
    RouterHealth,
    StopEarly,
    Stopwatch,
    WeightEMA,
)
from moevision.train.lightning_internals import RunLogger, hide_unknown_epoch_total
from moevision.train.optim import freeze_parameters
from moevision.train.processes import (
    Interrupted,
    broadcast_from_rank0,
    init_process_group,
    is_rank0,
    parallel_strategy,
    print_rank0,
    rank0_first,
    several_processes,
    start_processes,
)
from moevision.train.provenance import differences, fingerprint
from moevision.train.recipe import (
    check_memory,
    check_window,
    describe_plan,
    expected_seconds,
    memory_advice,
    new_run_folder,
    read_config,
    read_request,
    refuse_among_images,
    resolve_settings,
    run_name,
    run_of_checkpoint,
)
from moevision.train.report import LOSS, MAP, is_unbalanced
from moevision.train.resume import (
    EpochEnd,
    ResumePoint,
    RunStart,
    Session,
    begin,
    find_run_start,
    first_command,
    note_session,
)
from moevision.train.scores import ExampleScores
from moevision.train.start import fit_probe, start_with
from moevision.train.task import ClassificationTask, check_trainer
from moevision.words import percent, shell_word

# A class is imported by the name that is written and checked again by the module that it is defined in, hence fabric.
ALLOWED = (
    "moevision.train",
    *(
        f"lightning.pytorch.{part}"
        for part in ("accelerators", "callbacks", "loggers", "plugins", "profilers")
    ),
    *("lightning.pytorch.strategies", "lightning.fabric.plugins", "lightning.fabric.loggers"),
)
# Lightning's warnings about what the verbs chose on purpose, or what nobody at the command line can change.
_CHATTER = (
    "The '.*dataloader' does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # evaluation needs none
    "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    r".ModelCheckpoint\(monitor='val/\w+'\). could not find the monitored key",  # a training of less than an epoch
    "You're resuming from a checkpoint that ended before the epoch ended",  # ImageDataModule can
    r"It is recommended to use .self\.log\('(val|test|moe)/.*, sync_dist=True",  # torchmetrics has summed them up
    r".isinstance\(treespec, LeafSpec\). is deprecated",
)


def fit(args: ParsedArgs) -> RunResult | None:
    """`moevision fit`; None in other processes than the first, and where nothing was trained or kept."""
    session = Session(args.command)
    with _in_sentences(session):
        request = read_request("fit", args)
        if not request.prints:
            start_one_each(request.trainer)
        settings, start = begin(session, request)
        _check_opinions(settings, "fit")
        if request.prints:
            print(_yaml(settings), end="")
            return None

        training = train(settings, session, start)
        if training.is_trial:  # logged nothing and saved nothing
            if is_rank0() and start is None:  # else the folder may be an earlier run's
                session.unused = training.run_dir
            return None

        # What repeats the run; --resume doesn't.
        command = first_command(training.run_dir) or session.command
        result = finish(training, command)
        if settings.with_twin:
            result = _train_twin(training, settings, command, result)
        if result is not None:
            _print_what_to_do_next(training, result)
        return result


def _print_what_to_do_next(training: Training, result: RunResult) -> None:
    run_dir = training.run_dir
    print_rank0(f"\n{result.headline}\nEverything is in {run_dir}; start with {run_dir}/summary.md")
    run = shell_word(str(run_dir))
    if (run_dir / SCORES_FILE).is_file():
        print_rank0(f"Look for wrong labels: moevision data score {run}")
    if not result.summary.layers:
        return
    print_rank0(f"See its experts: moevision demo {run}")
    if not result.summary.test.multilabel:
        print_rank0(f"Ask what they do: moevision analyze {run}")
    if not training.settings.with_twin and result.summary.choice is None:
        print_rank0(
            "Whether they pay on these images: --with-twin also trains a dense model of the same cost."
        )


class Prepared(NamedTuple):
    """What training and evaluation begin with: model and data by their options, and the Trainer's named classes."""

    task: ClassificationTask
    data: ImageDataModule
    trainer_parts: OptionValues
    callbacks: list[Callback]


def prepare(settings: Settings) -> Prepared:
    """Seed every generator, and check the options of model, data and Trainer."""
    _seed(settings)
    task = _task(settings)
    data = ImageDataModule(**vars(settings.data))
    parts = instantiated(settings.trainer)
    return Prepared(task, data, parts, _as_list(parts.pop("callbacks", None)))


def train(
    settings: Settings,
    session: Session,
    start: RunStart | None,
    callbacks: Sequence[Callback] = (),
) -> Training:
    """Prepare a training, say what it will do, and train; a new run folder is removed if it can't begin.

    `start` is where it begins (None: afresh, in a folder of its own), `callbacks` are others behind the one that saves.
    """
    started = datetime.now(UTC)
    stopwatch = Stopwatch()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # of an earlier training: the twin's run
    settings = copy.deepcopy(settings)  # what is drawn and chosen below is the run's
    prepared = prepare(settings)
    run_dir = _new_folder(settings, session) if start is None else start.run_dir

    with _no_trace_of_a_failure(run_dir, session, stopwatch, new=start is None):
        point = ResumePoint(run_dir / "checkpoints", settings.checkpoint, session.interruption)
        best = _best_checkpoint(settings, run_dir)
        others = [point, *callbacks, *prepared.callbacks, stopwatch]
        trainer = _trainer(
            settings,
            run_dir,
            prepared.trainer_parts | _strategy_of(settings),
            [*others, *_callbacks_of(settings, run_dir, best), EpochEnd(point)],
        )
        if session.run_dir is None:  # the twin's turn comes when the run itself goes on
            session.run_dir = run_dir
        training = Training(
            settings=settings,
            session=session,
            start=start,
            run_dir=run_dir,
            task=prepared.task,
            data=prepared.data,
            trainer=trainer,
            stopwatch=stopwatch,
            started=started,
        )
        _read_training_data(training)
        _build(training)
        _describe_data(training)
        _choose_monitor(training, best)
        if trainer.is_global_zero:
            _start_and_plan(training)
        if not training.is_trial:
            _compare_with_start(training, point)
            _keep_config(training)
        _train(training, point)
    return training


def _best_checkpoint(settings: Settings, run_dir: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=run_dir / "checkpoints",
        filename="best",
        monitor="val/top1",  # `_choose_monitor` knows the classes
        mode="min" if settings.checkpoint.monitor == LOSS else "max",
        enable_version_counter=False,
    )


def _callbacks_of(settings: Settings, run_dir: Path, best: ModelCheckpoint) -> list[Callback]:
    """The callbacks between the one that saves and the one that ends an epoch, in their order."""
    callbacks: list[Callback] = [LearningRateMonitor("step"), best, EpochLines()]
    if settings.early_stopping.patience:
        callbacks.append(StopEarly(settings.early_stopping, settings.checkpoint.monitor))
    callbacks += [Calibrate(), ExampleScores()]
    callbacks += watching(ema=settings.ema, guard=settings.guard)
    if settings.record_routing.images:
        callbacks.append(RecordRouting(settings.record_routing, run_dir))
    return callbacks


def _read_training_data(training: Training) -> None:
    """Read the images, and check that they and the Trainer's options make a training."""
    settings, data, trainer = training.settings, training.data, training.trainer
    if (
        training.is_fresh
        and settings.router_start == "cluster"
        and not training.task.arch.pretrained
    ):
        raise UserError(
            "--router_start cluster begins with clusters of what pretrained layers compute: say --pretrained too, "
            "or leave it out."
        )
    check_trainer(trainer)
    if training.is_fresh and data.order_seed is None and settings.seed_everything is not False:
        # config.yaml keeps it for a run that goes on.
        settings.data.order_seed = data.order_seed = settings.seed_everything
    data.run_dir = training.run_dir
    _read_data(data, trainer, "fit", moved=not training.is_fresh)
    keep_images_per_step(training.start, data, trainer)
    if training.is_fresh and not training.is_trial:
        check_window(data, trainer)


def _describe_data(training: Training) -> None:
    """Print what the training starts from, and its data."""
    session = training.session
    if training.is_fresh:
        for line in session.lines:
            print_rank0(line)
    session.lines.clear()  # the twin says nothing of its start, which is the run's
    if training.trainer.is_global_zero:
        print(training.data.describe(), flush=True)


@contextmanager
def _no_trace_of_a_failure(
    run_dir: Path, session: Session, stopwatch: Stopwatch, *, new: bool
) -> Iterator[None]:
    """Remove a new run folder if everything ends before one batch was trained on."""
    try:
        yield
    except BaseException:
        if new and stopwatch.images == 0 and is_rank0():
            session.unused = run_dir
        raise


def _seed(settings: Settings) -> None:
    """Seed every generator; `true` draws a seed and keeps it."""
    if settings.seed_everything is True:
        settings.seed_everything = broadcast_from_rank0(lambda: secrets.randbelow(2**31))
    check_ranges(settings, [(*SEED, ("seed_everything",))], "--")
    if settings.seed_everything is not False:
        seed_everything(settings.seed_everything, workers=True)


def _task(settings: Settings) -> ClassificationTask:
    """The task, whose model is built when the images are known."""
    for name, advice in (("num_classes", ""), ("image_size", ", and use --data.image_size")):
        if getattr(settings.model, name) is not None:
            raise UserError(f"--model.{name} is what the images say: leave it out{advice}.")
    return ClassificationTask(**vars(settings.model))


def _new_folder(settings: Settings, session: Session, suffix: str = "") -> Path:
    """A run folder that no earlier run has, made and claimed by the first process."""
    root, images = Path(settings.runs_root), settings.data.path
    name = (settings.name or run_name(images)) + suffix

    def new() -> str:
        refuse_among_images(root / name, images)
        return str(session.claim(new_run_folder(name, root)))

    return Path(broadcast_from_rank0(new))


def watching(ema: EmaConfig, guard: GuardConfig) -> list[Callback]:
    """Moving average, guard, router health, in this order: each sees what those before it did."""
    average = [WeightEMA(ema)] if ema.decay is not None else []
    guards = [StabilityGuard(guard)] if guard.enabled else []
    return [*average, *guards, RouterHealth()]


def instantiated(arguments: OptionValues) -> OptionValues:
    """What arguments of the Trainer that may name a class stand for, such as a logger by the name of its class."""
    named = {name: arguments[name] for name in CLASS_ARGUMENTS if arguments.get(name) is not None}
    if not named:
        return {}

    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(ALLOWED))
    parser = ArgumentParser(exit_on_error=False)
    others = set(signature(Trainer).parameters) - set(CLASS_ARGUMENTS)
    parser.add_class_arguments(Trainer, skip=others, instantiate=False)
    try:
        parsed = parser.parse_object(named)
        function = next(_functions(parsed), None)
        instances = {} if function else vars(parser.instantiate(parsed))
    except (ArgumentError, ValueError, TypeError) as error:
        if foreign := re.search(r"Importing '([^']+)' is not allowed", str(error)):
            raise UserError(
                f"{foreign[1]!r} is not imported: configurations name only parts of Lightning and of moevision.train; "
                "use your own classes from Python."
            ) from error
        raise UserError(
            _refusal(str(error), f"--trainer.{' or --trainer.'.join(named)}")
        ) from error
    if function:
        raise UserError(
            f"{function.__module__}.{function.__name__} is not called: configurations name no functions; use them from "
            "Python."
        )
    return {name: instances[name] for name in named}


def _refusal(message: str, options: str) -> str:
    """What jsonargparse says of named classes, in a sentence; it keeps only the text of Lightning's own errors."""
    if missing := re.search(r"Requirement '([\w-]+)|Neither `([\w-]+)`", message):
        package = missing[1] or missing[2]
        return (
            f"{options} needs the package {package}, which isn't installed: pip install {package}, or leave the option "
            "out (metrics.csv is written without it)."
        )
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return (
            f"{options} names no class of Lightning by {unknown[1]}: give a class's name, such as WandbLogger or "
            "TensorBoardLogger."
        )
    return f"The Trainer does not take these options: {' '.join(message.split())[:500]}"


def _functions(value: Any) -> Iterator[Any]:
    """The functions at any depth of parsed arguments: jsonargparse imports what a `Callable` is named by."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for part in value:
            yield from _functions(part)
    elif callable(value):
        yield value


def _strategy_of(settings: Settings) -> OptionValues:
    """The Trainer's arguments for --parallel; a UserError if --trainer.strategy says something else."""
    config = settings.parallel
    if config.layout is None:
        return {}
    strategy = settings.trainer.get("strategy") or "auto"
    if strategy not in ("auto", config.layout):
        raise UserError(
            f"--parallel {config.layout} and --trainer.strategy {strategy} are two ways to say it: use one."
        )
    replicated = config.layout == "ddp"
    if replicated and config.expert == 1:
        return {"strategy": "ddp"}
    from moevision.train.parallel import MoEParallelStrategy

    divided = MoEParallelStrategy(config.expert, replicated=replicated, offload=config.offload)
    # FSDP2 keeps what it gathers first, and writes to it later: it may not have been made in inference mode.
    return {"strategy": divided, "inference_mode": False}


def _trainer(
    settings: Settings, run_dir: Path, parts: OptionValues, callbacks: list[Callback]
) -> Trainer:
    """A Trainer that logs to and saves in the run folder; `parts` are instances of what its options name."""
    arguments = {**settings.trainer, **parts}
    if arguments.get("logger") is False:
        raise UserError(
            "metrics.csv is always written, the report is made of it: leave --trainer.logger false out."
        )
    loggers = [item for item in _as_list(arguments.get("logger")) if isinstance(item, Logger)]
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    trainer = _make_trainer(
        arguments
        | {
            "default_root_dir": str(run_dir),
            # In a file a bar is one long line; there `EpochLines` says how far the training is.
            "enable_progress_bar": arguments.get("enable_progress_bar", is_terminal)
            and is_terminal,
            "use_distributed_sampler": False,  # ImageDataModule shards by itself, and resumes where it stopped
            # The first one: Lightning takes the run folder from it.
            "logger": [RunLogger(run_dir), *loggers],
            "plugins": [*_as_list(arguments.get("plugins")), SafeCheckpointIO()],
            "callbacks": callbacks,
        }
    )
    hide_unknown_epoch_total(trainer)
    _check_processes(trainer)
    divided = parallel_strategy(trainer)
    if divided is not None:
        divided.check(trainer)
    # On CUDA TF32 where all is float32. What autocast leaves in float32, such as routers, needs its digits.
    torch.set_float32_matmul_precision("high" if trainer.precision == "32-true" else "highest")
    if trainer.strategy.root_device.type == "mps":
        raise UserError(
            "Apple's GPU can't be used: it has no float64, which the statistics of routing need. "
            "Use --trainer.accelerator cpu."
        )
    return trainer


def _make_trainer(arguments: OptionValues) -> Trainer:
    if arguments.get("accelerator", "auto") == "auto" and torch.backends.mps.is_available():
        arguments["accelerator"] = "cpu"  # `auto` would take Apple's GPU
    try:
        return Trainer(**arguments)
    # The last: an accelerator that isn't there.
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        raise UserError(f"The Trainer does not take these options: {error}") from error


def start_one_each(arguments: OptionValues) -> None:
    """Run this command in a process for each device that the Trainer's arguments ask for.

    Not where torchrun, SLURM or this function has started them. Ends with these processes. A UserError for devices that
    aren't there, and for several machines.
    """
    devices = {name: arguments[name] for name in ("accelerator", "devices", "num_nodes")}
    alone = devices["devices"] in (1, "1") and devices["num_nodes"] == 1
    if alone or several_processes():
        return
    trainer = _make_trainer(
        {**devices, "strategy": "ddp", "logger": False, "enable_progress_bar": False}
    )
    if trainer.num_nodes > 1:
        raise UserError("On several machines let torchrun or SLURM's srun start all the processes.")
    if trainer.num_devices > 1:
        start_processes(trainer.num_devices)


def _check_processes(trainer: Trainer) -> None:
    """Refuse a Trainer that expects other processes than there are."""
    met = dist.get_world_size() if several_processes() else 1
    expected = (
        trainer.num_nodes * trainer.num_devices
    )  # its world_size is what torchrun or SLURM says
    if met != expected:
        raise UserError(
            f"{met} processes were started and the Trainer expects {expected}: say --trainer.devices (processes per "
            "machine), --trainer.num_nodes (machines) and --trainer.strategy ddp."
        )


def _read_data(data: ImageDataModule, trainer: Trainer, verb: str, *, moved: bool) -> None:
    """Read the data, the first process first; `moved`: they are a run's, and may have been moved since."""
    data.local_world_size = trainer.num_devices
    try:
        with rank0_first():
            data.setup(verb)
    except UserError as error:
        is_named = data.path in DATASET_NAMES or data.path.startswith(HF)
        if is_named or not moved or Path(data.path).expanduser().exists():
            raise
        raise UserError(
            f"{str(error).rstrip('.')}; --data.path says where the run's images are now."
        ) from error


def keep_images_per_step(start: RunStart | None, data: ImageDataModule, trainer: Trainer) -> None:
    """On another number of processes: sum the gradients of as many batches as make a step of as many images."""
    images = 0
    if start is not None:
        images = start.fingerprint.get("images_per_step", 0)
    batch_size = data.batch_size * trainer.world_size
    window, remainder = divmod(images, batch_size)
    if window == 0 or remainder or window == trainer.accumulate_grad_batches:
        return

    if trainer.accumulate_grad_batches == 1 and trainer.limit_train_batches == 1.0:
        # An epoch had whole steps only: it doesn't get a part of one at its end.
        batches = len(data.contents.datasets["train"]) // batch_size
        trainer.limit_train_batches = max(window, batches // window * window)
    trainer.accumulate_grad_batches = window
    print_rank0(
        f"note: a step sums the gradients of {window} batches of a process: it has {images} images, as before."
    )


def _build(training: Training) -> None:
    """Make the model, and refuse what would fail in the training, or after it with the twin."""
    settings, task, trainer = training.settings, training.task, training.trainer
    sizes = training.data.num_classes, training.data.image_size
    with torch.device("meta"):
        task.build(*sizes, load_pretrained=False, kept=training.pretrained_config_dir)
    if settings.check_memory:  # before memory is taken for it
        check_memory(task, trainer, goes_on=not training.is_fresh)
    # What goes on from a checkpoint needs no pretrained weights.
    task.build(*sizes, load_pretrained=training.is_fresh, kept=training.pretrained_config_dir)
    if training.is_fresh and trainer.is_global_zero:
        save_pretrained_config(task.arch, training.pretrained_config_dir)
    if training.starts_from_clusters:  # said in the saved model, also by a resumed run
        cast(Any, task.net).router_start = "cluster"

    if settings.with_twin:
        twin = replace(task.arch, twin="active_flops")
        with torch.random.fork_rng(devices=[]):  # the run must not depend on being compared
            net = build_model(
                twin,
                *sizes,
                load_pretrained=False,
                pretrained_config_dir=training.pretrained_config_dir,
            )
            freeze_parameters(net, task.optim.freeze)
    if training.sharded_strategy is not None:
        records = isinstance(settings.record_routing.images, str)
        training.sharded_strategy.check_fit(trainer, task, training.data, records=records)


def _choose_monitor(training: Training, best: ModelCheckpoint) -> None:
    """What best.ckpt, early stopping and the headline go by; config.yaml keeps it for a run that goes on."""
    settings, early = training.settings, training.settings.early_stopping
    counts = training.data.class_counts["train"].values()
    monitor = settings.checkpoint.monitor
    if training.data.multilabel and monitor is None:
        monitor = cast(Any, MAP)
    for name in filter(None, (monitor, early.monitor)):
        if name != LOSS and (name == MAP) != training.data.multilabel:
            raise UserError(
                f"{name} isn't measured on these data: val/map is where images have several labels, val/top1 and "
                "val/balanced_acc where they have one. Leave the monitor out."
            )
    if monitor is None:
        # A run of an earlier version goes on as it began.
        unbalanced = training.is_fresh and is_unbalanced(counts)
        monitor = "val/balanced_acc" if unbalanced else "val/top1"
        if unbalanced and training.trainer.is_global_zero:
            print(
                f"Classes have {min(counts):,} to {max(counts):,} training images: best.ckpt is chosen by "
                "val/balanced_acc, the mean recall of the classes (--checkpoint.monitor val/top1: by accuracy)."
            )
    settings.checkpoint = replace(settings.checkpoint, monitor=monitor)
    for callback in cast(Any, training.trainer).callbacks:
        if callback is best or (isinstance(callback, StopEarly) and early.monitor is None):
            callback.monitor = monitor


def _start_and_plan(training: Training) -> None:
    """In the first process: fit head and routers to a pretrained start, and say what the training will do.

    The other processes get these weights when the training begins.
    """
    task, data, trainer = training.task, training.data, training.trainer
    began_s = training.stopwatch.run_s
    if training.is_fresh and task.arch.pretrained is not None and not training.is_trial:
        _start_with_probe(training)
        if training.starts_from_clusters:
            _start_from_clusters(training)
    before_s = training.stopwatch.run_s - began_s

    with _memory_advice(training):
        steps_s = None
        if training.sharded_strategy is None:
            steps_s = expected_seconds(task, data, trainer)
            training.expected_s = before_s + steps_s
        print(describe_plan(task, data, trainer, steps_s, before_s))
        if training.sharded_strategy is not None:
            print(training.sharded_strategy.plan(trainer.world_size, task.net))
    print(f"run folder: {escape_controls(str(training.run_dir))}\n", flush=True)


def _start_with_probe(training: Training) -> None:
    """Head first: the classifier begins as a linear probe of the frozen features, which is reported too."""
    session, task, data = training.session, training.task, training.data
    if data.multilabel:
        print("The classifier starts at random: no linear probe is fitted to several labels.")
        return
    probe = session.probe
    if probe is None:
        net = task.net
        if moe_layers(net):
            # Its weights as they came: noise on copies, capacities and some routers make other features of them.
            with torch.random.fork_rng(devices=[]):  # a new classifier is drawn, too
                net = dense_start(task.arch, data.num_classes, data.image_size) or net
        autocast = training.trainer.strategy.precision_plugin.forward_context
        probe = fit_probe(net, data, training.starting_device, autocast)
    else:  # the run's, which has its time: without it the twin would look the sooner trained
        training.stopwatch.add(probe.seconds, probe.cpu_s)
    if probe is None:
        return
    session.probe = probe
    if probe.beats_the_head:
        start_with(task.net, probe)
    probe.write(training.run_dir)
    print(probe.sentence(), flush=True)


def _start_from_clusters(training: Training) -> None:
    """Set the routers from what training images give them."""
    data = training.data
    device = training.starting_device
    generator = torch.Generator().manual_seed(data.seed)
    order = torch.randperm(len(data.contents.datasets["train"]), generator=generator)
    loader = data.plain_loader("train", order[:START_IMAGES].tolist())
    images = (batch["image"].to(device) for batch in loader)
    net = training.task.net.to(device)
    with training.trainer.strategy.precision_plugin.forward_context():
        shares = start_routers(net, images, seed=data.seed)
    ratios = ", ".join(f"{max(share) * len(share):.2f}" for share in shares.values())
    print(
        f"routers start from clusters of their input; largest over mean cluster {ratios}",
        flush=True,
    )


def _memory_advice(training: Training) -> AbstractContextManager[None]:
    accumulated = training.trainer.accumulate_grad_batches
    return memory_advice(training.data.batch_size, accumulated, goes_on=not training.is_fresh)


def _compare_with_start(training: Training, point: ResumePoint) -> None:
    """Warn about what prevents a bit-identical result, and record this start in sessions.json."""
    session = training.session
    start = training.start or RunStart(training.run_dir)
    point.fingerprint = fingerprint(training.trainer, training.task, training.data)
    changes = differences(start.fingerprint, point.fingerprint)
    if changes:
        print_rank0(
            f"warning: the result can't be bit-identical to an uninterrupted run: {'; '.join(changes)}."
        )
    if training.trainer.is_global_zero:
        note_session(start, session.command, [*session.notes, *changes])


def _keep_config(training: Training) -> None:
    """Write config.yaml; that of a run stays as it is, and changes get a file of their own."""
    if not training.trainer.is_global_zero:
        return
    run_dir, name = training.run_dir, "config.yaml"
    if not training.is_fresh:
        if not training.session.notes:
            return
        name = f"config-{len(list(run_dir.glob('config*.yaml'))) + 1}.yaml"
    write_text_atomic(run_dir / name, _yaml(training.settings))


def _train(training: Training, point: ResumePoint) -> None:
    """Train; a checkpoint is never unpickled."""
    trainer = training.trainer
    checkpoint = None if training.start is None else training.start.checkpoint
    try:
        with _memory_advice(training):
            trainer.fit(training.task, training.data, ckpt_path=checkpoint, weights_only=True)
    except (
        MisconfigurationException,
        ValueError,
    ) as error:  # Lightning checks some options only now
        if point.began or isinstance(error, UserError):
            raise
        raise UserError(f"The Trainer does not take these options: {error}") from error


def _train_twin(
    training: Training, settings: Settings, command: Sequence[str], result: RunResult | None
) -> RunResult | None:
    """Train the dense twin of a finished training by the same recipe, and compare both."""
    # The seed is the one that was drawn, where `true` asked for it.
    seed = training.settings.seed_everything
    settings = copy.deepcopy(settings)
    settings.model.arch.twin = "active_flops"
    settings.with_twin = False
    settings.seed_everything = seed
    options = [
        "--model.arch.twin",
        "active_flops",
        "--without-twin",
        f"--seed_everything={str(seed).lower()}",
    ]
    # the twin has no experts
    if training.sharded_strategy is not None and training.sharded_strategy.expert > 1:
        settings.parallel = replace(settings.parallel, expert=1)
        options.append("--parallel.expert=1")

    start: RunStart = broadcast_from_rank0(partial(_start_of_twin, training))
    twin = train(settings, training.session, start)
    twin_result = finish(twin, [*command, *options])
    if result is None or twin_result is None:
        return None

    match = "active FLOPs"
    if training.task.arch.pretrained is not None:
        # Experts that start as copies may cost more together than the dense model that they are copies of, the twin.
        flops, twin_flops = (run.summary.cost.flops_per_image for run in (result, twin_result))
        match = "pretrained weights, but fewer FLOPs"
        if flops == twin_flops:
            match = "pretrained weights and active FLOPs"
    return write_comparison(result, twin_result, match)


def _start_of_twin(training: Training) -> RunStart:
    """Where the twin's training begins, in a folder that is made for it; for the first process."""
    run_dir = training.run_dir
    folder = run_dir / "twin"
    is_new = not folder.is_dir()
    training.session.claim(folder)
    start = RunStart(folder) if is_new else find_run_start(folder, fresh_if_none=True)
    if start.checkpoint is None and training.start is not None:
        # Its steps have the images of the run's.
        start = replace(start, fingerprint=training.start.fingerprint)
    _copy_split(run_dir, folder)
    print("\nNow the dense twin, by the same recipe.", flush=True)
    return start


def _copy_split(origin: Path, run_dir: Path) -> None:
    """Use the images of another run as it did."""
    if (origin / "splits.csv").is_file():
        shutil.copy(origin / "splits.csv", run_dir / "splits.csv")


# ---- validate and test


class Evaluated(NamedTuple):
    """A checkpoint to evaluate, and what it says of its model."""

    path: str
    model_options: OptionValues
    num_classes: int | None  # as trained
    image_size: int | None  # as trained
    class_names: list[str] | None  # 0.1 wrote none
    multilabel: bool

    @property
    def run_dir(self) -> Path:
        """The run that it is of."""
        return run_of_checkpoint(self.path)


def evaluate(verb: str, args: ParsedArgs) -> None:
    """`moevision validate` and `moevision test`: read the data, and build the model for the weights of a checkpoint."""
    session = Session(args.command)
    with _in_sentences(session):
        request = read_request(verb, _with_checkpoint(verb, args))
        settings = resolve_settings(request)
        if request.prints:
            print(_yaml(settings), end="")
            return
        start_one_each(settings.trainer)

        checkpoint = _read_checkpoint(verb, settings.ckpt_path)
        options = {**flatten(asdict(settings)), **checkpoint.model_options, **request.command_line}
        settings = to_settings(options)
        task, data, parts, callbacks = prepare(settings)
        _check_opinions(settings, verb)
        task.mirror, task.coverage = settings.mirror, settings.sets
        if settings.sets is not None:
            callbacks.append(Calibrate())
        run_dir = _new_folder(settings, session, f"-{verb}")
        with _no_trace_of_a_failure(run_dir, session, Stopwatch(), new=True):
            trainer = _trainer(settings, run_dir, parts, callbacks)
            split = "val" if verb == "validate" else "test"
            _choose_images(data, checkpoint, run_dir, split)
            if settings.sets is not None and data.evaluated_as is not None:
                raise UserError("--sets needs the run's validation images: leave --data.path out.")
            _read_data(data, trainer, verb, moved=True)
            _build_for_checkpoint(task, data, checkpoint)
            if trainer.is_global_zero:
                print(data.describe(), flush=True)
                write_text_atomic(run_dir / "config.yaml", _yaml(settings))

            run = getattr(trainer, verb)
            scores = run(task, data, ckpt_path=checkpoint.path, weights_only=True, verbose=False)
            if not scores:
                raise UserError(
                    f"--trainer.limit_{split}_batches 0 leaves nothing to {verb}: say 1.0 for all of it."
                )
            if settings.sets is not None:
                sentence = describe_sets(task)  # of all processes' images
                if trainer.is_global_zero:
                    print(sentence)
            if trainer.is_global_zero:
                if not data.multilabel:
                    print(f"\n{percent(scores[0][f'{split}/top1'])} of the {split} images right")
                for name, value in scores[0].items():
                    print(f"{name:22}{value:8.4f}")
                print_rank0(f"Everything is in {run_dir}")


def _check_opinions(settings: Settings, verb: str) -> None:
    """Refuse --mirror and --sets where they do nothing, and sets of no coverage."""
    if verb != "test" and (settings.mirror or settings.sets is not None):
        raise UserError(f"--mirror and --sets are for predict and test: leave them out of {verb}.")
    check_ranges(settings, [("above 0 and below 1", lambda x: 0 < x < 1, ("sets",))], "--")


def _with_checkpoint(verb: str, args: ParsedArgs) -> ParsedArgs:
    """Let a run folder stand for the checkpoint that it was tested with."""
    if args.options.get("resume") is not None:
        raise UserError(f"--resume resumes a training: use it with fit; {verb} takes a run folder.")
    if args.folder is None or args.options.get("ckpt_path"):
        return args
    if not Path(args.folder, "checkpoints").is_dir():  # a folder of images
        return args
    checkpoint = str(checkpoint_of_run(Path(args.folder)))
    return args._replace(folder=None, options={**args.options, "ckpt_path": checkpoint})


def _read_checkpoint(verb: str, path: str | None) -> Evaluated:
    if not path:
        raise UserError(
            f"Say which run to {verb}: moevision {verb} runs/NAME, or a file by --ckpt_path."
        )
    content = check_checkpoint(path)
    options = parse_config({"model": content["hyper_parameters"]}, path)
    data = content.get(MARK, {}).get("data", {})
    return Evaluated(
        path=path,
        num_classes=options.pop("model.num_classes", None),
        image_size=options.pop("model.image_size", None),
        model_options=options,
        class_names=data.get("class_names"),
        multilabel=bool(data.get("multilabel")),
    )


def _choose_images(data: ImageDataModule, checkpoint: Evaluated, run_dir: Path, split: str) -> None:
    """Take the run's own split of its images; of others, all of them."""
    origin = checkpoint.run_dir
    config = newest_config(origin)
    if config.is_file() and not data.is_of(origin, read_config(config).get("data.path", data.path)):
        data.evaluated_as = split
    else:
        _copy_split(origin, run_dir)
    data.run_dir = run_dir


def _build_for_checkpoint(
    task: ClassificationTask, data: ImageDataModule, checkpoint: Evaluated
) -> None:
    """Make the model that a checkpoint has weights for, and number the classes as it does."""
    if checkpoint.multilabel != data.multilabel:
        raise UserError(
            f"{checkpoint.path} and these data differ in whether an image has one label or several: give images that "
            "are labelled as those of the training."
        )
    if checkpoint.class_names is not None:
        data.number_classes(checkpoint.class_names)
    with from_cache_only():
        task.build(
            checkpoint.num_classes or data.num_classes,
            checkpoint.image_size or data.image_size,
            load_pretrained=False,
            kept=checkpoint.run_dir / "checkpoints" / PRETRAINED_CONFIG,
        )


validate, test = partial(evaluate, "validate"), partial(evaluate, "test")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _yaml(settings: Settings) -> str:
    result: str = yaml.safe_dump(asdict(settings), sort_keys=False)
    return result


@contextmanager
def _in_sentences(session: Session) -> Iterator[None]:
    """Let a verb end by one sentence that says how to go on, whatever stops it."""
    keep_freed_memory()
    init_process_group()
    try:
        with session.interruption, quiet_lightning():
            yield
    except (Interrupted, TrainingDiverged) as stopped:
        if not is_rank0():
            raise SystemExit(0) from None  # the first process says it, and its exit code counts
        if isinstance(stopped, Interrupted):
            command = session.resume_command
            how = f" To go on:\n{command}" if command else " Nothing was saved yet."
            print_rank0(f"Stopped by {session.interruption.by or stopped.signal_name}.{how}")
        raise
    except UserError:
        raise
    except OSError as error:
        if error.strerror is None:
            raise
        command = session.resume_command or "the same command"
        cause = error.strerror
        if error.filename:
            cause += f": {error.filename}"
        raise UserError(f"{cause}: mend that, then go on with {command}.") from error
    except RuntimeError as error:
        # The second: gloo's message for a connection that has gone.
        process_gone = isinstance(error, dist.DistError) or "by peer" in str(error)
        if not several_processes() or not process_gone:
            raise
        if not is_rank0():
            raise SystemExit(USER_ERROR) from None  # only rank 0 prints
        command = session.resume_command
        how = f" To go on:\n{command}" if command else " Nothing was saved yet: start anew."
        raise UserError(
            f"Another process of this training has ended, see above if it said why.{how}"
        ) from error
    finally:
        session.close()


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
