"""The pictures that a model's own run held out, found from the run folder that the model lies in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moevision.analysis.pictures import PictureSet, open_pictures
from moevision.errors import UserError
from moevision.models.io import SavedModel
from moevision.models.safe_files import read_yaml


def run_folder(address: str) -> Path | None:
    """The run folder that a model lies in, given either of them; None for a model without a run."""
    path = Path(address)
    candidates = (path, path.resolve().parent)
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def data_settings(run: Path) -> Mapping[str, Any]:
    """What a run's config.yaml says about its data; empty where it says nothing.

    Raises:
        UserError: if the file can't be read.
    """
    file = run / "config.yaml"
    try:
        data = read_yaml(file)["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}): mend it or move it away.") from error
    return data if isinstance(data, dict) else {}


def is_data_of(run: Path, data: str) -> bool:
    """Whether `data` names what a run was trained on, however its path is written."""
    path = data_settings(run).get("path")
    return path is not None and Path(str(path)).expanduser().resolve() == Path(data).expanduser().resolve()


def pictures_for(
    address: str,
    model: SavedModel,
    data: str | None = None,
    *,
    split: str = "test",
    limit: int | None = None,
    root: str | None = None,
) -> PictureSet | None:
    """Pictures for a model, held-out ones by default: of `data`, or else of what its run was trained on.

    Args:
        address: a run folder, its model/ folder, or any other address.
        model: the model there.
        data: a folder or a dataset's name; None takes the run's own.
        split: `test`, `val`, `train` or `all`, as in `open_pictures`.
        limit: at most so many, the same number of each class.
        root: folder of named datasets; the run's own if None.

    Returns:
        The pictures; None if neither `data` nor a run says which.

    Raises:
        UserError: if the pictures aren't there (any more).
    """
    run = run_folder(address)
    trained_on = {} if run is None else data_settings(run)
    path = data or trained_on.get("path")
    if path is None:
        return None
    try:
        return open_pictures(
            str(path),
            model.image_size,
            split=split,
            limit=limit,
            seed=int(trained_on.get("seed") or 0),
            class_names=model.class_names,
            root=root or str(trained_on.get("root") or "data"),
            run_dir=run if run is not None and is_data_of(run, str(path)) else None,
        )
    except UserError as error:
        hint = "" if data else " (the run was trained on it; --data names other pictures)"
        raise UserError(f"{str(error).rstrip('.')}{hint}.") from error
