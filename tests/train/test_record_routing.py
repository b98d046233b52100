"""How routing formed: which moments are recorded, that they are the model's own, that a resumed run has the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch

from moevision.data.images import safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.demo.galleries import Galleries
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from moevision.errors import UserError
from moevision.files import read_csv
from moevision.layers import forward_routing
from moevision.models.history import FILE, RoutingHistory, moment_of, planned_moments
from moevision.models.io import load_model
from moevision.train.checkpoint import verify
from moevision.train.finish import checkpoint_of_run
from moevision.train.health import moments_for
from tests.shared import succeeded

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
    options = (*OPTIONS, f"--record_routing.images={shown}", f"--runs_root={root}")
    succeeded(cli("fit", drawn_pets, *tiny, *options))
    return root / "pets"


def test_moments_lie_closer_together_at_first_and_take_a_hundredth_of_the_work():
    """Twelve images forward, a training image forward and backward for three: 24 x 12 of 3 x 9 600 are 1 %."""
    assert planned_moments(700, 8) == [0, 14, 57, 129, 229, 357, 514, 700]
    assert planned_moments(2, 8) == [0, 1, 2]  # no step twice
    steps = {total: moments_for(total, 32, 12) for total in (20, 50, 100, 300, 10_000)}
    assert steps == {20: 2, 50: 4, 100: 8, 300: 24, 10_000: 24}


def test_the_last_moment_is_the_saved_model(run, shown):
    """By hand: each image through the weights that were tested, patch by patch."""
    history = RoutingHistory.load(run / FILE)
    tested = verify(checkpoint_of_run(run)).step
    assert history.total_steps == 6
    assert history.steps == (*(step for step in planned_moments(6, 4) if step < tested), tested)
    assert not history.pretrained
    names = [path.relative_to(shown).as_posix() for path in sorted(shown.rglob("*.png"))]
    assert (list(history.image_names), history.class_names) == (names, ("cat", "dog"))
    saved = load_model(str(run))
    for row, name in enumerate(names):
        pixels = torch.from_numpy(square_pixels(safe_open(shown / name), 32)).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits, routings = forward_routing(
                saved.net.eval(), normalize(pixels, saved.mean, saved.std)
            )
        np.testing.assert_allclose(history.probabilities[-1, row], logits.softmax(-1)[0], atol=1e-3)
        for routing in routings:
            own = history.weights[routing.layer][-1, row]
            np.testing.assert_allclose(
                own, routing.expert_weights()[0, routing.num_prefix_tokens :], atol=1e-3
            )
            assert (history.first_choice(routing.layer)[-1, row] == own.argmax(-1)).all()
    assert history.grid == (4, 4)
    assert not np.array_equal(history.weights[1][0], history.weights[1][-1]), "it learned"


def test_recording_changes_no_training(run, cli, tiny, drawn_pets, tmp_path):
    outcome = cli(
        "fit", drawn_pets, *tiny, f"--runs_root={tmp_path}", "--record_routing.images=null"
    )
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "pets/model/model.safetensors").read_bytes() == (
        run / "model/model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "pets" / FILE).exists()


def test_twelve_test_images_are_recorded_unless_one_says_otherwise(tiny_run):
    """Classes in turn, in the order of splits.csv: what the explorer shows first."""
    history = RoutingHistory.load(tiny_run / FILE)
    rows = [row for row in read_csv(tiny_run / "splits.csv") if row["split"] == "test"]
    cats, dogs = ([row["path"] for row in rows if row["class"] == kind] for kind in ("cat", "dog"))
    in_turn = [name for pair in zip(cats, dogs, strict=False) for name in pair]
    assert list(history.image_names) == in_turn[:12]
    (entry,) = open_entries(str(tiny_run))
    assert [
        entry.examples.id_of_name(name) for name in history.image_names
    ] == entry.examples.all_ids[:12]
    # Six steps of eight images are soon over: 1 % of that isn't a pass of 12 images, and beginning and end are kept.
    assert history.steps[0] == 0
    assert len(history) == 2
    assert not (tiny_run / "twin" / FILE).exists(), "a dense model has no routing"


def test_what_an_own_run_recorded_is_shown(tiny_run):
    entries = open_entries(str(tiny_run))
    explorer = Explorer(entries, Galleries(entries, limit=3))
    history, (own,) = RoutingHistory.load(tiny_run / FILE), explorer.answer("boot", {})["models"]
    track = own["history"]["track"]
    labels = [history.class_names.index(name.split("/")[0]) for name in history.image_names]
    assert track["right"] == (history.probabilities.argmax(-1) == labels).sum(1).tolist()
    assert track["of"] == len(labels)
    first = own["history"]["images"][0]
    view = explorer.answer("route", {"picture": {"kind": "example", "id": first}})
    last = explorer.answer("history", {"picture": first})["predictions"][-1]
    assert last[0]["p"] == pytest.approx(view["prediction"]["moe"][0]["p"], abs=1e-3)


@pytest.mark.deep
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_resumed_run_has_the_same_file(
    cli, tiny, drawn_pets, shown, run, step, monkeypatch, send_signal, tmp_path
):
    """Stopped at a moment of the plan, 0, 1, 3 and 6, or between two of them: going on is none."""
    assert planned_moments(6, 4) == [0, 1, 3, 6]
    monkeypatch.chdir(tmp_path)
    send_signal(step)
    assert cli("fit", drawn_pets, *tiny, *OPTIONS, f"--record_routing.images={shown}").code == 143
    succeeded(cli("fit", "--resume", "runs/pets"))
    assert Path("runs/pets", FILE).read_bytes() == (run / FILE).read_bytes()


def test_every_module_keeps_its_mode():
    net = timm.create_model("test_vit_moe", num_classes=2)
    net.train().blocks[0].eval()
    before = [module.training for module in net.modules()]
    moment_of(net, torch.zeros(1, 3, 32, 32))
    assert [module.training for module in net.modules()] == before


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
        file.write_bytes(
            safetensors.numpy.save(arrays, metadata)[: 200 if fault == "cut" else None]
        )
    said = {"cut": "can't be loaded", "schema": "history/9", "missing": "There is no"}.get(
        fault, "is damaged"
    )
    with pytest.raises(UserError, match=said):
        RoutingHistory.load(file)
