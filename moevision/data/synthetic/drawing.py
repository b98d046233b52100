"""Images of `SyntheticPets`: one random scene, drawn once as a region map, then coloured and lit.

A scene is everything about an image that does not depend on its size in pixels: polygons, palette, light.
Its polygons are painted into a map of region ids at three times the final size. The image is that map seen
through the palette, averaged down (anti-aliased), and lit; the part mask is the middle pixel of every 3 x 3
block of the same map. So the mask fits the image by construction.

Axis legend: S image size in pixels, V vertices of a face. Frame coordinates run from 0 to 1, x right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from moevision.data.synthetic.faces import PARTS, Face, Group, Points, Slot, face, region_id

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
    [(206, 172, 60), (120, 168, 84), (96, 150, 196), (150, 92, 44), (218, 132, 48), (92, 62, 40)], np.float64
)
_NOSES: Final = np.array([(214, 122, 122), (44, 36, 38), (92, 58, 50), (226, 158, 70)], np.float64)

_FACE_REGIONS: Final = [
    region_id(slot, part) for slot in range(Slot.BODY, Slot.WHISKER + 1) for part in PARTS if part != "eye"
]
# Lookup tables over the 256 region ids: region -> 255 where the layer shows.
_SCENERY_TABLE: Final = [255 if region == region_id(Slot.SCENERY, "background") else 0 for region in range(256)]
_COAT_TABLE: Final = [255 if region in _FACE_REGIONS else 0 for region in range(256)]
_PART_TABLE: Final = np.array([region % len(PARTS) for region in range(256)], np.uint8)


@dataclass(frozen=True)
class Scene:
    """An image before it has pixels.

    Attributes:
        polygons: (region id, vertices [n, 2] in frame coordinates) in painting order.
        palette: RGB 0-255 of every slot, [slots, 3].
        scenery: Coarse grid of background colours, float32 [4, 4, 3].
        to_face: Map [2, 3] from frame coordinates to face coordinates, for shading.
        ripples: (direction, frequency, phase, strength) of the stripes of coat and background, [2, 4].
        light: (direction, strength) of the light's slope across the frame.
        gain: Brightness of each colour channel, [3].
        grain: Standard deviation of the pixel noise, in units of 0-255.
    """

    polygons: list[tuple[int, Points]]
    palette: npt.NDArray[np.float64]
    scenery: npt.NDArray[np.float32]
    to_face: Points
    ripples: npt.NDArray[np.float64]
    light: tuple[float, float]
    gain: npt.NDArray[np.float64]
    grain: float


def sample_scene(label: int, rng: np.random.Generator) -> Scene:
    """Draws pose, colours, clutter, occlusion and light for one animal."""
    template = face(label)
    to_frame = _pose(template, rng)
    vertices = _vary(template, rng) @ to_frame[:, :2].T + to_frame[:, 2]
    animal = [
        (region, vertices[start:end]) for region, (start, end) in zip(template.regions, template.ranges, strict=True)
    ]
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
    count = len(Group)
    tilt = rng.uniform(-1, 1, count) * (0.25, 0.0, 0.2, 0.2, 0.0, 0.0)
    stretch = 1 + rng.uniform(-1, 1, (count, 2)) * ((0.2,), (0.05,), (0.13,), (0.13,), (0.1,), (0.08,))
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


def _blobs(centers: Points, radii: npt.NDArray[np.float64], rng: np.random.Generator) -> list[Points]:
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


def _occluders(to_frame: Points, template: Face, rng: np.random.Generator) -> list[tuple[int, Points]]:
    """Up to two objects in front, near the head's edge, so that some parts hide but never all."""
    count = int(rng.integers(0, 3))
    angle, distance = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.5, 1.0, count) * template.half_size
    on_face = template.center + np.stack([np.cos(angle), np.sin(angle)], axis=1) * distance[:, None]
    shapes = _blobs(on_face @ to_frame[:, :2].T + to_frame[:, 2], rng.uniform(0.05, 0.14, count), rng)
    return [(region_id(Slot.OCCLUDER + i, "occluder"), shape) for i, shape in enumerate(shapes)]


def _palette(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """RGB of every slot, [slots, 3]; no argument says which animal it is for."""
    palette = rng.uniform(15, 240, (Slot.WHISKER + 1, 3))
    palette[: Slot.BODY] += 0.4 * (palette[: Slot.BODY].mean(axis=1, keepdims=True) - palette[: Slot.BODY])
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


def part_mask(scene: Scene, image_size: int) -> npt.NDArray[np.uint8]:
    """The part, as an index into `PARTS`, at the middle of each pixel: uint8 [S, S]."""
    middle = OVERSAMPLING // 2
    regions = np.asarray(region_map(scene, image_size))[middle::OVERSAMPLING, middle::OVERSAMPLING]
    return np.asarray(_PART_TABLE[regions])


def render(scene: Scene, image_size: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
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
    pixels = _coloured(regions, scene.palette) + backdrop[:, :, None] * _scenery(scene.scenery, image_size)
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
    x: npt.NDArray[np.floating[Any]], y: npt.NDArray[np.floating[Any]], ripple: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Wavy stripes around 0; a strength below 0 means none, so that many coats and walls are plain."""
    direction, frequency, phase, strength = ripple.tolist()
    if strength <= 0:
        return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    along = np.cos(direction) * x + np.sin(direction) * y
    across = np.cos(direction) * y - np.sin(direction) * x
    return np.asarray(strength * np.sin(frequency * 2 * along + phase + 1.5 * np.sin(3 * across)), np.float32)
