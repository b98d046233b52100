"""How large and how dense the package may be, how far a reader goes in it, and that no modules import in a circle.

Lines have no limit: one that stood here was paid for by squeezing. Tokens, density and long functions have, counted
at one fixed layout (`tests/house.py`), and each may only fall. Who raises one says why in the commit and in its row.
`python -m benchmarks counts` and `trips` show the counts.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import moevision
from moevision.train.recipe import choose_recipe
from tests.house import circles, count, functions, tokens
from tests.trips import Trip, batch_trip, forward_trip, moevision_command

ROOT = Path(moevision.__file__).parents[1]
CHECKOUT = Path(__file__).parents[1]

SIZE = {
    # folder, with those below: (modules, tokens)  # what raised it last
    "moevision": (12, 17_393),  # scores of prediction sets; options of test and predict
    "moevision/analysis": (14, 53_580),  # effects by a sigmoid where an image has several labels
    "moevision/commands": (10, 12_730),  # predict: --mirror, --sets
    "moevision/data": (13, 33_641),  # several labels of an image: cat|outdoor in a manifest
    "moevision/demo": (14, 27_885),  # for one version a bundled model's former name answers
    "moevision/layers": (10, 15_805),  # an option that no layer has names the nearest
    "moevision/models": (12, 20_008),  # a mirrored view; scores of prediction sets are saved
    "moevision/train": (19, 50_554),  # test: --mirror, coverage and size of --sets
}
MOST = {
    "tokens_a_line": 9.11,
    "median_tokens_a_line_of_functions": 9.08,
    "conditional_expressions_per_1000_lines": 19.1,
}
LONG_FUNCTIONS = 0
LARGEST_FOLDER = 17  # modules
CIRCLES = 0
FIT_OPTIONS = 96  # of `moevision fit --help-all`
PAGE_LINES = 5_917  # scripts and style sheets, docs/live with them; before the third design 6,000
LONG_PAGE_LINES = 278  # of these, over 120 characters: none in style sheets; 678 in all before the page was cut down
DOCS_WORDS = 27_515  # README.md, docs/**/*.md; last: second opinions, prediction sets
SITE_WORDS = 26_263  # without README

FORWARD_FILES = 5
BATCH_FILES = 15
BATCH_HOPS = 72  # combining is a method of each Routing
ANALYZE_FILES = (
    47  # it embeds live views; types and the shares of patches have modules of their own
)
PATH_HOPS = 4


@pytest.fixture(scope="module")
def house() -> dict[str, Any]:
    return count(ROOT)


def test_folders_keep_to_their_size(house):
    found = {folder: [0, 0] for folder in SIZE}
    for name, size in house["folders"].items():
        room = found.setdefault("/".join(name.split("/")[:2]), [0, 0])
        for place, unit in enumerate(("modules", "tokens")):
            room[place] += size[unit]
    over = {
        name: (room, SIZE.get(name, (0, 0)))
        for name, room in found.items()
        if any(have > may for have, may in zip(room, SIZE.get(name, (0, 0)), strict=True))
    }
    assert over == {}, "found, allowed: modules, tokens"


def test_sentences_are_no_denser(house):
    assert {name: house[name] for name, limit in MOST.items() if house[name] > limit} == {}
    assert len(house["long_functions"]) <= LONG_FUNCTIONS, house["long_functions"]


def test_no_folder_is_crowded_and_no_modules_import_one_another(house):
    assert house["largest_folder"] <= LARGEST_FOLDER
    assert len(house["circles"]) <= CIRCLES, house["circles"]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_tokens_are_what_the_code_says():
    """`def f ( x ) : return x + 1` has 10, an f-string is one more; docstrings, comments and breaks have none."""
    assert tokens("def f(x):\n    return x + 1\n") == 10
    assert (
        tokens(
            '"""Doc."""\n\n\ndef f(x):\n    """Doc."""  # why\n    return (\n        x + 1\n    )\n'
        )
        == 12
    )
    assert tokens('f"{x} and {f(y)}"\n') == 1


def test_a_function_is_as_dense_as_its_body():
    """`x = 1` has 3 tokens, `return x + y` 4, `def g():` 5: a body's lines, without the signature's two."""
    source = '@cache\ndef f(a,\n      b):\n    """Doc."""\n    x = 1\n\n    def g():\n        return x + y\n'
    outer, inner = functions("module", source)
    assert (outer.name, outer.lines, outer.body_tokens, outer.body_lines) == (
        "module.f",
        5,
        3 + 5 + 4,
        3,
    )
    assert (inner.name, inner.body_tokens, inner.body_lines, inner.density) == ("module.g", 4, 1, 4)


def test_fit_has_few_options(cli):
    options = set(re.findall(r"^  (?:-\w \w+, )?(--[\w.-]+)", cli("fit", "--help-all").out, re.M))
    assert 30 < len(options) <= FIT_OPTIONS


def test_docs_keep_to_their_words():
    pages = [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")]
    words = [len(page.read_text(encoding="utf-8").split()) for page in pages]
    assert sum(words) <= DOCS_WORDS
    assert sum(words[1:]) <= SITE_WORDS


def test_the_pages_keep_to_their_lines():
    """moevision/**/*.js and *.css, docs/live/*.js and *.css; types (*.d.ts) are no lines of the page."""
    files = [
        file
        for folder in (ROOT / "moevision", CHECKOUT / "docs" / "live")
        for kind in ("js", "css")
        for file in sorted(folder.rglob(f"*.{kind}"))
    ]
    lines = {str(file): file.read_text(encoding="utf-8").splitlines() for file in files}
    names = {file.name for file in files}
    assert {"app.js", "core.js", "explorer.css", "good_data.js", "page.css", "worker.js"} <= names
    assert sum(map(len, lines.values())) <= PAGE_LINES
    long = {name: sum(len(line) > 120 for line in text) for name, text in lines.items()}
    assert sum(long.values()) <= LONG_PAGE_LINES
    assert not any(count for name, count in long.items() if name.endswith(".css")), long


@pytest.mark.parametrize("router", ["noisy_top_k", "expert_choice"])
def test_a_forward_pass_crosses_few_files(router):
    way = forward_trip(router=router).way
    assert 2 < len(set(way)) <= FORWARD_FILES, way


def test_a_training_batch_crosses_few_files(tmp_path):
    way = batch_trip(tmp_path).way
    assert 5 < len(set(way)) <= BATCH_FILES, sorted(set(way))
    assert len(way) - 1 <= BATCH_HOPS, way


def test_what_a_path_is_is_soon_known(tmp_path):
    """From `fit`'s choices to where the folder's images are listed."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    with Trip(until="walk") as trip:
        choose_recipe(str(tmp_path / "images"), "none")
    assert 1 <= len(trip.way) - 1 <= PATH_HOPS, trip.way


@pytest.mark.deep
def test_analyze_crosses_few_files(tmp_path):
    model = str(ROOT / "moevision" / "demo" / "models" / "pets" / "trained")
    images = ["--data=synthetic_pets", "--limit=20", f"--out={tmp_path}"]
    with Trip() as trip:
        moevision_command(["analyze", model, *images, "--permutations=20"])
    assert 20 < len(set(trip.way)) <= ANALYZE_FILES, sorted(set(trip.way))
