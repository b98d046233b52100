"""The card of a bundled model: what it is, what it was trained on, how good it is, under which licence.

`card.json` stands in the model's folder beside `trained/`, `unbalanced/` and `dense/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moevision.demo.typical import Typical
from moevision.errors import UserError
from moevision.models.safe_files import read_json


@dataclass(frozen=True)
class Card:
    """What people should know about a model before they believe it.

    Attributes:
        id: its name in addresses.
        title: its name in words.
        subtitle: one line under the title.
        data: the training data, in words.
        recipe: the command or config that trained it.
        seed: of that training; None if unknown.
        accuracy: test accuracy of `moe`, `dense` and `unbalanced`, from 0 to 1; missing if not measured.
        test_images: number of pictures that the accuracy was measured on; None if unknown.
        recipes: the commands that trained each variant, the dense twin among them.
        note: what the commands don't say about the training.
        validation_top1: of the trained model after each epoch.
        licence: of the weights.
        data_kind: name of the dataset as `--data` takes it; empty if unknown.
        typical: what pictures of the training data look like to the model; None if not measured.
    """

    id: str
    title: str
    subtitle: str = ""
    data: str = ""
    recipe: str = ""
    seed: int | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    test_images: int | None = None
    recipes: dict[str, str] = field(default_factory=dict)
    note: str = ""
    validation_top1: list[float] = field(default_factory=list)
    licence: str = ""
    data_kind: str = ""
    typical: Typical | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, without the numbers of `typical`."""
        return {name: value for name, value in self.__dict__.items() if name != "typical"}

    def accuracy_text(self, variant: str) -> str:
        """As in "97.5 % of test pictures right (dense twin: 97.1 %)"."""
        if variant == "untrained":
            return "not trained: its weights are random, so its predictions mean nothing"
        known = self.accuracy.get("moe" if variant == "trained" else variant)
        right = "accuracy not known" if known is None else f"{_percent(known)} of test pictures right"
        if variant == "unbalanced":
            return f"{right}, trained without the balance loss"
        twin = f" (dense twin: {_percent(self.accuracy['dense'])})" if "dense" in self.accuracy else ""
        return right + twin


def read_card(file: Path) -> Card:
    """Read a card.json.

    Raises:
        UserError: if it isn't one.
    """
    try:
        given = read_json(file)
        typical = given.pop("typical", None)
        _check_types(given)
        return Card(**given, typical=None if typical is None else Typical.from_json(typical))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{file} is no model card ({error}): put back the file that the package came with.") from error


def _check_types(given: dict[str, Any]) -> None:
    """Raise a TypeError where a field of a card isn't of its kind; unknown ones are the constructor's to refuse."""
    for name, value in given.items():
        if name in ("seed", "test_images"):
            right = value is None or type(value) is int
        elif name == "validation_top1":
            right = isinstance(value, list) and all(isinstance(share, int | float) for share in value)
        elif name in ("accuracy", "recipes"):
            kind = str if name == "recipes" else int | float
            right = isinstance(value, dict) and all(isinstance(inner, kind) for inner in value.values())
        else:
            right = isinstance(value, str)
        if not right:
            raise TypeError(f"{name} has the wrong type")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
