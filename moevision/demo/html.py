"""The page's own files, put together: the explorer's document, exported pages, a notebook's frame.

There is no build step. `assets/` holds CSS and ES modules, which editors, `tsc` and node read as they are. A page is
one file whose policy lets no other script run: so `script_of` puts the modules one after another, each behind those
that it imports, and leaves `import`, `export` and JSDoc out (tests/demo/test_html.py: no two of them declare one name).
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from moevision import __version__
from moevision.errors import json_text

CORE_STYLES: Final = ("explorer_base.css", "explorer_stage.css")
APP_STYLES: Final = ("explorer.css", "explorer_flow.css", "explorer_tabs.css")
# The page around `.mv` has its background (--bg in explorer_base.css), so that a wide screen shows no seam.
_PAGE_STYLE: Final = (
    "body{margin:0;background:#fbfbf9}@media(prefers-color-scheme:dark){body{background:#131417}}\n"
)
_MAIN: Final = '<main class="mv" data-mv></main>'
VIEW_SCHEMA: Final = "moevision.view/2"
OFFLINE: Final = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
"""A second lock: even a bug could not make a page of one file load something from elsewhere."""

_IMPORT: Final = re.compile(r'^import \{[^}]*\} from "\.[\w./]*/([\w-]+\.js)";\n', re.M)
_EXPORT: Final = re.compile(r"^export (?=(?:async )?(?:function|class|const) )", re.M)
DOCS: Final = re.compile(r"^ */\*\*(?:(?!\*/).)*\*/\n", re.M | re.S)
"""JSDoc above a declaration: for readers and tsc; the page goes without."""
_MARGIN: Final = re.compile(r"^ *//.*\n|^ +", re.M)


def links() -> dict[str, str | None]:
    """Where lesson and code are, as `[project.urls]` has it (null where it names none), and how to cite."""
    urls = dict(url.split(", ", 1) for url in metadata("moevision").get_all("Project-URL") or ())
    code = urls.get("Repository")
    lesson = urls.get("Documentation")
    if lesson_file():
        lesson = "lesson.html"
    elif lesson:
        lesson = f"{lesson.rstrip('/')}/lesson.html"
    title = "moevision: sparse vision transformers whose routing can be seen"  # CITATION.cff
    cite = f"@software{{moevision,\n  title = {{{title}}},\n  version = {{{__version__}}},"
    if code:
        cite += f"\n  url = {{{code}}},"
    return {"lesson": lesson, "code": code, "cite": cite + "\n}"}


class Document(NamedTuple):
    """A page of one file, and the `script-src` of its policy, which lets its own script run and no other."""

    text: str
    policy: str


def app_page(
    boot: Mapping[str, Any],
    views: Sequence[Mapping[str, Any]],
    *,
    read: Callable[[str], str] | None = None,
    style: str = "",
) -> Document:
    """The explorer: what stands there until the script runs, then the script with all that the first screen shows.

    `boot` is what the request of that name answers, `views` are those of the images that the page opens with; `read`
    is as for `script_of`, and `style` is added.
    """
    start = "startApp(document.querySelector('[data-mv]'), BOOT, VIEWS);"
    script = script_of("app.js", start, read=read, BOOT=boot, VIEWS=views)
    body = f'<main class="mv" data-mv>{_waiting(boot, views)}</main>'
    css = read_css((*CORE_STYLES, *APP_STYLES)) + style
    text = document("See inside a Mixture of Experts", css, body, script, policy="")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Document(text, f"script-src 'sha256-{digest}'")


def login_page(query: str, wrong: bool) -> str:
    """The form that asks for user and password; the address's query comes back with the page behind it."""
    alert = '<p role="alert">Incorrect credentials.</p>' if wrong else ""
    field = '<p><label>{0}<br><input name="{1}" type="{2}" autocomplete="{3}" required></label></p>'
    body = (
        f'<main class="mv"><h1>moevision explorer</h1>{alert}<form method="post" action="login?{html.escape(query)}">'
        + field.format("User", "username", "text", "username")
        + field.format("Password", "password", "password", "current-password")
        + '<p><button class="mv-button">Log in</button></p></form></main>'
    )
    return document("moevision explorer", read_css(CORE_STYLES), body, "", policy="")


def _waiting(boot: Mapping[str, Any], views: Sequence[Mapping[str, Any]]) -> str:
    """The first screen before its script: the images in a few pixels, where they will stand."""
    examples = [example for model in boot["models"] for example in model["examples"]]
    thumbs = {example["id"]: example["thumb"] for example in examples}
    sources = [thumbs.get(view["picture"]["id"], "") for view in views]
    images = "".join(f'<img src="{html.escape(source)}" alt="">' for source in sources)
    return (
        '<div class="mv-boot mv-flow"><div class="mv-flow-head"><div><h1>See inside a Mixture of Experts</h1>'
        f'<p role="status">Opening the model…</p></div></div><div class="mv-flow-row">{images}</div></div>'
    )


def lesson_file() -> Path | None:
    """The lesson: inside the package in a wheel, in a checkout beside it; None without."""
    home = Path(str(files("moevision")))
    for folder in (home, home.parent / "docs"):
        if (folder / "lesson.html").is_file():
            return folder / "lesson.html"
    return None


def lesson_page() -> str | None:
    """The lesson with a link back here; None without."""
    file = lesson_file()
    if file is None:
        return None
    return file.read_text(encoding="utf-8").replace('"explorer/cat.html"', '"./"')


def view_html(
    view: Mapping[str, Any], *, full_page: bool, history: Mapping[str, Any] | None = None
) -> str:
    """One view, JSON of the schema `moevision.view/2`, as HTML that needs neither server nor network.

    A `full_page` is a document to save, anything else a frame to show in a notebook. The frame keeps the page's style
    and script to itself, and is sandboxed: the script can't reach the notebook. With the image's `history`, as the
    request of that name answers it, the page has the moments of the training too.
    """
    if view.get("schema") != VIEW_SCHEMA:
        raise ValueError(f"expected a view of schema {VIEW_SCHEMA}, got {view.get('schema')!r}")
    picture = view["picture"]
    title = html.escape(f"Routing of {picture.get('label') or picture['name']}")
    start = "startStatic(document.querySelector('[data-mv]'), VIEW, HISTORY);"
    script = script_of("core.js", start, VIEW=view, HISTORY=history)
    page = document(title, read_css(CORE_STYLES), _MAIN, script)
    return page if full_page else _framed(page, 1420)


def flow_html(view: Mapping[str, Any]) -> str:
    """The opening of the explorer for one view, as a frame: its patches fly to their experts. Needs no server."""
    start = "startFlow(document.querySelector('[data-mv]'), VIEW);"
    script = script_of("flow_static.js", start, VIEW=view)
    style = read_css((*CORE_STYLES, "explorer_flow.css"))
    experts = max(layer["num_experts"] for layer in view["layers"])
    across = min(4, experts)
    rows = -(-experts // across) * 4 / across  # of boxes: the fewer side by side, the higher
    return _framed(document("Routing", style, _MAIN, script), 700, rows)


def _framed(page: str, height: int, rows: float = 0) -> str:
    """A document as a frame of so many px: from inside the sandbox it can't tell its height to the page around it.

    Below 816 px, as on a phone, photo and `rows` of boxes stand below one another, each box a third of the width high.
    """
    css_height = f"{height}px"
    if rows:
        css_height = f"max({height}px,min(100vw + 330px + {rows:g} * 34vw,(816px - 100vw) * 999))"
    return (
        f'<iframe title="Patch routing" sandbox="allow-scripts" srcdoc="{html.escape(page)}" '
        f'style="width:100%;height:{css_height};border:1px solid #8884;border-radius:8px"></iframe>'
    )


def document(title: str, style: str, body: str, script: str, *, policy: str = OFFLINE) -> str:
    """A page in one file, which may load nothing; `title` and `body` are HTML, and `script` runs when they are there.

    `policy` is its Content-Security-Policy, empty where a server sends one.
    """
    meta = _about(title)
    if policy:
        meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n{meta}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_PAGE_STYLE}{style}</style></head>\n"
        f"<body>{body}\n<script>{script}</script></body></html>\n"
    )


def _about(title: str) -> str:
    """What a browser's tab, a search engine and a shared link show of a served page."""
    description = "Eight small networks share one photo: see which of them computes each patch, and take them away."
    colours = ("0072B2", "E69F00", "CC79A7", "009E73")  # of experts: assets/palette.js
    squares = ""
    for index, colour in enumerate(colours):
        row, column = divmod(index, 2)
        squares += f"%3Crect x='{8 * column}' y='{8 * row}' width='7' height='7' rx='1.5' fill='%23{colour}'/%3E"
    return (
        f"<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 15 15'%3E"
        f'{squares}%3C/svg%3E"><meta name="description" content="{description}">'
        f'<meta property="og:type" content="website"><meta property="og:title" content="{title}">'
        f'<meta property="og:description" content="{description}">'
    )


def script_of(
    entry: str, last: str, *, read: Callable[[str], str] | None = None, **constants: Any
) -> str:
    """The module `entry` and all that it imports in one function, which ends with the call `last`.

    It begins with `constants` as JSON. `read` gives the text of a module; None: of the one in `assets/`.
    """
    lines = [f"const {name} = {_inline_json(value)};" for name, value in constants.items()]
    texts = (DOCS.sub("", (read or read_asset)(name)) for name in modules(entry, read))
    joined = "\n".join(_EXPORT.sub("", _IMPORT.sub("", text)) for text in texts)
    # `</script` in a text would end the page's script element; `<\/` means the same inside JavaScript.
    joined = _MARGIN.sub("", joined).replace("</script", "<\\/script")
    return "\n".join(["(() => {", '"use strict";', *lines, joined, last, "})();"])


def modules(entry: str, read: Callable[[str], str] | None = None) -> tuple[str, ...]:
    """The files that a module of the page consists of: each behind those that it imports, `entry` last."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for imported in _IMPORT.findall((read or read_asset)(name)):
                visit(imported)
            order.append(name)

    visit(entry)
    return tuple(order)


def _inline_json(value: Any) -> str:
    """JSON that may stand inside a script element, whatever texts it holds."""
    text = json_text(value, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def read_css(names: tuple[str, ...]) -> str:
    """Style sheets of `assets/`, one behind the other, without comments."""
    return without_comments("\n".join(map(read_asset, names)))


def without_comments(css: str) -> str:
    """A style sheet for the page."""
    return "".join(part.split("*/", 1)[-1] for part in css.split("/*"))


@cache
def read_asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return (files("moevision") / "demo" / "assets" / name).read_text(encoding="utf-8")
