"""The deletion test: patches are replaced where they should be, and the record's numbers are those of its rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.demo import heat
from moevision.analysis.images import open_pictures
from moevision.demo.models import open_entries

RECORD = Path(heat.__file__).with_name("heat.json")


def test_the_largest_fifth_is_replaced_and_nothing_else() -> None:
    """Of 16 patches of 2 x 2 pixels three, 20 % rounded."""
    x = torch.arange(2 * 3 * 64).reshape(2, 3, 8, 8).float()
    scores = torch.zeros(2, 16)
    scores[0, [0, 5, 15]] = 1.0
    scores[1, [3, 4, 6]] = 1.0
    changed = heat.without(x, heat.filled(x, "mean", 2), scores, (4, 4))
    is_changed = (changed != x).any(1)  # [2, 8, 8]
    for image, rows, columns in ((0, 0, 0), (0, 2, 2), (0, 6, 6), (1, 0, 6), (1, 2, 0), (1, 2, 4)):
        assert is_changed[image, rows : rows + 2, columns : columns + 2].all()
    assert is_changed.sum((1, 2)).tolist() == [12, 12]
    assert changed[0, 1, 0, 0] == x[0, 1].mean()


def test_a_blurred_image_has_no_detail_of_a_patch() -> None:
    x = torch.zeros(1, 3, 32, 32)
    x[:, :, ::2] = 1.0
    assert heat.filled(x, "blur", 4).std() < 0.01


def test_margins_and_contrasts_by_hand() -> None:
    shares = heat.PatchShares(torch.tensor([[[1.0, 5.0, 3.0]]]), torch.zeros(1, 3), torch.zeros(3))
    pair = torch.tensor([[1, 0]])
    assert heat.margin_of(torch.tensor([[2.0, 7.0, 4.0]]), pair).tolist() == [5]
    scores = {name: heat.scores_of(shares, pair, name).item() for name in heat.CONTRASTS}
    assert scores == {"runner_up": 4, "mean_class": 2, "answer": 5}


def test_a_gradient_is_the_weight_of_a_linear_model() -> None:
    """Two patches of one pixel each; class 0 has the weights 1 and 2, class 1 three times as much."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 6.0]])

    class Model:
        net = staticmethod(lambda x: x[:, 0, :1].flatten(1) @ weight.T)

    x = torch.zeros(1, 3, 2, 2)
    x[0, 0, 0] = torch.tensor([5.0, 7.0])
    fill = torch.ones_like(x)
    found = heat.gradients_of(Model, x, torch.tensor([[1, 0]]), fill, (2, 2))
    assert found["gradient"].tolist() == [[10, 28, 0, 0]]
    assert found["gradient_fill"].tolist() == [[8, 24, 0, 0]]


def test_an_interval_by_hand() -> None:
    """Of 1, 2, 3: mean 2, standard deviation 1, so 1.96 / sqrt(3) on either side."""
    assert heat.with_interval(np.array([1.0, 2.0, 3.0])) == [2, 0.868, 3.132]


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def rows_of(record, model, fill):
    rows = [row[2:] for row in record["rows"] if row[:2] == [model, fill]]
    columns = np.array(rows).T
    return dict(zip(record["columns"], columns, strict=True))


@pytest.mark.parametrize("fill", heat.FILLS)
@pytest.mark.parametrize("model", heat.MODELS)
def test_the_record_says_what_its_rows_do(record, model, fill) -> None:
    margins = rows_of(record, model, fill)
    told = record["models"][model][fill]
    again = heat.summary(margins)
    assert told["images"] == again["images"] >= 200
    for name, value in again.items():
        if isinstance(value, dict):
            assert told[name] == pytest.approx(value, abs=2e-3)
        else:
            assert told[name] == pytest.approx(value, abs=5e-3)


def test_the_first_pages_of_the_record_again(record) -> None:
    """From the model of the package: margins before and without the shares' largest and smallest fifth."""
    (entry,) = (one for one in open_entries(None) if one.card.id == "emoji")
    saved = entry.variants["trained"].saved
    limit = record["models"]["emoji"]["mean"]["images"]
    pictures = open_pictures("emoji", saved.image_size, split="test", limit=limit)
    x = heat.network_input(saved, heat.read_images(pictures, range(8)))
    generator = torch.Generator().manual_seed(0)
    for fill, margins in heat.deletions(saved, x, generator, (heat.CHOSEN,)).items():
        rows = rows_of(record, "emoji", fill)
        for name in ("before", "top", "lowest"):
            assert margins[name].tolist() == pytest.approx(rows[name][:8].tolist(), abs=2e-2), name


def test_the_contrast_is_the_best_of_those_that_were_tried(record) -> None:
    """On other images than those that are reported: within its interval no other contrast's fall is larger."""
    for of_model in record["choice"].values():
        for of_fill in of_model.values():
            _, _, high = of_fill[heat.CHOSEN]
            assert high >= max(mean for mean, *_ in of_fill.values())
    emoji = record["choice"]["emoji"]["mean"]
    assert max(emoji, key=lambda name: emoji[name][0]) == heat.CHOSEN
