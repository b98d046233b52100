"""What `moevision benchmark train` trains: a config, a run's own config, or a timm name.

Plain data (`Subject`) describes it, so that a process of its own can build the same model again for its memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import yaml  # type: ignore[import-untyped]
from torch import nn

from moevision.errors import UserError
from moevision.losses import AuxLoss, AuxLossWeights
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import unknown_name
from moevision.models.twin import dense_twin
from moevision.train.optim import OptimizerConfig
from moevision.train.recipe import find_config, shipped_configs

Which = Literal["moe", "active_flops", "total_params"]
NAMES: dict[Which, str] = {
    "moe": "MoE",
    "active_flops": "dense twin, same active FLOPs",
    "total_params": "dense twin, same parameters",
}
DEFAULT_BATCH, DEFAULT_CLASSES = 64, 10


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
        image_size: side of the pictures in pixels.
        batch_size: pictures per step.
        data: arguments of `ImageDataModule`; empty where nothing but a model was named.
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
    data: Mapping[str, Any] = field(default_factory=dict)

    def build(self, which: Which = "moe") -> nn.Module:
        """The model or one of its dense twins, in training mode, from the same seed.

        Raises:
            UserError: if it can't be built, or has no MoE layers.
        """
        torch.manual_seed(0)
        net = build_model(MoEConfig(**self.arch), self.num_classes, self.image_size, load_pretrained=False)
        if which != "moe":
            net = dense_twin(net, which)
        if self.grad_checkpointing:
            cast(Any, net).set_grad_checkpointing()
        return net.train()

    def aux_loss(self) -> AuxLoss:
        """The balance losses."""
        return AuxLoss(AuxLossWeights(**self.aux))

    def optimizer_config(self) -> OptimizerConfig:
        """Rates and decay."""
        return OptimizerConfig(**self.optim)

    def without_patch_drop(self) -> Subject:
        """The same with all patches."""
        return replace(self, arch={**self.arch, "patch_drop_rate": 0.0})

    def as_json(self) -> dict[str, Any]:
        """Plain data, from which `Subject(**...)` is made again."""
        return asdict(self)


def find_subject(name: str, *, batch_size: int | None, image_size: int | None, num_classes: int | None) -> Subject:
    """What to train.

    Args:
        name: a config's name or file, a run folder, or a timm name; a dense ViT's is converted with the defaults of
            `convert_to_moe`.
        batch_size: pictures per step, in the place of the config's.
        image_size: side in pixels, likewise.
        num_classes: C; a config doesn't know it before its data is read, so 10 by default.

    Raises:
        UserError: if there is no such thing.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(f"{name} is no run folder, it has no config.yaml: give a run, a config or a timm name.")
        subject = _from_config(name, path / "config.yaml")
    elif path.is_file() or name in shipped_configs():
        subject = _from_config(name, find_config(name))
    elif timm.is_model(name):
        subject = _from_timm(name)
    else:
        configs = ", ".join(shipped_configs())
        raise UserError(f"There is no config, run folder or model {name!r} (configs: {configs}). {unknown_name(name)}")
    given = {"batch_size": batch_size, "image_size": image_size, "num_classes": num_classes}
    return replace(subject, **cast(Any, {key: value for key, value in given.items() if value is not None}))


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
        data=data,
    )


def _known(kind: type, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Given fields of a dataclass.

    Raises:
        UserError: for a field that it doesn't have.
    """
    values = values or {}
    unknown = sorted(set(values) - {entry.name for entry in fields(kind)})
    if unknown:
        raise UserError(f"The config sets {', '.join(unknown)}, which {kind.__name__} does not know.")
    return {name: value for name, value in values.items() if value is not None}


def _from_timm(name: str) -> Subject:
    config = timm.get_pretrained_cfg(name)
    size = 224 if config is None else int(config.input_size[-1])
    ours = "vit_moe" in name
    return Subject(name, {"name": name} if ours else {"name": "vit_moe", "base": name}, image_size=size)
