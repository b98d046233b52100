"""`moevision fit`, `validate` and `test`, in the order of reading.

`fit` is the verb: `train` has Trainer, data, model, start, plan and the training itself, `finish.finish` tests and
exports, and the dense twin comes after that by the same steps. `evaluate` is `validate` and `test`.

A configuration is data, not a program. Of the classes that `trainer` may name only Lightning's own parts and those of
`moevision.train` are imported; anything else is refused before its import. Own classes work from Python:
`Trainer(callbacks=[Mine()])`.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from moevision.config import (
    CLASSES,
    EmaConfig,
    GuardConfig,
    ParallelConfig,
    ParsedArgs,
    Settings,
    checked,
    settings,
)
from moevision.data import ImageDataModule
from moevision.data.named import DATASET_NAMES, HF
from moevision.errors import SEED, USER_ERROR, DataWarning, UserError, check_ranges, escape_controls
from moevision.files import newest_config, write_text_atomic
from moevision.layers import moe_layers
from moevision.limits import keep_freed_memory
from moevision.models.config import build_model, dense_start, save_pretrained_config
from moevision.models.io import from_cache_only
from moevision.models.upcycle import START_IMAGES, start_routers
from moevision.train.checkpoint import PRETRAINED_CONFIG, SafeCheckpointIO, check_checkpoint
from moevision.train.final_weights import checkpoint_of_run
from moevision.train.finish import RunResult, Training, finish, write_comparison
from moevision.train.guard import StabilityGuard, TrainingDiverged
from moevision.train.health import (
    Calibrate,
    RecordRouting,
    RouterHealth,
    RunLogger,
    StopEarly,
    Stopwatch,
    WeightEMA,
)
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
    refuse_among_images,
    resolve_settings,
    run_name,
    run_of_checkpoint,
)
from moevision.train.report import LOSS, is_unbalanced
from moevision.train.resume import (
    MARK,
    EpochEnd,
    ResumePoint,
    RunStart,
    Session,
    begin,
    devices_asked,
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


def fit(given: ParsedArgs) -> None:
    """`moevision fit`."""
    session = Session(given.command)
    with _in_sentences(session):
        if not given.prints:
            start_one_each(devices_asked(given))
        options, start = begin(session, given)
        if given.prints:
            print(yaml.safe_dump(asdict(settings(options)), sort_keys=False), end="")
            return
        training = train(settings(options), session, start)
        run_dir = training.run_dir
        if training.trial:  # logged nothing and saved nothing
            if is_rank0() and start is None:  # else the folder may be an earlier run's
                session.unused = run_dir
            return
        command = (
            first_command(run_dir) or session.command
        )  # what repeats the run; --resume doesn't
        result = finish(training, command)
        if training.settings.with_twin:
            result = _train_twin(training, options, command, result)
        if result is not None:
            print_rank0(
                f"\n{result.headline}\nEverything is in {run_dir}; start with {run_dir}/summary.md"
            )
            if result.summary.layers:
                run = shell_word(str(run_dir))
                print_rank0(
                    f"See its experts: moevision demo {run}\nAsk what they do: moevision analyze {run}"
                )
                if not training.settings.with_twin and result.summary.choice is None:
                    print_rank0(
                        "Whether they pay on these images: --with-twin also trains a dense model of the same cost."
                    )


def train(
    settings: Settings,
    session: Session,
    start: RunStart | None,
    callbacks: Sequence[L.Callback] = (),
) -> Training:
    """Prepare a training, say what it will do, and train; a new run folder is removed if it can't begin.

    `start` is where it begins (None: afresh, in a folder of its own), `callbacks` are others behind the one that saves.
    """
    started, stopwatch = datetime.now(UTC), Stopwatch()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # of an earlier training: the twin's run
    _seed(settings, session)
    task, data, named = (
        _task(settings),
        ImageDataModule(**vars(settings.data)),
        instantiated(settings.trainer),
    )
    early = settings.early_stopping
    run_dir = _new_folder(settings, session) if start is None else start.run_dir
    with _no_trace_of_a_failure(run_dir, session, stopwatch, new=start is None):
        # Trainer
        point = ResumePoint(run_dir / "checkpoints", settings.checkpoint, session.interruption)
        best = ModelCheckpoint(
            dirpath=run_dir / "checkpoints",
            filename="best",
            monitor="val/top1",  # `_choose_monitor` knows the classes
            mode="min" if settings.checkpoint.monitor == LOSS else "max",
            enable_version_counter=False,
        )
        ours = [
            point,
            *callbacks,
            *_as_list(named.pop("callbacks", None)),
            stopwatch,
            LearningRateMonitor("step"),
            best,
            *([StopEarly(early, settings.checkpoint.monitor)] if early.patience else []),
            Calibrate(),
            ExampleScores(),
            *watching(ema=settings.ema, guard=settings.guard),
            *(
                [RecordRouting(settings.record_routing, run_dir)]
                if settings.record_routing.images
                else []
            ),
            EpochEnd(point),
        ]
        strategy = _strategy_of(settings.parallel, settings.trainer.get("strategy") or "auto")
        trainer = _trainer(settings, run_dir, {**named, **strategy}, ours)
        if session.run_dir is None:  # the twin's turn comes when the run itself goes on
            session.run_dir = run_dir
        training = Training(
            settings, session, start, run_dir, task, data, trainer, stopwatch, started
        )

        # Data
        if training.fresh and settings.router_start == "cluster" and task.arch.pretrained is None:
            raise UserError(
                "--router_start cluster begins with clusters of what pretrained layers compute: say --pretrained too, "
                "or leave it out."
            )
        check_trainer(trainer)
        if (
            training.fresh and data.order_seed is None
        ):  # config.yaml keeps it for a run that goes on
            seed = settings.seed_everything
            settings.data.order_seed = data.order_seed = None if seed is False else seed
        data.run_dir = run_dir
        _read_data(data, trainer, session, "fit", moved=not training.fresh)
        keep_images_per_step(start, data, trainer)
        if training.fresh and not training.trial:
            check_window(data, trainer)

        # Model
        _build(training)
        for line in session.lines if training.fresh else ():
            print_rank0(line)
        session.lines.clear()  # the twin says nothing of its start, which is the run's
        if trainer.is_global_zero:
            print(data.describe(), flush=True)
        _choose_monitor(training, best)

        # Start and plan
        if trainer.is_global_zero:
            _start_and_plan(training)
        if not training.trial:
            _compare_with_start(training, point)
            _keep_config(training)
        _train(training, point)
    return training


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


def _seed(settings: Settings, session: Session) -> None:
    """Seed every generator; `true` draws a seed and keeps it."""
    if settings.seed_everything is True:
        settings.seed_everything = broadcast_from_rank0(lambda: secrets.randbelow(2**31))
    check_ranges(settings, [(*SEED, ("seed_everything",))], "--")
    if settings.seed_everything is not False:
        L.seed_everything(settings.seed_everything, workers=True)


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


def watching(ema: EmaConfig, guard: GuardConfig) -> list[L.Callback]:
    """Moving average, guard, router health, in this order: each sees what those before it did."""
    average = [WeightEMA(ema)] if ema.decay is not None else []
    guards = [StabilityGuard(guard)] if guard.enabled else []
    return [*average, *guards, RouterHealth()]


def instantiated(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What arguments of the Trainer that may name a class stand for, such as a logger by the name of its class."""
    asked = {name: trainer[name] for name in CLASSES if trainer.get(name) is not None}
    if not asked:
        return {}
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(ALLOWED))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(
        L.Trainer, skip=set(signature(L.Trainer).parameters) - set(CLASSES), instantiate=False
    )
    try:
        parsed = parser.parse_object(asked)
        function = next(_functions(parsed), None)
        made = {} if function else vars(parser.instantiate(parsed))
    except (ArgumentError, ValueError, TypeError) as error:
        if foreign := re.search(r"Importing '([^']+)' is not allowed", str(error)):
            raise UserError(
                f"{foreign[1]!r} is not imported: configurations name only parts of Lightning and of moevision.train; "
                "use your own classes from Python."
            ) from error
        raise UserError(
            f"The Trainer does not take these options: {' '.join(str(error).split())[:500]}"
        ) from error
    if function:
        raise UserError(
            f"{function.__module__}.{function.__name__} is not called: configurations name no functions; use them from "
            "Python."
        )
    return {name: made[name] for name in asked}


def _functions(value: Any) -> Iterator[Any]:
    """The functions at any depth of parsed arguments: jsonargparse imports what a `Callable` is named by."""
    if isinstance(value, Namespace | dict):
        value = list(vars(value).values() if isinstance(value, Namespace) else value.values())
    if isinstance(value, list | tuple | set):
        for each in value:
            yield from _functions(each)
    elif callable(value):
        yield value


def _strategy_of(config: ParallelConfig, asked: Any) -> dict[str, Any]:
    """The Trainer's arguments; a UserError if --trainer.strategy, `asked`, says something else."""
    if config.layout is None:
        return {}
    if asked not in ("auto", config.layout):
        raise UserError(
            f"--parallel {config.layout} and --trainer.strategy {asked} are two ways to say it: use one."
        )
    replicated = config.layout == "ddp"
    if replicated and config.expert == 1:
        return {"strategy": "ddp"}
    from moevision.train.parallel.strategy import MoEParallelStrategy

    divided = MoEParallelStrategy(config.expert, replicated=replicated, offload=config.offload)
    # FSDP2 keeps what it gathers first, and writes to it later: it may not have been made in inference mode.
    return {"strategy": divided, "inference_mode": False}


def _trainer(
    settings: Settings, run_dir: Path, named: Mapping[str, Any], callbacks: list[L.Callback]
) -> L.Trainer:
    """A Trainer that logs to and saves in the run folder."""
    asked = {**settings.trainer, **named}
    if asked.get("logger") is False:
        raise UserError(
            "metrics.csv is always written, the report is made of it: leave --trainer.logger false out."
        )
    others = [each for each in _as_list(asked.get("logger")) if isinstance(each, Logger)]
    asked |= {
        "default_root_dir": str(run_dir),
        "use_distributed_sampler": False,  # ImageDataModule shards by itself, and resumes where it stopped
        # The first one: Lightning takes the run folder from it.
        "logger": [RunLogger(run_dir), *others],
        "plugins": [*_as_list(asked.get("plugins")), SafeCheckpointIO()],
        "callbacks": callbacks,
    }
    trainer = _made(asked)
    if trainer.max_epochs in (None, -1) and (bar := trainer.progress_bar_callback) is not None:
        cast(
            Any, bar
        )._get_train_description = "Epoch {:<4}".format  # of steps alone it would say "Epoch 0/-2"
    _check_processes(trainer)
    if (divided := parallel_strategy(trainer)) is not None:
        divided.check(trainer)
    # On CUDA TF32 where all is float32. What autocast leaves in float32, such as routers, needs its digits.
    torch.set_float32_matmul_precision("high" if trainer.precision == "32-true" else "highest")
    device = trainer.strategy.root_device
    if device.type == "mps":
        raise UserError(
            "Apple's GPU can't be used: it has no float64, which the statistics of routing need. "
            "Use --trainer.accelerator cpu."
        )
    return trainer


def _made(asked: dict[str, Any]) -> L.Trainer:
    if asked.get("accelerator", "auto") == "auto" and torch.backends.mps.is_available():
        asked["accelerator"] = "cpu"  # `auto` would take Apple's GPU
    try:
        return L.Trainer(**asked)
    except (
        MisconfigurationException,
        ValueError,
        TypeError,
        ImportError,
    ) as error:  # an accelerator that isn't there
        raise UserError(f"The Trainer does not take these options: {error}") from error


def start_one_each(options: Mapping[str, Any]) -> None:
    """Run this command in a process for each device that its options ask for, unless torchrun, SLURM or this has.

    Ends with these processes. A UserError for devices that aren't there, and for several machines.
    """
    asked = {
        name: options.get(f"trainer.{name}") for name in ("accelerator", "devices", "num_nodes")
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    alone = asked.get("devices", 1) in (1, "1") and asked.get("num_nodes", 1) == 1
    if alone or several_processes():
        return
    trainer = _made({**asked, "strategy": "ddp", "logger": False, "enable_progress_bar": False})
    if trainer.num_nodes > 1:
        raise UserError("On several machines let torchrun or SLURM's srun start all the processes.")
    if trainer.num_devices > 1:
        start_processes(trainer.num_devices)


def _check_processes(trainer: L.Trainer) -> None:
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


def _read_data(
    data: ImageDataModule, trainer: L.Trainer, session: Session, verb: str, *, moved: bool
) -> None:
    """Read the data, the first process first; `moved`: they are a run's, and may have been moved since."""
    data.processes = trainer.num_devices
    try:
        with rank0_first():
            data.setup(verb)
    except UserError as error:
        there = (
            data.path in DATASET_NAMES
            or data.path.startswith(HF)
            or Path(data.path).expanduser().exists()
        )
        if there or not moved:
            raise
        raise UserError(
            f"{str(error).rstrip('.')}; --data.path says where the run's images are now."
        ) from error


def keep_images_per_step(start: RunStart | None, data: ImageDataModule, trainer: L.Trainer) -> None:
    """On another number of processes: sum the gradients of as many batches as make a step of as many images."""
    known = {} if start is None else start.fingerprint
    images, at_once = known.get("images_per_step", 0), data.batch_size * trainer.world_size
    parts = images // at_once
    if parts and not images % at_once and parts != trainer.accumulate_grad_batches:
        if trainer.accumulate_grad_batches == 1 and trainer.limit_train_batches == 1.0:
            # An epoch had whole steps only: it doesn't get a part of one at its end.
            batches = sum(data.class_counts["train"].values()) // at_once
            trainer.limit_train_batches = max(parts, batches // parts * parts)
        trainer.accumulate_grad_batches = parts
        print_rank0(
            f"note: a step sums the gradients of {parts} batches of a process: it has {images} images, as before."
        )


def _build(training: Training) -> None:
    """Make the model, and refuse what would fail in the training, or after it with the twin."""
    settings, task, fresh, kept = training.settings, training.task, training.fresh, training.kept
    sizes = training.data.num_classes, training.data.image_size
    with torch.device("meta"):
        task.build(*sizes, load_pretrained=False, kept=kept)
    if settings.check_memory:  # before memory is taken for it
        check_memory(task, training.trainer, goes_on=not fresh)
    task.build(
        *sizes, load_pretrained=fresh, kept=kept
    )  # what goes on from a checkpoint needs no pretrained weights
    if fresh and training.trainer.is_global_zero:
        save_pretrained_config(task.arch, kept)
    if training.clusters:  # said in the saved model, also by a run that goes on from a checkpoint
        cast(Any, task.net).router_start = "cluster"
    if settings.with_twin:
        with torch.random.fork_rng(devices=[]):  # the run must not depend on being compared
            twin = replace(task.arch, twin="active_flops")
            net = build_model(twin, *sizes, load_pretrained=False, pretrained_config_dir=kept)
            freeze_parameters(net, task.optim.freeze)
    if training.divided is not None:
        records = isinstance(settings.record_routing.images, str)
        training.divided.check_fit(training.trainer, task, training.data, records=records)


def _choose_monitor(training: Training, best: ModelCheckpoint) -> None:
    """What best.ckpt, early stopping and the headline go by; config.yaml keeps it for a run that goes on."""
    settings, early = training.settings, training.settings.early_stopping
    counts = training.data.class_counts["train"].values()
    monitor = settings.checkpoint.monitor
    if monitor is None:
        # A run of an earlier version goes on as it began.
        unbalanced = training.fresh and is_unbalanced(counts)
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
    task, data, trainer, stopwatch = (
        training.task,
        training.data,
        training.trainer,
        training.stopwatch,
    )
    began_s = stopwatch.run_s
    if training.fresh and task.arch.pretrained is not None and not training.trial:
        _start_with_probe(training)
        if training.clusters:
            _start_from_clusters(training)
    before_s = stopwatch.run_s - began_s
    with _memory_advice(training):
        steps_s = None if training.divided else expected_seconds(task, data, trainer)
        training.expected_s = None if steps_s is None else before_s + steps_s
        print(describe_plan(task, data, trainer, steps_s, before_s))
        if training.divided is not None:
            print(training.divided.plan(trainer.world_size, task.net))
    print(f"run folder: {escape_controls(str(training.run_dir))}\n", flush=True)


def _start_with_probe(training: Training) -> None:
    """Head first: the classifier begins as a linear probe of the frozen features, which is reported too."""
    session, task, data = training.session, training.task, training.data
    known = session.probe
    if known is None:
        net = task.net
        if moe_layers(net):
            # Its weights as they came: noise on copies, capacities and some routers make other features of them.
            with torch.random.fork_rng(devices=[]):  # a new classifier is drawn, too
                net = dense_start(task.arch, data.num_classes, data.image_size) or net
        autocast = training.trainer.strategy.precision_plugin.forward_context
        known = fit_probe(net, data, training.device_before, autocast)
    else:  # the run's, which has its time: without it the twin would look the sooner trained
        training.stopwatch.add(known.seconds, known.cpu_s)
    if known is None:
        return
    session.probe = known
    if known.beats_the_head:
        start_with(task.net, known)
    known.write(training.run_dir)
    print(known.sentence(), flush=True)


def _start_from_clusters(training: Training) -> None:
    """Set the routers from what training images give them."""
    data, device = training.data, training.device_before
    order = torch.randperm(
        len(data.contents.datasets["train"]), generator=torch.Generator().manual_seed(data.seed)
    )
    net = training.task.net.to(device)
    with training.trainer.strategy.precision_plugin.forward_context():
        loader = data.plain_loader("train", order[:START_IMAGES].tolist())
        shares = start_routers(net, (batch["image"].to(device) for batch in loader), seed=data.seed)
    largest = ", ".join(f"{max(each) * len(each):.2f}" for each in shares.values())
    print(
        f"routers start from clusters of their input; largest over mean cluster {largest}",
        flush=True,
    )


def _memory_advice(training: Training) -> AbstractContextManager[None]:
    accumulated = training.trainer.accumulate_grad_batches
    return memory_advice(training.data.batch_size, accumulated, goes_on=not training.fresh)


def _compare_with_start(training: Training, point: ResumePoint) -> None:
    """Warn about what prevents a bit-identical result, and record this start in sessions.json."""
    start, session = training.start or RunStart(training.run_dir), training.session
    point.fingerprint = fingerprint(training.trainer, training.task, training.data)
    other = differences(start.fingerprint, point.fingerprint)
    if other:
        print_rank0(
            f"warning: the result can't be bit-identical to an uninterrupted run: {'; '.join(other)}."
        )
    if training.trainer.is_global_zero:
        note_session(start, session.command, [*session.notes, *other])


def _keep_config(training: Training) -> None:
    """Write config.yaml; that of a run stays as it is, and changes get a file of their own."""
    if not training.trainer.is_global_zero:
        return
    run_dir, name = training.run_dir, "config.yaml"
    if not training.fresh:
        if not training.session.notes:
            return
        name = f"config-{len(list(run_dir.glob('config*.yaml'))) + 1}.yaml"
    write_text_atomic(run_dir / name, yaml.safe_dump(asdict(training.settings), sort_keys=False))


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
    training: Training, options: Mapping[str, Any], command: Sequence[str], result: RunResult | None
) -> RunResult | None:
    """Train the dense twin of a finished training by the same recipe, and compare both."""
    session, run_dir = training.session, training.run_dir

    def new() -> RunStart:
        """Where the twin's training begins, in a folder that is made for it."""
        folder = run_dir / "twin"
        known = folder.is_dir()
        session.claim(folder)
        start = find_run_start(folder, fresh_if_none=True) if known else RunStart(folder)
        if (
            start.checkpoint is None and training.start is not None
        ):  # its steps have the images of the run's
            start = replace(start, fingerprint=training.start.fingerprint)
        if (run_dir / "splits.csv").is_file():
            shutil.copy(run_dir / "splits.csv", folder / "splits.csv")
        print("\nNow the dense twin, by the same recipe.", flush=True)
        return start

    start: RunStart = broadcast_from_rank0(new)
    seed = training.settings.seed_everything  # the one that was drawn, where `true` asked for it
    changes: dict[str, Any] = {
        "model.arch.twin": "active_flops",
        "with_twin": False,
        "seed_everything": seed,
    }
    again = [
        "--model.arch.twin",
        "active_flops",
        "--without-twin",
        f"--seed_everything={str(seed).lower()}",
    ]
    if training.divided is not None and training.divided.expert > 1:  # the twin has no experts
        changes["parallel.expert"] = 1
        again.append("--parallel.expert=1")
    twin = train(settings({**options, **changes}), session, start)
    other = finish(twin, [*command, *again])
    if result is None or other is None:
        return None
    match = "active FLOPs"
    if training.task.arch.pretrained is not None:
        # Experts that start as copies may cost more together than the dense model that they are copies of, the twin.
        same = result.summary.cost.flops_per_image == other.summary.cost.flops_per_image
        match = f"pretrained weights{' and active FLOPs' if same else ', but fewer FLOPs'}"
    return write_comparison(result, other, match)


def evaluate(verb: str, given: ParsedArgs) -> None:
    """`moevision validate` and `moevision test`: read the data, and build the model for the weights of a checkpoint."""
    session = Session(given.command)
    with _in_sentences(session):
        if given.options.get("resume") is not None:
            raise UserError(
                f"--resume resumes a training: use it with fit; {verb} takes a run folder."
            )
        run = Path(given.folder or "")
        is_run = (
            given.folder is not None and (run / "checkpoints").is_dir()
        )  # and no folder of images
        if is_run and not given.options.get("ckpt_path"):
            tested = str(checkpoint_of_run(run))
            given = given._replace(folder=None, options={**given.options, "ckpt_path": tested})
        options = resolve_settings(verb, given, decide=broadcast_from_rank0)
        if given.prints:
            print(yaml.safe_dump(asdict(settings(options)), sort_keys=False), end="")
            return
        start_one_each(options)
        checkpoint = options.get("ckpt_path")
        if not checkpoint:
            raise UserError(
                f"Say which run to {verb}: moevision {verb} runs/NAME, or a file by --ckpt_path."
            )
        saved, origin = check_checkpoint(checkpoint), run_of_checkpoint(checkpoint)
        model = checked({"model": saved["hyper_parameters"]}, checkpoint)
        known_sizes = model.pop("model.num_classes", None), model.pop("model.image_size", None)
        asked = settings({**options, **model, **given.options})
        _seed(asked, session)
        task, data, named = (
            _task(asked),
            ImageDataModule(**vars(asked.data)),
            instantiated(asked.trainer),
        )
        run_dir = _new_folder(asked, session, f"-{verb}")
        with _no_trace_of_a_failure(run_dir, session, Stopwatch(), new=True):
            trainer = _trainer(asked, run_dir, named, _as_list(named.pop("callbacks", None)))
            split = "val" if verb == "validate" else "test"
            config = newest_config(origin)
            if config.is_file() and not data.is_of(
                origin, read_config(config).get("data.path", data.path)
            ):
                data.only_for = split
            elif (origin / "splits.csv").is_file():
                shutil.copy(origin / "splits.csv", run_dir / "splits.csv")
            data.run_dir = run_dir
            _read_data(data, trainer, session, verb, moved=True)
            if (
                names := saved.get(MARK, {}).get("data", {}).get("class_names")
            ) is not None:  # 0.1 wrote none
                data.number_classes(names)
            classes, side = (
                known or own
                for known, own in zip(known_sizes, (data.num_classes, data.image_size), strict=True)
            )
            with from_cache_only():
                task.build(
                    classes,
                    side,
                    load_pretrained=False,
                    kept=origin / "checkpoints" / PRETRAINED_CONFIG,
                )
            if trainer.is_global_zero:
                print(data.describe(), flush=True)
                write_text_atomic(
                    run_dir / "config.yaml", yaml.safe_dump(asdict(asked), sort_keys=False)
                )
            found = getattr(trainer, verb)(
                task, data, ckpt_path=checkpoint, weights_only=True, verbose=False
            )
            if not found:
                raise UserError(
                    f"--trainer.limit_{split}_batches 0 leaves nothing to {verb}: say 1.0 for all of it."
                )
            if trainer.is_global_zero:
                print(f"\n{percent(found[0][f'{split}/top1'])} of the {split} images right")
                print("\n".join(f"{name:22}{value:8.4f}" for name, value in found[0].items()))
                print_rank0(f"Everything is in {run_dir}")


validate, test = partial(evaluate, "validate"), partial(evaluate, "test")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


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
        what = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise UserError(f"{what}: mend that, then go on with {command}.") from error
    except RuntimeError as error:
        # The second: gloo's words for a connection that has gone.
        if not several_processes() or not (
            isinstance(error, dist.DistError) or "by peer" in str(error)
        ):
            raise
        if not is_rank0():
            raise SystemExit(USER_ERROR) from None  # one voice
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
