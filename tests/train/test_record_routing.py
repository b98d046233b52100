"""How routing formed: which moments are recorded, that they are the model's own, that a resumed run has the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from moevision.data.images import safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.errors import UserError
from moevision.layers import forward_routing
from moevision.models.history import FILE, RoutingHistory, moment_of, planned_moments
from moevision.models.io import load_model
from moevision.train.health import RecordRoutingConfig

# Two epochs of three or four batches of 8.
OPTIONS = ("--record_routing.moments=4",)


@pytest.fixture(scope="module")
def shown(drawn_pets, tmp_path_factory) -> Path:
    """Two cats and a dog."""
    folder = tmp_path_factory.mktemp("shown")
    for kind, count in (("cat", 2), ("dog", 1)):
        (folder / kind).mkdir()
        for file in sorted((drawn_pets / kind).iterdir())[:count]:
            shutil.copy(file, folder / kind)
    return folder


@pytest.fixture(scope="module")
def run(cli, tiny, drawn_pets, shown, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    options = (*tiny, *OPTIONS, f"--record_routing.images={shown}", f"--runs_root={root}", "--with-twin")
    outcome = cli("fit", drawn_pets, *options)
    assert outcome.code == 0, outcome.err
    return root / "pets"


def test_moments_lie_closer_together_at_first():
    assert planned_moments(700, 8) == [0, 14, 57, 129, 229, 357, 514, 700]
    assert planned_moments(2, 8) == [0, 1, 2]  # no step twice


def test_the_last_moment_is_the_trained_model(run, shown):
    """By hand: each image through the weights of the last step, patch by patch."""
    history = RoutingHistory.load(run / FILE)
    assert history.steps == tuple(planned_moments(history.total_steps, 4))
    names = [path.relative_to(shown).as_posix() for path in sorted(shown.rglob("*.png"))]
    assert (list(history.image_names), history.class_names) == (names, ("cat", "dog"))
    saved = load_model(str(run))
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    saved.net.load_state_dict({name.removeprefix("net."): each for name, each in weights.items() if "net." in name})
    for row, name in enumerate(names):
        pixels = torch.from_numpy(square_pixels(safe_open(shown / name), 32)).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits, routings = forward_routing(saved.net.eval(), normalize(pixels, saved.mean, saved.std))
        np.testing.assert_allclose(history.probabilities[-1, row], logits.softmax(-1)[0], atol=1e-3)
        for routing in routings:
            own = history.weights[routing.layer][-1, row]
            np.testing.assert_allclose(own, routing.expert_weights()[0, routing.num_prefix_tokens :], atol=1e-3)
            assert (history.first_choice(routing.layer)[-1, row] == own.argmax(-1)).all()
    assert history.grid == (4, 4)
    assert not np.array_equal(history.weights[1][0], history.weights[1][-1]), "it learned"


def test_recording_changes_no_training(run, cli, tiny, drawn_pets, tmp_path):
    outcome = cli("fit", drawn_pets, *tiny, f"--runs_root={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "pets/model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    assert not (tmp_path / "pets" / FILE).exists()


def test_a_dense_twin_has_nothing_to_record(run):
    assert (run / "twin" / "summary.json").is_file()
    assert not (run / "twin" / FILE).exists()


@pytest.mark.deep
@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_has_the_same_file(cli, tiny, drawn_pets, shown, run, step, monkeypatch, send_signal, tmp_path):
    monkeypatch.chdir(tmp_path)
    send_signal(step)
    assert cli("fit", drawn_pets, *tiny, *OPTIONS, f"--record_routing.images={shown}").code == 143
    outcome = cli("fit", "--resume", "runs/pets")
    assert outcome.code == 0, outcome.err
    assert Path("runs/pets", FILE).read_bytes() == (run / FILE).read_bytes()


@pytest.mark.parametrize("fault", ["none", "broken", "missing"])
def test_what_cannot_be_recorded(cli, tiny, drawn_pets, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shown"
    if fault != "missing":
        folder.mkdir()
    if fault == "broken":
        (folder / "cat.png").write_bytes(b"no image")
    outcome = cli("fit", drawn_pets, *tiny, f"--record_routing.images={folder}")
    assert outcome.code == 2
    assert ("cannot use the image" if fault == "broken" else "holds 0 images") in outcome.err
    assert not Path("runs/pets").exists()


def test_one_moment_is_no_history():
    with pytest.raises(UserError, match="at least 2"):
        RecordRoutingConfig(moments=1)


# ---- the file


def test_it_comes_back_as_it_was_saved(run, tmp_path):
    history = RoutingHistory.load(run / FILE)
    history.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (run / FILE).read_bytes()


def test_a_part_of_it(run):
    history = RoutingHistory.load(run / FILE)
    half = history.until(history.steps[1])
    assert (len(half), half.weights[1].shape[0]) == (2, 2)


def test_every_module_keeps_its_mode(make_net):
    net = make_net()
    net.train().blocks[0].eval()
    before = [module.training for module in net.modules()]
    moment_of(net, torch.zeros(1, 3, 32, 32))
    assert [module.training for module in net.modules()] == before


@pytest.fixture
def make_net():
    import timm

    return lambda: timm.create_model("test_vit_moe", num_classes=2)


@pytest.mark.parametrize("fault", ["cut", "schema", "shape", "order", "missing"])
def test_a_damaged_file(run, tmp_path, fault):
    file = tmp_path / FILE
    arrays = safetensors.numpy.load_file(run / FILE)
    with safetensors.safe_open(run / FILE, "np") as opened:
        metadata = opened.metadata()
    if fault == "schema":
        metadata["history"] = metadata["history"].replace("history/1", "history/9")
    if fault == "shape":
        arrays["L1.weights"] = arrays["L1.weights"][:, :1].copy()
    if fault == "order":
        metadata["history"] = metadata["history"].replace('"steps": [0, ', '"steps": [9, ')
    if fault != "missing":
        file.write_bytes(safetensors.numpy.save(arrays, metadata)[: 200 if fault == "cut" else None])
    said = {"cut": "can't be loaded", "schema": "history/9", "missing": "There is no"}.get(fault, "is damaged")
    with pytest.raises(UserError, match=said):
        RoutingHistory.load(file)
