"""The linear probe is scikit-learn's regression on the model's own features, and the classifier begins with it."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from moevision.data import ImageDataModule
from moevision.models.upcycle import upcycle
from moevision.train import start
from moevision.train.start import fit_probe, linear_head, read_probe, start_with
from tests.shared import missing

CPU = torch.device("cpu")


@pytest.fixture
def data(drawn_pets: Path, draw, tmp_path: Path) -> ImageDataModule:
    module = ImageDataModule(
        str(drawn_pets), image_size=32, batch_size=8, test_fraction=0.3, val_fraction=0.2
    )
    module.setup("fit")
    return module


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=2)


def features_of(
    net: torch.nn.Module, data: ImageDataModule, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """By the model's own forward pass, with its classifier taken off."""
    bare = timm.create_model("test_vit", img_size=32, num_classes=0).eval()
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("head.")})
    with torch.no_grad():
        batches = [(bare(batch["image"]), batch["label"]) for batch in data.plain_loader(split)]
    return tuple(torch.cat(part).numpy() for part in zip(*batches, strict=True))


def test_the_probe_is_scikit_learns(data, net, monkeypatch):
    monkeypatch.setattr(start, "_STRENGTHS", (0.1,))
    found = fit_probe(net, data, CPU)
    (x, y), (test_x, test_y) = (features_of(net, data, split) for split in ("train", "test"))
    scaler = StandardScaler().fit(x)
    expected = LogisticRegression(C=0.1, max_iter=300).fit(scaler.transform(x), y)
    right = expected.predict(scaler.transform(test_x)) == test_y
    assert list(found.test_correct.values()) == right.tolist()
    assert found.train_images == len(y)
    start_with(net, found)
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(batch["image"]) for batch in data.plain_loader("test")])
    margin = (logits[:, 1] - logits[:, 0]).numpy()
    np.testing.assert_allclose(
        margin, expected.decision_function(scaler.transform(test_x)), rtol=1e-3, atol=1e-3
    )


def test_a_classifier_that_is_as_good_is_kept(data, net):
    first = fit_probe(net, data, CPU)
    start_with(net, first)
    second = fit_probe(net, data, CPU)
    assert second.head_val_correct == second.val_correct
    assert not second.beats_the_head
    assert "own classifier" in second.sentence()


def test_nothing_else_changes(data, net, tmp_path):
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    found = fit_probe(net.train(), data, CPU)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    found.write(tmp_path)
    assert read_probe(tmp_path) == found
    assert read_probe(tmp_path / "none") is None


def test_a_class_without_training_images_is_never_chosen():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.integers(0, 2, 60) * 2  # classes 0 and 2 of three
    x[y == 2] += 3
    images = start.Features(x, y, np.arange(len(y)))
    weight, bias = start._best_regression(images, images, 3)
    assert set(start._classify(x, weight, bias)) == {0, 2}


def test_a_start_with_experts_is_told(data, net):
    """Its size is that of the model, whose classifier it is: 4 bytes for each parameter, experts counted one by one."""
    for model, experts in ((net, False), (upcycle(net, num_experts=4), True)):
        found = fit_probe(model, data, CPU)
        assert found.of_experts == experts
        assert found.mbytes == pytest.approx(
            4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6
        )


def test_it_takes_some_images_of_every_class(data, net, monkeypatch, capsys):
    monkeypatch.setattr(start, "_MOST_IMAGES", {"train": 20, "val": 4, "test": 10})
    classes = [sample.label for sample in data.contents.datasets["train"].samples]
    read, loader = {}, data.plain_loader
    monkeypatch.setattr(
        data, "plain_loader", lambda split, some: read.update({split: some}) or loader(split, some)
    )
    found = fit_probe(net, data, CPU)
    assert (found.train_images, found.val_images, len(found.test_correct)) == (20, 4, 10)
    taken = [classes[index] for index in read["train"]]
    assert abs(taken.count(0) - 20 * classes.count(0) / len(classes)) <= 1
    said = capsys.readouterr().err
    assert not missing(said, "20 training", "4 validation", "10 test images")


def read_of(labels: list[int], most: dict[str, int]) -> dict[str, list[int]]:
    """The rows that are read of each split, which all have images of these labels, where at most so many are taken."""
    read: dict[str, list[int]] = {}
    batch = {"image": torch.zeros(1, 3, 32, 32), "label": torch.zeros(1), "index": torch.zeros(1)}
    split = SimpleNamespace(samples=[SimpleNamespace(label=label) for label in labels])
    data = SimpleNamespace(
        contents=SimpleNamespace(datasets=dict.fromkeys(most, split)),
        plain_loader=lambda split, some: read.update({split: some}) or [batch],
        num_classes=3,
        seed=0,
        batch_size=8,
    )
    start.features_of(timm.create_model("test_vit", img_size=32, num_classes=3), data, most, CPU)
    return read


def test_it_is_tested_on_all_test_images():
    """As the models beside it: `fit` and `compare` would else recommend by different images."""
    labels = [number % 3 for number in range(5_000)]
    assert read_of(labels, {"test": start._MOST_IMAGES["test"]})["test"] == list(range(5_000))


@pytest.mark.parametrize("rare", [1, 3, 30])
def test_a_rare_class_is_among_the_sampled_training_images(rare):
    """Of 3,000 images beside 1 to 30 of a class that comes last, every tenth would leave out all or nearly all."""
    labels = [0] * 1500 + [1] * 1500 + [2] * rare
    read = read_of(labels, {"train": 300, "val": 300})
    counts = {split: Counter(labels[row] for row in set(rows)) for split, rows in read.items()}
    assert counts["train"].total() == counts["val"].total() == 300
    assert counts["train"][2] >= min(rare, 5)
    assert abs(counts["train"][0] - counts["train"][1]) <= 2
    assert counts["val"][2] == pytest.approx(
        rare / 10, abs=1
    )  # what is measured keeps the classes' shares


def test_two_heads_have_no_probe(data):
    net = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=2, depth=1)
    assert linear_head(net) is None
    assert fit_probe(net, data, CPU) is None
