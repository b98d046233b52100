"""`moevision fit`: a training, and on pages of emoji what its experts take."""

from __future__ import annotations

from pathlib import Path

from moevision.config import ParsedArgs
from moevision.data.emoji import CELLS, EmojiPages
from moevision.data.named import DRAWN
from moevision.files import write_text_atomic
from moevision.train.fit import fit
from moevision.words import percent

_PAGES = 1_000  # on which experts are named; as many of emoji that training never showed


def run(args: ParsedArgs) -> None:
    """Train; then print what the experts take, where that is known, and add it to summary.md."""
    result = fit(args)
    if result is None or not result.summary.layers:
        return
    data = pages_of(result.run_dir)
    if data is None:
        return
    text = what_experts_take(result.run_dir, data)
    print(f"\n{text}")
    summary = result.run_dir / "summary.md"
    section = f"\n## What its experts take\n\n```\n{text}\n```\n"
    write_text_atomic(summary, summary.read_text(encoding="utf-8") + section)


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
