"""The model card: README.md of a published model, with the header that huggingface.co reads.

`gather_facts` collects what a saved model and its run folder tell; `templates/card.md.jinja` says it. Every number
comes from a finished run, from an analysis or from the model itself. What is missing stays None, and the card says "not
measured", since a reader can't see what was left out. Nothing in it tells where files lie on the computer that trained
the model: of a path only the last part is kept.

Sources: model cards (Mitchell et al. 2019, arXiv:1810.03993); the header's fields as huggingface_hub's `ModelCardData`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from moevision import __version__, package_version
from moevision.data.named import UNKNOWN, DataTerms, terms_of
from moevision.efficiency import ModelCost, measure_cost
from moevision.errors import UserError, refuse_equal_seeds
from moevision.layers import moe_layers
from moevision.models.io import SavedModel, load_model, model_folder
from moevision.models.safe_files import read_json, read_yaml
from moevision.names import shown
from moevision.train.provenance import LIBRARIES
from moevision.train.report import (
    RunSummary,
    read_summary,
    render,
)

Json = dict[str, Any]
UNKNOWN_LICENCE = "unknown"  # huggingface.co's own word in the field `license`
TAGS = ("image-classification", "timm", "moevision", "mixture-of-experts", "vision-transformer")


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
        UserError: if there is no model, a file of the run is damaged, or two of the runs have one seed.
    """
    saved = model if isinstance(model, SavedModel) else load_model(str(model))
    run = None if isinstance(model, SavedModel) else Path(model) if summary is not None else _run_of(Path(model))
    if run is not None and summary is None:
        summary = read_summary(run / "summary.json")
    rest = [read_summary(Path(other) / "summary.json") for other in others]
    refuse_equal_seeds((each.name, each.seed) for each in ([summary, *rest] if summary else rest))
    command, versions = _origin(None if run is None else run / "provenance.json")
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
        command=command,
        start=_start(run),
        versions=versions,
        others=rest,
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


def _origin(file: Path | None) -> tuple[list[str], dict[str, str]]:
    """The command in a provenance.json and its software, or without one that of this process.

    Raises:
        UserError: if it is damaged.
    """
    if file is None or not file.is_file():
        return [], _versions({})
    try:
        provenance = dict(read_json(file))
        return [shown(without_path(word)) for word in provenance.get("command", [])], _versions(provenance)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}): repair it or move it away.") from error


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
            f"{run / 'config.yaml'} can't be read ({type(error).__name__}): repair it or move it away."
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


def model_card(facts: CardFacts) -> str:
    """The card as Markdown; the same facts always give the same text.

    Args:
        facts: from `gather_facts`.
    """
    terms = None if facts.summary is None else terms_of(facts.summary.data)
    return render(
        "card.md.jinja",
        facts=facts,
        terms=terms,
        header=_header(facts, terms).to_yaml(),
        unknown_terms=UNKNOWN,
        unknown_licence=UNKNOWN_LICENCE,
        per_layer=_per_layer,
        without_example=without_example,
        shell=_shell,
        bits=_bits,
        signed=_signed,
        strongest=_strongest,
        largest=_largest,
    )


def _header(facts: CardFacts, terms: DataTerms | None) -> ModelCardData:
    start = facts.start or Start()
    results = None if facts.summary is None or terms is None else [_result(facts.summary, terms)]
    return ModelCardData(
        license=facts.licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=list(TAGS if facts.blocks else [tag for tag in TAGS if tag != "mixture-of-experts"]),
        datasets=[terms.hub_id] if terms and terms.hub_id else None,
        base_model=start.hub_id or None,
        metrics=["accuracy"] if results else None,
        model_name=facts.name if results else None,
        eval_results=results,
    )


def _result(summary: RunSummary, terms: DataTerms) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=terms.hub_id or terms.kind,
        dataset_name=terms.title,
        dataset_split="test",
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=round(summary.test.correct / summary.test.total, 4),
    )


def without_example(sentence: str) -> str:
    """A sentence about the data without the file name that it gives as an example, which may be private."""
    return re.sub(r" \(for example .*\)", "", shown(sentence))  # to the last bracket: names have brackets too


def _per_layer(value: Any) -> str:
    """One value for all MoE layers, or one for each; a dash where a layer has none."""
    return ", ".join("–" if each is None else str(each) for each in (value if isinstance(value, list) else [value]))


def _shell(command: Sequence[str]) -> str:
    return " ".join(word if "…" in word else shlex.quote(word) for word in command)


def _strongest(baselines: Mapping[str, Sequence[float]]) -> str:
    """The routing without learning that tells most, over all its seeds, such as `0.200 (kmeans input)`."""
    found = [(max(values), name) for name, values in baselines.items() if values]
    if not found:
        return "not measured"
    bits, name = max(found)
    return f"{_bits(bits)} ({name.replace('_', ' ')})"


def _largest(experts: Sequence[Json]) -> Json:
    """The expert whose absence changes most."""
    return max(experts, key=lambda expert: abs(expert["delta_logit"]))


def _bits(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if round(value, 3) else "0.000"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
