"""The explorer without a server: what lies there, how soon it answers, and whether it answers as Python does.

    python docs/live/build.py live
    python -m benchmarks demo-live --folder live --out benchmarks/demo/live.json

The folder of docs/live is served by `python -m http.server` and driven in headless Chromium. Own images are 16 drawn
pets and the photos that come with the two other models, 16 and 8; each is answered by the explorer in Python, too, from
the bytes that the page took. Times are on loopback: cold from the address in a new browser profile until the answer
without one expert stands there (page, runtime, model, one pass), then of each further expert. Beside the wall time
stands the time that all processes of the browser ran: what a machine with nothing else to do needs at most.
"""

from __future__ import annotations

import io
import json
import statistics
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

from benchmarks.demo import browser_path
from benchmarks.harness import about, argument_parser, write_result
from moevision.data import SyntheticPets
from moevision.demo.models import bundled_folder, open_entries
from moevision.demo.service import Explorer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FilePayload, Page

OWN = {"pets": 16, "cifar10": 16, "cats_vs_dogs": 8}  # images
BOX = ".mv-flow-box:not([disabled]):not([aria-pressed=true])"
SAID = "[data-part=said] b"
VISITS, MORE = 3, 3  # cold ones of each model; experts more at each
PORT = 8123
View = Mapping[str, Any]


@contextmanager
def served(folder: Path, port: int = PORT) -> Iterator[str]:
    """The address of a folder's parent, so that the folder lies below a path, by `python -m http.server`."""
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder.parent)]
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
    return [{"name": file.name, "mimeType": "image/jpeg", "buffer": file.read_bytes()} for file in files]


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
        expected = explorer.answer("route", {"model": model, "picture": {"kind": "upload", "data": data}})
        best, own = (view["prediction"]["moe"][0] for view in (found, expected))
        same += best["class"] == own["class"]
        apart = max(apart, abs(best["p"] - own["p"]))
        choices += first_choices(found, expected)
    counted = {"images": OWN[model], "same_class": same, "choices": len(choices), "same_first": int(np.sum(choices))}
    return {**counted, "probability_difference": round(apart, 4)}


def opened(browser: Browser, address: str, *, door: bool) -> Page:
    """A page in a new profile, with the image on it."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.set_default_timeout(120_000)
    if door:
        context.add_init_script("localStorage.setItem('moevision.door', 'open')")
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(".mv-flow-box")
    return page


def cpu_seconds(browser: Browser) -> float:
    """What the browser's processes have run."""
    told = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")
    return sum(process["cpuTime"] for process in told["processInfo"])


def first_answer(browser: Browser, address: str) -> tuple[float, float, list[float]]:
    """Seconds until the first expert is away, by the clock and of processors, and of each further expert."""
    begun, ran = time.perf_counter(), cpu_seconds(browser)
    page = opened(browser, address, door=False)
    times, cpu_s = [], 0.0
    for away in range(1, MORE + 2):
        page.click(f"{BOX} >> nth=0")
        page.wait_for_selector(f"{SAID}:has-text('{away} of ')")
        times.append(time.perf_counter() - begun)
        cpu_s = cpu_s or cpu_seconds(browser) - ran
        begun = time.perf_counter()
    page.context.close()
    return times[0], cpu_s, times[1:]


def main() -> None:
    """Measure and print."""
    parser = argument_parser("demo-live", __doc__)
    parser.add_argument("--folder", type=Path, required=True, help="what docs/live/build.py wrote")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    origin = about()
    sizes = {file.name: file.stat().st_size for file in options.folder.resolve().iterdir()}
    photos = sizes["cats_vs_dogs.onnx.bin"]
    explorer = Explorer(open_entries(None))
    models: dict[str, Any] = {}
    from playwright.sync_api import sync_playwright

    with served(options.folder.resolve()) as home, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        version = browser.version
        for model in OWN:
            address = f"{home}?model={model}"
            cold, ran, more = [], [], []
            for _ in range(VISITS):
                first, cpu_s, others = first_answer(browser, address)
                cold.append(first)
                ran.append(cpu_s)
                more += others
            page = opened(browser, address, door=True)
            models[model] = {
                "cold_s": [round(value, 2) for value in sorted(cold)],
                "cold_median_s": round(statistics.median(cold), 2),
                "cold_cpu_s": [round(value, 2) for value in sorted(ran)],
                "cold_cpu_median_s": round(statistics.median(ran), 2),
                "next_median_s": round(statistics.median(more), 2),
                **compared(page, explorer, model),
            }
            page.context.close()
        browser.close()
    explorer.close()
    result = {
        **origin,
        "chromium": version,
        "mb": round((sum(sizes.values()) - photos) / 1e6, 1),
        "photos_mb": round(photos / 1e6, 1),
        "files": {name: size for name, size in sorted(sizes.items()) if size > 1e5},
        "models": models,
        "all": {
            key: sum(one[key] for one in models.values()) for key in ("images", "same_class", "choices", "same_first")
        },
    }
    write_result(options.out, result)
