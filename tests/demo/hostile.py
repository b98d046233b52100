"""Hostile requests for the explorer, made from one seed: what a broken client or a bored student may send."""

import base64
import io
import json
import random
import struct
import zlib

from PIL import Image

EXAMPLE = {"kind": "example", "id": "pets/test/3"}
ROUTE = {"model": "pets", "variant": "trained", "picture": EXAMPLE}
CHANGE = {"kind": "ablate", "layer": 3, "expert": 1}
NOT_A_NAME = [
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "pets/../../x",
    "nope",
    "a" * 10_000,
    "\x00",
    "<img src=x onerror=alert(1)>",
    "pets/test/-1",
    "pets/test/99999999999999999999",
    "photo/../lion",
    "data//etc/passwd",
    "file:///etc/passwd",
    "http://localhost/",
    "__class__",
    "${7*7}",
    "{{7*7}}",
    "pets/test/3\n",
    "🦊",
]
TYPED = [
    "🐶" * 12,
    "🐶" * 11,
    "🐶" * 100_000,
    "👍🏽" * 12,
    "🇽🇽" * 12,
    "👨\u200d" * 12,
    "\u200d" * 400,
    "\ufe0f" * 400,
    "\ud83d" * 12,
    "\x00" * 12,
    "\x1b[31m" * 12,
    "\u202e" * 12,
    "<script>" * 12,
    "",
    " " * 12,
]
NOT_A_NUMBER = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1",
    "99",
    "1e9",
    "2.5",
    "true",
    '"2"',
    "[]",
    "{}",
    "10" * 60,
]
ADDRESSES = [
    "http://169.254.169.254/latest/meta-data/",
    "http://localhost:22/",
    "http://127.0.0.1:7860/config",
    "file:///etc/passwd",
    "ftp://x/",
    "//evil.example/x.png",
    "https://example.com/cat.jpg",
    "gopher://127.0.0.1:25/",
]
PATHS = [
    "/etc/passwd",
    "../../../../etc/passwd",
    "C:\\Windows\\win.ini",
    "~/.ssh/id_rsa",
    "/proc/self/environ",
    "\\\\host\\share",
    "card.json",
    "/dev/zero",
]


def png(width: int, height: int, bits: int, colour: int, compressed: bytes) -> bytes:
    """A PNG of these compressed rows, chunk by chunk (W3C PNG, 5.3)."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", compressed)
        + chunk(b"IEND", b"")
    )


def png_bomb(width: int, height: int) -> bytes:
    """A black 1-bit PNG of any size, a few kilobytes long."""
    rows = b"\0" * min((1 + (width + 7) // 8) * height, 16_000_000)
    return png(width, height, 1, 0, zlib.compress(rows, 9))


def large_png(side: int) -> bytes:
    """A clear RGBA PNG with every row of its pixels: 13,300 px are 0.7 MB, and 0.7 GB once they are decoded."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + 4 * side)
    rows = [compressor.compress(row) for _ in range(side)]
    return png(side, side, 8, 6, b"".join(rows) + compressor.flush())


def picture_bytes(kind: str, size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 60, 20)).save(buffer, kind)
    return buffer.getvalue()


def uri(data: bytes, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def uploads(rng: random.Random) -> list[str]:
    """Texts in the place of an image, none of which is one."""
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://169.254.169.254/"/><script>alert(1)</script></svg>'
    found = [
        uri(png_bomb(11_000, 11_000)),
        uri(png_bomb(70_000, 1)),
        uri(png_bomb(1, 70_000)),
        uri(png_bomb(2**31 - 1, 2**31 - 1)),
    ]
    found += [
        uri(svg, "image/svg+xml"),
        uri(b""),
        uri(b"GIF89a"),
        uri(b"%PDF-1.7"),
        uri(b"\x80\x04K\x01."),
        uri(b"PK\x03\x04" * 9),
    ]
    found += [
        uri(b"#!/bin/sh\nrm -rf /"),
        uri(b"\x89HDF\r\n\x1a\n" * 9),
        uri(b"%!PS-Adobe-3.0 EPSF"),
        uri(b"8BPS" + bytes(40)),
    ]
    found += [
        "data:image/png;base64,",
        "data:image/png,hello",
        "data:",
        "base64",
        "====",
        "a" * 12_000_000,
        "\ud83d",
        "%2e%2e%2f",
    ]
    for kind in (
        "PNG",
        "JPEG",
        "WEBP",
        "BMP",
        "GIF",
        "TIFF",
    ):  # cut short in the header, in the middle, and scrambled
        whole = picture_bytes(kind)
        found += [uri(whole[:length]) for length in (2, 5, 12, 21, 30, 40)]
        scrambled = bytearray(whole)
        scrambled[12:40] = rng.randbytes(28)
        found.append(uri(bytes(scrambled)))
    return found + ADDRESSES + PATHS + [uri(text.encode()) for text in ADDRESSES + PATHS]


def body(data_json: str, name="route") -> tuple[str, str]:
    """A question to the page by its name; `data_json` goes in as it is, so that it may be what JSON can't say."""
    return name, data_json


def calls() -> list[tuple[str, str]]:
    """(name, body) of questions, every one of which must be refused."""
    rng = random.Random(0)
    found = [
        body(json.dumps({**ROUTE, "picture": {"kind": "upload", "data": text}}))
        for text in uploads(rng)
    ]
    for name in NOT_A_NAME:
        found += [body(json.dumps({**ROUTE, field: name})) for field in ("model", "variant")]
        found.append(body(json.dumps({**ROUTE, "picture": {"kind": "example", "id": name}})))
        found += [
            body(json.dumps({"model": "pets", "picture": name}), asked)
            for asked in ("sharp", "history")
        ]
        found.append(body(json.dumps({"model": "pets", "list": name, "class": name}), "data"))
        found.append(body(json.dumps({"model": "pets", "a": name, "b": "dog"}), "compare"))
        found.append(
            body(json.dumps({"model": "pets", "layer": 1, "expert": 0, "class": name}), "cell")
        )
    # Typed pages, of a model that knows no emoji.
    found.append(body(json.dumps({"model": "pets"}), "emoji"))
    for text in TYPED:
        found.append(body(json.dumps({**ROUTE, "picture": {"kind": "page", "text": text}})))
    for number in NOT_A_NUMBER:
        found += [
            body(json.dumps(ROUTE)[:-1] + f', "{field}": {number}}}')
            for field in ("top_k", "intervention")
        ]
        for field in ("layer", "expert", "seed") if number != "99" else ("layer", "expert"):
            change = json.dumps({name: value for name, value in CHANGE.items() if name != field})[
                :-1
            ]
            found.append(
                body(
                    json.dumps(ROUTE)[:-1] + f', "intervention": {change}, "{field}": {number}}}}}',
                    "what_if",
                )
            )
        if number not in ("2.5", "-1", "99"):
            found.append(body(json.dumps(ROUTE)[:-1] + f', "capacity": {number}}}'))
        found.append(body(f'{{"model": "pets", "layer": {number}}}', "experts"))
        if number != "99":
            found.append(body(f'{{"model": "pets", "start": {number}}}', "examples"))
    for value in (
        "null",
        "[]",
        "7",
        '"route"',
        "true",
        '{"unknown": 1}',
        "[" * 500 + "]" * 500,
        '{"model": ' * 200 + "1" + "}" * 200,
    ):
        found += [body(value, name) for name in ("route", "what_if", "sharp", "cell", "compare")]
    found.append(body(json.dumps({"model": "pets", "a": "cat", "b": "cat"}), "compare"))
    found.append(body(json.dumps({"model": "pets", "a": "cat", "b": ["dog"]}), "compare"))
    found.append(body(json.dumps({**ROUTE, "away": [[1, 0]]}), "fewest"))
    found.append(
        body(json.dumps({**ROUTE, "intervention": {**CHANGE, "fill": "rm -rf"}}), "what_if")
    )
    return list(dict.fromkeys(found))


def raw() -> list[tuple[str, str, bytes]]:
    """(method, path, body) of requests past the page; bodies are JSON unless they can't be."""
    found = [
        ("POST", f"api/{name}", json.dumps(ROUTE).encode())
        for name in (
            "get_config",
            "__init__",
            "answer",
            "_repr_html_",
            "x" * 9_999,
            "",
            "route/",
            "../config",
            "%2e%2e",
        )
    ]
    found += [
        ("POST", "api/route", text)
        for text in (b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"a":' * 99_999, b"[" * 99_999)
    ]
    found += [
        ("POST", "api/route", b"x" * 13_000_000),
        ("POST", "login", b"x" * 100_000),
        ("POST", "gradio_api/call/route", json.dumps(ROUTE).encode()),
    ]
    files = (
        "/etc/passwd",
        "../../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "http://169.254.169.254/",
        "http://localhost:22/",
        "app.py",
    )
    found += [
        ("GET", f"{door}{file}", b"") for door in ("file=", "gradio_api/file=") for file in files
    ]
    found += [
        ("GET", f"{folder}/..%2f..%2f..%2f..%2fetc%2fpasswd", b"")
        for folder in ("static", "assets", "svelte")
    ]
    found += [
        ("GET", path, b"")
        for path in ("config", "monitoring", "openapi.json", "docs", "redoc", "logout", "nothing")
    ]
    return [
        *found,
        ("DELETE", "", b""),
        ("PUT", "api/route", b"{}"),
        ("PATCH", "api/route", b"{}"),
        ("TRACE", "", b""),
    ]
