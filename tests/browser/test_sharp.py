"""The sharp original under the patches: it comes after the view, and gives way to the model's input."""

import base64
import io

import pytest
from PIL import Image

from tests.browser.conftest import alone, each

pytestmark = pytest.mark.needs("chromium", "playwright")

SHARP = ".mv-picture.mv-sharp"


def size_of(source):
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        return picture.size


@pytest.fixture
def photos(photos):
    one = photos()
    one.page.wait_for_selector(SHARP)
    return one


def test_an_example_lies_sharp_under_the_patches(photos):
    page = photos.page
    sharp = page.get_attribute(".mv-picture", "src")
    assert size_of(sharp) == (96, 96)
    under = each(page, ".mv-zoom", "getComputedStyle(one).backgroundImage")
    assert {*under} == {f'url("{sharp}")'}
    page.press("[data-change=as-seen]", "Space")
    seen = page.get_attribute(".mv-picture", "src")
    assert size_of(seen) == (32, 32)
    assert seen in page.get_attribute(".mv-zoom >> nth=0", "style")
    assert page.locator(".mv-zoom.mv-sharp").count() == 0
    # Another image and back: what is here isn't asked for again.
    page.click(".mv-rail [data-action=example] >> nth=1")
    page.wait_for_function("src => document.querySelector('.mv-picture').src !== src", arg=seen)
    page.uncheck("[data-change=as-seen]")
    page.wait_for_selector(SHARP)
    page.click(".mv-rail [data-action=example] >> nth=0")
    page.wait_for_function("src => document.querySelector('.mv-picture').src === src", arg=sharp)
    assert len(photos.questions("sharp")) == 2


def test_an_exported_page_is_sharp(photos, new_visit, tmp_path):
    one = alone(new_visit, photos.page, tmp_path)
    one.page.wait_for_selector(SHARP)
    assert each(one.page, ".mv-picture", "one.src") == each(photos.page, ".mv-picture", "one.src")
    assert one.complaints == []


def test_a_drawn_image_comes_in_more_pixels_too(visit):
    one = visit()
    one.page.wait_for_selector(SHARP)
    assert one.question("sharp") == {"model": "pets", "picture": "pets/test/0"}


def test_nothing_moves_when_the_sharp_image_comes(new_visit, server, hold):
    page = new_visit().page
    held = hold(page, "sharp")
    page.visit.open(server.doors["photos"])
    held.wait()
    assert page.locator(SHARP).count() == 0
    before = page.locator(".mv-canvas >> nth=0").bounding_box()
    held.release()
    page.wait_for_selector(SHARP)
    assert page.locator(".mv-canvas >> nth=0").bounding_box() == before
