"""Settings that `fit` chooses if the user gives none (model, image size, batch, epochs, precision), and its plan.

Trainings on few images start from pretrained weights (`start`), others from scratch. Whether weights, gradients and the
optimizer's moments fit into memory is checked before a training; if activations don't fit, `memory_advice` suggests
options that need less.

Every choice is printed and can be overridden on the command line. `runs/NAME/` is the run folder; `--config NAME` finds
the configs that are shipped with the package.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from moevision.config import OptionValues, ParsedArgs, Settings, parse_config, to_settings
from moevision.data import ImageDataModule
from moevision.data.folder import DATASET_NAMES, HF
from moevision.data.named import (
    DRAWN,
    NAMED,
    contains_path,
    count_images,
    kind_of,
    open_collection,
)
from moevision.efficiency import parameter_counts
from moevision.errors import UserError, escape_controls
from moevision.files import newest_config, shipped_configs
from moevision.layers import describe_moe, moe_layers
from moevision.limits import available_memory_bytes, memory_limit_bytes, usable_cores
from moevision.models.config import DEFAULT_NAME
from moevision.models.convert import block_to_pool
from moevision.models.io import architecture_of, first_blocks
from moevision.models.safe_files import read_yaml
from moevision.train.health import WeightEMA
from moevision.train.optim import matrices_of
from moevision.train.processes import (
    broadcast_from_rank0,
    callback_of,
    has_gpu,
    print_rank0,
    trains_on,
)
from moevision.train.provenance import device_name
from moevision.train.start import AUTO, NONE, choose_start, from_scratch, pretrained_options
from moevision.train.task import ClassificationTask
from moevision.words import shell_word

SCRATCH_MINIMUM = 200_000  # images below which `fit` starts from pretrained weights
_PRETRAINED = "model.arch.pretrained"
# Options that choose or shape the model: with one of them no pretrained model is chosen automatically.
_MODEL_OPTIONS = (
    "model.arch.name",
    "model.arch.base",
    "model.arch.stem",
    "model.arch.patch_size",
    "model.arch.embed_dim",
    "model.arch.depth",
    "model.arch.num_heads",
    "model.arch.mlp_ratio",
)


def new_run_folder(name: str, root: Path = Path("runs")) -> Path:  # type: ignore[return]
    """Create the first folder that doesn't exist yet of `runs/<name>`, `runs/<name>-2`, `runs/<name>-3`, ..."""
    root.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def refuse_among_images(run_dir: Path, data: str) -> None:
    """Raise a UserError if the run folder lies in the folder of images, whose files are all read as images."""
    if contains_path(data, run_dir):
        raise UserError(
            f"The run folder {run_dir} would become part of the images in {data}: start elsewhere, or give another "
            "--runs_root, such as ../runs."
        )


def run_name(data: str) -> str:
    """The default name of a run, from its folder or table of images, without characters that a terminal can't show."""
    if data.startswith(HF):
        data = data.removeprefix(HF).replace(":", "-")
    path = Path(data).resolve()
    name = path.stem if path.suffix.lower() == ".csv" else path.name
    if escape_controls(name) == name:
        return name
    return escape_controls(name).replace("\\", "_")


def find_config(name: str) -> Path:
    """The config file that `name` means: a path, or the name of a shipped config; a UserError if it is neither."""
    if Path(name).is_file():
        return Path(name)
    configs = shipped_configs()
    if name in configs:
        return configs[name]
    hint = "".join(f" Did you mean {near}?" for near in difflib.get_close_matches(name, configs, 1))
    raise UserError(
        f"There is no config {name!r}.{hint} Give a YAML file or one of: {', '.join(configs)}."
    )


def default_precision() -> str:
    """bf16-mixed if the hardware multiplies bfloat16 (it halves a step's time); else 16-mixed on a GPU and 32-true."""
    if has_gpu():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if has_bf16 else "16-mixed"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if has_bf16 else "32-true"


# ---- from a command line to settings


@dataclass(frozen=True)
class Request:
    """The arguments of `fit`, `validate` or `test`: options by their dotted names, separately for each source."""

    verb: str
    prints: bool  # whether to print the settings and do nothing else
    images: str | None  # the argument after the verb: a folder, a table or a dataset's name
    has_config: bool  # whether --config is given
    pretrained: str | None  # --pretrained; None: it wasn't given
    resume: str | None  # --resume: a run folder, or `auto`
    config: OptionValues  # the options in the files of --config
    command_line: OptionValues  # all other options of the command line

    @property
    def options(self) -> OptionValues:
        """Options of the configs and the command line, which takes precedence."""
        return {**self.config, **self.command_line}

    @property
    def run_dir(self) -> Path:
        """The folder of the resumed run; with `auto` the one that this command would create, without a number."""
        if self.resume not in (None, AUTO):
            return Path(self.resume)
        name = self.options.get("name") or run_name(self.options.get("data.path", "synthetic_pets"))
        return Path(self.options.get("runs_root", "runs"), name)

    @property
    def trainer(self) -> OptionValues:
        """Arguments of the Trainer (accelerator, devices, machines), including those recorded by a resumed run."""
        recorded: OptionValues = {}
        config = self.run_dir / "config.yaml"
        if self.resume is not None and config.is_file():
            recorded = read_config(config)
        return to_settings({**recorded, **self.options}).trainer


def read_request(verb: str, args: ParsedArgs) -> Request:
    """Read the config files that a command line names, and raise a UserError for options that contradict each other."""
    if args.options.get("model.arch.twin") and args.options.get("with_twin"):
        raise UserError(
            "--dense trains the dense model itself: leave --with-twin out, which trains both."
        )
    command_line = {**args.options}
    resume = command_line.pop("resume", None)
    pretrained = None
    if _PRETRAINED in command_line:
        pretrained = command_line.pop(_PRETRAINED) or NONE

    # The name of a shipped config instead of a folder means `--config NAME`.
    images = args.folder
    config_names = args.configs
    if images is not None and not config_names and _is_shipped_config(images):
        if images in NAMED and pretrained not in (None, NONE):
            # The shipped config trains from scratch. With pretrained weights only its data set is used.
            command_line.setdefault("data.download", True)
        else:
            config_names = [images]
            images = None

    config: OptionValues = {}
    for name in config_names:
        config |= read_config(find_config(name))

    _check_image_options(images, command_line, config)
    checkpoint = {**config, **command_line}.get("ckpt_path")
    if verb == "fit" and checkpoint is not None:
        folder = shell_word(str(Path(checkpoint).parent.parent))
        raise UserError(f"To resume a training, give its folder: moevision fit --resume {folder}.")
    if images is not None:
        command_line["data.path"] = images
    return Request(
        verb=verb,
        prints=args.prints,
        images=images,
        has_config=bool(config_names),
        pretrained=pretrained,
        resume=resume,
        config=config,
        command_line=command_line,
    )


def _is_shipped_config(name: str) -> bool:
    """Whether this is the name of a shipped config and no existing path."""
    return name in shipped_configs() and not Path(name).exists()


def resolve_settings(request: Request, say: Callable[[str], None] = print_rank0) -> Settings:
    """The settings of a request; options that it doesn't give are chosen for its images.

    Without `--config`, `fit` chooses options for a folder or a dataset's name (`choose_recipe`), and a checkpoint is
    evaluated with the config.yaml of its run.

    Every process must call this: rank 0 makes the choices that depend on the machine. `say` prints the line that says
    which weights the training starts from.
    """
    is_fit = request.verb == "fit"
    config = request.config
    command_line = request.command_line
    recorded: OptionValues = {}
    if not is_fit and not request.has_config:
        recorded = _options_of_run(command_line.get("ckpt_path"))
    if not request.has_config and not recorded and "data.path" not in command_line:
        raise UserError(_no_images_message(request))

    recipe: OptionValues = {}
    weights: OptionValues = {}
    with trains_on({**recorded, **request.options}.get("trainer.accelerator")):
        if is_fit and request.images is not None and not request.has_config:
            recipe = broadcast_from_rank0(
                partial(choose_recipe, request.images, request.pretrained, command_line, say)
            )
        elif request.pretrained is not None:
            weights = broadcast_from_rank0(
                partial(weights_alone, request.pretrained, command_line, say)
            )

        # Later sources take precedence over earlier ones.
        config = _without_epochs(config)
        command_line = _without_epochs(command_line)
        options = {**recipe, **recorded, **config, **command_line, **weights}
        if options.get("trainer.precision") is None:
            options["trainer.precision"] = default_precision()
    return to_settings(options)


def resumed_settings(request: Request) -> tuple[Settings, Settings]:
    """The settings of a resumed run: as recorded, and with the changes of the request.

    Nothing is chosen automatically: the recorded settings include the choices of the run's first start.
    """
    recorded = read_config(recorded_config(request.run_dir))
    weights: OptionValues = {}
    if request.pretrained not in (None, AUTO, NONE):
        weights = weights_alone(request.pretrained, request.command_line)
    return to_settings(recorded), to_settings({**recorded, **request.options, **weights})


def recorded_config(run_dir: Path) -> Path:
    """The config of a run's first start."""
    config = run_dir / "config.yaml"
    if not config.is_file():
        hint = f": give its folder, {run_dir.parent.parent}" if run_dir.suffix == ".ckpt" else ""
        raise UserError(f"{run_dir} is no run folder, it has no config.yaml{hint}.")
    return config


def _options_of_run(checkpoint: str | None) -> OptionValues:
    """The options of the run that a checkpoint is from, for its evaluation; empty if it is in no run folder."""
    if not checkpoint or Path(os.path.abspath(checkpoint)).parent.name != "checkpoints":
        return {}
    run_dir = run_of_checkpoint(checkpoint)
    if not (run_dir / "config.yaml").is_file():
        return {}
    # Evaluate in one process unless the user asks for more: this machine may have fewer devices than the training's.
    one_process = {"trainer.devices": 1, "trainer.num_nodes": 1}
    return {**read_config(newest_config(run_dir)), **one_process}


def _without_epochs(options: OptionValues) -> OptionValues:
    """If these options give max_steps alone, clear max_epochs, so that other sources' epochs don't end the training."""
    if options.get("trainer.max_steps", -1) > 0:
        return {"trainer.max_epochs": None, **options}
    return options


def _no_images_message(request: Request) -> str:
    """The message for a request that names no images."""
    if request.verb == "fit":
        alternative = f"--config with one of {', '.join(shipped_configs())}"
    elif checkpoint := request.command_line.get("ckpt_path"):
        return f"There is no config.yaml in {run_of_checkpoint(checkpoint)}: correct --ckpt_path."
    else:
        alternative = "--ckpt_path runs/NAME/checkpoints/best.ckpt for what its run was trained on"
    return (
        f"Say what to {request.verb} on, right after the verb: a folder with one subfolder per class, a dataset's "
        f"name, or {alternative}."
    )


def _check_image_options(
    folder: str | None, command_line: OptionValues, config: OptionValues
) -> None:
    """Raise a UserError for two names of images, and for a table's column if the images are no table."""
    path = command_line.get("data.path")
    if folder is not None and path not in (None, folder):
        raise UserError(f"{folder} and --data.path {path} both name images: use one of them.")

    column_options = ("data.image_column", "data.label_column")
    given_columns = [name for name in column_options if command_line.get(name) is not None]
    images = folder or path or config.get("data.path")  # None: those of a resumed run
    if not given_columns or images is None:
        return
    is_folder = kind_of(images) == "folder" and Path(images).expanduser().is_dir()
    if images in DATASET_NAMES or is_folder:
        raise UserError(
            f"--{given_columns[0]} names a column of a table, and there is none in {images}: leave it out."
        )


def read_config(file: Path) -> OptionValues:
    """The options of a config file, by their dotted names."""
    options = parse_config(read_yaml(file), str(file))
    if options.pop("resume", None) is not None:
        raise UserError(
            "resume belongs on the command line, not into a config: moevision fit --resume RUN."
        )
    return options


def run_of_checkpoint(checkpoint: str) -> Path:
    """The run folder of a checkpoint `runs/NAME/checkpoints/FILE`, which may be a relative path."""
    return Path(os.path.abspath(checkpoint)).parent.parent


def weights_alone(
    pretrained: str, options: OptionValues, say: Callable[[str], None] = print_rank0
) -> OptionValues:
    """The options that `--pretrained` stands for, without a recipe.

    They replace the model's name and base of a config. `options` are those of the command line, which are not replaced.
    """
    if pretrained == AUTO:
        weights, line = choose_start(AUTO)
        say(line)
        assert weights is not None  # or an error was raised
        pretrained = weights.source
    if pretrained == NONE:
        return {_PRETRAINED: None}

    base = None
    is_file = pretrained.endswith(".safetensors") and Path(pretrained).is_file()
    if is_file and options.get("model.arch.base") is None:
        base = architecture_of(pretrained)
    replaced = {_PRETRAINED: pretrained, "model.arch.name": None, "model.arch.base": base}
    return {name: value for name, value in replaced.items() if options.get(name) is None}


def choose_recipe(
    path: str,
    pretrained: str | None = None,
    options: OptionValues | None = None,
    say: Callable[[str], None] = print_rank0,
) -> OptionValues:
    """Options that suit the images in a folder or of a named dataset, by their number, free memory and the device.

    `pretrained` is `--pretrained` (None: pretrained weights if there are few images and no model is given), `options`
    are those of the command line, on which the choices depend.
    """
    options = options or {}
    images = count_images(path)
    # The first option that chooses or shapes the model, if any is given.
    model_option = next((name for name in _MODEL_OPTIONS if options.get(name) is not None), None)
    if pretrained is None:
        pretrained = _default_start(path, images, model_option, say)
    if pretrained != NONE and path not in DRAWN:
        _check_readable(path, options)

    weights, line = choose_start(pretrained, images, options.get("model.arch.base"))
    if line:
        say(line)
    loading = _loading_options(path, options)
    if weights is None:
        return loading | _options_from_scratch(images, model_option, options)

    depth = options.get("model.arch.depth")
    if depth is not None:
        first_blocks(weights.net, depth)  # the placement of experts depends on the depth
    recipe = loading | pretrained_options(weights, images)
    if options.get("model.arch.router") is not None:  # it may be one that can't start from clusters
        recipe.pop("router_start", None)
    return recipe


def _default_start(
    path: str, images: int, model_option: str | None, say: Callable[[str], None]
) -> str | None:
    """The value to use if `--pretrained` isn't given.

    None, with which `choose_start` looks for weights, if there are few images and no model is given; otherwise `none`.
    """
    are_few = 0 < images < SCRATCH_MINIMUM
    if not are_few or path in DRAWN:  # these are learned from scratch, however few
        return NONE
    if model_option is None:
        return None
    reason = f"--{model_option} shapes the model, so that no pretrained weights are looked for"
    say(from_scratch(reason).line)
    return NONE


def _check_readable(path: str, options: OptionValues) -> None:
    """Raise a UserError for missing or unreadable images, before any weights are looked for or downloaded."""
    if options.get("data.download"):
        return
    open_collection(
        path,
        root=options.get("data.root") or "data",
        download=False,
        image_size=0,
        seed=0,
        sizes={},
        columns=(options.get("data.image_column"), options.get("data.label_column")),
    )


def _loading_options(path: str, options: OptionValues) -> OptionValues:
    """Options of the images' crop, cache and worker processes on this machine."""
    devices = options.get("trainer.devices", 1)
    if not isinstance(devices, int) or devices < 1:  # auto, -1 or a list: assume all GPUs
        devices = torch.cuda.device_count()
    workers = 0
    if has_gpu():
        workers = min(8, (usable_cores() - 1) // devices)  # of each process
    free_bytes = available_memory_bytes() or 2**32
    return {
        "data.crop": "auto" if path in NAMED else "random_resized",
        "data.cache_mb": free_bytes // 4 // 2**20,  # a quarter of the free memory
        "data.num_workers": workers,
    }


def _options_from_scratch(
    images: int, model_option: str | None, options: OptionValues
) -> OptionValues:
    """Options of a training from scratch: a hybrid model, small enough for a CPU, with Muon.

    A model that the user names is trained with AdamW instead.
    """
    recipe: OptionValues = {}
    if model_option not in ("model.arch.name", "model.arch.base"):
        recipe = {"model.arch.name": "vit_moe_hybrid_patch8_32", "model.optim.name": "muon"}
    elif options.get("data.image_size") is None:
        # Only for the image size below: with an image size of the user's, the model keeps its own patch size.
        recipe = {"model.arch.patch_size": 8}

    optimizer = options.get("model.optim.name") or recipe.get("model.optim.name", "adamw")
    largest_batch = 256 if has_gpu() else 64
    epochs = round(200_000 / max(1, images))  # 200 000 images in all
    return recipe | {
        "model.optim.lr": 6e-3 if optimizer == "muon" else 1e-3,
        "data.image_size": 64,  # 64 tokens if the patch size is 8
        "data.batch_size": min(largest_batch, max(8, images // 20)),
        "trainer.max_epochs": min(100, max(10, epochs)),
    }


def batches_of_epoch(data: ImageDataModule, trainer: Trainer) -> int:
    """Number of batches that each process trains on in an epoch."""
    batches = data.train_batches(trainer.world_size)
    limit = trainer.limit_train_batches
    if not isinstance(limit, int):  # a float is a share of the batches
        limit = int(limit * batches)
    return min(batches, limit)


def check_window(data: ImageDataModule, trainer: Trainer) -> None:
    """Raise a UserError if a step would accumulate the gradients of more batches than an epoch has.

    At the end of an epoch Lightning makes the step with the batches that it has, but still divides the gradient by
    `accumulate_grad_batches`.
    """
    window = trainer.accumulate_grad_batches
    batches = max(1, batches_of_epoch(data, trainer))
    if window > batches:
        raise UserError(
            f"--trainer.accumulate_grad_batches is {window} and an epoch has {batches} batches: use at most {batches}."
        )


def planned_batches(data: ImageDataModule, trainer: Trainer) -> tuple[int, str]:
    """Batches of the whole training on each process, and a description such as `3 epochs of 800 images`."""
    window = trainer.accumulate_grad_batches
    batch_size = data.batch_size * trainer.world_size
    batches = batches_of_epoch(data, trainer)
    epochs = max(0, trainer.max_epochs or 0)
    steps = max(0, trainer.max_steps)

    # The last step of an epoch may have fewer batches.
    steps_per_epoch = max(1, math.ceil(batches / window))
    whole_epochs, further_steps = divmod(steps, steps_per_epoch)
    if steps and (epochs == 0 or whole_epochs < epochs):
        planned = whole_epochs * batches + further_steps * window
        return planned, f"{steps:,} steps of {batch_size * window:,} images"

    images = batches * batch_size
    if batches == data.train_batches(trainer.world_size):
        images = len(data.contents.datasets["train"])
    return epochs * batches, f"{epochs} epoch{'s' * (epochs != 1)} of {images:,} images"


def describe_plan(
    task: ClassificationTask,
    data: ImageDataModule,
    trainer: Trainer,
    expected_s: float | None = None,
    before_s: float = 0.0,
) -> str:
    """The lines about model, device, memory and length that `fit` prints before the training.

    `expected_s` is the expected time of the training in seconds (None: unknown), `before_s` the time that the linear
    probe and the initialisation of the routers took; the run's recorded time includes it.
    """
    total, active = parameter_counts(task.net)
    batch = f"batch {data.batch_size}"
    if trainer.accumulate_grad_batches > 1:
        batch += f" x {trainer.accumulate_grad_batches}"
    if trainer.world_size > 1:
        batch += f" x {trainer.world_size} processes"
    lines = [
        f"model: {describe_model(task)}, {total / 1e6:.2f} M parameters of which {active / 1e6:.2f} M are active",
        f"device: {device_name(trainer)}, precision {trainer.precision}, {batch}",
    ]

    memory = describe_memory(task, trainer)
    if memory is not None:
        lines.append(memory)

    batches, length = planned_batches(data, trainer)
    images = batches * data.batch_size * trainer.world_size
    lines.append(f"plan: {length}, {_describe_time(images, expected_s, before_s)}")

    block = block_to_pool(task.net)
    if block is not None:
        lines.append(
            f"note: the classifier reads the class token alone, so the routes of patches in block {block}, the last, "
            "change no answer; with --model.arch.global_pool avg they do."
        )
    return "\n".join(lines)


def _describe_time(images: int, expected_s: float | None, before_s: float) -> str:
    """The expected time of a training on this number of images, in words."""
    if not expected_s:
        return "how long they take isn't known before"
    minutes = "less than a minute"
    if expected_s >= 60:
        minutes = f"about {expected_s / 60:.0f} min"
    text = (
        f"{minutes} at {images / expected_s:.0f} images/s (by a few timed steps on noise, plus a tenth for loading and "
        "validation)"
    )
    if before_s >= 1:
        text += f"; the probe and the routers' start took {before_s:.0f} s"
    return text


@contextmanager
def memory_advice(batch_size: int, accumulated: int, *, goes_on: bool = False) -> Iterator[None]:
    """Turn an "out of memory" error into a UserError with advice: half the batch size, twice the accumulated batches.

    `accumulated` is the number of batches per step so far. The gradient of the cross-entropy and of the z loss stays
    the same; that of the other balance losses is approximate (`moevision.losses.Balance`), and BatchNorm, as in the
    convolutional stem, normalises each micro-batch on its own. A resumed training (`goes_on`) must keep its batch size:
    it is advised to use gradient checkpointing.
    """
    try:
        yield
    except RuntimeError as error:
        # CUDA has an error class for it; for MPS and CPU only the message tells.
        message = str(error).lower()
        if "out of memory" not in message and "can't allocate memory" not in message:
            raise
        advice = (
            f"use --data.batch_size {batch_size // 2} --trainer.accumulate_grad_batches {2 * accumulated}, which "
            "trains nearly alike (balance losses and BatchNorm see the batch in parts)."
        )
        if goes_on or batch_size == 1:
            advice = "use --model.grad_checkpointing true, which takes more time, or a device with more memory."
        raise UserError(f"Memory is too small for a batch of {batch_size}: {advice}") from error


def describe_model(task: ClassificationTask) -> str:
    """The model's name and its experts, in words."""
    layers = moe_layers(task.net)
    name = task.arch.base or task.arch.pretrained or task.arch.name or DEFAULT_NAME
    return f"{name} with {describe_moe(layers)}" if layers else f"dense twin of {name}"


def expected_seconds(task: ClassificationTask, data: ImageDataModule, trainer: Trainer) -> float:
    """Expected time of the training, with 10 % added for validation and loading."""
    batches, _ = planned_batches(data, trainer)
    return batches * seconds_per_batch(task, data, trainer) * 1.1


def seconds_per_batch(task: ClassificationTask, data: ImageDataModule, trainer: Trainer) -> float:
    """Time of a forward and backward pass of one batch of noise, on a copy of the model.

    The fastest of three passes, or of up to eight within ten seconds, without the first.
    """
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    net = copy.deepcopy(task.net).to(device).train()
    side = data.image_size
    image = torch.randn(data.batch_size, 3, side, side, device=device)
    label = torch.zeros(data.batch_size, dtype=torch.long, device=device)

    times: list[float] = []
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        while len(times) < 3 or (len(times) < 8 and sum(times) < 10):
            start = time.perf_counter()
            with trainer.precision_plugin.forward_context():
                loss = F.cross_entropy(net(image).float(), label)
            loss.backward()
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times[1:])  # the first pass may compile kernels


# ---- memory

# Precisions under which weights and moments are fp32.
_FP32_WEIGHTS = ("32-true", "bf16-mixed", "16-mixed")


def describe_memory(task: ClassificationTask, trainer: Trainer) -> str | None:
    """A line that says how much memory weights, gradients and moments need in each process; None: not known."""
    capacity, _ = _memory(trainer)
    if capacity is None or trainer.precision not in _FP32_WEIGHTS:
        return None
    size = sum(_bytes_of_process(state_bytes(task, trainer), trainer))
    where = "main memory" if _offloads(trainer) else "memory"
    return f"{where}: weights, gradients and moments {size / 1e9:.2f} of {capacity / 1e9:.1f} GB, without activations"


def check_memory(task: ClassificationTask, trainer: Trainer, *, goes_on: bool = False) -> None:
    """Raise a UserError for a training whose weights, gradients and moments alone are larger than the memory."""
    capacity, where = _memory(trainer)
    model_bytes = state_bytes(task, trainer)
    dense, experts = _bytes_of_process(model_bytes, trainer)
    if capacity is None or trainer.precision not in _FP32_WEIGHTS or dense + experts <= capacity:
        return

    remedies = ["fewer experts (--model.arch.num_experts) or a smaller model"]
    if goes_on:
        remedies = ["a device with more memory"]
    if trainer.strategy.root_device.type == "cuda" and not _offloads(trainer):
        gpus = math.ceil(sum(model_bytes) / capacity)
        remedies.append(f"--parallel fsdp on {gpus} GPUs or more")
        if dense < model_bytes[0]:  # the model is sharded already
            remedies.append("--parallel.offload true")
    raise UserError(
        f"Weights, gradients and moments of this model take {(dense + experts) / 1e9:.1f} GB, and {where} has "
        f"{capacity / 1e9:.1f} GB: use {' or '.join(remedies)}; --force tries it all the same."
    )


def state_bytes(task: ClassificationTask, trainer: Trainer) -> tuple[int, int]:
    """Bytes of fp32 weights, their moving average, gradients and moments, all in fp32: (all but experts, experts)."""
    expert_ids = {id(p) for layer in moe_layers(task.net) for p in layer.experts.parameters()}
    muon_matrices = matrices_of(task.net) if task.optim.name == "muon" else set[str]()
    weight_copies = 1 if callback_of(trainer, WeightEMA) is None else 2

    dense = experts = 0
    for name, parameter in task.net.named_parameters():
        copies = weight_copies
        if parameter.requires_grad:
            # The gradient, and the moments: one of Muon, two of AdamW.
            copies += 2 if name in muon_matrices else 3
        size = 4 * copies * parameter.numel()
        if id(parameter) in expert_ids:
            experts += size
        else:
            dense += size
    return dense, experts


def _bytes_of_process(model_bytes: tuple[int, int], trainer: Trainer) -> tuple[float, float]:
    """The part of `model_bytes` (`state_bytes`) that one process holds.

    FSDP shards everything, expert parallelism only the experts; with any other strategy each process holds everything.
    """
    dense, experts = model_bytes
    strategy = trainer.strategy
    is_sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    shards = 1
    if is_sharded and not getattr(strategy, "replicated", False):
        shards = trainer.world_size
    return dense / shards, experts / max(shards, getattr(strategy, "expert", 1))


def _offloads(trainer: Trainer) -> bool:
    """Whether weights and moments are in main memory while the GPU doesn't need them."""
    return getattr(trainer.strategy, "offload", False)


def _memory(trainer: Trainer) -> tuple[int | None, str]:
    """Size in bytes (None: unknown) and name of the memory of one process: its GPU's, or its share of the machine's."""
    device = trainer.strategy.root_device
    if device.type == "cuda" and not _offloads(trainer):
        return torch.cuda.mem_get_info(device)[1], device_name(trainer)
    where = "each process's part of the main memory" if _offloads(trainer) else device_name(trainer)
    main_memory = memory_limit_bytes()
    if main_memory is None:
        return None, where
    return main_memory // trainer.num_devices, where
