"""The studies in benchmarks/ run, go on where they stopped, call ties as they say, and tell it in a table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moevision.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run_script(monkeypatch):
    """Run `main` of a script with these arguments, on the thread count that the tests had before."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *arguments):
        script = __import__(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        script.main()
        return script

    yield run
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Noise in two classes, split into train and test as the copy of CIFAR-10 is."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 8)):
        for label in ("one", "other"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                picture = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / split / label / f"{number}.png")
    return folder


def test_router_study_resumes_and_reports(run_script, tmp_path, capsys) -> None:
    out = tmp_path / "routers.json"
    common = ("--out", out, "--steps", 2, "--pets", 128, 64, 64, "--datasets", "synthetic_pets", "--rows")
    run_script("routers", *common, "dense twin", "--seeds", 1)
    first = json.loads(out.read_text())["runs"]
    assert [(run["lr"], run["seed"]) for run in first] == [(1e-3, 0), (2e-3, 0)]
    script = run_script("routers", *common, "dense twin", "vmoe_top_k", "--seeds", 2)
    record = json.loads(out.read_text())
    assert record["runs"][:2] == first  # kept, not trained again
    assert len(record["runs"]) == 2 * 3
    best = max(first, key=lambda run: run["val_top1"])["lr"]
    assert [run["lr"] for run in record["runs"] if run["row"] == "dense twin" and run["seed"] == 1] == [best]
    counts = [sum(layer["counts"]) for run in record["runs"] for layer in run["layers"]]
    assert counts == [64 * 16 * 2] * 2 * 3  # test pictures x patches x K, two layers, three runs
    capsys.readouterr()
    run_script("routers", "--out", out, "--report", "--figure", tmp_path / "routers.png")
    assert "| `vmoe_top_k` |" in capsys.readouterr().out
    assert (tmp_path / "routers.png").stat().st_size > 1000
    with pytest.raises(UserError, match="another steps"):
        run_script("routers", "--out", out, "--steps", 3)
    assert "label" not in script.ROWS


def test_tie_width_is_tukeys(run_script) -> None:
    """Rows and seeds that only add up leave nothing; what is left here has the sum of squares 6 · .01², 4 degrees of
    freedom, and q(0.95; 3 means, 4 degrees of freedom) = 5.04 in printed tables of the studentized range."""
    report = __import__("_router_report")
    left = ((1, -1, 0), (-1, 0, 1), (0, 1, -1))  # rows and columns sum to 0
    rows = []
    for centre, own in zip((0.5, 0.6, 0.7), left, strict=True):
        values = [centre + block + 0.01 * rest for block, rest in zip((0.0, 0.05, -0.1), own, strict=True)]
        rows.append(report.Row("", 1e-3, [{"seed": seed, "test_top1": value} for seed, value in enumerate(values)]))
    assert report.tie_width(rows) == pytest.approx(5.04 * (6 * 0.01**2 / 4 / 3) ** 0.5, rel=2e-3)


def test_upcycling_study(run_script, photos, tmp_path, capsys) -> None:
    out = tmp_path / "upcycling.json"
    common = ("--out", out, "--weights", tmp_path, "--cifar", photos, "--first", 2, "--then", 1, "--pictures", 16)
    run_script("upcycling", *common, "--seeds", 1)
    runs = {run["arm"]: run for run in json.loads(out.read_text())["runs"]}
    assert {arm: run["steps"] for arm, run in runs.items()} == {"dense": 2, "upcycled": 1, "continued": 1, "in one": 3}
    # Both go on from the dense model's last point: an upcycled model computes what it computed.
    ends = [runs["dense"]["curve"][-1], runs["upcycled"]["curve"][0], runs["continued"]["curve"][0]]
    assert len({point["val_top1"] for point in ends}) == 1
    assert runs["upcycled"]["total_parameters"] > 2 * runs["dense"]["total_parameters"]
    run_script("upcycling", "--out", out, "--report", "--figure", tmp_path / "upcycling.png")
    assert "upcycled, m |" in capsys.readouterr().out
    assert (tmp_path / "upcycling.png").stat().st_size > 1000
