"""The repository's address has one place, and without one no file pretends to have it; versions agree."""

import json
import re
import runpy
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import moevision
from tests.docs.test_docs import FRONT, NOTES, ROOT
from tests.shared import says

MODULE = runpy.run_path(str(ROOT / "docs" / "address.py"))
Address, address, fill = MODULE["Address"], MODULE["address"], MODULE["fill"]
THERE = Address("https://github.com/owner/moe", "https://owner.github.io/moe/", "")
NAMES = ("pyproject.toml", "README.md", "CITATION.cff")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that name the address, elsewhere."""
    for name in NAMES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "index.md", tmp_path / "docs")
    return tmp_path


def test_every_file_says_what_pyproject_says():
    expected = MODULE["filled"](address())
    assert [
        path for path, text in expected.items() if path.read_text(encoding="utf-8") != text
    ] == []


def test_it_is_filled_in_everywhere_and_can_be_taken_back(copy):
    before = {path: path.read_text(encoding="utf-8") for path in copy.rglob("*") if path.is_file()}
    here = address(copy)
    changed = fill(THERE, copy)
    assert len(changed) == len(before)
    urls = tomllib.loads((copy / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == "https://github.com/owner/moe"
    assert urls["Issues"] == "https://github.com/owner/moe/issues"
    index = (copy / "docs/index.md").read_text()
    assert says(index, "https://github.com/owner/moe && cd", "cd moe\npython3")
    live = '<a href="https://owner.github.io/moe/live/">Try it</a>, nothing to install.'
    assert all(live in (copy / name).read_text() for name in ("README.md", "docs/index.md"))
    assert (
        yaml.safe_load((copy / "CITATION.cff").read_text())["repository-code"]
        == "https://github.com/owner/moe"
    )
    for path in (copy / "notebooks").iterdir():
        head, *cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        install = next(
            cell for cell in cells if "importlib.metadata as packages" in "".join(cell["source"])
        )
        assert (
            f"colab.research.google.com/github/owner/moe/blob/main/notebooks/{path.name})"
            in "".join(head["source"])
        )
        assert 'REPOSITORY = "https://github.com/owner/moe"  #' in "".join(install["source"])
    assert fill(address(copy), copy) == []  # read again from the one place
    assert fill(here, copy)
    assert {path: path.read_text(encoding="utf-8") for path in before} == before


def test_on_pypi_readme_names_the_package(copy):
    fill(THERE._replace(pypi="https://pypi.org/project/moevision/"), copy)
    assert "`pip install moevision`" in (copy / "README.md").read_text()


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_a_package_shows_a_readme_whose_links_are_absolute(copy, monkeypatch):
    """What hatchling asks for: as it is without an address, absolute with one; images as files, pages on the site."""
    hatchling = type("hatchling.metadata.plugin.interface", (), {"MetadataHookInterface": object})
    monkeypatch.setitem(sys.modules, hatchling.__name__, hatchling)
    monkeypatch.setattr(sys, "path", [*sys.path])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hook = runpy.run_path(
        str(ROOT / project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["path"])
    )["Readme"]()
    assert "readme" in project["project"]["dynamic"]
    hook.root = str(copy)

    def shown() -> str:
        hook.update(metadata := {})
        assert metadata["readme"]["content-type"] == "text/markdown"
        return metadata["readme"]["text"]

    fill(Address(), copy)
    assert shown() == (copy / "README.md").read_text(encoding="utf-8")
    fill(THERE, copy)
    text = shown()
    assert [link for link in links(text) if not link.startswith("https://")] == []
    assert len(links(text)) == len(links((copy / "README.md").read_text(encoding="utf-8")))
    assert {
        "https://github.com/owner/moe/raw/main/docs/img/flow.webp",
        "https://github.com/owner/moe/blob/main/CONTRIBUTING.md",
        "https://owner.github.io/moe/",
        "https://owner.github.io/moe/results/",
        "https://owner.github.io/moe/lesson.html",
    } <= set(links(text))
    fill(THERE._replace(site=""), copy)
    assert "https://github.com/owner/moe/blob/main/docs/results.md" in links(shown())


def test_a_link_keeps_its_anchor():
    text = "[a](docs/index.md) [b](docs/guides/serve.md#for-a-class) [c](https://x.org/a.md) "
    text += "[d](#look) ![e](docs/e.png)"
    assert links(MODULE["packaged"](text, THERE)) == [
        "https://owner.github.io/moe/",
        "https://owner.github.io/moe/guides/serve/#for-a-class",
        "https://x.org/a.md",
        "#look",
        "https://github.com/owner/moe/raw/main/docs/e.png",
    ]


def test_no_page_has_a_made_up_address():
    """Until there is one: neither a placeholder, nor a name on PyPI that nobody owns."""
    if address().pypi:
        return
    sources = [*(ROOT / "moevision").rglob("*.py"), *(ROOT / "notebooks").iterdir()]
    pages = [*FRONT, *NOTES, ROOT / "SECURITY.md", *sources]
    wrong = re.compile(r"""git clone REPOSITORY|pip install ["']?moevision""")
    assert [path.name for path in pages if wrong.search(path.read_text(encoding="utf-8"))] == []


def test_versions_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == moevision.__version__
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    numbers = [
        tuple(map(int, version.split("."))) for version in (moevision.__version__, *released)
    ]
    assert numbers == sorted(numbers, reverse=True)  # the next release, or the newest


def test_the_changelog_of_the_next_release_is_short():
    found = re.search(
        r"^## \[Unreleased\]\n(.*?)^## \[", (ROOT / "CHANGELOG.md").read_text(), re.M | re.DOTALL
    )
    assert found is not None
    assert len(found[1].split()) <= 500


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_few_rights_and_an_end(path):
    """Read-only by default; only the jobs that publish may ask for a token; every job has a limit of time."""
    flow = yaml.safe_load(path.read_text())
    assert flow["permissions"] == {"contents": "read"}
    for name, job in flow["jobs"].items():
        rights = {"id-token", "pages"} if name in ("publish", "deploy") else set()
        assert set(job.get("permissions", {})) <= rights
        assert "uses" in job or job["timeout-minutes"] <= 90
        for step in job.get("steps", ()):
            # an expression in a script is code of whoever can set it
            assert "${{" not in step.get("run", "")
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_workflows_train_with_options_that_exist():
    from tests.docs.test_docs import check_command

    called = re.compile(r"^ +(?:- run: )?(moevision [a-z]+ .*)$", re.M)
    commands = [line for path in WORKFLOWS for line in called.findall(path.read_text())]
    assert len(commands) >= 4
    for command in commands:
        check_command(command)
