"""Tables and figure of `moevision benchmark train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moevision.commands.benchmark.phases import ORDER
from moevision.commands.benchmark.record import print_line, print_machine, print_table, ratio_text
from moevision.commands.benchmark.subject import NAMES
from moevision.train.plots import BLUE, INK, SOFT, calm, save, title

MOE, TWIN, LARGE = NAMES["moe"], NAMES["active_flops"], NAMES["total_params"]
PHASE_COLOURS = {
    "data wait": "#000000",
    "router": "#D55E00",
    "dispatch and combine": "#E69F00",
    "experts": "#0072B2",
    "attention": "#009E73",
    "dense MLPs": "#56B4E9",
    "rest of the forward pass": "#B9C2CC",
    "losses": "#F0E442",
    "backward": "#CC79A7",
    "clip and optimizer": "#8C6D8F",
    "rest": "#E6E8EB",
}
PART_COLOURS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#009E73",
    "activations": "#E69F00",
    "other": "#CBD2D9",
}
PART_NAMES = {"activations": "kept activations", "other": "temporaries, kernels"}
Json = Mapping[str, Any]


def show(record: Json) -> None:
    """Speed, phases, operators, load, memory, energy, peers."""
    model = record["model"]
    print_machine(record)
    print_line(f"{model['name']}: batches of {model['batch_size']}, {model['image_size']} px, {_settings(record)}")
    _show_speed(record)
    _show_phases(record)
    for layer in record["load"]:
        waste = layer["padding_waste"]
        print_line(
            f"block {layer['block']}: busiest expert {layer['slowest_over_mean']:.2f} × the mean load"
            + ("" if waste is None else f", {waste:.1%} of computed rows are padding")
        )
    _show_memory(record["memory"])
    for name, energy in record["energy"].items():
        if energy["energy"] == "measured":
            print_line(f"energy, {name}: {energy['median']:.3g} J/image above idle ({energy['domain']})")
        else:
            print_line(f"energy, {name}: not measured ({energy['reason']})")
    for row in record["peers"].get("lightning", []):
        others = [(other, speed) for other, speed in row["speed_to"].items() if other != row["name"]]
        print_line(
            f"{row['name']}: {row['images_per_s']:.1f} images/s"
            + "".join(f", {ratio_text(speed)} × {other}" for other, speed in others)
        )


def _settings(record: Json) -> str:
    settings = record["settings"]
    return f"{settings['precision']}, {'batches of noise' if settings['data'] == 'noise' else 'its own pictures'}"


def _show_speed(record: Json) -> None:
    for name, why in record["failures"].items():
        print_line(f"  {name}: {why}")
    rows = []
    for row in record["rows"]:
        mfu = row["mfu"]
        rows.append(
            [
                row["name"],
                f"{row['images_per_s']:.1f}",
                ratio_text(row["speed_to"][TWIN]),
                ratio_text(row["speed_to"][LARGE]),
                f"{row['training_flops_per_image'] / 1e9:.2f}",
                "" if mfu is None else f"{mfu:.1%}",
                f"{row['parameters'] / 1e6:.2f} M",
            ]
        )
    print_table(
        "training step",
        ["", "images/s", "speed ÷ active-FLOPs twin", "÷ parameters twin", "GFLOPs/image", "MFU", "parameters"],
        rows,
    )


def _show_phases(record: Json) -> None:
    for title_text, key in (("ms per step, by phase", "phases"), ("share of operators' time, backward included", "")):
        found = {
            name: {phase: entry["ms"] for phase, entry in part["phases"].items()} if key else part["operators"]
            for name, part in record["breakdown"].items()
        }
        every = dict.fromkeys(phase for part in found.values() for phase in part)
        order = sorted(every, key=ORDER.index) if key else list(every)
        form = "{:.1f}" if key else "{:.1%}"
        print_table(
            title_text,
            ["", *found],
            [
                [phase, *(form.format(part[phase]) if phase in part else "" for part in found.values())]
                for phase in order
            ],
        )


def _show_memory(memory: Json) -> None:
    if "error" in memory:
        print_line(f"peak memory: not measured ({memory['error']})")
        return
    rows = []
    for name, model in memory["models"].items():
        if "error" in model:
            print_line(f"peak memory, {name}: {model['error']}")
            continue
        beside = memory["moe_beside"].get(name)
        parts = [f"{model[f'{part}_mib']:.0f}" for part in ("peak", *PART_COLOURS, "tensors")]
        rows.append([name, *parts, *(4 * [""] if beside is None else [f"{value:.2f}" for value in beside.values()])])
    print_table(
        "peak memory of training, MiB",
        [
            "",
            "peak",
            *PART_COLOURS,
            "tensors",
            "MoE ÷ this",
            "− extra weights, optimizer",
            "− gradients too",
            "tensors − extra weights, optimizer",
        ],
        rows,
    )
    print_line(
        "activations: what autograd keeps; other: temporaries, kernels compiled for the shapes that occur, the "
        "allocator's reserve; tensors: the peak of tensors alone, as on CUDA. MoE ÷ this: its whole peak, and without "
        "what its extra weights themselves need; at last of tensors alone, without extra weights and optimizer."
    )


def draw(record: Json, out: Path) -> None:
    """Speed, where a step's time goes, and memory, side by side."""
    with_memory = "models" in record["memory"]
    figure = Figure(figsize=(13.2 if with_memory else 9.6, 3.9), dpi=150, layout="constrained")
    widths = [1.0, 1.7, 1.25] if with_memory else [1.0, 1.7]
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_speed(panels[0], record)
    _draw_phases(panels[1], record["breakdown"])
    if with_memory:
        _draw_memory(panels[2], record["memory"]["models"])
    save(figure, out)


def _lines(axes: Axes, names: list[str]) -> None:
    """Horizontal bars, a name each."""
    calm(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.45, -0.55)


def _draw_speed(axes: Axes, record: Json) -> None:
    rows = record["rows"]
    _lines(axes, [row["name"] for row in rows])
    batch = record["model"]["batch_size"]
    for place, row in enumerate(rows):
        axes.barh(place, row["images_per_s"], height=0.55, color=BLUE if row["name"] == MOE else "#B9C2CC", zorder=2)
        ends = [1e3 * batch / row["time_ms"][name] for name in ("quartile_3", "quartile_1")]
        axes.plot(ends, [place, place], color=INK, linewidth=1.2, zorder=3)
        mfu = "" if row["mfu"] is None else f"\nMFU {row['mfu']:.0%}"
        axes.text(0.03 * max(r["images_per_s"] for r in rows), place, f"{row['images_per_s']:.0f}{mfu}",
                  va="center", fontsize=8, color="white" if row["name"] == MOE else INK, zorder=4)  # fmt: skip
    ratio = next(row for row in rows if row["name"] == MOE)["speed_to"][TWIN]
    title(axes, "images/s, training", f"MoE ÷ active-FLOPs twin: {ratio_text(ratio)}")


def _draw_phases(axes: Axes, parts: Json) -> None:
    _lines(axes, list(parts))
    axes.set_yticklabels([])
    drawn = [phase for phase in ORDER if any(phase in part["phases"] for part in parts.values())]
    for place, part in enumerate(parts.values()):
        left = 0.0
        for phase in drawn:
            width = part["phases"].get(phase, {"ms": 0.0})["ms"]
            axes.barh(place, width, left=left, height=0.55, color=PHASE_COLOURS[phase], zorder=2, label=phase)
            left += width
    _legend_below(axes, 3)
    title(axes, "ms per step, by phase", "measured with clocks between phases")


def _draw_memory(axes: Axes, models: Json) -> None:
    known = {name: model for name, model in models.items() if "error" not in model}
    _lines(axes, list(known))
    axes.set_yticklabels([])
    for place, model in enumerate(known.values()):
        left = 0.0
        for part, colour in PART_COLOURS.items():
            width = model[f"{part}_mib"]
            label = PART_NAMES.get(part, part) if place == 0 else None
            axes.barh(place, width, left=left, height=0.55, color=colour, zorder=2, label=label)
            left += width
        axes.text(left, place, f" {model['peak_mib']:.0f}", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, 1.12 * max((model["peak_mib"] for model in known.values()), default=1.0))
    _legend_below(axes, 2)
    title(axes, "peak memory, MiB", "beyond the process before the model")


def _legend_below(axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="upper left", bbox_to_anchor=(0, -0.09), ncols=columns,
                frameon=False, fontsize=7.5, labelcolor=SOFT, handlelength=1.0, columnspacing=1.2)  # fmt: skip
