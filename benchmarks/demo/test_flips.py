"""How many answers change without one expert: each answer against the ablation itself, and the counts from digits."""

import numpy as np
import torch
from PIL import Image

from benchmarks.demo.flips import answers, flipped
from moevision.analysis.collect import network_input
from moevision.analysis.images import open_pictures
from moevision.demo import bundled_model
from tests.scopes import ablate


def test_answers_are_those_without_the_expert(tmp_path) -> None:
    model, rng = bundled_model("cifar10"), np.random.default_rng(0)
    for name in model.class_names:
        for file in ("train/{}/0.png", "train/{}/1.png", "test/{}/0.png"):
            path = tmp_path / file.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    pictures = open_pictures(
        str(tmp_path), model.image_size, limit=10, class_names=model.class_names
    )
    found = answers(model, pictures)
    assert found["labels"] == "0123456789"
    assert {len(one) for kind in ("without", "at_random") for one in found[kind].values()} == {10}
    assert len(found["without"]) == len(found["at_random"]) == 16
    x = network_input(model, np.stack([pictures.image(number) for number in range(10)]))
    with torch.inference_mode(), ablate(model.net, 0, 3):
        away = model.net(x).argmax(-1)
    assert found["without"]["L0·E3"] == "".join(map(str, away.tolist()))


def test_an_answer_flips_if_any_expert_changes_it() -> None:
    record = {
        "all": "0123",
        "without": {"a": "0124", "b": "1123"},
        "at_random": {"a": "0123", "b": "0103"},
    }
    assert flipped(record, "without").tolist() == [True, False, False, True]
    assert flipped(record, "at_random").tolist() == [False, False, True, False]
