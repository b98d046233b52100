"""The figures of the report, drawn one after the other and described for readers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from moevision.analysis import plots
from moevision.analysis.describe import co_activation, gate_weight_quantiles, part_expert_table, position_share
from moevision.analysis.plots.charts import plot_effects
from moevision.analysis.report.numbers import kept_of
from moevision.analysis.report.text import caption
from moevision.layers.routing import Kind as RoutingKind

if TYPE_CHECKING:
    from moevision.analysis.classes import ClassExpertMap
    from moevision.analysis.images import PictureSet
    from moevision.analysis.specialization import LayerSpecialization
    from moevision.analysis.trace import LayerTrace, RoutingTrace

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


class Material(NamedTuple):
    """What is drawn; what was not computed is empty or None.

    Attributes:
        trace: the routing of `pictures`.
        pictures: in the order of the trace.
        information: specialization of each layer.
        maps: block index -> class x expert map.
        parts: [I, P, parts] share of each patch that belongs to each part.
        effects: rows `layer`, `expert`, `class`, `delta_logit`, `control_delta_logit`.
        effects_what: what was done to measure them, in words.
        seed: of the pictures and patches that are drawn at random.
    """

    trace: RoutingTrace
    pictures: PictureSet
    information: Sequence[LayerSpecialization]
    maps: Mapping[int, ClassExpertMap]
    parts: npt.NDArray[np.float32] | None
    effects: Sequence[Mapping[str, Any]]
    effects_what: str
    seed: int


def draw_figures(material: Material) -> Iterator[Drawn]:
    """All figures, in the order of the report."""
    trace = material.trace
    names = [layer.name for layer in trace.layers]
    if material.information:
        title = "What the experts tell, beside everything it must exceed"
        yield Drawn("comparisons", "specialization.png", title, plots.plot_specialization(material.information))
    yield from _draw_pictures(material)
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
        yield from _draw_layer(material, layer)
    if material.effects:
        yield Drawn("effects", "effects.png", "Without one expert", _effects_figure(material))


def shown_pictures(trace: RoutingTrace, seed: int, count: int = _PICTURES_SHOWN) -> list[int]:
    """Pictures drawn at random, of different classes as long as those suffice: not chosen to look good."""
    order = np.random.default_rng(seed).permutation(len(trace))
    _, first = np.unique(trace.labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), first)
    return [int(index) for index in order[np.concatenate([np.sort(first), others])][:count]]


def _draw_pictures(material: Material) -> Iterator[Drawn]:
    trace, pictures = material.trace, material.pictures
    shown = shown_pictures(trace, material.seed)
    for place, image in enumerate(shown, start=1):
        title = f"Which expert each patch goes to, picture {place}"
        yield Drawn("overlay", f"overlay_{place}.png", title, plots.plot_overlay(pictures.image(image), trace, image))
    first, (rows, columns) = shown[0], trace.grid
    middle = rows // 2 * columns + columns // 2
    path = plots.plot_path(pictures.image(first), trace, first, middle)
    yield Drawn("path", "path.png", "The path of one patch, picture 1", path)
    certainty = plots.plot_certainty(pictures.image(first), trace, first)
    yield Drawn("certainty", "certainty.png", "How sure the router is, picture 1", certainty)


def _draw_layer(material: Material, layer: LayerTrace) -> Iterator[Drawn]:
    trace, name, index = material.trace, layer.name, np.asarray(layer.expert_index)
    if layer.top_k > 1 and layer.kind != "soft":
        counts, chooses = co_activation(index, layer.num_experts, kept_of(layer)), layer.kind == "token_choice"
        figure = plots.plot_co_activation(counts, layer.top_k if chooses else None, layer_name=name)
        yield Drawn("co_activation", f"co_activation_{name}.png", f"{name}: experts chosen together", figure)
    if layer.layer in material.maps:
        found = material.maps[layer.layer]
        figure = plots.plot_class_experts(
            found.share, found.significant, trace.class_names,
            layer_name=name, excess=found.excess, threshold=found.threshold, kind=layer.kind,
        )  # fmt: skip
        yield Drawn("class_experts", f"class_experts_{name}.png", f"{name}: which classes use which expert", figure)
    share = position_share(index, layer.num_experts, layer.wanted)
    figure = plots.plot_positions(share, trace.grid, layer_name=name, kind=layer.kind)
    yield Drawn("positions", f"positions_{name}.png", f"{name}: where in the picture each expert works", figure)
    if material.parts is not None:
        table = part_expert_table(index, material.parts, layer.num_experts, layer.wanted)
        figure = plots.plot_part_experts(table, material.pictures.part_names, layer_name=name, kind=layer.kind)
        yield Drawn("parts", f"parts_{name}.png", f"{name}: which parts go to which expert", figure)
    figure = plots.plot_gallery(material.pictures, trace, layer.layer, seed=material.seed)
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


def _effects_figure(material: Material) -> Figure:
    deltas: list[npt.NDArray[np.float64]] = []
    controls: list[npt.NDArray[np.float64]] = []
    for layer in material.trace.layers:
        rows = [row for row in material.effects if row["layer"] == layer.layer]
        for name, tables in (("delta_logit", deltas), ("control_delta_logit", controls)):
            by_expert = [[row[name] for row in rows if row["expert"] == e] for e in range(layer.num_experts)]
            tables.append(np.array(by_expert))
    names = [layer.name for layer in material.trace.layers]
    classes = list(dict.fromkeys(row["class"] for row in material.effects))
    return plot_effects(deltas, controls, names, classes, what=material.effects_what)
