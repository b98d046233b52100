"""How long a visitor of `moevision demo` waits, measured in headless Chromium.

    pip install playwright && apt-get install chromium
    python -m benchmarks demo-latency --out benchmarks/demo/latency.json

`moevision demo` is started as a user starts it, with the bundled models. A time runs from the event in the page to
the first moment after the browser has painted its result (the task that follows the next animation frame), so a frame
of up to 17 ms is part of it. Run it on a calm machine: the load average before the start is in the result.

- first page: from the line "The explorer is at ..." to a drawn overlay, in a new browser profile, once per start;
- layer change, patch click: alternating, nothing is asked of the server;
- new image: a click on an example until the overlay of its view is drawn; every image for the first time;
- an expert away: a click on a network of the opening until its answer is painted; put back between;
- own image: a 1600 x 1200 px photo-like file, made small by the page, sent and routed;
- forward: the model's own answer for one image, outside of the explorer, which all of that is to be compared with;
- an expert away, server's CPU: what the explorer computes for that answer, each expert of the last layer, one thread.

Of the model on which the page opens, and of the larger model of photos, whose page is opened by its link.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.bundle import MODELS as BUNDLED
from benchmarks.demo import launch, running_demo, summary_of
from benchmarks.harness import HERE, about, argument_parser, write_result
from moevision.demo.models import open_entries
from moevision.demo.server import cpu_workers
from moevision.demo.service import Explorer
from moevision.limits import usable_cores
from moevision.models.io import load_model

LIMIT_MS = {
    "away_cpu": 150,
    "first_page": 1000,
    "layer_change": 50,
    "patch_click": 150,
    "expert_away": 300,
    "own_picture": 700,
}
OVER_FORWARD_MS = 50  # what a new image may take beside the forward pass
MODELS = ("cifar10", "photos")  # the page opens on the first one
WAIT_S = 120
SCREEN = {"width": 1440, "height": 900}
REPEATS = 40
MEASURE, TAKE_AWAY = (
    (HERE / "demo" / f"{name}.js").read_text(encoding="utf-8") for name in ("measure", "take_away")
)
"""Milliseconds from a click in the page until its answer is painted."""


def without_an_expert(browser: Browser, address: str) -> list[float]:
    """Each network of the opening's layer taken away alone, and put back."""
    context = browser.new_context(viewport=SCREEN, reduced_motion="reduce", bypass_csp=True)
    page, times = context.new_page(), []
    page.goto(address)
    page.wait_for_selector(".mv-flow-box")
    page.wait_for_timeout(3000)
    texts = page.locator(".mv-flow-box").all_text_contents()
    for expert in [expert for expert, text in enumerate(texts) if "none" not in text] * 4:
        box = f".mv-flow-box[data-expert='{expert}']"
        times.append(page.evaluate(TAKE_AWAY, [box, True]))
        page.evaluate(TAKE_AWAY, [box, False])
    context.close()
    return times


def first_page(browser: Browser, address: str) -> tuple[Page, float]:
    """A visitor's first page and how long it took, in milliseconds."""
    # Playwright waits by evaluating a text, which the page's policy forbids.
    context = browser.new_context(viewport=SCREEN, bypass_csp=True)
    context.add_init_script("localStorage.setItem('moevision.door', 'open')")
    page = context.new_page()
    start = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_selector(".mv-cell .mv-mark:not(:empty)", state="attached")
    return page, (time.perf_counter() - start) * 1000


def in_the_page(page: Page) -> dict[str, list[float]]:
    """Layer changes, patch clicks and new images."""
    choice = "[data-change=flow-layer]"
    layers = page.locator(f"{choice} option").count()
    patches = page.locator(".mv-cell").count()
    times: dict[str, list[float]] = {"layer_change": [], "patch_click": [], "new_picture": []}
    for step in range(REPEATS):
        if layers:  # a model of one layer has nothing to choose
            layer = str(step % layers)
            times["layer_change"].append(page.evaluate(MEASURE, [choice, ".mv-grid", layer]))
        patch = f".mv-cell[data-patch='{step * 7 % patches}']"
        times["patch_click"].append(page.evaluate(MEASURE, [patch, ".mv-box-where"]))
    examples = page.eval_on_selector_all(
        ".mv-rail [data-action=example]", "list => list.map(one => one.dataset.id)"
    )
    for example in examples[1:]:
        took = page.evaluate(MEASURE, [f"[data-id='{example}']", ".mv-picture"])
        times["new_picture"].append(took)
    return times


def own_picture(page: Page) -> list[float]:
    """A file from the visitor's disk, several times, each a little different."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(8):
            file = Path(folder) / f"{step}.jpg"
            extent = (-2 + step / 10, -1.5, 1, 1.5)
            Image.effect_mandelbrot((1600, 1200), extent, 40).convert("RGB").save(file)
            before = page.get_attribute(".mv-picture", "src")
            start = time.perf_counter()
            page.set_input_files("[data-box=file]", file)
            is_another = "src => document.querySelector('.mv-picture').src !== src"
            page.wait_for_function(is_another, arg=before, polling="raf")
            times.append((time.perf_counter() - start) * 1000)
    return times


@torch.inference_mode()
def forward(model: str) -> list[float]:
    """One image, by as many threads as the server gives a request."""
    torch.set_num_threads(max(1, usable_cores() // cpu_workers()))
    saved = load_model(str(BUNDLED / model / "trained"))
    image = torch.rand(1, 3, saved.image_size, saved.image_size)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        saved.net(image)
        times.append((time.perf_counter() - start) * 1000)
    return times


def away_cpu(model: str) -> list[float]:
    """CPU milliseconds of the answers without one expert of the last layer, by one thread."""
    torch.set_num_threads(1)
    explorer = Explorer(open_entries(None))
    entry, times = explorer.entries[model], []
    picture = {"kind": "example", "id": entry.examples.on_first_screen()[0].id}
    last = entry.facts.routers[-1]
    for expert in range(last.num_experts):
        start = time.process_time()
        request = {"model": model, "picture": picture, "away": [[last.layer, expert]]}
        answer = explorer.answer("route", request)
        times.append((time.process_time() - start) * 1000)
        assert "error" not in answer, answer
    explorer.close()
    return times


def summary(times: list[float], limit: float | None) -> dict[str, Any]:
    """A summary of times, and whether the median keeps the limit, if it has one."""
    return {
        **summary_of(times),
        "limit_ms": limit and round(limit, 1),
        "median_within_limit": limit is None or float(np.median(times)) < limit,
    }


def main() -> None:
    """Measure, print, and fail if a median is over its limit."""
    parser = argument_parser("demo-latency", __doc__)
    add = parser.add_argument
    add("--starts", type=int, default=3, help="servers that are started for the first page")
    add("--out", type=Path)
    options = parser.parse_args()
    origin = about()
    found: dict[str, dict[str, Any]] = {}
    with sync_playwright() as playwright:
        browser = launch(playwright)
        version = browser.version
        for model in MODELS:
            times: dict[str, list[float]] = {"forward": forward(model), "away_cpu": away_cpu(model)}
            times["first_page"] = []
            new_picture = statistics.median(times["forward"]) + OVER_FORWARD_MS
            limits = {**LIMIT_MS, "new_picture": new_picture}
            for start in range(options.starts):
                with running_demo() as (_, address):
                    page, first = first_page(browser, f"{address}?model={model}")
                    times["first_page"].append(first)
                    if start == options.starts - 1:
                        # The cards come when the galleries are computed, with which a new server is busy.
                        page.wait_for_selector(".mv-card", timeout=WAIT_S * 1000)
                        page.wait_for_timeout(3000)
                        page.click("[data-tab=about]")
                        times |= in_the_page(page) | {"own_picture": own_picture(page)}
                    page.context.close()
                    if start == 0:
                        first_view = f"{address}?model={model}"
                        times["expert_away"] = without_an_expert(browser, first_view)
            found[model] = {
                name: summary(own, limits.get(name)) for name, own in times.items() if own
            }
        browser.close()
    write_result(options.out, {**origin, "chromium": version, "models": found})
    late = [
        f"{model}: {name}"
        for model, steps in found.items()
        for name, step in steps.items()
        if not step["median_within_limit"]
    ]
    if late:
        sys.exit(f"over the limit: {', '.join(late)}")
