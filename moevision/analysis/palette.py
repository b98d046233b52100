"""Colours of experts, and the ink in which a number on such a colour can be read.

The eight colours are Okabe & Ito's, "Color Universal Design" (2008), told apart under every common colour vision,
with the values of matplotlib's `color_sequences["okabe_ito"]` (plain constants, so that the explorer needs no
matplotlib). No palette of more than about eight colours is safe: beyond that an expert is a number on grey, and one
expert at a time is highlighted. A colour never stands alone, the number is always with it; and equal numbers in two
layers are two unrelated experts.

Contrast is WCAG 2.2's: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio.
"""

from __future__ import annotations

from typing import Final

from moevision.errors import UserError

EXPERT_COLOURS: Final = (
    "#0072B2",  # blue
    "#D55E00",  # vermillion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#F0E442",  # yellow
    "#000000",  # black, last: it is the one that dark parts of an image can be taken for
)
"""Colour of expert 0, 1, ... in a layer of up to eight experts."""

NEUTRAL: Final = "#C9CDD2"
"""Every expert of a layer with more than eight, but for the highlighted one."""

FADED: Final = "#E6E8EB"
"""The experts that aren't highlighted while one is."""

HIGHLIGHT: Final = "#0072B2"
"""The highlighted expert of a layer with more than eight."""

BLACK: Final = "#000000"
WHITE: Final = "#FFFFFF"


def expert_colour(expert: int, num_experts: int, highlight: int | None = None) -> str:
    """The colour of one expert's cells, bars and chips, as `#RRGGBB`.

    Args:
        expert: index in 0..num_experts - 1.
        num_experts: E of the layer; it decides between a palette and numbers on grey.
        highlight: the one expert to show; all others fade.

    Raises:
        UserError: an expert that the layer doesn't have.
    """
    for index in (expert,) if highlight is None else (expert, highlight):
        if not 0 <= index < num_experts:
            raise UserError(f"There is no expert {index}: the layer has experts 0 to {num_experts - 1}.")
    if highlight is not None and expert != highlight:
        return FADED
    if num_experts <= len(EXPERT_COLOURS):
        return EXPERT_COLOURS[expert]
    return HIGHLIGHT if expert == highlight else NEUTRAL


def expert_colours(num_experts: int, highlight: int | None = None) -> list[str]:
    """[E] colours of a layer's experts, in order."""
    return [expert_colour(expert, num_experts, highlight) for expert in range(num_experts)]


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on `colour` (`#RRGGBB`).

    The better of the two always has a contrast of at least √21 ≈ 4.58, more than the 4.5 of WCAG's level AA.
    """
    return max(WHITE, BLACK, key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two colours (`#RRGGBB`), from 1 (equal) to 21 (black on white)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """WCAG relative luminance of `#RRGGBB`, from 0 (black) to 1 (white)."""
    red, green, blue = (_linear(int(colour[start : start + 2], 16) / 255) for start in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(channel: float) -> float:
    """An sRGB channel in [0, 1] with its gamma undone."""
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
