"""The study of copies: what a list found, counted by hand, and a small run from planting to the table."""

import json

import numpy as np
from PIL import Image

from benchmarks.duplicates import KINDS, pairs_of
from moevision.data.synthetic import SyntheticPets


def test_each_pair_stands_once_nearest_first():
    other = np.array([1, 0, 3, 4, 3, -1])
    distance = np.array([2, 2, 1, 0.5, 0.5, np.inf])
    assert pairs_of(other, distance) == [(3, 4), (2, 3), (0, 1)]


def test_from_planting_to_the_table(bench, saved_model, tmp_path):
    """Photos that are all different: an altered copy in another size is found wherever it lies."""
    pets = SyntheticPets(60, 64, 0, "train")
    for index in range(60):
        folder = tmp_path / "pets" / ("train" if index < 40 else "val") / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pets.image(index)).save(folder / f"{index}.png")
    options = ("--train", 30, "--outside", 10, "--each", 2, "--allow-dirty", "--out", tmp_path / "record.json")
    outcome = bench("duplicates", "planted", "--data", tmp_path / "pets", "--model", saved_model, *options)
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "record.json").read_text())["planted"]
    assert record["images"] == 30 + 10 + 2 * len(KINDS)
    everything, leaks = record["lists"]["all"], record["lists"]["leaks"]
    assert everything["planted"] == 2 * len(KINDS)
    assert leaks["planted"] == len(KINDS)
    for found in (everything, leaks):
        assert found["kinds"]["half the size"]["named"] == found["kinds"]["JPEG quality 50"]["named"] == 1
        listed = sum(kind["copies"] * kind["listed"] for kind in found["kinds"].values())
        assert abs(found["precision"] - listed / found["planted"]) < 1e-3
    assert str(tmp_path) not in json.dumps(record)
    (tmp_path / "README.md").write_text("<!-- tables: begin -->\n<!-- tables: end -->\n")
    report = ("report", "--out", tmp_path / "record.json", "--readme", tmp_path / "README.md")
    assert bench("duplicates", *report).code == 0
    assert "| half the size | 2 | 100 % |" in (tmp_path / "README.md").read_text()
