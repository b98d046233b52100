"""What the page of `data score` and the explorer share: lists that rank training images by one score, and their ids.

Axes: m training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moevision.data.scores import Floats, Ints
from moevision.names import csv_name


@dataclass(frozen=True)
class ScoreList:
    """One of these lists.

    Attributes:
        key: its name in addresses.
        name: in two words.
        title: what it is called.
        about: what it is ranked by, and what it does not show.
        score: the score, one of `data.scores.SCORES`.
        highest: whether the highest comes first; else the lowest.
        words: the format of a score, in words.
    """

    key: str
    name: str
    title: str
    about: str
    score: str
    highest: bool
    words: str

    def first(self, scores: Mapping[str, Floats], count: int, among: npt.NDArray[np.bool_] | None = None) -> Ints:
        """At most `count` rows of `scores`, score -> [m], in order; images without the score are in no list."""
        values = scores[self.score]
        return lowest(-values if self.highest else values, count, among)

    def value(self, scores: Mapping[str, Floats], row: int) -> str:
        """What is said of one image."""
        return self.words.format(scores[self.score][row]).replace("-", "\N{MINUS SIGN}")


SCORE_LISTS: Final = {
    one.key: one
    for one in (
        ScoreList(
            "doubtful", "Doubtful labels", "Other images speak against the label",
            "Lowest area under the margin: the logit of the label less the largest other one, mean over the training. "
            "Wrong labels come first, and with them rare and ambiguous images.",
            "aum", False, "margin {:.2f}",
        ),
        ScoreList(
            "hardest", "Hardest", "Hardest",
            "Highest EL2N: how far the probabilities were from the label, mean over the training.",
            "el2n", True, "EL2N {:.2f}",
        ),
        ScoreList(
            "unsteady", "Most unsteady", "Most unsteady",
            "Largest spread of the label's probability over the training: learned and lost again.",
            "p_std", True, "spread {:.2f}",
        ),
        ScoreList(
            "easiest", "Easiest", "Easiest",
            "Lowest EL2N. Many alike easy images teach little more than some of them.",
            "el2n", False, "EL2N {:.2g}",
        ),
    )
}  # fmt: skip


def lowest(values: npt.NDArray[Any], count: int, among: npt.NDArray[np.bool_] | None = None) -> Ints:
    """Rows of the lowest finite values [m], lowest first; of equal ones the first."""
    rows = np.flatnonzero(np.isfinite(values) if among is None else among & np.isfinite(values))
    near = rows[np.argpartition(values[rows], count - 1)[:count]] if len(rows) > count else rows
    return near[np.lexsort((near, values[near]))]


def image_id(split: str, name: str) -> str:
    """By what the explorer knows an image of a run; `name` is its sample id, or that as a file of the run has it."""
    return f"{split}/{csv_name(name)}"
