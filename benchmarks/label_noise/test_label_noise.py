"""Planted label noise: what is flipped, and how finding it is measured."""

from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks.label_noise import SIMILAR, draw_folder, final_scores, finds, flipped, suspicions
from moevision.analysis.good_data import images_of
from moevision.data.synthetic import SyntheticPets
from moevision.errors import escape_csv_cell

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_images_are_drawn_by_class_and_flips_by_the_kind_of_noise():
    labels = [index % 10 for index in range(5000)]
    own = labels[:1000]
    flips = flipped(own, "random", NAMES, 0)
    assert len(flips) == 100
    assert all(own[place] != wrong for place, wrong in flips.items())
    assert len({(own[place], wrong) for place, wrong in flips.items()}) > 50
    similar = flipped(own, "similar", NAMES, 0)
    assert len(similar) == 100
    assert {(NAMES[own[place]], NAMES[wrong]) for place, wrong in similar.items()} == set(
        SIMILAR.items()
    )


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
    assert found["cleanlab normalized_margin"] == pytest.approx(
        [-(0.5 + (a - b) / 2) for a, b in ((0.9, 0.1), (0.2, 0.8), (0.4, 0.6), (0.7, 0.3))]
    )
    assert len(found) == 5


def test_a_run_s_scores_are_asked_for_its_flips(cli, tiny, drawn_pets, tmp_path):
    """Every score has a value for each training image; the first two images are the flips."""
    outcome = cli("fit", drawn_pets, *tiny, "--data.scores=true", f"--runs_root={tmp_path}")
    assert outcome.code == 0, outcome.err
    wrong = {
        escape_csv_cell(sample.sample_id)
        for sample in images_of(tmp_path / "pets").samples["train"][:2]
    }
    values, truth = suspicions(tmp_path / "pets", wrong)
    assert truth.tolist() == [True, True] + [False] * (len(truth) - 2)
    assert {
        "aum",
        "el2n",
        "forgetting",
        "experts",
        "experts L1",
        "features",
        "p_final",
    } <= values.keys()
    assert {len(value) for value in values.values()} == {len(truth)}


def test_a_drawn_folder_has_a_tenth_of_its_images_in_the_wrong_class(tmp_path):
    """What an image shows is known by its number; `index mod 8` is the class that was drawn."""
    folder = tmp_path / "folder"
    wrong = draw_folder(folder, images=80, seed=0, test=8)
    files = sorted((folder / "train").rglob("*.png"))
    lies = {
        str(file.relative_to(folder))
        for file in files
        if file.parent.name != SyntheticPets.classes[int(file.stem) % 8]
    }
    assert len(files) == 80
    assert lies == set(wrong)
    assert len(wrong) == 8
