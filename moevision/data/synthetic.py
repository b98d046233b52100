"""SyntheticPets: eight animal faces drawn by code, the data set that needs no download and no network.

The classes differ only in the shape and the position of ears, eyes, nose, muzzle and mouth. Coats, eye and nose
colours, pose, background, occlusion and light are sampled from the same distribution for all classes, so that neither
colours nor raw pixels predict the class. Every image has a ground-truth part mask, which lets a study ask whether an
expert has specialised on ears or on eyes. From the faces to the data set:

- A `Shape` is one filled polygon of a face. It has a **slot**, the row of its colour in the image's palette (not a
  colour: every image samples a new palette), a **part**, its value in the part mask, and a **group**, the shapes that
  move together when an image varies the pose (an ear tilts, the eyes come closer).
- A `Scene` is everything about an image that does not depend on its size in pixels: polygons, palette, light. Its
  polygons are painted into a **region map** at three times the final size; a region id encodes slot and part. To get
  the image, each region id is replaced by its palette colour, every 3 x 3 block is averaged (anti-aliasing), and light
  is applied. The part mask takes the middle pixel of every 3 x 3 block, so it always agrees with the image.
- `SyntheticPets` samples image i with a random generator that is seeded for this image alone.

Axes: S image size in pixels, V vertices of all shapes of one face, G groups. Face coordinates: the head has a radius
of about 1 around (0, 0); x points right, y points down. Frame coordinates run from 0 to 1, x right, y down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.random import Generator
from PIL import Image, ImageDraw

from moevision.data.emoji import DrawnImages
from moevision.types import Array, Floats, Ints, Json, Pixels

Points = Floats  # [n, 2]
Affine = Floats  # [2, 3], a 2 x 2 matrix and an offset
Polygon = tuple[int, Points]  # region id, vertices [n, 2] in frame coordinates
Pair = tuple[float, float]

CLASSES = ("cat", "dog", "rabbit", "bear", "mouse", "fox", "pig", "owl")
PARTS = (
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
    """Rows of an image's palette."""

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


# Groups of shapes that move together.
_Group = IntEnum("_Group", "BODY HEAD LEFT_EAR RIGHT_EAR EYES MUZZLE", start=0)


@dataclass(frozen=True)
class Shape:
    """One filled polygon: vertices [n, 2] in face coordinates."""

    slot: Slot
    part: str
    group: _Group
    points: Points


@dataclass(frozen=True)
class Face:
    """A face ready for drawing."""

    vertices: Points  # all vertices in face coordinates, [V, 2]
    groups: Ints  # the group of each vertex, [V]
    regions: list[int]  # region id of each shape
    starts: Ints  # index of the first vertex of each shape, without the first shape's 0
    center: Floats  # [2], center of the bounding box of the head: with ears, without whiskers and shoulders
    half_size: float  # half the longer side of this bounding box


def region_id(slot: int, part: str) -> int:
    """The value of a region map's pixel, which encodes slot and part: `slot * len(PARTS) + part`, at most 255."""
    return slot * len(PARTS) + PARTS.index(part)


# ---- the tables of `pets.yaml`


@cache
def _tables() -> Json:
    text = Path(__file__).with_name("pets.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser, if available, takes 3 ms
    return dict(yaml.load(text, loader))


@cache
def _colours(name: str) -> Floats:
    """An entry of the table `colours`: RGB [..., 3]."""
    return np.array(_tables()["colours"][name], np.float64)


@cache
def _motion(name: str) -> Floats:
    """A column of the table `motion`, [G, ...]."""
    table = _tables()["motion"]
    return np.array([table[group.name][name] for group in _Group], np.float64)


# ---- outlines: vertices [n, 2] in face coordinates


def _directions(angle: Floats) -> Points:
    """Unit vectors [n, 2] at these angles [n]."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _rotation(angle: Floats) -> Floats:
    """Rotation matrices [..., 2, 2] for angles [...]."""
    cos = np.cos(angle)
    sin = np.sin(angle)
    # [2, 2, ...] -> [..., 2, 2]
    return np.moveaxis(np.array([[cos, -sin], [sin, cos]]), (0, 1), (-2, -1))


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> Points:
    """A 24-gon of an ellipse around (x, y)."""
    angle = np.linspace(0.0, 2.0 * np.pi, 24, endpoint=False)
    return np.array([x, y]) + np.array([radius_x, radius_y]) * _directions(angle)


def stroke(x0: float, y0: float, x1: float, y1: float, width: float) -> Points:
    """The line from (x0, y0) to (x1, y1) with a width, as a quadrilateral."""
    start = np.array([x0, y0])
    end = np.array([x1, y1])
    dx = x1 - x0
    dy = y1 - y0
    length = np.hypot(dx, dy)
    half_width = np.array([-dy, dx]) * (width / 2 / length)  # [2], perpendicular to the line
    return np.stack([start - half_width, end - half_width, end + half_width, start + half_width])


def smooth(*points: Pair) -> Points:
    """A closed Catmull-Rom curve through the points, 4 vertices from each to the next."""
    current = np.asarray(points, dtype=np.float64)[:, None, :]  # [n, 1, 2]
    previous = np.roll(current, 1, axis=0)
    following = np.roll(current, -1, axis=0)
    second_following = np.roll(current, -2, axis=0)

    t = (np.arange(4) / 4)[None, :, None]  # [1, 4, 1]
    curve = 0.5 * (  # [n, 4, 2]
        2 * current
        + (following - previous) * t
        + (2 * previous - 5 * current + 4 * following - second_following) * t**2
        + (3 * current - previous - 3 * following + second_following) * t**3
    )
    return curve.reshape(-1, 2)


def symmetric(*right_half: Pair) -> Points:
    """A smooth outline from its right half, top to bottom; points on the axis (x = 0) are not repeated."""
    left_half = [(-x, y) for x, y in reversed(right_half) if x > 0]
    return smooth(*right_half, *left_half)


def mirrored(points: Points) -> Points:
    """The same shape on the other side of the face."""
    return points * (-1.0, 1.0)


def grown(points: Points, margin: float) -> Points:
    """The shape [n, 2] scaled about the center of its bounding box, which grows by a margin on every side."""
    low = points.min(axis=0)
    high = points.max(axis=0)
    center = (low + high) / 2
    half_size = (high - low) / 2
    scale = 1 + margin / half_size
    return np.asarray(center + (points - center) * scale)


_CURVES: dict[str, Callable[..., Points]] = {
    "corners": lambda *corners: np.array(corners),
    "ellipse": ellipse,
    "smooth": smooth,
    "stroke": stroke,
    "symmetric": symmetric,
}


def outline(spec: Mapping[str, Any]) -> Points:
    """The vertices [n, 2] of an outline in `pets.yaml`, which is `{curve: arguments}`."""
    ((curve, arguments),) = spec.items()
    return _CURVES[curve](*arguments)


# ---- elements of a face, under the names that `pets.yaml` gives them


def _shape(slot: str, part: str, group: str, outline: Points) -> Iterator[Shape]:
    yield Shape(Slot[slot], part, _Group[group], outline)


def _pair(slot: str, part: str, group: str, outline: Points) -> Iterator[Shape]:
    yield from _shape(slot, part, group, outline)
    yield from _shape(slot, part, group, mirrored(outline))


def _rimmed(
    slot: str, part: str, group: str, outline: Points, margin: float = 0.045
) -> Iterator[Shape]:
    """A shape on top of a slightly larger dark copy, whose rim separates it from shapes of the same colour."""
    yield from _shape("RIM", part, group, grown(outline, margin))
    yield from _shape(slot, part, group, outline)


def _ears(slot: str, outer: Points, inner: Points | None = None) -> Iterator[Shape]:
    yield from _rimmed(slot, "ear", "RIGHT_EAR", outer)
    if inner is not None:
        yield from _shape("INNER", "ear", "RIGHT_EAR", inner)
    yield from _rimmed(slot, "ear", "LEFT_EAR", mirrored(outer))
    if inner is not None:
        yield from _shape("INNER", "ear", "LEFT_EAR", mirrored(inner))


def _eyes(x: float, y: float, iris: Points, pupil: Points) -> Iterator[Shape]:
    center = np.array([x, y])
    pupil_size = float(np.ptp(pupil, axis=0).max())
    glint_y = y - 0.2 * pupil_size
    yield from _pair("RIM", "eye", "EYES", grown(iris, 0.04) + center)
    yield from _pair("IRIS", "eye", "EYES", iris + center)
    yield from _pair("PUPIL", "eye", "EYES", pupil + center)

    # The light comes from one side: both glints are shifted to the right, so they are not mirrored.
    yield from _shape("GLINT", "eye", "EYES", ellipse(x + 0.04, glint_y, 0.055, 0.055))
    yield from _shape("GLINT", "eye", "EYES", ellipse(-x + 0.04, glint_y, 0.055, 0.055))


def _mouth(y: float, drop: float, width: float) -> Iterator[Shape]:
    lips_y = y + drop
    yield from _shape("DARK", "mouth", "MUZZLE", stroke(0, y, 0, lips_y, 0.055))
    yield from _pair("DARK", "mouth", "MUZZLE", stroke(0, lips_y, width, lips_y - 0.09, 0.055))


def _whiskers(x: float, y: float, length: float) -> Iterator[Shape]:
    for rise in (-0.16, 0.0, 0.16):
        line = stroke(x, y + rise / 2, x + length, y + 1.6 * rise, 0.035)
        yield from _pair("WHISKER", "whisker", "MUZZLE", line)


_ELEMENTS: dict[str, Callable[..., Iterator[Shape]]] = {
    "ears": _ears,
    "eyes": _eyes,
    "mouth": _mouth,
    "pair": _pair,
    "rimmed": _rimmed,
    "shape": _shape,
    "whiskers": _whiskers,
}


def _shapes(name: str) -> Iterator[Shape]:
    """The shapes of a face (or of the shoulders) in painting order."""
    for element in _tables()["faces"][name]:
        ((kind, options),) = element.items()
        arguments = {
            key: outline(value) if isinstance(value, dict) else value
            for key, value in options.items()
        }
        yield from _ELEMENTS[kind](**arguments)


@cache
def face(label: int) -> Face:
    """The face of one class, on the shoulders that all classes share."""
    head = list(_shapes(CLASSES[label]))
    shapes = [*_shapes("shoulders"), *head]
    num_vertices = [len(shape.points) for shape in shapes]

    without_whiskers = [shape.points for shape in head if shape.part != "whisker"]
    head_points = np.concatenate(without_whiskers)  # [n, 2]
    return Face(
        vertices=np.concatenate([shape.points for shape in shapes]),
        groups=np.repeat([shape.group for shape in shapes], num_vertices),
        regions=[region_id(shape.slot, shape.part) for shape in shapes],
        starts=np.cumsum(num_vertices)[:-1],
        center=(head_points.min(axis=0) + head_points.max(axis=0)) / 2,
        half_size=float(np.ptp(head_points, axis=0).max() / 2),
    )


# ---- scenes

OVERSAMPLING = 3
_MAX_CLUTTER = 8

_FACE_REGIONS = [
    region_id(slot, part)
    for slot in range(Slot.BODY, Slot.WHISKER + 1)
    for part in PARTS
    if part != "eye"
]


@dataclass(frozen=True)
class Scene:
    """The description of an image, independent of its size in pixels."""

    # (region id, vertices [n, 2] in frame coordinates) in painting order
    polygons: list[Polygon]
    palette: Floats  # RGB 0-255 of every slot, [slots, 3]
    scenery: Array  # coarse grid of background colours, float32 [4, 4, 3]
    to_face: Affine  # from frame coordinates to face coordinates, for shading
    # (direction, frequency, phase, strength) of the stripes of coat and background, [2, 4]
    ripples: Floats
    light: Pair  # (direction, strength) of the linear change of brightness across the frame
    gain: Floats  # brightness of each colour channel, [3]
    grain: float  # standard deviation of the pixel noise, in units of 0-255


def sample_scene(label: int, rng: Generator) -> Scene:
    """Samples pose, colours, clutter, occlusion and light for one animal."""
    template = face(label)
    to_frame = _pose(template, rng)
    vertices = _apply(to_frame, _vary(template, rng))  # [V, 2]
    animal = zip(template.regions, np.split(vertices, template.starts), strict=True)

    inverse = np.linalg.inv(to_frame[:, :2])  # [2, 2]
    to_face = np.hstack([inverse, -inverse @ to_frame[:, 2:]])  # [2, 3]

    base_colour = _duller(rng.uniform(20, 235, 3))
    variation = rng.uniform(-60, 60, (4, 4, 3)) * rng.uniform(0.1, 1.0)
    scenery = base_colour + variation
    return Scene(
        polygons=[*_clutter(rng), *animal, *_occluders(to_frame, template, rng)],
        palette=_palette(rng),
        scenery=scenery.astype(np.float32),
        to_face=to_face,
        ripples=rng.uniform((0, 2, 0, -0.1), (np.pi, 8, 2 * np.pi, 0.16), (2, 4)),
        light=(rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.6)),
        gain=rng.uniform(0.75, 1.15) * rng.uniform(0.93, 1.07, 3),
        grain=rng.uniform(1.5, 6.5),
    )


def _duller(colours: Floats) -> Floats:
    """RGB [..., 3] with 40 % less saturation, as the colours of rooms and gardens have it."""
    grey = colours.mean(axis=-1, keepdims=True)
    return np.asarray(colours + 0.4 * (grey - colours))


def _apply(affine: Affine, points: Points) -> Points:
    """Points [n, 2] moved by an affine map."""
    return points @ affine[:, :2].T + affine[:, 2]


def _pose(template: Face, rng: Generator) -> Affine:
    """Map from face to frame coordinates: rotation within 24 degrees, shear, aspect, scale and position."""
    turn, shear, aspect = rng.uniform((-0.42, -0.12, 0.93), (0.42, 0.12, 1.08))
    extent = rng.uniform(0.66, 0.95)  # the head's longer side as a share of the frame's
    scale = extent / 2 / template.half_size
    slack = (1.0 - extent) / 2 + 0.04  # the head may stick out by 4 % of the frame's side
    position = 0.5 + rng.uniform(-slack, slack, 2)  # of the head's center, [2]

    shear_and_aspect = np.array([[aspect, shear], [0.0, 1.0 / aspect]])
    matrix = scale * _rotation(turn) @ shear_and_aspect  # [2, 2]
    offset = position - matrix @ template.center  # [2]
    return np.hstack([matrix, offset[:, None]])


def _vary(template: Face, rng: Generator) -> Points:
    """Vertices [V, 2] in face coordinates after each group's own tilt, stretch and shift."""
    num_groups = len(_Group)
    tilt = rng.uniform(-1, 1, num_groups) * _motion("tilt")  # [G]
    # [G, 2]
    stretch = 1 + rng.uniform(-1, 1, (num_groups, 2)) * _motion("stretch")[:, None]
    gaze = rng.uniform(-1, 1, 2) * (1.0, 0.5)  # [2], where the head turns to, less far up and down
    shift = _motion("follow")[:, None] * gaze  # [G, 2]
    pivot = _motion("pivot")  # [G, 2]

    # Stretch x and y, then rotate, both about the pivot, then shift.
    matrix = _rotation(tilt) * stretch[:, None]  # [G, 2, 2]
    offset = pivot + shift - np.einsum("gij,gj->gi", matrix, pivot)  # [G, 2]

    moved = np.einsum("vij,vj->vi", matrix[template.groups], template.vertices)
    return np.asarray(moved + offset[template.groups])


def _clutter(rng: Generator) -> list[Polygon]:
    """Two to eight objects behind the animal."""
    count = int(rng.integers(2, _MAX_CLUTTER + 1))
    centers = rng.uniform(-0.1, 1.1, (count, 2))
    outlines = _blobs(centers, rng.uniform(0.06, 0.4, count), rng)
    return _objects(Slot.CLUTTER, "background", outlines)


def _occluders(to_frame: Affine, template: Face, rng: Generator) -> list[Polygon]:
    """Up to two objects in front, near the head's edge, so that they hide some parts but never all."""
    count = int(rng.integers(0, 3))
    angle = rng.uniform(0, 2 * np.pi, count)
    distance = rng.uniform(0.5, 1.0, count) * template.half_size
    on_face = template.center + _directions(angle) * distance[:, None]
    centers = _apply(to_frame, on_face)
    outlines = _blobs(centers, rng.uniform(0.05, 0.14, count), rng)
    return _objects(Slot.OCCLUDER, "occluder", outlines)


def _objects(first_slot: Slot, part: str, outlines: Sequence[Points]) -> list[Polygon]:
    """Polygons of one part, in consecutive slots from `first_slot`."""
    return [(region_id(first_slot + i, part), outline) for i, outline in enumerate(outlines)]


def _blobs(centers: Points, radii: Floats, rng: Generator) -> list[Points]:
    """Irregular, stretched 10-gons, from thin bars to round stones, around centers [n, 2] with radii [n]."""
    n = len(centers)
    corners = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    angle = corners + rng.uniform(0, 0.5, (n, 10))
    radius = radii[:, None] * rng.uniform(0.8, 1.2, (n, 10))
    stretch = rng.uniform(0.25, 1.0, (n, 1))
    turn = rng.uniform(0, np.pi, (n, 1))

    # Along and across the long axis, then rotated: [n, 10] each.
    along = radius * np.cos(angle)
    across = radius * np.sin(angle) * stretch
    cos = np.cos(turn)
    sin = np.sin(turn)
    x = centers[:, :1] + along * cos - across * sin
    y = centers[:, 1:] + along * sin + across * cos
    return list(np.stack([x, y], axis=2))


def _palette(rng: Generator) -> Floats:
    """RGB of every slot, [slots, 3], sampled alike for every animal."""
    palette = rng.uniform(15, 240, (Slot.WHISKER + 1, 3))
    # Background and occluders stand before the body.
    palette[: Slot.BODY] = _duller(palette[: Slot.BODY])

    # Some coats have a second colour, in the shade, the light parts or both.
    coats = _colours("coats")
    fur, second_fur = coats[rng.integers(0, len(coats), 2)] + rng.normal(0, 9, (2, 3))
    light = fur + (_colours("cream") - fur) * rng.uniform(0.25, 0.8)
    shade = fur
    if rng.random() >= 0.6:
        shade = second_fur
    if rng.random() >= 0.75:
        light = 0.5 * (second_fur + light)
    palette[Slot.FUR] = fur
    palette[Slot.BODY] = fur * 0.88
    palette[Slot.SHADE] = shade * 0.68
    palette[Slot.LIGHT] = light
    palette[Slot.RIM] = fur * 0.5
    palette[Slot.INNER] = 0.55 * _colours("skin") + 0.45 * fur

    irises = _colours("irises")
    noses = _colours("noses")
    palette[Slot.IRIS] = irises[rng.integers(len(irises))]
    palette[Slot.NOSE] = noses[rng.integers(len(noses))]

    for slot, colour in _tables()["fixed"].items():
        palette[Slot[slot]] = colour
    return np.clip(palette + rng.normal(0, 4, palette.shape), 0, 255)


# ---- from a scene to pixels


def region_map(scene: Scene, image_size: int) -> Image.Image:
    """Paints region ids at three times the image size, mode "L"."""
    side = OVERSAMPLING * image_size
    canvas = Image.new("L", (side, side), region_id(Slot.SCENERY, "background"))
    draw = ImageDraw.Draw(canvas)
    for region, vertices in scene.polygons:
        draw.polygon((vertices * side).ravel().tolist(), fill=region)
    return canvas


def _render(scene: Scene, image_size: int, rng: Generator) -> Pixels:
    """Colours and lights the scene: uint8 [S, S, 3]. The generator is used for the pixel noise only."""
    regions = region_map(scene, image_size)
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    x = axis[None, :]  # [1, S]
    y = axis[:, None]  # [S, 1]

    # The backdrop, where nothing covers it.
    uncovered = _coverage(regions, [region_id(Slot.SCENERY, "background")])  # [S, S]
    striped = uncovered * (1.0 + _stripes(3 * x, 3 * y, scene.ripples[1]))
    backdrop = striped[:, :, None] * _scenery(scene.scenery, image_size)  # [S, S, 3]

    # The brightness of each pixel, as a factor [S, S].
    coat = _coverage(regions, _FACE_REGIONS)
    brightness = 1.0 + coat * _coat_shade(scene, x, y)
    direction, strength = scene.light
    brightness *= 1.0 + strength * _project(direction, x - 0.5, y - 0.5)

    pixels = _coloured(regions, scene.palette) + backdrop
    pixels *= brightness[:, :, None] * scene.gain.astype(np.float32)
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(scene.grain)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _coat_shade(scene: Scene, x: Array, y: Array) -> Array:
    """How much lighter or darker the coat is at each pixel: float32 [S, S]."""
    (xx, xy, x0), (yx, yy, y0) = scene.to_face.astype(np.float32)
    face_x = xx * x + xy * y + x0  # [S, S]
    face_y = yx * x + yy * y + y0

    # A round head darkens towards its edge, as if lit from the camera.
    roundness = 0.1 - 0.2 * np.minimum(face_x**2 + face_y**2, 1.6)
    return np.asarray(roundness + _stripes(face_x, face_y, scene.ripples[0]))


def _coverage(regions: Image.Image, region_ids: Sequence[int]) -> Array:
    """Share of each pixel that these regions cover: float32 [S, S] in 0-1."""
    lookup = np.zeros(256, np.uint8)
    lookup[region_ids] = 255
    covered = regions.point(lookup.tolist())
    return np.asarray(covered.reduce(OVERSAMPLING), np.float32) / np.float32(255)


def _coloured(regions: Image.Image, palette: Floats) -> Array:
    """Palette colours of the region map, averaged down: float32 [S, S, 3]; black where the backdrop is added later."""
    # One row per region id: the slot's colour, whatever the part.
    colours = np.repeat(palette, len(PARTS), axis=0).astype(np.uint8)
    colours[: len(PARTS)] = 0  # Slot.SCENERY
    regions = regions.copy()
    regions.putpalette(colours.tobytes())
    return np.asarray(regions.convert("RGB").reduce(OVERSAMPLING), np.float32)


def _scenery(grid: Array, image_size: int) -> Array:
    """The coarse grid of colours as a smooth backdrop: float32 [S, S, 3]."""
    small = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))
    return np.asarray(small.resize((image_size, image_size), Image.Resampling.BICUBIC), np.float32)


def _project(direction: float, x: Array, y: Array) -> Array:
    """Length of the points (x, y) along a direction, an angle."""
    return np.asarray(np.cos(direction) * x + np.sin(direction) * y)


def _stripes(x: Array, y: Array, ripple: Floats) -> Array:
    """Wavy stripes around 0, float32 [S, S]; a sampled strength of 0 or less means none, so that many are plain."""
    direction, frequency, phase, strength = ripple.tolist()
    if strength <= 0:
        return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    bend = 1.5 * np.sin(3 * _project(direction, y, -x))
    wave = np.sin(frequency * 2 * _project(direction, x, y) + phase + bend)
    return np.asarray(strength * wave, np.float32)


class SyntheticPets(DrawnImages):
    """Drawn animal faces with labels and part masks."""

    name = "synthetic_pets"
    classes = CLASSES
    parts = PARTS

    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3] in RGB order."""
        scene, rng = self._scene(index)
        return _render(scene, self.image_size, rng)

    def part_mask(self, index: int) -> Pixels:
        """The part at the middle of each pixel, uint8 [S, S], an index into `parts`."""
        scene, _ = self._scene(index)
        regions = np.asarray(region_map(scene, self.image_size), np.uint8)  # [3 S, 3 S]
        middle = OVERSAMPLING // 2
        middle_regions = regions[middle::OVERSAMPLING, middle::OVERSAMPLING]  # [S, S]
        return middle_regions % np.uint8(len(PARTS))

    def _scene(self, index: int) -> tuple[Scene, Generator]:
        """The scene, and its generator, which then yields the pixel noise."""
        rng = self.generator(index)
        return sample_scene(self.label(index), rng), rng
