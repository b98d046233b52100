"""What the run folder of someone's own model tells: its card, and the pictures that the run held out for its test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from moevision.analysis.pictures import PictureSet, open_pictures
from moevision.demo.cards import Card
from moevision.demo.facts import title_of
from moevision.errors import UserError
from moevision.models.hub import SavedModel


def run_folder(address: str) -> Path | None:
    """The run folder that a model lies in, given either; None for a model without a run."""
    path = Path(address)
    return next((folder for folder in (path, path.resolve().parent) if (folder / "summary.json").is_file()), None)


def card_of_run(address: str) -> Card:
    """What a model's run folder tells about it; any other address is its own title."""
    run = run_folder(address)
    if run is None:
        return Card(id="own", title=title_of(address) or address, subtitle="your model")
    file = run / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        test, twin = summary["test"], summary["twin"]
        accuracy = {"moe": test["correct"] / test["total"]}
        if twin is not None:
            accuracy["dense"] = twin["correct"] / test["total"]
        seed = summary["seed"]
        return Card(
            id="own",
            title=str(summary["name"]),
            subtitle=str(summary["model"]),
            data=f"{summary['data']}: {sum(summary['class_counts']['train'].values()):,} training pictures",
            recipe=f"moevision fit --config {run.name}/config.yaml",
            seed=seed if type(seed) is int else None,
            accuracy=accuracy,
            data_kind=str(summary["data"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}: {error}): mend it or move it away.") from error


def pictures_of_run(address: str, saved: SavedModel, root: str) -> PictureSet | None:
    """The pictures that the run held out for its test; None for a model without a run.

    Raises:
        UserError: if they aren't there any more.
    """
    run = run_folder(address)
    if run is None or not (run / "config.yaml").is_file():
        return None
    data = _data_settings(run / "config.yaml")
    if not data.get("path"):
        return None
    return open_pictures(
        str(data["path"]),
        saved.image_size,
        seed=int(data.get("seed") or 0),
        class_names=saved.class_names,
        root=str(data.get("root") or root),
        run_dir=run,
    )


def _data_settings(file: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        data = config["data"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}): mend it or move it away.") from error
    return data if isinstance(data, dict) else {}
