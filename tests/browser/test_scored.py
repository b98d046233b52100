"""Links of the page of `moevision data score`: the image on the stage, whatever its name; of earlier versions, too."""

from urllib.parse import quote

import pytest

from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.browser.conftest import answering, no_sideways_scroll
from tests.demo.conftest import HOSTILE

pytestmark = pytest.mark.needs("chromium", "playwright")

HOME = "http://127.0.0.1:7860/"  # where these links lead; nothing listens there
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def scored(scored_run):
    return Explorer(open_entries(str(scored_run)))


@pytest.fixture
def visit_run(visits_at, scored):
    """Opens visits of an explorer that answers in this process."""
    return visits_at(HOME, answering(HOME, scored))


@pytest.mark.parametrize("tab", ["", "&tab=data", "&tab=data&list=nope&class=nope"])
def test_a_link_of_the_page_of_data_score_on_a_phone(visit_run, tab):
    """Those of earlier versions name a tab that is gone: the first one opens."""
    page = visit_run(f"?picture={quote(f'train/{HOSTILE}')}{tab}", **PHONE).page
    page.wait_for_selector(".mv-picture")
    assert page.visit.question("route")["picture"] == {"kind": "example", "id": f"train/{HOSTILE}"}
    assert HOSTILE in page.locator(".mv-picture").get_attribute("alt")
    assert page.locator(".mv img[src=x]").count() == 0
    tabs = page.locator("[data-tab]")
    assert tabs.all_text_contents() == ["Experts", "Classes", "About"]
    if tab:
        assert page.get_attribute("[data-tab=experts]", "aria-selected") == "true"
        page.wait_for_function("!/tab=|list=|class=/.test(location.search)")
    assert no_sideways_scroll(page)
