"""1 000 mutated images through `safe_open`, some through `predict` and `fit`: no crash, no hang, bounded memory.

Each run is a process of its own under a limit on its address space (RLIMIT_AS), so that an allocation beyond it fails
in the decoder, and under a time limit. What mutation is, and which formats there are, stands in test_images.py.
"""

import io
import json
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevision.data.images import BadImageError, safe_open
from tests.data.test_images import FORMATS, encoded, mutate, png_chunk, reason, rgb_png
from tests.shared import succeeded

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS"),
]

FUZZED = 1_000
SPARE_MB = 1_000  # of address space, above what the program has before the first image; the worst case takes 572 MB
TIME_S = 300
# Reads the folder's files in order; prints how many were opened, refused, the largest growth in MB, and
# the seconds that the slowest took, read in full and then reduced.
OPEN_ALL = """
import json, resource, sys, time
from pathlib import Path
from moevision.data.images import BadImageError, safe_open
from tests.shared import succeeded
def kb(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
before = kb("VmRSS")
limit = kb("VmSize") * 1024 + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
opened, refused, slowest = 0, 0, 0.0
for file in sorted(Path(sys.argv[1]).iterdir()):
    start = time.process_time()
    try:
        safe_open(file)
        opened += 1
    except BadImageError:
        refused += 1
    try:
        safe_open(file, 8)  # the originals are 64 high: a JPEG may come at a quarter
    except BadImageError:
        pass
    slowest = max(slowest, time.process_time() - start)
print(json.dumps([opened, refused, (kb("VmHWM") - before) / 1024, slowest]))
"""


def pictures(mode: str) -> Image.Image:
    """A smooth image with a little noise, so that the compressed data have something in them."""
    ramp = np.linspace(0, 200, 96 * 64 * 3).reshape(64, 96, 3)
    noise = np.random.default_rng(0).integers(0, 56, ramp.shape)
    image = Image.fromarray((ramp + noise).astype(np.uint8))
    return image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)


def originals() -> list[bytes]:
    """Each format in its several pixel formats and compressions."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ways: list[tuple[str, str, dict[str, Any]]] = [(each, "RGB", {}) for each in FORMATS]
    ways += [("JPEG", "CMYK", {}), ("JPEG", "L", {"progressive": True, "exif": exif})]
    ways += [("PNG", "P", {}), ("PNG", "RGBA", {"exif": exif}), ("PNG", "I;16", {})]
    ways += [("GIF", "P", {}), ("WEBP", "RGBA", {"lossless": True, "exif": exif})]
    compressions = ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")
    ways += [("TIFF", "RGB", {"compression": how}) for how in compressions]
    ways += [("TIFF", "1", {"compression": "group4"}), ("BMP", "P", {}), ("BMP", "1", {})]
    return [encoded(pictures(mode), name, **options) for name, mode, options in ways]


def fuzzed(count: int) -> list[bytes]:
    rng, whole = random.Random(7), originals()
    return [mutate(whole[number % len(whole)], rng) for number in range(count)]


def open_all(folder: Path, spare_mb: int = SPARE_MB) -> tuple[int, int, float, float]:
    """Open all files in a limited process: opened, refused, growth in MB, seconds of the slowest."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, str(folder), str(spare_mb)],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIME_S,
    )
    opened, refused, growth, slowest = json.loads(done.stdout)
    return opened, refused, growth, slowest


def test_a_thousand_mutated_images(tmp_path):
    for number, data in enumerate(fuzzed(FUZZED)):
        (tmp_path / f"{number:04d}.img").write_bytes(data)
    opened, refused, _, slowest = open_all(tmp_path)
    assert opened + refused == FUZZED
    assert opened > 100, "some damage is harmless"
    assert refused > 300, "most isn't"
    assert slowest < 10


def test_mutated_images_through_fit(cli, tiny, tmp_path, own_folder):
    """Training goes on without the unreadable ones, and says which they are."""
    for number, data in enumerate(fuzzed(120)):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.png").write_bytes(data)
    unreadable = sum(not readable(file) for file in (tmp_path / "photos").rglob("*.png"))
    options = ("--data.max_bad_fraction=1", "--trainer.max_epochs=1", "--name=fuzzed")
    succeeded(cli("fit", "photos", *tiny[:-2], *options, "--trainer.enable_progress_bar=false"))
    listed = (tmp_path / "runs" / "fuzzed" / "bad_images.csv").read_text().splitlines()
    assert len(listed) - 1 == unreadable > 30


def readable(file: Path) -> bool:
    try:
        safe_open(file)
    except BadImageError:
        return False
    return True


@pytest.mark.deep
def test_the_largest_pictures_take_bounded_memory(tmp_path):
    """50 megapixels in a few KB are let in. Pillow holds a colour in 4 bytes and makes copies: 572 MB, 765 in a row."""
    side = 7_071  # 7071² is just below 50 million
    for name, mode, options in (
        ("PNG", "RGBA", {"compress_level": 1}),
        ("PNG", "I;16", {"compress_level": 1}),
        ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
        ("JPEG", "RGB", {"progressive": True}),
        ("GIF", "P", {}),
    ):
        (tmp_path / f"{name}{mode.replace(';', '')}").write_bytes(
            encoded(Image.new(mode, (side, side)), name, **options)
        )
    opened, refused, growth, slowest = open_all(tmp_path)
    assert (opened, refused) == (5, 0)
    assert 250 < growth < 900
    assert slowest < 10


def test_too_little_memory_is_a_bad_image_error(tmp_path):
    """Not a MemoryError that ends a training: 200 MB are asked for, and 100 MB are left."""
    (tmp_path / "large.png").write_bytes(
        encoded(Image.new("RGB", (7_071, 7_071)), "PNG", compress_level=1)
    )
    assert open_all(tmp_path, spare_mb=100)[:2] == (0, 1)


ZEROS = zlib.compress(bytes(200_000_000), 9)  # 200 KB
SMALL = png_chunk(b"IDAT", zlib.compress(bytes(16 * 49))) + png_chunk(b"IEND", b"")
HEADER = rgb_png(16, 16, b"")[:33]  # signature and IHDR


def test_compressed_metadata_are_bounded(tmp_path):
    """Texts and colour profiles that would unfold to 200 MB, and pixels that go on behind the image's end."""
    bombs = {
        "zTXt": HEADER + png_chunk(b"zTXt", b"a\0\0" + ZEROS) + SMALL,
        "iTXt": HEADER + png_chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS) + SMALL,
        "iCCP": HEADER + png_chunk(b"iCCP", b"a\0\0" + ZEROS) + SMALL,
        "IDAT": HEADER + png_chunk(b"IDAT", ZEROS) + png_chunk(b"IEND", b""),
        "tEXt": HEADER + png_chunk(b"tEXt", b"a\0" + b"x" * 1_000) * 20_000 + SMALL,
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    opened, refused, growth, slowest = open_all(tmp_path)
    assert opened + refused == len(bombs)
    assert growth < 100
    assert slowest < 5


def scans(count: int, *, end: bytes = b"\xff\xd9") -> bytes:
    """A progressive JPEG, 2 000 x 2 000 px, whose last scan is repeated."""
    whole = encoded(Image.new("RGB", (2_000, 2_000), (9, 99, 200)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * count + end


def test_a_jpeg_of_countless_scans_is_refused_at_once():
    """Each scan costs a pass over the image: 200 000 of them in a file of 6 MB would take most of an hour."""
    start = time.process_time()
    assert "more than 100 scans" in reason(scans(200_000))
    assert "countless segments" in reason(
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * 100_000 + scans(0)[2:]
    )
    assert time.process_time() - start < 2


def test_repeated_exif_headers_are_refused_at_once():
    """Each would cost a copy of all that follow: 1.4 million of them, 8 MB, took minutes."""
    start = time.process_time()
    for count in (4, 1_400_000):
        many = b"Exif\0\0" * count
        assert "repeated Exif" in reason(HEADER + png_chunk(b"eXIf", many) + SMALL)
        part = b"\xff\xe1" + struct.pack(">H", min(len(many), 60_000) + 2) + many[:60_000]
        assert "repeated Exif" in reason(
            b"\xff\xd8" + part * (1 + len(many) // 60_000) + scans(0)[2:]
        )
    assert time.process_time() - start < 2


def test_a_jpeg_of_ten_scans_and_a_video_behind_it_is_read():
    """What phones write: an embedded preview, restart markers, and data behind the end that look like scans."""
    assert safe_open(io.BytesIO(scans(80))).size == (2_000, 2_000)
    behind = b"\xff\xd9" + b"\xff\xda\x00\x08" * 1_000
    assert safe_open(io.BytesIO(scans(0, end=behind))).size == (2_000, 2_000)
    preview = b"\xff\xe1" + struct.pack(">H", 4_002) + b"\xff\xda\x00\x08" * 1_000
    whole = encoded(pictures("RGB"), "JPEG", progressive=True, restart_marker_blocks=1)
    assert safe_open(io.BytesIO(whole[:2] + preview + whole[2:])).size == (96, 64)
