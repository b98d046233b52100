"""What `fit` chooses where the user did not (model, image size, batch, epochs, precision), and the plan that it prints.

Few images start from pretrained weights (`start`), others from scratch. Memory: whether weights, gradients and moments
fit is known before; if activations are too large, `memory_advice` says what takes less.

Every choice is printed and can be overridden on the command line. `runs/NAME/` is the run folder; `--config NAME` finds
the configs that are shipped with the package.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from moevision.config import ParsedArgs, checked
from moevision.data import ImageDataModule
from moevision.data.named import DATASET_NAMES, HF, NAMED
from moevision.data.open import contains_path, count_images, kind_of, open_collection
from moevision.efficiency import parameter_counts
from moevision.errors import UserError, escape_controls
from moevision.files import newest_config
from moevision.layers import describe_moe, moe_layers
from moevision.limits import memory_available_bytes, usable_cores, usable_memory_bytes
from moevision.models.config import DEFAULT_NAME
from moevision.models.convert import block_to_pool
from moevision.models.io import architecture_of, first_blocks
from moevision.models.safe_files import read_yaml
from moevision.train.health import WeightEMA
from moevision.train.optim import matrices_of
from moevision.train.processes import callback_of, has_gpu, print_rank0, trains_on
from moevision.train.provenance import device_name
from moevision.train.start import AUTO, NONE, choose_start, from_scratch, pretrained_options
from moevision.train.task import ClassificationTask
from moevision.words import shell_word

PACKAGE = Path(__file__).resolve().parent.parent
SCRATCH_MINIMUM = 200_000  # images below which `fit` starts from pretrained weights
_PRETRAINED = "model.arch.pretrained"
# Who gives one of these has chosen a model.
_MODEL = tuple(
    f"model.arch.{name}"
    for name in (
        "name",
        "base",
        "stem",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
    )
)


def new_run_folder(name: str, root: Path = Path("runs")) -> Path:  # type: ignore[return]
    """A folder that no earlier run has used: `runs/<name>`, else `runs/<name>-2`, ... Created empty."""
    for number in count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def refuse_among_images(run_dir: Path, data: str) -> None:
    """Raise a UserError where a run folder would be read as part of the images that it is made for."""
    if contains_path(data, run_dir):
        raise UserError(
            f"The run folder {run_dir} would become part of the images in {data}: start elsewhere, or give another "
            "--runs_root, such as ../runs."
        )


def run_name(data: str) -> str:
    """What a run is called after its data: that of the folder or table, without signs that a terminal can't show."""
    path = Path(data.removeprefix(HF).replace(":", "-") if data.startswith(HF) else data).resolve()
    name = path.stem if path.suffix.lower() == ".csv" else path.name
    return name if escape_controls(name) == name else escape_controls(name).replace("\\", "_")


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs in the installed package, or beside it in a checkout."""
    inside = PACKAGE / "configs"
    folder = inside if inside.is_dir() else PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The config file called `name`: a path, or the name of a shipped config; a UserError if it is neither."""
    if Path(name).is_file():
        return Path(name)
    configs = shipped_configs()
    if name in configs:
        return configs[name]
    near = difflib.get_close_matches(name, configs, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"There is no config {name!r}.{hint} Give a YAML file or one of: {', '.join(configs)}."
    )


def default_precision() -> str:
    """bf16-mixed where the hardware multiplies bfloat16 (it halves a step's time), else 32-true, on a GPU 16-mixed."""
    if has_gpu():
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        )
    return (
        "bf16-mixed"
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else "32-true"
    )


def resolve_settings(
    verb: str,
    given: ParsedArgs,
    *,
    recorded: bool = False,
    decide: Callable[[Callable[[], Any]], Any] = lambda decision: decision(),
    say: Callable[[str], None] = print_rank0,
) -> dict[str, Any]:
    """What a command line asks for, by dotted names, with what is chosen for the images where it says nothing.

    `FOLDER`, or a dataset's name, gets a recipe unless `--config` is given; a name of a shipped configuration is that
    configuration. A checkpoint is evaluated by the config.yaml of its run, unless another `--config` is given. A run
    that is `recorded` has a config already: nothing needs to be said, and no recipe is chosen.

    `decide` calls a function in the first process of a training alone, and gives its result to all of them; `say` takes
    the line that says what the training starts from.
    """
    path, typed = given.folder, dict(given.options)
    if typed.get("model.arch.twin") and typed.get("with_twin"):
        raise UserError(
            "--dense trains the dense model itself: leave --with-twin out, which trains both."
        )
    asked = (typed.pop(_PRETRAINED) or NONE) if _PRETRAINED in typed else None
    files = [find_config(name) for name in given.configs]
    named = path is not None and path in shipped_configs() and not Path(path).exists()
    if named and not files:
        if asked in (None, NONE) or path not in NAMED:
            files, path = [find_config(cast(str, path))], None
        else:  # recipes from scratch don't suit pretrained weights, their data do
            typed.setdefault("data.download", True)
    configured: dict[str, Any] = {}
    for file in files:
        configured |= read_config(file)
    _refuse_without_effect(path, configured, typed)
    checkpoint = None if verb == "fit" else typed.get("ckpt_path")
    if checkpoint and not files and Path(os.path.abspath(checkpoint)).parent.name == "checkpoints":
        run_dir = run_of_checkpoint(checkpoint)
        if (run_dir / "config.yaml").is_file():
            # One process evaluates, unless more are asked for: this may be another machine than that of the training.
            configured = {
                **read_config(newest_config(run_dir)),
                "trainer.devices": 1,
                "trainer.num_nodes": 1,
            }
    if path is None and not files and not configured and "data.path" not in typed and not recorded:
        if checkpoint:
            raise UserError(
                f"There is no config.yaml in {run_of_checkpoint(checkpoint)}: correct --ckpt_path."
            )
        other = "--ckpt_path runs/NAME/checkpoints/best.ckpt for what its run was trained on"
        if verb == "fit":
            other = f"--config with one of {', '.join(shipped_configs())}"
        raise UserError(
            f"Say what to {verb} on, right after the verb: a folder with one subfolder per class, a dataset's name, or "
            f"{other}."
        )
    recipe: dict[str, Any] = {}
    with trains_on(typed.get("trainer.accelerator", configured.get("trainer.accelerator"))):
        if verb == "fit" and path is not None and not files and not recorded:
            recipe = decide(lambda: choose_recipe(path, asked, typed, say))
        elif asked is not None and not (
            recorded and asked in (AUTO, NONE)
        ):  # a run that goes on has chosen
            typed |= decide(lambda: weights_alone(asked, typed, say))
        if not recorded and (recipe | configured | typed).get("trainer.precision") is None:
            typed["trainer.precision"] = default_precision()
    if path is not None:
        typed["data.path"] = path
    for each in (configured, typed):
        if (
            not recorded and each.get("trainer.max_steps", -1) > 0
        ):  # all of them, whatever the epochs of the others
            each.setdefault("trainer.max_epochs", None)
    found = {**recipe, **configured, **typed}
    if verb == "fit" and found.get("ckpt_path") is not None:
        folder = shell_word(str(Path(found["ckpt_path"]).parent.parent))
        raise UserError(f"To resume a training, give its folder: moevision fit --resume {folder}.")
    return found


def _refuse_without_effect(
    path: str | None, configured: Mapping[str, Any], typed: Mapping[str, Any]
) -> None:
    """Refuse what was typed of the images and would change nothing."""
    named = typed.get("data.path")
    if path is not None and named not in (None, path):
        raise UserError(f"{path} and --data.path {named} both name images: use one of them.")
    columns = [
        name for name in ("data.image_column", "data.label_column") if typed.get(name) is not None
    ]
    images = path or named or configured.get("data.path")  # None: a run's, which goes on
    if not columns or images is None:
        return
    if images in DATASET_NAMES or (
        kind_of(images) == "folder" and Path(images).expanduser().is_dir()
    ):
        raise UserError(
            f"--{columns[0]} names a column of a table, and there is none in {images}: leave it out."
        )


def read_config(file: Path) -> dict[str, Any]:
    """The options that a configuration gives, by their dotted names."""
    found = checked(read_yaml(file), str(file))
    if found.pop("resume", None) is not None:
        raise UserError(
            "resume belongs on the command line, not into a config: moevision fit --resume RUN."
        )
    return found


def run_of_checkpoint(checkpoint: str) -> Path:
    """The run folder of `runs/NAME/checkpoints/FILE`, from wherever that is named."""
    return Path(os.path.abspath(checkpoint)).parent.parent


def weights_alone(
    asked: str, given: Mapping[str, Any], say: Callable[[str], None] = print_rank0
) -> dict[str, Any]:
    """`--pretrained` as options; the name and base of a configuration, which it takes the place of, are left out."""
    if asked == AUTO:
        weights, line = choose_start(AUTO)
        say(line)
        asked = NONE if weights is None else weights.source
    if asked == NONE:
        return {_PRETRAINED: None}
    of_weights: dict[str, Any] = {"model.arch.name": None, "model.arch.base": None}
    if (
        asked.endswith(".safetensors")
        and Path(asked).is_file()
        and given.get("model.arch.base") is None
    ):
        of_weights["model.arch.base"] = architecture_of(asked)
    return {
        _PRETRAINED: asked,
        **{name: value for name, value in of_weights.items() if given.get(name) is None},
    }


def choose_recipe(
    path: str,
    asked: str | None = None,
    given: Mapping[str, Any] = {},
    say: Callable[[str], None] = print_rank0,
) -> dict[str, Any]:
    """Options for a folder of images or a dataset's name, from their number, free memory and device.

    `asked` is `--pretrained` (None: pretrained weights if there are few images and no model is named); `given` win.
    """
    named, images = path in NAMED, count_images(path)
    few = (
        0 < images < SCRATCH_MINIMUM and path != "synthetic_pets"
    )  # drawn ones are learnt from scratch
    named_model = next((option for option in _MODEL if given.get(option) is not None), None)
    if asked is None and few and named_model is not None:
        say(
            from_scratch(
                f"--{named_model} shapes the model, so that no pretrained weights are looked for"
            ).line
        )
    if asked is None and (not few or named_model is not None):
        asked = NONE
    if path != "synthetic_pets" and asked != NONE and not given.get("data.download"):
        # Before weights are asked for or fetched: images that aren't there, or can't be read, need none.
        columns = given.get("data.image_column"), given.get("data.label_column")
        root = given.get("data.root") or "data"
        open_collection(
            path, root=root, download=False, image_size=0, seed=0, sizes={}, columns=columns
        )
    weights, line = choose_start(asked, images, given.get("model.arch.base"))
    if line:
        say(line)
    if weights is not None and given.get("model.arch.depth") is not None:
        first_blocks(weights.net, given["model.arch.depth"])  # before experts are placed
    devices = given.get("trainer.devices", 1)
    if not isinstance(devices, int) or devices < 1:  # auto, -1, a list: at most all
        devices = torch.cuda.device_count()
    options: dict[str, Any] = {
        "data.crop": "auto" if named else "random_resized",
        "data.cache_mb": (memory_available_bytes() or 2**32)
        // 4
        // 2**20,  # a quarter of the free memory
        "data.num_workers": min(8, (usable_cores() - 1) // devices) if has_gpu() else 0,
    }
    if weights is not None:
        options |= pretrained_options(weights, images)
        if given.get("model.arch.router") is not None:  # not every router can
            options.pop("router_start", None)
        return options
    # From scratch: a hybrid that learns on a CPU, with Muon; for a model that the user names, AdamW. With a size of
    # images that the user names, the model's patches stay as they are.
    if named_model not in _MODEL[:2]:  # a name, a base
        options |= {"model.arch.name": "vit_moe_hybrid_patch8_32", "model.optim.name": "muon"}
    elif given.get("data.image_size") is None:
        options["model.arch.patch_size"] = 8
    optimizer = given.get("model.optim.name") or options.get("model.optim.name", "adamw")
    return options | {
        "model.optim.lr": 6e-3 if optimizer == "muon" else 1e-3,
        "data.image_size": 64,  # 64 tokens, where the patches are of 8 px
        "data.batch_size": min(256 if has_gpu() else 64, max(8, images // 20)),
        "trainer.max_epochs": min(
            100, max(10, round(200_000 / max(1, images)))
        ),  # 200 000 images seen, in limits
    }


def batches_of_epoch(data: ImageDataModule, trainer: L.Trainer) -> int:
    """Batches that a process trains on in an epoch."""
    batches, limit = data.train_batches(trainer.world_size), trainer.limit_train_batches
    return min(batches, limit if isinstance(limit, int) else int(limit * batches))


def check_window(data: ImageDataModule, trainer: L.Trainer) -> None:
    """Raise a UserError where a step would sum more batches than an epoch has: it ends with the epoch.

    Lightning would still divide the gradient by `accumulate_grad_batches`.
    """
    window, batches = trainer.accumulate_grad_batches, max(1, batches_of_epoch(data, trainer))
    if window > batches:
        raise UserError(
            f"--trainer.accumulate_grad_batches is {window} and an epoch has {batches} batches: use at most {batches}."
        )


def planned_batches(data: ImageDataModule, trainer: L.Trainer) -> tuple[int, str]:
    """Batches of the whole training, for each process, and what they are in words."""
    at_once, window = data.batch_size * trainer.world_size, trainer.accumulate_grad_batches
    batches, epoch = data.train_batches(trainer.world_size), batches_of_epoch(data, trainer)
    epochs, steps = max(0, trainer.max_epochs or 0), max(0, trainer.max_steps)
    per_epoch = max(1, math.ceil(epoch / window))  # an epoch's last step takes what is left of it
    whole_epochs, more = divmod(steps, per_epoch)
    if steps and (not epochs or whole_epochs < epochs):
        return (
            whole_epochs * epoch + more * window,
            f"{steps:,} steps of {at_once * window:,} images",
        )
    images = sum(data.class_counts["train"].values()) if epoch == batches else epoch * at_once
    return epochs * epoch, f"{epochs} epoch{'s' * (epochs != 1)} of {images:,} images"


def describe_plan(
    task: ClassificationTask,
    data: ImageDataModule,
    trainer: L.Trainer,
    expected_s: float | None = None,
    before_s: float = 0.0,
) -> str:
    """The lines that `fit` prints after the data's own description, with the time that is expected if that is known.

    `before_s` is what the linear probe and the routers' start took, which the run's time counts.
    """
    total, active = parameter_counts(task.net)
    lines = [
        f"model: {describe_model(task)}, {total / 1e6:.2f} M parameters of which {active / 1e6:.2f} M are active",
        f"device: {device_name(trainer)}, precision {trainer.precision}, batch {data.batch_size}"
        + (f" x {trainer.accumulate_grad_batches}" if trainer.accumulate_grad_batches > 1 else "")
        + (f" x {trainer.world_size} processes" if trainer.world_size > 1 else ""),
    ]
    if (memory := describe_memory(task, trainer)) is not None:
        lines.append(memory)
    batches, words = planned_batches(data, trainer)
    time_it_takes = "how long they take isn't known before"
    if expected_s:
        images = batches * data.batch_size * trainer.world_size
        minutes = f"about {expected_s / 60:.0f} min" if expected_s >= 60 else "less than a minute"
        time_it_takes = (
            f"{minutes} at {images / expected_s:.0f} images/s (by a few timed "
            "steps on noise, plus a tenth for loading and validation)"
            + (f"; the probe and the routers' start took {before_s:.0f} s" if before_s >= 1 else "")
        )
    lines.append(f"plan: {words}, {time_it_takes}")
    if (block := block_to_pool(task.net)) is not None:
        lines.append(
            f"note: the classifier reads the class token alone, so the routes of patches in block {block}, the last, "
            "change no answer; with --model.arch.global_pool avg they do."
        )
    return "\n".join(lines)


@contextmanager
def memory_advice(batch_size: int, accumulated: int, *, goes_on: bool = False) -> Iterator[None]:
    """Turn "out of memory" into advice that trains nearly alike: half the batch, twice the accumulation.

    The gradient of the cross-entropy and of the z loss stays the same; that of the other balance losses is approximate
    (`moevision.losses.AuxLoss`), and BatchNorm, as in the convolutional stem, normalises each micro-batch on its own.
    A training that goes on keeps its batch: there blocks are computed again.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()  # CUDA has a class for it; MPS and CPU only say so
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        advice = (
            f"use --data.batch_size {batch_size // 2} --trainer.accumulate_grad_batches {2 * accumulated}, which "
            "trains nearly alike (balance losses and BatchNorm see the batch in parts)."
        )
        if goes_on or batch_size == 1:
            advice = "use --model.grad_checkpointing true, which takes more time, or a device with more memory."
        raise UserError(f"Memory is too small for a batch of {batch_size}: {advice}") from error


def describe_model(task: ClassificationTask) -> str:
    """Name and what is mixed, in words."""
    layers = moe_layers(task.net)
    name = task.arch.base or task.arch.pretrained or task.arch.name or DEFAULT_NAME
    return f"{name} with {describe_moe(layers)}" if layers else f"dense twin of {name}"


def expected_seconds(task: ClassificationTask, data: ImageDataModule, trainer: L.Trainer) -> float:
    """How long the training is expected to take, with a tenth for validation and loading."""
    return planned_batches(data, trainer)[0] * seconds_per_batch(task, data, trainer) * 1.1


def seconds_per_batch(task: ClassificationTask, data: ImageDataModule, trainer: L.Trainer) -> float:
    """Forward and backward of one batch of noise, on a copy of the model: the fastest of up to eight in ten seconds."""
    device = trainer.strategy.root_device
    net = copy.deepcopy(task.net).to(device).train()
    image = torch.randn(data.batch_size, 3, data.image_size, data.image_size, device=device)
    label = torch.zeros(data.batch_size, dtype=torch.long, device=device)
    times: list[float] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while len(times) < 3 or (len(times) < 8 and sum(times) < 10):
            start = time.perf_counter()
            with trainer.precision_plugin.forward_context():
                loss = F.cross_entropy(net(image).float(), label)
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one compiles kernels


# ---- memory

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # under the others weights are not fp32


def describe_memory(task: ClassificationTask, trainer: L.Trainer) -> str | None:
    """What weights, gradients and moments take of the memory; None: not known."""
    capacity, _ = _memory(trainer)
    if capacity is None or trainer.precision not in _PRECISIONS:
        return None
    size, where = (
        sum(_kept(state_bytes(task, trainer), trainer)),
        "main memory" if _offloads(trainer) else "memory",
    )
    return f"{where}: weights, gradients and moments {size / 1e9:.2f} of {capacity / 1e9:.1f} GB, without activations"


def check_memory(task: ClassificationTask, trainer: L.Trainer, *, goes_on: bool = False) -> None:
    """Raise a UserError for a training whose weights, gradients and moments alone are larger than the memory."""
    (capacity, where), whole = _memory(trainer), state_bytes(task, trainer)
    dense, experts = _kept(whole, trainer)
    if capacity is None or trainer.precision not in _PRECISIONS or dense + experts <= capacity:
        return
    ways = [
        "a device with more memory"
        if goes_on
        else "fewer experts (--model.arch.num_experts) or a smaller model"
    ]
    if trainer.strategy.root_device.type == "cuda" and not _offloads(trainer):
        ways.append(f"--parallel fsdp on {math.ceil(sum(whole) / capacity)} GPUs or more")
        if dense < whole[0]:  # it is divided already
            ways.append("--parallel.offload true")
    raise UserError(
        f"Weights, gradients and moments of this model take {(dense + experts) / 1e9:.1f} GB, and {where} has "
        f"{capacity / 1e9:.1f} GB: use {' or '.join(ways)}; --force tries it all the same."
    )


def state_bytes(task: ClassificationTask, trainer: L.Trainer) -> tuple[int, int]:
    """Bytes of fp32 weights, their moving average, gradients and moments: of all but the experts, and of these."""
    of_experts = {id(p) for layer in moe_layers(task.net) for p in layer.experts.parameters()}
    matrices = (
        matrices_of(task.net) if task.optim.name == "muon" else set[str]()
    )  # one moment; AdamW keeps two
    weights, size = 1 if callback_of(trainer, WeightEMA) is None else 2, {False: 0, True: 0}
    for name, p in task.net.named_parameters():
        learning = (2 if name in matrices else 3) if p.requires_grad else 0
        size[id(p) in of_experts] += 4 * p.numel() * (weights + learning)
    return size[False], size[True]


def _kept(whole: tuple[int, int], trainer: L.Trainer) -> tuple[float, float]:
    """What one process keeps: FSDP2 divides all of it, expert parallelism the experts, every other strategy copies."""
    strategy = trainer.strategy
    sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not getattr(
        strategy, "replicated", False
    )
    processes = trainer.world_size if sharded else 1
    return whole[0] / processes, whole[1] / max(processes, getattr(strategy, "expert", 1))


def _offloads(trainer: L.Trainer) -> bool:
    return getattr(trainer.strategy, "offload", False)


def _memory(trainer: L.Trainer) -> tuple[int | None, str]:
    """Bytes and name of the memory that a process has, an equal part of a machine's; None: the system doesn't say."""
    device = trainer.strategy.root_device
    if device.type == "cuda" and not _offloads(trainer):
        return torch.cuda.mem_get_info(device)[1], device_name(trainer)
    machine = usable_memory_bytes()
    where = "each process's part of the main memory" if _offloads(trainer) else device_name(trainer)
    return machine and machine // trainer.num_devices, where
