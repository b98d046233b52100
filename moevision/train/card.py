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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from moevision import __version__, package_version
from moevision.data.named import UNKNOWN, terms_of
from moevision.efficiency import measure_cost
from moevision.errors import UserError, refuse_equal_seeds, shown
from moevision.layers import moe_layers
from moevision.models.io import load_model, model_folder
from moevision.models.safe_files import read_json, read_yaml
from moevision.train.provenance import LIBRARIES
from moevision.train.report import RunSummary, read_summary, template

UNKNOWN_LICENCE = "unknown"  # huggingface.co's own word in the field `license`


class WeightsOrigin(NamedTuple):
    """The weights that a training started from: name, address on huggingface.co and licence as timm records them.

    The name is a timm name, an address, or the last part of a path; empty = from scratch.
    """

    name: str = ""
    hub_id: str = ""
    licence: str = ""


def gather_facts(
    model: str | Path,
    *,
    name: str | None = None,
    address: str = "local-dir:.",
    licence: str = UNKNOWN_LICENCE,
    others: Sequence[str | Path] = (),
    analysis: dict[str, Any] | None = None,
    summary: RunSummary | None = None,
) -> dict[str, Any]:
    """Gather what is known about a saved model; `card.md.jinja` describes it by its names.

    Args:
        model: a run folder or its model/ folder, whose run is told too; or another address.
        name: title of the card; by default the run's, or the architecture's.
        address: where a reader of the card will find the model; the default fits a card beside its model.
        licence: of the weights.
        others: run folders of the same recipe with other seeds.
        analysis: what report.json of `moevision analyze` holds.
        summary: of the run whose folder `model` is, before its summary.json is written; by default that file's.

    Raises:
        UserError: if there is no model, a file of the run is damaged, or two of the runs have one seed.
    """
    saved, run = load_model(str(model)), cast("Path | None", Path(model))
    if summary is None:
        folder = model_folder(Path(model))
        around = () if folder is None else (Path(model), folder.resolve().parent)
        run = next((each for each in around if (each / "summary.json").is_file()), None)
        summary = None if run is None else read_summary(run / "summary.json")
    rest = [read_summary(Path(other) / "summary.json") for other in others]
    refuse_equal_seeds((each.name, each.seed) for each in ([summary, *rest] if summary else rest))
    command, versions = _origin(run)
    architecture, blocks, options = _architecture(saved.net)
    return {
        "name": shown(name or (summary.name if summary else architecture.split()[0])),
        "address": address,
        "licence": licence,
        "architecture": architecture,
        "blocks": blocks,
        "depth": len(cast(Any, saved.net).blocks) if hasattr(saved.net, "blocks") else None,
        "options": options,
        "class_names": saved.class_names,
        "image_size": saved.image_size,
        "cost": summary.cost if summary else measure_cost(saved.net, saved.image_size),
        "summary": summary,
        "command": command,
        "start": _start(run),
        "versions": versions,
        "others": rest,
        "analysis": analysis,
    }


def without_path(word: str) -> str:
    """A word of a command with a path in it shortened to its last part: `--data.path=/home/me/cats` -> `…/cats`."""
    option, equals, value = word.rpartition("=")
    if value.startswith("hf-hub:") or not re.search(r"[/\\]", value):
        return word
    last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return f"{option}{equals}…/{last}"


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}): repair it or move it away.") from error


def _origin(run: Path | None) -> tuple[str, dict[str, str]]:
    """The command in provenance.json and its software, or without one that of this process."""
    if run is None or not (run / "provenance.json").is_file():
        here = {"moevision": __version__, **{name: package_version(name) for name in LIBRARIES}}
        return "", {name: version for name, version in here.items() if version}
    with _reading(run / "provenance.json"):
        known = dict(read_json(run / "provenance.json"))
        words = [shown(without_path(word)) for word in known.get("command", [])]
        versions = {"moevision": known.get("moevision"), **dict(known.get("libraries") or {})}
        versions["Python"] = (known.get("python") or {}).get("version")
    command = " ".join(word if "…" in word else shlex.quote(word) for word in words)
    return command, {name: str(version) for name, version in versions.items() if version}


def _architecture(net: nn.Module) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """The timm name with the base in brackets, the MoE layers, and their options that stand in neither."""
    base = dict(getattr(net, "_model_args", {})).get("base")
    config = cast(dict[str, Any], getattr(net, "pretrained_cfg", None) or {})
    name = str(config.get("architecture") or type(net).__name__) + (f" ({base} with experts)" if base else "")
    layers, chosen = moe_layers(net), dict(getattr(net, "moe_config", {}))
    if not layers:
        return name, [], {}
    routers = chosen.get("router", "unknown")
    routers = [routers] * len(layers) if isinstance(routers, str) else routers
    blocks = [
        {"block": each.layer_index, "router": kind, "experts": each.router.num_experts, "per_token": each.router.top_k}
        for each, kind in zip(layers, routers, strict=True)
    ]
    options = {}
    for option, value in chosen.items():
        if value is not None and option not in ("moe_layers", "num_experts", "top_k", "router", "backend"):
            values = value if isinstance(value, list) else [value]
            options[option] = ", ".join("–" if each is None else str(each) for each in values)
    return name, blocks, options


def _start(run: Path | None) -> WeightsOrigin | None:
    """What config.yaml says about pretrained weights, and what timm knows of those."""
    if run is None or not (run / "config.yaml").is_file():
        return None
    with _reading(run / "config.yaml"):
        source = str(read_yaml(run / "config.yaml")["model"]["arch"]["pretrained"] or "")
    if source.startswith("hf-hub:"):
        return WeightsOrigin(source, source.removeprefix("hf-hub:").split("@")[0])
    if not source or Path(source).exists() or not timm.is_model(source):
        return WeightsOrigin(without_path(source))
    config = cast(Any, timm.get_pretrained_cfg(source)).to_dict()
    return WeightsOrigin(source, str(config.get("hf_hub_id") or ""), str(config.get("license") or ""))


def model_card(facts: dict[str, Any]) -> str:
    """The card as Markdown, from `gather_facts`; the same facts always give the same text."""
    summary: RunSummary | None = facts["summary"]
    terms = None if summary is None else terms_of(summary.data)
    experts = ["mixture-of-experts"] if facts["blocks"] else []
    header = ModelCardData(
        license=facts["licence"],
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "moevision", *experts, "vision-transformer"],
        base_model=(facts["start"] and facts["start"].hub_id) or None,
    )
    if summary is not None and terms is not None:
        header.datasets = [terms.hub_id] if terms.hub_id else None
        header.metrics, header.model_name = ["accuracy"], facts["name"]
        result = EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=terms.hub_id or terms.kind,
            dataset_name=terms.title,
            dataset_split="test",
            metric_type="accuracy",
            metric_name="top-1 accuracy",
            metric_value=round(summary.test.accuracy, 4),
        )
        header.eval_results = [result]
    card: str = template("card.md.jinja").render(
        facts=facts,
        terms=terms,
        header=header.to_yaml(),
        unknown_terms=UNKNOWN,
        unknown_licence=UNKNOWN_LICENCE,
        without_example=without_example,
        largest=lambda experts: max(experts, key=lambda expert: abs(expert["delta_logit"])),
    )
    return card


def without_example(sentence: str) -> str:
    """A sentence about the data without the file name that it gives as an example, which may be private."""
    return re.sub(r" \(for example .*\)", "", shown(sentence))  # to the last bracket: names have brackets too
