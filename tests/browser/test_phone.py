"""A phone held upright: a short page, a patch told of where it is tapped; and a slow network in front of it."""

import gzip
import time

import pytest

from moevision.demo.galleries import Galleries
from moevision.demo.html import app_page
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.browser.conftest import MOBILE, no_sideways_scroll, site, violations

pytestmark = pytest.mark.needs("chromium", "playwright")

SCREENS = 2
MOST_BYTES = 280_000
SPEED, WITHIN_S = 50_000, 6.0  # bytes per second


# What a finger can't hit: less than 24 CSS px on a side (WCAG 2.2, 2.5.8).
TOO_SMALL = """all => all.filter((one) => one.checkVisibility({ visibilityProperty: true }))
  .filter((one) => Math.min(one.offsetWidth, one.offsetHeight) < 24).map((one) => one.outerHTML)"""


def box(page, selector):
    found = page.locator(selector).first.bounding_box()
    return found["y"], found["y"] + found["height"]


def test_the_page_is_short_and_a_patch_is_told_of_below_the_stage(visit):
    page = visit(door=False, reduced_motion="reduce", **MOBILE).page
    assert page.evaluate("document.documentElement.scrollHeight") <= SCREENS * 844
    page.tap("[data-action=door]")
    assert no_sideways_scroll(page)
    page.evaluate("scrollTo(0, 0)")  # the whole image is seen
    page.tap(".mv-cell[data-patch='6']")
    assert "row 2, column 3" in page.text_content(".mv-where")
    stage, where = box(page, ".mv-canvas"), box(page, ".mv-where")
    assert 0 <= stage[0] < stage[1] < where[0]  # what is said of it stands below the image,
    assert where[1] <= 844  # and is seen with it
    assert violations(page, ".mv-box-where") == []
    page.keyboard.press("Escape")
    assert page.locator(".mv-pinned").count() == 0
    controls = ".mv :is(button, select, summary):not(.mv-quiet, .mv-term)"
    assert page.eval_on_selector_all(controls, TOO_SMALL) == []


@pytest.mark.parametrize("width", [360, 390, 412])
def test_the_share_menu_stays_on_the_screen(visit, width):
    page = visit(**{**MOBILE, "viewport": {"width": width, "height": 844}}).page
    page.tap(".mv-menu summary")
    menu = page.locator(".mv-menu-list").bounding_box()
    assert menu["x"] >= 0
    assert menu["x"] + menu["width"] <= width
    assert no_sideways_scroll(page)


@pytest.fixture(scope="module")
def opening():
    """Address of the document that `moevision demo` opens with, served with nothing behind it."""
    entries = open_entries(None)
    explorer = Explorer(entries, Galleries(entries))
    document = gzip.compress(app_page(explorer.start_boot(), explorer.start_views()).text.encode())
    explorer.close()
    with site(document, **{"content-encoding": "gzip"}) as port:
        yield f"http://127.0.0.1:{port}/", len(document)


@pytest.mark.alone
def test_the_stage_stands_early_on_a_slow_network(new_visit, opening):
    address, size = opening
    assert size <= MOST_BYTES
    one = new_visit(door=False, **MOBILE)
    network = one.context.new_cdp_session(one.page)
    network.send("Network.enable")
    limits = {"offline": False, "latency": 40}
    limits |= {"downloadThroughput": SPEED, "uploadThroughput": SPEED}
    network.send("Network.emulateNetworkConditions", limits)
    start = time.monotonic()
    one.page.goto(address, wait_until="commit")
    one.page.wait_for_function("document.querySelector('.mv-boot img')?.naturalWidth > 0")
    assert one.page.locator(".mv-flow-box").count() == 0
    one.page.wait_for_selector(".mv-flow-box")
    assert time.monotonic() - start < WITHIN_S
    first, *others = [each.url for each in one.requests if each.resource_type != "image"]
    assert first == address
    assert [url for url in others if "/api/" not in url] == []  # no script, style or font beside it
