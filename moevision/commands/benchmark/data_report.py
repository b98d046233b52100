"""Tables and figure of `moevision benchmark data`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moevision.commands.benchmark.record import print_line, print_machine, print_table
from moevision.train.plots import BLUE, INK, calm, save, title

Json = Mapping[str, Any]


def show(record: Json) -> None:
    """Rates, decoding, data wait."""
    data = record["data"]
    print_machine(record)
    print_line(f"{data['path']}: {data['image_size']} px, batches of {data['batch_size']}. {record['split']}")
    rows = []
    for row in record["rows"]:
        rate = row["images_per_s"]
        rows.append(
            [
                "in memory" if row["cached"] else "made each time",
                "yes" if row["augmented"] else "no",
                str(row["workers"]),
                f"{rate['median']:,.0f} ({rate['quartile_1']:,.0f}–{rate['quartile_3']:,.0f})",
            ]
        )
    print_table("input pipeline alone", ["pictures", "augmented", "workers", "images/s (quartiles)"], rows)
    filling, decode = record["filling_the_cache"], record["decode"]
    if "note" in filling:
        print_line(filling["note"])
    if "seconds" in filling:
        print_line(
            f"reading, and decoding into memory on all cores: {filling['images']:,} images in "
            f"{filling['seconds']:.1f} s, {filling['images_per_s']:,.0f} images/s"
        )
    if "error" in decode:
        print_line(f"decoding: {decode['error']}")
    else:
        print_line(
            f"decoding and resizing in one process: {decode['ms_per_image']['median']:.3f} ms/image, "
            f"{decode['images_per_s_of_one_process']:,.0f} images/s"
        )
    for wait in record["data_wait"]:
        print_line(
            f"data wait, {wait['workers']} workers: {wait['share']:.1%} of a training step of {wait['model']} "
            f"({wait['wait_ms']['median']:.1f} ms beside {wait['step_ms']['median']:.1f} ms)"
        )


def draw(record: Json, out: Path) -> None:
    """Images per second by number of workers."""
    rows = [row for row in record["rows"] if row["augmented"]]
    figure = Figure(figsize=(6.4, 1.1 + 0.42 * len(record["rows"])), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    calm(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    rows += [row for row in record["rows"] if not row["augmented"]]
    longest = max(row["images_per_s"]["quartile_3"] for row in rows)
    for place, row in enumerate(rows):
        rate = row["images_per_s"]
        axes.barh(place, rate["median"], height=0.6, color=BLUE if row["augmented"] else "#B9C2CC", zorder=2)
        axes.plot([rate["quartile_1"], rate["quartile_3"]], [place, place], color=INK, linewidth=1.2, zorder=3)
        text = f"{rate['median']:,.0f}"
        axes.text(rate["quartile_3"] + 0.015 * longest, place, text, va="center", fontsize=8, color=INK)
    labels = [
        f"{'in memory' if row['cached'] else 'made each time'}, "
        + (f"{row['workers']} workers" if row["augmented"] else "no augmentation, 0 workers")
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1.15 * longest)
    waits = {wait["workers"]: wait["share"] for wait in record["data_wait"]}
    note = ", ".join(f"{share:.1%} with {workers} workers" for workers, share in waits.items())
    title(axes, "images/s of the input pipeline alone", f"wait in a training step: {note}" if note else "")
    save(figure, out)
