"""What a model card is made of, gathered from a saved model and from the run folder that it may lie in.

Only what was measured or recorded is in it; what is missing stays None, and the card says "not measured". Nothing in it
tells where files lie on the computer that trained the model: of a path only the last part is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from moevision import __version__
from moevision.efficiency import ModelCost, measure_cost
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.io import SavedModel, load_model, model_folder
from moevision.models.safe_files import read_json, read_yaml
from moevision.names import shown
from moevision.train.provenance import LIBRARIES
from moevision.train.run_summary import RunSummary, read_summary
from moevision.versions import package_version

Json = dict[str, Any]
UNKNOWN_LICENCE = "unknown"  # huggingface.co's own word in the field `license`


@dataclass(frozen=True)
class MoEBlock:
    """One MoE layer.

    Attributes:
        block: index of the transformer block, from 0.
        router: its name.
        num_experts: E.
        top_k: K, experts per token.
    """

    block: int
    router: str
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Start:
    """The weights that a training started from.

    Attributes:
        name: a timm name, an address, or the last part of a path; empty = from scratch.
        hub_id: its address on huggingface.co, if known.
        licence: what timm records for them; empty if it records nothing.
    """

    name: str = ""
    hub_id: str = ""
    licence: str = ""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a model card says.

    Attributes:
        name: title of the card.
        address: how timm finds the model, such as `hf-hub:user/name`.
        architecture: timm's name, with that of the dense base where there is one.
        blocks: the MoE layers; empty for a dense model.
        depth: number of transformer blocks; None where the architecture has none that are numbered.
        options: what else was set for the MoE layers, such as `capacity_factor`.
        class_names: [C] in words.
        image_size: in pixels.
        cost: parameters and FLOPs.
        licence: of the weights, as huggingface.co abbreviates it; `unknown` if none was chosen.
        summary: of the run that trained it; None if unknown.
        command: what was typed for that run, without the paths.
        start: the weights that it started from; None if that isn't recorded.
        versions: of the software, by name.
        others: runs of the same recipe with other seeds.
        analysis: the numbers of `moevision analyze`; None if not made.
    """

    name: str
    address: str
    architecture: str
    blocks: Sequence[MoEBlock]
    depth: int | None
    options: Mapping[str, Any]
    class_names: Sequence[str]
    image_size: int
    cost: ModelCost
    licence: str = UNKNOWN_LICENCE
    summary: RunSummary | None = None
    command: Sequence[str] = ()
    start: Start | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[RunSummary] = ()
    analysis: Json | None = None


def gather_facts(
    model: str | Path | SavedModel,
    *,
    name: str | None = None,
    address: str = "local-dir:.",
    licence: str = UNKNOWN_LICENCE,
    others: Sequence[str | Path] = (),
    analysis: Json | None = None,
    summary: RunSummary | None = None,
) -> CardFacts:
    """Gather what is known about a saved model.

    Args:
        model: a run folder or its model/ folder, whose run is told too; or another address, or a model in memory.
        name: title of the card; by default the run's, or the architecture's.
        address: where a reader of the card will find the model; the default fits a card beside its model.
        licence: of the weights.
        others: run folders of the same recipe with other seeds.
        analysis: what report.json of `moevision analyze` holds.
        summary: of the run whose folder `model` is, before its summary.json is written; by default that file's.

    Raises:
        UserError: if there is no model, or a file of the run is damaged.
    """
    saved = model if isinstance(model, SavedModel) else load_model(str(model))
    run = None if isinstance(model, SavedModel) else Path(model) if summary is not None else _run_of(Path(model))
    if run is not None and summary is None:
        summary = read_summary(run / "summary.json")
    provenance = _read_json(run / "provenance.json") if run is not None else {}
    architecture, options = _architecture(saved.net)
    blocks = _moe_blocks(saved.net)
    return CardFacts(
        name=shown(name or (summary.name if summary else architecture.split()[0])),
        address=address,
        architecture=architecture,
        blocks=blocks,
        depth=len(cast(Any, saved.net).blocks) if hasattr(saved.net, "blocks") else None,
        options=options if blocks else {},
        class_names=saved.class_names,
        image_size=saved.image_size,
        cost=summary.cost if summary else measure_cost(saved.net, saved.image_size),
        licence=licence,
        summary=summary,
        command=[shown(without_path(word)) for word in provenance.get("command", [])],
        start=_start(run),
        versions=_versions(provenance),
        others=[read_summary(Path(other) / "summary.json") for other in others],
        analysis=analysis,
    )


def without_path(word: str) -> str:
    """A word of a command with a path in it shortened to its last part: `--data.path=/home/me/cats` -> `…/cats`."""
    option, equals, value = word.rpartition("=")
    if value.startswith("hf-hub:") or not re.search(r"[/\\]", value):
        return word
    last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return f"{option}{equals}…/{last}"


def _run_of(path: Path) -> Path | None:
    """The finished run that a model lies in, given either of them."""
    folder = model_folder(path)
    candidates = () if folder is None else (path, folder.resolve().parent)
    return next((each for each in candidates if (each / "summary.json").is_file()), None)


def _read_json(file: Path) -> Json:
    """A JSON object; empty if there is no such file.

    Raises:
        UserError: if it is damaged.
    """
    if not file.is_file():
        return {}
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}): mend it or move it away.") from error


def _architecture(net: nn.Module) -> tuple[str, Json]:
    """The timm name with the base in brackets, and the MoE options that stand neither there nor in `_moe_blocks`."""
    given: Json = dict(getattr(net, "_model_args", {}))
    config = cast(Json, getattr(net, "pretrained_cfg", None) or {})
    name = str(config.get("architecture") or type(net).__name__)
    base = f" ({given['base']} with experts)" if given.get("base") else ""
    told = {"moe_layers", "num_experts", "top_k", "router", "backend"}
    options = {key: value for key, value in getattr(net, "moe_config", {}).items() if key not in told}
    return name + base, {key: value for key, value in options.items() if value is not None}


def _moe_blocks(net: nn.Module) -> list[MoEBlock]:
    layers = moe_layers(net)
    if not layers:
        return []
    routers = getattr(net, "moe_config", {}).get("router", "unknown")
    names = [routers] * len(layers) if isinstance(routers, str) else list(routers)
    return [
        MoEBlock(cast(int, layer.layer_index), name, layer.router.num_experts, layer.router.top_k)
        for layer, name in zip(layers, names, strict=True)
    ]


def _start(run: Path | None) -> Start | None:
    """What config.yaml says about pretrained weights, and what timm knows of those."""
    if run is None or not (run / "config.yaml").is_file():
        return None
    try:
        source = read_yaml(run / "config.yaml")["model"]["arch"]["pretrained"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run / 'config.yaml'} can't be read ({type(error).__name__}): mend it or move it away."
        ) from error
    if not source:
        return Start()
    if str(source).startswith("hf-hub:"):
        return Start(str(source), str(source).removeprefix("hf-hub:").split("@")[0])
    if Path(source).exists() or not timm.is_model(source):
        return Start(without_path(str(source)))
    config = cast(Any, timm.get_pretrained_cfg(source)).to_dict()
    return Start(str(source), str(config.get("hf_hub_id") or ""), str(config.get("license") or ""))


def _versions(provenance: Json) -> dict[str, str]:
    """Of the run; without one, of the software that the card's numbers were measured with."""
    if provenance:
        found = {"moevision": provenance.get("moevision"), **dict(provenance.get("libraries") or {})}
        found["Python"] = (provenance.get("python") or {}).get("version")
    else:
        found = {"moevision": __version__, **{name: package_version(name) for name in LIBRARIES}}
    return {name: str(version) for name, version in found.items() if version}
