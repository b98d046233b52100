"""Every bundled photo, and photos that the model has never seen, through the page as a visitor would take them.

    python -m benchmarks demo-photos --folder cats_vs_dogs/test --screenshots shots --out benchmarks/demo/photos.json

Each bundled photo is opened by its link; photos of FOLDER (one subfolder per class) are chosen from the disk, twelve at
a time. In headless Chromium at 1440x900 and 390x844, in light and dark. Counted: overlays that were drawn, answers that
name the class, complaints of the browser. Screenshots are kept of bundled photos only.
"""

from __future__ import annotations

import random
import re
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, ConsoleMessage, Page, ViewportSize, sync_playwright

from benchmarks.demo import browser_path, running_demo
from benchmarks.harness import about, argument_parser, write_result
from moevision.errors import UserError

SCREENS = {
    "1440x900": ViewportSize(width=1440, height=900),
    "390x844": ViewportSize(width=390, height=844),
}
Look = Literal["light", "dark"]
LOOKS: tuple[Look, ...] = ("light", "dark")
AT_ONCE = 12  # own images that the page keeps


def visit(browser: Browser, screen: str, look: Look, complaints: list[str]) -> Page:
    """A page of somebody who has been here before; what the browser complains about is kept."""
    # Playwright waits by evaluating a text, which the page's policy forbids.
    context = browser.new_context(viewport=SCREENS[screen], color_scheme=look, bypass_csp=True)
    context.add_init_script("localStorage.setItem('moevision.door', 'open')")
    page = context.new_page()

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return page


def said(page: Page) -> str:
    """The class that the page names for the first image, when its overlay is there."""
    page.wait_for_selector("[data-box=main][aria-busy=false]")
    page.wait_for_selector(".mv-cell")
    return str(page.text_content(".mv-verdict b"))


def bundled(
    browser: Browser, address: str, screen: str, look: Look, options: Namespace, found: Counter[str]
) -> None:
    """Open each photo of the first model by its link."""
    complaints: list[str] = []
    page = visit(browser, screen, look, complaints)
    page.goto(address)
    said(page)
    ids = page.eval_on_selector_all(
        ".mv-rail [data-action=example]", "all => all.map(one => one.dataset.id)"
    )
    for name in ids:
        page.goto(f"{address}?picture={name}")
        answer = said(page)
        found["photos"] += 1
        found["right"] += page.locator(".mv-verdict .mv-right").count() > 0
        found["too_wide"] += page.evaluate("document.documentElement.scrollWidth > innerWidth")
        if options.screenshots is not None:
            options.screenshots.mkdir(parents=True, exist_ok=True)
            file = re.sub(r"[^\w-]+", "-", f"{name}-{screen}-{look}-{answer}")
            page.screenshot(path=options.screenshots / f"{file}.png")
    found["complaints"] += len(complaints)
    page.context.close()


def unseen(
    browser: Browser, address: str, photos: list[Path], screen: str, look: Look, found: Counter[str]
) -> None:
    """Choose photos from the disk, and look at each of them."""
    complaints: list[str] = []
    page = visit(browser, screen, look, complaints)
    page.goto(address)
    said(page)
    for start in range(0, len(photos), AT_ONCE):
        chunk = photos[start : start + AT_ONCE]
        page.set_input_files("[data-box=file]", chunk)
        page.wait_for_selector(f".mv-own [aria-label='Your image {chunk[0].name}']")
        for photo in chunk:
            page.click(f".mv-own [aria-label='Your image {photo.name}']")
            page.wait_for_selector(
                f".mv-own [aria-pressed=true][aria-label='Your image {photo.name}']"
            )
            found["photos"] += 1
            found["right"] += said(page) == photo.parent.name
        page.click("[data-action=forget]")
    found["complaints"] += len(complaints)
    page.context.close()


def main() -> None:
    """Look, and print what was counted."""
    parser = argument_parser("demo-photos", __doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="photos that the model has never seen")
    add("--photos", type=int, default=96, help="how many of them (%(default)s), drawn with seed 0")
    add("--screenshots", type=Path, help="folder for those of bundled photos")
    add("--out", type=Path)
    options = parser.parse_args()
    files = sorted(file for file in options.folder.glob("*/*") if file.is_file())
    if len(files) < options.photos:
        raise UserError(
            f"{options.folder} has {len(files)} photos in one subfolder per class, not {options.photos}."
        )
    chosen = random.Random(0).sample(files, options.photos)
    cells = [(screen, look) for screen in SCREENS for look in LOOKS]
    share = len(chosen) // len(cells)
    result: dict[str, Any] = about()
    own: Counter[str] = Counter()
    new: Counter[str] = Counter()
    with sync_playwright() as playwright, running_demo() as (_, address):
        browser = playwright.chromium.launch(
            executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"]
        )
        for place, (screen, look) in enumerate(cells):
            bundled(browser, address, screen, look, options, own)
            unseen(browser, address, chosen[place * share : (place + 1) * share], screen, look, new)
        browser.close()
    write_result(
        options.out,
        {**result, "screens": list(SCREENS), "looks": list(LOOKS), "bundled": own, "unseen": new},
    )
