"""safe_open: any image file comes out as the RGB image a viewer shows, or as one BadImageError."""

import functools
import io
import os
import random
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevision.data import SyntheticPets
from moevision.data.images import BadImageError, full_size, is_image_path, safe_open
from moevision.data.transforms import Pixels, base_pixels, base_side, square_pixels
from tests.data.conftest import refusal

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SHARPEST: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
}


def quadrants(width: int = 16, height: int = 8) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right: every turn is visible."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def rgb_png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG that announces a size, whatever its compressed rows hold."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def opened(data: bytes, **options: Any) -> Pixels:
    """The pixels [H, W, 3] of an encoded image."""
    return np.asarray(safe_open(io.BytesIO(data), **options)).astype(int)


def reason(data: bytes, **limits: int) -> str:
    with pytest.raises(BadImageError) as caught:
        safe_open(io.BytesIO(data), **limits)  # type: ignore[arg-type]
    return caught.value.reason


@pytest.mark.parametrize("image_format", FORMATS)
def test_plain_picture_keeps_its_pixels(tmp_path, image_format):
    picture = quadrants()
    path = tmp_path / "picture.dat"  # the name has no say in which decoder runs
    path.write_bytes(encoded(picture, image_format, **SHARPEST.get(image_format, {})))
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        image = safe_open(source)
        assert (type(image), image.mode, image.size) == (Image.Image, "RGB", (16, 8))
        difference = np.asarray(image).astype(int) - np.asarray(picture)
        assert np.abs(difference).max() <= (6 if image_format == "JPEG" else 0)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(image_format, orientation):
    # Stored is the upright image under the inverse turn; numpy spells the turns of Exif 2.32, table 4.
    upright = np.asarray(quadrants())
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = SHARPEST.get(image_format, {})
    image = Image.fromarray(np.ascontiguousarray(stored))
    found = safe_open(io.BytesIO(encoded(image, image_format, exif=exif, **options)))
    assert np.abs(np.asarray(found).astype(int) - upright).max() <= 6
    assert found.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "big-endian TIFF"])
def test_sixteen_bit_grey_is_scaled_and_rounded_not_clipped(image_format):
    """257 steps of 16 bits are one of 8: 128 is nearer to 0, 129 to 1; 1000 / 257 = 3.89, 40000 / 257 = 155.6."""
    levels = np.array([[0, 128, 129, 257, 1000, 40_000, 65_406, 65_407, 65_535]], np.uint16)
    image = Image.fromarray(levels)
    if image_format == "big-endian TIFF":
        image = Image.frombytes("I;16B", (levels.size, 1), levels.astype(">u2").tobytes())
    grey = opened(encoded(image, image_format.removeprefix("big-endian ")))[0]
    assert (grey.T == [0, 0, 1, 1, 4, 156, 254, 255, 255]).all()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(image_format):
    pixels = np.array(
        [[(255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 51)]], np.uint8
    )  # 51 / 255 = 0.2
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    found = opened(encoded(Image.fromarray(pixels), image_format, **options))
    assert found.tolist() == [[[255, 255, 255], [255, 0, 0], [204, 204, 204]]]


PALETTE = Image.new("P", (3, 3), 1)
PALETTE.putpalette([0, 0, 0, 10, 20, 30])
KEYED = Image.new("RGB", (3, 3), (9, 8, 7))
WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "transparency", "colour"),
    [
        (Image.new("L", (3, 3), 90), None, (90, 90, 90)),
        (Image.new("1", (3, 3), 1), None, WHITE),
        (Image.new("LA", (3, 3), (0, 0)), None, WHITE),
        (PALETTE, None, (10, 20, 30)),
        (PALETTE, 1, WHITE),
        (PALETTE, bytes([255, 0]), WHITE),
        (KEYED, (9, 8, 7), WHITE),
    ],
)
def test_grey_bilevel_palette_and_their_transparency(image, transparency, colour):
    options = {} if transparency is None else {"transparency": transparency}
    assert tuple(opened(encoded(image, "PNG", **options))[0, 0]) == colour


def test_cmyk():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(opened(encoded(red, "JPEG", quality=100)) - (255, 0, 0)).max() < 10


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_read(image_format):
    frames = [
        Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))
    ]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames") == 3  # noqa: B009 - absent in the stub
    assert np.abs(opened(data)[4, 4] - (200, 0, 0)).max() <= 4 * (image_format == "MPO")


def test_truncated_empty_and_non_image_files_say_what_is_wrong():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for image_format in FORMATS:
        data = encoded(noise, image_format)
        assert "damaged" in reason(data[: len(data) // 2]), image_format
    assert "empty" in reason(b"")
    # Formats that Pillow reads, but that are not let in: PostScript would start Ghostscript.
    not_let_in = [encoded(noise, name) for name in ("EPS", "PPM")]
    for data in (
        b"%PDF-1.7 no image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        bytes(100),
        *not_let_in,
    ):
        assert "is not a JPEG" in reason(data)


def test_formats_without_a_known_range_are_refused():
    for mode, value in (("F", 0.5), ("I", 70_000)):
        assert f"pixel format {mode}" in reason(encoded(Image.new(mode, (4, 4), value), "TIFF"))


def test_giant_pictures_and_files_are_refused():
    # There is a header and no pixel at all: decoding would say "damaged".
    assert "limit of 50,000,000" in reason(rgb_png(11_000, 11_000, b""))  # Pillow only warns here
    assert "limit of 50,000,000" in reason(rgb_png(16_384, 16_384, b""))  # and raises here
    assert "longest side of 16,384" in reason(rgb_png(70_000, 1, b""))
    assert "damaged" in reason(rgb_png(7_000, 7_000, b""))  # within the limits: decoded
    small = encoded(quadrants(), "PNG")
    assert "limit of 127" in reason(small, max_pixels=127)
    assert "larger than" in reason(small, max_bytes=len(small) - 1)
    assert opened(small, max_pixels=128, max_bytes=len(small)).shape == (8, 16, 3)


def test_no_more_than_256_mib_are_read_and_one_byte_to_see_that_there_are_more():
    class Asked(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            self.size = size
            return super().read(size)

    stream = Asked(encoded(quadrants(), "PNG"))
    safe_open(stream)
    assert stream.size == 256 * 2**20 + 1


def test_paths_that_are_no_readable_file(tmp_path):
    with refusal("no such file", kind=BadImageError) as error:
        safe_open(tmp_path / "missing.jpg")
    assert error.value.path == str(tmp_path / "missing.jpg")
    with refusal("not a regular file", kind=BadImageError):
        safe_open(tmp_path)
    for odd in ("nul\0byte.png", "x" * 5000):
        with refusal("cannot use the image", kind=BadImageError):
            safe_open(odd)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with refusal("not a regular file", kind=BadImageError):
        safe_open(tmp_path / "pipe.png")


def test_threads_share_it_and_leave_pillow_as_it_was():
    before = (Image.MAX_IMAGE_PIXELS, list(Image.ID))
    data = [encoded(quadrants(8 + 2 * i, 8), "PNG") for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda blob: safe_open(io.BytesIO(blob)).size, data))
    assert sizes == [(8 + 2 * i, 8) for i in range(40)]
    assert (Image.MAX_IMAGE_PIXELS, list(Image.ID)) == before


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damages a file as disks, networks and attackers do: cut short, flipped bits, an edited header."""
    damaged = bytearray(data)
    kind = rng.choice(("cut", "flip", "header", "splice"))
    if kind == "cut":
        return bytes(damaged[: rng.randrange(len(damaged))])
    if kind == "splice":
        start = rng.randrange(len(damaged))
        return bytes(damaged[:start] + damaged[start + rng.randrange(1, 40) :])
    span = len(damaged) if kind == "flip" else min(64, len(damaged))
    for _ in range(rng.randrange(1, 8)):
        damaged[rng.randrange(span)] = rng.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize("image_format", FORMATS)
def test_damaged_files_give_a_picture_or_a_bad_image_error(image_format):
    rng = random.Random(f"damage {image_format}")
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, Any] = {} if image_format in ("BMP", "GIF") else {"exif": exif}
    if image_format == "TIFF":
        options["compression"] = "tiff_lzw"
    whole = encoded(quadrants(48, 32), image_format, **options)
    refused: list[BadImageError] = []
    for _ in range(60):
        try:
            found = safe_open(io.BytesIO(mutate(whole, rng)), max_pixels=1_000_000)
        except BadImageError as error:
            refused.append(error)
        else:
            assert found.mode == "RGB"
            assert found.width * found.height <= 1_000_000
            found.getpixel((found.width - 1, found.height - 1))
    assert len(refused) >= 5  # the damage is real
    assert all(error.path == "<stream>" and error.reason for error in refused)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_decompression_bomb_costs_no_memory():
    rows = zlib.compress(bytes(11_000 * (1 + 11_000 * 3) // 100), 9) * 100
    bomb = rgb_png(11_000, 11_000, rows)

    def resident_kb() -> int:
        """The peak, so memory given back still counts."""
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    before = resident_kb()
    assert "limit of 50,000,000" in reason(bomb)
    assert resident_kb() - before < 50_000  # its pixels would take 363 MB


@pytest.mark.parametrize(
    "name", ["a.jpg", "A.JPEG", "b/c.PnG", "d.webp", "e.bmp", "f.gif", "g.TIF", "h.d/x.jpe"]
)
def test_image_paths_are_recognised_by_suffix(name):
    assert is_image_path(name)
    assert is_image_path(Path(name))
    assert not is_image_path(f"{name}.json")
    assert not is_image_path(Path(name).with_name(f"._{Path(name).name}"))


@pytest.mark.parametrize("name", ["a.txt", "jpg", "b/.hidden.png", "a.svg"])
def test_other_paths_are_no_images(name):
    assert not is_image_path(name)


# Large JPEGs, decoded reduced


@functools.cache
def scene(width: int, height: int) -> Image.Image:
    """A drawn animal with film grain, as an upright photo of this size."""
    drawn = SyntheticPets(4, 400).image(1)
    pixels = np.asarray(
        Image.fromarray(drawn).resize((width, height), Image.Resampling.BICUBIC), np.float32
    )
    grain = np.random.default_rng(0).normal(0, 4, pixels.shape)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def as_seen(data: bytes, image_size: int, *, square: bool, reduced: bool) -> np.ndarray:
    side = image_size if square else base_side(image_size)
    image = safe_open(io.BytesIO(data), side if reduced else None)
    return (square_pixels if square else base_pixels)(image, image_size).astype(int)


# Upright and turned by 90 degrees (5 to 8), each once as a square.
@pytest.mark.parametrize(("turn", "square"), [(turn, turn in (1, 4, 6, 7)) for turn in range(1, 9)])
@pytest.mark.parametrize(
    ("size", "divisor"),
    [
        ((1600, 1200), 8),
        ((1200, 1600), 8),
        ((1003, 601), 4),
        ((401, 402), 2),
        ((403, 402), 2),
        ((500, 375), 2),
    ],
    ids=str,
)
def test_a_reduced_jpeg_shrinks_to_nearly_the_same_pixels(size, divisor, turn, square):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(scene(*size), "JPEG", quality=92, exif=exif)
    image = safe_open(io.BytesIO(data), 69)
    # 2 x 69 = 138 pixels must be left of the short side: 1200 / 8 = 150, 601 / 4 = 150.25, 402 / 2 and 375 / 2
    has_remainder = any(side % divisor for side in size)
    if turn > 1 and has_remainder:  # turned: without remainder, or not at all
        divisor = 1
    upright = size if turn < 5 else size[::-1]
    assert full_size(image) == (upright, divisor)
    assert image.size == tuple(-(-side // divisor) for side in upright)
    exact, found = (as_seen(data, 60, square=square, reduced=reduced) for reduced in (False, True))
    assert found.shape == exact.shape
    difference = np.abs(found - exact)
    # measured over all cases of this test: at most 6 grey levels in a pixel, and 0.40 on average
    assert difference.max() <= (0 if divisor == 1 else 8)
    assert difference.mean() <= 0.5


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_other_kinds_of_jpeg_are_reduced_too(mode, progressive):
    data = encoded(scene(800, 600).convert(mode), "JPEG", quality=92, progressive=progressive)
    image = safe_open(io.BytesIO(data), 64)
    assert (image.mode, image.size, full_size(image)) == ("RGB", (200, 150), ((800, 600), 4))
    exact, found = (as_seen(data, 64, square=True, reduced=reduced) for reduced in (False, True))
    assert np.abs(found - exact).max() <= 8


@pytest.mark.parametrize("image_format", FORMATS)
def test_what_is_not_much_larger_is_not_touched(image_format):
    """Nor is any other format, however large."""
    width, height = (511, 383) if image_format == "JPEG" else (1024, 768)
    data = encoded(scene(width, height), image_format)
    exact, asked = (safe_open(io.BytesIO(data), side) for side in (None, 96))  # 383 < 2 x 2 x 96
    assert full_size(asked) == ((width, height), 1)
    np.testing.assert_array_equal(np.asarray(asked), np.asarray(exact))


def test_limits_hold_for_the_full_size_of_a_reduced_jpeg():
    data = encoded(Image.new("RGB", (1600, 1200)), "JPEG")
    with refusal("1600 x 1200", kind=BadImageError):
        safe_open(io.BytesIO(data), 16, max_pixels=1_900_000)
    with refusal("truncated or damaged", kind=BadImageError):
        safe_open(io.BytesIO(data[: len(data) // 2]), 16)


def test_a_text_in_a_foreign_picture_is_not_its_size():
    image = quadrants()
    image.info["full_size"] = "1x1"
    assert full_size(image) == ((16, 8), 1)
    assert square_pixels(image, 8).shape == (8, 8, 3)
