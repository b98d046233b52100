"""Tables and figure of `moevision benchmark infer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moevision.commands.benchmark.record import print_line, print_machine, print_table, ratio_text
from moevision.commands.benchmark.subject import NAMES
from moevision.train.plots import INK, calm, save, title

TWIN = NAMES["active_flops"]
COLOURS = dict(zip(NAMES.values(), ("#0072B2", "#8996A3", "#CBD2D9"), strict=True))
Json = Mapping[str, Any]


def show(record: Json) -> None:
    """One table per batch size and precision."""
    print_machine(record)
    print_line(f"{record['settings']['model']}: {record['image_size']} px")
    for comparison in record["comparisons"]:
        rows = []
        for row in comparison["rows"]:
            if "error" in row:
                print_line(f"  {row['name']}: {row['error']}")
                continue
            mfu = row["mfu"]
            rows.append(
                [
                    row["name"],
                    f"{row['images_per_s']:.1f}",
                    f"{row['latency_ms']['p50']:.2f}",
                    f"{row['latency_ms']['p95']:.2f}",
                    ratio_text(row["speed_to"].get(TWIN)),
                    "" if mfu is None else f"{mfu:.1%}",
                ]
            )
        columns = ["", "images/s", "p50 ms", "p95 ms", "speed ÷ active-FLOPs twin", "MFU"]
        print_table(f"batch {comparison['batch_size']}, {comparison['precision']}", columns, rows)
    for name, energy in record["energy"].items():
        measured = energy["energy"] == "measured"
        text = f"{energy['median']:.3g} J/image above idle" if measured else f"not measured ({energy['reason']})"
        print_line(f"energy, {name}: {text}")


def draw(record: Json, out: Path) -> None:
    """A panel per precision, a group of bars per batch size; compiled models are hatched."""
    precisions = list(dict.fromkeys(comparison["precision"] for comparison in record["comparisons"]))
    figure = Figure(figsize=(1.2 + 4.6 * len(precisions), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(precisions), squeeze=False, sharey=True)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        calm(axes)
        comparisons = [entry for entry in record["comparisons"] if entry["precision"] == precision]
        names = [row["name"] for row in comparisons[0]["rows"] if "error" not in row]
        width = 0.8 / len(names)
        for place, comparison in enumerate(comparisons):
            rows = {row["name"]: row for row in comparison["rows"] if "error" not in row}
            for number, name in enumerate(name for name in names if name in rows):
                row, x = rows[name], place + (number - (len(names) - 1) / 2) * width
                plain = name.removesuffix(", compiled")
                axes.bar(
                    x,
                    row["images_per_s"],
                    width=0.92 * width,
                    color=COLOURS[plain],
                    hatch="" if plain == name else "////",
                    edgecolor="white",
                    linewidth=0,
                    zorder=2,
                    label=name if place == 0 else None,
                )
                ends = [1e3 * comparison["batch_size"] / row["time_ms"][end] for end in ("quartile_3", "quartile_1")]
                axes.plot([x, x], ends, color=INK, linewidth=1.0, zorder=3)
                top = (x, max(row["images_per_s"], *ends))
                axes.annotate(
                    f"{row['images_per_s']:.0f}",
                    top,
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=INK,
                )
        axes.set_xticks(range(len(comparisons)), [f"batch {entry['batch_size']}" for entry in comparisons])
        title(axes, f"images/s, {precision}")
    panels[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    save(figure, out)
