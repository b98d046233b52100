"""The recorded moments of a training, as the explorer sends them: the file's own numbers, of the file's own images."""

import base64

import numpy as np
import pytest

from moevision.demo.galleries import Galleries
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.demo.test_html import embedded
from tests.shared import says


@pytest.fixture(scope="module")
def photos(photos_home):
    entries = open_entries(None, home=photos_home)
    return Explorer(entries, Galleries(entries, limit=3))


def weights_of(layer):
    """[T, P, E]"""
    packed = layer["weights"]
    return np.frombuffer(base64.b64decode(packed["data"]), "<f2").reshape(packed["shape"])


def test_boot_says_what_was_recorded(photos, recorded, explorer):
    (snaps,) = photos.answer("boot", {})["models"]
    history = snaps["history"]
    assert history["images"] == [f"data/{name}" for name in recorded.image_names]
    assert (history["total_steps"], history["pretrained"]) == (100, False)
    assert set(snaps["history"]["images"]) == {example["id"] for example in snaps["examples"]}
    assert [model["history"] for model in explorer.answer("boot", {})["models"]] == [None, None]


def test_loads_and_right_answers_are_counted_over_all_images(photos, recorded):
    """By hand: a choice is a weight above 0; an image's class is the first part of its name."""
    track = photos.answer("boot", {})["models"][0]["history"]["track"]
    assert track["steps"] == [0, 10, 40]
    assert track["of"] == len(recorded.image_names) == 3
    for moment in range(3):
        best = [recorded.class_names[each] for each in recorded.probabilities[moment].argmax(-1)]
        pairs = zip(best, recorded.image_names, strict=True)
        assert track["right"][moment] == sum(name.startswith(f"{said}/") for said, name in pairs)
        for place, layer in enumerate(recorded.layers):
            taken = [
                (recorded.weights[layer][moment, ..., expert] > 0).sum() for expert in range(4)
            ]
            assert track["loads"][place][moment] == pytest.approx(
                (np.array(taken) / sum(taken)).tolist(), abs=6e-4
            )


def test_an_image_has_the_numbers_of_the_file(photos, recorded):
    for row, name in enumerate(recorded.image_names):
        answer = photos.answer("history", {"picture": f"data/{name}", "variant": "trained"})
        assert (answer["steps"], answer["total_steps"]) == ([0, 10, 40], 100)
        for layer in answer["layers"]:
            assert np.array_equal(weights_of(layer), recorded.weights[layer["layer"]][:, row])
        for top, p in zip(answer["predictions"], recorded.probabilities[:, row], strict=True):
            assert top[0]["class"] == recorded.class_names[int(p.argmax())]
            assert top[0]["p"] == pytest.approx(float(p.max()), abs=5.1e-5)
            assert len(top) == 8  # every class


def test_the_last_moment_is_the_model_that_the_page_shows(photos, recorded):
    id = f"data/{recorded.image_names[0]}"
    view = photos.answer("route", {"picture": {"kind": "example", "id": id}})
    answer = photos.answer("history", {"picture": id})
    for shown, layer in zip(view["layers"], answer["layers"], strict=True):
        last = weights_of(layer)[-1].astype(float)
        for patch, (experts, weights) in enumerate(
            zip(shown["experts"], shown["weights"], strict=True)
        ):
            assert last[patch, experts] == pytest.approx(weights, abs=5e-4)
            assert np.count_nonzero(last[patch]) == len(experts)
    assert [one["class"] for one in answer["predictions"][-1]] == [
        one["class"] for one in view["prediction"]["moe"]
    ]


def test_what_was_not_recorded_is_refused(photos, recorded):
    answer = photos.answer("history", {"picture": "data/other.png"})
    assert says(answer["error"], "not recorded", "'data/other.png'", "choose one")
    known = f"data/{recorded.image_names[0]}"
    untrained = photos.answer("history", {"picture": known, "variant": "untrained"})
    assert says(untrained["error"], "not recorded")


def test_a_history_is_not_shown_beside_images_that_the_user_named(photos_home):
    """Not even where these bear the names of the model's own, as numbers do."""
    data = str(photos_home / "snaps" / "examples")
    boot = Explorer(open_entries(None, data, home=photos_home)).answer("boot", {})
    assert boot["models"][0]["history"] is None


def test_an_exported_page_has_the_moments_of_its_image(photos, recorded):
    example = {"kind": "example", "id": f"data/{recorded.image_names[1]}"}
    page = photos.answer("export_html", {"picture": example})["html"]
    assert embedded(page, "HISTORY") == photos.answer("history", {"picture": example["id"]})
    changed = photos.answer("export_html", {"picture": example, "top_k": 1})["html"]
    assert embedded(changed, "HISTORY") is None
