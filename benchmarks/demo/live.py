"""The explorer without a server: what lies there, how soon it answers, and whether it answers as Python does.

    python docs/live/build.py live
    python -m benchmarks demo-live --folder live --out benchmarks/demo/live.json

The folder of docs/live is served by `python -m http.server` and driven in headless Chromium. Own images are 16 drawn
pets and the photos that come with the two other models, 16 and 8; each is answered by the explorer in Python, too, from
the bytes that the page took. Times are on loopback: cold from the address in a new browser profile until the answer
without one expert stands there (page, runtime, model, one pass), then of each further expert; of a typed page from
Enter, the first one just after the page has opened. Beside the wall time stands the time that all processes of the
browser ran: what a machine with nothing else to do needs at most.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.demo import launch
from benchmarks.harness import about, argument_parser, write_result
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.browser.live import BOX, OWN, SAID, compared, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VISITS, MORE = 3, 3  # cold ones of each model; experts more at each
PORT = 8123
FIELD = "[data-change=typed]"
TYPED = ("🐶🐱🐭🐹🐰🦊🐻🐼🍎🍐🍊🍋😀😃😄😁", "🚗🚕🚙🚌🏀⚽🏈⚾🎁🎈🎉🎊🏁🚩🎌🏴")
TYPING_MS = 60  # between two emoji: faster than people find them


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
        page.wait_for_selector(f"{SAID}:has-text('{away} expert')")
        times.append(time.perf_counter() - begun)
        cpu_s = cpu_s or cpu_seconds(browser) - ran
        begun = time.perf_counter()
    page.context.close()
    return times[0], cpu_s, times[1:]


def typed_answers(browser: Browser, address: str) -> list[float]:
    """Seconds from Enter to the answer, of a page of emoji typed just after opening, and of the next."""
    page = opened(browser, f"{address}?model=emoji", door=False)
    times = []
    for emoji in TYPED:
        page.click(FIELD)
        page.fill(FIELD, "")
        page.keyboard.type(emoji, delay=TYPING_MS)
        begun = time.perf_counter()
        page.keyboard.press("Enter")
        page.wait_for_selector(f".mv-picture[alt*='{emoji}']", state="attached")
        times.append(time.perf_counter() - begun)
    page.context.close()
    return times


def main() -> None:
    """Measure and print."""
    parser = argument_parser("demo-live", __doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="what docs/live/build.py wrote")
    add("--out", type=Path)
    options = parser.parse_args()
    origin = about()
    sizes = {file.name: file.stat().st_size for file in options.folder.resolve().iterdir()}
    photos = [sizes[f"{id}.onnx.bin"] for id in ("photos", "cats_vs_dogs_two")]
    explorer = Explorer(open_entries(None))
    models: dict[str, Any] = {}
    from playwright.sync_api import sync_playwright

    with served(options.folder.resolve(), PORT) as home, sync_playwright() as playwright:
        browser = launch(playwright)
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
        typed = [typed_answers(browser, home) for _ in range(VISITS)]
        browser.close()
    explorer.close()
    result = {
        **origin,
        "chromium": version,
        "mb": round((sum(sizes.values()) - sum(photos)) / 1e6, 1),
        "photos_mb": round(photos[0] / 1e6, 1),
        "sorting_mb": round(photos[1] / 1e6, 1),
        "files": {name: size for name, size in sorted(sizes.items()) if size > 1e5},
        "models": models,
        "typed": {
            name: [round(value, 2) for value in sorted(times)]
            for name, times in zip(("first_s", "next_s"), zip(*typed, strict=True), strict=True)
        },
        "all": {
            key: sum(one[key] for one in models.values())
            for key in ("images", "same_class", "choices", "same_first")
        },
    }
    write_result(options.out, result)
