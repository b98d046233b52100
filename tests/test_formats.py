"""What earlier versions wrote still opens: run folders, checkpoints, saved models, traces, reports.

`fixtures/formats/VERSION` holds what that version wrote; `bash tests/fixtures/formats/make.sh FOLDER` makes such a
folder with the code of today (0.1: commit e4625c3). A folder that is there is never made anew: what can't be opened any
more is mended in the reader. Links of the explorer (links.json) are opened in `demo/browser/test_sharing.py`.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from moevision.analysis import RoutingTrace
from moevision.data.transforms import normalize
from moevision.demo.models import open_entries
from moevision.models.io import load_model
from moevision.train.report import gather_facts, model_card, read_summary
from tests.shared import succeeded

FORMATS = Path(__file__).parent / "fixtures" / "formats"
VERSIONS = sorted(path.name for path in FORMATS.iterdir() if path.is_dir())
ROUNDED = 1e-4  # probabilities are written with four digits; another machine's fp32 sums differ by far less


@pytest.fixture(scope="module", params=VERSIONS)
def old(request, tmp_path_factory):
    """A copy, elsewhere than it was made; the tests of this file may add to it."""
    return Path(
        shutil.copytree(FORMATS / request.param, tmp_path_factory.mktemp("old") / "formats")
    )


@pytest.fixture
def there(old, monkeypatch):
    """The run folders name their images from where `fit` was called."""
    monkeypatch.chdir(old)
    return old


def rows(text):
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture
def tested(old):
    """The predictions that its own version made of the test images."""
    return rows((old / "runs/finished/predictions_test.csv").read_text())


def test_it_is_small_and_names_no_place_of_a_developer():
    files = [path for path in FORMATS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.5e6 * len(VERSIONS)
    places = (b"/tmp/", b"/work/", b"/root/")
    assert [path for path in files if any(place in path.read_bytes() for place in places)] == []


def test_a_run_folder_tells_what_it_is(cli, there):
    facts = json.loads(cli("info", "runs/finished", "--format=json").out)
    summary = json.loads((there / "runs/finished/summary.json").read_text())
    assert (facts["classes"], facts["image_size"], facts["moe_blocks"]) == (
        2,
        summary["image_size"],
        [0, 1],
    )
    assert facts["costs"]["this model"]["total_parameters"] == summary["cost"]["total_parameters"]


def test_a_run_folder_predicts_as_it_did(cli, there, tested):
    outcome = cli("predict", "runs/finished", "pets", "--format=json")
    assert outcome.code == 0
    calibrated = "calibration" in json.loads(
        (there / "runs/finished/model/config.json").read_text()
    )
    assert ("not calibrated" in outcome.err) == (not calibrated)
    said = {row["path"].removeprefix("pets/"): row for row in json.loads(outcome.out)}
    assert len(said) == 24
    for row in tested:
        now = said[row["image"]]
        assert (now["class"], now["probability"]) == (
            row["prediction"],
            pytest.approx(float(row["probability"]), abs=ROUNDED),
        )


def test_a_run_folder_is_analyzed(cli, there):
    succeeded(cli("analyze", "runs/finished", "--quick", "--out", "again"))
    before, now = (
        json.loads((there / name / "report.json").read_text()) for name in ("report", "again")
    )
    assert before.keys() <= now.keys()
    assert len(before["layers"]) == len(now["layers"]) == 2


def test_a_run_folder_becomes_a_card(there):
    run = there / "runs/finished"
    card = model_card(gather_facts(run, read_summary(run / "summary.json")))
    assert "test images recognised" in card


def test_the_explorer_takes_a_run_folder(there):
    entry = open_entries("runs/finished")[0]
    assert entry.card.title


def test_options_that_are_gone_are_left_out(cli, there):
    """Every config.yaml of 0.1 has `fault`, which nobody set."""
    outcome = succeeded(cli("fit", "--config=runs/interrupted/config.yaml", "--print_config"))
    assert "\nfault:" not in outcome.out
    assert "batch_size: 8" in outcome.out


def test_training_goes_on_or_says_why_not(cli, there):
    """Not bit for bit: another machine and other versions round differently."""
    outcome = cli("fit", "--resume", "runs/interrupted")
    if outcome.code == 2:
        assert outcome.err.splitlines()[-1].startswith("moevision: ")
        assert "Traceback" not in outcome.err
        return
    assert outcome.code == 0, outcome.err
    assert json.loads((there / "runs/interrupted/summary.json").read_text())["steps"] == 12


def test_a_saved_model_opens_with_timm_alone(old, tested):
    folder = old / "runs/finished/model"
    saved = load_model(str(folder))
    assert saved.class_names == ["cat", "dog"]
    images = np.stack([Image.open(old / "pets" / row["image"]).convert("RGB") for row in tested])
    inputs = normalize(torch.from_numpy(images).permute(0, 3, 1, 2), saved.mean, saved.std)
    with torch.inference_mode():
        logits = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(inputs)
        assert torch.equal(saved.net(inputs), logits)
    probabilities = [float(row["probability"]) for row in tested]
    assert logits.softmax(-1).amax(-1).numpy() == pytest.approx(probabilities, abs=ROUNDED)


def test_a_trace_opens(old):
    trace = RoutingTrace.load(old / "report" / "trace.safetensors")
    summary = json.loads((old / "runs/finished/summary.json").read_text())
    assert len(trace) == summary["test"]["total"]
    for layer in summary["layers"]:
        index = trace.layer(layer["layer"]).expert_index
        assert np.bincount(np.asarray(index).ravel(), minlength=4).tolist() == layer["counts"]
