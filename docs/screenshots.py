"""Take the explorer's screenshots anew: `python docs/screenshots.py` (needs Chromium and `pip install ".[test]"`)."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "img"
CHROMIUM = os.environ.get("MOEVISION_CHROMIUM", "/usr/bin/chromium")
DRAWN = 12000  # ms until galleries and statistics are there
EMOJI = "?model=emoji"
CAT = "?model=pets&picture=pets%2Ftest%2F0&layer=2&patch=36"


def save(pixels: bytes, name: str, margin: int = 0) -> None:
    """A JPEG of 1200 px."""
    image = Image.open(io.BytesIO(pixels)).convert("RGB")
    image = ImageOps.expand(image, margin, image.getpixel((0, 0)))
    image.resize((1200, round(1200 * image.height / image.width)), Image.Resampling.LANCZOS).save(
        IMAGES / name, quality=88, optimize=True
    )


def opened(page: Page, address: str) -> None:
    """The page at an address when all is drawn."""
    page.goto(address)
    page.wait_for_timeout(DRAWN)


def shoot(page: Page, url: str) -> None:
    """The page as it opens, a page of emoji, and the map of classes of the drawn pets."""
    opened(page, url)
    save(page.screenshot(), "explorer.jpg")
    opened(page, url + EMOJI)
    field = page.locator("[data-change=typed]")
    # Few machines have the emoji's font.
    field.evaluate("(field) => field.placeholder = 'Type emoji…'")
    save(page.screenshot(), "explorer-emoji.jpg")
    page.goto(url + CAT)  # its patch opens the details
    page.wait_for_timeout(DRAWN)
    page.get_by_role("tab", name="Classes").click()
    page.wait_for_timeout(DRAWN)
    save(page.locator("[data-part=table]").screenshot(), "explorer-classes.jpg", margin=48)


FRAME = 50  # ms
FALL = "[data-action=fall]"  # the button that takes the fewest experts away


def film(page: Page, url: str) -> None:
    """flow.webp: the patches fly; one expert's part; the headline and the answer once that is taken away."""
    opened(page, url)
    expert = page.inner_text(FALL).split()[2]  # "Take expert 2 away"
    box = f".mv-flow-box[data-expert='{expert}']"
    page.clock.install()
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)
    frames: list[Image.Image] = []
    times: list[int] = []

    def run(ms: int, hold: int) -> None:
        """Frames of so many milliseconds, the last of which stays."""
        for _ in range(0, ms, FRAME):
            page.clock.run_for(FRAME)
            picture = Image.open(
                io.BytesIO(page.screenshot(clip={"x": 0, "y": 0, "width": 1200, "height": 692}))
            )
            frames.append(picture.convert("RGB").resize((900, 519), Image.Resampling.LANCZOS))
            times.append(FRAME)
        times[-1] = hold

    page.evaluate("document.querySelector('[data-action=fly]').click()")
    run(2200, 1200)
    page.hover(box)
    run(FRAME, 1600)
    page.hover(FALL)
    page.evaluate(f"document.querySelector('{FALL}').style.outline = '5px solid #f0b400'")
    run(FRAME, 900)
    page.evaluate(f"document.querySelector('{FALL}').click()")
    page.wait_for_selector(f"{box}[aria-pressed=true]")
    run(700, 600)
    page.locator("[data-box=said]").get_by_text("at random").first.wait_for()
    run(FRAME, 3000)
    frames[0].save(
        IMAGES / "flow.webp",
        save_all=True,
        append_images=frames[1:],
        duration=times,
        loop=0,
        quality=62,
        method=4,
    )


@contextmanager
def served() -> Iterator[str]:
    """The address of `moevision demo`, as long as the scope lasts."""
    words = [sys.executable, "-u", "-m", "moevision", "demo", "--no-browser"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield next(line for line in server.stdout if "The explorer is at" in line).split()[-1]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def main() -> None:
    """Serve the bundled models, and take all four."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with served() as url:
            shoot(
                browser.new_page(viewport={"width": 1600, "height": 1034}, device_scale_factor=2),
                url,
            )
            film(browser.new_page(viewport={"width": 1200, "height": 800}), url)
        browser.close()


if __name__ == "__main__":
    main()
