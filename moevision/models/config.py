"""A typed description of a model, from which `build_model` makes it.

Only JSON primitives: a Lightning checkpoint stores it, and loads under `weights_only=True`.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import timm
from torch import nn

from moevision.errors import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, Ranges, UserError, check_ranges
from moevision.layers import RouterOptions, moe_layers
from moevision.models.convert import convert_to_moe, moe_layer_indices, one_or_list
from moevision.models.io import FOLDER, architecture_of, create_from, model_folder, unknown_name
from moevision.models.reading import pool_patches
from moevision.models.safe_files import CONFIG
from moevision.models.upcycle import upcycle
from moevision.models.vit_moe import MOE_ARGUMENTS, check_patches

_RANGES: Ranges = (
    (*AT_LEAST_1, ("num_experts", "top_k", "patch_size", "embed_dim", "depth", "num_heads", "expert_hidden")),
    (*AT_LEAST_0, ("num_shared_experts", "upcycle_noise")),
    (*ABOVE_0, ("mlp_ratio",)),
    (*SHARE, ("drop_path_rate", "proj_drop_rate", "patch_drop_rate", "expert_drop")),
    ("at least 0 and at most 1", lambda x: 0 <= x <= 1, ("upcycle_reinit",)),
)
DEFAULT_NAME = "vit_moe_micro_patch4_32"
_OF_THE_WEIGHTS = ("name", "base", "stem", "patch_size", "embed_dim", "num_heads", "mlp_ratio")


@dataclass
class MoEConfig(RouterOptions):
    """Which model to train; a field left empty (null) takes the architecture's own value.

    A list in `num_experts`, `top_k`, `router` or `expert_hidden` gives each MoE layer its own. The options of
    `RouterOptions` stand beside these fields.

    Args:
        name: timm name of the model: a `vit_moe*` name, or `vit_moe` with `base`; vit_moe_micro_patch4_32 by default.
        base: for `vit_moe`: the dense timm ViT to convert, such as deit_tiny_patch16_224.
        pretrained: start from these weights: a timm name, a folder saved by timm or by moevision, or a `.safetensors`
            file (its metadata say its architecture, or `base` does). A dense model is upcycled: experts start as copies
            of the MLP that they replace, or of parts of it. Name and sizes are the weights', so that only `depth` may
            be given beside it.
        num_experts: E, experts in each MoE layer.
        top_k: K, experts that compute each token; by default the router's own, 2 for most.
        router: `noisy_top_k`, `vmoe_top_k`, `switch`, `sigmoid`, `bias_balanced`, `cosine`, `expert_choice` or `soft`;
            baselines `hash`, `random`, `position`, `colour`.
        moe_layers: `every2`, `last2`, `all`, or a list of block numbers counting from 0.
        expert_hidden: hidden width of one expert; by default mlp_ratio x width / (top_k + shared experts), and with
            `pretrained` that of the MLP; half of it there starts each pair of experts as the two halves of the MLP.
        backend: how experts are computed: `auto`, `loop`, `grouped` or `dense`.
        twin: train the dense twin instead, matched in `active_flops` or `total_params`.
        stem: what cuts an image into tokens: `patch`, `conv` (strided convolutions), or `stages` or `wide_stages`
            (those of the hybrids).
        patch_size: side of a patch in pixels.
        embed_dim: width of a token.
        depth: number of blocks; with `pretrained` so many of the first ones, all by default.
        num_heads: attention heads.
        mlp_ratio: hidden width of a dense MLP over the width of a token.
        drop_path_rate: stochastic depth at the last block.
        proj_drop_rate: dropout in MLPs, experts and attention projections.
        patch_drop_rate: share of patches left out in training.
        global_pool: what the classifier reads: `token` (the class token) or `avg` (the mean of all patches, so that
            every patch's route counts, in the last block too); by default the architecture's own.
        num_shared_experts: experts that every token passes besides the chosen ones.
        expert_drop: dropout inside the experts, in the place of `proj_drop_rate`.
        upcycle_noise: with `pretrained`: noise on the copies, relative to the spread of their weights.
        upcycle_reinit: with `pretrained`: share of each copy's hidden units that are drawn anew.
    """

    name: str | None = None
    base: str | None = None
    pretrained: str | None = None
    num_experts: int | list[int] | None = None
    top_k: int | list[int] | None = None
    router: str | list[str] | None = None
    moe_layers: str | list[int] | None = None
    expert_hidden: int | list[int] | None = None
    backend: Literal["auto", "loop", "grouped", "dense"] | None = None
    twin: Literal["active_flops", "total_params"] | None = None
    stem: Literal["patch", "conv", "stages", "wide_stages"] | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    drop_path_rate: float | None = None
    proj_drop_rate: float | None = None
    patch_drop_rate: float | None = None
    global_pool: Literal["token", "avg"] | None = None
    num_shared_experts: int | None = None
    expert_drop: float | None = None
    upcycle_noise: float | None = None
    upcycle_reinit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, _RANGES, "--model.arch.")


def build_model(
    config: MoEConfig, num_classes: int, image_size: int, *, load_pretrained: bool = True, kept: Path | None = None
) -> nn.Module:
    """The model that `config` describes.

    Args:
        config: what to build.
        num_classes: C, outputs of the classifier.
        image_size: side of the square input in pixels.
        load_pretrained: read the weights of `config.pretrained`; False builds the same architecture without them, for
            weights that come from a checkpoint.
        kept: where `keep_start` was told to keep what `config.pretrained` describes; read without the weights.

    Raises:
        UserError: if a name doesn't exist (the near ones are offered), an argument doesn't fit, or the pretrained
            weights can't be had.
    """
    if config.pretrained is not None:
        if not load_pretrained and kept is not None and kept.is_dir():
            config = replace(config, pretrained=str(kept))
        return _from_pretrained(config, num_classes, image_size, load_pretrained)
    name = config.name or DEFAULT_NAME
    if not timm.is_model(name):
        raise UserError(unknown_name(name))
    arguments = {key: value for key, value in asdict(config).items() if value is not None and key != "name"}
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, img_size=image_size, **arguments)
    except (TypeError, AssertionError) as error:  # timm asserts that heads divide the width
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{name} does not take these options ({reason}).") from error
    if not hasattr(model, "moe_config"):
        raise UserError(f"{name} is a dense model: use --model.arch.name vit_moe --model.arch.base {name}.")
    return model


def keep_start(config: MoEConfig, kept: Path) -> None:
    """Copy the config.json of a folder that training starts from: a checkpoint is of use without that folder, then."""
    folder = None if config.pretrained is None else model_folder(Path(config.pretrained.removeprefix(FOLDER)))
    if folder is not None:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / CONFIG, kept / CONFIG)


def dense_start(config: MoEConfig, num_classes: int, image_size: int) -> nn.Module | None:
    """The dense model that `config` upcycles, with its weights and a classifier of C outputs; None if it has experts.

    Raises:
        UserError: if the pretrained weights can't be had.
    """
    source = _pretrained_source(config, num_classes, image_size, load_weights=True)
    return None if moe_layers(source) else source


def _from_pretrained(config: MoEConfig, num_classes: int, image_size: int, load_weights: bool) -> nn.Module:
    if load_weights:  # a run of an earlier version goes on as it began
        _refuse_other_sizes(config)
    source = _pretrained_source(config, num_classes, image_size, load_weights)
    patch = getattr(getattr(source, "patch_embed", None), "patch_size", None)
    if load_weights and patch is not None:  # a run of an earlier version goes on as it began
        check_patches(image_size, patch[0], otherwise="")
    if moe_layers(source):
        if config.twin is not None:
            raise UserError(
                f"{config.pretrained} has experts already, so there are no dense weights for --with-twin or --dense: "
                "leave it out, or start from a dense ViT."
            )
        if load_weights:  # a run of an earlier version goes on as it began
            _refuse_other_experts(config, source)
        return source  # a MoE model of ours, trained further
    if config.twin is not None:  # of a model whose experts are copies: the dense model that they were copied from
        return convert_to_moe(source, [])
    options = {name: getattr(config, name) for name in MOE_ARGUMENTS}
    given = {name: value for name, value in options.items() if value is not None}
    # `noise` is the router's here; in `upcycle` that name means noise on the copies.
    return upcycle(
        source,
        # In numbers: a checkpoint is rebuilt by its config, whatever a placement's name means to `upcycle` by then.
        layers=moe_layer_indices(config.moe_layers or "every2", len(cast(Any, source).blocks)),
        **{"router": "noisy_top_k", "top_k": None, **given, "noise": config.upcycle_noise or 0.0},
        router_noise=config.noise,
        reinit=config.upcycle_reinit or 0.0,
        seed=None,  # the run's
    )


def _refuse_other_sizes(config: MoEConfig) -> None:
    """Raise a UserError for an option that the weights decide."""
    given = [name for name in _OF_THE_WEIGHTS if getattr(config, name) is not None]
    if str(config.pretrained).endswith(".safetensors") and "base" in given:
        given.remove("base")  # says what the file is of
    if config.twin == "total_params":
        given.append("twin")
    if given:
        options = ", ".join(f"--model.arch.{name} null (it is {getattr(config, name)})" for name in given)
        raise UserError(
            f"The model is that of the pretrained weights {config.pretrained}, as it is: give {options}, or train from "
            "scratch, with --pretrained none."
        )


def _refuse_other_experts(config: MoEConfig, source: nn.Module) -> None:
    """Raise a UserError for an option of the experts that is another one than theirs: they are trained as they came."""
    own = dict(cast(Any, source).moe_config)
    own["expert_hidden"] = one_or_list([layer.experts.fc1.out_features for layer in moe_layers(source)], None)
    others = []
    for name in ("moe_layers", *MOE_ARGUMENTS, "upcycle_noise", "upcycle_reinit"):
        asked = getattr(config, name)
        if name == "moe_layers" and asked is not None:
            same = moe_layer_indices(asked, len(cast(Any, source).blocks)) == own[name]
        else:
            same = (one_or_list(asked, None) if isinstance(asked, list) else asked) == own.get(name)
        if asked is not None and not same:
            others.append(f"--model.arch.{name} null (it is {asked}; there: {own.get(name, 'not set')})")
    if others:
        raise UserError(
            f"{config.pretrained} has experts already, which are trained on as they are: give {', '.join(others)}, "
            "or start from a dense ViT."
        )


def _pretrained_source(config: MoEConfig, num_classes: int, image_size: int, load_weights: bool) -> nn.Module:
    name, weights = str(config.pretrained), None
    if name.endswith(".safetensors"):
        name, weights = config.base or architecture_of(name), name
    rates = {name: getattr(config, name) for name in ("drop_path_rate", "proj_drop_rate", "patch_drop_rate")}
    source = create_from(
        name, num_classes, image_size, weights=weights, load_weights=load_weights, depth=config.depth, **rates
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
