"""Every option of `fit`, `validate` and `test`: dataclasses without torch, which jsonargparse reads live.

What `fit FOLDER` takes where a default depends on the images or on the machine stands in brackets, and in its help. An
option is a key of a configuration file and stands on the command line under the same name: `image_size` of `data` is
`--data.image_size`. The command line comes before a file, and a file before what `fit` chooses for the images.

A configuration is data, not a program: nothing that it names is imported here (`train.fit.instantiated` looks at the
classes of Lightning's that `trainer` may name).
"""

from __future__ import annotations

import difflib
import re
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
from moevision.words import columns, fitted

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
Fit = Literal["crop", "pad", "squash"]


class Framing(NamedTuple):
    """How an image that isn't square becomes so: `fit`, and the mean colour in [0, 1], with which `pad` fills."""

    fit: Fit = "crop"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)


CROP = Framing()


@dataclass
class Data:
    """Images of one folder, table or named dataset, split, augmented and batched.

    Args:
        path: A folder with one subfolder per class (also inside train/, val/, test/), a CSV file with the columns
            path and label, a Hugging Face dataset (hf:NAME[:CONFIG], or a folder that save_to_disk wrote), or one of
            synthetic_pets, cifar10, imagenette, pets, pets_cat_dog, imagenet [FOLDER].
        root: Folder in which named datasets live.
        download: Fetch a named dataset that is not in root, or a Hugging Face dataset that is not in its cache.
        image_size: Side of the square images the model sees, in pixels [64; from pretrained weights about 112, on a GPU
            224].
        fit: How an image that isn't square becomes so: its central square (crop), the whole in borders of the mean
            colour (pad), or the whole squashed. The model keeps it: predict, demo and export do the same.
        batch_size: Images per batch and process, at most those of the training set [64, on a GPU 256; from pretrained
            weights 32, on a GPU 64; at most a twentieth of the images].
        num_workers: Processes that prepare batches, fewer where /dev/shm has no room for their batches; 0 prepares them
            in the main process [0; on a GPU up to 8].
        seed: Seed of the split and of drawn images.
        order_seed: Seed of the order, crops and flips of training images; null: --seed_everything (without a
            command line: seed).
        val_fraction: Share of the images cut for validation, where the dataset has no validation set.
        test_fraction: Share cut for the test, where the dataset came unsplit.
        group_by: Keep images together on one side of the split: "parent" (files of one folder), the name of a
            column (of a CSV or a Hugging Face dataset), or a regular expression with one group that is searched
            in the relative path. The column "group" of a CSV is used unasked.
        image_column: The column with the image, if it can't be found out; in a CSV the path.
        label_column: The column with the label, if it can't be found out.
        check_duplicates: Keep byte-identical files on one side of the split.
        augment: Random changes of training images: none, light (crop and flip), or in addition
            randaugment (arXiv:1909.13719) or trivialaugment (arXiv:2103.10158).
        crop: How training images are cropped: pad (by image_size / 8, for small images), random_resized (for photos),
            or auto (pad for drawn ones and short sides up to 96 pixels) [random_resized for a folder, else auto].
        min_crop_scale: Smallest share of an image's area that a random_resized crop keeps [0.25; from pretrained
            weights 0.5].
        hflip: Mirror every training image in every other epoch, half of them in the first.
        random_erasing: Probability that a random rectangle of an image is erased (arXiv:1708.04896).
        mixup: Alpha of Mixup's Beta distribution (arXiv:1710.09412); 0 is off.
        cutmix: Alpha of CutMix's Beta distribution (arXiv:1905.04899); 0 is off. With both, each batch
            gets one of the two at random.
        class_weights: Weights of the loss per class: none, auto (inverse frequency), or a weight per class name (1 for
            names left out). Only their ratios count: the mean over the training images is 1.
        balanced_sampling: Draw every class equally often in training.
        cache_mb: Keep the decoded images in memory if those of all processes fit into this many MiB [a quarter of the
            free memory].
        max_bad_fraction: Stop when a larger share of a split's images can't be read.
        scores: Keep scores of the training images (scores.csv); null: below 200,000 of them, without Mixup and
            CutMix.
        keep: CSV file of the training images to keep (columns image and keep, as `moevision data prune` writes it);
            the others are left out. Validation and test images stay as they are.
        relabel: CSV file of training images with another class (columns image and new_label, as `moevision data
            prune` or the page of `moevision data score` writes it).
        train_size: Number of training images of synthetic_pets.
        val_size: Number of validation images of synthetic_pets.
        test_size: Number of test images of synthetic_pets.
        mean: Mean per colour channel that is subtracted, for pixels in [0, 1]; ImageNet's by default.
        std: Deviation per colour channel that is divided by; ImageNet's by default.
    """

    path: str = "synthetic_pets"
    root: str = "data"
    download: bool = False
    image_size: int = 64
    fit: Fit = "crop"
    batch_size: int = 64
    num_workers: int = 0
    seed: int = 0
    order_seed: int | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    group_by: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    check_duplicates: bool = True
    augment: Literal["none", "light", "randaugment", "trivialaugment"] = "light"
    crop: Literal["auto", "pad", "random_resized"] = "auto"
    min_crop_scale: float = 0.25
    hflip: bool = True
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weights: Literal["none", "auto"] | dict[str, float] = "none"
    balanced_sampling: bool = False
    cache_mb: int = 4096
    max_bad_fraction: float = 0.05
    scores: bool | None = None
    keep: str | None = None
    relabel: str | None = None
    train_size: int = 16_000
    val_size: int = 1_000
    test_size: int = 2_000
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(kw_only=True)
class RouterOptions:
    """Options of a router; None is the router's own choice. A router refuses those that it has no use for.

    Args:
        noise: noise of the choice in training: `learned` per token (Shazeer), `fixed` (σ = 1/E, V-MoE), `jitter`
            (input times U(0.99, 1.01), Switch) or `none`.
        route_by: what is routed: each `token` (by default), or the `image` as a whole: the mean of its tokens decides,
            once per image and layer, and its experts compute all of them.
        normalize_gates: a token's gates sum to 1. With one expert the gate is then 1 and keeps the gradient of the
            probability (straight-through).
        capacity_factor: in training an expert computes at most this times its fair share; None computes everything.
        eval_capacity_factor: the same in evaluation.
        batch_priority: over capacity, keep the tokens with the largest gates instead of the first ones.
        capacity_group: what shares a capacity: one `image`, or the `batch` (predictions then depend on batch-mates).
        bias_rate: γ, the step of `bias_balanced`'s bias.
        slots_per_expert: P of `soft`; by default K · tokens / E in a model.

    Raises:
        UserError: for a value that is out of range.
    """

    noise: Noise | None = None
    route_by: RouteBy | None = None
    normalize_gates: bool | None = None
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    batch_priority: bool | None = None
    capacity_group: Group | None = None
    bias_rate: float | None = None
    slots_per_expert: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("noise", Noise), ("route_by", RouteBy), ("capacity_group", Group)):
            if (value := getattr(self, name)) not in (None, *get_args(choices)):
                raise UserError(
                    f"There is no {name} {value!r}: choose one of {', '.join(get_args(choices))}."
                )
        check_ranges(
            self,
            [
                (
                    *ABOVE_0,
                    ("capacity_factor", "eval_capacity_factor", "bias_rate", "slots_per_expert"),
                )
            ],
        )
        if self.capacity_factor is None and self.eval_capacity_factor is None:
            idle = [
                name
                for name in ("batch_priority", "capacity_group")
                if getattr(self, name) is not None
            ]
            if idle:
                raise UserError(
                    f"{idle[0]} does nothing without a capacity: set capacity_factor, such as 1.25."
                )
        elif self.route_by == "image" and self.capacity_group != "batch":
            raise UserError(
                "With route_by='image' one image never fills an expert, so a capacity per image drops nothing: set "
                "capacity_group='batch', or leave the capacity out."
            )

    def given(self) -> dict[str, Any]:
        """The options that were set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def only(self, router: str, useful: Iterable[str]) -> RouterOptions:
        """Raise a UserError if an option is set that `router` has no use for; else the options themselves."""
        useless = sorted(self.given().keys() - set(useful))
        if useless:
            raise UserError(
                f"The router {router!r} has no use for {', '.join(useless)}: leave it out."
            )
        return self


@dataclass
class MoEConfig(RouterOptions):
    """Which model to train; a field left empty (null) takes the architecture's own value.

    A list in `num_experts`, `top_k`, `router` or `expert_hidden` gives each MoE layer its own. The options of
    `RouterOptions` stand beside these fields.

    Args:
        name: timm name of the model: a `vit_moe*` name, or `vit_moe` with `base`; vit_moe_micro_patch4_32 by default
            [vit_moe_hybrid_patch8_32].
        base: for `vit_moe`: the dense timm ViT to convert, such as deit_tiny_patch16_224.
        pretrained: weights to start from: `auto`, `none`, a timm name, hf-hub:USER/NAME, a .safetensors file (its
            architecture is found out, or given as `base`), or a folder that timm or moevision saved. Without it fit
            asks on a terminal, and elsewhere takes only what is there already. A dense model is upcycled: experts start
            as copies of the MLP that they replace. Name and sizes are the weights', so that only
            `depth` may be given beside it [below 200,000 images what is cached; else fit asks, in a script none].
        num_experts: E, experts in each MoE layer [the model's own; from pretrained weights 4].
        top_k: K, experts that compute each token; by default the router's own, 2 for most [the router's own; from
            pretrained weights 1].
        router: `noisy_top_k`, `vmoe_top_k`, `switch`, `sigmoid`, `bias_balanced`, `cosine`, `expert_choice` or `soft`;
            baselines `hash`, `random`, `position`, `colour` [the model's own; from pretrained weights vmoe_top_k].
        moe_layers: `every2`, `last2`, `all`, or a list of block numbers counting from 0 [the model's own; from
            pretrained weights last2].
        expert_hidden: hidden width of one expert; by default mlp_ratio x width / (top_k + shared experts), and with
            `pretrained` of a dense model that of the MLP.
        backend: how experts are computed: `auto`, `loop`, `grouped` or `dense`.
        twin: train the dense twin instead, matched in `active_flops` or `total_params`.
        stem: what cuts an image into tokens: `patch`, `conv` (strided convolutions), or `stages` or `wide_stages`
            (those of the hybrids).
        patch_size: side of a patch in pixels [8].
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
    upcycle_reinit: float | None = None

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
    """The optimizer under a one-cycle schedule.

    Args:
        name: `adamw`, or `muon`: Muon for weight matrices (each expert's is one) and AdamW for the rest [muon; from
            pretrained weights, or for a model that you name, adamw].
        lr: the highest learning rate [0.006 with muon, 0.001 with adamw, from pretrained weights 0.0003].
        weight_decay: decoupled weight decay on weight matrices; biases, norms, position embeddings and class tokens
            have none.
        warmup_fraction: share of all steps in which the learning rate rises.
        beta2: decay of the second moment.
        layer_decay: each block learns at this share of the next block's rate, the last block at this share of the
            classifier's, such as 0.75; for pretrained starts. None: one rate for all [1; from pretrained weights 0.75].
        freeze: what keeps its weights: a number n (the embedding and the first n blocks), `all_but_experts` (only
            routers, experts and the classifier learn) or `all_but_head` (only the classifier learns). BatchNorm in a
            frozen part keeps its statistics too; dropout and stochastic depth stay as configured.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.2
    beta2: float = 0.99
    layer_decay: float | None = None
    freeze: int | FreezeAllBut | None = None

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
    """How much each loss of the routers counts beside the cross-entropy; 0 leaves it out, null takes the router's own.

    Args:
        importance: weight of the importance loss.
        load: weight of the load loss.
        load_balancing: weight of the Switch / GShard loss.
        z: weight of the router z-loss.
        label: weight of the label loss, which tells routers the class: experts belong to classes in order, as many to
            each.
        rule: `shazeer` or `vmoe`, the definition of importance and load.
    """

    importance: float | None = None
    load: float | None = None
    load_balancing: float | None = None
    z: float | None = None
    label: float | None = None
    rule: Rule = "shazeer"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            [(*AT_LEAST_0, ("importance", "load", "load_balancing", "z", "label"))],
            "--model.aux.",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes (--trainer.devices N, torchrun, srun) share a training; null: by --trainer.strategy.

    Attributes:
        layout: how several processes share a training: `ddp` (each has all weights) or `fsdp` (weights, gradients and
            moments are sharded).
        expert: processes that one set of experts is divided among; tokens travel to their experts.
        offload: keep weights, gradients and moments in main memory, and a block's weights on the GPU while it computes.
    """

    layout: Literal["ddp", "fsdp"] | None = None
    expert: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, [(*AT_LEAST_1, ("expert",))], "--parallel.")
        if self.expert > 1 and self.layout is None:
            raise UserError(
                "--parallel.expert divides the experts: say --parallel fsdp or --parallel ddp for the rest."
            )
        if self.offload and self.layout != "fsdp":
            raise UserError("--parallel.offload moves what --parallel fsdp has divided: use both.")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a point to resume from is saved, besides the end of every epoch; and which epoch is the best.

    Attributes:
        every_minutes: minutes between two of them.
        every_steps: optimizer steps between two of them; null is no limit.
        monitor: what best.ckpt is the best epoch by. null: val/balanced_acc (macro recall) where the largest class has
            more than 1.5 times the training images of the smallest, else val/top1.
    """

    every_minutes: float = 10.0
    every_steps: int | None = None
    monitor: Literal["val/top1", "val/balanced_acc", "val/loss"] | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self, [(*ABOVE_0, ("every_minutes",)), (*AT_LEAST_1, ("every_steps",))], "--checkpoint."
        )


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """When a training that no longer improves ends.

    Attributes:
        patience: validations in a row without a better one, after which training stops; null trains to the end. The
            learning rate then hasn't come down to its end, so the schedule's whole length often scores higher.
        monitor: what must become better; null: what best.ckpt is chosen by.
    """

    patience: int | None = None
    monitor: Literal["val/top1", "val/balanced_acc", "val/loss"] | None = None

    def __post_init__(self) -> None:
        check_ranges(self, [(*AT_LEAST_1, ("patience",))], "--early_stopping.")


MAX_RECORDED = 64  # images


@dataclass(frozen=True)
class RecordRoutingConfig:
    """Routing of some images at moments of the training, to see how it formed.

    Attributes:
        images: how many test images, classes in turn, or a folder of images; at most 64. Their routing is written to
            routing_history.safetensors in the run folder. null records nothing.
        moments: how many, the first before the training and the last at its end, closer together at first. null: 24,
            or fewer, so that they take no more than about 1 % of a short training.
    """

    images: int | str | None = 12
    moments: int | None = None

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
    """When an update is refused, and when training returns to an earlier state.

    Args:
        enabled: refuse updates from numbers that are not finite, and return to an earlier state when it must be.
        snapshot_every: applied updates between two snapshots.
        snapshots: how many snapshots are kept in main memory; each takes 12 bytes per parameter under AdamW (weights
            and two moments), 4 more with a moving average.
        max_skips: refused among the last 100 updates, above which training returns to a snapshot.
        max_rollbacks: returns within 1,000 steps, above which training stops.
        spike_sigmas: standard deviations above the running mean that make a loss suspicious; 0 looks for no spikes.
        spike_updates: suspicious losses in a row that make a lasting spike.
        spike_warmup: losses that must be known before one can be suspicious.
    """

    enabled: bool = True
    snapshot_every: int = 100
    snapshots: int = 2
    max_skips: int = 10
    max_rollbacks: int = 3
    spike_sigmas: float = 6.0
    spike_updates: int = 10
    spike_warmup: int = 20

    def __post_init__(self) -> None:
        ranges = (
            (*AT_LEAST_1, ("snapshot_every", "snapshots", "spike_updates")),
            (*AT_LEAST_0, ("max_skips", "max_rollbacks", "spike_sigmas")),
            ("at least 2", lambda x: x >= 2, ("spike_warmup",)),
        )
        check_ranges(self, ranges, "--guard.")


@dataclass
class EmaConfig:
    """Whether a moving average of the weights is evaluated and saved in their place.

    Args:
        decay: share of the old average that an update keeps, such as 0.999; null trains without an average.
        warmup: let the decay grow at the start, so that the first weights are soon forgotten.
    """

    decay: float | None = None
    warmup: bool = True

    def __post_init__(self) -> None:
        check_ranges(
            self, [("between 0 and 1, such as 0.999", lambda x: 0 < x < 1, ("decay",))], "--ema."
        )


@dataclass
class Model:
    """The model and how it learns.

    Args:
        label_smoothing: share of the target spread evenly over all classes.
        compile: compile each block with torch.compile (tens of seconds at the start; for long runs on a GPU).
        grad_checkpointing: compute blocks again in the backward pass, for less memory and more time: true for all, or
            a list of some ([1,3]).
        num_classes: C; taken from the data if None.
        image_size: side of the input in pixels; taken from the data if None.
    """

    arch: MoEConfig = field(default_factory=MoEConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    aux: AuxLossWeights = field(default_factory=AuxLossWeights)
    label_smoothing: float = 0.1
    compile: bool = False
    grad_checkpointing: bool | list[int] = False
    num_classes: int | None = None
    image_size: int | None = None


@dataclass
class Trainer:
    """Arguments of Lightning's Trainer that have a default of our own; `MORE` has the others.

    Args:
        accelerator: `cpu`, `gpu` or `auto`.
        devices: how many processes train together on this machine, or a list of GPUs.
        num_nodes: machines; torchrun or srun starts their processes.
        precision: `32-true`, `bf16-mixed`, `16-mixed` and others of Lightning's; null: what suits the device
            [bf16-mixed where the device has it, else 32-true, on a GPU 16-mixed].
        max_epochs: epochs of the training [by the number of images: 10 to 100; from pretrained weights 3 to 20, on a
            GPU 5 to 30].
        max_steps: optimizer steps of the training, in the place of epochs, or until these end if you give both; -1: by
            the epochs.
        accumulate_grad_batches: batches whose gradients a step sums.
        gradient_clip_val: largest norm of a step's gradients; null: any.
        num_sanity_val_steps: validation batches before the training.
        log_every_n_steps: optimizer steps between two rows of metrics.csv.
        enable_model_summary: Lightning's table of the layers.
    """

    accelerator: str = "auto"
    devices: int | str | list[int] = 1
    num_nodes: int = 1
    precision: str | int | None = None
    max_epochs: int | None = 10
    max_steps: int = -1
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    num_sanity_val_steps: int = 0
    log_every_n_steps: int = 10
    enable_model_summary: bool = False  # the plan says it in one line


def plain(value: Any) -> Any:
    """The value of a key that may name a class: data, of which the parser imports nothing."""
    return yaml.safe_load(value) if isinstance(value, str) else value


_LIMIT = int | float | None
# Other arguments of the Trainer and their types; those that may name a class are looked at by `train.fit.instantiated`.
CLASSES = ("strategy", "logger", "callbacks", "profiler", "plugins")
MORE: dict[str, Any] = {
    **dict.fromkeys(CLASSES, plain),
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
    """Everything that a run was asked for or has chosen; its config.yaml has the same keys.

    Args:
        seed_everything: seed of weights, router noise, order, crops and flips; true draws one, false sets none.
        name: name of the run folder, runs/NAME [that of the data].
        runs_root: the folder in which run folders are made.
        with_twin: train the dense twin by the same recipe too, and compare both on the same test images.
        router_start: with --pretrained: routers start at random, or from clusters of what some training images give
            them, so that every expert is used from the first step on [cluster for dense pretrained weights, else
            random].
        check_memory: refuse a model whose weights, gradients and moments alone are larger than the memory; --force
            doesn't.
        resume: resume an interrupted run: its folder, such as runs/pets; or auto: the run folder of this very command,
            if a valid checkpoint is there, else a fresh start. Images are compared with the run's by path, label and
            file size, not by content. On the command line only.
        ckpt_path: the checkpoint, such as runs/pets/checkpoints/best.ckpt; of validate and test.
    """

    seed_everything: bool | int = 0
    trainer: dict[str, Any] = field(
        default_factory=lambda: asdict(Trainer())
    )  # of `Trainer` and of `MORE`
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    resume: str | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    record_routing: RecordRoutingConfig = field(default_factory=RecordRoutingConfig)
    router_start: Literal["random", "cluster"] = "random"
    name: str | None = None
    with_twin: bool = False
    check_memory: bool = True
    runs_root: str = "runs"
    ckpt_path: str | None = None


class Option(NamedTuple):
    """A key of the configuration: the type of its values, its default, what it is, and what fit takes for a folder."""

    kind: Any
    default: Any
    help: str = ""
    chosen: str = ""


@cache
def options() -> dict[str, Option]:
    """Every key by its dotted name, in the order of a config.yaml."""
    found: dict[str, Option] = {}
    for name, option in _keys(Settings, ""):
        if name == "trainer":
            found |= dict(_keys(Trainer, "trainer."))
            found |= {f"trainer.{key}": Option(kind, None) for key, kind in MORE.items()}
        else:
            found[name] = option
    return found


def _keys(cls: type, prefix: str) -> Iterator[tuple[str, Option]]:
    """The keys of a dataclass, with what its docstring and those of its bases say about them."""
    said = "".join(base.__doc__ or "" for base in cls.__mro__ if is_dataclass(base))
    words = {}
    for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", said, re.MULTILINE):
        words[name] = re.fullmatch(
            r"(.*?)(?: \[([^\]]+)\])?\.?", " ".join(text.split()).replace("`", "")
        )
    kinds = get_type_hints(cls)
    for each in fields(cls):
        if is_dataclass(kind := kinds[each.name]):
            yield from _keys(cast(type, kind), f"{prefix}{each.name}.")
        else:
            found = words.get(each.name)
            yield (
                f"{prefix}{each.name}",
                Option(kind, each.default, *(found.groups("") if found else ())),
            )


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """These options and the defaults of the others, by dotted names; the Trainer's own defaults are left out."""
    defaults = {
        name: one.default
        for name, one in options().items()
        if name.removeprefix("trainer.") not in MORE
    }
    return {**defaults, **given}


def settings(given: Mapping[str, Any]) -> Settings:
    """The settings with these options, by their dotted names, and the defaults of the others."""

    def make(cls: type, prefix: str) -> Any:
        kinds, values = get_type_hints(cls), {}
        for each in fields(cls):
            name = prefix + each.name
            if is_dataclass(kind := kinds[each.name]):
                values[each.name] = make(cast(type, kind), f"{name}.")
            elif name in given:
                values[each.name] = given[name]
        return cls(**values)

    made: Settings = make(Settings, "")
    made.trainer |= {
        key.removeprefix("trainer."): value
        for key, value in given.items()
        if key.startswith("trainer.")
    }
    return made


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted names, known or not; what has no value is left out."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in options():
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def checked(content: Any, where: str) -> dict[str, Any]:
    """The options that the content of a YAML file gives, by their dotted names.

    A key that isn't known and has no value is ignored, and so are those in `WRITTEN`: earlier versions wrote some.
    """
    if not isinstance(content, Mapping):
        raise UserError(
            f"{where} is no configuration: it must have keys, such as data: {{path: ...}}."
        )
    found = flat(content)
    given = {
        name: found[name]
        for name in found
        if name in options() or (found[name] is not None and name not in WRITTEN)
    }
    if unknown := next((name for name in given if name not in options()), None):
        raise UserError(f"{where}: {_unknown(unknown)}")
    try:
        return dict(vars(_parser().parse_object(given, defaults=False).as_flat()))
    except ArgumentError as error:
        raise UserError(f"{where}: {_sentence(str(error))}") from error


class ParsedArgs(NamedTuple):
    """A command line, understood."""

    folder: str | None  # what stands right after the verb
    configs: list[str]  # what follows --config
    options: dict[str, Any]  # the others by their dotted names
    prints: bool  # whether the settings are to be printed and nothing else is to be done
    command: list[str]  # the command line as typed, the program first


def parse_args(verb: str, arguments: Sequence[str]) -> ParsedArgs:
    """Understand a command line of `fit`, `validate` or `test`."""
    parser = _parser()
    try:
        found = vars(
            parser.parse_args(
                option_spelled(parser, arguments, ALIASES | SHORT), defaults=False
            ).as_flat()
        )
    except ArgumentError as error:
        raise UserError(f"{_sentence(str(error))} See moevision {verb} --help.") from error
    folder, configs, prints = (
        found.pop(name, None) for name in ("folder", "config", "print_config")
    )
    return ParsedArgs(
        folder, configs or [], found, prints is not None, ["moevision", verb, *arguments]
    )


def option_spelled(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    also: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """The arguments with each option as the parser spells it: - and _ mean the same in its name.

    `also` has other words for some options, without dashes.
    """
    names = {name: name for name in parser._option_string_actions} | {
        f"--{word}": f"--{also[word]}" for word in also
    }
    known = {name.replace("-", "_"): key for name, key in names.items() if name.startswith("--")}
    parts = [argument.partition("=") for argument in arguments]
    return [
        known.get(name.replace("-", "_"), name) + equals + value for name, equals, value in parts
    ]


@cache
def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="moevision", exit_on_error=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--config", "-c", action="append")
    parser.add_argument("--print_config", nargs="?", const="")
    for name, option in options().items():
        as_flag: dict[str, Any] = {"nargs": "?", "const": True} if option.kind is bool else {}
        parser.add_argument(f"--{name}", dest=name, type=option.kind, **as_flag)
    for flag, (name, value, _) in FLAGS.items():
        parser.add_argument(f"--{flag}", dest=name, action="store_const", const=value)
    return parser


def _sentence(message: str) -> str:
    """What is wrong with an option, from the words of the parser."""
    if found := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        word = found[1].split("=")[0]
        if word.startswith("-"):
            return _unknown(word.lstrip("-"))
        return f"{word!r} stands where an option is expected: a folder comes right after the verb."
    if found := re.search(r"argument (?:\S+/)?(\S+): expected", message):
        return f"{found[1]} needs a value."
    key, value = (
        re.search(r'Parser key "([^"]+)"', message),
        re.search(r"(?:Got|Given) value: (.*)", message),
    )
    if key and value and key[1] in options():
        return f"--{key[1]} is {value[1]!r}: it must be {_kinds(options()[key[1]].kind)}."
    return " ".join(message.split()).rstrip(".") + "."


def _kinds(kind: Any) -> str:
    """A type as people write its values: int, 'a', 'b' or null."""
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " or ".join(map(_kinds, get_args(kind)))
    return "null" if kind is type(None) else kind.__name__ if isinstance(kind, type) else str(kind)


def _unknown(name: str) -> str:
    known = [*options(), *ALIASES, *SHORT, *FLAGS, "config", "print_config"]
    near = difflib.get_close_matches(name, known, n=3)
    if not near:  # a mistyped group has its last part in common with the right one
        near = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:3]
    meant = ", ".join(f"--{key}" for key in near)
    return f"there is no option {name!r}" + (f", did you mean {meant}?" if near else ".")


# ---- help

ALIASES = {
    "pretrained": "model.arch.pretrained",
    "parallel": "parallel.layout",
    "compile": "model.compile",
    "with-twin": "with_twin",
}
# What people type first, beside the key that the help shows.
SHORT = {
    "epochs": "trainer.max_epochs",
    "lr": "model.optim.lr",
    "image-size": "data.image_size",
    "batch-size": "data.batch_size",
    "gpus": "trainer.devices",
    "device": "trainer.accelerator",
}
FLAGS = {
    "dense": (
        "model.arch.twin",
        "active_flops",
        "fine-tune or train the dense model, without experts",
    ),
    "force": (
        "check_memory",
        False,
        "train a model that seems too large for the memory all the same",
    ),
    "without-twin": (
        "with_twin",
        False,
        "don't train the dense twin that a configuration asks for",
    ),
}
# Into every config.yaml before they left.
WRITTEN = ("guard.snapshots_in", "log_routers", "trainer.use_distributed_sampler")
# What most people change: the help. `--help-all` adds the others but those that few need, which config.md lists.
_SHORT = (
    *(
        "config",
        "pretrained",
        "dense",
        "with-twin",
        "seed_everything",
        "name",
        "resume",
        "data.image_size",
    ),
    *(
        "data.batch_size",
        "data.augment",
        "model.arch.num_experts",
        "model.arch.router",
        "model.optim.lr",
    ),
    *("trainer.max_epochs", "trainer.devices", "parallel", "print_config"),
)
_RARE = re.compile(
    r"trainer\.(num_sanity|enable_model)|data\.(mean|std|order_seed|max_bad_fraction|check_duplicates|hflip)"
    r"|data\.(val|test)_size|data\.cache_mb|guard\.(snap|spike|max_skips)|ema\.warmup|model\.(num_classes|image_size)|ckpt_path"
    r"|model\.arch\.(backend|upcycle_|proj_drop|patch_drop|expert_drop|mlp_ratio|slots|bias_rate|normalize|batch_prio)"
    r"|model\.(arch\.twin|optim\.beta2|aux\.rule)|record_routing\.moments|parallel\.offload|check_memory|runs_root"
)
_EVALUATION = (
    *(
        "config",
        "ckpt_path",
        "name",
        "runs_root",
        "data.path",
        "data.batch_size",
        "data.num_workers",
    ),
    *("trainer.accelerator", "trainer.devices", "trainer.precision", "compile", "print_config"),
)
_OWN_WORDS = {
    "config": "a YAML file, or a recipe that is shipped: quickstart, cifar10, imagenette, cats_vs_dogs, "
    "cats_vs_dogs_two, finetune_upcycled, moe_vie",
    "print_config": "print all settings as YAML, to edit, and end",
}
_HELP = """\
usage: moevision {verb} {place} [options]

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
        return list(_EVALUATION)
    if not everything:
        return list(_SHORT)
    aliased = {key: alias for alias, key in ALIASES.items()}
    rare = {
        name for name in options() if name.removeprefix("trainer.") in MORE or _RARE.match(name)
    } - aliased.keys()
    return [
        "config",
        "print_config",
        *(aliased.get(name, name) for name in options() if name not in rare),
        *FLAGS,
    ]


def help_of(verb: str, *, everything: bool = False) -> str:
    """The help of `fit`, `validate` or `test`: what most people need, or more."""
    lines = []
    for name in visible_options(verb, everything=everything):
        key = ALIASES.get(name, name)
        words, value = _OWN_WORDS.get(name, ""), "NAME" if name == "config" else ""
        if name in FLAGS:
            words = FLAGS[name][2]
        elif key in options():
            option = options()[key]
            value = "" if option.kind is bool else _values(option.kind)
            default = option.chosen if verb == "fit" and option.chosen else option.default
            words = option.help
            if not everything:
                words = words.split(". ")[0]
            if default not in (None, False):
                words += f" ({'yes' if default is True else default})"
        head = f"  --{name} {value}".rstrip()
        text = textwrap.wrap(words, columns() - 38)
        if len(head) > 36:
            lines.append(head)
            head = ""
        lines += [f"{head:38}{text[0]}", *(f"{'':38}{line}" for line in text[1:])]
    return _HELP.format(
        verb=verb,
        place="[FOLDER]" if verb == "fit" else "[RUN]",
        about=fitted(_ABOUT[verb]),
        examples=_EXAMPLES if verb == "fit" else f"  moevision {verb} runs/pets",
        options="\n".join(lines),
        below=fitted(_BELOW if verb == "fit" else _BELOW_EVALUATION),
    )


def _values(kind: Any) -> str:
    """What stands for the value of an option in the help."""
    kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    words = {int: "N", float: "X", str: "TEXT", bool: "true"}
    return "|".join(
        "|".join(map(str, get_args(each)))
        if get_origin(each) is Literal
        else words.get(each, "...")
        for each in kinds
        if each is not type(None)
    )
