"""A typed description of a model, from which `build_model` makes it.

Only JSON primitives: a Lightning checkpoint stores it, and loads under `weights_only=True`.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from moevision.config import MoEConfig
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.convert import convert_to_moe, moe_layer_indices, one_or_list, pool_patches
from moevision.models.io import architecture_of, config_file, create_from, unknown_name
from moevision.models.safe_files import CONFIG
from moevision.models.upcycle import upcycle
from moevision.models.vit_moe import MOE_ARGUMENTS, check_patches
from moevision.types import Keywords, TimmModel

DEFAULT_NAME = "vit_moe_micro_patch4_32"
_OF_THE_WEIGHTS = ("name", "base", "stem", "patch_size", "embed_dim", "num_heads", "mlp_ratio")


def build_model(
    config: MoEConfig,
    num_classes: int,
    image_size: int,
    *,
    load_pretrained: bool = True,
    pretrained_config_dir: Path | None = None,
) -> nn.Module:
    """The model that `config` describes, with C outputs, for square images of that side in pixels.

    Without `load_pretrained` it has the architecture of `config.pretrained` and weights that come from elsewhere; what
    it describes is then read where `save_pretrained_config` wrote it (`pretrained_config_dir`).
    """
    if config.pretrained is not None:
        folder = pretrained_config_dir
        if not load_pretrained and folder is not None and folder.is_dir():
            config = replace(config, pretrained=str(folder))
        return _from_pretrained(config, num_classes, image_size, load_pretrained)
    name = config.name or DEFAULT_NAME
    if not timm.is_model(name):
        raise UserError(unknown_name(name))
    if config.upcycle_reinit is not None:
        raise UserError(
            "--model.arch.upcycle_reinit changes copies of pretrained weights: give --pretrained, or leave it out."
        )
    arguments = {key: value for key, value in asdict(config).items() if value is not None}
    arguments.pop("name", None)
    try:
        model: nn.Module = timm.create_model(
            name, num_classes=num_classes, img_size=image_size, **arguments
        )
    except (TypeError, AssertionError) as error:  # timm asserts that heads divide the width
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name} does not take these options ({reason}).") from error
    if not hasattr(model, "moe_config"):
        raise UserError(
            f"{name} is a dense model: use --model.arch.name vit_moe --model.arch.base {name}."
        )
    return model


def save_pretrained_config(config: MoEConfig, folder: Path) -> None:
    """Copy the config.json of the model that training starts from: a checkpoint is of use without that model, then."""
    file = None if config.pretrained is None else config_file(config.pretrained)
    if file is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / CONFIG)


def dense_start(config: MoEConfig, num_classes: int, image_size: int) -> nn.Module | None:
    """The dense model that `config` upcycles, with weights and a classifier of C outputs; None if it has experts."""
    source = _pretrained_source(config, num_classes, image_size, load_weights=True)
    return None if moe_layers(source) else source


def _from_pretrained(
    config: MoEConfig, num_classes: int, image_size: int, load_weights: bool
) -> nn.Module:
    if load_weights:  # without them a run of an earlier version goes on as it began
        _refuse_other_sizes(config)
    source = _pretrained_source(config, num_classes, image_size, load_weights)
    patch = getattr(getattr(source, "patch_embed", None), "patch_size", None)
    if load_weights and patch is not None:
        check_patches(image_size, patch[0], otherwise="")
    if moe_layers(source):
        if config.twin is not None:
            raise UserError(
                f"{config.pretrained} has experts already, so there are no dense weights for --with-twin or --dense: "
                "leave it out, or start from a dense ViT."
            )
        if load_weights:
            _refuse_other_experts(config, source)
        return source  # a MoE model of ours, trained further
    if config.twin is not None:
        # Of a model whose experts are copies: the dense model that they were copied from.
        return convert_to_moe(source, [])

    options: Keywords = {"router": "noisy_top_k", "top_k": None}
    for name in MOE_ARGUMENTS:
        value = getattr(config, name)
        if value is not None:
            options[name] = value
    # In numbers: a checkpoint is rebuilt by its config, whatever a placement's name means to `upcycle` by then.
    layers = moe_layer_indices(config.moe_layers or "every2", len(cast(Any, source).blocks))
    # Without a seed of its own: the run's.
    return upcycle(source, layers=layers, reinit=config.upcycle_reinit or 0.0, seed=None, **options)


def _refuse_other_sizes(config: MoEConfig) -> None:
    sizes = [name for name in _OF_THE_WEIGHTS if getattr(config, name) is not None]
    if str(config.pretrained).endswith(".safetensors") and "base" in sizes:
        sizes.remove("base")  # says what the file is of
    if config.twin == "total_params":
        sizes.append("twin")
    if sizes:
        options = ", ".join(
            f"--model.arch.{name} null (it is {getattr(config, name)})" for name in sizes
        )
        raise UserError(
            f"The model is that of the pretrained weights {config.pretrained}, as it is: give {options}, or train from "
            "scratch, with --pretrained none."
        )


def _refuse_other_experts(config: MoEConfig, source: TimmModel) -> None:
    """Experts that come with the weights are trained as they came."""
    widths = [layer.experts.fc1.out_features for layer in moe_layers(source)]
    pretrained = {**source.moe_config, "expert_hidden": one_or_list(widths, None)}

    different = []
    for name in ("moe_layers", *MOE_ARGUMENTS, "upcycle_reinit"):
        value = setting = getattr(config, name)
        if setting is None:
            continue
        if name == "moe_layers":
            value = moe_layer_indices(setting, len(source.blocks))
        elif isinstance(setting, list):
            value = one_or_list(setting, None)
        if value != pretrained.get(name):
            there = pretrained.get(name, "not set")
            different.append(f"--model.arch.{name} null (it is {setting}; there: {there})")
    if different:
        raise UserError(
            f"{config.pretrained} has experts already, which are trained on as they are: give {', '.join(different)}, "
            "or start from a dense ViT."
        )


def _pretrained_source(
    config: MoEConfig, num_classes: int, image_size: int, load_weights: bool
) -> nn.Module:
    name = str(config.pretrained)
    file = None
    if name.endswith(".safetensors"):
        file = name
        name = config.base or architecture_of(file)
    source = create_from(
        name,
        num_classes,
        image_size,
        weights=file,
        load_weights=load_weights,
        depth=config.depth,
        drop_path_rate=config.drop_path_rate,
        proj_drop_rate=config.proj_drop_rate,
        patch_drop_rate=config.patch_drop_rate,
    )
    if config.global_pool == "avg":
        source = pool_patches(source)
    pool = getattr(source, "global_pool", None)
    if load_weights and config.global_pool not in (None, pool):
        raise UserError(
            f"The classifier of {config.pretrained} has global_pool {pool!r}: leave --model.arch.global_pool "
            f"{config.global_pool} out."
        )
    return source
