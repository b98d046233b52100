"""The polygons that `SyntheticPets` is drawn with: what they mean, how they are coloured, simple outlines.

A `Shape` is one filled polygon. It carries

- a **slot**, the place of its colour in the palette of one picture (never a colour: the palette is drawn from
  the same distribution for all animals, so that colour says nothing about the class),
- a **part**, its meaning in the ground-truth mask,
- a **group**, which moves as one when a picture varies the pose (an ear tilts, the eyes come closer).

Face coordinates: the head is about 1 in radius around (0, 0); x points right, y points down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Pairs = Sequence[tuple[float, float]]

PARTS: Final = (
    "background", "occluder", "body", "fur", "ear", "eye", "nose", "muzzle", "mouth", "whisker",
)  # fmt: skip
"""Meaning of each value of a part mask. An owl's beak counts as nose, a pig's snout disc as muzzle."""


class Slot(IntEnum):
    """Places in the palette of one picture."""

    SCENERY = 0
    CLUTTER = 1  # 1 .. 8: one colour for each background object
    OCCLUDER = 9  # 9 .. 11: one colour for each object in front
    BODY = 12
    FUR = 13
    SHADE = 14
    LIGHT = 15
    RIM = 16
    INNER = 17
    IRIS = 18
    PUPIL = 19
    GLINT = 20
    NOSE = 21
    DARK = 22
    TONGUE = 23
    WHISKER = 24


class Group(IntEnum):
    """Shapes that move as one."""

    BODY = 0
    HEAD = 1
    LEFT_EAR = 2
    RIGHT_EAR = 3
    EYES = 4
    MUZZLE = 5


@dataclass(frozen=True)
class Shape:
    """One filled polygon: vertices [n, 2] in face coordinates."""

    slot: Slot
    part: str
    group: Group
    points: Points


def region_id(slot: int, part: str) -> int:
    """The pixel value that stands for a slot and a part together: `slot * len(PARTS) + part`, at most 255."""
    return slot * len(PARTS) + PARTS.index(part)


def ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Points:
    """A 24-gon of an ellipse around (x, y), turned by `tilt` radians."""
    angle = np.linspace(0.0, 2.0 * np.pi, 24, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    return np.stack([x + u * np.cos(tilt) - v * np.sin(tilt), y + u * np.sin(tilt) + v * np.cos(tilt)], axis=1)


def smooth(points: Pairs | Points, steps: int = 4) -> Points:
    """A closed Catmull-Rom curve through the points, `steps` vertices between neighbours."""
    p = np.asarray(points, dtype=np.float64)
    before, after, beyond = np.roll(p, 1, axis=0), np.roll(p, -1, axis=0), np.roll(p, -2, axis=0)
    t = (np.arange(steps) / steps)[None, :, None]
    p, before, after, beyond = (q[:, None, :] for q in (p, before, after, beyond))
    curve = 0.5 * (
        2 * p
        + (after - before) * t
        + (2 * before - 5 * p + 4 * after - beyond) * t**2
        + (3 * p - before - 3 * after + beyond) * t**3
    )
    return np.asarray(curve.reshape(-1, 2))


def symmetric(right_half: Pairs, steps: int = 4) -> Points:
    """A smooth outline from its right half, top to bottom; points with x = 0 are not doubled."""
    left = [(-x, y) for x, y in reversed(right_half) if x > 0]
    return smooth([*right_half, *left], steps)


def mirrored(points: Points) -> Points:
    """The same shape on the other side of the face."""
    return points * (-1.0, 1.0)


def grown(points: Points, margin: float) -> Points:
    """The shape enlarged about its middle by a margin on every side."""
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    half = (points.max(axis=0) - points.min(axis=0)) / 2
    return np.asarray(middle + (points - middle) * (1 + margin / half))


def stroke(x0: float, y0: float, x1: float, y1: float, width: float) -> Points:
    """A straight line of some width as a quadrilateral."""
    along = np.array([x1 - x0, y1 - y0])
    side = np.array([-along[1], along[0]]) * (width / 2 / np.hypot(*along))
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.stack([start - side, end - side, end + side, start + side])
