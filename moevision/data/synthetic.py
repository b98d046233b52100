"""SyntheticPets: eight animal faces drawn by code, the data set that needs no download and no network.

The classes differ in the form and the place of ears, eyes, nose, muzzle and mouth, and in nothing else. Coats, eye and
nose colours, pose, background, occlusion and light come from one distribution for all classes, so neither colour nor
raw pixels give the class away. Every image has a ground-truth part mask, which lets a study ask whether an expert has
specialised on ears or on eyes. From the faces to the data set:

- A `Shape` is one filled polygon of a face. It carries a **slot**, the place of its colour in the palette of one image
  (never a colour: the palette is drawn from the same distribution for all animals), a **part**, its meaning in the
  mask, and a **group**, which moves as one when an image varies the pose (an ear tilts, the eyes come closer).
- A `Scene` is everything about an image that does not depend on its size in pixels: polygons, palette, light. Its
  polygons are painted into a map of region ids at three times the final size. The image is that map seen through the
  palette, averaged down (anti-aliased), and lit; the part mask is the middle pixel of every 3 x 3 block of that map. So
  the mask fits the image by construction.
- `SyntheticPets` draws image i from a generator of its own.

Axis legend: S image size in pixels, V vertices of all shapes of one face. Face coordinates: the head is about 1 in
radius around (0, 0); x points right, y points down. Frame coordinates run from 0 to 1, x right, y down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from moevision.errors import UserError

Points = npt.NDArray[np.float64]
Pairs = Sequence[tuple[float, float]]

PARTS: Final = (
    "background",
    "occluder",
    "body",
    "fur",
    "ear",
    "eye",
    "nose",
    "muzzle",
    "mouth",
    "whisker",
)
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


class _Group(IntEnum):
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
    group: _Group
    points: Points


def region_id(slot: int, part: str) -> int:
    """The pixel value that stands for a slot and a part together: `slot * len(PARTS) + part`, at most 255."""
    return slot * len(PARTS) + PARTS.index(part)


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """A 24-gon of an ellipse around (x, y)."""
    angle = np.linspace(0.0, 2.0 * np.pi, 24, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _smooth(points: Pairs | Points, steps: int = 4) -> Points:
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
    return _smooth([*right_half, *left], steps)


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
    """A face ready for drawing."""

    vertices: Points  # All vertices in face coordinates, [V, 2]
    groups: npt.NDArray[np.intp]  # The group of each vertex, [V]
    shapes: tuple[
        tuple[int, int, int], ...
    ]  # (region id, first vertex, one past the last) of each shape
    center: Points  # Middle of the head with its ears, whiskers left out, [2]
    half_size: float  # Half the longer side of the box around the same


def _rimmed(
    slot: Slot, part: str, group: _Group, points: Points, margin: float = 0.045
) -> Iterator[Shape]:
    """A shape over its own slightly larger dark rim, which sets equal colours apart as a shadow would."""
    yield Shape(Slot.RIM, part, group, grown(points, margin))
    yield Shape(slot, part, group, points)


def _ears(slot: Slot, outer: Points, inner: Points | None) -> Iterator[Shape]:
    for group, turn in ((_Group.RIGHT_EAR, lambda p: p), (_Group.LEFT_EAR, mirrored)):
        yield from _rimmed(slot, "ear", group, turn(outer))
        if inner is not None:
            yield Shape(Slot.INNER, "ear", group, turn(inner))


def _both(slot: Slot, part: str, group: _Group, points: Points) -> Iterator[Shape]:
    yield Shape(slot, part, group, points)
    yield Shape(slot, part, group, mirrored(points))


def _eyes(x: float, y: float, iris: Points, pupil: Points) -> Iterator[Shape]:
    place = np.array([x, y])
    size = float(np.ptp(pupil, axis=0).max())
    yield from _both(Slot.RIM, "eye", _Group.EYES, grown(iris, 0.04) + place)
    yield from _both(Slot.IRIS, "eye", _Group.EYES, iris + place)
    yield from _both(Slot.PUPIL, "eye", _Group.EYES, pupil + place)
    for side in (x, -x):
        yield Shape(
            Slot.GLINT, "eye", _Group.EYES, ellipse(side + 0.04, y - 0.2 * size, 0.055, 0.055)
        )


def _mouth(y: float, drop: float, width: float) -> Iterator[Shape]:
    yield Shape(Slot.DARK, "mouth", _Group.MUZZLE, stroke(0, y, 0, y + drop, 0.055))
    yield from _both(
        Slot.DARK, "mouth", _Group.MUZZLE, stroke(0, y + drop, width, y + drop - 0.09, 0.055)
    )


def _whiskers(x: float, y: float, length: float) -> Iterator[Shape]:
    for rise in (-0.16, 0.0, 0.16):
        line = stroke(x, y + rise / 2, x + length, y + 1.6 * rise, 0.035)
        yield from _both(Slot.WHISKER, "whisker", _Group.MUZZLE, line)


def _cat() -> Iterator[Shape]:
    """Pointed ears wide apart, slit pupils, a small nose between two puffs."""
    ear = _smooth([(0.16, -0.6), (0.5, -1.05), (0.9, -1.42), (0.99, -0.85), (0.92, -0.15)])
    yield from _ears(Slot.FUR, ear, np.array([(0.42, -0.68), (0.82, -1.2), (0.82, -0.45)]))
    head = [(0.0, -0.76), (0.55, -0.7), (0.95, -0.25), (1.04, 0.22), (0.72, 0.68), (0.0, 0.86)]
    yield from _rimmed(Slot.FUR, "fur", _Group.HEAD, symmetric(head))
    yield from _eyes(0.43, -0.1, ellipse(0, 0, 0.22, 0.2), ellipse(0, 0, 0.07, 0.18))
    yield from _whiskers(0.3, 0.42, 0.95)
    yield from _both(Slot.LIGHT, "muzzle", _Group.MUZZLE, ellipse(0.17, 0.45, 0.23, 0.19))
    yield Shape(
        Slot.NOSE, "nose", _Group.MUZZLE, np.array([(-0.14, 0.24), (0.14, 0.24), (0.0, 0.4)])
    )
    yield from _mouth(0.4, 0.12, 0.2)


def _dog() -> Iterator[Shape]:
    """Ears that hang in front of a long head, a deep muzzle with a large nose, and the tongue out."""
    head = [(0.0, -0.86), (0.55, -0.72), (0.76, -0.15), (0.64, 0.45), (0.42, 0.88), (0.0, 1.02)]
    yield from _rimmed(Slot.FUR, "fur", _Group.HEAD, symmetric(head))
    ear = _smooth(
        [
            (0.42, -0.8),
            (0.85, -0.74),
            (1.16, -0.1),
            (1.2, 0.6),
            (0.94, 0.84),
            (0.74, 0.35),
            (0.66, -0.35),
        ]
    )
    yield from _ears(Slot.SHADE, ear, None)
    yield from _eyes(0.32, -0.22, ellipse(0, 0, 0.15, 0.15), ellipse(0, 0, 0.1, 0.1))
    yield Shape(Slot.TONGUE, "mouth", _Group.MUZZLE, ellipse(0, 0.9, 0.17, 0.28))
    yield Shape(Slot.LIGHT, "muzzle", _Group.MUZZLE, ellipse(0, 0.45, 0.45, 0.4))
    yield from _mouth(0.36, 0.24, 0.3)
    yield Shape(
        Slot.NOSE,
        "nose",
        _Group.MUZZLE,
        _smooth([(-0.24, 0.14), (0.24, 0.14), (0.16, 0.36), (-0.16, 0.36)]),
    )


def _rabbit() -> Iterator[Shape]:
    """Two long upright ears, eyes at the sides, two teeth."""
    ear = _smooth([(0.12, -0.5), (0.1, -1.25), (0.4, -1.98), (0.7, -1.35), (0.54, -0.45)])
    inner = _smooth([(0.26, -0.75), (0.25, -1.3), (0.41, -1.74), (0.55, -1.35), (0.42, -0.7)])
    yield from _ears(Slot.FUR, ear, inner)
    head = [(0.0, -0.72), (0.48, -0.62), (0.76, -0.1), (0.78, 0.4), (0.45, 0.78), (0.0, 0.85)]
    yield from _rimmed(Slot.FUR, "fur", _Group.HEAD, symmetric(head))
    yield from _eyes(0.47, -0.12, ellipse(0, 0, 0.15, 0.19), ellipse(0, 0, 0.11, 0.14))
    yield Shape(
        Slot.GLINT,
        "mouth",
        _Group.MUZZLE,
        np.array([(-0.13, 0.5), (0.13, 0.5), (0.11, 0.78), (-0.11, 0.78)]),
    )
    yield Shape(Slot.DARK, "mouth", _Group.MUZZLE, stroke(0, 0.5, 0, 0.78, 0.035))
    yield from _both(Slot.LIGHT, "muzzle", _Group.MUZZLE, ellipse(0.17, 0.42, 0.21, 0.18))
    yield Shape(
        Slot.NOSE, "nose", _Group.MUZZLE, _smooth([(-0.13, 0.22), (0.13, 0.22), (0.0, 0.38)])
    )


def _bear() -> Iterator[Shape]:
    """Small round ears on a broad round head, a round muzzle."""
    yield from _ears(Slot.FUR, ellipse(0.72, -0.72, 0.33, 0.33), ellipse(0.7, -0.7, 0.19, 0.19))
    yield from _rimmed(Slot.FUR, "fur", _Group.HEAD, ellipse(0, 0, 1.02, 0.93))
    yield from _eyes(0.38, -0.18, ellipse(0, 0, 0.14, 0.14), ellipse(0, 0, 0.1, 0.1))
    yield Shape(Slot.LIGHT, "muzzle", _Group.MUZZLE, ellipse(0, 0.38, 0.45, 0.37))
    yield Shape(Slot.NOSE, "nose", _Group.MUZZLE, ellipse(0, 0.2, 0.2, 0.13))
    yield from _mouth(0.32, 0.16, 0.2)


def _mouse() -> Iterator[Shape]:
    """Huge round ears, a face that runs to a point with the nose at its tip."""
    yield from _ears(Slot.FUR, ellipse(0.86, -0.7, 0.6, 0.6), ellipse(0.86, -0.68, 0.43, 0.43))
    head = [(0.0, -0.66), (0.48, -0.56), (0.7, -0.05), (0.5, 0.45), (0.2, 0.86), (0.0, 0.98)]
    yield from _rimmed(Slot.FUR, "fur", _Group.HEAD, symmetric(head))
    yield from _eyes(0.3, -0.06, ellipse(0, 0, 0.14, 0.15), ellipse(0, 0, 0.11, 0.12))
    yield from _whiskers(0.12, 0.68, 0.8)
    cone = [(0.0, 0.25), (0.22, 0.55), (0.16, 0.85), (0.0, 0.95)]
    yield Shape(Slot.LIGHT, "muzzle", _Group.MUZZLE, symmetric(cone))
    yield Shape(Slot.NOSE, "nose", _Group.MUZZLE, ellipse(0, 0.9, 0.14, 0.12))


def _fox() -> Iterator[Shape]:
    """Tall ears close together, slanted eyes, wide cheeks that run to a pointed chin."""
    ear = _smooth([(0.06, -0.5), (0.3, -1.15), (0.66, -1.66), (0.86, -1.0), (0.84, -0.3)])
    yield from _ears(Slot.FUR, ear, np.array([(0.3, -0.65), (0.61, -1.35), (0.7, -0.55)]))
    head = [
        (0.0, -0.66),
        (0.55, -0.58),
        (0.95, -0.02),
        (1.2, 0.42),
        (0.62, 0.62),
        (0.24, 0.98),
        (0.0, 1.1),
    ]
    yield from _rimmed(Slot.FUR, "fur", _Group.HEAD, symmetric(head))
    cheek = _smooth([(0.1, 0.35), (0.6, 0.2), (1.1, 0.4), (0.6, 0.56), (0.25, 0.88)])
    yield from _both(Slot.LIGHT, "muzzle", _Group.HEAD, cheek)
    almond = _smooth([(-0.21, 0.05), (-0.04, -0.14), (0.24, -0.1), (0.06, 0.13)])
    yield from _eyes(0.42, -0.02, almond, ellipse(0, 0, 0.09, 0.12))
    yield Shape(Slot.NOSE, "nose", _Group.MUZZLE, ellipse(0, 0.96, 0.15, 0.12))


def _pig() -> Iterator[Shape]:
    """Ears that fold outward, a snout disc with two nostrils in the middle of the face."""
    yield from _rimmed(Slot.FUR, "fur", _Group.HEAD, ellipse(0, 0, 0.98, 0.9))
    ear = np.array(
        [(0.26, -0.86), (0.6, -1.08), (0.95, -1.06), (1.36, -0.5), (0.98, -0.44), (0.8, -0.4)]
    )
    yield from _ears(
        Slot.SHADE, ear, np.array([(0.55, -0.84), (0.88, -0.92), (1.16, -0.6), (0.86, -0.56)])
    )
    yield from _eyes(0.45, -0.2, ellipse(0, 0, 0.13, 0.13), ellipse(0, 0, 0.09, 0.09))
    yield from _rimmed(Slot.LIGHT, "muzzle", _Group.MUZZLE, ellipse(0, 0.24, 0.42, 0.31))
    yield from _both(Slot.NOSE, "nose", _Group.MUZZLE, ellipse(0.16, 0.24, 0.09, 0.14))
    yield Shape(
        Slot.DARK, "mouth", _Group.MUZZLE, _smooth([(-0.3, 0.64), (0.3, 0.64), (0.0, 0.76)])
    )


def _owl() -> Iterator[Shape]:
    """Feather tufts, two face discs around very large eyes, a beak."""
    tuft = np.array([(0.3, -0.74), (1.06, -1.3), (0.98, -0.3)])
    yield from _ears(Slot.SHADE, tuft, None)
    head = [(0.0, -0.72), (0.5, -0.8), (0.94, -0.5), (1.0, 0.15), (0.68, 0.78), (0.0, 0.98)]
    yield from _rimmed(Slot.FUR, "fur", _Group.HEAD, symmetric(head))
    yield from _both(Slot.LIGHT, "fur", _Group.HEAD, ellipse(0.44, -0.1, 0.47, 0.5))
    yield from _eyes(0.42, -0.12, ellipse(0, 0, 0.3, 0.3), ellipse(0, 0, 0.17, 0.17))
    beak = _smooth([(0.0, 0.06), (0.18, 0.24), (0.0, 0.58), (-0.18, 0.24)])
    yield Shape(Slot.NOSE, "nose", _Group.MUZZLE, beak)


_FACES: Final[dict[str, Callable[[], Iterator[Shape]]]] = {
    "cat": _cat,
    "dog": _dog,
    "rabbit": _rabbit,
    "bear": _bear,
    "mouse": _mouse,
    "fox": _fox,
    "pig": _pig,
    "owl": _owl,
}
CLASSES: Final = tuple(_FACES)


@cache
def face(label: int) -> Face:
    """The face of one class, on the shoulders that all classes share."""
    shoulders = _smooth(
        [(-1.0, 3.6), (-1.05, 1.6), (-0.55, 0.75), (0.55, 0.75), (1.05, 1.6), (1.0, 3.6)]
    )
    chest = _smooth([(-0.45, 3.6), (-0.5, 1.6), (0.0, 0.8), (0.5, 1.6), (0.45, 3.6)])
    head = list(_FACES[CLASSES[label]]())
    shapes = [
        Shape(Slot.RIM, "body", _Group.BODY, grown(shoulders, 0.05)),
        Shape(Slot.BODY, "body", _Group.BODY, shoulders),
        Shape(Slot.LIGHT, "body", _Group.BODY, chest),
        *head,
    ]
    ends = np.cumsum([len(shape.points) for shape in shapes]).tolist()
    solid = np.concatenate([shape.points for shape in head if shape.part != "whisker"])
    return Face(
        vertices=np.concatenate([shape.points for shape in shapes]),
        groups=np.concatenate(
            [np.full(len(shape.points), shape.group, np.intp) for shape in shapes]
        ),
        shapes=tuple(
            zip(
                (region_id(shape.slot, shape.part) for shape in shapes),
                [0, *ends[:-1]],
                ends,
                strict=True,
            )
        ),
        center=(solid.min(axis=0) + solid.max(axis=0)) / 2,
        half_size=float(np.ptp(solid, axis=0).max() / 2),
    )


OVERSAMPLING: Final = 3
_MAX_CLUTTER: Final = 8

# Coats of real pets, as RGB. Every class draws from all of them with equal chance.
_COATS: Final = np.array(
    [
        (236, 228, 214), (222, 190, 142), (214, 140, 70), (170, 98, 52), (122, 82, 56), (84, 62, 52),
        (64, 62, 68), (134, 134, 140), (176, 172, 166), (110, 122, 142), (206, 168, 156), (196, 156, 92),
    ],
    dtype=np.float64,
)  # fmt: skip
_IRISES: Final = np.array(
    [(206, 172, 60), (120, 168, 84), (96, 150, 196), (150, 92, 44), (218, 132, 48), (92, 62, 40)],
    np.float64,
)
_NOSES: Final = np.array([(214, 122, 122), (44, 36, 38), (92, 58, 50), (226, 158, 70)], np.float64)

_FACE_REGIONS: Final = [
    region_id(slot, part)
    for slot in range(Slot.BODY, Slot.WHISKER + 1)
    for part in PARTS
    if part != "eye"
]
# Lookup tables over the 256 region ids: region -> 255 where the layer shows.
_SCENERY_TABLE: Final = [
    255 if region == region_id(Slot.SCENERY, "background") else 0 for region in range(256)
]
_COAT_TABLE: Final = [255 if region in _FACE_REGIONS else 0 for region in range(256)]


@dataclass(frozen=True)
class Scene:
    """An image before it has pixels."""

    polygons: list[
        tuple[int, Points]
    ]  # (region id, vertices [n, 2] in frame coordinates) in painting order
    palette: npt.NDArray[np.float64]  # RGB 0-255 of every slot, [slots, 3]
    scenery: npt.NDArray[np.float32]  # Coarse grid of background colours, float32 [4, 4, 3]
    to_face: Points  # Map [2, 3] from frame coordinates to face coordinates, for shading
    # (direction, frequency, phase, strength) of the stripes of coat and background, [2, 4]
    ripples: npt.NDArray[np.float64]
    light: tuple[float, float]  # (direction, strength) of the light's slope across the frame
    gain: npt.NDArray[np.float64]  # Brightness of each colour channel, [3]
    grain: float  # Standard deviation of the pixel noise, in units of 0-255


def sample_scene(label: int, rng: np.random.Generator) -> Scene:
    """Draws pose, colours, clutter, occlusion and light for one animal."""
    template = face(label)
    to_frame = _pose(template, rng)
    vertices = _vary(template, rng) @ to_frame[:, :2].T + to_frame[:, 2]
    animal = [(region, vertices[start:end]) for region, start, end in template.shapes]
    inverse = np.linalg.inv(to_frame[:, :2])
    base = rng.uniform(20, 235, 3)
    base += 0.4 * (base.mean() - base)  # rooms and gardens are duller than paint
    grid = base + rng.uniform(-60, 60, (4, 4, 3)) * rng.uniform(0.1, 1.0)
    return Scene(
        polygons=[*_clutter(rng), *animal, *_occluders(to_frame, template, rng)],
        palette=_palette(rng),
        scenery=grid.astype(np.float32),
        to_face=np.hstack([inverse, -inverse @ to_frame[:, 2:]]),
        ripples=rng.uniform((0, 2, 0, -0.1), (np.pi, 8, 2 * np.pi, 0.16), (2, 4)),
        light=(rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.6)),
        gain=rng.uniform(0.75, 1.15) * rng.uniform(0.93, 1.07, 3),
        grain=rng.uniform(1.5, 6.5),
    )


def _pose(template: Face, rng: np.random.Generator) -> Points:
    """Map [2, 3] from face to frame: turn within 24 degrees, shear, aspect, scale and position."""
    turn, shear, aspect = rng.uniform((-0.42, -0.12, 0.93), (0.42, 0.12, 1.08))
    extent = rng.uniform(0.66, 0.95)
    scale = extent / 2 / template.half_size
    slack = (1.0 - extent) / 2 + 0.04  # the head may leave the frame by 4 % of it
    position = 0.5 + rng.uniform(-slack, slack, 2)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = scale * turned @ np.array([[aspect, shear], [0.0, 1.0 / aspect]])
    return np.hstack([matrix, (position - matrix @ template.center)[:, None]])


def _vary(template: Face, rng: np.random.Generator) -> Points:
    """Vertices [V, 2] in face coordinates after each group's own tilt, stretch and shift."""
    count = len(_Group)
    tilt = rng.uniform(-1, 1, count) * (0.25, 0.0, 0.2, 0.2, 0.0, 0.0)
    stretch = 1 + rng.uniform(-1, 1, (count, 2)) * (
        (0.2,),
        (0.05,),
        (0.13,),
        (0.13,),
        (0.1,),
        (0.08,),
    )
    pivot = np.array([(0, 0.8), (0, 0), (-0.55, -0.6), (0.55, -0.6), (0, -0.1), (0, 0.4)])
    # A head that looks to one side: what lies nearer to the viewer moves farther.
    look = rng.uniform(-1, 1, 2) * (1.0, 0.5)
    shift = np.array([0.0, 0.0, -0.03, -0.03, 0.09, 0.14])[:, None] * look
    matrix = np.empty((count, 2, 2))
    matrix[:, 0] = np.stack([np.cos(tilt) * stretch[:, 0], -np.sin(tilt) * stretch[:, 1]], axis=1)
    matrix[:, 1] = np.stack([np.sin(tilt) * stretch[:, 0], np.cos(tilt) * stretch[:, 1]], axis=1)
    offset = pivot + shift - np.einsum("gij,gj->gi", matrix, pivot)
    groups = template.groups
    return np.asarray(np.einsum("vij,vj->vi", matrix[groups], template.vertices) + offset[groups])


def _blobs(
    centers: Points, radii: npt.NDArray[np.float64], rng: np.random.Generator
) -> list[Points]:
    """Irregular, stretched 10-gons, from thin bars to round stones, around centers [n, 2]."""
    n = len(centers)
    angle = np.linspace(0, 2 * np.pi, 10, endpoint=False) + rng.uniform(0, 0.5, (n, 10))
    radius = radii[:, None] * rng.uniform(0.8, 1.2, (n, 10))
    stretch, turn = rng.uniform(0.25, 1.0, (n, 1)), rng.uniform(0, np.pi, (n, 1))
    u, v = radius * np.cos(angle), radius * np.sin(angle) * stretch
    x = centers[:, :1] + u * np.cos(turn) - v * np.sin(turn)
    y = centers[:, 1:] + u * np.sin(turn) + v * np.cos(turn)
    return list(np.stack([x, y], axis=2))


def _clutter(rng: np.random.Generator) -> list[tuple[int, Points]]:
    """Two to eight objects behind the animal."""
    count = int(rng.integers(2, _MAX_CLUTTER + 1))
    shapes = _blobs(rng.uniform(-0.1, 1.1, (count, 2)), rng.uniform(0.06, 0.4, count), rng)
    return [(region_id(Slot.CLUTTER + i, "background"), shape) for i, shape in enumerate(shapes)]


def _occluders(
    to_frame: Points, template: Face, rng: np.random.Generator
) -> list[tuple[int, Points]]:
    """Up to two objects in front, near the head's edge, so that some parts hide but never all."""
    count = int(rng.integers(0, 3))
    angle, distance = (
        rng.uniform(0, 2 * np.pi, count),
        rng.uniform(0.5, 1.0, count) * template.half_size,
    )
    on_face = template.center + np.stack([np.cos(angle), np.sin(angle)], axis=1) * distance[:, None]
    shapes = _blobs(
        on_face @ to_frame[:, :2].T + to_frame[:, 2], rng.uniform(0.05, 0.14, count), rng
    )
    return [(region_id(Slot.OCCLUDER + i, "occluder"), shape) for i, shape in enumerate(shapes)]


def _palette(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """RGB of every slot, [slots, 3]; no argument says which animal it is for."""
    palette = rng.uniform(15, 240, (Slot.WHISKER + 1, 3))
    palette[: Slot.BODY] += 0.4 * (
        palette[: Slot.BODY].mean(axis=1, keepdims=True) - palette[: Slot.BODY]
    )
    fur, second = _COATS[rng.integers(0, len(_COATS), 2)] + rng.normal(0, 9, (2, 3))
    light = fur + (np.array([246, 240, 230]) - fur) * rng.uniform(0.25, 0.8)
    palette[Slot.FUR] = fur
    palette[Slot.BODY] = fur * 0.88
    palette[Slot.SHADE] = (fur if rng.random() < 0.6 else second) * 0.68
    palette[Slot.LIGHT] = light if rng.random() < 0.75 else 0.5 * (second + light)
    palette[Slot.RIM] = fur * 0.5
    palette[Slot.INNER] = 0.55 * np.array([226, 160, 154]) + 0.45 * fur
    palette[Slot.IRIS] = _IRISES[rng.integers(len(_IRISES))]
    palette[Slot.NOSE] = _NOSES[rng.integers(len(_NOSES))]
    palette[Slot.PUPIL] = (22, 18, 22)
    palette[Slot.DARK] = (52, 34, 36)
    palette[Slot.TONGUE] = (222, 104, 112)
    palette[[Slot.GLINT, Slot.WHISKER]] = (250, 248, 244)
    return np.clip(palette + rng.normal(0, 4, palette.shape), 0, 255)


def region_map(scene: Scene, image_size: int) -> Image.Image:
    """Paints region ids at three times the image size, mode "L"."""
    side = OVERSAMPLING * image_size
    canvas = Image.new("L", (side, side), region_id(Slot.SCENERY, "background"))
    draw = ImageDraw.Draw(canvas)
    for region, vertices in scene.polygons:
        draw.polygon((vertices * side).ravel().tolist(), fill=region)
    return canvas


def _render(scene: Scene, image_size: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Colours and lights the scene: uint8 [S, S, 3]. The generator gives the pixel noise only."""
    regions = region_map(scene, image_size)
    coat = _coverage(regions, _COAT_TABLE)
    open_scenery = _coverage(regions, _SCENERY_TABLE)
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    x, y = axis[None, :], axis[:, None]
    (ax, ay, a0), (bx, by, b0) = scene.to_face.astype(np.float32)
    face_x, face_y = ax * x + ay * y + a0, bx * x + by * y + b0
    # A head is round: it darkens towards its edge, as under a lamp beside the camera.
    roundness = 0.1 - 0.2 * np.minimum(face_x**2 + face_y**2, 1.6)
    shade = 1.0 + coat * (roundness + _stripes(face_x, face_y, scene.ripples[0]))
    direction, strength = scene.light
    shade *= 1.0 + strength * (np.cos(direction) * (x - 0.5) + np.sin(direction) * (y - 0.5))
    backdrop = open_scenery * (1.0 + _stripes(3 * x, 3 * y, scene.ripples[1]))
    pixels = _coloured(regions, scene.palette) + backdrop[:, :, None] * _scenery(
        scene.scenery, image_size
    )
    pixels *= shade[:, :, None] * scene.gain.astype(np.float32)
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(scene.grain)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _coverage(regions: Image.Image, table: list[int]) -> npt.NDArray[np.float32]:
    """Share of each pixel that the regions of a table cover: float32 [S, S] in 0-1."""
    return np.asarray(regions.point(table).reduce(OVERSAMPLING), np.float32) / np.float32(255)


def _coloured(regions: Image.Image, palette: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The region map through the palette, averaged down: float32 [S, S, 3]; the scenery is left black."""
    colours = np.repeat(palette, len(PARTS), axis=0).astype(np.uint8)
    colours[: len(PARTS)] = 0
    regions = regions.copy()
    regions.putpalette(colours.tobytes())
    return np.asarray(regions.convert("RGB").reduce(OVERSAMPLING), np.float32)


def _scenery(grid: npt.NDArray[np.float32], image_size: int) -> npt.NDArray[np.float32]:
    """The coarse grid of colours as a smooth backdrop: float32 [S, S, 3]."""
    small = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))
    return np.asarray(small.resize((image_size, image_size), Image.Resampling.BICUBIC), np.float32)


def _stripes(
    x: npt.NDArray[np.floating[Any]],
    y: npt.NDArray[np.floating[Any]],
    ripple: npt.NDArray[np.float64],
) -> npt.NDArray[np.float32]:
    """Wavy stripes around 0; a strength below 0 means none, so that many coats and walls are plain."""
    direction, frequency, phase, strength = ripple.tolist()
    if strength <= 0:
        return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    along = np.cos(direction) * x + np.sin(direction) * y
    across = np.cos(direction) * y - np.sin(direction) * x
    return np.asarray(
        strength * np.sin(frequency * 2 * along + phase + 1.5 * np.sin(3 * across)), np.float32
    )


# Part of every image's key. Raise it when the drawing changes: then no image of the old set comes back
# slightly altered, and results are not compared across versions by mistake.
_DRAWING_VERSION: Final = 1


class SyntheticPets(Dataset[tuple[Image.Image, int]]):
    """Drawn animal faces with labels and part masks.

    An image depends on nothing but (seed, split, index): not on the order of access, the size of the set or
    the process, and the same index shows the same scene at every image size. Image i has label i mod 8, so
    classes are balanced to within one image.
    """

    classes: ClassVar[tuple[str, ...]] = CLASSES  # names of the labels
    parts: ClassVar[tuple[str, ...]] = PARTS  # names of the values of a part mask
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def __init__(
        self, size: int, image_size: int = 64, seed: int = 0, split: str = "train"
    ) -> None:
        """Describes the set; images are drawn when asked for.

        Args:
            size: Number of images, at least 1.
            image_size: Side of an image in pixels, at least 16.
            seed: Any integer; other seeds give other images.
            split: `"train"`, `"val"` or `"test"`; splits share no image.
        """
        if size < 1:
            raise UserError(f"SyntheticPets needs a size of at least 1 image, not {size}")
        if image_size < 16:
            raise UserError(
                f"SyntheticPets needs an image_size of at least 16 pixels, not {image_size}"
            )
        if split not in self.splits:
            raise UserError(f"SyntheticPets has the splits {', '.join(self.splits)}, not {split!r}")
        self.size, self.image_size, self.seed, self.split = size, image_size, seed, split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, as a PIL image in mode RGB, and its label."""
        return Image.fromarray(self.image(index)), self.label(index)

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """The image, uint8 [S, S, 3] in RGB order."""
        scene, rng = self._scene(index)
        return _render(scene, self.image_size, rng)

    def label(self, index: int) -> int:
        """The class, an index into `classes`."""
        return self._checked(index) % len(self.classes)

    def part_mask(self, index: int) -> npt.NDArray[np.uint8]:
        """The part seen at the middle of each pixel, uint8 [S, S], an index into `parts`."""
        regions = np.asarray(region_map(self._scene(index)[0], self.image_size), np.uint8)
        middle = OVERSAMPLING // 2
        return regions[middle::OVERSAMPLING, middle::OVERSAMPLING] % np.uint8(len(PARTS))

    def _scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene, and its generator in the state from which the pixel noise is drawn."""
        index = self._checked(index)
        key = f"SyntheticPets {_DRAWING_VERSION} {self.seed} {self.split} {index}"
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        return sample_scene(self.label(index), rng), rng

    def _checked(self, index: int) -> int:
        """The index counted from the start; `IndexError` outside of the set, which also ends iteration."""
        if not -self.size <= index < self.size:
            raise IndexError(f"index {index} is outside of a set of {self.size} images")
        return int(index) % self.size
