"""Which weights a training on few images starts from, and the linear probe of them: `fit FOLDER --pretrained ...`.

Without `--pretrained` few images start from weights that fit the device, from the hub's cache; on a terminal it asks
before a download, elsewhere nothing is downloaded. `auto` downloads without asking; a timm name, a file or a folder are
these weights, or an error; `none` is from scratch. Only weights under a free licence are chosen unasked.

The probe, logistic regression on the frozen features, says what the features alone are worth, and its weights are the
classifier that the fine-tuning starts with: head first, then all (Kumar et al. 2022, arXiv:2202.10054). The strength of
its penalty is chosen on the validation images; the test images are only reported.

Axes: n images, D width of a feature, C classes.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.files import write_json_atomic
from moevision.layers import moe_layers
from moevision.layers.routing import evaluating
from moevision.models.convert import read_layer_indices, reads_class_token_only
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
from moevision.models.ood import linear_head, pooled
from moevision.models.safe_files import read_json, read_metadata, weights_of
from moevision.models.upcycle import check_upcyclable
from moevision.train.health import cpu_s
from moevision.train.processes import has_gpu, print_rank0
from moevision.words import percent

AUTO, NONE = "auto", "none"
_LARGE_GPU_BYTES = (
    11 * 2**30
)  # of a card that trains a ViT-B at 224 px: torch sees 11.75 GiB of one of 12
_PATIENT_S = 3600.0  # a training on a CPU that is expected to take longer gets the smaller model
# What a CPU's thread computes per second in training, in float32, with room for AVX2: forward passes of a ViT-S at
# 112 px reached 75e9 with AVX-512, decoding included.
_CPU_FLOPS_PER_S = 30e9
_SMALL_FLOPS = 2.9e9  # of a forward pass of SMALL at the size that a CPU trains at

# folder-* in benchmarks/accuracy/runs.jsonl, three seeds and one; a test compares.
LOST = (
    "For comparison: with 2,048 training photos of cats and dogs, pretrained weights reached 96 %, training from "
    "scratch 88 %."
)

# Weights that are chosen unasked, all under Apache-2.0. DINOv2's features need the fewest images (arXiv:2304.07193);
# DeiT-Ti costs a fifth of a ViT-S.
BASE = "vit_base_patch14_dinov2.lvd142m"
SMALL = "vit_small_patch14_dinov2.lvd142m"
TINY = "deit_tiny_patch16_224.fb_in1k"


@dataclass(frozen=True)
class StartWeights:
    """Weights to start from, on this computer; `base` is a file's architecture, the model lies on `meta`."""

    source: str
    base: str | None
    net: nn.Module


class ChosenStart(NamedTuple):
    """What a training starts from (None: from scratch), and a line that says what was chosen and why."""

    weights: StartWeights | None
    line: str = ""


def choose_start(asked: str | None, images: int = 0, base: str | None = None) -> ChosenStart:
    """The weights to start from, fetched if need be.

    `asked` is `--pretrained` (None: not given), 0 `images` weren't counted, `base` is the architecture of a file.
    """
    if asked == NONE:
        return ChosenStart(None)
    if asked is not None and asked != AUTO:
        return _named(asked, base)

    def chosen(weights: Published, origin: str) -> ChosenStart:
        net = _without_memory(weights.name)
        few = f"{images:,} images are few to learn from scratch, and " if images else ""
        where = "a GPU" if has_gpu() else f"a CPU (threads: {torch.get_num_threads()})"
        return ChosenStart(
            StartWeights(weights.name, None, net),
            f"start: {weights.name} ({_size(net)}, licence {weights.licence}), {origin}: {few}it suits {where}. "
            f"Others: --pretrained NAME|FILE|FOLDER; none: --pretrained {NONE}.",
        )

    candidates = [published(name) for name in fitting(images)]
    for weights in candidates:
        if weights.licence in FREE_LICENCES and cached(weights) is not None:
            return chosen(weights, "from the hub's cache on this computer")
    weights = candidates[0]
    if asked is None and not _on_terminal():
        return from_scratch(
            f"{weights.name} is not in the hub's cache, and without a terminal nothing is downloaded unless you say "
            f"--pretrained {AUTO}"
        )
    try:
        facts = ask_hub(weights)
    except UserError as error:
        offline = isinstance(error, HubUnreachableError)
        more = (
            ", and no pretrained weights are in its cache; --pretrained FILE works"
            if offline
            else ""
        )
        return from_scratch(str(error).rstrip(".") + more)
    for licence in (weights.licence, facts.licence):
        if licence and licence not in FREE_LICENCES:
            return from_scratch(
                f"the licence of {weights.name}, {licence}, is not one that allows everything, so it is taken only if "
                f"you name it: --pretrained {weights.name}"
            )
    if asked is None:
        size = "" if facts.size_bytes is None else f"{facts.size_bytes / 1e6:.0f} MB, "
        question = (
            f"{images:,} images are few to learn from scratch. Start from {weights.name} ({size}licence "
            f"{weights.licence}), downloaded once from huggingface.co?\n"
            "[Y]es, [n]o: from scratch, or another timm name, file or folder: "
        )
        print(question, end="", file=sys.stderr, flush=True)
        try:
            answer = input().strip()
        except EOFError:  # the terminal has gone
            answer = NONE
        if answer.lower() in ("n", "no", NONE):
            return ChosenStart(None, "start: from scratch, as you wish.")
        if answer.lower() not in ("", "y", "yes"):
            return _named(answer)
    _download(weights, facts)
    return chosen(weights, "downloaded")


def from_scratch(reason: str) -> ChosenStart:
    """Few images start from scratch for a reason; and what is lost by it."""
    return ChosenStart(None, f"start: from scratch ({reason}). {LOST}")


def _named(source: str, base: str | None = None) -> ChosenStart:
    if source.endswith(".safetensors"):
        file = Path(source)
        name = base or architecture_of(file)
        net, metadata = _without_memory(name), read_metadata(file) if file.is_file() else {}
        licence = metadata.get("license", NOT_STATED)
        what, more = (
            f"{file} as {name}",
            f", from {metadata['source']}" if "source" in metadata else "",
        )
    else:
        name, net, licence, what, more = None, _without_memory(source), NOT_STATED, source, ""
        if not moe_layers(net):
            check_upcyclable(net, "last2")  # before anything is downloaded
        if is_timm_name(address := address_of(source)):
            weights = published(address)
            licence = weights.licence
            if cached(weights) is None:
                facts = ask_hub(weights)
                licence = facts.licence or licence
                _download(weights, facts)
    if licence not in (NOT_STATED, *FREE_LICENCES):
        more = ", which restricts what you may do" + more
    return ChosenStart(
        StartWeights(source, name, net), f"start: {what} ({_size(net)}, licence {licence}{more})."
    )


def _without_memory(source: str) -> nn.Module:
    with torch.device("meta"):
        return create_from(source, load_weights=False)


def _size(net: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.1f} M parameters"


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _download(weights: Published, facts: HubFacts) -> None:
    """Fetch with the hub's progress bar, which shows on a terminal."""
    size = "" if facts.size_bytes is None else f", {facts.size_bytes / 1e6:.1f} MB"
    print_rank0(
        f"downloading {weights.name} from {weights.repository}{size}, licence {facts.licence or weights.licence}"
    )
    fetch_weights(weights.name)


def weights_file(source: str) -> Path | None:
    """The file that pretrained weights were read from, for its hash; None for one that isn't known or has gone."""
    if source.endswith(".safetensors"):
        path: Path | None = Path(source)
    elif is_timm_name(source):
        path = cached(published(source))
    else:
        folder = model_folder(Path(source))
        path = None if folder is None else weights_of(folder)
    return path if path is not None and path.is_file() else None


# ---- what follows from the weights


def fitting(images: int) -> list[str]:
    """The weights that suit this device and so many images, the best first."""
    if has_gpu():
        large = (
            torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            >= _LARGE_GPU_BYTES
        )
        return [BASE, SMALL, TINY] if large else [SMALL, TINY]
    # Backward costs twice a forward pass.
    flops = epochs_for(images) * images * 3 * _SMALL_FLOPS
    return (
        [SMALL, TINY]
        if flops <= _PATIENT_S * torch.get_num_threads() * _CPU_FLOPS_PER_S
        else [TINY]
    )


def epochs_for(images: int) -> int:
    """Epochs of a pretrained start: 8 000 images seen on a CPU, 40 000 on a GPU, within limits."""
    fewest, seen, most = (5, 40_000, 30) if has_gpu() else (3, 8_000, 20)
    return min(most, max(fewest, round(seen / max(1, images))))


def pretrained_options(weights: StartWeights, images: int) -> dict[str, Any]:
    """Command-line options that suit pretrained weights.

    Dense weights become experts in the last two odd blocks, four each, one per token: the cost of the dense model. The
    classifier reads all patches, so that every route counts; where it can't, the last block stays dense.
    """
    net = weights.net
    saved = describe(net)
    options: dict[str, Any] = {
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
        options |= {
            "model.arch.num_experts": 4,
            "model.arch.top_k": 1,
            "model.arch.router": "vmoe_top_k",
        }
        options["router_start"] = "cluster"
        pools = reads_class_token_only(net) and not hasattr(net, "dist_token")
        options["model.arch.moe_layers"] = "last2" if pools else read_layer_indices(net, "last2")
        if pools:
            options["model.arch.global_pool"] = "avg"
    return options


def image_side(net: nn.Module, own: int) -> int:
    """Side of the images in pixels: whole patches, near 112 on a CPU and 224 on a GPU, at most the model's."""
    wanted = 224 if has_gpu() else 112
    if own <= wanted or moe_layers(net):
        return own
    patch = int(cast(Any, net).patch_embed.patch_size[0])
    return max(1, round(wanted / patch)) * patch


# ---- the linear probe

PROBE_FILE = "probe.json"
# Of each split. Nearly all of the time is that of the forward passes. It is tested on all images, as the trained models
# beside it, which `fit` compares on the images that all were tested on and `moevision compare` on all.
_MOST_IMAGES = {"train": 2_000, "val": 500, "test": sys.maxsize}
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse penalties, for features of unit variance
_ABSENT = -20.0  # logit of a class without a training image
_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Probe:
    """A linear classifier on frozen features."""

    train_images: int
    val_correct: int  # validation images of `val_images` that it classifies correctly
    val_images: int
    head_val_correct: int  # those that the model's own classifier, as it came, classifies correctly
    test_correct: dict[str, bool]  # whether a test image, by its stable id, is classified correctly
    seconds: float  # features and regression together; `cpu_s` are CPU seconds of the same
    mbytes: float  # of the model that it is the classifier of, in float32
    cpu_s: float = 0.0
    of_experts: bool = (
        False  # whether the weights came with experts, so that no dense model has these features
    )
    # weights [C, D] and biases [C]; None if it was read from a file
    head: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def beats_the_head(self) -> bool:
        """Whether it is the better classifier to start with; one that was trained for these classes may be better."""
        return self.val_correct > self.head_val_correct

    def sentence(self) -> str:
        """What it found, for the terminal."""
        total = len(self.test_correct)
        val, test = (
            self.val_correct / max(1, self.val_images),
            sum(self.test_correct.values()) / max(1, total),
        )
        start = (
            "the classifier starts with it"
            if self.beats_the_head
            else "the weights' own classifier is kept"
        )
        return (
            f"linear probe: {percent(val)} of {self.val_images:,} validation and {percent(test)} of {total:,} test "
            f"images by logistic regression on the frozen features, in {self.seconds:.0f} s; {start}"
        )

    def write(self, run_dir: Path) -> None:
        """Leave everything but the head in a run folder."""
        write_json_atomic(
            run_dir / PROBE_FILE,
            {name: value for name, value in vars(self).items() if name != "head"},
        )


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
    """Fit a probe to the features of `net`; None for a model whose features and classifier can't be told apart.

    Of each split it takes `_MOST_IMAGES` at most, of every class the same share. The model has the classes of the data
    and is left as it was, but for the device; `context` is around each forward pass, such as autocast.
    """
    head = linear_head(net)
    if head is None:
        return None
    began, began_cpu_s = time.monotonic(), cpu_s()
    images = [
        min(count, len(data.contents.datasets[split])) for split, count in _MOST_IMAGES.items()
    ]
    print_rank0(
        "linear probe: logistic regression on the frozen features of {:,} training, {:,} validation and {:,} test "
        "images".format(*images)
    )
    found = features_of(net, data, _MOST_IMAGES, device, context)
    (x, y, _), (val_x, val_y, _), (test_x, test_y, test_index) = (
        found["train"],
        found["val"],
        found["test"],
    )
    weight, bias = _best_regression(x, y, val_x, val_y, data.num_classes)
    own_weight = head.weight.detach().double().cpu().numpy()
    own_bias = 0 if head.bias is None else head.bias.detach().double().cpu().numpy()
    correct = _classify(test_x, weight, bias) == test_y
    return Probe(
        train_images=len(y),
        val_correct=int((_classify(val_x, weight, bias) == val_y).sum()),
        val_images=len(val_y),
        head_val_correct=int((_classify(val_x, own_weight, own_bias) == val_y).sum()),
        test_correct={
            data.sample_id("test", int(index)): bool(right)
            for index, right in zip(test_index, correct, strict=True)
        },
        seconds=time.monotonic() - began,
        mbytes=4 * sum(parameter.numel() for parameter in net.parameters()) / 1e6,
        cpu_s=cpu_s() - began_cpu_s,
        of_experts=bool(moe_layers(net)),
        head=(torch.from_numpy(weight), torch.from_numpy(bias)),
    )


@torch.no_grad()
def features_of(
    net: nn.Module,
    data: ImageDataModule,
    most: Mapping[str, int],
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, list[npt.NDArray[Any]]]:
    """Pooled features [n, D], labels [n] and indices [n] of images of each split, without augmentation.

    At most `most` of a split, of every class the same share; of training images at least five of each class, if it has
    them and that many fit: a distance or a classifier that never saw a rare class is wrong about all of its images.
    """
    net, dtype, console = net.to(device), next(net.parameters()).dtype, Console(stderr=True)
    found: dict[str, list[npt.NDArray[Any]]] = {}
    with evaluating(net):
        for split, count in most.items():
            labels = np.array([sample.label for sample in data.contents.datasets[split].samples])
            order = np.random.default_rng(data.seed).permutation(len(labels))
            order = order[
                np.argsort(labels[order], kind="stable")
            ]  # class by class, each in random order
            places = _evenly(len(order), count)
            least = min(5, count // data.num_classes) if split == "train" else 0
            if np.bincount(labels[order[places]], minlength=data.num_classes).min() < least:
                first = (
                    np.arange(len(order)) - np.searchsorted(labels[order], labels[order]) < least
                )  # of their class
                own, others = np.flatnonzero(first), np.flatnonzero(~first)
                places = np.concatenate([own, others[_evenly(len(others), count - len(own))]])
            parts: list[tuple[Tensor, Tensor, Tensor]] = []
            loader = data.plain_loader(split, sorted(order[places].tolist()))
            batches = track(
                loader,
                f"{split} images",
                -(-len(places) // data.batch_size),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            for batch in batches:
                with context():
                    features = pooled(net, batch["image"].to(device, dtype)).double().cpu()
                parts.append((features, batch["label"].cpu(), batch["index"].cpu()))
            found[split] = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
    return found


def _evenly(rows: int, count: int) -> _Integers:
    return np.linspace(0, rows - 1, min(count, rows)).round().astype(int)


@torch.no_grad()
def start_with(net: nn.Module, probe: Probe) -> None:
    """Give the classifier the probe's weights, in place."""
    head, (weight, bias) = (
        cast(nn.Linear, linear_head(net)),
        cast(tuple[Tensor, Tensor], probe.head),
    )
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(bias)


def _best_regression(
    x: _Floats, y: _Integers, val_x: _Floats, val_y: _Integers, classes: int
) -> tuple[_Floats, _Floats]:
    """Weights [C, D] and biases [C] for raw features; the penalty is the best on validation, the strongest at a tie."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, spread = x.mean(0), x.std(0) + 1e-6
    found: list[tuple[int, _Floats, _Floats]] = []
    for strength in _STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near its optimum is near enough
            model = LogisticRegression(C=strength, max_iter=300).fit((x - mean) / spread, y)
        weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, _ABSENT)
        present, coefficients, intercept = model.classes_, model.coef_, model.intercept_
        if len(present) == 2:  # one row, for the second class against the first
            coefficients, intercept = (
                np.concatenate([-x / 2, x / 2]) for x in (coefficients, intercept)
            )
        weight[present] = coefficients / spread
        bias[present] = intercept - weight[present] @ mean
        found.append((int((_classify(val_x, weight, bias) == val_y).sum()), weight, bias))
    _, weight, bias = max(found, key=lambda each: each[0])
    return weight, bias


def _classify(x: _Floats, weight: _Floats, bias: _Floats | float) -> _Integers:
    return cast(_Integers, (x @ weight.T + bias).argmax(1))
