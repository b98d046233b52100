"""The dense trunk of a data set, and what its first blocks make of the images: tokens, kept once for all arms.

An arm trains the blocks from its first MoE layer on. What stands before them is the trunk's, and stays as it is: so its
tokens can be computed once for each augmented copy of an image, and read by every arm and seed.

Axes: I images, N tokens, D width, B images of a batch, C classes.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.harness import about
from benchmarks.specialization.arms import DATA_SETS, DataSet
from benchmarks.study import CIFAR_PIXELS, make_task
from benchmarks.subject import Subject, TrainingStep
from moevision.data import ImageDataModule, SyntheticPets
from moevision.data.loader import PositionSampler
from moevision.errors import UserError
from moevision.files import file_sha256, write_json_atomic
from moevision.models.convert import pool_patches
from moevision.models.io import create_from
from moevision.models.safe_files import read_header, read_json
from moevision.train.optim import freeze_parameters

PHOTO_BASE, PHOTO_SIDE = "vit_small_patch14_dinov2", 112
HYBRID = {"name": "vit_moe_hybrid_patch8_32", "num_experts": 8, "top_k": 1, "twin": "active_flops"}


class Trunk(NamedTuple):
    """A trained dense model.

    Attributes:
        net: in eval mode.
        record: how it came about.
    """

    net: nn.Module
    record: dict[str, Any]


class Tokens(NamedTuple):
    """What the blocks before `first` make of images: tokens bf16 [I, N, D] and labels [I]."""

    tokens: Tensor
    labels: Tensor


class Tail(nn.Module):
    """The blocks of a ViT from `first` on, its norm and head: tokens [B, N, D] -> logits [B, C].

    Shares the modules of `vit`; the blocks before are kept along, frozen and never run.
    """

    def __init__(self, vit: nn.Module, first: int) -> None:
        super().__init__()
        self.vit, self.first = freeze_parameters(vit, first), first
        self.num_prefix_tokens = int(cast(Any, vit).num_prefix_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """As the model goes on behind its block `first` - 1."""
        vit = cast(Any, self.vit)
        for block in vit.blocks[self.first :]:
            tokens = block(tokens)
        logits: Tensor = vit.forward_head(vit.norm(tokens))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Nothing but biases and norms: the embeddings are frozen."""
        return set()


@torch.no_grad()
def before(vit: nn.Module, first: int, images: Tensor) -> Tensor:
    """The tokens [B, N, D] that block `first` receives of images [B, 3, S, S]; `vit` is in eval mode."""
    net = cast(Any, vit)
    tokens = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
    for block in net.blocks[:first]:
        tokens = block(tokens)
    return cast(Tensor, tokens)


# ---- data


def open_images(name: str, options: Namespace) -> ImageDataModule:
    """A data set with the split of the study.

    Raises:
        UserError: if the command line doesn't say where it is.
    """
    spec = DATA_SETS[name]
    given: dict[str, Any] = {"batch_size": spec.batch, "augment": "light"}
    if name == "pets":
        given |= {"path": "synthetic_pets", "image_size": 32, "crop": "pad", "val_size": 1,
                  "train_size": spec.images + spec.batch * spec.trunk_steps, "test_size": spec.asked[1]}  # fmt: skip
    elif name == "cifar10":
        # Of 50 000 images most are never looked at: they are decoded when they are.
        given |= {"path": folder_of(name, options), "image_size": 32, "crop": "pad", "cache_mb": 0, **CIFAR_PIXELS}
    else:
        given |= {"path": folder_of(name, options), "image_size": PHOTO_SIDE, "crop": "random_resized",
                  "min_crop_scale": 0.5, "val_fraction": 0.25}  # fmt: skip
    data = ImageDataModule(**given)
    data.setup("fit")
    return data


def training_batches(data: ImageDataModule, done: int = 0) -> Iterator[dict[str, Tensor]]:
    """Shuffled, augmented batches without end, behind the first `done`; every pass has augmentations of its own."""
    epoch, batch = divmod(done, data.train_batches())
    data.load_state_dict({"epoch": epoch, "batch": batch, "batch_size": data.batch_size, "world_size": 1})
    loader = data.train_dataloader()
    while True:
        cast(PositionSampler, data.sampler).set_epoch(epoch)
        yield from loader
        epoch += 1


def folder_of(name: str, options: Namespace) -> str | None:
    """Where a data set is; None for what is drawn.

    Raises:
        UserError: if the command line doesn't say it.
    """
    if name == "pets":
        return None
    flag = {"cifar10": "cifar", "cats_vs_dogs": "cats"}[name]
    folder = getattr(options, flag)
    if folder is None:
        raise UserError(f"Say where {name} is, --{flag} path/to/{name}, or leave it out with --only.")
    return str(folder)


# ---- trunks


def new_dense(name: str, seed: int, options: Namespace, classes: int) -> nn.Module:
    """The dense model that a trunk starts as.

    Raises:
        UserError: if photos are asked for without the pretrained file.
    """
    if name != "cats_vs_dogs":
        return make_task(_hybrid(name, classes), seed).net
    if options.pretrained is None:
        raise UserError("A trunk for photos starts from pretrained weights: --pretrained FILE, or give --trunk FILE.")
    torch.manual_seed(seed)
    return pool_patches(create_from(PHOTO_BASE, classes, PHOTO_SIDE, weights=options.pretrained))


def _hybrid(name: str, classes: int) -> Subject:
    spec = DATA_SETS[name]
    arch = {**HYBRID, "depth": spec.depth, "moe_layers": "all", "num_experts": spec.experts}
    return Subject("trunk", arch, num_classes=classes, batch_size=spec.batch)


def load_dense(name: str, file: Path, classes: int) -> nn.Module:
    """A trunk from its file: one of ours, or for photos timm's keys with its own pooling (fc_norm).

    Raises:
        UserError: if the file has other weights.
    """
    state = load_file(file)
    if name == "cats_vs_dogs" and "fc_norm.weight" in read_header(file):
        overlay = {"file": str(file), "num_classes": classes}
        size = {"num_classes": classes, "img_size": PHOTO_SIDE, "global_pool": "avg"}
        net: nn.Module = timm.create_model(PHOTO_BASE, pretrained=True, pretrained_cfg_overlay=overlay, **size)
        return net.eval()
    if name == "cats_vs_dogs":
        net = pool_patches(create_from(PHOTO_BASE, classes, PHOTO_SIDE, load_weights=False))
    else:
        net = make_task(_hybrid(name, classes), 0).net
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{file} is no trunk for {name}: {' '.join(str(error).split())[:160]}") from error
    return net.eval()


def trunk_of(name: str, seed: int, options: Namespace) -> Trunk:
    """The trunk of a data set and seed, trained if it isn't there yet; other queues wait meanwhile."""
    spec, classes = DATA_SETS[name], len(class_names(name, options))
    given = options.trunk if name == "cats_vs_dogs" else None
    if given is not None:
        return Trunk(load_dense(name, given, classes), {"sha256": file_sha256(given), "seed": 0, "given": True})
    file = options.work / f"trunk-{name}-s{seed}.safetensors"
    with FileLock(file.with_suffix(".lock")):
        if not file.with_suffix(".json").exists():
            net, record = train_trunk(name, spec, seed, options)
            save_file({key: value.contiguous() for key, value in net.state_dict().items()}, file)
            write_json_atomic(file.with_suffix(".json"), {**record, "sha256": file_sha256(file), "given": False})
    return Trunk(load_dense(name, file, classes), dict(read_json(file.with_suffix(".json"))))


def train_trunk(name: str, spec: DataSet, seed: int, options: Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """A dense model after the protocol's steps, and its record. Nothing is selected: the last weights are taken."""
    origin, start = about(), time.process_time()
    data = open_images(name, options)
    data.seed = data.contents.datasets["train"].seed = seed
    net = new_dense(name, seed, options, data.num_classes)
    subject = Subject("trunk", {}, spec.trunk_optim, num_classes=data.num_classes, batch_size=spec.batch)
    step = TrainingStep(subject, precision=spec.precision, net=net, total_steps=spec.trunk_steps)
    for batch in islice(training_batches(data), spec.trunk_steps):
        step(batch["image"], batch["label"])
    trained = time.process_time() - start
    net.eval()
    right = total = 0
    for images, labels in evaluated(data, *spec.asked):
        with torch.inference_mode():
            right += int((net(images).argmax(-1) == labels).sum())
        total += len(labels)
    return net, {
        "data": name, "seed": seed, "steps": spec.trunk_steps, "batch": spec.batch, "optim": dict(spec.trunk_optim),
        "split": spec.asked[0], "top1": right / total, "images": total, "cpu_s": round(trained, 1), **origin,
    }  # fmt: skip


def class_names(name: str, options: Namespace) -> list[str]:
    """Of a data set, in the order of the labels; only folders are listed."""
    folder = folder_of(name, options)
    if folder is None:
        return list(SyntheticPets.classes)
    return sorted(path.name for path in (Path(folder) / "train").iterdir() if path.is_dir())


# ---- tokens


def tokens_of(name: str, split: str, first: int, trunk: Trunk, options: Namespace) -> Tokens:
    """The tokens before block `first`, of the images of an arm's training or of another split.

    An arm's images are those that the trunk would have seen next, had its training gone on. Computed once, and read
    from a file afterwards.
    """
    spec = DATA_SETS[name]
    file = options.work / f"tokens-{name}-{trunk.record['sha256'][:12]}-{split}-before{first}.safetensors"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            data = open_images(name, options)
            data.seed = data.contents.datasets["train"].seed = trunk.record["seed"]
            if split == "train":
                batches = islice(training_batches(data, spec.trunk_steps), spec.steps)
                images = ((batch["image"], batch["label"]) for batch in batches)
            else:
                images = evaluated(data, split, spec.asked[1] if split == spec.asked[0] else None)
            tokens = computed(trunk.net, first, images, bf16=spec.bf16)
            part = file.with_suffix(".part")
            save_file(tokens._asdict(), part)
            part.replace(file)
    found = load_file(file)
    return Tokens(found["tokens"], found["labels"])


def evaluated(data: ImageDataModule, split: str, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [B, 3, S, S] and labels [B] of a split as evaluation sees them.

    They come in a fixed order that mixes the classes, of which the first `limit` are taken.
    """
    data.setup("test" if split == "test" else "fit")
    order = torch.randperm(len(data.contents.datasets[split]), generator=torch.Generator().manual_seed(0))
    for batch in data.plain_loader(split, order.tolist()[:limit]):
        yield batch["image"], batch["label"]


def computed(vit: nn.Module, first: int, batches: Iterable[tuple[Tensor, Tensor]], *, bf16: bool) -> Tokens:
    """The tokens before block `first` of images [B, 3, S, S] with labels [B]; `vit` is in eval mode."""
    tokens, labels = [], []
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        for images, label in batches:
            tokens.append(before(vit, first, images).bfloat16())
            labels.append(label.clone())
    return Tokens(torch.cat(tokens), torch.cat(labels))
