"""The explorer in pictures: every state of the page in light and dark, wide and on a phone, as sheets to look at.

    python -m benchmarks demo-views --runs runs/soft runs/wide --out benchmarks/demo

Writes views-wide-light.jpg and three more: opened half a second, two and five seconds ago, then after its one button; a
page of emoji after its button, and one that is typed; the photo model, and its dog without expert 5; what its answer
rests on; whole photos sorted by two experts; an embedded view; each of the runs; the Gradio app. `--runs` are models to
show beside the bundled ones, such as one of soft routers and one of 32 experts. And views-heat.jpg: ten photos that are
brought, five of cats and dogs and five of animals that the photo model never learned, each with its routes and with
what its answer rests on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import httpx
from PIL import Image
from playwright.sync_api import Browser, ViewportSize, sync_playwright

from benchmarks.demo import launch, running_demo
from benchmarks.demo.frames import SCREENS
from benchmarks.harness import HERE, argument_parser
from moevision.demo.models import bundled_folder

BUTTON = "[data-action=fall]"
RESTS = "[data-action=mode][data-mode=rests]"
PAGE = "🐶🐱🦊🐸🍎🍕🍔🍩⚽🏀🎈🚗❤️⭐🔥🏁"
GRADIO_PORT = 7873
COLUMNS = {"wide": 4, "phone": 8}
WIDTH = {"wide": 560, "phone": 240}  # of a picture in its sheet, in pixels
GAP = 8


class State(NamedTuple):
    """What is opened, what is pressed there, and how long after that it is looked at."""

    query: str
    press: str = ""
    wait_ms: int = 5000
    door: bool = False  # whether "Look closer" was opened before
    photo: Path | None = None  # brought before anything is pressed


BUNDLED = (
    State("", wait_ms=500),
    State("", wait_ms=2000),
    State("", wait_ms=5000),
    State("", BUTTON),
    State("?model=emoji", BUTTON),
    State(f"?page={PAGE}"),
    State("?model=photos"),
    State("?model=photos", BUTTON),
    State("?model=photos", RESTS, door=True),
    State("?model=cats_vs_dogs_two", wait_ms=8000),
    State("?model=photos&embed=1"),
)
KNOWN = (
    "dog/darknet_dog",
    "dog/gcompris_shepherd",
    "dog/zoom_roxy",
    "cat/chelsea",
    "cat/gcompris_kitten",
)
NEVER_LEARNED = (
    "deer/gcompris_moose",
    "horse/darknet_horses",
    "bird/gcompris_owl",
    "bird/gcompris_duck",
    "bird/darknet_eagle",
)


def heat_states() -> Iterator[State]:
    """Ten photos, each with its routes and with its shares."""
    for model, names in (("photos", KNOWN), ("cifar10", NEVER_LEARNED)):
        for name in names:
            photo = bundled_folder(model) / "examples" / f"{name}.jpg"
            yield State("?model=photos", door=True, photo=photo)
            yield State("?model=photos", RESTS, door=True, photo=photo)


def look(browser: Browser, address: str, state: State, screen: ViewportSize, dark: bool) -> bytes:
    """The page in this state, as a PNG."""
    context = browser.new_context(viewport=screen, color_scheme="dark" if dark else "light")
    if state.door:
        context.add_init_script("localStorage.setItem('moevision.door', 'open')")
    page = context.new_page()
    page.goto(f"{address}{state.query}", wait_until="load")
    if state.photo is not None:
        page.wait_for_timeout(3000)  # until the patches have landed
        page.set_input_files("[data-box=file]", [state.photo])
        page.wait_for_timeout(3000)
    if state.press:
        page.locator(f"{state.press} >> visible=true").first.click(timeout=30_000)
    page.wait_for_timeout(state.wait_ms)
    picture = page.screenshot()
    context.close()
    return picture


@contextmanager
def running_app() -> Iterator[str]:
    """`python app.py`, and its address."""
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(GRADIO_PORT)}
    process = subprocess.Popen([sys.executable, HERE.parent / "app.py"], env=environment)
    address = f"http://127.0.0.1:{GRADIO_PORT}/"
    try:
        for _ in range(120):
            with suppress(httpx.TransportError):
                httpx.get(address)
                break
            time.sleep(1)
        yield address
    finally:
        process.kill()
        process.wait()


def sheet(pictures: Sequence[bytes], screen: str) -> Image.Image:
    """The pictures row by row."""
    width, columns = WIDTH[screen], COLUMNS[screen]
    images = [Image.open(BytesIO(picture)).convert("RGB") for picture in pictures]
    height = round(images[0].height * width / images[0].width)
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (width + GAP), rows * (height + GAP)), "#888")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        place = (column * (width + GAP), row * (height + GAP))
        whole.paste(image.resize((width, height), Image.Resampling.LANCZOS), place)
    return whole


def main() -> None:
    """Look at every state, and write the sheets."""
    parser = argument_parser("demo-views", __doc__)
    parser.add_argument("--runs", nargs="*", default=[], help="models to show beside the bundled")
    parser.add_argument("--out", type=Path, default=HERE / "demo", help="folder (%(default)s)")
    options = parser.parse_args()
    looks = [(screen, dark) for screen in SCREENS for dark in (False, True)]
    pictures: dict[tuple[str, bool], list[bytes]] = {each: [] for each in looks}
    with sync_playwright() as playwright:
        browser = launch(playwright)

        def add(address: str, *states: State) -> None:
            for (screen, dark), found in pictures.items():
                found += [look(browser, address, one, SCREENS[screen], dark) for one in states]

        with running_demo() as (_, address):
            add(address, *BUNDLED)
            heat = [look(browser, address, one, SCREENS["wide"], False) for one in heat_states()]
        for run in options.runs:
            with running_demo(run) as (_, address):
                add(address, State(""))
        with running_app() as address:
            add(address, State("", wait_ms=12_000))
        browser.close()
    sheet(heat, "wide").save(options.out / "views-heat.jpg", quality=80)
    for (screen, dark), found in pictures.items():
        name = f"views-{screen}-{'dark' if dark else 'light'}.jpg"
        sheet(found, screen).save(options.out / name, quality=80)
        print(options.out / name)
