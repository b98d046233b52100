"""What is drawn is what the protocol says, splits are apart, and rates are searched past every edge that wins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from benchmarks.doses import arms, runs
from benchmarks.doses.tasks import Characters, Mosaics, Textures, shifted


def test_textures_are_of_the_class_that_most_of_them_have() -> None:
    task = Textures(64, seed=1)
    assert sorted(torch.cat(task.of_class).tolist()) == list(range(64))
    things, labels = task.choose(4000, Generator().manual_seed(0))
    own = (task.class_of[things] == labels[:, None]).float().mean()
    assert float(own) == pytest.approx(0.3 + 0.7 / 16, abs=0.01)
    images, _ = task.batch("train", 8, Generator().manual_seed(0))
    assert images.shape == (8, 3, 32, 32)


def test_mosaics_keep_their_classes_in_all_splits() -> None:
    task = Mosaics(32, seed=1)
    assert task.labels.bincount().tolist() == [2] * 16
    train, _ = task.batch("train", 4, Generator().manual_seed(1))
    test, _ = task.batch("test", 4, Generator().manual_seed(2))
    assert not torch.equal(train, test)


def test_characters_of_the_test_are_in_fonts_of_their_own(tmp_path: Path) -> None:
    glyphs = np.zeros((3, 2000, 16, 16), np.uint8)
    glyphs[:] = np.array([10, 20, 30])[:, None, None, None]  # a font is a shade
    kinds = {"sound": [f"{i % 20:02}" for i in range(2000)], "split": ["train", "val", "test"]}
    np.savez(tmp_path / "glyphs.npz", glyphs=glyphs, **kinds)
    task = Characters("sound", 0, tmp_path / "glyphs.npz")
    assert [len(things) for things in task.of_class] == [60] * 16
    assert {name: font.tolist() for name, font in task.fonts.items()} == {
        "train": [0],
        "val": [1],
        "test": [2],
    }


def test_images_are_moved_in_both_directions() -> None:
    image = torch.zeros(200, 1, 5, 5)
    image[:, 0, 2, 2] = 1
    moved = shifted(image, 1, Generator().manual_seed(0))
    assert moved.sum() == 200
    assert (moved.sum(0)[0, 1:4, 1:4] > 0).all()


@pytest.mark.parametrize(("task", "arm"), runs.priced_arms())
def test_every_arm_trains(task: str, arm: str) -> None:
    step = arms.step_of(task, arm, 0, 1e-3, 2, 16)
    model = arms.MODELS[task]
    side = model["img_size"]
    step(torch.randn(4, model.get("in_chans", 3), side, side), torch.arange(4))


def tuning(cell: runs.Cell, arm: str, best: float) -> list[dict[str, Any]]:
    task = {"task": cell.task, "dose": cell.dose, "seconds": cell.seconds, "seed": 100, "arm": arm}
    return [{**task, "lr": lr, "val_top1": 0.8 - abs(np.log2(lr / best)) / 10} for lr in cell.rates]


def test_rates_are_searched_past_an_edge_before_a_seed_runs() -> None:
    cell = runs.Cell("textures", "64", 6.4, ("dense-2", "dense-4"), ("moe-8-full",), 2)
    inner = [r for arm in ("dense-2", "dense-4", "moe-8-full") for r in tuning(cell, arm, 0.016)]
    edge = [*inner[:3], *tuning(cell, "dense-4", 0.032), *inner[6:]]
    assert {run.lr for run in cell.runs(edge) if run.arm == "dense-4"} == {*runs.RATES, 0.064}
    assert all(run.seed == 100 for run in cell.runs(edge))
    inner[4]["val_top1"] = 0.9
    seeds = [(run.arm, run.lr) for run in cell.runs(inner) if run.seed == 1]
    assert seeds == [("dense-4", 0.016), ("moe-8-full", 0.016)]
