"""One's own images: several at once, kept as long as the tab, and whose route their patches take."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.browser.conftest import (
    AWAY,
    change_answer,
    each,
    example,
    give,
    press,
    told,
    violations,
)

pytestmark = pytest.mark.needs("chromium", "playwright")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("own")
    for index in range(14):
        colours = np.random.default_rng(index).integers(0, 255, (5, 4, 3)).astype(np.uint8)
        Image.fromarray(colours).resize((64, 80)).save(home / f"{index:02}.png")
    return sorted(home.iterdir())


def add(page, files):
    page.set_input_files("[data-box=file]", files)
    page.wait_for_selector(on_stage(files[0]))
    page.wait_for_selector("[data-box=progress]", state="hidden")


def on_stage(file):
    return f".mv-own [aria-pressed=true][aria-label='Your image {file.name}']"


def names(page):
    return each(page, ".mv-own button", "one.ariaLabel.slice(11)")


def test_of_an_own_image_is_told_what_the_model_knows(visit, files, explorer):
    page = visit(door=False, reduced_motion="reduce").page
    page.set_input_files("[data-box=file]", files[:1])
    page.wait_for_selector("[data-box=said]:has-text('nothing else')")
    assert told(page, "h1").endswith("share this photo.")
    assert page.is_disabled("[data-key^=flow-own][aria-pressed=true]")  # it is shown: no choice
    view = explorer.answer("route", page.visit.question("route"))
    names = view["model"]["class_names"]
    knows = f"It knows {', '.join(names[:-1])} and {names[-1]}, and nothing else."
    assert knows in told(page, "[data-box=said]")
    # The file has 64 × 80 px: a fifth lies above and below the middle square.
    assert "middle square: 20 % of your photo lies outside." in told(page, "[data-box=said]")
    # All classes have a bar, and a stranger is told of in words: noise is none of the pets.
    bars = page.locator(".mv-flow-answer li > span").all_text_contents()
    assert sorted(bars) == sorted(names)
    assert told(page, "[data-box=said]").startswith(view["picture"]["unlike"])
    assert violations(page) == []
    press(page, ".mv-flow-box:not([disabled]) >> nth=0", AWAY)
    assert "nothing else" not in told(page, "[data-box=said]")  # of the whole model


def test_they_survive_a_reload_and_are_forgotten_when_asked(visit, files):
    page = visit().page
    add(page, files[:2])
    # The address is written a moment later, and one moment has one place in the history.
    page.wait_for_function("history.state['moevision.own'] === 1")
    press(page, ".mv-own button >> nth=1", on_stage(files[1]))
    page.wait_for_function("history.state['moevision.own'] === 2")
    shown = page.get_attribute(".mv-picture", "src")
    page.reload()
    page.wait_for_selector(".mv-cell")
    assert names(page) == [file.name for file in files[:2]]
    assert page.get_attribute(".mv-picture", "src") == shown
    page.go_back()
    page.wait_for_selector(on_stage(files[0]))
    page.click("[data-action=forget]")
    assert names(page) == []
    assert page.evaluate("sessionStorage.getItem('moevision.own')") == "[]"


def test_what_is_forgotten_does_not_come_back(visit, files):
    page = visit().page
    add(page, files[:1])
    page.wait_for_function("history.state['moevision.own'] === 1")
    press(page, example(4), until="location.search.includes('test%2F4')")
    page.click("[data-action=forget]")
    page.go_back()
    page.wait_for_selector("[data-action=example][data-id='pets/test/0'][aria-pressed=true]")
    page.wait_for_selector("[data-box=main][aria-busy=false]")
    assert page.visit.question("route")["picture"] == {"kind": "example", "id": "pets/test/0"}


def test_a_dozen_fit_and_a_broken_one_is_named(visit, files, tmp_path):
    page = visit().page
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    add(page, [*files[:10], broken])
    assert names(page) == [file.name for file in files[:10]]
    assert "broken.png" in page.text_content("[data-box=own-error]")
    add(page, files[10:14])
    assert names(page) == [file.name for file in [*files[10:14], *files[:8]]]
    assert "room for 12 images" in page.text_content(".mv-toast")


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_several_can_be_pasted_and_dropped(visit, files, way):
    page = visit().page
    give(page, files[:2], way)
    page.wait_for_selector(on_stage(files[0]))
    assert page.visit.question("route")["picture"]["kind"] == "upload"
    assert names(page) == [file.name for file in files[:2]]


KEPT = ("{", "[]", '[{"id": "x"}]', '[{"id": 1, "name": "a", "data": "http://x"}]')


@pytest.mark.parametrize("kept", KEPT)
def test_strange_storage_is_no_image(visit, new_visit, server, kept):
    one = new_visit()
    one.context.add_init_script(f"sessionStorage.setItem('moevision.own', {json.dumps(kept)})")
    one.open(server.url)
    assert names(one.page) == []
    assert one.complaints == []


def test_more_examples_come_when_asked_for(visit):
    page = visit().page
    assert page.locator(".mv-rail [data-action=example]").count() == 12
    press(page, "[data-action=more]", ".mv-rail [data-action=example] >> nth=35")
    assert page.evaluate("document.activeElement.dataset.key") == "more"
    page.click("[data-action=example][data-id='pets/test/20']")
    page.wait_for_function("location.search.includes('picture=pets%2Ftest%2F20')")


def test_more_is_offered_as_long_as_the_data_has_more(visit):
    """Photos that come with a model don't count as images of its data."""
    page = visit().page

    def with_two_of_five(boot):
        pets, photos = boot["models"]
        own = [{**one, "id": f"photo/{at}"} for at, one in enumerate(pets["examples"][2:6])]
        few = [*pets["examples"][:2], *own]
        return {"models": [pets, {**photos, "examples": few, "num_examples": 5}]}

    change_answer(page, "boot", with_two_of_five)
    page.select_option("[data-change=model]", "photos")
    page.wait_for_selector("[data-action=example][data-id='photo/3']")
    assert page.locator("[data-action=more]:visible").count() == 1
