"""The explorer without a server: built, served by `http.server`, and asked what Python answers of the same images."""

import os
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest
from PIL import Image

from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.browser.conftest import each, no_sideways_scroll, press
from tests.browser.live import (
    BOX,
    OWN,
    SAID,
    bring,
    compared,
    first_choices,
    own_images,
    served,
    view_of,
)
from tests.docs.test_live import live
from tests.shared import free_port, says

pytestmark = pytest.mark.needs("chromium", "playwright", "photos", "onnx", "npm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The build; MOEVISION_ORT names a folder with onnxruntime-web's files where npm shouldn't be asked."""
    out, ort = tmp_path_factory.mktemp("live") / "moe", os.environ.get("MOEVISION_ORT")
    live.build(out, None if ort is None else Path(ort))
    return out


@pytest.fixture(scope="module")
def home(folder):
    """Its address, below a path."""
    with served(folder, free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def whole():
    """The explorer with the same models."""
    explorer = Explorer(open_entries(None))
    yield explorer
    explorer.close()


@pytest.fixture
def visit_live(visits_at, home):
    """Opens visits that ask the folder only, by GET."""
    visits = []
    begin = visits_at(home, visits.append)
    yield begin
    assert {request.method for one in visits for request in one.requests} <= {"GET"}


@pytest.mark.parametrize("model", OWN)
def test_own_images_are_decided_as_by_python(model, visit_live, whole):
    """40 in all: the same class for each, and as good as all first choices of their patches."""
    one = visit_live(f"?model={model}")
    found = compared(one.page, whole, model)
    print(model, found)
    assert found["same_class"] == found["images"] == OWN[model]
    assert found["same_first"] >= 0.995 * found["choices"] > 0
    assert found["probability_difference"] <= 0.02
    assert one.page.locator(".mv-older").locator("visible=true").count() == 0
    stranger = bring(one.page, own_images("pets" if model == "photos" else "photos")[0])
    upload = {"kind": "upload", "data": stranger}
    expected = whole.answer("route", {"model": model, "picture": upload})
    assert view_of(one.page)["picture"]["unlike"] == expected["picture"]["unlike"]


@pytest.mark.parametrize("model", ["pets", "cifar10", "photos"])
def test_experts_that_are_taken_away_are_away(model, visit_live, whole):
    """One, then another: routes and answer are Python's; put back, the recorded view is there again."""
    about = next(one for one in whole.boot({})["models"] if one["id"] == model)
    layers = about["layers"]
    page = visit_live(f"?model={model}&away={layers[-1]}.3").page
    for away in ([[layers[-1], 3]], [[layers[-1], 3], [layers[0], 1]]):
        if len(away) > 1:
            home = page.url.partition("?")[0]
            page.visit.open(f"{home}?model={model}&away={layers[-1]}.3_{layers[0]}.1")
        page.wait_for_selector(f"{SAID}:has-text('{len(away)} expert')")
        found = view_of(page)
        picture = {"kind": "example", "id": found["picture"]["id"]}
        expected = whole.answer("route", {"model": model, "picture": picture, "away": away})
        assert found["settings"]["away"] == away
        assert np.mean(first_choices(found, expected)) >= 0.995
        best, own = (view["prediction"]["moe"][0] for view in (found, expected))
        assert best["class"] == own["class"]
        assert best["p"] == pytest.approx(own["p"], abs=0.005)
        for layer, other in zip(found["layers"], expected["layers"], strict=True):
            assert set(other) == set(layer)
            assert np.allclose(layer["counts"], other["counts"], atol=2)
            assert np.allclose(layer["margin"], other["margin"], atol=1e-2)
            assert np.allclose(layer["entropy"], other["entropy"], atol=1e-2)
            assert [len(row) for row in layer["weights"]] == [len(row) for row in other["weights"]]
            used = {(layer["layer"], expert) for row in layer["experts"] for expert in row}
            assert used.isdisjoint(map(tuple, away))
    press(page, "[data-box=said] [data-action=put-back]", "[data-box=badge]", state="hidden")
    assert view_of(page)["layers"][0]["computation"] is not None


def test_one_that_matters_is_shown_and_what_takes_a_server_is_absent(visit_live, whole, tmp_path):
    telling = whole.boot({})["models"][0]["card"]["matters"]
    page = visit_live().page
    press(page, "[data-action=fall]", f"{SAID}:has-text('1 expert away: now')")
    assert f"now {telling['after']['class']}" in page.text_content(SAID)
    assert each(page, "[role=tab]", "one.dataset.tab") == ["experts", "about"]
    press(page, "[data-tab=experts]", ".mv-cards .mv-crop")
    absent = "[data-action=export-page], [data-action=hand], [data-change=topk], [data-action=more]"
    assert page.locator(absent).locator("visible=true").count() == 0
    # An image of which pixels alone are there, or an example.
    page.click(".mv-cards .mv-crop button >> nth=0")
    page.wait_for_selector("[data-box=progress]", state="hidden")
    assert page.locator("[data-box=trouble] .mv-state").count() == 0
    assert says(page.text_content("[data-box=rail]"), "on this device")
    page.click("[data-key=said-put-back]")
    page.wait_for_selector("[data-box=badge]", state="hidden")
    Image.new("RGB", (80, 60), "teal").save(
        tmp_path / "own.png"
    )  # of this nobody knows what it falls by
    page.set_input_files("[data-box=file]", tmp_path / "own.png")
    press(page, "[data-action=matters]", f"{SAID}:has-text('now {telling['after']['class']}')")


def test_whole_photos_are_sorted_without_their_model_and_ones_own_with_it(
    visits_at, home, whole, tmp_path
):
    def begin(one):
        one.shown = ".mv-sorted"

    page = visits_at(home, begin)("?model=cats_vs_dogs_two").page
    sorting = whole.entries["cats_vs_dogs_two"].card.sorting
    boxes = page.locator(".mv-sorted > section").all()
    for expert, box in enumerate(boxes):
        photos = [photo for photo in sorting["photos"] if photo["expert"] == expert]
        assert box.locator("img").count() == len(photos)
        right = max(routes[expert] for routes in sorting["routes"])
        assert says(box.locator("h2").text_content(), f"{right} of 416")
    assert not any("onnx" in request.url for request in page.visit.requests)

    data = bring(page, own_images("photos")[0])
    page.wait_for_selector(".mv-mine")
    upload = {"kind": "upload", "data": data}
    view = whole.answer("route", {"model": "cats_vs_dogs_two", "picture": upload})
    layer = next(one for one in view["layers"] if one["layer"] == sorting["layer"])
    assert says(page.text_content(".mv-told"), f"goes to expert {layer['experts'][0][0]}")
    assert no_sideways_scroll(page)


@pytest.mark.parametrize(
    "emoji", ["🐶🐱🚗🍕⚽😀🎁🏁🐶🐱🚗🍕⚽😀🎁🐶", "🐶🐱🐭🐹🐰🦊🐻🐼🐨🐯🦁🐮🍎🍕🚗😀"]
)
def test_the_fewest_experts_of_a_typed_page_are_pythons(visit_live, whole, emoji):
    picture = {"kind": "page", "text": emoji}
    away = whole.answer("fewest", {"model": "emoji", "picture": picture})["away"]
    page = visit_live(f"?page={quote(emoji)}").page
    page.wait_for_selector(".mv-picture.mv-sharp", state="attached")  # smooth, as examples are
    said = page.locator("[data-box=said]")
    said.filter(has_text="52 % flags: of all emoji that expert 0 gets.").wait_for()
    # Most of both pages are animals, which the model says of the second one alone.
    (best, *_) = whole.answer("route", {"model": "emoji", "picture": picture})["prediction"]["moe"]
    assert ("Most are animals: the model is wrong." in said.text_content()) == (
        best["class"] != "animals"
    )
    if away is None:
        page.wait_for_selector("[data-box=said]:has-text('nor any two or three')")
        return
    page.wait_for_selector(f"[data-box=said]:has-text('The fewest: {len(away)}.')")
    press(page, "[data-action=fall]", "[data-box=said]:has-text('Record')")
    page.wait_for_function("location.search.includes('away=')")
    (taken,) = parse_qs(urlsplit(page.url).query)["away"]
    assert [[int(number) for number in one.split(".")] for one in taken.split("_")] == away


def test_on_a_phone_nothing_is_cut_off(visit_live):
    page = visit_live("?model=pets", viewport={"width": 390, "height": 844}, door=False).page
    press(page, f"{BOX} >> nth=0", f"{SAID}:has-text('1 expert away')")
    assert no_sideways_scroll(page)


def test_what_lies_there_is_small(folder):
    """35 MB for small models and the runtime; those of photos lie beside them, and each is asked for by need."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    for model in ("photos", "cats_vs_dogs_two"):
        assert sizes.pop(f"{model}.onnx.bin") <= 30e6
    assert sum(sizes.values()) <= 35e6
    assert sizes["index.html"] <= 1e6
    assert "onnxruntime-web" in (folder / "NOTICE.txt").read_text("utf-8")
