"""What the site needs beyond mkdocs, so that the same Markdown reads well on a forge and here.

- Links that leave docs/ (`../benchmarks/routers/README.md`): a page of Markdown becomes a page of the site under repo/,
  any other file is copied there. So links are checked, and work without knowing where the repository lives.
- `--8<-- "moevision/layers/reference.py:Expert.forward"` includes the source of one class or function by its name, and
  `--8<-- "help:predict"` what `moevision predict --help` prints
  (`"help:data prune"`: `moevision data prune --help`).
- Formulas become MathML when the site is built; browsers draw that by themselves.
- Notebooks become pages with their saved outputs, under notebooks/, and their files lie beside them.
- `explorer/` has pages that the explorer exports: the photo of concepts/five-looks.md, and the same without an expert.
- With MOEVISION_LIVE in the environment `live/` has the explorer without a server (docs/live), which asks npm; the
  first page leads there.
- Numbers stay with their units; in tables names of code may break at their dots and underscores on a phone.
"""

from __future__ import annotations

import ast
import html as markup
import json
import os
import posixpath
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path
from address import address, with_live

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.M)
_NAMED = re.compile(r'^--8<-- "([\w/.-]+\.py):([\w.]+)"$', re.M)
_HELP = re.compile(r'^--8<-- "help:(\w+)(?: (\w+))?"$', re.M)
_CELL = re.compile(r"<td\b[^>]*>.*?</td>", re.DOTALL)
_UNIT = re.compile(r"<pre\b.*?</pre>|(?<=\d) (?=(?:[MGT]|[kM]i?B|GB|ms|px|%)(?![\w-]))", re.DOTALL)
_JOINT = re.compile(r"(?<=[A-Za-z])([._])(?=\w)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """The site's own address and a link to the repository, once pyproject.toml has them."""
    there = address()
    config["site_url"] = there.site or None
    config["repo_url"], config["repo_name"] = (
        (there.repository, there.name) if there.repository else (None, None)
    )
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that pages link to, and those that these link to."""
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        files.append(File.generated(config, _uri(notebook), content=_page_of(notebook)))
        files.append(
            File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook))
        )
    waiting = [
        DOCS / file.src_uri
        for file in files.documentation_pages()
        if not _is_notebook(file.src_uri)
    ]
    waiting += notebooks
    known: set[str] = set()
    while waiting:
        page = waiting.pop()
        text = _page_of(page) if page.suffix == ".ipynb" else page.read_text()
        for link in _LINK.findall(_CODE.sub("", text)):
            target = _target(page, link)
            uri = _uri(target)
            if uri in known or not uri.startswith("repo/") or not target.is_file():
                continue
            known.add(uri)
            files.append(File.generated(config, uri, abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting.append(target)
    for name, page in _exported().items():
        files.append(File.generated(config, f"explorer/{name}.html", content=page))
    return files


@cache
def _exported() -> dict[str, str]:
    """Pages of one bundled photo as the explorer exports them, by name."""
    from moevision.demo.models import open_entries
    from moevision.demo.service import Explorer

    explorer = Explorer([entry for entry in open_entries(None) if entry.history])
    photo = {"kind": "example", "id": "data/dog/darknet_dog.jpg"}
    gone = {"kind": "ablate", "layer": 8, "expert": 5, "fill": "next_best", "seed": 0}
    asked = {"dog": None, "without": gone}
    request = {"model": "photos", "picture": photo}
    return {
        name: explorer.export_html({**request, "intervention": change})["html"]
        for name, change in asked.items()
    }


def on_post_build(config: Any, **_: Any) -> None:
    """The explorer without a server, where it is wanted."""
    if os.environ.get("MOEVISION_LIVE"):
        subprocess.run(
            [sys.executable, DOCS / "live" / "build.py", Path(config.site_dir) / "live"], check=True
        )


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at where the files are in the site, and put named sources in."""
    uri = page.file.src_uri
    outside = uri.startswith("repo/") or _is_notebook(uri)
    here = ROOT / uri.removeprefix("repo/") if outside else DOCS / uri

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(_uri(_target(here, link[1])), posixpath.dirname(uri) or ".")

    if uri == "index.md":
        markdown = with_live(markdown, "live/" if os.environ.get("MOEVISION_LIVE") else "")
    parts, last = [], 0
    for code in _CODE.finditer(markdown):
        parts += [
            _LINK.sub(moved, markdown[last : code.start()]),
            _HELP.sub(_help, _NAMED.sub(_source, code[0])),
        ]
        last = code.end()
    return "".join([*parts, _LINK.sub(moved, markdown[last:])])


# ---- notebooks


def _is_notebook(uri: str) -> bool:
    return uri.startswith("notebooks/")


def _page_of(notebook: Path) -> str:
    """A notebook as Markdown: its texts, its code but for the cell that installs, and a mark where each output goes."""
    title, *cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = [
        "".join(title["source"]),
        f'<p><a href="../{notebook.name}" download>The notebook as a file</a></p>',
    ]
    for number, cell in enumerate(cells, 1):
        text = "".join(cell["source"])
        if text.startswith("# Where moevision is missing"):
            continue
        if cell["cell_type"] == "markdown":
            parts.append(text.replace("<details>", '<details markdown="1">'))
            continue
        parts.append(f"```python\n{text}\n```")
        parts += [f"<p>{_OUTPUT}{number}.{place}</p>" for place, _ in enumerate(cell["outputs"])]
    return "\n\n".join(parts) + "\n"


_OUTPUT = "output of cell "
_PLACE = re.compile(rf"<p>{_OUTPUT}(\d+)\.(\d+)</p>")


def _outputs(html: str, notebook: Path) -> str:
    """The page of a notebook with its saved outputs in their places."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]

    def output(place: re.Match[str]) -> str:
        found = cells[int(place[1])]["outputs"][int(place[2])]
        data = found.get("data", {"text/plain": found.get("text", "")})
        for kind in ("text/html", "image/png", "image/jpeg", "text/plain"):
            if kind in data:
                break
        text = "".join(data[kind])
        if kind == "text/html":
            return f'<div class="output">{text}</div>'
        if kind == "text/plain":
            return f'<pre class="output">{markup.escape(text)}</pre>'
        image = f"data:{kind};base64,{text.strip()}"
        return f'<p class="output"><img alt="a figure; the text around it says what it shows" src="{image}"></p>'

    return _PLACE.sub(output, html)


# ---- pages as they are shown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Formulas as MathML; lines and cells that break where a reader would; a notebook's outputs."""
    if _is_notebook(page.file.src_uri):
        html = _outputs(html, (ROOT / page.file.src_uri).with_suffix(".ipynb"))
    html = _FORMULA.sub(lambda found: convert(_plain(found[2]), display=_DISPLAY[found[1]]), html)
    html = _UNIT.sub(lambda found: "\N{NO-BREAK SPACE}" if found[0] == " " else found[0], html)
    return _CELL.sub(_cell, html)


_DISPLAY = {"span": "inline", "div": "block"}


def _target(page: Path, link: str) -> Path:
    """The file that a link of a page means; of a folder its README."""
    target = Path(posixpath.normpath(page.parent / link))
    return target / "README.md" if target.is_dir() else target


def _uri(target: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    if target.parent == ROOT / "notebooks":
        return f"notebooks/{target.stem}.md"
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"repo/{target.relative_to(ROOT).as_posix()}"


def _source(found: re.Match[str]) -> str:
    text = (ROOT / found[1]).read_text()
    node: Any = ast.parse(text)
    for name in found[2].split("."):
        inside = [each for each in node.body if getattr(each, "name", None) == name]
        if not inside:
            raise PluginError(f"{found[1]} has no {found[2]}")
        node = inside[0]
    return textwrap.dedent("\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]))


def _help(found: re.Match[str]) -> str:
    from moevision.cli import parser_of
    from moevision.config import VERBS, help_of

    if found[1] not in VERBS:
        os.environ.update(COLUMNS="120", NO_COLOR="1")  # argparse looks at the terminal otherwise
        return parser_of(" ".join(filter(None, (found[1], found[2])))).format_help().strip()
    return help_of(found[1]).strip()


def _cell(found: re.Match[str]) -> str:
    return re.sub(
        r"<code>.*?</code>", lambda code: _JOINT.sub(r"\1<wbr>", code[0]), found[0], flags=re.DOTALL
    )


def _plain(html: str) -> str:
    return html.strip().replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
