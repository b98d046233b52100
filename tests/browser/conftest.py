"""A real Chromium for the tests of the page.

Debian's `chromium` is used, or what MOEVISION_CHROMIUM names; without one the tests are skipped (`tests/needs.py`).
What a page shows is compared with the service's own answer, which `ask` gets past the page.
"""

import base64
import re
import statistics
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moevision.demo.html import app_page
from tests.demo.conftest import (
    bundle,
    explorer,
    games_home,
    home,
    make,
    photos_home,
    pixels,
    recorded,
    routers_home,
    scored_run,
    server,
)
from tests.demo.serving import asked_for
from tests.needs import chromium

CONTROLLED = ".mv-flow-say:has-text('moved at random')"  # not yet where it is being measured
AWAY = ".mv-flow-box[aria-pressed=true]"
SERVER_CALL = re.compile(r"/api/\w+$")
WIDE = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
MOBILE = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
CHANGED = "[data-box=said] [data-action=as-is]"  # seen beside what isn't as it was trained
FIRST = {"kind": "example", "id": "pets/test/0"}


@pytest.fixture(scope="package")
def browser():
    """Not for longer: while Playwright is there, no test of this process may start an event loop."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium(), args=flags)
        yield browser
        browser.close()


class Visit:
    """A page in a profile of its own, with everything that it asked for and complained about."""

    def __init__(self, browser, *, door=True, **options):
        self.context = browser.new_context(**{"viewport": WIDE, **options})
        if door:  # as it was left at an earlier visit; a sandboxed frame has no storage
            keep = "localStorage.setItem('moevision.door', 'open')"
            self.context.add_init_script(f"try {{ {keep} }} catch {{}}")
        self.shown = ".mv-cell" if door else ".mv-flow-box"
        self.context.set_default_timeout(120_000)  # ms; a busy machine may take most of it
        self.page = self.context.new_page()
        self.page.wait_for_function = self._wait_for
        self.page.visit = self
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _wait_for(self, expression, *, arg=None):
        """Playwright's own evaluates a text inside the page, which the page's policy forbids."""
        end = time.monotonic() + 120
        while not self.page.evaluate(expression, arg):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)  # ms

    def _hear(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, address):
        """Go there and wait for the image."""
        self.page.goto(address)
        self.page.wait_for_selector(self.shown)
        self.page.wait_for_selector("[data-box=progress]", state="hidden")
        return self.page

    def _calls(self):
        posts = [request for request in self.requests if request.method == "POST"]
        calls = [post for post in posts if SERVER_CALL.search(post.url)]
        return [(asked_for(call), call.post_data_json) for call in calls]

    @property
    def asked(self):
        """Names of the server functions that the page called."""
        return [name for name, _ in self._calls()]

    def rest(self):
        """Wait for the search that the page begins when nobody clicks; after it the page asks for nothing by itself."""
        end = time.monotonic() + 120
        while "fewest" not in self.asked:
            assert time.monotonic() < end, self.asked
            self.page.wait_for_timeout(20)  # ms

    def questions(self, name):
        """What the page asked the server function `name`, in that order."""
        return [data for called, data in self._calls() if called == name]

    def question(self, name):
        """What it asked last."""
        return self.questions(name)[-1]

    def strangers(self, home):
        """Addresses elsewhere that were asked for."""
        known = (home, "data:", "blob:")
        return [each.url for each in self.requests if not each.url.startswith(known)]


@pytest.fixture
def new_visit(browser):
    """Opens visits that may go wrong on purpose."""
    visits = []

    def begin(**options):
        visits.append(Visit(browser, **options))
        return visits[-1]

    yield begin
    for one in visits:
        one.page.unroute_all(behavior="ignoreErrors")  # a handler may still be on its way
        one.context.close()


@pytest.fixture
def visits_at(new_visit):
    """`visits_at(address)` opens visits there, held to the same manners: no complaint, no request to anywhere else."""
    visits = []

    def at(address, before=lambda visit: None):
        def begin(query="", then=None, until=None, **options):
            """Go there; if asked for, wait for a selector, or for an expression to become true."""
            one = new_visit(**options)
            before(one)
            visits.append((one, address))
            page = one.open(address + query)
            if then:
                page.wait_for_selector(then)
            if until:
                page.wait_for_function(until)
            return one

        return begin

    yield at
    for one, address in visits:
        assert one.complaints == []
        assert one.strangers(address) == []
        assert one.requests


def answering(home, explorer):
    """Has an explorer of this process answer what a visit asks below `home`, where nothing listens: for `visits_at`."""

    def answer(route):
        if route.request.method == "GET":
            page = app_page(explorer.start_boot(), explorer.start_views())
            own = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'"
            headers = {"content-security-policy": f"{own}; {page.policy}"}
            return route.fulfill(content_type="text/html", body=page.text, headers=headers)
        name, question = asked_for(route.request), route.request.post_data_json
        return route.fulfill(json=explorer.answer(name, question))

    return lambda one: one.context.route(f"{home}**", answer)


@pytest.fixture
def visit(visits_at, server):
    return visits_at(server.url)


@pytest.fixture
def photos(visits_at, server):
    """Opens the model with photos and a recorded training."""
    return visits_at(server.doors["photos"])


@pytest.fixture(scope="module")
def ask(explorer):
    def ask(name, **request):
        answer = explorer.answer(name, {"model": "pets", **request})
        assert "error" not in answer, answer
        return answer

    return ask


def violations(page, part=None, impacts=("minor", "moderate", "serious", "critical", None)):
    """What axe-core finds on the page, or in a part of it."""
    from axe_playwright_python.sync_playwright import Axe

    rules = Axe().run(page, part).response["violations"]
    found = [one for one in rules if one["impact"] in impacts]
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]


def serious(page, part=None):
    """What keeps people out."""
    return violations(page, part, ("serious", "critical"))


def at(page, *words):
    """Wait until the address has all these words."""
    there = "words => words.every(word => location.search.includes(word))"
    page.wait_for_function(there, arg=words)


def press(page, selector, then=None, *, until=None, state="visible"):
    """Click, and wait for what comes of it: an element in that state, or an expression that becomes true."""
    page.click(selector)
    if until is None:
        page.wait_for_selector(then, state=state)
    else:
        page.wait_for_function(until)


def change_answer(page, name, change):
    """From now on the server's function `name` answers `change(its answer)`."""

    def handle(route):
        if asked_for(route.request) != name:
            return route.continue_()
        answer = route.fetch()
        return route.fulfill(response=answer, json=change(answer.json()))

    page.route(SERVER_CALL, handle)


def saved(page, kind):
    """The file that the Share menu saves: `card`, `json`, `page` or `png`."""
    page.click(".mv-menu summary")
    with page.expect_download() as waiting:
        page.click(f"[data-action=export-{kind}]")
    return waiting.value


def alone(new_visit, page, folder):
    """A visit, offline, of the page that the Share menu saves."""
    file = folder / "page.html"
    saved(page, "page").save_as(file)
    visit = new_visit(offline=True)
    visit.address = file.as_uri()
    visit.page.goto(visit.address)
    return visit


def choose_layer(page, place):
    """The place of a layer among those with experts, from 0."""
    page.select_option("[data-change=flow-layer]", str(place))


def take_away(page, expert):
    """Click an expert's box, and wait until it is away."""
    box = f".mv-flow-box[data-expert='{expert}']"
    press(page, box, f"{box}[aria-pressed=true]")


def counts(page):
    """Of how many patches each box's expert is the first; "away", and a share of Soft MoE, as they stand there."""
    texts = page.locator(".mv-flow-box [data-part=amount]").all_text_contents()
    found = [re.match(r"(\d+) patch(?:es)?$", text) for text in texts]
    pairs = zip(texts, found, strict=True)
    is_first_of_none = re.compile(r"none$|(second choice|also) for ")
    return [
        int(number[1]) if number else 0 if is_first_of_none.match(text) else text
        for text, number in pairs
    ]


def firsts(ask, layer=1, **request):
    """The first expert of each patch of the first image, and of how many patches each expert is that."""
    shown = ask("route", picture=FIRST, **request)["layers"][layer]
    first = [chosen[0] for chosen in shown["experts"]]
    return first, [first.count(expert) for expert in range(shown["num_experts"])]


def faded(page, first):
    """Of each patch of a square grid whether the photo is faded there to the paper's colour, 82 % of it."""
    alpha = """first => {
      const canvas = document.querySelector('[data-part=contours]');
      const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
      copy.drawImage(canvas, 0, 0);
      const side = Math.sqrt(first.length);
      const at = (patch) => [patch % side + .5, Math.floor(patch / side) + .8]
        .map((part) => Math.floor(part * canvas.width / side));
      return first.map((_, patch) => copy.getImageData(...at(patch), 1, 1).data[3]);
    }"""
    return [value == 209 for value in page.evaluate(alpha, first)]  # 255 · .82


def experts_of(layer):
    """The number on every patch: its first expert in a layer of a view."""
    return [str(choices[0]) for choices in layer["experts"]]


def answered(page):
    """Wait for the view that was asked for last: it is drawn in one go, before the page says that it isn't busy."""
    page.wait_for_selector("[data-box=main][aria-busy=true]", state="detached")


def each(page, selector, what):
    """An expression in `one`, of each element."""
    return page.locator(selector).evaluate_all(f"all => all.map(one => {what})")


def figures(page, name):
    """All numbers of that name in the picture of the computation, in order."""
    texts = page.locator(f".mv-box-card [data-n={name}]").all_text_contents()
    return [float(text.replace("\N{MINUS SIGN}", "-").split()[0].rstrip("%")) for text in texts]


def numbers(page):
    """The text on every patch of the first image."""
    answered(page)
    return page.locator(".mv-mark").all_text_contents()


def fills(page):
    """Colour and opacity of every patch: [(r, g, b, a)]."""
    answered(page)
    colours = each(page, ".mv-cell", "one.style.backgroundColor")
    found = [[float(value) for value in re.findall(r"[\d.]+", colour)] for colour in colours]
    return [(*values[:3], values[3] if len(values) > 3 else 1.0) for values in found]


def told(page, selector="[data-box=said]"):
    """A text without its line breaks, and without those that keep a number beside its unit."""
    return " ".join(page.text_content(selector).split())


def said(page):
    """What a screen reader was told last."""
    return page.text_content("[data-live]")


def open_tab(page, name):
    press(page, f"[data-tab={name}]", ".mv-panel:not(:has(.mv-spinner))")


def example(number):
    """The button of a drawn pet in the rail; number i is of class i modulo 8."""
    return f".mv-rail [data-id='pets/test/{number}']"


RABBIT = ".mv-picture[alt*=rabbit]"  # number 2


def clipped(page, selector):
    """Classes of the elements that are wider than their place."""
    wide = each(page, selector, "one.scrollWidth > one.clientWidth + 1 && `.${one.className}`")
    return [name for name in wide if name]


def no_sideways_scroll(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def result(effect):
    """Target before -> after and the control's mean and spread, with as many digits as the spread leaves."""
    before = effect["before"][0]["p"]
    controls = [before + delta for delta in effect["control"]["delta_ps"]]
    mean, spread = statistics.fmean(controls), statistics.stdev(controls)
    digits = 1 if spread < 0.0095 else 0
    old, now, mean, spread = (
        f"{100 * p:.{digits}f} %" for p in (before, before + effect["delta_p"], mean, spread)
    )
    target, other = effect["target"], effect["after"][0]["class"]
    told = f"{target} stays {now}" if old == now else f"{target} {old} → {now}"
    moved = effect["moved"] + effect["moved_prefix"] > 0
    control = f"As many patches moved at random: {target} {mean} ± {spread}"
    if not moved:
        control = "No patch changes its experts"
    return f"{told}{'' if other == target else f', now {other}'}. {control}"


def give(page, files, way="drop"):
    """Drop files on the image, or paste them."""
    page.evaluate(
        """([way, files]) => {
          const transfer = new DataTransfer();
          files.forEach(([name, data]) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: 'image/png' }));
          });
          const options = { bubbles: true, cancelable: true };
          const event = way === 'paste'
            ? new ClipboardEvent('paste', { ...options, clipboardData: transfer })
            : new DragEvent('drop', { ...options, dataTransfer: transfer });
          document.querySelector('.mv-canvas').dispatchEvent(event);
        }""",
        [way, [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]],
    )


@contextmanager
def site(document, **headers):
    """The port of a website on this computer that has one document."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            for name, value in {"content-type": "text/html", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(document)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


class Held:
    """The calls of one of the server's functions, which wait until they are released."""

    def __init__(self, page, name):
        self.page, self.name, self.routes, self.released = page, name, [], False
        page.route(SERVER_CALL, self.handle)

    def handle(self, route):
        if not self.released and asked_for(route.request) == self.name:
            self.routes.append(route)
        else:
            route.continue_()

    def wait(self, count=1):
        """Until there are as many calls."""
        end = time.monotonic() + 60  # s
        while len(self.routes) < count:
            assert time.monotonic() < end
            self.page.wait_for_timeout(20)  # ms

    def release(self):
        """All of them, and wait for the answers."""
        self.released = True
        for route in self.routes:
            with self.page.expect_response(
                lambda answer, request=route.request: answer.request == request
            ):
                route.continue_()
        self.page.wait_for_timeout(200)  # ms; an answer is shown in far less


@pytest.fixture
def hold():
    """`hold(page, name)` lets a server function wait for a test."""
    return Held


@pytest.fixture
def empty_stage():
    """Goes on to a model that comes without images."""

    def without_examples(boot):
        return {"models": [{**model, "examples": []} for model in boot["models"]]}

    def go(page):
        change_answer(page, "boot", without_examples)
        page.select_option("[data-change=model]", "photos")
        page.wait_for_selector("[data-box=blank]:visible")

    return go
