"""The explorer without a server, driven in a browser: served, given images, and compared with what Python answers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
from PIL import Image

from moevision.data import SyntheticPets
from moevision.demo.models import bundled_folder
from moevision.demo.service import Explorer

if TYPE_CHECKING:
    from playwright.sync_api import FilePayload, Page

OWN = {"pets": 16, "cifar10": 16, "photos": 8}  # images
BOX = ".mv-flow-box:not([disabled]):not([aria-pressed=true])"
SAID = "[data-box=said] b"
View = Mapping[str, Any]


@contextmanager
def served(folder: Path, port: int) -> Iterator[str]:
    """The address of a folder's parent, so that the folder lies below a path, by `python -m http.server`."""
    options = ["--bind", "127.0.0.1", "--directory", str(folder.parent)]
    command = [sys.executable, "-m", "http.server", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    home = f"http://127.0.0.1:{port}/{folder.name}/"
    try:
        for _ in range(600):
            try:
                urlopen(home).close()
                break
            except URLError:
                time.sleep(0.1)
        yield home
    finally:
        process.kill()
        process.wait()


def own_images(model: str) -> list[FilePayload]:
    """Files of a visitor: drawn pets in more pixels than the model's 64; the bundled photos as they are."""
    if model == "pets":
        drawn = SyntheticPets(OWN[model], 160, split="test")
        buffers = [io.BytesIO() for _ in range(OWN[model])]
        for index, buffer in enumerate(buffers):
            Image.fromarray(drawn.image(index)).save(buffer, "PNG")
        return [
            {"name": f"{index}.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
            for index, buffer in enumerate(buffers)
        ]
    files = sorted((bundled_folder(model) / "examples").glob("*/*.jpg"))
    return [
        {"name": file.name, "mimeType": "image/jpeg", "buffer": file.read_bytes()} for file in files
    ]


def bring(page: Page, file: FilePayload) -> str:
    """Choose a file and wait for its answer; the bytes that the page took, as a data address."""
    page.set_input_files("[data-box=file]", [file])
    page.wait_for_selector(f".mv-own [aria-pressed=true][aria-label='Your image {file['name']}']")
    page.wait_for_selector("[data-box=progress]", state="hidden")
    return str(page.evaluate("JSON.parse(sessionStorage.getItem('moevision.own'))[0].data"))


def view_of(page: Page) -> View:
    """The view that is shown, as the page saves it; the details must be open."""
    page.wait_for_selector("[data-box=progress]", state="hidden")
    page.evaluate("document.querySelector('.mv-menu').open = true")
    with page.expect_download() as saving:
        page.click("[data-action=export-json]")
    found: View = json.loads(Path(saving.value.path()).read_text())
    return found


def first_choices(found: View, expected: View) -> list[bool]:
    """For each patch and layer of two views whether its first expert is the same."""
    return [
        mine[0] == own[0]
        for layer, other in zip(found["layers"], expected["layers"], strict=True)
        for mine, own in zip(layer["experts"], other["experts"], strict=True)
    ]


def compared(page: Page, explorer: Explorer, model: str) -> dict[str, Any]:
    """Own images through the page and through Python: classes, first choices, how far a probability is off."""
    same, choices, apart = 0, [], 0.0
    for file in own_images(model):
        data = bring(page, file)
        found = view_of(page)
        upload = {"kind": "upload", "data": data}
        expected = explorer.answer("route", {"model": model, "picture": upload})
        best, own = (view["prediction"]["moe"][0] for view in (found, expected))
        same += best["class"] == own["class"]
        apart = max(apart, abs(best["p"] - own["p"]))
        choices += first_choices(found, expected)
    counted = {
        "images": OWN[model],
        "same_class": same,
        "choices": len(choices),
        "same_first": int(np.sum(choices)),
    }
    return {**counted, "probability_difference": round(apart, 4)}
