"""The study of label noise: what is flipped, how finding it is measured, and one tiny run from flips to the table."""

import json
from argparse import Namespace
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from benchmarks.label_noise import SIMILAR, Job, draw_folder, drawn, dropping, final_scores, finds, flipped, table
from benchmarks.queue import read_records
from moevision.data.synthetic import SyntheticPets

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_images_are_drawn_by_class_and_flips_by_the_kind_of_noise():
    labels = [index % 10 for index in range(5000)]
    some = drawn(labels, 1000, seed=0)
    assert Counter(labels[index] for index in some) == dict.fromkeys(range(10), 100)
    assert drawn(labels, 1000, seed=1) != some == drawn(labels, 1000, seed=0)
    own = [labels[index] for index in some]
    flips = flipped(own, "random", NAMES, 0)
    assert len(flips) == 100
    assert all(own[place] != wrong for place, wrong in flips.items())
    assert len({(own[place], wrong) for place, wrong in flips.items()}) > 50
    similar = flipped(own, "similar", NAMES, 0)
    assert len(similar) == 100
    assert {(NAMES[own[place]], NAMES[wrong]) for place, wrong in similar.items()} == set(SIMILAR.items())


def test_finding_by_hand():
    """Flips at ranks 1 and 3 of 20: of 36 pairs 35 stand in order, and one of the first two is a flip."""
    suspicion = np.arange(20, 0, -1).astype(float)
    truth = np.isin(np.arange(20), [0, 2])
    assert finds(suspicion, truth) == {"auroc": pytest.approx(35 / 36, abs=1e-4), "precision": 0.5}
    suspicion[19] = np.nan  # without a score: the least suspicious
    assert finds(suspicion, truth)["auroc"] == pytest.approx(35 / 36, abs=1e-4)


@pytest.mark.skipif(find_spec("cleanlab") is None, reason="an optional comparison")
def test_cleanlab_is_asked_about_the_same_predictions():
    labels, p = np.array([0, 1, 0, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    found = final_scores(labels, p)
    assert found["p_final"] == pytest.approx([-0.9, -0.2, -0.4, -0.7])
    assert found["cleanlab self_confidence"] == pytest.approx(found["p_final"])
    assert found["cleanlab normalized_margin"] == pytest.approx([-(0.5 + (a - b) / 2) for a, b in (
        (0.9, 0.1), (0.2, 0.8), (0.4, 0.6), (0.7, 0.3))])  # fmt: skip
    assert len(found) == 5


def test_a_run_from_flips_to_the_table(bench, tmp_path):
    pets = SyntheticPets(140, 32, 0, "train")
    for index in range(140):
        folder = tmp_path / "cifar" / ("train" if index < 110 else "test") / NAMES[index % 10]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pets.image(index)).save(folder / f"{index}.png")
    small = ("model.arch.name=test_vit_moe", "model.arch.patch_size=8", "data.image_size=32", "data.batch_size=8",
             "trainer.precision=32-true", "model.optim.name=adamw")  # fmt: skip
    places = ("--cifar", tmp_path / "cifar", "--work", tmp_path / "work", "--out", tmp_path / "runs.jsonl")
    options = ("--images", 60, "--epochs", 1, "--seeds", 0, "--allow-dirty", *(f"--fit=--{option}" for option in small))
    asked = ("label_noise", "run", *places, *options, "--arm", "moe", "dropped", "--noise", "random")
    outcome = bench(*asked, "--limit", 0)
    assert outcome.code == 0, outcome.err
    runs = {run["name"]: run for run in read_records(tmp_path / "runs.jsonl")}
    record, fewer = (runs[f"random-{arm}-s0"] for arm in ("moe", "dropped"))
    assert (record["images"], record["flips"], record["epochs"]) == (60, 6, 1)
    assert {"aum", "el2n", "forgetting", "experts", "experts L1", "features", "p_final"} <= record["scores"].keys()
    assert all(0 <= value <= 1 for each in record["scores"].values() for value in each.values())
    assert str(tmp_path) not in json.dumps([record, fewer])
    steps = [json.loads((tmp_path / f"work/random-{arm}-s0/summary.json").read_text())["steps"]
             for arm in ("moe", "dropped")]  # fmt: skip
    assert steps == [60 // 8] * 2  # as many, of fewer images
    found = round(record["scores"]["aum"]["precision"] * 6)  # among the first 6 of 60
    assert (fewer["images"], fewer["flips"]) == (54, 6 - found)
    lines = table([record], "random")
    assert (
        f"| aum | {record['scores']['aum']['auroc']:.3f} | {record['scores']['aum']['precision']:.3f} |  |  |" in lines
    )
    [_, _, whole, without] = dropping([record, fewer], "random")
    assert whole == f"| all images | 6 | 1 | {100 * record['test_top1']:.2f} |  |  - |".replace("|  -", "| -")
    gap = 100 * (fewer["test_top1"] - record["test_top1"])
    assert f"| {6 - found} | 1 | {100 * fewer['test_top1']:.2f} | {gap:+.2f} |" in without
    again = bench(*asked)
    assert "Nothing is left to do here." in again.err
    (tmp_path / "README.md").write_text("<!-- tables: begin -->\n<!-- tables: end -->\n")
    assert (
        bench("label_noise", "report", "--out", tmp_path / "runs.jsonl", "--readme", tmp_path / "README.md").code == 0
    )
    assert ("Not run yet." in (tmp_path / "README.md").read_text()) == bool(
        not record["code"] or record["code"]["dirty"]
    )


def test_a_drawn_folder_has_a_tenth_of_its_images_in_the_wrong_class(tmp_path):
    """What an image shows is known by its number; `index mod 8` is the class that was drawn."""
    folder, job = tmp_path / "folder", Job("folder", "moe", 0)
    wrong = draw_folder(folder, job, Namespace(images=80))
    files = sorted((folder / "train").rglob("*.png"))
    lies = {str(file.relative_to(folder)) for file in files
            if file.parent.name != SyntheticPets.classes[int(file.stem) % 8]}  # fmt: skip
    assert len(files) == 80
    assert lies == set(wrong)
    assert len(wrong) == 8
