"""Take the explorer's screenshots anew: `python docs/screenshots.py` (needs Chromium and `pip install ".[test]"`).

explorer-slots.png shows a Soft MoE after one epoch of drawn pets, which is trained first:
`moevision fit --config quickstart --name soft --model.arch.router soft --trainer.max_epochs 1`.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "img"
CHROMIUM = os.environ.get("MOEVISION_CHROMIUM", "/usr/bin/chromium")
DRAWN = 6000  # ms until galleries and statistics are there
CAT = "?model=pets&picture=pets%2Ftest%2F0&layer=3&patch=36"


def save(pixels: bytes, name: str, box: tuple[int, int, int, int] | None = None) -> None:
    """A JPEG of 1200 px; what is cut out gets a margin."""
    image = Image.open(io.BytesIO(pixels)).convert("RGB")
    if box is not None:
        image = ImageOps.expand(image.crop(box), 24, image.getpixel((0, 0)))
    image.resize((1200, round(1200 * image.height / image.width)), Image.Resampling.LANCZOS).save(
        IMAGES / name, quality=88, optimize=True
    )


def shoot(page: Page, url: str) -> None:
    """The page as it opens, and its map of classes."""
    page.goto(url + CAT)
    page.get_by_text("Skip the tour").click(timeout=60_000)
    page.wait_for_timeout(DRAWN)
    save(page.screenshot(), "explorer.jpg")
    page.get_by_role("tab", name="Classes").click()
    page.wait_for_timeout(DRAWN)
    below = page.locator(".mv-below").screenshot()
    width = Image.open(io.BytesIO(below)).width
    save(below, "explorer-classes.jpg", (0, 0, width, width // 2))


def main() -> None:
    """Serve the bundled models, and take both."""
    command = [sys.executable, "-u", "-m", "moevision", "demo", "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = next(line for line in server.stdout if "The explorer is at" in line).split()[-1]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            shoot(browser.new_page(viewport={"width": 1600, "height": 1034}), url)
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


if __name__ == "__main__":
    main()
