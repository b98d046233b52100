"""Where the repository is: `[project.urls]` of pyproject.toml, the one place. This writes it everywhere else.

    python docs/address.py https://github.com/OWNER/moevision        # sets it, and fills everything in
    python docs/address.py https://… --pypi                          # the package is on PyPI, too
    python docs/address.py                                           # fills in again what pyproject.toml says

Filled in are README between `<!-- address -->` and `<!-- /address -->`, docs/index.md, both between `<!--live-->` and
`<!--/live-->`, CITATION.cff, and the first cells of the notebooks. The site takes it when it is built (docs/hooks.py),
and so does the README in a package, whose links PyPI can't follow otherwise (docs/packaged.py). Without an address all
of them speak of a copy of the repository; tests/docs/test_address.py holds every file to what is written here.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- address -->).*?(<!-- /address -->)", re.DOTALL)
_LIVE = re.compile(r"(<!--live-->).*?(<!--/live-->)", re.DOTALL)
_URLS = re.compile(r"^\[project\.urls\]\n(?:[^\[\n].*\n)*\n?", re.M)
_CITED = re.compile(r"^(?:repository-code|url): .*\n", re.M)
_COLAB = re.compile(r"\[Open in Colab\]\([^)]*\)\n*")
_CLONE = re.compile(r"^(?:git clone .*\n)?(?=python3 -m venv )", re.M)
_LESSON = re.compile(r"\]\([^)\s]*\blesson\.html\)")
_LINK = re.compile(r"(!?)(\[[^]]*\]\()(?!https?:|mailto:|#)([^)\s]+)\)")
_FROM = re.compile(r'^REPOSITORY = ".*"', re.M)


class Address(NamedTuple):
    """What `[project.urls]` says; empty strings where it says nothing."""

    repository: str = ""
    site: str = ""
    pypi: str = ""

    @property
    def name(self) -> str:
        """OWNER/NAME on the forge."""
        return urlsplit(self.repository).path.strip("/")

    @property
    def on_github(self) -> bool:
        """GitHub has Pages, and Colab opens its notebooks."""
        return urlsplit(self.repository).netloc == "github.com"


def address(root: Path = ROOT) -> Address:
    """The addresses in pyproject.toml."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"].get(
        "urls", {}
    )
    return Address(urls.get("Repository", ""), urls.get("Documentation", ""), urls.get("PyPI", ""))


def urls_of(there: Address) -> str:
    """`[project.urls]`, which PyPI shows beside the package."""
    if not there.repository:
        return ""
    rows = {
        "Repository": there.repository,
        "Documentation": there.site,
        "Changelog": f"{there.repository}/blob/main/CHANGELOG.md",
        "Issues": f"{there.repository}/issues",
        "PyPI": there.pypi,
    }
    return (
        "[project.urls]\n"
        + "".join(f'{name} = "{url}"\n' for name, url in rows.items() if url)
        + "\n"
    )


# ---- what stands in the files, with an address and without


def in_readme(there: Address) -> str:
    """Within a sentence: "With Python 3.11 or newer, …"."""
    if there.pypi:
        return "`pip install moevision` in a virtual environment, or in a copy of the repository"
    copy = (
        f"a copy of this repository (`git clone {there.repository}`)"
        if there.repository
        else "a copy of this repository"
    )
    return f"in {copy}"


def packaged(text: str, there: Address) -> str:
    """README with links that lead somewhere on PyPI, too: pages to the site, all others to the forge."""

    def absolute(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        if there.site and not image and target.startswith("docs/"):
            page = re.sub(r"(?:^index)?\.md(?=$|#)", "/", target.removeprefix("docs/"))
            return f"{words}{there.site.rstrip('/')}/{page.removeprefix('/')})"
        return f"{image}{words}{there.repository}/{'raw' if image else 'blob'}/main/{target})"

    return _LINK.sub(absolute, text) if there.repository else text


def in_start(text: str, there: Address) -> str:
    """docs/index.md with the line before the virtual environment that fetches the repository."""
    clone = (
        f"git clone {there.repository} && cd {there.name.rpartition('/')[2]}\n"
        if there.repository
        else ""
    )
    return _CLONE.sub(clone, text, count=1)


def with_live(text: str, link: str) -> str:
    """A page that leads to the explorer without a server, docs/live; without a link it says nothing of it."""
    # In HTML: a line that begins with a comment isn't read as Markdown.
    words = f'<b><a href="{link}">Try it</a>, nothing to install.</b>' if link else ""
    return _LIVE.sub(rf"\g<1>{words}\g<2>", text)


def in_citation(text: str, there: Address) -> str:
    """CITATION.cff with the repository's address behind the version."""
    lines = f"repository-code: {there.repository}\n" if there.repository else ""
    lines += f"url: {there.site}\n" if there.site else ""
    return re.sub(r"^(version: .*\n)", rf"\g<1>{lines}", _CITED.sub("", text), count=1, flags=re.M)


def in_notebook(text: str, there: Address, name: str) -> str:
    """The notebook with a link to Colab under its title, and the address that one of its cells installs from."""
    notebook: dict[str, Any] = json.loads(text)
    head, *cells = notebook["cells"]
    install = next(cell for cell in cells if _FROM.search("".join(cell["source"])))
    link = f"https://colab.research.google.com/github/{there.name}/blob/main/notebooks/{name}"
    words = _COLAB.sub("", "".join(head["source"]))
    if there.on_github:
        words = words.replace("\n\n", f"\n\n[Open in Colab]({link})\n\n", 1)
    code = _FROM.sub(f'REPOSITORY = "{there.repository}"', "".join(install["source"]))
    head["source"], install["source"] = (
        words.splitlines(keepends=True),
        code.splitlines(keepends=True),
    )
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def filled(there: Address, root: Path = ROOT) -> dict[Path, str]:
    """What every file that names the address should hold."""
    live = f"{there.site.rstrip('/')}/live/" if there.site else ""
    readme, start, cited = root / "README.md", root / "docs" / "index.md", root / "CITATION.cff"
    shown = _MARKED.sub(rf"\g<1>{in_readme(there)}\g<2>", readme.read_text(encoding="utf-8"))
    files = {
        readme: _LESSON.sub(
            f"]({there.site or 'docs/'}lesson.html)", with_live(shown, live)
        ),  # a forge shows its source
        start: with_live(in_start(start.read_text(encoding="utf-8"), there), live),
        cited: in_citation(cited.read_text(encoding="utf-8"), there),
    }
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        files[path] = in_notebook(path.read_text(encoding="utf-8"), there, path.name)
    return files


def fill(there: Address, root: Path = ROOT) -> list[Path]:
    """Write the address into pyproject.toml and all other files; those that changed."""
    project = root / "pyproject.toml"
    text = _URLS.sub("", project.read_text(encoding="utf-8"))
    files = {
        project: text.replace("[project.scripts]\n", urls_of(there) + "[project.scripts]\n"),
        **filled(there, root),
    }
    changed = [path for path, text in files.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(files[path], encoding="utf-8", newline="\n")
    return changed


def main() -> None:
    """Set or refill the address."""
    parser = argparse.ArgumentParser(
        description="Write the repository's address wherever it is needed."
    )
    parser.add_argument(
        "repository",
        nargs="?",
        help="https://github.com/OWNER/moevision; left out: pyproject.toml's",
    )
    parser.add_argument(
        "--site", default="", help="the site's address; on GitHub https://OWNER.github.io/NAME/"
    )
    parser.add_argument(
        "--pypi",
        action="store_true",
        help="the package can be installed by `pip install moevision`",
    )
    chosen = parser.parse_args()
    there = address()
    if chosen.repository:
        there = Address(chosen.repository.rstrip("/").removesuffix(".git"), chosen.site)
        owner, _, name = there.name.partition("/")
        if there.on_github and not there.site:
            there = there._replace(site=f"https://{owner}.github.io/{name}/")
    if chosen.pypi:
        there = there._replace(pypi="https://pypi.org/project/moevision/")
    for path in fill(there):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
