"""Colours of experts, which figures (`plots/style.py`) and the explorer share.

The first seven colours are Okabe & Ito's, "Color Universal Design" (2008), told apart under every common colour
vision, with the values of matplotlib's `color_sequences["okabe_ito"]` (plain constants, so that the explorer needs no
matplotlib). The eighth is the grey of Tol's "bright" scheme (SRON technical note, 2021) instead of their black. No
palette of more than about eight colours is safe: beyond that an expert is a number on grey, and one expert at a time is
highlighted. A colour never stands alone, the number is always with it; and equal numbers in two layers are two
unrelated experts.
"""

from __future__ import annotations

from typing import Final

EXPERT_COLOURS: Final = (
    "#0072B2",  # blue
    "#D55E00",  # vermillion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#F0E442",  # yellow
    "#BBBBBB",  # light grey, in place of black, which can't be seen on dark fur and in dark mode
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
