"""How smooth the opening's flight is: milliseconds between its frames, in headless Chromium without a GPU.

    python -m benchmarks demo-frames --out benchmarks/demo/frames.json

`moevision demo` with the bundled models; the photo on which it opens, the page of emoji and the photo model, on a wide
screen and on a phone, three flights each. A frame of a screen of 60 Hz takes 16.7 ms; the median may take 20.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Browser, ViewportSize, sync_playwright

from benchmarks.demo import launch, running_demo, summary_of
from benchmarks.harness import HERE, about, argument_parser, write_result

LIMIT_MS = 20
FLIGHTS = 3
MODELS = ("cifar10", "emoji", "photos")  # the page opens on the first one
SCREENS: dict[str, ViewportSize] = {
    "wide": {"width": 1440, "height": 900},
    "phone": {"width": 390, "height": 844},
}
FLIGHT = (HERE.parent / "tests" / "browser" / "flight.js").read_text(encoding="utf-8")


def flights(browser: Browser, address: str, screen: str) -> list[float]:
    """The frames of a visitor's flights, in milliseconds."""
    context = browser.new_context(viewport=SCREENS[screen], bypass_csp=True)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("[data-part=air][hidden]", state="attached")
    page.wait_for_timeout(3000)
    frames = [frame for _ in range(FLIGHTS) for frame in page.evaluate(FLIGHT)]
    context.close()
    return frames


def main() -> None:
    """Measure, print, and fail if a median is over the limit."""
    parser = argument_parser("demo-frames", __doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    origin = about()
    with sync_playwright() as playwright, running_demo() as (_, address):
        browser = launch(playwright)
        found = {
            model: {
                screen: summary_of(flights(browser, f"{address}?model={model}", screen))
                for screen in SCREENS
            }
            for model in MODELS
        }
        version = browser.version
        browser.close()
    write_result(
        options.out, {**origin, "chromium": version, "limit_ms": LIMIT_MS, "models": found}
    )
    if any(one["median_ms"] > LIMIT_MS for each in found.values() for one in each.values()):
        sys.exit(f"a median is over {LIMIT_MS} ms")
