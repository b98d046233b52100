"""A typed description of a model, from which `build_model` makes it.

Only JSON primitives: a Lightning checkpoint stores it, and loads under `weights_only=True`.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import timm
from torch import nn

import moevision.models.vit_moe  # noqa: F401  (registers the vit_moe names)
from moevision.errors import UserError
from moevision.models.convert import convert_to_moe


@dataclass
class MoEConfig:
    """Which model to train; a field left empty (null) takes the architecture's own value.

    Args:
        name: timm name of the model: a `vit_moe*` name, or `vit_moe` with `base`.
        base: for `vit_moe`: the dense timm ViT to convert, such as deit_tiny_patch16_224.
        pretrained: start the dense part from these weights: a timm name, a `local-dir:` folder saved by timm or by
            moevision, or a file; experts start as copies of the MLP they replace. Sets `name` and `base`.
        num_experts: E, experts in each MoE layer.
        top_k: K, experts that compute each token.
        router: `noisy_top_k` or `vmoe_top_k`.
        moe_layers: `every2`, `last2`, `all`, or a list of block numbers counting from 0.
        expert_hidden: hidden width of one expert; by default mlp_ratio x width / top_k.
        backend: how experts are computed: `auto`, `loop`, `grouped` or `dense`.
        twin: train the dense twin instead, matched in `active_flops` or `total_params`.
        stem: `patch` or `conv`.
        patch_size: side of a patch in pixels.
        embed_dim: width of a token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of a dense MLP over the width of a token.
        drop_path_rate: stochastic depth at the last block.
        proj_drop_rate: dropout in MLPs, experts and attention projections.
        patch_drop_rate: share of patches left out in training.
    """

    name: str = "vit_moe_micro_patch4_32"
    base: str | None = None
    pretrained: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    router: str | None = None
    moe_layers: str | list[int] | None = None
    expert_hidden: int | None = None
    backend: Literal["auto", "loop", "grouped", "dense"] | None = None
    twin: Literal["active_flops", "total_params"] | None = None
    stem: Literal["patch", "conv"] | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    drop_path_rate: float | None = None
    proj_drop_rate: float | None = None
    patch_drop_rate: float | None = None


def build_model(config: MoEConfig, num_classes: int, image_size: int, *, load_pretrained: bool = True) -> nn.Module:
    """The model that `config` describes.

    Args:
        config: what to build.
        num_classes: C, outputs of the classifier.
        image_size: side of the square input in pixels.
        load_pretrained: read the weights of `config.pretrained`; False builds the same architecture without them, for
            weights that come from a checkpoint.

    Raises:
        UserError: if a name doesn't exist (the near ones are offered), an argument doesn't fit, or the pretrained
            weights can't be had.
    """
    if config.pretrained is not None:
        return _from_pretrained(config, num_classes, image_size, load_pretrained)
    if not timm.is_model(config.name):
        raise UserError(_unknown_name(config.name))
    arguments = {key: value for key, value in asdict(config).items() if value is not None and key != "name"}
    try:
        model: nn.Module = timm.create_model(config.name, num_classes=num_classes, img_size=image_size, **arguments)
    except (TypeError, AssertionError) as error:  # timm asserts that heads divide the width
        raise UserError(f"{config.name} does not take these options ({error}).") from error
    if not hasattr(model, "moe_config"):
        raise UserError(
            f"{config.name} is a dense model: use --model.arch.name vit_moe --model.arch.base {config.name}."
        )
    return model


def _from_pretrained(config: MoEConfig, num_classes: int, image_size: int, load_weights: bool) -> nn.Module:
    source = create_from(str(config.pretrained), num_classes, image_size, load_weights=load_weights)
    if hasattr(source, "moe_config"):
        if config.twin is not None:
            raise UserError(
                f"{config.pretrained} has experts already, so there are no dense weights for a twin: leave --with-twin "
                "out, or start both from a dense ViT."
            )
        return source  # a MoE model of ours, trained further
    # The twin of a model whose experts are copies is the dense model that they were copied from.
    layers = [] if config.twin is not None else config.moe_layers or "every2"
    options = {name: getattr(config, name) for name in ("num_experts", "top_k", "router", "backend")}
    given = {name: value for name, value in options.items() if value is not None}
    return convert_to_moe(source, layers, copy_weights=True, **given)


def create_from(source: str, num_classes: int, image_size: int, *, load_weights: bool = True) -> nn.Module:
    """A model and its weights from a timm name, a folder that timm saved, or either with its `local-dir:` prefix.

    Raises:
        UserError: if the name or folder doesn't exist, or its weights can't be loaded.
    """
    address = source
    if Path(source).is_dir():
        address = f"local-dir:{source}"
    elif ":" not in source and not timm.is_model(source):
        raise UserError(_unknown_name(source))
    try:
        model: nn.Module = timm.create_model(
            address, pretrained=load_weights, num_classes=num_classes, img_size=image_size
        )
    except Exception as error:  # hub, file and shape errors come in every type; the cause stays attached
        raise UserError(
            f"The weights of {source!r} could not be loaded ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Give a timm name with network access, or a folder with config.json and model.safetensors."
        ) from error
    return model


def _unknown_name(name: str) -> str:
    bare = name.split(".")[0]
    known = timm.list_models("*vit*") + timm.list_models("*deit*")
    near = difflib.get_close_matches(bare, known, n=4, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else " See `timm.list_models('*vit*')`."
    return f"There is no model {name!r}.{hint}"
