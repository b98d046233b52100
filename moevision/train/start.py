"""Which weights a training on few images starts from, and what follows from them: `fit FOLDER --pretrained ...`.

| `--pretrained` | what happens |
| --- | --- |
| nothing | few images: weights that fit the device, from the hub's cache; on a terminal it asks before a download; |
|  | without a terminal nothing is downloaded, so that a script never differs by surprise |
| `auto` | the same, downloaded without asking |
| a timm name, a file, a folder | these weights, or an error |
| `none` | from scratch |

Only weights under a free licence are chosen unasked (`moevision.models.published.FREE_LICENCES`). A computer without a
network is noticed within three seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.architecture import architectures_of
from moevision.models.io import (
    address_of,
    create_from,
    describe,
    fetch_weights,
    is_timm_name,
    model_folder,
)
from moevision.models.published import (
    NOT_STATED,
    HubFacts,
    HubUnreachableError,
    Published,
    ask_hub,
    cached,
    is_free,
    published,
)
from moevision.models.reading import read_layer_indices, reads_class_token_only
from moevision.models.safe_files import WEIGHTS, read_metadata
from moevision.models.upcycle import check_upcyclable
from moevision.train.devices import has_gpu
from moevision.train.processes import tell

AUTO, NONE = "auto", "none"
_LARGE_GPU_BYTES = 11 * 2**30  # of a card that trains a ViT-B at 224 px: torch sees 11.75 GiB of one of 12
_PATIENT_S = 3600.0  # a training on a CPU that is expected to take longer gets the smaller model
# What a CPU's thread computes per second in training, in float32, with room for AVX2: forward passes of a ViT-S at
# 112 px reached 75e9 with AVX-512, decoding included.
_CPU_FLOPS_PER_S = 30e9

# benchmarks/accuracy/folder-*.json, three seeds and one; a test compares.
LOST = "Of 832 cats and dogs, trained on 2,048, pretrained weights got 96 % right, a model from scratch 88 %."


@dataclass(frozen=True)
class Candidate:
    """Weights that are chosen unasked.

    Attributes:
        name: timm's.
        flops: of one forward pass at the image size that a CPU trains at.
    """

    name: str
    flops: float


# All under Apache-2.0. DINOv2's features need the fewest images (arXiv:2304.07193); DeiT-Ti costs a fifth of a ViT-S.
BASE = Candidate("vit_base_patch14_dinov2.lvd142m", 11.3e9)
SMALL = Candidate("vit_small_patch14_dinov2.lvd142m", 2.9e9)
TINY = Candidate("deit_tiny_patch16_224.fb_in1k", 0.54e9)


@dataclass(frozen=True)
class StartWeights:
    """Weights to start from, which are on this computer.

    Attributes:
        source: what `--model.arch.pretrained` is: a timm name, a file, a folder or an address.
        base: the architecture of a file of weights.
        net: the model that they belong to, without memory.
    """

    source: str
    base: str | None
    net: nn.Module


class Choice(NamedTuple):
    """What a training starts from.

    Attributes:
        weights: None: from scratch.
        line: says what was chosen and why, once the model stands; empty for a choice that was the user's own.
    """

    weights: StartWeights | None
    line: str = ""


def choose_start(asked: str | None, images: int = 0, base: str | None = None) -> Choice:
    """The weights to start from, fetched if need be.

    Args:
        asked: `--pretrained`; None if it wasn't given.
        images: in the dataset; 0 if they weren't counted.
        base: the architecture of a file, if the user names it.

    Raises:
        UserError: if weights that were named can't be had.
    """
    if asked == NONE:
        return Choice(None)
    if asked is not None and asked != AUTO:
        return named_start(asked, base)
    return _from_cache(images) or _from_hub(published(fitting(images)[0].name), images, unasked=asked == AUTO)


def named_start(source: str, base: str | None = None) -> Choice:
    """Weights that the user named.

    Raises:
        UserError: if they aren't there, or can't be fetched.
    """
    if source.endswith(".safetensors"):
        return _from_file(Path(source), base)
    address = address_of(source)
    net, licence = outline(source), NOT_STATED
    if not moe_layers(net):
        check_upcyclable(net, "last2")  # before anything is downloaded
    if is_timm_name(address):
        weights = published(address)
        licence = weights.licence
        if cached(weights) is None:
            facts = ask_hub(weights)
            licence = facts.licence or licence
            _download(weights, facts)
    line = f"start: {source} ({describe_weights(net)}, licence {licence}{_restricted(licence)})."
    return Choice(StartWeights(source, None, net), line)


def fitting(images: int) -> list[Candidate]:
    """The weights that suit this device and so many images, the best first."""
    if has_gpu():
        large = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory >= _LARGE_GPU_BYTES
        return [BASE, SMALL, TINY] if large else [SMALL, TINY]
    return [SMALL, TINY] if expected_s(SMALL, images) <= _PATIENT_S else [TINY]


def expected_s(candidate: Candidate, images: int) -> float:
    """Seconds that a CPU is expected to train for; backward costs twice a forward pass."""
    return epochs_for(images) * images * 3 * candidate.flops / (torch.get_num_threads() * _CPU_FLOPS_PER_S)


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
        options |= {"model.arch.num_experts": 4, "model.arch.top_k": 1, "model.arch.router": "vmoe_top_k"}
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


def weights_file(source: str) -> Path | None:
    """The file that pretrained weights were read from, for its hash; None for one that isn't known or has gone."""
    if source.endswith(".safetensors"):
        path: Path | None = Path(source)
    elif is_timm_name(source):
        path = cached(published(source))
    else:
        folder = model_folder(Path(source))
        path = None if folder is None else folder / WEIGHTS
    return path if path is not None and path.is_file() else None


def outline(source: str) -> nn.Module:
    """The model that a name or folder means, without memory.

    Raises:
        UserError: if there is none.
    """
    with torch.device("meta"):
        return create_from(source, load_weights=False)


def describe_weights(net: nn.Module) -> str:
    """`22.1 M parameters`."""
    return f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.1f} M parameters"


def _from_file(file: Path, base: str | None) -> Choice:
    fitting_names = [base] if base else architectures_of(file)
    net = outline(fitting_names[0])
    metadata = read_metadata(file) if file.is_file() else {}
    others = f"; {', '.join(fitting_names[1:])} fit too: --model.arch.base NAME" if len(fitting_names) > 1 else ""
    licence = metadata.get("license", NOT_STATED)
    source = f", from {metadata['source']}" if "source" in metadata else ""
    return Choice(
        StartWeights(str(file), fitting_names[0], net),
        f"start: {file} as {fitting_names[0]} ({describe_weights(net)}, licence {licence}{_restricted(licence)}"
        f"{source}{others}).",
    )


def _restricted(licence: str) -> str:
    return "" if licence == NOT_STATED or is_free(licence) else ", which restricts what you may do"


def _from_cache(images: int) -> Choice | None:
    for candidate in fitting(images):
        weights = published(candidate.name)
        if is_free(weights.licence) and cached(weights) is not None:
            return _chosen(weights, images, "from the hub's cache on this computer")
    return None


def _from_hub(weights: Published, images: int, *, unasked: bool) -> Choice:
    """Fetch the weights if that is wanted and allowed; from scratch, with the reason, if not."""
    terminal = _on_terminal()
    if not unasked and not terminal:
        return from_scratch(
            f"{weights.name} is not in the hub's cache, and without a terminal nothing is downloaded unless you say "
            f"--pretrained {AUTO}"
        )
    try:
        facts = ask_hub(weights)
    except HubUnreachableError as error:
        return from_scratch(
            f"{str(error).rstrip('.')}, and no pretrained weights are in its cache; --pretrained FILE works"
        )
    except UserError as error:
        return from_scratch(str(error).rstrip("."))
    for licence in (weights.licence, facts.licence):
        if licence and not is_free(licence):
            return from_scratch(
                f"the licence of {weights.name}, {licence}, is not one that allows everything, so it is taken only if "
                f"you name it: --pretrained {weights.name}"
            )
    if unasked:
        _download(weights, facts)
        return _chosen(weights, images, "downloaded")
    return _ask(weights, facts, images)


def _ask(weights: Published, facts: HubFacts, images: int) -> Choice:
    size = "" if facts.size_bytes is None else f"{facts.size_bytes / 1e6:.0f} MB, "
    answer = _answer(
        f"{images:,} images are few to learn from scratch. Start from {weights.name} ({size}licence "
        f"{weights.licence}), downloaded once from huggingface.co?\n"
        "[Y]es, [n]o: from scratch, or another timm name, file or folder: "
    )
    if answer.lower() in ("", "y", "yes"):
        _download(weights, facts)
        return _chosen(weights, images, "downloaded")
    if answer.lower() in ("n", "no", NONE):
        return Choice(None, "start: from scratch, as you wish.")
    return named_start(answer)


def _answer(question: str) -> str:
    """What is typed; no answer where the terminal has gone."""
    print(question, end="", file=sys.stderr, flush=True)
    try:
        return input().strip()
    except EOFError:
        return NONE


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _download(weights: Published, facts: HubFacts) -> None:
    """Fetch with the hub's progress bar, which shows on a terminal."""
    size = "" if facts.size_bytes is None else f", {facts.size_bytes / 1e6:.1f} MB"
    tell(f"downloading {weights.name} from {weights.repository}{size}, licence {facts.licence or weights.licence}")
    fetch_weights(weights.name)


def _chosen(weights: Published, images: int, origin: str) -> Choice:
    start = StartWeights(weights.name, None, outline(weights.name))
    few = f"{images:,} images are few to learn from scratch, and " if images else ""
    where = "a GPU" if has_gpu() else f"a CPU (threads: {torch.get_num_threads()})"
    return Choice(
        start,
        f"start: {weights.name} ({describe_weights(start.net)}, licence {weights.licence}), {origin}: "
        f"{few}it suits {where}. Others: --pretrained NAME|FILE|FOLDER; none: --pretrained {NONE}.",
    )


def from_scratch(reason: str) -> Choice:
    """Why few images start from scratch, and what is lost by it."""
    return Choice(None, f"start: from scratch ({reason}). {LOST}")
