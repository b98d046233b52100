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
    LEARN,
    SEEDS,
    Layer,
    Record,
    different,
    holds,
    in_own,
    own_experts,
    runs_of,
    separate,
    to_show,
)
from benchmarks.markdown import table
from benchmarks.queue import is_dirty
from benchmarks.study import Contrast, contrasts
from moevision.analysis.questions import YES
from moevision.analysis.readings import listed
from moevision.train.plots import INK, SOFT, save
from moevision.words import signed

LEARNED = ("alone", "balanced")
ONLY_TOLD, OPEN = "only if told", "not shown"
P_VALUE = 0.05
Layers = Sequence[Layer]  # one per seed


def parts_of(records: Sequence[Record]) -> list[str]:
    """The answer, the tables, and where the records come from."""
    if not any(not is_dirty(run) for run in records):
        return ["Not run."]
    return [
        f"**{answer(records)[1]}.**",
        "### Accuracy", accuracy_table(records),
        "### Which class goes where", where_table(records),
        "### What is lost without each", lost_table(records),
        "### One expert for all photos", sent_table(records),
        *shown_parts(records),
        origins(records),
    ]  # fmt: skip


def layers_of(records: Sequence[Record], trunk: str = "pretrained") -> Iterator[tuple[str, str, str, Layers]]:
    """What learns, gate, name of the layer, and that layer of every seed."""
    for learn in LEARN:
        for gate in GATES:
            runs = runs_of(records, gate, learn, trunk)
            for layers in zip(*(run["layers"] for run in runs), strict=True):
                yield learn, gate, layers[0]["name"], layers


def gaps(records: Sequence[Record]) -> dict[tuple[str, str], Contrast]:
    """Each gate minus dense where the same learns, judged together."""
    own = {
        f"{learn} {gate}": {int(run["seed"]): run["top1"] for run in runs_of(records, gate, learn)}
        for learn in LEARN for gate in GATES
    }  # fmt: skip
    pairs = [(f"{learn} {gate}", f"{learn} dense") for learn in LEARN for gate in GATES if gate != "dense"]
    return {tuple(each.first.split()): each for each in contrasts(own, pairs)}  # type: ignore[misc]


def accuracy_table(records: Sequence[Record]) -> str:
    """Right of the test photos, beside the dense model."""
    lines, found = [], gaps(records)
    for learn, of_learn in LEARN.items():
        for gate, spec in GATES.items():
            right = [100 * run["top1"] for run in runs_of(records, gate, learn)]
            shown = f"{statistics.fmean(right):.1f}" if right else ""
            shown += f" ± {statistics.stdev(right):.1f}" if right[1:] else ""
            beside = found.get((learn, gate))
            lines.append([of_learn, spec.title, str(len(right)), shown, ", ".join(f"{each:.1f}" for each in right),
                          *([beside.interval, beside.verdict] if beside else ["", ""])])  # fmt: skip
    heads = ["learns", "gate", "seeds", "test top-1, % ± SD", "by seed", "minus dense, points (95 %)", "verdict"]
    return table(heads, lines, "llrrrrl")


def where_table(records: Sequence[Record], trunk: str = "pretrained") -> str:
    """Shares of each class in its own experts, and what the expert tells about the class beside the controls."""
    lines = []
    for learn, gate, name, layers in layers_of(records, trunk):
        shares = [" / ".join(f"{100 * share:.0f}" for share in in_own(layer)) for layer in layers]
        told = [mean(layers, lambda layer: 100 * layer["guess"], 1)]
        told += [mean(layers, lambda layer, of=of: 100 * best(layer[of]), 1) for of in ("before", "clusters")]
        busiest = mean(layers, lambda layer: 100 * max(layer["load"]), 0)
        told.append(f"{sum(map(separate, layers))} of {len(layers)}")
        lines.append(
            [
                LEARN[learn],
                GATES[gate].title,
                name,
                ", ".join(shares),
                busiest,
                *told,
                words(layers, 0),
                words(layers, 1),
            ]
        )
    heads = ["learns", "gate", "layer", "cats / dogs in their own expert, %, by seed", "busiest expert, % of photos",
             "class guessed from the expert, %", "before training", "from clusters", "separate",
             "classes go to different experts", "training added to it"]  # fmt: skip
    return table(heads, lines, "lllrrrrrrll")


def lost_table(records: Sequence[Record], trunk: str = "pretrained") -> str:
    """Log-loss and points that a class's photos lose without the layer, without each expert, and in the other one."""
    lines = []
    for learn, gate, name, layers in layers_of(records, trunk):
        cells = [cell(layers, lambda layer, unit: layer["swap"]["without"][unit]["value"])]
        for label in (0, 1):
            for owner in (0, 1):
                cells.append(
                    cell(layers, lambda layer, unit, c=label, e=owner: without(layer, unit)[c][own_experts(layer)[e]])
                )
        cells.append(cell(layers, lambda layer, unit: layer["swap"][unit]["value"]))
        apart = sum((layer["swap"]["knock_out"]["p_value"] or 1) <= P_VALUE for layer in layers)
        lines.append([LEARN[learn], GATES[gate].title, name, *cells, f"{apart} of {len(layers)}",
                      f"{sum(map(different, layers))} of {len(layers)}"])  # fmt: skip
    heads = ["learns", "gate", "layer", "layer left out", "cats without cats' expert", "cats without dogs' expert",
             "dogs without cats' expert", "dogs without dogs' expert", "experts exchanged", "double dissociation",
             "different"]  # fmt: skip
    return table(heads, lines, "lllrrrrrrrr")


def sent_table(records: Sequence[Record], trunk: str = "pretrained") -> str:
    """Right of each class by its own routes, and where one expert computes all photos of both."""
    lines = []
    for learn, gate, name, layers in layers_of(records, trunk):
        own = [run["own"]["right"] for run in runs_of(records, gate, learn, trunk)]
        cells = ["/".join(f"{100 * statistics.fmean(right):.0f}" for right in zip(*own, strict=True))]
        for owner in (0, 1):
            sent = [layer["sent"][own_experts(layer)[owner]]["right"] for layer in layers]
            cells.append("/".join(f"{100 * statistics.fmean(right):.0f}" for right in zip(*sent, strict=True)))
        lines.append([LEARN[learn], GATES[gate].title, name, *(text.replace("/", " / ") for text in cells)])
    heads = [
        "learns",
        "gate",
        "layer",
        "cats / dogs right, %",
        "all photos by cats' expert",
        "all photos by dogs' expert",
    ]
    return table(heads, lines, "lllrrr")


def shown_parts(records: Sequence[Record]) -> list[str]:
    """The same of the run to be shown, once it is there."""
    found = to_show(records)
    runs = [] if found is None else runs_of(records, *found, "bundled")
    if found is None or not runs:
        return []
    gate, learn = GATES[found[0]].title, LEARN[found[1]]
    return [
        "### In the explorer's network",
        f"{gate[0].upper()}{gate[1:]}, seed 0; what doesn't learn ({learn}) is the explorer's photo model: "
        f"{100 * runs[0]['top1']:.1f} % of {runs[0]['images']} test photos right.",
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
    """Whether the seed's sentence holds, and the numbers: yes, only if told, or not shown; empty before the end."""
    apart, said = [], []
    for gate in (*LEARNED, "class"):
        every = [layer for _, own, _, layers in layers_of(records) if own == gate for layer in layers]
        if not every:
            continue
        count = f"{sum(map(separate, every))} of {len(every)}"
        apart.append(f"{GATES[gate].title} {count}")
        said.append(f"{sum(separate(layer) and different(layer) for layer in every)}")
    head = "Cats and dogs get experts of their own in so many layers"
    text = f"{head}: {', '.join(apart)}; of these, experts are also shown to do different things in {listed(said)}"
    if to_show(records) is None:
        done = sum(len(runs_of(records, gate, learn)) for gate in FEW for learn in LEARN)
        return "", f"So far ({done} of {len(FEW) * len(LEARN) * len(SEEDS)} runs): {text[0].lower()}{text[1:]}"
    held = {gate: any(holds(records, gate, learn) for learn in LEARN) for gate in (*LEARNED, "class")}
    return YES if any(held[gate] for gate in LEARNED) else ONLY_TOLD if held["class"] else OPEN, text


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


def right_by_expert(layer: Layer) -> list[list[float]]:
    """[C, E] share of each class that is right where one expert computes all photos."""
    return [[sent["right"][label] for sent in layer["sent"]] for label in (0, 1)]


PANELS: dict[str, tuple[str, float, Callable[[Layer], Any]]] = {
    "photos that go to": ("{:.0f} %", 100, lambda layer: layer["share"]),
    "log-loss lost without": ("{:.2f}", 1, lambda layer: without(layer, "log_loss")),
    "right if all go to": ("{:.0f} %", 100, right_by_expert),
}


def draw(records: Sequence[Record], out: Path) -> None:
    """The first layer of each gate of two experts: where classes go, what each loses, and one expert for all."""
    shown: dict[tuple[str, str], Layers] = {}
    for learn, gate, _, layers in layers_of(records):
        if GATES[gate].experts == 2:
            shown.setdefault((learn, gate), layers)
    if not shown:
        return

    def ordered(layer: Layer, value: Callable[[Layer], Any]) -> Any:
        return np.array(value(layer))[:, list(own_experts(layer))]  # [C, 2]

    means = {
        key: {what: scale * np.mean([ordered(layer, value) for layer in layers], axis=0)
              for what, (_, scale, value) in PANELS.items()}
        for key, layers in shown.items()
    }  # fmt: skip
    figure = Figure(figsize=(7.2, 0.9 + 1.25 * len(shown)), dpi=150, layout="constrained")
    panels = figure.subplots(len(shown), 3, squeeze=False)
    for axes_row, ((learn, gate), layers) in zip(panels, shown.items(), strict=True):
        for axes, (what, (form, *_)) in zip(axes_row, PANELS.items(), strict=True):
            values, highest = means[learn, gate][what], max(float(own[what].max()) for own in means.values())
            axes.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * max(highest, 1e-9), aspect="auto")
            for (row, column), number in np.ndenumerate(values):
                text = form.format(number).replace("-", "−")
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=INK)
            axes.set_xticks((0, 1), ("expert 1", "expert 2"))
            axes.set_yticks((0, 1), ("cats", "dogs") if axes is axes_row[0] else ("", ""))
            axes.tick_params(length=0, labelsize=7, labelcolor=INK)
            axes.set_title(f"{layers[0]['name']}: {what}", fontsize=7.5, color=SOFT, loc="left", pad=3)
            for side in axes.spines.values():
                side.set_visible(False)
        title = GATES[gate].title.replace(" by ", "\nby ").replace(" with ", "\nwith ")
        axes_row[0].set_ylabel(f"{title}\n({LEARN[learn]})", fontsize=7.5, color=INK, fontweight="bold")
    save(figure, out)
