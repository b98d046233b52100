"""Models to measure: a config, a run's own config, or a timm name; with its dense twins, and one training step.

Plain data (`Subject`) describes it, so that a process of its own can build the same model again.

Axes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks.phases import PhaseClock
from moevision.errors import UserError
from moevision.layers import forward_routing
from moevision.losses import AuxLossWeights, Balance
from moevision.models.config import MoEConfig, build_model
from moevision.models.convert import dense_twin
from moevision.models.io import unknown_name
from moevision.models.vit_moe import num_patches, set_fused_attention, trains_unfused
from moevision.train.optim import OptimizerConfig, build_optimizer
from moevision.train.recipe import find_config, shipped_configs
from moevision.train.task import ClassificationTask

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
    """A training, as plain data.

    Attributes:
        name: what the command line called it.
        arch: fields of `MoEConfig` that are given.
        optim: fields of `OptimizerConfig` that are given.
        aux: weights of balance losses that are given; the routers' own if empty.
        label_smoothing: as in the config.
        grad_checkpointing: as in the config.
        num_classes: C.
        image_size: side of the images in pixels.
        batch_size: images per step.
    """

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
        """The model or one of its dense twins, in training mode, from the same seed.

        Raises:
            UserError: if it can't be built, or has no MoE layers.
        """
        torch.manual_seed(0)
        net = build_model(
            MoEConfig(**self.arch), self.num_classes, self.image_size, load_pretrained=False
        )
        if which != "moe":
            net = dense_twin(net, which)
        if self.grad_checkpointing:
            cast(Any, net).set_grad_checkpointing()
        return net.train()

    def task(self) -> ClassificationTask:
        """What `moevision fit` trains."""
        return ClassificationTask(
            arch=MoEConfig(**self.arch),
            optim=OptimizerConfig(**self.optim),
            aux=AuxLossWeights(**self.aux),
            label_smoothing=self.label_smoothing,
            grad_checkpointing=self.grad_checkpointing,
            num_classes=self.num_classes,
            image_size=self.image_size,
        )

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
    """What to train.

    Args:
        name: a config's name or file, a run folder, or a timm name; a dense ViT's is converted with the defaults of
            `convert_to_moe`.
        arch: timm name of another model in the place of the config's; router, optimizer and losses stay the config's.
        batch_size: images per step, in the place of the config's.
        image_size: side in pixels, likewise.
        num_classes: C; a config doesn't know it before its data is read, so 10 by default.

    Raises:
        UserError: if there is no such thing.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(
                f"{name} is no run folder, it has no config.yaml: give a run, a config or a timm name."
            )
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
    config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    model, data = config.get("model") or {}, config.get("data") or {}
    data = data.get("init_args", data)
    return Subject(
        name=name,
        arch=_known(MoEConfig, model.get("arch")),
        optim=_known(OptimizerConfig, model.get("optim")),
        aux=_known(AuxLossWeights, model.get("aux")),
        label_smoothing=model.get("label_smoothing", 0.1),
        grad_checkpointing=bool(model.get("grad_checkpointing", False)),
        num_classes=model.get("num_classes") or DEFAULT_CLASSES,
        image_size=data.get("image_size", 64),
        batch_size=data.get("batch_size", DEFAULT_BATCH),
    )


def _known(kind: type, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Given fields of a dataclass.

    Raises:
        UserError: for a field that it doesn't have.
    """
    values = values or {}
    unknown = sorted(set(values) - {entry.name for entry in fields(kind)})
    if unknown:
        raise UserError(
            f"The config sets {', '.join(unknown)}, which {kind.__name__} does not know."
        )
    return {name: value for name, value in values.items() if value is not None}


class TrainingStep:
    """A model with its optimizer; calling it with a batch takes one step as `moevision fit` does.

    Forward under autocast, cross-entropy and balance losses in float32, backward, clipping of the global norm, fused
    AdamW, and the routers' biases where they have some. What a Trainer adds (logging, callbacks, the guard) is in
    `train/lightning_peer.py`.

    Args:
        subject: what to train.
        which: the MoE model or one of its twins.
        precision: `bf16` (autocast) or `fp32`.
        device: where.
        net: a model that is there already, in the place of the subject's.
        total_steps: of the schedule.
    """

    def __init__(
        self,
        subject: Subject,
        which: Which = "moe",
        precision: str = "bf16",
        device: torch.device | str = "cpu",
        *,
        net: nn.Module | None = None,
        total_steps: int = _TOTAL_STEPS,
    ) -> None:
        self.subject, self.device, self.bf16 = subject, torch.device(device), precision == "bf16"
        self.net: nn.Module = (subject.build(which) if net is None else net.train()).to(device)
        tokens, dtype = num_patches(self.net), torch.bfloat16 if self.bf16 else torch.float32
        set_fused_attention(
            self.net, tokens is None or not trains_unfused(self.device, dtype, tokens)
        )
        self.balance = Balance(self.net, AuxLossWeights(**subject.aux), subject.num_classes)
        self.optimizer, self.schedule = build_optimizer(
            self.net,
            OptimizerConfig(**subject.optim),
            total_steps=total_steps,
            fused=True,
            bfloat16=self.bf16,
        )

    def __call__(self, images: Tensor, labels: Tensor, clock: PhaseClock | None = None) -> None:
        """Take a step on images [B, 3, S, S] with labels [B]; `clock` is told what is being done."""

        def phase(name: str) -> AbstractContextManager[None]:
            return nullcontext() if clock is None else clock.phase(name)

        with phase("rest"):
            with phase("rest of the forward pass"), self.autocast():
                logits, routings = forward_routing(self.net, images)
            with phase("losses"):
                loss = F.cross_entropy(
                    logits.float(), labels, label_smoothing=self.subject.label_smoothing
                )
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
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


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

    def scope() -> AbstractContextManager[object]:
        return (
            torch.autocast(images.device.type, torch.bfloat16)
            if precision == "bf16"
            else nullcontext()
        )

    def call() -> Tensor:
        with torch.inference_mode(), scope():
            return cast(Tensor, net(images))

    return call
