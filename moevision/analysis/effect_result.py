"""What `effect` and `class_effect` find: the numbers, the JSON, and one sentence that says it.

Every JSON and sentence names the kind of intervention and, of an ablation, its fill.

Axes: I pictures, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from moevision.analysis.effect_words import in_words
from moevision.analysis.intervention import Intervention
from moevision.layers.routing import Kind as RoutingKind


@dataclass(frozen=True)
class Control:
    """The same number of assignments taken away at random.

    Attributes:
        what: in words, with the fill.
        delta_logits: change of the target's logit in each draw.
        delta_ps: change of its probability.
    """

    what: str
    delta_logits: tuple[float, ...]
    delta_ps: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean change of the logit."""
        return fmean(self.delta_logits)

    @property
    def sd(self) -> float:
        """Standard deviation of the change of the logit over the draws."""
        return stdev(self.delta_logits)

    def to_json(self) -> dict[str, Any]:
        """Every number."""
        return {
            "what": self.what,
            "n": len(self.delta_logits),
            "deltas": list(self.delta_logits),
            "delta_ps": list(self.delta_ps),
            "mean": self.mean,
            "sd": self.sd,
        }


@dataclass(frozen=True)
class OtherExpert:
    """The same intervention on another expert of the layer.

    Attributes:
        expert: its index.
        name: such as "L4·E3".
        delta_logit: change of the target's logit.
        delta_p: change of its probability.
    """

    expert: int
    name: str
    delta_logit: float
    delta_p: float


@dataclass(frozen=True)
class ClassEffect:
    """The effect on pictures of one class, each measured on the logit of that class.

    Attributes:
        class_name: the class.
        intervention: what was changed.
        delta_logits: [I] change of the logit, by picture.
        delta_ps: [I] change of the probability.
        control_delta_logits: [I] the same with the control, one draw for each picture.
        moved: mean number of patch assignments that the intervention takes from their experts.
        unreadable: pictures of the class that could not be read, and are not among I.
    """

    class_name: str
    intervention: Intervention
    delta_logits: tuple[float, ...]
    delta_ps: tuple[float, ...]
    control_delta_logits: tuple[float, ...]
    moved: float
    unreadable: int = 0

    def to_json(self) -> dict[str, Any]:
        """Means over pictures and their standard deviations (null for one picture)."""
        several = len(self.delta_logits) > 1
        return {
            "class": self.class_name,
            "n": len(self.delta_logits),
            "intervention": self.intervention.to_json(),
            "delta_p": fmean(self.delta_ps),
            "delta_logit": fmean(self.delta_logits),
            "sd_logit": stdev(self.delta_logits) if several else None,
            "control_delta_logit": fmean(self.control_delta_logits),
            "control_sd_logit": stdev(self.control_delta_logits) if several else None,
            "moved": self.moved,
            "unreadable": self.unreadable,
        }


@dataclass(frozen=True)
class Effect:
    """The effect on one picture.

    Attributes:
        intervention: what was changed.
        class_names: [C].
        target: index of the class that the changes below are about.
        before_logits: [C].
        after_logits: [C].
        moved: patch assignments that the intervention takes from their experts, in the layers that it acts on.
        moved_prefix: the same of class and register tokens.
        control: the same number taken away at random.
        others: the same on every other expert of the layer; empty unless an expert was ablated or forced.
        class_effect: the effect on a whole class, if it was asked for.
        routing: who chooses in the layers that it acts on.
    """

    intervention: Intervention
    class_names: tuple[str, ...]
    target: int
    before_logits: tuple[float, ...]
    after_logits: tuple[float, ...]
    moved: int
    moved_prefix: int
    control: Control
    others: tuple[OtherExpert, ...]
    class_effect: ClassEffect | None = None
    routing: RoutingKind = "token_choice"

    @property
    def before(self) -> tuple[float, ...]:
        """[C] probabilities before."""
        return _softmax(self.before_logits)

    @property
    def after(self) -> tuple[float, ...]:
        """[C] probabilities after."""
        return _softmax(self.after_logits)

    @property
    def delta_logit(self) -> float:
        """Change of the target's logit."""
        return self.after_logits[self.target] - self.before_logits[self.target]

    @property
    def delta_p(self) -> float:
        """Change of the target's probability."""
        return self.after[self.target] - self.before[self.target]

    @property
    def sentence(self) -> str:
        """All of it in one sentence that names the kind of intervention."""
        before, after = self.before[self.target], self.after[self.target]
        change = in_words(self.intervention, self.moved, self.routing)
        parts = [
            f"For this picture: {change} {self.class_names[self.target]} {_change(before, after)} "
            f"(logit {_signed(self.delta_logit)})"
        ]
        if self.moved or self.moved_prefix:
            spread = f"{_signed(self.control.mean)} ± {self.control.sd:.2f}"
            parts.append(f"{self.control.what} changes the logit by {spread} ({len(self.control.delta_logits)} draws)")
        if self.class_effect is not None:
            deltas = self.class_effect.delta_logits
            about = f"{len(deltas)} picture{'' if len(deltas) == 1 else 's'} of {self.class_effect.class_name}"
            parts.append(f"over {about} the same intervention changes it by {_signed(fmean(deltas))}")
        return "; ".join(parts) + "."

    def to_json(self) -> dict[str, Any]:
        """Every number, with the five likeliest classes before and after."""
        return {
            "schema": "moevision.effect/1",
            "intervention": self.intervention.to_json(),
            "routing": self.routing,
            "before": self._top5(self.before),
            "after": self._top5(self.after),
            "target": self.class_names[self.target],
            "delta_p": self.delta_p,
            "delta_logit": self.delta_logit,
            "moved": self.moved,
            "moved_prefix": self.moved_prefix,
            "control": self.control.to_json(),
            "others": [vars(other) for other in self.others],
            "class_effect": None if self.class_effect is None else self.class_effect.to_json(),
            "sentence": self.sentence,
        }

    def _top5(self, probabilities: Sequence[float]) -> list[dict[str, Any]]:
        best = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])[:5]
        return [{"class": self.class_names[index], "p": probabilities[index]} for index in best]


def _change(before: float, after: float) -> str:
    old, new = f"{before:.2f}", f"{after:.2f}"
    if old == new:
        return f"stays at {old}"
    return f"{'falls' if after < before else 'rises'} from {old} to {new}"


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def _softmax(logits: Sequence[float]) -> tuple[float, ...]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return tuple(power / sum(powers) for power in powers)
