"""`moevision fit`: a training, and on pages of emoji what its experts take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moevision.config import FLAGS, ParsedArgs, parse_args
from moevision.data.emoji import CELLS, EmojiPages
from moevision.data.named import DRAWN
from moevision.files import write_text_atomic
from moevision.train.finish import RunResult
from moevision.train.fit import fit as train_and_test
from moevision.words import percent

_PAGES = 1_000  # on which experts are named; as many of emoji that training never showed


def fit(folder: str | Path | None = None, **options: Any) -> RunResult | None:
    """Train as the command `moevision fit FOLDER --NAME VALUE` does, with its options.

    Args:
        folder: of images, one folder per class; or another data set, as for the command.
        options: by their names on the command line, with _ for -, and True for one without a value.

    Returns:
        The finished run: its `run_dir` and `summary`. None if nothing was trained or kept.

    Raises:
        UserError: where the command would say in one sentence what to mend.

    Examples:
        ```python
        run = moevision.fit("photos", epochs=3, with_twin=True)
        run = moevision.fit(config="emoji", **{"optim.lr": 0.01})
        ```
    """
    return run(parse_args("fit", command_line(folder, **options)))


def command_line(folder: str | Path | None = None, **options: Any) -> list[str]:
    """What is typed behind `moevision fit` for the arguments of `fit`."""
    arguments = []
    if folder is not None:
        # A folder's name may begin like an option's.
        prefix = "./" * str(folder).startswith("-")
        arguments.append(f"{prefix}{folder}")
    for name, value in options.items():
        if name.replace("_", "-") not in FLAGS:
            values = value if name == "config" and isinstance(value, list | tuple) else [value]
            arguments += [f"--{name}={_typed(one)}" for one in values]
        elif value:
            arguments.append(f"--{name}")
    return arguments


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, str | Path):
        return str(value)
    return json.dumps(value)


def run(args: ParsedArgs) -> RunResult | None:
    """Train; then print what the experts take, where that is known, and add it to summary.md."""
    result = train_and_test(args)
    if result is None or not result.summary.layers:
        return result
    data = pages_of(result.run_dir)
    if data is None:
        return result
    text = what_experts_take(result.run_dir, data)
    print(f"\n{text}")
    summary = result.run_dir / "summary.md"
    section = f"\n## What its experts take\n\n```\n{text}\n```\n"
    write_text_atomic(summary, summary.read_text(encoding="utf-8") + section)
    return result


def pages_of(run_dir: Path) -> type[EmojiPages] | None:
    """The pages of emoji that a run was trained on; None for other images."""
    from moevision.analysis.images import data_settings

    drawn = DRAWN.get(data_settings(run_dir)["path"])
    return drawn if drawn is not None and issubclass(drawn, EmojiPages) else None


def what_experts_take(run_dir: Path, data: type[EmojiPages]) -> str:
    """The experts' names on test pages, and the accuracy on emoji that training never showed, as lines."""
    from moevision.analysis.collect import collect_routing
    from moevision.analysis.describe import describe_names, names_in_layers
    from moevision.analysis.images import open_pictures
    from moevision.models.io import load_model

    model = load_model(str(run_dir))
    layers = names_in_layers(model, open_pictures(data(_PAGES, split="test"), model.image_size))
    unseen = open_pictures(data(_PAGES, split="unseen"), model.image_size)
    trace = collect_routing(model, unseen, progress=False)
    assert trace.accuracy is not None  # pages have labels
    accuracy = (
        f"{percent(trace.accuracy)} of {_PAGES:,} pages right whose emoji it was never trained on."
    )
    if not layers:  # no token chooses
        return accuracy

    unit = "emoji" if trace.grid == (CELLS, CELLS) else "patches"
    return "\n".join(
        [
            f"What each expert takes on {_PAGES:,} test pages, untold. It has a name where over half of its {unit}",
            "are of one group; in brackets the purest such of as many clusters of what its layer reads.",
            *describe_names(layers, unit),
            accuracy,
        ]
    )
