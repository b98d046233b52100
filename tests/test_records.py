"""Every measured number of README.md, docs/ and benchmarks/*/README.md has a committed record; see `tests/records`."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import without_places
from tests.needs import PHOTO_MODEL
from tests.records import ROOT, Claim, Definition, Page, checked_pages, module_of, pattern, unclaimed

DIRTY: set[str] = {"benchmarks/saving/record.json"}
"""Quoted records of a tree with uncommitted changes, which are to be measured again."""

WITHOUT_COMMIT: set[str] = {
    "benchmarks/mutation_equivalent.json",  # reasons, written by hand
    "benchmarks/analysis/coverage.json",
}
"""Quoted records from before they named the commit that they were made from: each goes when it is measured again."""


def _marks(*claims: Claim) -> list[pytest.MarkDecorator]:
    """Some records lie beside the photos."""
    beside = any(path.startswith(PHOTO_MODEL) for claim in claims for path in claim.paths)
    return [pytest.mark.needs("photos")] if beside else []


PAGES = checked_pages()
MARKED_PAGES = [pytest.param(page, marks=_marks(*page.claims)) for page in PAGES]
CLAIMS = [pytest.param(page, claim, marks=_marks(claim)) for page in PAGES for claim in page.claims]
RECORDS = sorted({path for page in PAGES for claim in page.claims for path in claim.paths})


def _name(value: Any) -> str:
    if isinstance(value, Page):
        return value.path.name
    return value.text[:40] if isinstance(value, Claim | Definition) else str(value)


@pytest.mark.parametrize(("page", "claim"), CLAIMS, ids=_name)
def test_a_page_says_what_its_record_says(page: Page, claim: Claim) -> None:
    for text in claim.texts:
        assert re.search(r"[^\W\d_]{2}", text), "a claim without words would be found anywhere"
        found = pattern(text).search(page.text)
        assert found is not None, f"{page.path.name} lacks what {claim.records} says: {text}"


@pytest.mark.parametrize("page", MARKED_PAGES, ids=_name)
def test_no_measured_number_is_without_a_record(page: Page) -> None:
    assert not unclaimed(page)


VERDICT = re.compile(
    r"\b(beats?|better|worse|above|below|slower|faster|told apart|offsets?|improves?|yes|no"
    r"|((is|are) not|isn't|aren't|not|is|are) shown)\b"
)


@pytest.mark.parametrize(
    ("name", "section"),
    [("README.md", "What to expect"), ("docs/concepts/what-sparsity-buys.md", "What sparsity buys")],
)
def test_no_verdict_of_a_headline_is_without_a_record(name: str, section: str) -> None:
    """Words such as "better" and "not told apart" stand in claims, which fill them in from the record."""
    page = next(page for page in PAGES if page.path == ROOT / name)
    rest = re.search(rf"^#+ {section}$(.*?)(?=^## |\Z)", page.text, re.M | re.S)
    assert rest is not None
    assert VERDICT.search(rest[1]), "nothing to check"
    known = [text for claim in page.claims for text in claim.texts] + [each.text for each in page.definitions]
    left = rest[1]
    for text in sorted(known, key=len, reverse=True):
        left = pattern(text).sub("…", left)
    assert [match.group() for match in VERDICT.finditer(left)] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_definitions_stand_in_their_page(page: Page) -> None:
    """A definition of words that are gone would let their numbers come back unseen."""
    assert not [each.text for each in page.definitions if not pattern(each.text).search(page.text)]
    assert all(each.why for each in page.definitions)


def test_every_module_has_one_page() -> None:
    """A page that moved without its module would no longer be checked."""
    helpers = {"__init__", "__main__", "pages", "studies"}
    modules = {path.stem for path in (ROOT / "tests" / "records").glob("*.py")} - helpers
    names = [module_of(page.path) for page in PAGES]
    assert modules <= set(names)
    assert len(names) == len(set(names))


@cache
def _trees(path: str) -> list[dict[str, Any]]:
    """Each commit with its dirty flag that a record names, or the provenance.json beside it."""
    beside = (ROOT / path).with_name("provenance.json")
    found, waiting = [], [json.loads(file.read_text()) for file in (ROOT / path, beside) if file.is_file()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found += [value] if "git_commit" in value else []
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def test_a_command_names_no_place_of_the_machine() -> None:
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.json")]
    commands = [command for text in files for command in re.findall(r'"command": "([^"\n]*)"', text)]
    assert len(commands) > 100
    assert [command for command in commands if command != without_places(command)] == []


@pytest.mark.needs("photos")
def test_records_come_from_committed_trees() -> None:
    assert {path for path in RECORDS if any(tree["dirty"] for tree in _trees(path))} == DIRTY
    assert {path for path in RECORDS if not _trees(path)} == WITHOUT_COMMIT


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("The step takes 2.5 ms.", 1),
        ("It is 3 % faster and took fifteen minutes.", 2),
        ("42 of 42 cells", 1),
        ("All lie between .92 and 1.08, at 1e-5, in L1.5", 2),
        ("8 experts, 64 px, `--lr 0.1`, arXiv:1701.06538, [0.5](docs/0.5.md)", 1),
        ("| rows | 306 |\n|---|---|\n| MoE | 306 |\n| twin | 365 to 366 |", 2),
        ("## In 2.5 ms\n\n```sh\nsleep 2.5\n```\n", 0),
    ],
)
def test_measured_numbers_are_found(words: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(words)
    assert len(unclaimed(Page(path, [], []))) == count


def test_a_claim_takes_its_numbers_away(tmp_path: Path) -> None:
    """In a page whose words break elsewhere and whose minus is the true one; another number stays."""
    record, path = tmp_path / "record.json", tmp_path / "page.md"
    record.write_text('{"rows": [{"gain": -0.25}, {"gain": 0.5}]}')
    path.write_text("It gains\n−25.0 % here. It gains +50.0 % here. It gains 51 % there.")
    claim = Claim(str(record), "It gains {gain:+.1%} here.", lambda record: record["rows"])
    assert all(pattern(text).search(path.read_text()) for text in claim.texts)
    assert len(unclaimed(Page(path, [claim], []))) == 1
