"""The figures of the report, drawn one after the other, with what a reader should and should not see in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from moevision.analysis import plots
from moevision.analysis.describe import co_activation, gate_weight_quantiles, part_expert_table, position_share
from moevision.analysis.images import PictureSet
from moevision.analysis.report.measure import Results, kept_of
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.layers.routing import Kind as RoutingKind

_PICTURES_SHOWN = 3


class Drawn(NamedTuple):
    """A figure and what it is called.

    Attributes:
        kind: key of its caption.
        file: its file's name.
        title: what it shows.
        figure: the figure.
    """

    kind: str
    file: str
    title: str
    figure: Figure

    def entry(self, kinds: Iterable[RoutingKind] = ("token_choice",)) -> dict[str, str]:
        """How `report.json` lists it, of a model whose layers are of these kinds."""
        words = caption(self.kind, kinds)
        return {"file": self.file, "kind": self.kind, "title": self.title, **words._asdict()}


def draw_figures(trace: RoutingTrace, pictures: PictureSet, results: Results, seed: int = 0) -> Iterator[Drawn]:
    """All figures, in the order of the report.

    Args:
        trace: the routing of `pictures`.
        pictures: in the order of the trace.
        results: what was measured; what wasn't is not drawn.
        seed: of the images and patches that are drawn at random.
    """
    names = [layer.name for layer in trace.layers]
    if results.information:
        title = "What the experts tell, beside everything it must exceed"
        yield Drawn("comparisons", "specialization.png", title, plots.plot_specialization(results.information))
    yield from _draw_pictures(trace, pictures, seed)
    counts, kinds = [layer.counts().sum(0) for layer in trace.layers], [layer.kind for layer in trace.layers]
    load = plots.plot_load(counts, names, requested=_requested(trace), kinds=kinds)
    yield Drawn("load", "load.png", "Load of each expert", load)
    uneven = [layer for layer in trace.layers if not np.asarray(layer.kept).all()]
    if uneven:
        figure = plots.plot_experts_per_patch(
            [layer.kept_per_patch() for layer in uneven], [layer.name for layer in uneven]
        )
        yield Drawn("experts_per_patch", "experts_per_patch.png", "How many experts a patch has", figure)
    quantiles = [_quantiles(layer) for layer in trace.layers]
    yield Drawn("gate_weights", "gate_weights.png", "Gate weights by depth", plots.plot_gate_weights(quantiles, names))
    for layer in trace.layers:
        yield from _draw_layer(trace, pictures, results, layer, seed)
    if results.effects["rows"]:
        yield Drawn("effects", "effects.png", "Without one expert", _effects_figure(trace, results.effects))


def shown_pictures(trace: RoutingTrace, seed: int, count: int = _PICTURES_SHOWN) -> list[int]:
    """Images drawn at random, of different classes as long as those suffice: not chosen to look good."""
    order = np.random.default_rng(seed).permutation(len(trace))
    _, first = np.unique(trace.labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), first)
    return [int(index) for index in order[np.concatenate([np.sort(first), others])][:count]]


def _draw_pictures(trace: RoutingTrace, pictures: PictureSet, seed: int) -> Iterator[Drawn]:
    shown = shown_pictures(trace, seed)
    for place, image in enumerate(shown, start=1):
        title = f"Which expert each patch goes to, image {place}"
        yield Drawn("overlay", f"overlay_{place}.png", title, plots.plot_overlay(pictures.image(image), trace, image))
    first, (rows, columns) = shown[0], trace.grid
    middle = rows // 2 * columns + columns // 2
    path = plots.plot_path(pictures.image(first), trace, first, middle)
    yield Drawn("path", "path.png", "The path of one patch, image 1", path)
    certainty = plots.plot_certainty(pictures.image(first), trace, first)
    yield Drawn("certainty", "certainty.png", "How sure the router is, image 1", certainty)


def _draw_layer(
    trace: RoutingTrace, pictures: PictureSet, results: Results, layer: LayerTrace, seed: int
) -> Iterator[Drawn]:
    name, index = layer.name, np.asarray(layer.expert_index)
    if layer.top_k > 1 and layer.kind != "soft":
        counts, chooses = co_activation(index, layer.num_experts, kept_of(layer)), layer.kind == "token_choice"
        figure = plots.plot_co_activation(counts, layer.top_k if chooses else None, layer_name=name)
        yield Drawn("co_activation", f"co_activation_{name}.png", f"{name}: experts chosen together", figure)
    if layer.layer in results.maps:
        found = results.maps[layer.layer]
        figure = plots.plot_class_experts(
            found.share, found.significant, trace.class_names,
            layer_name=name, excess=found.excess, threshold=found.threshold, kind=layer.kind,
        )  # fmt: skip
        yield Drawn("class_experts", f"class_experts_{name}.png", f"{name}: which classes use which expert", figure)
    share = position_share(index, layer.num_experts, layer.wanted)
    figure = plots.plot_positions(share, trace.grid, layer_name=name, kind=layer.kind)
    yield Drawn("positions", f"positions_{name}.png", f"{name}: where in the image each expert works", figure)
    if results.parts is not None:
        table = part_expert_table(index, results.parts, layer.num_experts, layer.wanted)
        figure = plots.plot_part_experts(table, pictures.part_names, layer_name=name, kind=layer.kind)
        yield Drawn("parts", f"parts_{name}.png", f"{name}: which parts go to which expert", figure)
    figure = plots.plot_gallery(pictures, trace, layer.layer, seed=seed)
    yield Drawn("gallery", f"gallery_{name}.png", f"{name}: what each expert gets", figure)


def _requested(trace: RoutingTrace) -> list[npt.NDArray[Any]] | None:
    """Per layer [E] choices before capacity; None where capacity dropped nothing."""
    if not any(layer.kind == "token_choice" and not np.asarray(layer.kept).all() for layer in trace.layers):
        return None
    return [
        np.bincount(np.asarray(layer.expert_index).ravel(), minlength=layer.num_experts)
        if layer.kind == "token_choice"
        else layer.counts().sum(0)
        for layer in trace.layers
    ]


def _quantiles(layer: LayerTrace) -> npt.NDArray[np.float64]:
    kept = None if layer.kind == "token_choice" else np.asarray(layer.kept)
    return gate_weight_quantiles(np.asarray(layer.combine_weight), kept=kept)


def _effects_figure(trace: RoutingTrace, effects: Mapping[str, Any]) -> Figure:
    deltas: list[npt.NDArray[np.float64]] = []
    controls: list[npt.NDArray[np.float64]] = []
    for layer in trace.layers:
        rows = [row for row in effects["rows"] if row["layer"] == layer.layer]
        for name, tables in (("delta_logit", deltas), ("control_delta_logit", controls)):
            by_expert = [[row[name] for row in rows if row["expert"] == e] for e in range(layer.num_experts)]
            tables.append(np.array(by_expert))
    names = [layer.name for layer in trace.layers]
    classes = list(dict.fromkeys(row["class"] for row in effects["rows"]))
    return plots.plot_effects(deltas, controls, names, classes, what=effects["what"])


class Caption(NamedTuple):
    """What stands below a figure.

    Attributes:
        read: how to read it.
        not_shown: what a reader might see in it that is not there.
    """

    read: str
    not_shown: str


CAPTIONS: Final = {
    "comparisons": Caption(
        "One row per MoE layer. Blue line: the interval of what the chosen expert tells about the image, in bits above "
        "chance. Grey band: what chance alone gives. Marks below: what the same images give without anything learned. "
        "Hollow marks: other trainings of the same recipe. A layer counts as specialized only right of them all.",
        "Whether the experts are needed: that is asked by taking them away, further down. Panels have their own "
        "scales.",
    ),
    "load": Caption(
        "One bar per expert: its share of all choices. Dashed line: equal load. Slowest ÷ mean says how long the "
        "others wait for the busiest expert when they work in parallel.",
        "What an expert is for. A busy expert need not matter, and balanced experts need not differ.",
    ),
    "experts_per_patch": Caption(
        "Share of the patches that 0, 1, 2, ... experts compute. A patch that no expert computes passes the layer by "
        "the residual path alone.",
        "Whether those patches are unimportant: the router left them out, or an expert was full.",
    ),
    "gate_weights": Caption(
        "How much of a patch's output comes from its first, second, ... choice, per layer.",
        "How large an expert's output is: a small weight on a large output can matter more than it looks.",
    ),
    "co_activation": Caption(
        "Row: of the patches that chose this expert, the share that also chose the expert of the column. Coloured "
        "where that is more (blue) or less (brown) than the loads alone would give.",
        "How much of the pattern chance could give: nothing is tested here.",
    ),
    "overlay": Caption(
        "Each patch shows its first choice by number and colour; the stronger the colour, the larger its gate weight.",
        "What the expert looked at. A patch of a deep layer carries context from the whole image through attention, "
        "and colours of two layers are unrelated.",
    ),
    "path": Caption(
        "One patch through the MoE layers: its chosen experts, joined by a thick line (first choice) and thin ones.",
        "Everything else that happens to the patch on its way: attention and the residual path pass experts by.",
    ),
    "certainty": Caption(
        "Dark entropy: the router is undecided. Dark margin: the best expert is far ahead of the second.",
        "Whether the choice was good. A sure router may be sure because it has collapsed.",
    ),
    "class_experts": Caption(
        "Row: a class; cells: the share of its choices that goes to each expert. Only cells that differ from the mean "
        "class by more than chance gives in any cell of the map are coloured.",
        "Why. Colour, texture and position differ between classes too, and a coloured cell may be nothing but those: "
        "compare with the baselines above.",
    ),
    "positions": Caption(
        "One small map of the image per expert: the share of the choices made at each place that falls on it.",
        "Preference for a place as such. Where images have a subject in the middle, place and content go together.",
    ),
    "parts": Caption(
        "Row: a part of the drawing, known exactly because the image is drawn; cells: where its area goes.",
        "A test of single cells. Whether parts are told apart at all, and more than by the baselines, stands in the "
        "table of the verdict.",
    ),
    "gallery": Caption(
        "One row per expert. Left: the patches (framed, with their surroundings) with its largest weights, one "
        "per image at most. Right: patches of the same expert drawn at random.",
        "What is typical, on the left: those patches are the best of thousands. Trust what both sides share.",
    ),
    "effects": Caption(
        "Large mark: how the logit of the true class changes, on average, when one expert is taken away and its "
        "patches go to their next-best expert; small marks: the same for each class. Grey: as many choices of the "
        "same layer, drawn at random from all experts, are moved instead.",
        "What the expert does together with others: several may stand in for one another, and all of them together can "
        "matter where none does alone.",
    ),
}
"""Kind of figure -> its caption, of a model in which tokens choose their experts."""

_EXPERTS_CHOOSE: Final = {
    "comparisons": "Where experts choose, all take as many patches of every image; so the class is asked of how much "
    "patches take from each expert (gate weights), place and part of which expert takes a patch.",
    "load": "Where experts choose, loads are equal by construction; small differences are class tokens, which are not "
    "shown.",
    "gate_weights": "Where experts choose: the 1st, 2nd, ... largest weight of the patches that have so many experts.",
    "co_activation": "Where experts choose: the experts that took the same patch.",
    "overlay": "Where experts choose, a patch may have no expert (a dot) or several, of which the one with the largest "
    "weight is shown.",
    "path": "Where experts choose: the experts that took the patch.",
    "class_experts": "Where experts choose, cells are shares of gate weights: all experts take as many patches of "
    "every image.",
    "positions": "Where experts choose: of all choices of a place, the share that each expert has.",
    "effects": "Where experts choose, the patches of the expert lose it and no other takes its place; grey: as many "
    "choices are taken away.",
}
_SOFT: Final = {
    "comparisons": "Soft MoE: the class is asked of how much patches take from each expert, place and part of how much "
    "the experts read of a patch. Hashes and clusters are softened until they are as undecided as the layer.",
    "load": "Soft MoE: every expert computes as many slots; bars show how much of the patches' output comes from each.",
    "gate_weights": "Soft MoE: the 1st, 2nd, ... largest of the weights that a patch gives to all experts.",
    "overlay": "Soft MoE: the expert that the patch takes most from; every other one contributes too.",
    "path": "Soft MoE: all experts contribute, a large disc much; the line joins the largest.",
    "class_experts": "Soft MoE: cells are shares of the weight that patches take from the experts.",
    "positions": "Soft MoE: of all that is read at a place, the share that each expert reads.",
    "parts": "Soft MoE: what the experts read of each part.",
    "gallery": "Soft MoE: an expert reads something of every patch. Left: those that it reads most; right: drawn in "
    "proportion to what it reads.",
    "effects": "Soft MoE: the expert's weight is shared out among the others; grey: as many weights of single patches "
    "and experts, drawn at random, are.",
}


def caption(figure: str, kinds: Iterable[RoutingKind]) -> Caption:
    """What stands below a figure of a model whose layers are of these kinds.

    Args:
        figure: kind of figure.
        kinds: who chooses, of each layer.
    """
    read, not_shown = CAPTIONS[figure]
    added = [
        words[figure]
        for kind, words in (("expert_choice", _EXPERTS_CHOOSE), ("soft", _SOFT))
        if kind in set(kinds) and figure in words
    ]
    return Caption(" ".join([read, *added]), not_shown)
