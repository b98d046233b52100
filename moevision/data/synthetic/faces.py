"""The eight animal faces of `SyntheticPets`, as polygons in face coordinates, in painting order.

The classes differ in the form and the place of ears, eyes, nose, muzzle and mouth, and in nothing else. A `Shape` is
one filled polygon. It carries

- a **slot**, the place of its colour in the palette of one image (never a colour: the palette is drawn from the same
  distribution for all animals, so that colour says nothing about the class),
- a **part**, its meaning in the ground-truth mask,
- a **group**, which moves as one when an image varies the pose (an ear tilts, the eyes come closer).

Face coordinates: the head is about 1 in radius around (0, 0); x points right, y points down.

Axis legend: V vertices of all shapes of one face together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
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
    """Places in the palette of one image."""

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


@dataclass(frozen=True)
class Face:
    """A face ready for drawing.

    Attributes:
        vertices: All vertices in face coordinates, [V, 2].
        groups: The group of each vertex, [V].
        regions: The region id of each shape.
        ranges: (first, one past the last) vertex of each shape.
        center: Middle of the head with its ears, whiskers left out, [2].
        half_size: Half the longer side of the box around the same.
    """

    vertices: Points
    groups: npt.NDArray[np.intp]
    regions: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    center: Points
    half_size: float


def _rimmed(slot: Slot, part: str, group: Group, points: Points, margin: float = 0.045) -> Iterator[Shape]:
    """A shape over its own slightly larger dark rim, which sets equal colours apart as a shadow would."""
    yield Shape(Slot.RIM, part, group, grown(points, margin))
    yield Shape(slot, part, group, points)


def _ears(slot: Slot, outer: Points, inner: Points | None) -> Iterator[Shape]:
    """Both ears from the right one."""
    for group, turn in ((Group.RIGHT_EAR, lambda p: p), (Group.LEFT_EAR, mirrored)):
        yield from _rimmed(slot, "ear", group, turn(outer))
        if inner is not None:
            yield Shape(Slot.INNER, "ear", group, turn(inner))


def _both(slot: Slot, part: str, group: Group, points: Points) -> Iterator[Shape]:
    """A shape and its mirror image, in one group."""
    yield Shape(slot, part, group, points)
    yield Shape(slot, part, group, mirrored(points))


def _eyes(x: float, y: float, iris: Points, pupil: Points) -> Iterator[Shape]:
    """Both eyes from the right one's iris and pupil around (0, 0); the light falls from one side on both."""
    place = np.array([x, y])
    size = float(np.ptp(pupil, axis=0).max())
    yield from _both(Slot.RIM, "eye", Group.EYES, grown(iris, 0.04) + place)
    yield from _both(Slot.IRIS, "eye", Group.EYES, iris + place)
    yield from _both(Slot.PUPIL, "eye", Group.EYES, pupil + place)
    for side in (x, -x):
        yield Shape(Slot.GLINT, "eye", Group.EYES, ellipse(side + 0.04, y - 0.2 * size, 0.055, 0.055))


def _mouth(y: float, drop: float, width: float) -> Iterator[Shape]:
    """The line below the nose and its two curls."""
    yield Shape(Slot.DARK, "mouth", Group.MUZZLE, stroke(0, y, 0, y + drop, 0.055))
    yield from _both(Slot.DARK, "mouth", Group.MUZZLE, stroke(0, y + drop, width, y + drop - 0.09, 0.055))


def _whiskers(x: float, y: float, length: float) -> Iterator[Shape]:
    """Three whiskers on each side."""
    for rise in (-0.16, 0.0, 0.16):
        line = stroke(x, y + rise / 2, x + length, y + 1.6 * rise, 0.035)
        yield from _both(Slot.WHISKER, "whisker", Group.MUZZLE, line)


def _cat() -> Iterator[Shape]:
    """Pointed ears wide apart, slit pupils, a small nose between two puffs."""
    ear = smooth([(0.16, -0.6), (0.5, -1.05), (0.9, -1.42), (0.99, -0.85), (0.92, -0.15)])
    yield from _ears(Slot.FUR, ear, np.array([(0.42, -0.68), (0.82, -1.2), (0.82, -0.45)]))
    head = [(0.0, -0.76), (0.55, -0.7), (0.95, -0.25), (1.04, 0.22), (0.72, 0.68), (0.0, 0.86)]
    yield from _rimmed(Slot.FUR, "fur", Group.HEAD, symmetric(head))
    yield from _eyes(0.43, -0.1, ellipse(0, 0, 0.22, 0.2), ellipse(0, 0, 0.07, 0.18))
    yield from _whiskers(0.3, 0.42, 0.95)
    yield from _both(Slot.LIGHT, "muzzle", Group.MUZZLE, ellipse(0.17, 0.45, 0.23, 0.19))
    yield Shape(Slot.NOSE, "nose", Group.MUZZLE, np.array([(-0.14, 0.24), (0.14, 0.24), (0.0, 0.4)]))
    yield from _mouth(0.4, 0.12, 0.2)


def _dog() -> Iterator[Shape]:
    """Ears that hang in front of a long head, a deep muzzle with a large nose, and the tongue out."""
    head = [(0.0, -0.86), (0.55, -0.72), (0.76, -0.15), (0.64, 0.45), (0.42, 0.88), (0.0, 1.02)]
    yield from _rimmed(Slot.FUR, "fur", Group.HEAD, symmetric(head))
    ear = smooth([(0.42, -0.8), (0.85, -0.74), (1.16, -0.1), (1.2, 0.6), (0.94, 0.84), (0.74, 0.35), (0.66, -0.35)])
    yield from _ears(Slot.SHADE, ear, None)
    yield from _eyes(0.32, -0.22, ellipse(0, 0, 0.15, 0.15), ellipse(0, 0, 0.1, 0.1))
    yield Shape(Slot.TONGUE, "mouth", Group.MUZZLE, ellipse(0, 0.9, 0.17, 0.28))
    yield Shape(Slot.LIGHT, "muzzle", Group.MUZZLE, ellipse(0, 0.45, 0.45, 0.4))
    yield from _mouth(0.36, 0.24, 0.3)
    yield Shape(Slot.NOSE, "nose", Group.MUZZLE, smooth([(-0.24, 0.14), (0.24, 0.14), (0.16, 0.36), (-0.16, 0.36)]))


def _rabbit() -> Iterator[Shape]:
    """Two long upright ears, eyes at the sides, two teeth."""
    ear = smooth([(0.12, -0.5), (0.1, -1.25), (0.4, -1.98), (0.7, -1.35), (0.54, -0.45)])
    inner = smooth([(0.26, -0.75), (0.25, -1.3), (0.41, -1.74), (0.55, -1.35), (0.42, -0.7)])
    yield from _ears(Slot.FUR, ear, inner)
    head = [(0.0, -0.72), (0.48, -0.62), (0.76, -0.1), (0.78, 0.4), (0.45, 0.78), (0.0, 0.85)]
    yield from _rimmed(Slot.FUR, "fur", Group.HEAD, symmetric(head))
    yield from _eyes(0.47, -0.12, ellipse(0, 0, 0.15, 0.19), ellipse(0, 0, 0.11, 0.14))
    yield Shape(Slot.GLINT, "mouth", Group.MUZZLE, np.array([(-0.13, 0.5), (0.13, 0.5), (0.11, 0.78), (-0.11, 0.78)]))
    yield Shape(Slot.DARK, "mouth", Group.MUZZLE, stroke(0, 0.5, 0, 0.78, 0.035))
    yield from _both(Slot.LIGHT, "muzzle", Group.MUZZLE, ellipse(0.17, 0.42, 0.21, 0.18))
    yield Shape(Slot.NOSE, "nose", Group.MUZZLE, smooth([(-0.13, 0.22), (0.13, 0.22), (0.0, 0.38)]))


def _bear() -> Iterator[Shape]:
    """Small round ears on a broad round head, a round muzzle."""
    yield from _ears(Slot.FUR, ellipse(0.72, -0.72, 0.33, 0.33), ellipse(0.7, -0.7, 0.19, 0.19))
    yield from _rimmed(Slot.FUR, "fur", Group.HEAD, ellipse(0, 0, 1.02, 0.93))
    yield from _eyes(0.38, -0.18, ellipse(0, 0, 0.14, 0.14), ellipse(0, 0, 0.1, 0.1))
    yield Shape(Slot.LIGHT, "muzzle", Group.MUZZLE, ellipse(0, 0.38, 0.45, 0.37))
    yield Shape(Slot.NOSE, "nose", Group.MUZZLE, ellipse(0, 0.2, 0.2, 0.13))
    yield from _mouth(0.32, 0.16, 0.2)


def _mouse() -> Iterator[Shape]:
    """Huge round ears, a face that runs to a point with the nose at its tip."""
    yield from _ears(Slot.FUR, ellipse(0.86, -0.7, 0.6, 0.6), ellipse(0.86, -0.68, 0.43, 0.43))
    head = [(0.0, -0.66), (0.48, -0.56), (0.7, -0.05), (0.5, 0.45), (0.2, 0.86), (0.0, 0.98)]
    yield from _rimmed(Slot.FUR, "fur", Group.HEAD, symmetric(head))
    yield from _eyes(0.3, -0.06, ellipse(0, 0, 0.14, 0.15), ellipse(0, 0, 0.11, 0.12))
    yield from _whiskers(0.12, 0.68, 0.8)
    cone = [(0.0, 0.25), (0.22, 0.55), (0.16, 0.85), (0.0, 0.95)]
    yield Shape(Slot.LIGHT, "muzzle", Group.MUZZLE, symmetric(cone))
    yield Shape(Slot.NOSE, "nose", Group.MUZZLE, ellipse(0, 0.9, 0.14, 0.12))


def _fox() -> Iterator[Shape]:
    """Tall ears close together, slanted eyes, wide cheeks that run to a pointed chin."""
    ear = smooth([(0.06, -0.5), (0.3, -1.15), (0.66, -1.66), (0.86, -1.0), (0.84, -0.3)])
    yield from _ears(Slot.FUR, ear, np.array([(0.3, -0.65), (0.61, -1.35), (0.7, -0.55)]))
    head = [(0.0, -0.66), (0.55, -0.58), (0.95, -0.02), (1.2, 0.42), (0.62, 0.62), (0.24, 0.98), (0.0, 1.1)]
    yield from _rimmed(Slot.FUR, "fur", Group.HEAD, symmetric(head))
    cheek = smooth([(0.1, 0.35), (0.6, 0.2), (1.1, 0.4), (0.6, 0.56), (0.25, 0.88)])
    yield from _both(Slot.LIGHT, "muzzle", Group.HEAD, cheek)
    almond = smooth([(-0.21, 0.05), (-0.04, -0.14), (0.24, -0.1), (0.06, 0.13)])
    yield from _eyes(0.42, -0.02, almond, ellipse(0, 0, 0.09, 0.12))
    yield Shape(Slot.NOSE, "nose", Group.MUZZLE, ellipse(0, 0.96, 0.15, 0.12))


def _pig() -> Iterator[Shape]:
    """Ears that fold outward, a snout disc with two nostrils in the middle of the face."""
    yield from _rimmed(Slot.FUR, "fur", Group.HEAD, ellipse(0, 0, 0.98, 0.9))
    ear = np.array([(0.26, -0.86), (0.6, -1.08), (0.95, -1.06), (1.36, -0.5), (0.98, -0.44), (0.8, -0.4)])
    yield from _ears(Slot.SHADE, ear, np.array([(0.55, -0.84), (0.88, -0.92), (1.16, -0.6), (0.86, -0.56)]))
    yield from _eyes(0.45, -0.2, ellipse(0, 0, 0.13, 0.13), ellipse(0, 0, 0.09, 0.09))
    yield from _rimmed(Slot.LIGHT, "muzzle", Group.MUZZLE, ellipse(0, 0.24, 0.42, 0.31))
    yield from _both(Slot.NOSE, "nose", Group.MUZZLE, ellipse(0.16, 0.24, 0.09, 0.14))
    yield Shape(Slot.DARK, "mouth", Group.MUZZLE, smooth([(-0.3, 0.64), (0.3, 0.64), (0.0, 0.76)]))


def _owl() -> Iterator[Shape]:
    """Feather tufts, two face discs around very large eyes, a beak."""
    tuft = np.array([(0.3, -0.74), (1.06, -1.3), (0.98, -0.3)])
    yield from _ears(Slot.SHADE, tuft, None)
    head = [(0.0, -0.72), (0.5, -0.8), (0.94, -0.5), (1.0, 0.15), (0.68, 0.78), (0.0, 0.98)]
    yield from _rimmed(Slot.FUR, "fur", Group.HEAD, symmetric(head))
    yield from _both(Slot.LIGHT, "fur", Group.HEAD, ellipse(0.44, -0.1, 0.47, 0.5))
    yield from _eyes(0.42, -0.12, ellipse(0, 0, 0.3, 0.3), ellipse(0, 0, 0.17, 0.17))
    beak = smooth([(0.0, 0.06), (0.18, 0.24), (0.0, 0.58), (-0.18, 0.24)])
    yield Shape(Slot.NOSE, "nose", Group.MUZZLE, beak)


_FACES: Final[dict[str, Callable[[], Iterator[Shape]]]] = {
    "cat": _cat, "dog": _dog, "rabbit": _rabbit, "bear": _bear,
    "mouse": _mouse, "fox": _fox, "pig": _pig, "owl": _owl,
}  # fmt: skip
CLASSES: Final = tuple(_FACES)


@cache
def face(label: int) -> Face:
    """The face of one class, on the shoulders that all classes share."""
    shoulders = smooth([(-1.0, 3.6), (-1.05, 1.6), (-0.55, 0.75), (0.55, 0.75), (1.05, 1.6), (1.0, 3.6)])
    chest = smooth([(-0.45, 3.6), (-0.5, 1.6), (0.0, 0.8), (0.5, 1.6), (0.45, 3.6)])
    head = list(_FACES[CLASSES[label]]())
    shapes = [
        Shape(Slot.RIM, "body", Group.BODY, grown(shoulders, 0.05)),
        Shape(Slot.BODY, "body", Group.BODY, shoulders),
        Shape(Slot.LIGHT, "body", Group.BODY, chest),
        *head,
    ]
    ends = np.cumsum([len(shape.points) for shape in shapes]).tolist()
    solid = np.concatenate([shape.points for shape in head if shape.part != "whisker"])
    return Face(
        vertices=np.concatenate([shape.points for shape in shapes]),
        groups=np.concatenate([np.full(len(shape.points), shape.group, np.intp) for shape in shapes]),
        regions=tuple(region_id(shape.slot, shape.part) for shape in shapes),
        ranges=tuple(zip([0, *ends[:-1]], ends, strict=True)),
        center=(solid.min(axis=0) + solid.max(axis=0)) / 2,
        half_size=float(np.ptp(solid, axis=0).max() / 2),
    )
