"""Models to measure: a config, a run's own config, or a timm name; with its dense twins, and one training step.

Plain data (`Subject`) describes it, so that a process of its own can build the same model again.

Axes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks.phases import PhaseClock
from moevision.config import parse_config
from moevision.errors import UserError
from moevision.layers import forward_routing
from moevision.losses import AuxLossWeights, Balance
from moevision.models.config import MoEConfig, build_model
from moevision.models.convert import dense_twin
from moevision.models.io import unknown_name
from moevision.models.vit_moe import num_patches, set_fused_attention, trains_unfused
from moevision.train.optim import OptimizerConfig, build_optimizer
from moevision.train.recipe import find_config, shipped_configs

Which = Literal["moe", "active_flops", "total_params"]
NAMES: dict[Which, str] = {
    "moe": "MoE",
    "active_flops": "dense twin, same active FLOPs",
    "total_params": "dense twin, same parameters",
}
DEFAULT_BATCH, DEFAULT_CLASSES = 64, 10
CLIP_NORM = 1.0  # as in `moevision fit`
_TOTAL_STEPS = 100_000  # of the schedule, of which a benchmark sees the beginning


@dataclass(frozen=True)
class Subject:
    """A training, as plain data; mappings hold the fields of `MoEConfig` and others that are given."""

    name: str
    arch: Mapping[str, Any]
    optim: Mapping[str, Any] = field(default_factory=dict)
    aux: Mapping[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.1
    grad_checkpointing: bool = False
    num_classes: int = DEFAULT_CLASSES
    image_size: int = 32
    batch_size: int = DEFAULT_BATCH

    def build(self, which: Which = "moe") -> nn.Module:
        """The model or one of its dense twins, in training mode, from the same seed."""
        torch.manual_seed(0)
        arch = MoEConfig(**self.arch)
        net = build_model(arch, self.num_classes, self.image_size, load_pretrained=False)
        if which != "moe":
            net = dense_twin(net, which)
        if self.grad_checkpointing:
            cast(Any, net).set_grad_checkpointing()
        return net.train()

    def given(self, **values: Any) -> Subject:
        """The same with these values where they aren't None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


def find_subject(
    name: str,
    *,
    arch: str | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> Subject:
    """What to train: a config's name or file, a run folder, or a timm name; a dense ViT's is converted.

    Sizes and `arch`, another model's timm name, stand in the place of the config's; router, optimizer and losses stay.
    A config doesn't know its classes before its data is read: 10 by default.

    Raises:
        UserError: if there is no such thing.
    """
    path = Path(name)
    if path.is_dir():
        subject = _from_config(name, path / "config.yaml")
    elif path.is_file() or name in shipped_configs():
        subject = _from_config(name, find_config(name))
    elif timm.is_model(name):
        config = timm.get_pretrained_cfg(name)
        size = 224 if config is None else int(config.input_size[-1])
        own = {"name": name} if "vit_moe" in name else {"name": "vit_moe", "base": name}
        subject = Subject(name, own, image_size=size)
    else:
        configs = ", ".join(shipped_configs())
        raise UserError(
            f"There is no config, run folder or model {name!r} (configs: {configs}). {unknown_name(name)}"
        )
    if arch is not None:
        if not timm.is_model(arch):
            raise UserError(f"There is no model {arch!r}. {unknown_name(arch)}")
        subject = replace(subject, name=f"{name} with {arch}", arch={**subject.arch, "name": arch})
    return subject.given(batch_size=batch_size, image_size=image_size, num_classes=num_classes)


def _from_config(name: str, path: Path) -> Subject:
    values = parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    known = {option: value for option, value in values.items() if value is not None}

    def given(group: str) -> dict[str, Any]:
        prefix = f"model.{group}."
        return {n.removeprefix(prefix): own for n, own in known.items() if n.startswith(prefix)}

    others = ("model.label_smoothing", "model.grad_checkpointing", "model.num_classes")
    sizes = {"image_size": 64}
    for option in (*others, "data.image_size", "data.batch_size"):
        if option in known:
            sizes[option.partition(".")[2]] = known[option]
    return Subject(name, given("arch"), given("optim"), given("aux"), **sizes)


class TrainingStep:
    """A model with its optimizer; calling it with a batch takes one step as `moevision fit` does.

    Forward under autocast, cross-entropy and balance losses in float32, backward, clipping of the global norm, fused
    AdamW, and the routers' biases where they have some.
    """

    def __init__(
        self,
        subject: Subject,
        which: Which = "moe",
        precision: str = "bf16",
        device: torch.device | str = "cpu",
    ) -> None:
        self.subject, self.device, self.bf16 = subject, torch.device(device), precision == "bf16"
        self.net: nn.Module = subject.build(which).to(device)
        tokens, dtype = num_patches(self.net), torch.bfloat16 if self.bf16 else torch.float32
        is_fused = tokens is None or not trains_unfused(self.device, dtype, tokens)
        set_fused_attention(self.net, is_fused)
        self.balance = Balance(self.net, AuxLossWeights(**subject.aux), subject.num_classes)
        config, how = OptimizerConfig(**subject.optim), {"fused": True, "bfloat16": self.bf16}
        self.optimizer, self.schedule = build_optimizer(
            self.net, config, total_steps=_TOTAL_STEPS, **how
        )

    def __call__(self, images: Tensor, labels: Tensor, clock: PhaseClock | None = None) -> None:
        """Take a step on images [B, 3, S, S] with labels [B]; `clock` is told what is being done."""

        def phase(name: str) -> AbstractContextManager[None]:
            return nullcontext() if clock is None else clock.phase(name)

        with phase("rest"):
            with phase("rest of the forward pass"), self.autocast():
                logits, routings = forward_routing(self.net, images)
            with phase("losses"):
                smoothing = self.subject.label_smoothing
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
                loss = loss + self.balance.loss(routings, F.one_hot(labels, logits.shape[-1]))
            with phase("backward"):
                loss.backward()
            with phase("clip and optimizer"):
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP_NORM)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                self.balance.step()

    def autocast(self) -> AbstractContextManager[object]:
        """The scope of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def noise_batch(
    subject: Subject, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S] and labels [B] that need no data set: the time of a step doesn't depend on what they show."""
    generator = torch.Generator().manual_seed(seed)
    size, batch = subject.image_size, subject.batch_size
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(subject.num_classes, (batch,), generator=generator)
    return images.to(device), labels.to(device)


def inference(net: nn.Module, images: Tensor, precision: str) -> Callable[[], Tensor]:
    """A function that classifies these images [B, 3, S, S] -> logits [B, C]; `net` is in eval mode then."""

    def call() -> Tensor:
        autocast = torch.autocast(images.device.type, torch.bfloat16, precision == "bf16")
        with torch.inference_mode(), autocast:
            return cast(Tensor, net(images))

    return call
