"""One visitor of the explorer asks for much at once: what does another one get?

    python -m benchmarks demo-stall --out benchmarks/demo/stall.json

Starts `moevision demo` on loopback. A crowd of connections from 127.0.0.2 sends one image again and again, each as soon
as it has its answer; a visitor at 127.0.0.3 sends a small one every .2 s, before the crowd and during it. The crowd's
images, one after another: 49 megapixels of PNG in 381 KB (7000 x 7000, 16 bits, transparent), 16 megapixels of the same
kind, and a noisy JPEG of 400 x 400. Crowd, visitor and server share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import statistics
import struct
import time
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.demo import running_demo
from benchmarks.demo.load import ask, rss_mb, wait_until_ready
from benchmarks.harness import about, argument_parser, write_result

CROWD, VISITOR = "127.0.0.2", "127.0.0.3"
WAIT_S = 60.0  # for an answer
PAUSE_S = 0.2
BEGIN_S = 5.0  # until the crowd fills every place


def png(side: int) -> bytes:
    """A transparent square of 16-bit colours: 8 bytes a pixel, nearly all of which deflate takes away."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header, packed, row = (
        struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0),
        zlib.compressobj(9),
        bytes(1 + 8 * side),
    )
    rows = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def jpeg(side: int) -> bytes:
    """Noise from seed 0."""
    pixels, file = (
        np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8),
        io.BytesIO(),
    )
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


ATTACKS = {
    "png_49_megapixels": (png, 7000),
    "png_16_megapixels": (png, 4000),
    "jpeg_400": (jpeg, 400),
}


def body(model: str, image: bytes) -> bytes:
    """The question `route` with an upload."""
    return json.dumps(
        {"model": model, "picture": {"kind": "upload", "data": base64.b64encode(image).decode()}}
    ).encode()


async def call(http: httpx.AsyncClient, content: bytes) -> tuple[str, float]:
    """What became of a request (ok, busy, another code of an error, or unanswered), and its seconds."""
    start = time.perf_counter()
    try:
        headers = {"content-type": "application/json"}
        answer = await http.post("api/route", content=content, headers=headers)
        word = answer.json().get("code", "ok")
    except (httpx.HTTPError, ValueError):
        word = "unanswered"
    return word, time.perf_counter() - start


def client(url: str, address: str) -> httpx.AsyncClient:
    """One connection from an address."""
    return httpx.AsyncClient(
        base_url=url, timeout=WAIT_S, transport=httpx.AsyncHTTPTransport(local_address=address)
    )


def crowd(url: str, content: bytes, connections: int, seconds: float, told: Any) -> None:
    """Ask for `seconds` and leave; the queue `told` gets a word at the beginning, and what was answered at the end."""
    met: Counter[str] = Counter()

    async def one() -> None:
        async with client(url, CROWD) as http:
            while True:
                word, _ = await call(http, content)
                met[word] += 1

    async def everyone() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(one() for _ in range(connections))), seconds)

    told.put("begun")
    asyncio.run(everyone())
    told.put(dict(met))


def visit(url: str, content: bytes, seconds: float, pid: int) -> tuple[dict[str, Any], float]:
    """The answers of one visitor, and the most memory of the server in that time."""

    async def talk() -> tuple[dict[str, Any], float]:
        met, latencies, most = Counter[str](), [], 0.0
        end = time.monotonic() + seconds
        async with client(url, VISITOR) as http:
            while time.monotonic() < end:
                word, took_s = await call(http, content)
                met[word] += 1
                latencies += [1e3 * took_s] if word == "ok" else []
                most = max(most, rss_mb(pid))
                await asyncio.sleep(PAUSE_S)
        p50, longest = (
            round(of(latencies), 1) if latencies else None for of in (statistics.median, max)
        )
        return {"ok": 0, **met, "p50_ms": p50, "max_ms": longest}, most

    return asyncio.run(talk())


def attack(image: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """A fresh server, the visitor alone, and beside the crowd."""
    spawn = multiprocessing.get_context(
        "spawn"
    )  # a process of its own, so that crowd and visitor don't wait for each other
    with running_demo(*([options.model] if options.model else [])) as (pid, url):
        wait_until_ready(url)
        model = ask(url, "boot", {})["models"][0]["id"]
        small = io.BytesIO()
        Image.new("RGB", (64, 64), (9, 200, 9)).save(small, "PNG")
        visitor = body(model, small.getvalue())
        alone, before = visit(url, visitor, options.seconds / 6, pid)
        told = spawn.Queue()
        seconds = BEGIN_S + options.seconds
        process = spawn.Process(
            target=crowd, args=(url, body(model, image), options.connections, seconds, told)
        )
        process.start()
        told.get(timeout=2 * WAIT_S)
        time.sleep(BEGIN_S)
        beside, most = visit(url, visitor, options.seconds, pid)
        met = told.get(timeout=2 * WAIT_S)
        process.join()
        memory = {"before_mb": before, "most_mb": most}
    return {
        "bytes": len(image),
        "visitor_alone": alone,
        "visitor": beside,
        "crowd": met,
        "server_rss": memory,
    }


def main() -> None:
    """Measure and print."""
    parser = argument_parser("demo-stall", __doc__)
    parser.add_argument("model", nargs="?", help="a run folder (the bundled models)")
    parser.add_argument("--connections", type=int, default=80)
    parser.add_argument(
        "--seconds", type=float, default=60, help="beside the crowd, for each kind of image"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    origin = about()
    attacks = {name: attack(make(side), options) for name, (make, side) in ATTACKS.items()}
    settings = {"connections": options.connections, "seconds": options.seconds}
    write_result(options.out, {**origin, **settings, "attacks": attacks})
