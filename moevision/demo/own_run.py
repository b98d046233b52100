"""What the run folder of someone's own model tells: its card."""

from __future__ import annotations

from moevision.analysis.images import run_folder
from moevision.demo.cards import Card
from moevision.demo.facts import title_of
from moevision.errors import UserError
from moevision.models.safe_files import read_json
from moevision.names import shown


def card_of_run(address: str) -> Card:
    """What a model's run folder tells about it; any other address is its own title."""
    run = run_folder(address)
    if run is None or not (run / "summary.json").is_file():
        return Card(id="own", title=title_of(address) or shown(address), subtitle="your model")
    file = run / "summary.json"
    try:
        summary = read_json(file)
        test, twin = summary["test"], summary["twin"]
        accuracy = {"moe": test["correct"] / test["total"]}
        if twin is not None:
            accuracy["dense"] = twin["correct"] / test["total"]
        seed = summary["seed"]
        return Card(
            id="own",
            title=shown(str(summary["name"])),
            subtitle=str(summary["model"]),
            data=f"{shown(str(summary['data']))}: {sum(summary['class_counts']['train'].values()):,} training pictures",
            recipe=f"moevision fit --config {shown(run.name)}/config.yaml",
            seed=seed if type(seed) is int else None,
            accuracy=accuracy,
            data_kind=str(summary["data"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}: {error}): mend it or move it away.") from error
