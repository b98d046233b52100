"""M12 to M14: errors, keyboard, screen readers, contrast, small screens, and what the page owns up to."""

import re

import pytest

from tests.browser.conftest import (
    CHANGED,
    FIRST,
    PHONE,
    RABBIT,
    SERVER_CALL,
    at,
    example,
    experts_of,
    no_sideways_scroll,
    numbers,
    open_tab,
    press,
    serious,
    site,
)
from tests.demo.serving import LOGIN, asked_for
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

VARIANTS = ("trained", "untrained")
TABS = ("experts", "classes", "about")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{}, {"viewport": PHONE}], ids=["wide", "phone"])
def test_axe_finds_nothing_serious_and_nothing_scrolls_sideways(visit, scheme, size):
    link = "?patch=5&expert=L3.E1&do=force.3.1.next_best.0"
    page = visit(link, color_scheme=scheme, reduced_motion="reduce", **size).page
    for tab in TABS:
        open_tab(page, tab)
        assert serious(page, ".mv-below" if tab != TABS[0] else None) == [], tab
        assert no_sideways_scroll(page), tab


@pytest.mark.parametrize("size", [{}, {"viewport": PHONE}], ids=["wide", "phone"])
def test_warnings_keep_these_manners(visit, size):
    query = "?capacity=0.5&k=1&mode=drops&do=ablate.1.0.zero.0&tab=classes"
    page = visit(query, **size, then=".mv-heat").page
    page.wait_for_selector("[data-box=said] [data-part=class]")
    assert page.is_visible(CHANGED)  # off the distribution, and changed
    assert says(page.text_content("[data-box=said]"), "at random")
    assert serious(page) == []
    assert no_sideways_scroll(page)


def test_the_keyboard_reaches_everything(visit):
    page = visit(then=".mv-card").page
    reached = set()
    for _ in range(70):
        page.keyboard.press("Tab")
        data = page.evaluate("({ ...document.activeElement.dataset })")
        reached |= {data.get("action"), data.get("change"), "patch" if "patch" in data else None}
    wanted = (
        "take fly door patch example choose topk capacity variant mode flow-layer highlight model"
    )
    assert {*wanted.split(), "tab"} <= reached
    assert page.locator(".mv-cell[tabindex='0']").count() == 1
    page.press("[role=tab][aria-selected=true]", "ArrowRight")
    assert page.evaluate("document.activeElement.dataset.tab") == "classes"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "tabpanel"


CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const part = (one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.map((one) => part(one / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const marks = [...document.querySelectorAll('.mv-cell .mv-mark')].filter((one) => one.textContent);
  return marks.filter((one) => one.checkVisibility()).map((one) => {
    const style = getComputedStyle(one);
    const [ink, paper] = [style.color, style.backgroundColor].map(numbers);
    const [high, low] = [ink, paper].map((rgb) => light(rgb.slice(0, 3))).sort((a, b) => b - a);
    return [(high + 0.05) / (low + 0.05), Number(style.opacity) * (paper[3] ?? 1)];
  });
}"""


@pytest.mark.parametrize("mode", ["expert", "entropy"])
def test_what_stands_on_the_image_can_be_read(visit, mode):
    """WCAG 2.1's contrast of every number with what lies behind it, which lets nothing of the photo through."""
    page = visit(f"?mode={mode}").page
    found = page.evaluate(CONTRASTS)
    assert len(found) == 16
    assert min(contrast for contrast, _ in found) >= 4.5
    assert min(cover for _, cover in found) >= 0.9


def test_the_foot_leads_on(visit, server):
    page = visit(door=False, reduced_motion="reduce").page
    foot = page.locator(".mv-footer")
    assert foot.locator("summary").all_text_contents() == ["Cite", "API"]
    foot.locator("summary").first.click()
    assert "@software{moevision" in foot.locator("pre").first.text_content()
    foot.locator("summary").last.click()
    assert page.evaluate("location.origin") in foot.locator("pre").last.text_content()
    assert "as a Gradio app" in foot.locator("pre").last.text_content()
    assert serious(page, ".mv-footer") == []
    # another model is one click away
    assert foot.locator("[data-action=model]").all_text_contents() == ["The photos"]
    foot.locator("[data-action=model]").click()
    page.wait_for_selector(".mv-footer [data-action=model]:has-text('The pets')")
    page.wait_for_selector("[data-box=progress]", state="hidden")
    assert page.visit.question("route")["model"] == "photos"
    here, lesson = foot.locator(".mv-site a").all()  # as in lesson, report and data page
    assert here.text_content() == "Explorer"
    assert here.get_attribute("aria-current") == "page"
    assert lesson.text_content() == "Lesson"
    assert lesson.get_attribute("href") == "lesson.html"  # of a checkout
    lesson.click()
    page.wait_for_selector("h1")
    assert "Mixture of Experts" in page.title()


def test_a_term_is_explained_to_mouse_and_keyboard(visit):
    page = visit().page
    page.hover(".mv-facts [data-term=margin]")
    assert "second-highest" in page.text_content("[role=tooltip]:visible")
    page.mouse.move(2, 2)
    assert page.locator("[role=tooltip]:visible").count() == 0
    page.focus(".mv-facts [data-term=entropy]")
    assert "in bits" in page.text_content("[role=tooltip]:visible")
    page.keyboard.press("Escape")
    assert page.locator("[role=tooltip]:visible").count() == 0


def test_the_grid_is_told_to_a_screen_reader(visit):
    page = visit().page
    grid = page.locator("[role=grid]")
    assert grid.get_attribute("aria-rowcount") == "4"
    assert grid.locator("> [role=row]").count() == 4
    assert grid.locator("> [role=row] > [role=gridcell]").count() == 16
    labels = page.locator("[role=gridcell]").evaluate_all("all => all.map(one => one.ariaLabel)")
    spoken = re.compile(r"row \d, column \d: expert \d, weight \d\.\d\d")
    assert all(map(spoken.fullmatch, labels))


def test_who_may_show_the_page_in_a_frame(new_visit, server):
    """A notebook on this computer may, another website may not (clickjacking)."""
    frame = f"<!doctype html><iframe src='{server.url}' width=1200 height=800></iframe>"
    with site(frame.encode()) as port:
        for name, allowed in (("localhost", True), ("evil.localhost", False)):
            one = new_visit()
            one.page.goto(f"http://{name}:{port}/")
            if allowed:
                one.page.frame_locator("iframe").locator(".mv-flow-box").first.wait_for()
            refused = any("frame-ancestors" in complaint for complaint in one.complaints)
            assert refused is not allowed


def test_a_login_works_and_complains_about_nothing(new_visit, server):
    one = new_visit()
    one.page.goto(server.doors["locked"])
    one.page.goto(server.doors["locked"] + "?layer=3")
    for password, then in (("guess", "text=Incorrect credentials"), (LOGIN[1], ".mv-cell")):
        one.page.fill("[name=username]", LOGIN[0])
        one.page.fill("[name=password]", password)
        press(one.page, "button", then)
    assert "layer=3" in one.page.url  # the link that was opened
    assert not any("Content Security Policy" in complaint for complaint in one.complaints)
    assert one.strangers(server.doors["locked"]) == []


def test_a_shared_page_asks_no_server_of_gradios(new_visit, server):
    one = new_visit()
    one.open(server.doors["shared"])
    press(one.page, example(2), RABBIT)
    assert one.complaints == []
    assert one.strangers(server.doors["shared"]) == []


def test_a_busy_server_is_asked_again(new_visit, server):
    page = new_visit().open(server.url)
    routes = []

    def busy_once(route):
        if asked_for(route.request) == "route":
            routes.append(route)
            if len(routes) == 1:
                return route.fulfill(json={"error": "Many people are asking.", "code": "busy"})
        return route.continue_()

    page.route(SERVER_CALL, busy_once)
    press(page, example(2), "[data-box=toast]:has-text('Many people')")
    page.wait_for_selector(RABBIT)
    assert len(routes) == 2
    assert page.locator("[role=alert]").count() == 0


def refuse(page, **asked):
    """Every question about a view that asks for this goes unanswered, until `page.unroute(SERVER_CALL)`."""

    def handle(route):
        given = route.request.post_data_json
        refused = asked_for(route.request) == "route" and asked.items() <= given.items()
        return route.abort() if refused else route.continue_()

    page.route(SERVER_CALL, handle)


def test_what_failed_is_asked_for_again_by_the_next_choice(new_visit, server, ask):
    """Another variant, which fails, then another image: of that variant."""
    page = new_visit().open(server.url)
    refuse(page, variant="untrained")
    press(page, "[data-variant=untrained]", "[data-action=retry]")
    page.unroute(SERVER_CALL)
    press(page, example(6), "[data-action=retry]", state="detached")
    view = ask("route", picture={**FIRST, "id": "pets/test/6"}, variant="untrained")
    assert numbers(page) == experts_of(view["layers"][1])


def test_back_to_an_image_that_failed_before_shows_it(new_visit, server):
    """Rabbit, then another; the rabbit again, which fails; back to where it was seen."""
    page = new_visit().open(server.url + "?picture=pets/test/2")
    page.wait_for_function("location.search.includes('patch=')")
    press(page, example(5), ".mv-picture[alt*=fox]")
    page.wait_for_function("location.search.includes('test%2F5')")
    refuse(page)
    press(page, example(2), "[data-action=retry]")
    page.unroute(SERVER_CALL)
    page.go_back()
    page.wait_for_selector(RABBIT)


def test_a_model_without_pictures_says_how_to_bring_some(visit):
    page = visit().page
    page.select_option("[data-change=model]", "photos")
    page.wait_for_selector("[data-box=progress]", state="hidden")
    for tab in ("experts", "classes"):
        open_tab(page, tab)
        assert "--data" in page.text_content(".mv-panel")


def test_an_expert_of_one_model_is_not_highlighted_in_another(visit):
    page = visit("?expert=L3.E1").page
    page.select_option("[data-change=model]", "photos")
    at(page, "model=photos")
    assert "expert=" not in page.url
    assert page.text_content("[data-box=hand]") == ""
    assert page.locator(".mv-legend-key [aria-pressed=true]").count() == 0


def before_photos(page):
    """Photos, back to pets, and a reload: Forward leads to a model whose images aren't here yet."""
    page.select_option("[data-change=model]", "photos")
    page.wait_for_function("location.search.includes('model=photos')")
    page.go_back()
    page.wait_for_function("!location.search.includes('model=photos')")
    page.reload()
    page.wait_for_selector(".mv-cell")
    page.wait_for_selector("[data-box=main][aria-busy=false]")


def test_forward_after_a_reload_finds_the_other_models_images(visit, hold):
    page = visit().page
    before_photos(page)
    held = hold(page, "boot")
    page.go_forward()
    # It says so while the other model's images are fetched.
    page.wait_for_selector("[data-box=main][aria-busy=true]")
    held.release()
    page.wait_for_selector("[data-box=main][aria-busy=false]")
    assert page.is_visible("[data-action=example][data-id^='photo/']")
    assert "model=photos" in page.url


def test_an_image_that_is_chosen_while_forward_waits_stands(visit, hold):
    page = visit().page
    before_photos(page)
    held = hold(page, "boot")
    page.go_forward()
    held.wait()
    press(page, example(2), RABBIT)
    held.release()
    assert page.locator(RABBIT).count() == 1
    assert page.eval_on_selector("[data-change=model]", "select => select.value") == "pets"
    at(page, "model=pets", "test%2F2")


def test_of_two_models_the_last_one_is_shown_though_both_wait(visit, hold):
    page = visit().page
    held = hold(page, "boot")
    page.select_option("[data-change=model]", "photos")
    held.wait()
    page.select_option("[data-change=model]", "pets")
    page.wait_for_selector("[data-box=main][aria-busy=false]")
    held.release()
    assert page.eval_on_selector("[data-change=model]", "select => select.value") == "pets"
    assert page.is_visible(example(2))


def test_forward_to_images_that_do_not_come_can_be_tried_again(new_visit, server):
    page = new_visit().open(server.url)
    before_photos(page)
    page.route(SERVER_CALL, lambda route: route.abort())
    page.go_forward()
    page.wait_for_selector("[data-action=retry]")
    assert page.locator("text=without images").count() == 0
    page.unroute(SERVER_CALL)
    press(page, "[data-action=retry]", "[data-action=example][data-id^='photo/']")
    page.wait_for_selector("[data-box=main][aria-busy=false]")
    assert page.locator("[data-action=retry]").count() == 0
    assert "model=photos" in page.url


def test_an_image_that_is_chosen_on_the_way_back_is_an_entry_of_its_own(visit, hold):
    page = visit(until="location.search.includes('test%2F0')").page
    press(page, example(4), until="location.search.includes('test%2F4')")
    page.wait_for_selector("[data-box=main][aria-busy=false]")
    held = hold(page, "route")
    page.go_back()
    held.wait()
    page.click(example(6))
    held.wait(2)
    held.release()
    page.wait_for_function("location.search.includes('test%2F6')")
    page.go_back()
    page.wait_for_function("location.search.includes('test%2F0')")
    page.wait_for_selector(".mv-picture[alt*=cat]")


def test_a_click_before_a_links_image_came_stands(new_visit, server, hold):
    page = new_visit().page
    held = hold(page, "route")
    page.goto(server.url + "?picture=pets/test/5")
    held.wait()
    page.click(example(2))
    held.wait(2)
    held.release()
    page.wait_for_selector(RABBIT)
    assert page.is_hidden("[data-box=toast]")


def test_a_link_whose_server_did_not_answer_is_tried_again(new_visit, server):
    page = new_visit().page
    refuse(page)
    page.goto(server.url + "?picture=pets/test/5&patch=3")
    page.wait_for_selector("[data-action=retry]")
    page.unroute(SERVER_CALL)
    press(page, "[data-action=retry]", ".mv-picture[alt*=fox]")
    assert page.get_attribute(".mv-pinned", "data-patch") == "3"
    assert page.is_hidden("[data-box=toast]")


def test_a_link_to_another_model_says_that_it_waits(new_visit, server, hold):
    page = new_visit().page
    held = hold(page, "boot")
    page.goto(server.url + "?model=photos")
    page.wait_for_selector("[data-box=main][aria-busy=true]")
    assert page.is_visible("[data-change=model]")
    assert page.is_visible("[data-tab=about]")
    held.release()
    page.wait_for_selector("[data-action=example][data-id^='photo/']")
    page.wait_for_selector(".mv-cell")


def test_a_link_to_another_model_can_be_tried_again(new_visit, server):
    page = new_visit().page
    page.route(SERVER_CALL, lambda route: route.abort())
    page.goto(server.url + "?model=photos")
    page.wait_for_selector("[data-action=retry]")
    page.unroute(SERVER_CALL)
    press(page, "[data-action=retry]", "[data-action=example][data-id^='photo/']")
    page.wait_for_selector(".mv-cell")


def test_a_late_answer_does_not_bring_back_the_former_models_image(visit, empty_stage):
    """One click on an image, and at once another model, which has none to show."""
    page = visit().page
    empty_stage(page)
    page.select_option("[data-change=model]", "pets")
    page.wait_for_selector("[data-box=main]:visible")
    with page.expect_response(lambda response: asked_for(response.request) == "route"):
        page.evaluate("""() => {
            document.querySelectorAll("[data-action=example]")[4].click();
            const models = document.querySelector("[data-change=model]");
            models.value = "photos";
            models.dispatchEvent(new Event("change", { bubbles: true }));
        }""")
    page.wait_for_timeout(200)  # ms; an answer is shown in far less
    assert page.is_hidden("[data-box=main]")
    assert page.is_visible("[data-box=blank]")


def test_the_first_screen_says_what_the_model_is_and_sees(visit, ask):
    view = ask("route", picture=FIRST)
    page = visit().page
    header, answer = page.text_content(".mv-header"), page.text_content(".mv-flow-answer")
    assert view["model"]["accuracy_text"] in header
    assert view["model"]["data_text"] in header
    assert says(answer, "The model says", view["prediction"]["moe"][0]["class"])
    bars = page.locator(".mv-box-prediction .mv-class").all_text_contents()
    top = [one["class"] for side in ("moe", "dense") for one in view["prediction"][side]]
    assert [bar.split()[0] for bar in bars] == top


def test_each_variant_is_shown_with_its_own_accuracy_and_training(visit, ask):
    page = visit("?tab=about").page
    views = {name: ask("route", picture=FIRST, variant=name) for name in VARIANTS}
    texts = {name: view["model"]["accuracy_text"] for name, view in views.items()}
    assert len(set(texts.values())) == 2
    for name, text in texts.items():
        press(page, f"[data-variant={name}]", "[data-box=progress]", state="hidden")
        others = set(texts.values()) - {text}
        for part in (".mv-header", ".mv-panel"):
            shown = page.text_content(part)
            assert text in shown
            assert not [other for other in others if other in shown]
        rows = page.locator(".mv-card-table dt").all_text_contents()
        # This card has one recipe only.
        assert ("seed" in rows) == ("recipe" in rows) == (name == "trained")
        assert ("recipe, trained" in rows) == (name != "trained")


def test_about_says_what_the_page_does_not_show(visit):
    text = visit("?tab=about").page.text_content(".mv-panel")
    for word in ("attends", "residual", "cause", "one image", "seed", "Apache-2.0"):
        assert word in text
