"""Where a run keeps everything: `runs/<name>/`, and the configs that are shipped with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from moevision.errors import UserError
from moevision.names import shown

PACKAGE = Path(__file__).resolve().parent.parent


def new_run_folder(name: str, root: Path = Path("runs")) -> Path:
    """A folder that no earlier run has used: `runs/<name>`, else `runs/<name>-2`, ... Created empty."""
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"The run folder {folder} can't be made ({error.strerror}): start where you may write."
            ) from error
        return folder
    raise UserError(f"There are 10,000 runs named {name!r} in {root}: choose another --name.")


def run_name(data: str) -> str:
    """What a run is called after its data: the name of the folder, without signs that a terminal can't show."""
    name = Path(data).resolve().name
    return name if shown(name) == name else shown(name).replace("\\", "_")


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs in the installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_config(name: str) -> Path:
    """The config file called `name`: a path, or the name of a shipped config.

    Raises:
        UserError: if it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    configs = shipped_configs()
    if name in configs:
        return configs[name]
    near = difflib.get_close_matches(name, configs, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"There is no config {name!r}.{hint} Give a YAML file or one of: {', '.join(configs)}.")
