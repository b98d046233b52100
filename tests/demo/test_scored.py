"""A run's training images in the explorer: found by their ids, as `data score` links to them, and said to be gone."""

import csv
import re
import shutil
from html import unescape
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from moevision.analysis.good_data import score_run
from moevision.analysis.images import open_pictures
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.demo.conftest import HOSTILE
from tests.shared import says


def opened(run):
    return Explorer(open_entries(str(run)))


def rows(file):
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def scored(scored_run):
    return opened(scored_run)


def test_an_image_of_every_split_is_routed_by_its_id(scored, scored_run):
    files = open_pictures(
        scored_run.parent / "pets", scored.entries["own"].facts.image_size, split="all"
    )
    pixels = {files.picture_name(index): index for index in range(len(files))}
    for split in ("train", "val", "test"):
        row = next(
            row
            for row in rows(scored_run / "splits.csv")
            if (row["split"], row["class"]) == (split, "cat")
        )
        id = f"{split}/{row['path']}"
        view = scored.answer("route", {"picture": {"kind": "example", "id": id}})
        assert (view["picture"]["id"], view["picture"]["label"]) == (id, "cat")
        assert split in view["picture"]["name"]
        found = scored.entries["own"].examples.find(id).pixels
        assert np.array_equal(found, files.image(pixels[row["path"]]))
    assert scored.answer("sharp", {"picture": f"train/{HOSTILE}"}) == {
        "src": None
    }  # 32 px, as the model sees


def test_nothing_but_whether_there_are_scores_is_looked_at_before_somebody_asks(
    scored_run, monkeypatch
):
    monkeypatch.setattr("moevision.demo.examples.Scores.read", None)
    monkeypatch.setattr("moevision.analysis.good_data.images_of", None)
    opened(scored_run).warm()


@pytest.mark.parametrize(
    "id",
    [
        "train/../../etc/passwd",
        "train//etc/passwd",
        "train/",
        "train",
        "val/\0",
        f"test/{HOSTILE}",
        "train/a" * 999,
    ],
)
def test_an_id_is_looked_up_and_never_opened(scored, id):
    answer = scored.answer("route", {"picture": {"kind": "example", "id": id}})
    assert answer["code"] == "bad_request"
    assert re.search("no image|a text of", answer["error"])


def test_other_images_named_by_data_are_the_only_ones_that_can_be_asked_for(scored_run, drawn_pets):
    explorer = Explorer(open_entries(str(scored_run), str(drawn_pets)))
    asked = {"picture": {"kind": "example", "id": f"train/{HOSTILE}"}}
    assert explorer.answer("route", asked)["code"] == "bad_request"


@pytest.fixture
def moved(scored_run, tmp_path):
    """A run whose images may be taken away."""
    shutil.copytree(scored_run.parent, tmp_path / "home")
    config = tmp_path / "home/run/config.yaml"
    config.write_text(config.read_text().replace(str(scored_run.parent), str(tmp_path / "home")))
    return tmp_path / "home/run"


@pytest.mark.filterwarnings(
    "ignore::moevision.errors.DataWarning"
)  # noted at start, as files that vanished
def test_a_file_that_is_gone_is_said_to_be_gone(moved):
    pets, asked = moved.parent / "pets", {"picture": {"kind": "example", "id": f"train/{HOSTILE}"}}
    words = f"The file of {HOSTILE!r} is gone: bring it back, or choose another image."
    explorer = opened(moved)
    dogs = (row["path"] for row in rows(moved / "splits.csv") if row["class"] == "dog")
    other = {"picture": {"kind": "example", "id": f"train/{next(dogs)}"}}
    assert "error" not in explorer.answer("route", other)  # the table of ids is made; then
    (pets / HOSTILE).unlink()
    for one in (explorer, opened(moved)):  # it goes while the explorer runs, or before
        assert one.answer("route", asked) == {"error": words, "code": "bad_image"}
    scores = (moved / "scores.csv").read_text()
    (moved / "scores.csv").write_text("image\n")
    error = opened(moved).answer("route", asked)["error"]
    assert says(error, "can't be read", "scores.csv")
    (moved / "scores.csv").write_text(scores)
    shutil.rmtree(pets)
    error = opened(moved).answer("route", asked)["error"]
    assert says(error, "can't be opened", "log of the")
    assert str(moved.parent) not in error
    (moved / "scores.csv").unlink()
    assert says(opened(moved).answer("route", asked)["error"], "no image", "the examples")


def test_every_link_of_the_page_of_data_score_opens(scored, scored_run, tmp_path):
    score_run(scored_run, tmp_path, show=40)
    page = (tmp_path / "page.html").read_text()
    links = [unescape(link) for link in re.findall(r'<a href="(http[^"]*[?][^"]*)"', page)]
    asked = [parse_qs(urlsplit(link).query, strict_parsing=True) for link in links]
    assert {urlsplit(link).netloc for link in links} == {"127.0.0.1:7860"}
    assert all(set(each) == {"picture"} for each in asked)
    ids = {each["picture"][0] for each in asked}
    assert {
        f"{row['split']}/{row['path']}"
        for row in rows(scored_run / "splits.csv")
        if "broken" not in row["path"]
    } <= ids
    for id in ids:
        assert scored.entries["own"].examples.find(id).id == id
    assert f"moevision demo {scored_run}" in page
