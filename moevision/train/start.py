"""Chooses the weights that a training on few images starts from, and fits their linear probe: `fit --pretrained ...`.

Values of `--pretrained`, when there are few images:

- not given: weights that suit the device, if they are in the hub's cache; otherwise the user is asked on a terminal
  whether to download them, and without a terminal the training starts from scratch;
- `auto`: the same weights, downloaded without asking, or an error;
- a timm name, a file or a folder: these weights, or an error;
- `none`: from scratch.

Weights that the user didn't name are only taken if their licence is a free one.

The probe is a logistic regression on the frozen features. It shows how accurate the features are without fine-tuning,
and its weights initialise the classifier before fine-tuning (linear probing, then fine-tuning: Kumar et al. 2022,
arXiv:2202.10054). Its penalty is chosen on the validation images; test images are used for the reported accuracy alone.

Axes: B images of a batch, n images, D width of a feature, C classes.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from moevision.config import OptionValues
from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.files import write_json_atomic
from moevision.layers import moe_layers
from moevision.layers.routing import evaluating
from moevision.models.convert import pooled, read_layer_indices, reads_class_token_only
from moevision.models.io import (
    FREE_LICENCES,
    NOT_STATED,
    HubFacts,
    HubUnreachableError,
    Published,
    address_of,
    architecture_of,
    ask_hub,
    cached,
    create_from,
    describe,
    fetch_weights,
    is_timm_name,
    model_folder,
    published,
)
from moevision.models.ood import linear_head
from moevision.models.safe_files import read_json, read_metadata, weights_of
from moevision.models.upcycle import check_upcyclable
from moevision.train.health import Stopwatch
from moevision.train.processes import has_gpu, print_rank0
from moevision.types import Floats, Ints, TimmModel
from moevision.words import percent, with_progress

AUTO, NONE = "auto", "none"
# Least memory of a GPU that trains a ViT-B at 224 px: a GPU of 12 GiB, of which torch sees 11.75.
_LARGE_GPU_BYTES = 11 * 2**30
# If a training on a CPU is expected to take longer, it gets the smaller model.
_MAX_CPU_TRAINING_S = 3600.0
# FLOPs per second of one CPU thread in training, in float32. Forward passes of a ViT-S at 112 px reached 75e9 with
# AVX-512, decoding included; the lower number is for CPUs with AVX2.
_CPU_FLOPS_PER_S = 30e9
_SMALL_FLOPS = 2.9e9  # FLOPs of a forward pass of SMALL on one image of 112 px, the size for CPUs

# The records folder-* in benchmarks/accuracy/runs.jsonl, with three seeds and one; a test compares the numbers.
_SCRATCH_COMPARISON = (
    "For comparison: with 2,048 training photos of cats and dogs, pretrained weights reached 96 %, training from "
    "scratch 88 %."
)

# Weights that are chosen if the user names none, all under Apache-2.0. DINOv2's features need the fewest images
# (arXiv:2304.07193); DeiT-Ti costs a fifth of a ViT-S.
BASE = "vit_base_patch14_dinov2.lvd142m"
SMALL = "vit_small_patch14_dinov2.lvd142m"
TINY = "deit_tiny_patch16_224.fb_in1k"


@dataclass(frozen=True)
class StartWeights:
    """Pretrained weights that are on this computer, and the model that they are for."""

    source: str  # a timm name, a file or a folder
    base: str | None  # timm name of the architecture, if the source is a file
    net: nn.Module  # the model on the `meta` device, without memory for its weights


class ChosenStart(NamedTuple):
    """The weights that a training starts from (None: from scratch), and the line that tells the user which and why."""

    weights: StartWeights | None
    line: str = ""


def choose_start(source: str | None, images: int = 0, base: str | None = None) -> ChosenStart:
    """The weights to start from, fetched if need be.

    `source` is the value of `--pretrained` (None: not given), `images` the number of training images (0: unknown), and
    `base` the architecture for a file of weights.
    """
    if source == NONE:
        return ChosenStart(None)
    if source not in (None, AUTO):
        return _start_from(source, base)

    candidates = [published(name) for name in fitting(images)]
    weights = _first_cached(candidates)
    if weights is not None:
        return _start_unnamed(weights, images, "from the hub's cache on this computer")

    # Download the best ones, if that is allowed.
    weights = candidates[0]
    if source is None and not _on_terminal():
        return from_scratch(
            f"{weights.name} is not in the hub's cache, and without a terminal nothing is downloaded unless you say "
            f"--pretrained {AUTO}"
        )
    try:
        facts = ask_hub(weights)
    except UserError as error:
        reason = str(error).rstrip(".")
        if isinstance(error, HubUnreachableError):
            reason += (
                ", and no pretrained weights are in its cache: where it can be, `hf download "
                f"{weights.repository} config.json model.safetensors --local-dir weights`, then here "
                "--pretrained weights"
            )
        return _without_weights(source, reason)
    for licence in (weights.licence, facts.licence):
        if licence and licence not in FREE_LICENCES:
            reason = (
                f"the licence of {weights.name}, {licence}, is not one that allows everything, so it is taken only if "
                f"you name it: --pretrained {weights.name}"
            )
            return _without_weights(source, reason)

    # The answer may also name other weights.
    answer = "yes" if source == AUTO else confirm_download(weights, facts, images)
    if answer.lower() in ("n", "no", NONE):
        return ChosenStart(None, "start: from scratch, as you wish.")
    if answer.lower() not in ("", "y", "yes"):
        return _start_from(answer)
    _download(weights, facts)
    return _start_unnamed(weights, images, "downloaded")


def _without_weights(source: str | None, reason: str) -> ChosenStart:
    """Start from scratch, unless weights were asked for: then a UserError says how to get them."""
    if source == AUTO:
        raise UserError(f"--pretrained {AUTO}: {reason}. From scratch: --pretrained {NONE}.")
    return from_scratch(reason)


def _first_cached(candidates: Sequence[Published]) -> Published | None:
    """The first of them under a free licence that is in the hub's cache."""
    for weights in candidates:
        if weights.licence in FREE_LICENCES and cached(weights) is not None:
            return weights
    return None


def confirm_download(weights: Published, facts: HubFacts, images: int) -> str:
    """Ask the user, and return the answer: empty or yes, no, or the name of other weights."""
    size = "" if facts.size_bytes is None else f"{facts.size_bytes / 1e6:.0f} MB, "
    question = (
        f"{images:,} images are few to learn from scratch. Start from {weights.name} ({size}licence "
        f"{weights.licence}), downloaded once from huggingface.co?\n"
        "[Y]es, [n]o: from scratch, or another timm name, file or folder: "
    )
    print(question, end="", file=sys.stderr, flush=True)
    try:
        return input().strip()
    except EOFError:  # the terminal was closed
        return NONE


def _start_unnamed(weights: Published, images: int, origin: str) -> ChosenStart:
    """Start from weights that the user didn't name."""
    net = _create_on_meta(weights.name)
    few = f"{images:,} images are few to learn from scratch, and " if images else ""
    device = "a GPU" if has_gpu() else f"a CPU (threads: {torch.get_num_threads()})"
    return ChosenStart(
        StartWeights(weights.name, None, net),
        f"start: {weights.name} ({_size(net)}, licence {weights.licence}), {origin}: {few}it suits {device}. "
        f"Others: --pretrained NAME|FILE|FOLDER; none: --pretrained {NONE}.",
    )


def from_scratch(reason: str) -> ChosenStart:
    """Start few images from scratch; the line gives the reason, and what accuracy that may cost."""
    return ChosenStart(None, f"start: from scratch ({reason}). {_SCRATCH_COMPARISON}")


def _start_from(source: str, base: str | None = None) -> ChosenStart:
    """Start from the weights that the user names."""
    if source.endswith(".safetensors"):
        return _start_from_file(source, base)
    net = _create_on_meta(source)
    if not moe_layers(net):
        check_upcyclable(net, "last2")  # fails before anything is downloaded
    licence = NOT_STATED
    address = address_of(source)
    if is_timm_name(address):
        weights = published(address)
        licence = weights.licence
        if cached(weights) is None:
            facts = ask_hub(weights)
            licence = facts.licence or licence
            _download(weights, facts)
    line = f"start: {source} ({_size(net)}, {_describe_licence(licence)})."
    return ChosenStart(StartWeights(source, None, net), line)


def _start_from_file(source: str, base: str | None) -> ChosenStart:
    file = Path(source)
    name = base or architecture_of(file)
    net = _create_on_meta(name)
    metadata = read_metadata(file) if file.is_file() else {}
    licence = _describe_licence(metadata.get("license", NOT_STATED))
    origin = f", from {metadata['source']}" if "source" in metadata else ""
    line = f"start: {file} as {name} ({_size(net)}, {licence}{origin})."
    return ChosenStart(StartWeights(source, name, net), line)


def _describe_licence(licence: str) -> str:
    if licence in (NOT_STATED, *FREE_LICENCES):
        return f"licence {licence}"
    return f"licence {licence}, which restricts what you may do"


def _create_on_meta(source: str) -> nn.Module:
    """The model on the `meta` device: its structure, without memory for weights."""
    with torch.device("meta"):
        return create_from(source, load_weights=False)


def _size(net: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.1f} M parameters"


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _download(weights: Published, facts: HubFacts) -> None:
    """Download, with the hub's progress bar on a terminal."""
    size = "" if facts.size_bytes is None else f", {facts.size_bytes / 1e6:.1f} MB"
    print_rank0(
        f"downloading {weights.name} from {weights.repository}{size}, licence {facts.licence or weights.licence}"
    )
    fetch_weights(weights.name)


def weights_file(source: str) -> Path | None:
    """The file that pretrained weights were read from, for its hash; None if it is unknown or no longer exists."""
    path: Path | None
    if source.endswith(".safetensors"):
        path = Path(source)
    elif is_timm_name(source):
        path = cached(published(source))
    else:
        folder = model_folder(Path(source))
        path = None if folder is None else weights_of(folder)
    return path if path is not None and path.is_file() else None


# ---- weights for a device, and options for weights


def fitting(images: int) -> list[str]:
    """Names of the weights that suit this device and this number of images, the best first."""
    if has_gpu():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        is_large = device.total_memory >= _LARGE_GPU_BYTES
        return [BASE, SMALL, TINY] if is_large else [SMALL, TINY]
    # A backward pass costs as much as two forward passes.
    flops = 3 * _SMALL_FLOPS * epochs_for(images) * images
    seconds = flops / (torch.get_num_threads() * _CPU_FLOPS_PER_S)
    return [SMALL, TINY] if seconds <= _MAX_CPU_TRAINING_S else [TINY]


def epochs_for(images: int) -> int:
    """Epochs of a training from pretrained weights: 8 000 images in all on a CPU, 40 000 on a GPU, within limits."""
    min_epochs, max_epochs, images_in_all = (5, 30, 40_000) if has_gpu() else (3, 20, 8_000)
    return min(max_epochs, max(min_epochs, round(images_in_all / max(1, images))))


def pretrained_options(weights: StartWeights, images: int) -> OptionValues:
    """Command-line options that suit pretrained weights.

    A dense model is upcycled: the last two blocks of odd index get four experts each with top_k 1, which costs as much
    as the dense model. The classifier is changed to average all patches, so that the routing of every patch affects
    the output; a model that can't do that (one with a distillation token) keeps its last block dense.
    """
    net = weights.net
    saved = describe(net)
    options: OptionValues = {
        "model.arch.pretrained": weights.source,
        "data.image_size": image_side(net, saved.image_size),
        "data.batch_size": min(64 if has_gpu() else 32, max(8, images // 20)),
        "data.min_crop_scale": 0.5,
        "trainer.max_epochs": epochs_for(images),
        "model.optim.lr": 3e-4,
        "model.optim.layer_decay": 0.75,
    }
    if weights.base is not None:
        options["model.arch.base"] = weights.base
    if (saved.mean, saved.std) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        options |= {"data.mean": list(saved.mean), "data.std": list(saved.std)}
    if not moe_layers(net):
        can_pool = reads_class_token_only(net) and not hasattr(net, "dist_token")
        options |= {
            "model.arch.num_experts": 4,
            "model.arch.top_k": 1,
            "model.arch.router": "vmoe_top_k",
            "router_start": "cluster",
            "model.arch.moe_layers": "last2" if can_pool else read_layer_indices(net, "last2"),
        }
        if can_pool:
            options["model.arch.global_pool"] = "avg"
    return options


def image_side(net: TimmModel, side: int) -> int:
    """Side of the training images in pixels, for a model whose own image size is `side`.

    On a CPU about 112 and on a GPU about 224, a multiple of the patch size. Models of a smaller size, and models that
    already have experts, keep their own.
    """
    target = 224 if has_gpu() else 112
    if side <= target or moe_layers(net):
        return side
    patch_size = int(net.patch_embed.patch_size[0])
    return max(1, round(target / patch_size)) * patch_size


# ---- the linear probe

PROBE_FILE = "probe.json"
# Images of each split. Forward passes take nearly all of the probe's time. It is tested on all test images, as the
# trained models are, so that `fit` and `moevision compare` can compare them image by image.
_MOST_IMAGES = {"train": 2_000, "val": 500, "test": sys.maxsize}
# Inverse penalties for features of unit variance, the strongest penalty first.
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_ABSENT_LOGIT = -20.0  # of a class without a training image


@dataclass(frozen=True)
class Probe:
    """A linear classifier on frozen features."""

    train_images: int
    val_correct: int  # validation images that the probe classifies correctly
    val_images: int
    head_val_correct: int  # the same for the model's own classifier, before training
    test_correct: dict[
        str, bool
    ]  # stable id of a test image -> whether the probe classifies it correctly
    seconds: float  # wall time of features and regression
    mbytes: float  # size of the whole model in float32
    cpu_s: float = 0.0  # CPU time of features and regression
    # Whether the pretrained model is already an MoE, so that these aren't the features of a dense model.
    of_experts: bool = False
    # Weights [C, D] and biases [C]; None if the probe was read from a file.
    head: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def beats_the_head(self) -> bool:
        """Whether the probe is better than the model's own classifier, which may be trained for these classes."""
        return self.val_correct > self.head_val_correct

    def sentence(self) -> str:
        """The result, for the terminal."""
        test_images = len(self.test_correct)
        val = self.val_correct / max(1, self.val_images)
        test = sum(self.test_correct.values()) / max(1, test_images)
        start = "the weights' own classifier is kept"
        if self.beats_the_head:
            start = "the classifier starts with it"
        return (
            f"linear probe: {percent(val)} of {self.val_images:,} validation and {percent(test)} of {test_images:,} "
            f"test images by logistic regression on the frozen features, in {self.seconds:.0f} s; {start}"
        )

    def write(self, run_dir: Path) -> None:
        """Write everything but the head into a run folder."""
        values = {name: value for name, value in vars(self).items() if name != "head"}
        write_json_atomic(run_dir / PROBE_FILE, values)


def read_probe(run_dir: Path) -> Probe | None:
    """The probe of a run; None if it had none."""
    file = run_dir / PROBE_FILE
    return Probe(**read_json(file)) if file.is_file() else None


def fit_probe(
    net: nn.Module,
    data: ImageDataModule,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Probe | None:
    """Fit a probe to the features of `net`; None for a model without a linear classifier.

    It takes at most `_MOST_IMAGES` of each split, the same share of every class. The classifier of `net` must have the
    classes of the data. `net` is moved to the device and not changed otherwise. `context` makes the context manager of
    each forward pass, such as autocast.
    """
    head = linear_head(net)
    if head is None:
        return None
    stopwatch = Stopwatch()
    train_images, val_images, test_images = [
        min(limit, len(data.contents.datasets[split])) for split, limit in _MOST_IMAGES.items()
    ]
    print_rank0(
        f"linear probe: logistic regression on the frozen features of {train_images:,} training, {val_images:,} "
        f"validation and {test_images:,} test images"
    )
    features = features_of(net, data, _MOST_IMAGES, device, context)
    train, val, test = features["train"], features["val"], features["test"]
    weight, bias = _best_regression(train, val, data.num_classes)

    head_weight = head.weight.detach().double().cpu().numpy()
    head_bias = 0 if head.bias is None else head.bias.detach().double().cpu().numpy()
    is_correct = _classify(test.features, weight, bias) == test.labels
    samples = [data.sample_id("test", index) for index in test.indices.tolist()]
    return Probe(
        train_images=len(train.labels),
        val_correct=_count_correct(val, weight, bias),
        val_images=len(val.labels),
        head_val_correct=_count_correct(val, head_weight, head_bias),
        test_correct=dict(zip(samples, is_correct.tolist(), strict=True)),
        seconds=stopwatch.run_s,
        mbytes=4 * sum(parameter.numel() for parameter in net.parameters()) / 1e6,
        cpu_s=stopwatch.cpu_s,
        of_experts=bool(moe_layers(net)),
        head=(torch.from_numpy(weight), torch.from_numpy(bias)),
    )


class Features(NamedTuple):
    """Pooled features [n, D] of images of a split, their labels [n] and their indices [n] in it."""

    features: Floats
    labels: Ints
    indices: Ints


@torch.no_grad()
def features_of(
    net: nn.Module,
    data: ImageDataModule,
    limits: Mapping[str, int],
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Features]:
    """Features of images of each split, without augmentation.

    `limits` is split -> most images, of which every class gets the same share. Of training images each class gets at
    least five, if it has them and the limit allows it: a distance or a classifier without training images of a rare
    class is wrong about all of its images.
    """
    net = net.to(device)
    dtype = next(net.parameters()).dtype
    features = {}
    for split, limit in limits.items():
        rows = _choose_rows(data, split, limit)
        total = math.ceil(len(rows) / data.batch_size)
        progress = with_progress(data.plain_loader(split, rows), f"{split} images", total)
        batches: list[tuple[Tensor, Tensor, Tensor]] = []
        with evaluating(net):
            for batch in progress:
                with context():
                    x = pooled(net, batch["image"].to(device, dtype))  # [B, D]
                batches.append((x.double().cpu(), batch["label"].cpu(), batch["index"].cpu()))
        fields = [torch.cat(field_batches).numpy() for field_batches in zip(*batches, strict=True)]
        features[split] = Features(*fields)
    return features


def _choose_rows(data: ImageDataModule, split: str, limit: int) -> list[int]:
    """Rows of at most `limit` images of a split, the same share of every class, as `features_of` describes."""
    samples = data.contents.datasets[split].samples
    labels = np.array([sample.label for sample in samples])

    # Order the rows by class, each class shuffled: evenly spaced positions then give every class the same share.
    order = np.random.default_rng(data.seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    labels = labels[order]

    positions = _evenly_spaced(len(order), limit)
    counts = np.bincount(labels[positions], minlength=data.num_classes)
    required = min(5, limit // data.num_classes) if split == "train" else 0
    if counts.min() < required:
        # The first `required` images of each class, and the same share of all others.
        class_start = np.searchsorted(labels, labels)  # [n], position of the class's first image
        is_required = np.arange(len(labels)) - class_start < required
        required_positions = np.flatnonzero(is_required)
        others = np.flatnonzero(~is_required)
        others = others[_evenly_spaced(len(others), limit - len(required_positions))]
        positions = np.concatenate([required_positions, others])
    return sorted(order[positions].tolist())


def _evenly_spaced(length: int, count: int) -> Ints:
    """At most `count` evenly spaced positions in a sequence of some length."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int)


@torch.no_grad()
def start_with(net: nn.Module, probe: Probe) -> None:
    """Give the classifier the probe's weights, in place."""
    head = cast(nn.Linear, linear_head(net))
    weight, bias = cast(tuple[Tensor, Tensor], probe.head)
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(bias)


def _best_regression(train: Features, val: Features, classes: int) -> tuple[Floats, Floats]:
    """Weights [C, D] and biases [C] for raw features, with the penalty that is best on validation images.

    Of equally good penalties the strongest is taken.
    """
    regressions = [_fit_regression(train, strength, classes) for strength in _STRENGTHS]
    return max(regressions, key=lambda regression: _count_correct(val, *regression))


def _fit_regression(train: Features, strength: float, classes: int) -> tuple[Floats, Floats]:
    """Logistic regression on standardized features, as weights [C, D] and biases [C] for raw ones."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean = train.features.mean(0)  # [D]
    spread = train.features.std(0) + 1e-6  # [D]
    with warnings.catch_warnings():
        # A result near the optimum is good enough.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=300)
        model.fit((train.features - mean) / spread, train.labels)

    coefficients = model.coef_  # [present classes, D]
    intercept = model.intercept_
    present = model.classes_
    # For two classes sklearn has one row: the logit of the second class minus that of the first.
    if len(present) == 2:
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercept = np.concatenate([-intercept / 2, intercept / 2])

    # Apply the standardization to the weights, which are then for raw features.
    weight = np.zeros((classes, train.features.shape[1]))
    bias = np.full(classes, _ABSENT_LOGIT)
    weight[present] = coefficients / spread
    bias[present] = intercept - weight[present] @ mean
    return weight, bias


def _count_correct(images: Features, weight: Floats, bias: Floats | float) -> int:
    return int((_classify(images.features, weight, bias) == images.labels).sum())


def _classify(x: Floats, weight: Floats, bias: Floats | float) -> Ints:
    """The most likely class [n] for features x [n, D]."""
    result: Ints = (x @ weight.T + bias).argmax(1)
    return result
