"""What can be asked of a router beyond the number of experts and of choices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from moevision.errors import UserError

Noise = Literal["learned", "fixed", "jitter", "none"]
Group = Literal["image", "batch"]


@dataclass(kw_only=True)
class RouterOptions:
    """Options of a router; None is the router's own choice. A router refuses those that it has no use for.

    Args:
        noise: noise of the choice in training: `learned` per token (Shazeer), `fixed` (σ = 1/E, V-MoE), `jitter`
            (input times U(0.99, 1.01), Switch) or `none`.
        normalize_gates: a token's gates sum to 1. With one expert the gate is then 1 and keeps the gradient of the
            probability (straight-through).
        capacity_factor: in training an expert computes at most this times its fair share; None computes everything.
        eval_capacity_factor: the same in evaluation.
        batch_priority: over capacity, keep the tokens with the largest gates instead of the first ones.
        capacity_group: what shares a capacity: one `image`, or the `batch` (predictions then depend on batch-mates).
        bias_rate: γ, the step of `bias_balanced`'s bias.
        slots_per_expert: P of `soft`; by default K · tokens / E in a model.

    Raises:
        UserError: for a value that is out of range.
    """

    noise: Noise | None = None
    normalize_gates: bool | None = None
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    batch_priority: bool | None = None
    capacity_group: Group | None = None
    bias_rate: float | None = None
    slots_per_expert: int | None = None

    def __post_init__(self) -> None:
        _check_choice("noise", self.noise, get_args(Noise))
        _check_choice("capacity_group", self.capacity_group, get_args(Group))
        for name in ("capacity_factor", "eval_capacity_factor", "bias_rate", "slots_per_expert"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={value} is too small: it must be greater than 0.")
        if self.capacity_factor is None and self.eval_capacity_factor is None:
            idle = [name for name in ("batch_priority", "capacity_group") if getattr(self, name) is not None]
            if idle:
                raise UserError(f"{idle[0]} does nothing without a capacity: set capacity_factor, such as 1.25.")

    def given(self) -> dict[str, Any]:
        """The options that were set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def only(self, router: str, useful: Iterable[str]) -> RouterOptions:
        """Raise a UserError if an option is set that `router` has no use for; else the options themselves."""
        useless = sorted(self.given().keys() - set(useful))
        if useless:
            raise UserError(f"The router {router!r} has no use for {', '.join(useless)}: leave it out.")
        return self


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise UserError(f"There is no {name} {value!r}: choose one of {', '.join(choices)}.")
