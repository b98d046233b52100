"""An expert's page by its link: what it says is the service's."""

import pytest

from tests.browser.conftest import change_answer, no_sideways_scroll, press
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")


def test_a_link_opens_an_experts_page_and_its_button_all_of_them(visit, ask):
    card = ask("experts", layer=1)["experts"][2]
    page = visit("?expert=L1.E2", door=False, then=".mv-alone").page
    assert page.locator(".mv-card").count() == 1
    assert page.locator(".mv-card h2").text_content() == "L1·E2"
    shown = page.text_content(".mv-card")
    assert f"{card['load_share'] * 100:.1f} % of all choices" in shown
    called = card["called"]
    assert not called or says(shown, f"everything: {called['overall'] * 100:.0f} %")
    counts = [gallery.locator("img").count() for gallery in page.locator(".mv-gallery").all()]
    assert counts == [len(card["top"]), len(card["random"])]
    press(page, "[data-key=show-2]", until="document.querySelectorAll('.mv-card').length === 4")
    # The address is written a moment later, and only what stands in it has a place in the history.
    page.wait_for_function("!location.search.includes('expert=')")
    press(page, "[data-key=show-3]", ".mv-alone h2:has-text('L1·E3')")
    page.wait_for_function("location.search.includes('expert=L1.E3')")
    page.go_back()
    page.wait_for_function("document.querySelectorAll('.mv-card').length === 4")
    assert no_sideways_scroll(page)


def test_what_was_measured_and_named_is_told(new_visit, server):
    """An untrained model has neither: let the service say that it has."""
    without = {"images_per_class": 40, "delta_logit": -0.5, "control_delta_logit": -0.1}
    told = {
        "called": {"kind": "part", "name": "whisker", "share": 0.4459, "overall": 0.1287},
        "without": {**without, "strongest_class": "<b>cat", "strongest_delta_logit": -1.25},
    }
    page = new_visit().page
    name = "experts"
    change_answer(page, name, lambda data: {**data, name: [card | told for card in data[name]]})
    page.visit.open(server.url + "?expert=L3.E1")
    page.wait_for_selector(".mv-alone")
    assert says(page.text_content(".mv-called"), "whisker: 45 %", "everything: 13 %")
    assert says(page.text_content(".mv-without"), "40 test images", "most for <b>cat, −1.25")


@pytest.mark.parametrize(
    ("query", "named"), [("?expert=L1.E2", ".mv-alone h2"), ("?tab=classes", ".mv-heat")]
)
def test_a_link_lands_on_what_it_names(visit, query, named):
    """An expert with a patch: on the photo, where its part stands out."""
    page = visit(query, door=False, then=named).page
    top = page.locator(named).first.bounding_box()["y"]
    assert 0 <= top < 900
    other = visit(f"{query}&patch=3", door=False, then=named).page
    assert bool(other.evaluate("scrollY")) == ("tab" in query)
