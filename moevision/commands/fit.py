"""`moevision fit`: a training, and for drawn images what its experts take."""

from __future__ import annotations

from pathlib import Path

from moevision.config import ParsedArgs
from moevision.data.drawn import DrawnImages
from moevision.files import write_text_atomic
from moevision.train.fit import fit
from moevision.words import percent

_PAGES = 1_000  # images on which experts are named, and of those with unseen emoji


def run(args: ParsedArgs) -> None:
    """Train; then print and add to summary.md what the experts take, where that is known."""
    result = fit(args)
    if result is None or not result.summary.layers:
        return
    kind = drawn_kind(result.run_dir)
    if kind is None:
        return
    text = what_experts_take(result.run_dir, kind)
    print(f"\n{text}")
    summary = result.run_dir / "summary.md"
    section = f"\n## What its experts take\n\n```\n{text}\n```\n"
    write_text_atomic(summary, summary.read_text(encoding="utf-8") + section)


def drawn_kind(run_dir: Path) -> type[DrawnImages] | None:
    """The drawn data set that a run was trained on; None for other images."""
    from moevision.analysis.images import data_settings
    from moevision.data.named import DRAWN

    return DRAWN.get(data_settings(run_dir)["path"])


def what_experts_take(run_dir: Path, kind: type[DrawnImages]) -> str:
    """The experts' names on test images, and the accuracy on what training never showed, as lines."""
    from moevision.analysis.collect import collect_routing
    from moevision.analysis.images import open_pictures
    from moevision.analysis.names import describe_names, names_in_layers
    from moevision.models.io import load_model

    model = load_model(str(run_dir))
    tested = open_pictures(kind(_PAGES, split="test"), model.image_size)
    lines = [
        f"What its experts take, on {_PAGES:,} test images (named above half; in brackets the purest of as many",
        "clusters of the same input):",
        *(describe_names(names, "patches") for names in names_in_layers(model, tested)),
    ]
    if "unseen" in kind.splits:
        unseen = open_pictures(kind(_PAGES, split="unseen"), model.image_size)
        accuracy = collect_routing(model, unseen, progress=False).accuracy
        lines.append(
            f"Of {_PAGES:,} images of things it has never seen it gets {percent(accuracy)} right."
        )
    return "\n".join(lines)
