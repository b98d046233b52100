"""Interventions and their controls in words, as parts of a sentence; they depend on who chooses in the layer."""

from __future__ import annotations

from moevision.analysis.change import Fill, Intervention
from moevision.layers.routing import Kind as RoutingKind


def in_words(intervention: Intervention, moved: int, routing: RoutingKind = "token_choice") -> str:
    """What was changed, as the start of a sentence.

    Args:
        intervention: the change.
        moved: patch assignments that it takes from their experts.
        routing: who chooses in the layers that it acts on.
    """
    layer = "every MoE layer" if intervention.layer is None else f"L{intervention.layer}"
    assignments = f"{moved} patch assignment{'' if moved == 1 else 's'}"
    match intervention.kind:
        case "ablate":
            return f"without {layer}·E{intervention.expert} ({_without(intervention, moved, routing)})"
        case "force":
            return f"with every token of {layer} sent first to E{intervention.expert} ({assignments} moved)"
        case "swap":
            pair = f"E{intervention.expert} and E{intervention.other}"
            if routing == "soft":
                return f"with the slots of {pair} of {layer} swapped"
            return f"with {pair} of {layer} swapped ({assignments} moved)"
        case "random" if routing == "soft":
            return f"with the slots of {layer} dealt out to its experts at random (seed {intervention.seed})"
        case "random" if routing == "expert_choice":
            return f"with random patches for the experts of {layer} (seed {intervention.seed}, {assignments} moved)"
        case "random":
            return f"with random routing in {layer} (seed {intervention.seed}, {assignments} moved)"
        case "top_k":
            return f"with k = {intervention.top_k} in {layer} ({assignments} dropped)"
        case "capacity":
            return f"with capacity factor {intervention.factor:g} in {layer} ({assignments} dropped)"


def _without(intervention: Intervention, moved: int, routing: RoutingKind) -> str:
    """What an ablated expert's patches get."""
    patches = f"{moved} patch{'' if moved == 1 else 'es'}"
    if intervention.fill == "zero":
        return f"its output set to zero for {patches}"
    if routing == "soft":
        return f"its weight in {patches} shared out among the other experts"
    if routing == "expert_choice":
        return f"{patches} {'loses' if moved == 1 else 'lose'} it, and no expert takes its place"
    return f"{patches} {'goes to its' if moved == 1 else 'go to their'} next-best expert"


def control_in_words(intervention: Intervention, moved: int, routing: RoutingKind = "token_choice") -> str:
    """What the control does, with its fill."""
    layer = "every MoE layer" if intervention.layer is None else f"L{intervention.layer}"
    assignments = f"{moved} random patch assignment{'' if moved == 1 else 's'} of {layer}"
    if control_fill(intervention) == "zero":
        return f"setting {assignments} to zero"
    if routing == "soft":
        return f"taking {assignments} away and sharing out their weight among the other experts"
    if routing == "expert_choice":
        return f"taking {assignments} away"
    return f"moving {assignments} to the next-best expert"


def control_fill(intervention: Intervention) -> Fill:
    """The control takes away as the intervention does: what is dropped is dropped there, what is moved is moved."""
    drops = intervention.kind in ("top_k", "capacity")
    return "zero" if drops else intervention.fill
