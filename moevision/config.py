"""Every option of `fit`, `validate` and `test`: fields of dataclasses, declared by `option`, without torch.

An option is a key of a configuration file and stands on the command line under the same name: `image_size` of `data` is
`--data.image_size`. What the command line says has priority over a configuration file, and this over what `fit` chooses
for the images.

A configuration is data, not a program: nothing that it names is imported here (`train.fit.instantiated` looks at the
classes of Lightning's that `trainer` may name).
"""

# ruff: noqa: RUF009 (`option` makes a field)

from __future__ import annotations

import difflib
import textwrap
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from types import MappingProxyType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml  # type: ignore[import-untyped]

from moevision.errors import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, Ranges, UserError, check_ranges
from moevision.words import columns, wrap_lines

if TYPE_CHECKING:
    import argparse

    from jsonargparse import ArgumentParser

VERBS = ("fit", "validate", "test")
Noise = Literal["learned", "fixed", "jitter", "none"]
Group = Literal["image", "batch"]
RouteBy = Literal["token", "image"]
Rule = Literal["shazeer", "vmoe"]
OptimizerName = Literal["adamw", "muon"]
FreezeAllBut = Literal["all_but_experts", "all_but_head"]
Fit = Literal["crop", "pad", "squash"]  # how an image is made square, not the verb


OptionValues = dict[str, Any]
"""Values of some options by their dotted names, such as `data.image_size`."""


def option(
    default: Any,
    help: str,
    *,
    auto_default: str = "",
    alias: str = "",
    short: str = "",
    rare: bool = False,
) -> Any:
    """A field that is an option.

    Args:
        default: its value where nobody gives one.
        help: what it is, for `--help`; the brief help has the first sentence.
        auto_default: for the help of `fit`, in the place of `default`: what `fit FOLDER` takes by the images or by the
            machine, in words.
        alias: its name on the command line, which the help shows in the place of the dotted one.
        short: another name on the command line, beside the one that the help shows.
        rare: leave it out of the help; docs/reference/config.md has it.
    """
    metadata = {
        "help": help,
        "auto_default": auto_default,
        "alias": alias,
        "short": short,
        "rare": rare,
    }
    return field(default=default, metadata=metadata)


class Framing(NamedTuple):
    """How an image that isn't square becomes so: `fit`, and the mean colour in [0, 1], with which `pad` fills."""

    fit: Fit = "crop"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)


CROP = Framing()


@dataclass
class Data:
    """Images of one folder, table or named dataset, split, augmented and batched.

    docs/reference/config.md says what each option is, under `data`.
    """

    path: str = option(
        "synthetic_pets",
        "A folder with one subfolder per class (also inside train/, val/, test/), a CSV file with the columns path and "
        "label, a Hugging Face dataset (hf:NAME[:CONFIG], or a folder that save_to_disk wrote), or one of "
        "emoji, emoji_kinds, synthetic_pets, cifar10, imagenette, pets, pets_cat_dog, imagenet",
        auto_default="FOLDER",
    )
    root: str = option("data", "Folder in which named datasets live")
    download: bool = option(
        False,
        "Fetch a named dataset that is not in root, or a Hugging Face dataset that is not in its cache",
    )
    image_size: int = option(
        64,
        "Side of the square images the model sees, in pixels",
        auto_default="64; from pretrained weights about 112, on a GPU 224",
        short="image-size",
    )
    fit: Fit = option(
        "crop",
        "How an image that isn't square becomes so: its central square (crop), the whole in borders of the mean colour "
        "(pad), or the whole squashed. The model keeps it: predict, demo and export do the same",
    )
    batch_size: int = option(
        64,
        "Images per batch and process, at most those of the training set",
        auto_default="64, on a GPU 256; from pretrained weights 32, on a GPU 64; at most a twentieth of the images",
        short="batch-size",
    )
    num_workers: int = option(
        0,
        "Processes that prepare batches, fewer where /dev/shm has no room for their batches; 0 prepares them in the "
        "main process",
        auto_default="0; on a GPU up to 8",
    )
    seed: int = option(0, "Seed of the split and of drawn images")
    order_seed: int | None = option(
        None,
        "Seed of the order, crops and flips of training images; null: that of --seed_everything (without a command "
        "line: of seed)",
        rare=True,
    )
    val_fraction: float = option(
        0.1,
        "Share of the images cut for validation, where the dataset has no validation set",
    )
    test_fraction: float = option(0.1, "Share cut for the test, where the dataset came unsplit")
    group_by: str | None = option(
        None,
        'Keep images together on one side of the split: "parent" (files of one folder), the name of a column (of a CSV '
        "or a Hugging Face dataset), or a regular expression with one group that is searched in the relative path. The "
        'column "group" of a CSV is used unasked',
    )
    image_column: str | None = option(
        None,
        "The column with the image, if it can't be found out; in a CSV the path",
    )
    label_column: str | None = option(None, "The column with the label, if it can't be found out")
    check_duplicates: bool = option(
        True,
        "Keep byte-identical files on one side of the split",
        rare=True,
    )
    augment: Literal["none", "light", "randaugment", "trivialaugment"] = option(
        "light",
        "Random changes of training images: none, light (crop and flip), or in addition randaugment (arXiv:1909.13719) "
        "or trivialaugment (arXiv:2103.10158)",
    )
    crop: Literal["auto", "pad", "random_resized"] = option(
        "auto",
        "How training images are cropped: pad (by image_size / 8, for small images), random_resized (for photos), or "
        "auto (pad for drawn ones and short sides up to 96 pixels)",
        auto_default="random_resized for a folder, else auto",
    )
    min_crop_scale: float = option(
        0.25,
        "Smallest share of an image's area that a random_resized crop keeps",
        auto_default="0.25; from pretrained weights 0.5",
    )
    hflip: bool = option(
        True,
        "Mirror every training image in every other epoch, half of them in the first",
        rare=True,
    )
    vflip: bool = option(
        False,
        "Mirror a random half of the training images top to bottom, as for photos from above or microscopes",
        rare=True,
    )
    rotate90: bool = option(
        False,
        "Turn every training image by 0, 90, 180 or 270 degrees at random",
        rare=True,
    )
    random_erasing: float = option(
        0.0,
        "Probability that a random rectangle of an image is erased (arXiv:1708.04896)",
    )
    mixup: float = option(0.0, "Alpha of Mixup's Beta distribution (arXiv:1710.09412); 0 is off")
    cutmix: float = option(
        0.0,
        "Alpha of CutMix's Beta distribution (arXiv:1905.04899); 0 is off. With both, each batch gets one of the two "
        "at random",
    )
    class_weights: Literal["none", "auto"] | dict[str, float] = option(
        "none",
        "Weights of the loss per class: none, auto (inverse frequency), or a weight per class name (1 for names left "
        "out). Only their ratios count: the mean over the training images is 1",
    )
    balanced_sampling: bool = option(False, "Draw every class equally often in training")
    cache_mb: int = option(
        4096,
        "Keep the decoded images in memory if those of all processes fit into this many MiB",
        auto_default="a quarter of the free memory",
        rare=True,
    )
    max_bad_fraction: float = option(
        0.05,
        "Stop when a larger share of a split's images can't be read",
        rare=True,
    )
    scores: bool | None = option(
        None,
        "Keep scores of the training images (scores.csv); null: below 200,000 of them, without Mixup and CutMix",
    )
    keep: str | None = option(
        None,
        "CSV file of the training images to keep (columns image and keep, as moevision data prune writes it); the "
        "others are left out. Validation and test images stay as they are",
    )
    relabel: str | None = option(
        None,
        "CSV file of training images with another class (columns image and new_label, as moevision data prune or the "
        "page of moevision data score writes it)",
    )
    train_size: int = option(
        16_000, "Number of training images of a drawn dataset (emoji, synthetic_pets)"
    )
    val_size: int = option(1_000, "Number of validation images of a drawn dataset", rare=True)
    test_size: int = option(2_000, "Number of test images of a drawn dataset", rare=True)
    mean: tuple[float, float, float] = option(
        (0.485, 0.456, 0.406),
        "Mean per colour channel that is subtracted, for pixels in [0, 1]; ImageNet's by default",
        rare=True,
    )
    std: tuple[float, float, float] = option(
        (0.229, 0.224, 0.225),
        "Deviation per colour channel that is divided by; ImageNet's by default",
        rare=True,
    )


@dataclass(kw_only=True)
class RouterOptions:
    """Options of a router; None is the router's own choice. A router refuses those that it has no use for.

    docs/reference/config.md says what each is, under `model.arch`.

    Raises:
        UserError: for a value that is out of range.
    """

    noise: Noise | None = option(
        None,
        "noise of the choice in training: learned per token (Shazeer), fixed (σ = 1/E, V-MoE), jitter (input times "
        "U(0.99, 1.01), Switch) or none",
    )
    route_by: RouteBy | None = option(
        None,
        "what is routed: each token (by default), or the image as a whole: the mean of its tokens decides, once per "
        "image and layer, and its experts compute all of them",
    )
    normalize_gates: bool | None = option(
        None,
        "a token's gates sum to 1. With one expert the gate is then 1 and keeps the gradient of the probability "
        "(straight-through)",
        rare=True,
    )
    capacity_factor: float | None = option(
        None,
        "in training an expert computes at most this times its fair share; None computes everything",
    )
    eval_capacity_factor: float | None = option(None, "the same in evaluation")
    batch_priority: bool | None = option(
        None,
        "over capacity, keep the tokens with the largest gates instead of the first ones",
        rare=True,
    )
    capacity_group: Group | None = option(
        None,
        "what shares a capacity: one image, or the batch (predictions then depend on batch-mates)",
    )
    bias_rate: float | None = option(None, "γ, the step of bias_balanced's bias", rare=True)
    slots_per_expert: int | None = option(
        None,
        "P of soft; by default K · tokens / E in a model",
        rare=True,
    )

    def __post_init__(self) -> None:
        for name, choices in (("noise", Noise), ("route_by", RouteBy), ("capacity_group", Group)):
            if (value := getattr(self, name)) not in (None, *get_args(choices)):
                raise UserError(
                    f"There is no {name} {value!r}: choose one of {', '.join(get_args(choices))}."
                )
        positive = ("capacity_factor", "eval_capacity_factor", "bias_rate", "slots_per_expert")
        # `ABOVE_0` has two parts, the range in words and as a function; the options that must lie in it are the third.
        check_ranges(self, [(*ABOVE_0, positive)])
        if self.capacity_factor is None and self.eval_capacity_factor is None:
            for name in ("batch_priority", "capacity_group"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} does nothing without a capacity: set capacity_factor, such as 1.25."
                    )
        elif self.route_by == "image" and self.capacity_group != "batch":
            raise UserError(
                "With route_by='image' one image never fills an expert, so a capacity per image drops nothing: set "
                "capacity_group='batch', or leave the capacity out."
            )

    def non_default(self) -> OptionValues:
        """The options that were set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check_supported(self, router: str, useful: Iterable[str]) -> RouterOptions:
        """The options themselves; a UserError if one is set that `router` has no use for."""
        unused = sorted(self.non_default().keys() - set(useful))
        if unused:
            raise UserError(
                f"The router {router!r} has no use for {', '.join(unused)}: leave it out."
            )
        return self


@dataclass
class MoEConfig(RouterOptions):
    """Which model to train; a field left empty (null) takes the architecture's own value.

    A list in `num_experts`, `top_k`, `router` or `expert_hidden` gives each MoE layer its own. The options of
    `RouterOptions` stand beside these fields.
    """

    name: str | None = option(
        None,
        "timm name of the model: a vit_moe* name, or vit_moe with base; vit_moe_micro_patch4_32 by default",
        auto_default="vit_moe_hybrid_patch8_32",
    )
    base: str | None = option(
        None,
        "for vit_moe: the dense timm ViT to convert, such as deit_tiny_patch16_224",
    )
    pretrained: str | None = option(
        None,
        "weights to start from: auto, none, a timm name, hf-hub:USER/NAME, a .safetensors file (its architecture is "
        "found out, or given as base), or a folder that timm or moevision saved. Without it fit asks on a terminal, "
        "and elsewhere takes only what is there already. A dense model is upcycled: experts start as copies of the MLP "
        "that they replace. The architecture comes with the weights; of its sizes only depth can be set",
        auto_default="below 200,000 images what is cached; else fit asks, in a script none",
        alias="pretrained",
    )
    num_experts: int | list[int] | None = option(
        None,
        "E, experts in each MoE layer",
        auto_default="the model's own; from pretrained weights 4",
    )
    top_k: int | list[int] | None = option(
        None,
        "K, experts that compute each token; by default the router's own, 2 for most",
        auto_default="the router's own; from pretrained weights 1",
    )
    router: str | list[str] | None = option(
        None,
        "noisy_top_k, vmoe_top_k, switch, sigmoid, bias_balanced, cosine, expert_choice or soft; baselines hash, "
        "random, position, colour. The layer's default is noisy_top_k (Shazeer 2017), on which the others build; "
        "recipes name vmoe_top_k, which has fewer parameters",
        auto_default="the model's own; from pretrained weights vmoe_top_k",
    )
    moe_layers: str | list[int] | None = option(
        None,
        "every2, last2, all, or a list of block numbers counting from 0",
        auto_default="the model's own; from pretrained weights last2",
    )
    expert_hidden: int | list[int] | None = option(
        None,
        "hidden width of one expert; by default mlp_ratio x width / (top_k + shared experts), and with pretrained "
        "of a dense model that of the MLP",
    )
    backend: Literal["auto", "loop", "grouped", "dense"] | None = option(
        None,
        "how experts are computed: auto, loop, grouped or dense",
        rare=True,
    )
    twin: Literal["active_flops", "total_params"] | None = option(
        None,
        "train the dense twin instead, matched in active_flops or total_params",
        rare=True,
    )
    stem: Literal["patch", "conv", "conv_patch", "stages", "wide_stages"] | None = option(
        None,
        "what cuts an image into tokens: patch, conv (strided convolutions), conv_patch (two of them, then patches), "
        "or stages or wide_stages (those of the hybrids)",
    )
    patch_size: int | None = option(None, "side of a patch in pixels", auto_default="8")
    embed_dim: int | None = option(None, "width of a token")
    depth: int | None = option(
        None,
        "number of blocks; with pretrained so many of the first ones, all by default",
    )
    num_heads: int | None = option(None, "attention heads")
    mlp_ratio: float | None = option(
        None,
        "hidden width of a dense MLP over the width of a token",
        rare=True,
    )
    drop_path_rate: float | None = option(None, "stochastic depth at the last block")
    proj_drop_rate: float | None = option(
        None,
        "dropout in MLPs, experts and attention projections",
        rare=True,
    )
    patch_drop_rate: float | None = option(None, "share of patches left out in training", rare=True)
    global_pool: Literal["token", "avg"] | None = option(
        None,
        "what the classifier reads: token (the class token) or avg (the mean of all patches, so that every patch's "
        "route counts, in the last block too); by default the architecture's own",
    )
    num_shared_experts: int | None = option(
        None,
        "experts that every token passes besides the chosen ones",
    )
    expert_drop: float | None = option(
        None,
        "dropout inside the experts, in the place of proj_drop_rate",
        rare=True,
    )
    upcycle_reinit: float | None = option(
        None,
        "with pretrained: share of each copy's hidden units that are drawn anew",
        rare=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (
            "num_experts",
            "top_k",
            "patch_size",
            "embed_dim",
            "depth",
            "num_heads",
            "expert_hidden",
        )
        ranges: Ranges = (
            (*AT_LEAST_1, sizes),
            (*AT_LEAST_0, ("num_shared_experts",)),
            (*ABOVE_0, ("mlp_ratio",)),
            (*SHARE, ("drop_path_rate", "proj_drop_rate", "patch_drop_rate", "expert_drop")),
            ("at least 0 and at most 1", lambda x: 0 <= x <= 1, ("upcycle_reinit",)),
        )
        check_ranges(self, ranges, "--model.arch.")

    @classmethod
    def from_checkpoint(cls, fields: Mapping[str, Any]) -> MoEConfig:
        """The description in a checkpoint; versions before 0.2 wrote `upcycle_noise` too, which is ignored if unset."""
        fields = dict(fields)
        noise = fields.pop("upcycle_noise", None)
        if noise:
            raise UserError(
                f"This checkpoint began with upcycle_noise {noise}, which this version doesn't have: use moevision 0.1."
            )
        return cls(**fields)


@dataclass
class OptimizerConfig:
    """The optimizer under a one-cycle schedule."""

    name: OptimizerName = option(
        "adamw",
        "adamw, or muon: Muon for weight matrices (each expert's is one) and AdamW for the rest",
        auto_default="muon; from pretrained weights, or for a model that you name, adamw",
    )
    lr: float = option(
        1e-3,
        "the highest learning rate",
        auto_default="0.006 with muon, 0.001 with adamw, from pretrained weights 0.0003",
        short="lr",
    )
    weight_decay: float = option(
        0.05,
        "decoupled weight decay on weight matrices; biases, norms, position embeddings and class tokens have none",
    )
    warmup_fraction: float = option(0.2, "share of all steps in which the learning rate rises")
    beta2: float = option(0.99, "decay of the second moment", rare=True)
    layer_decay: float | None = option(
        None,
        "each block learns at this share of the next block's rate, the last block at this share of the classifier's, "
        "such as 0.75; for pretrained starts. None: one rate for all",
        auto_default="1; from pretrained weights 0.75",
    )
    freeze: int | FreezeAllBut | None = option(
        None,
        "what keeps its weights: a number n (the embedding and the first n blocks), all_but_experts (only routers, "
        "experts and the classifier learn) or all_but_head (only the classifier learns). BatchNorm in a frozen part "
        "keeps its statistics too; dropout and stochastic depth stay as configured",
    )

    def __post_init__(self) -> None:
        ranges = (
            (*ABOVE_0, ("lr",)),
            (*AT_LEAST_0, ("weight_decay",)),
            (*SHARE, ("beta2",)),
            ("between 0 and 1, such as 0.2", lambda x: 0 <= x <= 1, ("warmup_fraction",)),
            ("above 0 and at most 1, such as 0.75", lambda x: 0 < x <= 1, ("layer_decay",)),
        )
        check_ranges(self, ranges, "--model.optim.")


@dataclass
class AuxLossWeights:
    """How much each loss of the routers counts beside the cross-entropy.

    0 leaves a loss out, null takes the router's own weight.
    """

    importance: float | None = option(None, "weight of the importance loss")
    load: float | None = option(None, "weight of the load loss")
    load_balancing: float | None = option(None, "weight of the Switch / GShard loss")
    z: float | None = option(None, "weight of the router z-loss")
    label: float | None = option(
        None,
        "weight of the label loss, which tells routers the class: experts are divided evenly among the classes, in "
        "order",
    )
    rule: Rule = option(
        "shazeer",
        "shazeer or vmoe, the definition of importance and load",
        rare=True,
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            [(*AT_LEAST_0, ("importance", "load", "load_balancing", "z", "label"))],
            "--model.aux.",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes (--trainer.devices N, torchrun, srun) share a training.

    Where the layout is null, --trainer.strategy decides.
    """

    layout: Literal["ddp", "fsdp"] | None = option(
        None,
        "how several processes share a training: ddp (each has all weights) or fsdp (weights, gradients and moments "
        "are sharded)",
        alias="parallel",
    )
    expert: int = option(
        1,
        "processes that one set of experts is divided among; tokens travel to their experts",
    )
    offload: bool = option(
        False,
        "keep weights, gradients and moments in main memory, and a block's weights on the GPU while it computes",
        rare=True,
    )

    def __post_init__(self) -> None:
        check_ranges(self, [(*AT_LEAST_1, ("expert",))], "--parallel.")
        if self.expert > 1 and self.layout is None:
            raise UserError(
                "--parallel.expert divides the experts: say --parallel fsdp or --parallel ddp for the rest."
            )
        if self.offload and self.layout != "fsdp":
            raise UserError("--parallel.offload moves what --parallel fsdp has divided: use both.")


Monitor = Literal["val/top1", "val/balanced_acc", "val/loss", "val/map"]


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a point to resume from is saved, besides the end of every epoch; and which epoch is the best."""

    every_minutes: float = option(10.0, "minutes between two of them")
    every_steps: int | None = option(None, "optimizer steps between two of them; null is no limit")
    monitor: Monitor | None = option(
        None,
        "what best.ckpt is the best epoch by. null: val/balanced_acc (macro recall) where the largest class has more "
        "than 1.5 times the training images of the smallest, else val/top1; val/map where images have several labels",
    )

    def __post_init__(self) -> None:
        check_ranges(
            self, [(*ABOVE_0, ("every_minutes",)), (*AT_LEAST_1, ("every_steps",))], "--checkpoint."
        )


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """When a training that no longer improves ends."""

    patience: int | None = option(
        None,
        "validations in a row without a better one, after which training stops; null trains to the end. The learning "
        "rate then hasn't come down to its end, so the schedule's whole length often scores higher",
    )
    monitor: Monitor | None = option(
        None,
        "what must become better; null: what best.ckpt is chosen by",
    )

    def __post_init__(self) -> None:
        check_ranges(self, [(*AT_LEAST_1, ("patience",))], "--early_stopping.")


MAX_RECORDED = 64  # images


@dataclass(frozen=True)
class RecordRoutingConfig:
    """Routing of some images at moments of the training, to see how it formed."""

    images: int | str | None = option(
        12,
        "how many test images, classes in turn, or a folder of images; at most 64. Their routing is written to "
        "routing_history.safetensors in the run folder. null records nothing",
    )
    moments: int | None = option(
        None,
        "how many, the first before the training and the last at its end, closer together at first. null: 24, or "
        "fewer, so that they take no more than about 1 % of a short training",
        rare=True,
    )

    def __post_init__(self) -> None:
        ranges: Ranges = [("at least 2, beginning and end", lambda x: x >= 2, ("moments",))]
        if isinstance(self.images, int):
            ranges = [
                *ranges,
                (f"1 to {MAX_RECORDED}", lambda x: 1 <= x <= MAX_RECORDED, ("images",)),
            ]
        check_ranges(self, ranges, "--record_routing.")


@dataclass
class GuardConfig:
    """When an update is refused, and when training returns to an earlier state."""

    enabled: bool = option(
        True,
        "refuse updates from numbers that are not finite, and return to an earlier state when it must be",
    )
    snapshot_every: int = option(100, "applied updates between two snapshots", rare=True)
    snapshots: int = option(
        2,
        "how many snapshots are kept in main memory; each takes 12 bytes per parameter under AdamW (weights and two "
        "moments), 4 more with a moving average",
        rare=True,
    )
    max_skips: int = option(
        10,
        "refused among the last 100 updates, above which training returns to a snapshot",
        rare=True,
    )
    max_rollbacks: int = option(3, "returns within 1,000 steps, above which training stops")
    spike_sigmas: float = option(
        6.0,
        "standard deviations above the running mean that make a loss suspicious; 0 looks for no spikes",
        rare=True,
    )
    spike_updates: int = option(
        10,
        "suspicious losses in a row that make a lasting spike",
        rare=True,
    )
    spike_warmup: int = option(
        20,
        "losses that must be known before one can be suspicious",
        rare=True,
    )

    def __post_init__(self) -> None:
        ranges = (
            (*AT_LEAST_1, ("snapshot_every", "snapshots", "spike_updates")),
            (*AT_LEAST_0, ("max_skips", "max_rollbacks", "spike_sigmas")),
            ("at least 2", lambda x: x >= 2, ("spike_warmup",)),
        )
        check_ranges(self, ranges, "--guard.")


@dataclass
class EmaConfig:
    """Whether a moving average of the weights is evaluated and saved in their place."""

    decay: float | None = option(
        None,
        "share of the old average that an update keeps, such as 0.999; null trains without an average",
    )
    warmup: bool = option(
        True,
        "let the decay grow at the start, so that the first weights are soon forgotten",
        rare=True,
    )

    def __post_init__(self) -> None:
        check_ranges(
            self, [("between 0 and 1, such as 0.999", lambda x: 0 < x < 1, ("decay",))], "--ema."
        )


@dataclass
class Model:
    """The model and how it learns."""

    arch: MoEConfig = field(default_factory=MoEConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    aux: AuxLossWeights = field(default_factory=AuxLossWeights)
    label_smoothing: float = option(0.1, "share of the target spread evenly over all classes")
    compile: bool = option(
        False,
        "compile each block with torch.compile (tens of seconds at the start; for long runs on a GPU)",
        alias="compile",
    )
    grad_checkpointing: bool | list[int] = option(
        False,
        "compute blocks again in the backward pass, for less memory and more time: true for all, or a list of some "
        "([1,3])",
    )
    num_classes: int | None = option(None, "C; taken from the data if None", rare=True)
    image_size: int | None = option(
        None,
        "side of the input in pixels; taken from the data if None",
        rare=True,
    )


@dataclass
class Trainer:
    """Arguments of Lightning's Trainer that have a default of our own; `MORE_ARGUMENTS` has the others."""

    accelerator: str = option("auto", "cpu, gpu or auto", short="device")
    devices: int | str | list[int] = option(
        1,
        "how many processes train together on this machine, or a list of GPUs",
        short="gpus",
    )
    num_nodes: int = option(1, "machines; torchrun or srun starts their processes")
    precision: str | int | None = option(
        None,
        "32-true, bf16-mixed, 16-mixed and others of Lightning's; null: what suits the device",
        auto_default="bf16-mixed where the device has it, else 32-true, on a GPU 16-mixed",
    )
    max_epochs: int | None = option(
        10,
        "epochs of the training",
        auto_default="by the number of images: 10 to 100; from pretrained weights 3 to 20, on a GPU 5 to 30",
        short="epochs",
    )
    max_steps: int = option(
        -1,
        "optimizer steps of the training, in the place of epochs, or until these end if you give both; -1: by the "
        "epochs",
    )
    accumulate_grad_batches: int = option(1, "batches whose gradients a step sums")
    gradient_clip_val: float | None = option(1.0, "largest norm of a step's gradients; null: any")
    num_sanity_val_steps: int = option(0, "validation batches before the training", rare=True)
    log_every_n_steps: int = option(10, "optimizer steps between two rows of metrics.csv")
    enable_model_summary: bool = option(False, "Lightning's table of the layers", rare=True)


def yaml_value(value: Any) -> Any:
    """A value that the parser takes for plain data: with the type of a class it would import what the text names."""
    return yaml.safe_load(value) if isinstance(value, str) else value


_LIMIT = int | float | None
# Other arguments of the Trainer and their types; those that may name a class are looked at by `train.fit.instantiated`.
CLASS_ARGUMENTS = ("strategy", "logger", "callbacks", "profiler", "plugins")
MORE_ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(CLASS_ARGUMENTS, yaml_value),
    **dict.fromkeys(
        ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
        _LIMIT,
    ),
    **dict.fromkeys(("overfit_batches", "val_check_interval"), _LIMIT),
    **dict.fromkeys(("min_epochs", "min_steps", "check_val_every_n_epoch"), int | None),
    **dict.fromkeys(("reload_dataloaders_every_n_epochs",), int),
    **dict.fromkeys(
        ("enable_progress_bar", "enable_checkpointing", "inference_mode", "benchmark"), bool | None
    ),
    **dict.fromkeys(
        ("detect_anomaly", "barebones", "sync_batchnorm", "enable_autolog_hparams"), bool
    ),
    "fast_dev_run": int | bool,
    "max_time": str | dict[str, int] | None,
    "deterministic": bool | Literal["warn"] | None,
    "model_registry": str | None,
    "gradient_clip_algorithm": Literal["norm"] | None,
}


@dataclass
class Settings:
    """Everything that a run was asked for or has chosen; its config.yaml has the same keys."""

    seed_everything: bool | int = option(
        0,
        "seed of weights, router noise, order, crops and flips; true draws one, false sets none",
    )
    # Arguments of Lightning's Trainer: all of `Trainer`, and those of `MORE_ARGUMENTS` that are given.
    trainer: dict[str, Any] = field(default_factory=lambda: asdict(Trainer()))
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    resume: str | None = option(
        None,
        "resume an interrupted run: its folder, such as runs/pets; or auto: the run folder of this very command, if a "
        "valid checkpoint is there, else a fresh start. Images are compared with the run's by path, label and file "
        "size, not by content. On the command line only",
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    record_routing: RecordRoutingConfig = field(default_factory=RecordRoutingConfig)
    router_start: Literal["random", "cluster"] = option(
        "random",
        "with --pretrained: routers start at random, or from clusters of what some training images give them, so that "
        "every expert is used from the first step on",
        auto_default="cluster for dense pretrained weights, else random",
    )
    name: str | None = option(
        None, "name of the run folder, runs/NAME", auto_default="that of the data"
    )
    with_twin: bool = option(
        False,
        "train the dense twin by the same recipe too, and compare both on the same test images",
        alias="with-twin",
    )
    check_memory: bool = option(
        True,
        "refuse a model whose weights, gradients and moments alone are larger than the memory; --force doesn't",
        rare=True,
    )
    runs_root: str = option("runs", "the folder in which run folders are made", rare=True)
    ckpt_path: str | None = option(
        None,
        "the checkpoint, such as runs/pets/checkpoints/best.ckpt; of validate and test",
        rare=True,
    )
    mirror: bool = option(
        False,
        "answer by the mean over each image and its mirror image, in twice the time; of test",
        rare=True,
    )
    sets: float | None = option(
        None,
        "make prediction sets that have the true class with this probability, such as 0.9, from scores of the "
        "validation images; of test",
        rare=True,
    )


class Option(NamedTuple):
    """An option: the type of its values, its default, and what `option` says about it."""

    kind: Any
    default: Any
    help: str = ""
    auto_default: str = ""
    alias: str = ""
    short: str = ""
    rare: bool = False


@cache
def options() -> dict[str, Option]:
    """Every option by its dotted name, in the order of a config.yaml."""
    result: dict[str, Option] = {}
    for name, entry in _options_of(Settings, ""):
        if name != "trainer":
            result[name] = entry
            continue
        result |= _options_of(Trainer, "trainer.")
        for argument, kind in MORE_ARGUMENTS.items():
            result[f"trainer.{argument}"] = Option(kind, None, rare=True)
    return result


def _options_of(cls: type, prefix: str) -> Iterator[tuple[str, Option]]:
    """Dotted name and option of each field of a dataclass, those of nested ones included."""
    kinds = get_type_hints(cls)
    for entry in fields(cls):
        name, kind = f"{prefix}{entry.name}", kinds[entry.name]
        if is_dataclass(kind):
            yield from _options_of(cast(type, kind), f"{name}.")
        else:
            yield name, Option(kind, entry.default, **entry.metadata)


def to_settings(values: OptionValues) -> Settings:
    """The settings with these options, and the defaults of the others."""
    settings: Settings = _build(Settings, "", values)
    for name, value in values.items():
        group, _, argument = name.partition(".")
        if group == "trainer":
            settings.trainer[argument] = value
    return settings


def _build(cls: type, prefix: str, values: OptionValues) -> Any:
    """An instance of a dataclass of options, whose names begin with `prefix`."""
    kinds = get_type_hints(cls)
    arguments = {}
    for entry in fields(cls):
        name, kind = f"{prefix}{entry.name}", kinds[entry.name]
        if is_dataclass(kind):
            arguments[entry.name] = _build(cast(type, kind), f"{name}.", values)
        elif name in values:
            arguments[entry.name] = values[name]
    return cls(**arguments)


def flatten(content: Mapping[str, Any], prefix: str = "") -> OptionValues:
    """The values of a nested configuration by their dotted names, known or not."""
    values: OptionValues = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in options():
            values |= flatten(value, f"{name}.")
        else:
            values[name] = value
    return values


def parse_config(content: Mapping[str, Any], source: str) -> OptionValues:
    """The options that the content of a YAML file gives, by their dotted names.

    A key that isn't known is ignored if it has no value or is in `OBSOLETE_KEYS`: earlier versions wrote such keys.
    """
    values = {}
    for name, value in flatten(content).items():
        if name in options():
            values[name] = value
        elif value is not None and name not in OBSOLETE_KEYS:
            raise UserError(f"{source}: {_unknown_option(name)}")

    try:
        return _parse_values(values)
    except ArgumentError:
        # Which option is wrong? Each on its own.
        for name, value in values.items():
            try:
                _parse_values({name: value})
            except ArgumentError as error:
                raise UserError(f"{source}: {_wrong_value(name, value)}") from error
        raise


def _parse_values(values: OptionValues) -> OptionValues:
    """The values, converted to the types of their options; an ArgumentError if one doesn't fit."""
    return dict(vars(_parser().parse_object(dict(values), defaults=False).as_flat()))


# ---- the command line


class ParsedArgs(NamedTuple):
    """A command line, understood."""

    folder: str | None  # what stands right after the verb
    configs: list[str]  # what follows --config
    options: OptionValues  # the others by their dotted names
    prints: bool  # whether the settings are to be printed and nothing else is to be done
    command: list[str]  # the command line as typed, the program first


def parse_args(verb: str, arguments: Sequence[str]) -> ParsedArgs:
    """Understand a command line of `fit`, `validate` or `test`."""
    parser = _parser()
    spelled = spell_options(parser, arguments, _short_names())
    try:
        values = vars(parser.parse_args(spelled, defaults=False).as_flat())
    except ArgumentError as error:
        mistake = _first_mistake(spelled) or "The options don't fit together."
        raise UserError(f"{mistake} See moevision {verb} --help.") from error
    return ParsedArgs(
        folder=values.pop("folder", None),
        configs=values.pop("config", None) or [],
        prints=values.pop("print_config", None) is not None,
        options=values,
        command=["moevision", verb, *arguments],
    )


def spell_options(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    short_names: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """The arguments with each option as the parser spells it: - and _ mean the same in its name.

    `short_names` has other names for some options, without dashes.
    """
    spellings = {name: name for name in parser._option_string_actions if name.startswith("--")}
    for short, name in short_names.items():
        spellings[f"--{short}"] = f"--{name}"
    spellings = {name.replace("-", "_"): spelling for name, spelling in spellings.items()}

    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        result.append(spellings.get(name.replace("-", "_"), name) + equals + value)
    return result


def _short_names() -> dict[str, str]:
    """What may be typed for some options beside their dotted names."""
    return {
        typed: name
        for name, entry in options().items()
        for typed in (entry.alias, entry.short)
        if typed
    }


@cache
def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="moevision", exit_on_error=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--config", "-c", action="append")
    parser.add_argument("--print_config", nargs="?", const="")
    for name, entry in options().items():
        if entry.kind is bool:
            parser.add_argument(f"--{name}", dest=name, type=bool, nargs="?", const=True)
        else:
            parser.add_argument(f"--{name}", dest=name, type=entry.kind)
    for name, flag in FLAGS.items():
        parser.add_argument(f"--{name}", dest=flag.sets, action="store_const", const=flag.value)
    return parser


def _first_mistake(arguments: Sequence[str]) -> str | None:
    """What is wrong with the first option that the parser doesn't take, or with a second folder.

    The parser's own message speaks of its types. So each option is parsed again on its own, to find the one that fails.
    """
    # Each option with the values behind it; in front of the first option, the folder.
    groups: list[list[str]] = [[""]]
    for argument in arguments:
        is_option = argument.startswith("--") or (argument[:1] == "-" and argument[1:].isalpha())
        if is_option:
            groups.append([argument])
        else:
            groups[-1].append(argument)

    folders: list[str] = []
    for option_argument, *values in groups:
        name, equals, value = option_argument.partition("=")
        if name:
            action = _action_of(name)
            if action is None:
                return _unknown_option(name.lstrip("-"))
            if equals and action.nargs == 0:
                return f"{name} takes no value."
            if action.nargs is None and not equals and not values:
                return f"--{action.dest} needs a value."

            own_values = [] if equals or action.nargs == 0 else values[:1]
            try:
                _parser().parse_args([option_argument, *own_values], defaults=False)
            except ArgumentError:
                return _wrong_value(action.dest, value if equals else values[0])
            values = values[len(own_values) :]

        folders += values
        if len(folders) > 1:
            return f"{folders[1]!r} stands where an option is expected: a folder comes right after the verb."
    return None


def _action_of(name: str) -> argparse.Action | None:
    """The parser's action for an option, for a key below it, or for --OPTION+, which appends to a list."""
    for option_name, action in _parser()._option_string_actions.items():
        if name == option_name or name.startswith((f"{option_name}.", f"{option_name}+")):
            return action
    return None


def _wrong_value(name: str, value: Any) -> str:
    return f"--{name} is {str(value)!r}: it must be {_type_in_words(options()[name].kind)}."


_TYPES_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def _type_in_words(kind: Any) -> str:
    """A type as people write its values: a whole number, 'a', 'b' or null."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) in (list, tuple):
        return f"a list, each {_type_in_words(get_args(kind)[0])}"
    if _is_union(kind):
        return " or ".join(map(_type_in_words, get_args(kind)))
    return _TYPES_IN_WORDS.get(kind) or str(kind)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _unknown_option(name: str) -> str:
    names = [*options(), *_short_names(), *FLAGS, *_PROGRAM]
    similar = difflib.get_close_matches(name, names, n=3)
    if not similar:  # a mistyped group has its last part in common with the right one
        last = name.rsplit(".", 1)[-1]
        similar = [option for option in names if option.rsplit(".", 1)[-1] == last][:3]
    if not similar:
        return f"there is no option {name!r}."
    meant = ", ".join(f"--{option}" for option in similar)
    return f"there is no option {name!r}, did you mean {meant}?"


# ---- help


class Flag(NamedTuple):
    """An option of the command line without a value, which sets another option to a fixed one."""

    sets: str  # dotted name of that option
    value: Any
    help: str


FLAGS = {
    "dense": Flag(
        "model.arch.twin",
        "active_flops",
        "fine-tune or train the dense model, without experts",
    ),
    "force": Flag(
        "check_memory",
        False,
        "train a model that seems too large for the memory all the same",
    ),
    "without-twin": Flag(
        "with_twin",
        False,
        "don't train the dense twin that a configuration asks for",
    ),
}
# Keys that earlier versions wrote into every config.yaml and that mean nothing any more.
OBSOLETE_KEYS = ("guard.snapshots_in", "log_routers", "trainer.use_distributed_sampler")
# Options of the program itself, which are no keys of a configuration.
_PROGRAM = {
    "config": "a YAML file, or a recipe that is shipped: quickstart, cifar10, imagenette, cats_vs_dogs, "
    "cats_vs_dogs_two, finetune_upcycled, moe_vie",
    "print_config": "print all settings as YAML, to edit, and end",
}
# What most people change: the brief help of `fit`, in this order. `--help-all` adds the others that aren't rare.
_COMMON = [
    "config",
    "pretrained",
    "dense",
    "with-twin",
    "seed_everything",
    "name",
    "resume",
    "data.image_size",
    "data.batch_size",
    "data.augment",
    "model.arch.num_experts",
    "model.arch.router",
    "model.optim.lr",
    "trainer.max_epochs",
    "trainer.devices",
    "parallel",
    "print_config",
]
_EVALUATION = [
    "config",
    "ckpt_path",
    "name",
    "runs_root",
    "data.path",
    "data.batch_size",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.precision",
    "compile",
    "mirror",
    "sets",
    "print_config",
]
_HELP = """\
usage: moevision {verb} {positional} [options]

{about}

examples
{examples}

options
{options}

{below}
"""
_ABOUT = {
    "fit": "Train a model on a folder of images (one subfolder per class), a dataset or a recipe. Everything that it "
    "leaves is in runs/NAME/; start with its summary.md.",
    "validate": "Evaluate a run, or a checkpoint, on its validation images, or on others (--data.path, --config).",
    "test": "Evaluate a run, or a checkpoint, on its test images, or on others (--data.path, --config).",
}
_EXAMPLES = """\
  moevision fit --config quickstart
  moevision fit path/to/images --pretrained auto --with-twin
  moevision fit path/to/images --model.arch.num_experts 16 --model.arch.router expert_choice"""
_BELOW = (
    "--help-all shows the other options; all keys of a configuration, also those of Lightning's Trainer, may be given "
    "so.\nShort for keys such as --model.optim.lr: --lr, --epochs, --image-size, --batch-size, --gpus, --device.\n\n"
    "exit codes: 0 done; 2 user error, the last line explains the fix; 3 diverged, see divergence.md; 130 Ctrl-C, 129 "
    "terminal closed, 143 SIGTERM, 138 SIGUSR1: saved, the last line is the command that resumes."
)
_BELOW_EVALUATION = (
    "exit codes: 0 done; 2 user error, the last line explains the fix; 130 stopped by Ctrl-C."
)


def visible_options(verb: str, *, everything: bool) -> list[str]:
    """The options that the help of a verb shows, as they are typed, without dashes."""
    if verb != "fit":
        return _EVALUATION
    if not everything:
        return _COMMON
    names = [entry.alias or name for name, entry in options().items() if not entry.rare]
    return [*_PROGRAM, *names, *FLAGS]


def help_of(verb: str, *, everything: bool = False) -> str:
    """The help of `fit`, `validate` or `test`: what most people need, or more."""
    lines = []
    for name in visible_options(verb, everything=everything):
        head, text = _describe_option(name, verb, brief=not everything)
        paragraph = textwrap.wrap(text, columns() - 38)
        # Texts begin at column 38; behind a longer head, on the next line.
        if len(head) > 36:
            lines.append(head)
            head = ""
        lines.append(f"{head:38}{paragraph[0]}")
        lines += [f"{'':38}{line}" for line in paragraph[1:]]

    is_fit = verb == "fit"
    return _HELP.format(
        verb=verb,
        positional="[FOLDER]" if is_fit else "[RUN]",
        about=wrap_lines(_ABOUT[verb]),
        examples=_EXAMPLES if is_fit else f"  moevision {verb} runs/pets",
        options="\n".join(lines),
        below=wrap_lines(_BELOW if is_fit else _BELOW_EVALUATION),
    )


def _describe_option(name: str, verb: str, *, brief: bool) -> tuple[str, str]:
    """What is typed for an option, and what the help says about it; `brief` is the first sentence of that."""
    if name == "config":
        return "  --config NAME", _PROGRAM[name]
    if name in _PROGRAM:
        return f"  --{name}", _PROGRAM[name]
    if name in FLAGS:
        return f"  --{name}", FLAGS[name].help

    entry = options()[_short_names().get(name, name)]
    text = entry.help
    if brief:
        text = text.split(". ")[0]
    default = entry.default
    if verb == "fit" and entry.auto_default:
        default = entry.auto_default
    if default is True:
        text += " (yes)"
    elif default not in (None, False):  # nor 0, which equals False
        text += f" ({default})"
    if entry.kind is bool:
        return f"  --{name}", text
    return f"  --{name} {_value_in_help(entry.kind)}", text


def _value_in_help(kind: Any) -> str:
    """What stands for the value of an option in the help."""
    if _is_union(kind):
        return "|".join(_value_in_help(part) for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {int: "N", float: "X", str: "TEXT", bool: "true"}.get(kind, "...")
