"""README.md's tables and figure, from the records alone.

Axes: C classes, E experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.cats_and_dogs.gates import (
    FEW,
    GATES,
    SEEDS,
    Layer,
    Record,
    different,
    in_own,
    own_experts,
    runs_of,
    separate,
    shown_gate,
)
from benchmarks.markdown import table
from benchmarks.queue import is_dirty
from benchmarks.study import Contrast, contrasts
from moevision.analysis.questions import YES
from moevision.train.plots import INK, SOFT, save
from moevision.words import signed

LEARNED = ("alone", "balanced")
ONLY_TOLD, OPEN, NOT_RUN = "only if told", "not shown", "not run yet"
P_VALUE = 0.05
Layers = Sequence[Layer]  # one per seed


def parts_of(records: Sequence[Record], trunk: str = "pretrained") -> list[str]:
    """The answer, the tables, and where the records come from."""
    if not any(runs_of(records, gate, trunk) for gate in GATES):
        return ["Not run."]
    return [
        f"**{answer(records)[1]}.**",
        "### Accuracy", accuracy_table(records),
        "### Which class goes where", where_table(records, trunk),
        "### What is lost without each", lost_table(records, trunk),
        "### One expert for all photos", sent_table(records, trunk),
        *shown_parts(records),
        origins(records),
    ]  # fmt: skip


def layers_of(records: Sequence[Record], trunk: str) -> Iterator[tuple[str, str, Layers]]:
    """Gate, name of the layer, and that layer of every seed."""
    for gate in GATES:
        runs = runs_of(records, gate, trunk)
        for layers in zip(*(run["layers"] for run in runs), strict=True):
            yield gate, layers[0]["name"], layers


def gaps(records: Sequence[Record]) -> dict[str, Contrast]:
    """Each gate minus dense, judged together."""
    own = {gate: {int(run["seed"]): run["top1"] for run in runs_of(records, gate)} for gate in GATES}
    return {each.first: each for each in contrasts(own, [(gate, "dense") for gate in GATES if gate != "dense"])}


def accuracy_table(records: Sequence[Record]) -> str:
    """Right of the test photos, beside the dense model."""
    lines, found = [], gaps(records)
    for gate, spec in GATES.items():
        right = [100 * run["top1"] for run in runs_of(records, gate)]
        shown = f"{statistics.fmean(right):.1f}" if right else ""
        shown += f" ± {statistics.stdev(right):.1f}" if right[1:] else ""
        beside = found.get(gate)
        lines.append([spec.title, str(len(right)), shown, ", ".join(f"{each:.1f}" for each in right),
                      *([beside.interval, beside.verdict] if beside else ["", ""])])  # fmt: skip
    heads = ["gate", "seeds", "test top-1, % ± SD", "by seed", "minus dense, points (95 %)", "verdict"]
    return table(heads, lines, "lrrrrl")


def where_table(records: Sequence[Record], trunk: str) -> str:
    """Shares of each class in its own experts, and what the expert tells about the class beside the controls."""
    lines = []
    for gate, name, layers in layers_of(records, trunk):
        shares = [" / ".join(f"{100 * share:.0f}" for share in in_own(layer)) for layer in layers]
        told = [mean(layers, lambda layer: 100 * layer["guess"], 1)]
        told += [mean(layers, lambda layer, of=of: 100 * best(layer[of]), 1) for of in ("before", "clusters")]
        busiest = mean(layers, lambda layer: 100 * max(layer["load"]), 0)
        told.append(f"{sum(map(separate, layers))} of {len(layers)}")
        lines.append([GATES[gate].title, name, ", ".join(shares), busiest, *told, words(layers, 0), words(layers, 1)])
    heads = ["gate", "layer", "cats / dogs in their own expert, %, by seed", "busiest expert, % of photos",
             "class guessed from the expert, %", "before training", "from clusters", "separate",
             "classes go to different experts", "training added to it"]  # fmt: skip
    return table(heads, lines, "llrrrrrrll")


def lost_table(records: Sequence[Record], trunk: str) -> str:
    """Log-loss and points that a class's photos lose without the layer, without each expert, and in the other one."""
    lines = []
    for gate, name, layers in layers_of(records, trunk):
        cells = [cell(layers, lambda layer, unit: layer["swap"]["without"][unit]["value"])]
        for label in (0, 1):
            for owner in (0, 1):
                cells.append(
                    cell(layers, lambda layer, unit, c=label, e=owner: without(layer, unit)[c][own_experts(layer)[e]])
                )
        cells.append(cell(layers, lambda layer, unit: layer["swap"][unit]["value"]))
        apart = sum((layer["swap"]["knock_out"]["p_value"] or 1) <= P_VALUE for layer in layers)
        lines.append([GATES[gate].title, name, *cells, f"{apart} of {len(layers)}",
                      f"{sum(map(different, layers))} of {len(layers)}"])  # fmt: skip
    heads = ["gate", "layer", "layer left out", "cats without cats' expert", "cats without dogs' expert",
             "dogs without cats' expert", "dogs without dogs' expert", "experts exchanged", "double dissociation",
             "different"]  # fmt: skip
    return table(heads, lines, "llrrrrrrrr")


def sent_table(records: Sequence[Record], trunk: str) -> str:
    """Right of each class by its own routes, and where one expert computes all photos of both."""
    lines = []
    for gate, name, layers in layers_of(records, trunk):
        own = [run["own"]["right"] for run in runs_of(records, gate, trunk)]
        cells = ["/".join(f"{100 * statistics.fmean(right):.0f}" for right in zip(*own, strict=True))]
        for owner in (0, 1):
            sent = [layer["sent"][own_experts(layer)[owner]]["right"] for layer in layers]
            cells.append("/".join(f"{100 * statistics.fmean(right):.0f}" for right in zip(*sent, strict=True)))
        lines.append([GATES[gate].title, name, *(text.replace("/", " / ") for text in cells)])
    heads = ["gate", "layer", "cats / dogs right, %", "all photos by cats' expert", "all photos by dogs' expert"]
    return table(heads, lines, "llrrr")


def shown_parts(records: Sequence[Record]) -> list[str]:
    """The same of the run behind the explorer's blocks, once it is there."""
    gate = shown_gate(records)
    runs = [] if gate is None else runs_of(records, gate, "bundled")
    if gate is None or not runs:
        return []
    top1 = f"{100 * runs[0]['top1']:.1f} %"
    return [
        "### Behind the explorer's blocks",
        f"{GATES[gate].title[0].upper()}{GATES[gate].title[1:]}, seed 0, blocks 0 to 6 those of the explorer's photo "
        f"model: {top1} of {runs[0]['images']} test photos right.",
        where_table(records, "bundled"), lost_table(records, "bundled"), sent_table(records, "bundled"),
    ]  # fmt: skip


def origins(records: Sequence[Record]) -> str:
    """What was left out, and where the records come from."""
    notes = [f"- Left out, from a changed tree: `{run['name']}`." for run in records if is_dirty(run)]
    if len({run["protocol_sha256"] for run in records}) > 1:
        notes.append("- The protocol changed between records: see its amendments.")
    seconds = sum(sum(run["cpu_s"].values()) for run in records)
    places = ", ".join(sorted({str(run["machine"]["cpu"]) for run in records}))
    notes.append(f"- {len(records)} records, {seconds / 60:.0f} CPU minutes beside those of the tokens, on {places}.")
    return "\n".join(notes)


def answer(records: Sequence[Record]) -> tuple[str, str]:
    """Whether the seed's sentence holds, and the numbers: yes, only if told, or not shown."""
    if shown_gate(records) is None:
        done = sum(len(runs_of(records, gate)) for gate in FEW)
        return "", f"{NOT_RUN[0].upper()}{NOT_RUN[1:]} to an end: {done} of {len(FEW) * len(SEEDS)} runs"
    apart, guessed, held = [], [], {}
    for gate in (*LEARNED, "class"):
        rows = [layers for own, _, layers in layers_of(records, "pretrained") if own == gate]
        held[gate] = any(all(separate(layer) and different(layer) for layer in layers) for layers in rows)
        title, every = GATES[gate].title, [layer for layers in rows for layer in layers]
        apart.append(f"{title} in {sum(map(separate, every))} of {len(every)} layers")
        last = rows[-1]
        lost = signed(statistics.fmean(layer["swap"]["points"]["value"] for layer in last), 1)
        clusters = mean(last, lambda layer: 100 * best(layer["clusters"]), 0)
        guessed.append(f"{mean(last, lambda layer: 100 * layer['guess'], 0)} % ({clusters} %, {lost})")
        name = last[0]["name"]
    verdict = YES if any(held[gate] for gate in LEARNED) else ONLY_TOLD if held["class"] else OPEN
    return verdict, (
        f"Cats and dogs get experts of their own {', '.join(apart)}. Class guessed from the expert of {name} "
        f"(from clusters; points lost if experts are exchanged): {', '.join(guessed)}"
    )


def without(layer: Layer, unit: str) -> list[list[float]]:
    """[C, E] what a photo of each class loses in the mean, over all of its class, where an expert computes nothing."""
    away = layer["swap"]["knock_out"]
    return [
        [(lost or 0.0) * number / sum(numbers) for lost, number in zip(losses, numbers, strict=True)]
        for losses, numbers in zip(away[unit], away["removed"], strict=True)
    ]


def best(control: Sequence[Mapping[str, Any]]) -> float:
    """The guess of the best seed of a control."""
    return max(float(each["guess"]) for each in control)


def mean(layers: Layers, value: Callable[[Layer], float], digits: int) -> str:
    """The mean over seeds."""
    return f"{statistics.fmean(map(value, layers)):.{digits}f}"


def cell(layers: Layers, value: Callable[[Layer, str], float]) -> str:
    """`+0.123 (+1.4)`: nats and points, means over seeds."""
    nats, points = (statistics.fmean(value(layer, unit) for layer in layers) for unit in ("log_loss", "points"))
    return f"{signed(nats)} ({signed(points, 1)})"


def words(layers: Layers, question: int) -> str:
    """The answers to a question, each with its seeds."""
    found = [layer["answers"][question] for layer in layers]
    return ", ".join(f"{word} {found.count(word)}" for word in dict.fromkeys(found))


def draw(records: Sequence[Record], out: Path) -> None:
    """For each gate of two experts and layer: where the classes go, and what each loses without each expert."""
    rows: dict[str, list[tuple[str, Layers]]] = {}
    for gate, name, layers in layers_of(records, "pretrained"):
        if GATES[gate].experts == 2:
            rows.setdefault(gate, []).append((name, layers))
    if not rows:
        return
    figure = Figure(figsize=(7.2, 0.6 + 1.75 * len(rows)), dpi=150, layout="constrained")
    panels = figure.subplots(len(rows), 4, squeeze=False)
    for axes_row, (gate, named) in zip(panels, rows.items(), strict=True):
        for place, (name, layers) in enumerate(named):
            ordered = [np.array(own_experts(layer)) for layer in layers]
            share = np.mean([np.array(layer["share"])[:, o] for layer, o in zip(layers, ordered, strict=True)], axis=0)
            lost = np.mean(
                [np.array(without(layer, "log_loss"))[:, o] for layer, o in zip(layers, ordered, strict=True)], axis=0
            )
            for axes, values, form, high in (
                (axes_row[2 * place], 100 * share, "{:.0f} %", 100.0),
                (axes_row[2 * place + 1], lost, "{:+.3f}", max(1e-9, float(np.abs(lost).max()))),
            ):
                axes.imshow(values, cmap="Blues", vmin=0, vmax=1.4 * high, aspect="auto")
                for (row, column), value in np.ndenumerate(values):
                    text = form.format(value).replace("-", "−")
                    axes.text(column, row, text, ha="center", va="center", fontsize=8, color=INK)
                axes.set_xticks((0, 1), ("expert 1", "expert 2"))
                axes.set_yticks((0, 1), ("cats", "dogs") if axes is axes_row[0] else ("", ""))
                axes.tick_params(length=0, labelsize=7, labelcolor=INK)
                for side in axes.spines.values():
                    side.set_visible(False)
            for axes, what in ((axes_row[2 * place], "photos"), (axes_row[2 * place + 1], "log-loss lost")):
                axes.set_title(f"{name}: {what}", fontsize=7.5, color=SOFT, loc="left", pad=3)
        axes_row[0].set_ylabel(GATES[gate].title.replace(" by ", "\nby ").replace(" with ", "\nwith ")
                               .replace(" alone", "\nalone"), fontsize=8, color=INK, fontweight="bold")  # fmt: skip
    figure.suptitle("Where cats and dogs go, and what each loses without each expert", fontsize=9.5, color=INK,
                    fontweight="bold", x=0.01, ha="left")  # fmt: skip
    save(figure, out)
