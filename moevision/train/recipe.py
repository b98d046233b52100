"""What `moevision fit FOLDER` chooses when nobody said: model, picture size, batch, epochs, precision.

The rules are plain and printed; every one of them can be overridden on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from moevision.data.folder import walk
from moevision.data.images import is_image_path
from moevision.errors import UserError
from moevision.train.provenance import total_memory_bytes
from moevision.train.run_folder import find_config, shipped_configs

SCRATCH_MINIMUM = 20_000  # images below which a pretrained start is usually far better
_ASKS = ("-h", "--help", "--print_config")
# Pictures in the datasets known by name, which may have to be fetched before they can be counted.
_NAMED_IMAGES = {
    "synthetic_pets": 16_000,
    "cifar10": 60_000,
    "cifar100": 60_000,
    "imagenette": 13_394,
    "pets": 7_349,
    "pets_cat_dog": 7_349,
    "flowers102": 8_189,
    "food101": 101_000,
    "imagenet": 1_331_167,
}
_CACHE_SHARE = 0.25  # of the free memory may hold decoded pictures


def default_precision() -> str:
    """bf16-mixed where the hardware multiplies bfloat16 (it halves the time of a step), else 32-true."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if torch.backends.mps.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "32-true"


def expand_arguments(verb: str, arguments: Sequence[str], *, recorded: bool = False) -> list[str]:
    """Rewrite what people type into what LightningCLI reads.

    `FOLDER` (or a dataset's name) in front becomes `--data.path`, with a recipe for it unless `--config` is given;
    `--config NAME` finds shipped configs; `--pretrained X` becomes `--model.arch.pretrained X`.

    Args:
        verb: the verb.
        arguments: what follows it.
        recorded: the run has a config already, so that nothing needs to be said and no recipe is chosen.

    Raises:
        UserError: if a config does not exist, or nothing says what to train on.
    """
    rest = [
        argument.replace("--", "--model.arch.", 1) if _is(argument, "--pretrained") else argument
        for argument in arguments
    ]
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    has_config = any(_is(argument, "--config") or _is(argument, "-c") for argument in rest)
    says_what = has_config or path is not None or any(_is(argument, "--data.path") for argument in rest)
    if not (says_what or recorded) and not any(argument in _ASKS for argument in rest):
        raise UserError(
            f"Say what to {verb} on, right after the verb: a folder with one subfolder per class, a dataset's name, or "
            f"--config with one of {', '.join(shipped_configs())}."
        )
    front: list[str] = []
    if path is not None and not has_config and path in shipped_configs() and not Path(path).exists():
        front = ["--config", path]
    elif path is not None:
        pretrained = any(_is(argument, "--model.arch.pretrained") for argument in rest)
        chooses = verb == "fit" and not has_config and not recorded
        chosen = choose_recipe(path, pretrained=pretrained) if chooses else []
        front = [*chosen, "--data.path", path]
    return _with_found_configs([*front, *rest] if not has_config else [*rest, *front])


def _is(argument: str, option: str) -> bool:
    return argument == option or argument.startswith(option + "=")


def _with_found_configs(arguments: Sequence[str]) -> list[str]:
    found: list[str] = []
    expects_config = False
    for argument in arguments:
        if expects_config:
            argument = str(find_config(argument))
        elif argument.startswith("--config="):
            argument = f"--config={find_config(argument.removeprefix('--config='))}"
        expects_config = argument in ("--config", "-c")
        found.append(argument)
    return found


def choose_recipe(path: str, *, pretrained: bool) -> list[str]:
    """Command-line options for a folder of images or a dataset's name, from their number, free memory and device.

    From scratch: the micro model, on 64 px pictures in 8 x 8 patches (64 tokens), with a convolutional stem; it
    learns on a CPU. Pretrained: 224 px, as the weights were trained. Epochs aim at 200 000 pictures seen, at least
    10 and at most 100 epochs.
    """
    named = path in _NAMED_IMAGES
    images = _NAMED_IMAGES[path] if named else count_images(Path(path))
    on_gpu = torch.cuda.is_available()
    epochs = min(100, max(10, round(200_000 / max(1, images))))
    batch = min(256 if on_gpu else 64, max(8, images // 20))
    options = {
        "--data.image_size": 224 if pretrained else 64,
        "--data.crop": "auto" if named else "random_resized",
        "--data.batch_size": batch,
        "--data.cache_mb": int(free_memory_bytes() * _CACHE_SHARE / 2**20),
        "--data.num_workers": min(8, (os.cpu_count() or 1) - 1) if on_gpu else 0,
        "--trainer.max_epochs": max(5, epochs // 5) if pretrained else epochs,
        "--model.optim.lr": 1e-4 if pretrained else 1e-3,
    }
    if not pretrained:
        options |= {"--model.arch.name": "vit_moe_micro_patch4_32", "--model.arch.patch_size": 8}
    return [f"{option}={value}" for option, value in options.items()]


def count_images(folder: Path) -> int:
    """Image files below `folder`, by their suffix; 0 if there is no such folder."""
    return sum(is_image_path(entry.name) for entry in walk(folder))


def free_memory_bytes() -> int:
    """Memory that can be used without swapping; a quarter of all memory where the system doesn't tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return (total_memory_bytes() or 4 * 2**30) // 4
