"""docs/tutorial.md is what docs/tutorial.py writes, and its outputs have the shape of today's."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.shared import load_script, says

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```sh\n(.*?)\n```\n\n```text\n(.*?)\n```$", re.DOTALL | re.M)


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    return load_script(ROOT / "docs" / "tutorial.py")


@pytest.fixture(scope="module")
def printed(tutorial: ModuleType) -> dict[str, str]:
    """What each command of the committed page printed."""
    found = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    return {step: found[command] for step, command in tutorial.COMMANDS.items()}


def test_the_page_is_what_the_script_writes(tutorial, printed):
    """All of it but what the commands print."""
    assert tutorial.page(printed) == PAGE.read_text(encoding="utf-8")


def test_a_terminal_is_tidied(tutorial):
    """Colours go, of a progress bar the last state stays, long lines wrap."""
    bar = "Epoch 0/2  ━━━━ 1/2 0:01\rEpoch 0/2  ━━━━━ 2/2 0:02\nEpoch 1/2  ━━━━━ 2/2 0:04\n\n\n\x1b[1mdone\x1b[0m\n"
    assert tutorial.tidy(bar) == "Epoch 0/2 ━━━━━━━━ 2/2 0:02\nEpoch 1/2 ━━━━━━━━ 2/2 0:04\n\ndone"
    assert [len(line) for line in tutorial.tidy("a " * 100).split("\n")] == [97, 97, 3]


def labels(text: str) -> list[str]:
    """First cells of the rows of tables, and the words before a colon."""
    return re.findall(r"^\| ([A-Za-z][^|]*?) \|", text, re.M)


def test_the_summary_still_has_these_lines(printed, tiny_run):
    """Rows of the committed output are rows of a run of today, but for the classes."""
    today = (tiny_run / "summary.md").read_text(encoding="utf-8")
    known = {*labels(today), "CPU time", "dog", "cat"}  # so short a run has no CPU time to tell
    assert (
        {"top-1 accuracy", "balanced accuracy", "CPU time"}
        <= set(labels(printed["summary"]))
        <= known
    )
    assert says(printed["summary"], "images recognised** (")
    assert says(today, "images recognised** (")


def test_the_mistakes_are_a_table_of_today(printed, tiny_run):
    """`image,label,prediction,probability,correct`, all of them wrong, the surest first."""
    head = (tiny_run / "predictions_test.csv").read_text(encoding="utf-8").splitlines()[0]
    assert head == "image,label,prediction,probability,correct"
    rows = [line.split(",") for line in printed["wrong"].splitlines()]
    assert all(label != prediction and right == "0" for _, label, prediction, _, right in rows)
    sure = [float(row[3]) for row in rows]
    assert sure == sorted(sure, reverse=True)


def test_the_split_adds_up(printed):
    """Every photo of the folder is in one part."""
    photos = sum(map(int, re.findall(r": (\d+) photos", printed["folder"])))
    parts = re.search(r"^all +([\d,]+) +([\d,]+) +([\d,]+)$", printed["fit"], re.M)
    assert parts
    assert sum(int(part.replace(",", "")) for part in parts.groups()) == photos


def test_no_place_of_a_machine_is_shown(printed):
    lines = "\n".join(printed.values()).splitlines()
    assert [line for line in lines if re.search(r"(?:^|[ =])/\w", line)] == []


def test_one_of_the_four_new_photos_is_wrong(printed):
    """As the page says. Chelsea and the kitten are cats, the others dogs."""
    rows = [line.split(",") for line in printed["predict"].splitlines() if line.startswith("new/")]
    found = {path.removeprefix("new/"): name for path, name, *_ in rows}
    cats = {"chelsea.jpg", "gcompris_kitten.jpg"}
    assert found.keys() == cats | {"darknet_dog.jpg", "zoom_roxy.jpg"}
    assert sum((name == "cat") != (path in cats) for path, name in found.items()) == 1
