"""What the report says in fixed words: how to read each figure, what it does not show, what a term means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from moevision.layers.routing import Kind as RoutingKind


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
        "One row per MoE layer. The blue line is the interval of what the chosen expert tells about the picture, in "
        "bits and with chance taken off; the grey band is what chance alone gives. The marks below are what the same "
        "pictures give without anything learned, the hollow marks other trainings of the same recipe. A layer counts "
        "as specialized only where it lies to the right of them all.",
        "Whether the experts are needed: that is asked by taking them away, further down. Panels have their own "
        "scales.",
    ),
    "load": Caption(
        "One bar per expert: its share of all choices. The dashed line is equal load. Slowest ÷ mean says how long the "
        "others wait for the busiest expert when they work in parallel.",
        "What an expert is for. A busy expert need not matter, and balanced experts need not differ.",
    ),
    "experts_per_patch": Caption(
        "Share of the patches that 0, 1, 2, ... experts compute. One that no expert computes passes the layer by the "
        "residual path alone.",
        "Whether those patches are unimportant: the router left them out, or an expert was full.",
    ),
    "gate_weights": Caption(
        "How much of a patch's output its first, second, ... choice makes up, per layer.",
        "How large an expert's output is: a small weight on a large output can matter more than it looks.",
    ),
    "co_activation": Caption(
        "Row: of the patches that chose this expert, the share that also chose the expert of the column. Coloured "
        "where that is more (blue) or less (brown) than the loads alone would give.",
        "A test: nothing here says how much of the pattern chance could give.",
    ),
    "overlay": Caption(
        "Each patch shows its first choice by number and colour; the stronger the colour, the larger its gate weight.",
        "What the expert looked at. A patch of a deep layer carries context from the whole picture through attention, "
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
        "One small map of the picture per expert: the share of the choices made at each place that falls on it.",
        "Preference for a place as such. Where pictures have a subject in the middle, place and content go together.",
    ),
    "parts": Caption(
        "Row: a part of the drawing, known exactly because the picture is drawn; cells: where its area goes.",
        "A test of single cells. Whether parts are told apart at all, and more than by the baselines, stands in the "
        "table of the verdict.",
    ),
    "gallery": Caption(
        "One row per expert. Left: the patches (framed, with their surroundings) with its largest weights, one "
        "per picture at most. Right: patches of the same expert drawn at random.",
        "What is typical, on the left: those are the best of thousands. Trust what both sides share.",
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
    "comparisons": "Where experts choose, all take as many patches of every picture; so the class is asked of how much "
    "patches take from each expert (gate weights), place and part of which expert takes a patch.",
    "load": "Where experts choose, loads are equal by construction; small differences are class tokens, which are not "
    "shown.",
    "gate_weights": "Where experts choose: the 1st, 2nd, ... largest weight of the patches that have so many experts.",
    "co_activation": "Where experts choose: the experts that took the same patch.",
    "overlay": "Where experts choose, a patch may have no expert (a dot) or several, of which the one with the largest "
    "weight is shown.",
    "path": "Where experts choose: the experts that took the patch.",
    "class_experts": "Where experts choose, cells are shares of gate weights: all experts take as many patches of "
    "every picture.",
    "positions": "Where experts choose: of all takings of a place, the share that each expert has.",
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
    "positions": "Soft MoE: of all reading that is done at a place, the share that each expert does.",
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


ABOUT: Final = {
    "class": "class",
    "class_given_position": "class at a place",
    "position": "place",
    "part": "part",
}
"""What the experts are asked about -> as the name of a row."""

BASELINE_COLUMNS: Final = {
    "untrained": "untrained",
    "hash": "hash of pixels",
    "hash_position": "hash of place",
    "kmeans_colour": "colour clusters",
    "kmeans_input": "input clusters",
}
"""Comparison, as `measure_baselines` names it -> heading of its column."""

COMPARISONS_TEXT: Final = (
    "Patches of one picture belong together, so all chance levels come from shuffling whole pictures. Standing above "
    "that chance is easy: a router that was never trained sorts patches by colour, and colour differs between classes. "
    "So every number is set beside the same architecture untrained, beside routing by a hash and by clusters of the "
    "patch's colour and of the layer's own input, and beside other trainings. Learned specialization is claimed only "
    "above all of them."
)

EFFECTS_TEXT: Final = (
    "A pattern in the routing does not say that it matters. So every expert is taken away, one at a time, and the "
    "logit of the true class is followed on pictures of every class. Beside it stands its control: as many choices of"
    " the same layer, drawn at random from all experts, are treated alike. An expert that changes no more than its "
    "control is not needed by itself."
)

STABLE_TEXT: Final = (
    "A pattern that changes when the picture is mirrored, or with the seed of the training, is not about the picture. "
    "Agreement is corrected for chance (Cohen's κ): 0 is what the loads alone give, 1 is the same expert everywhere."
)

SIMILARITY_TEXT: Final = (
    "Whether experts compute different things, asked on the same tokens: linear CKA of their outputs, 1 for outputs "
    "that are equal up to rotation and scale. Experts that get different patches can still compute the same."
)

LIMITS: Final = (
    "Routing shows where a patch was computed, not why the model answers as it does. Attention mixes patches before "
    "every MoE layer, so a patch of a deep layer carries context from the whole picture; the residual path carries "
    "information past all experts.",
    "Expert numbers are labels without an order. L1·E3 and L3·E3 have nothing in common, and neither have the experts "
    "of two trainings until they are matched.",
    "Load, entropy and margin describe the health of a router. None of them says what an expert is for or whether it "
    "is needed; only taking it away does, and only for the way in which it was taken away.",
    "Everything here is about these pictures. Other pictures, and another training of the same recipe, can give "
    "another picture; the intervals cover the first and not the second.",
)
