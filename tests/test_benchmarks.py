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


@pytest.fixture
def small_saving(run_script, monkeypatch):
    """The script of the saving study on a model of width 32 and two classes."""
    script = __import__("saving")
    recipe = script.recipe()
    recipe["arch"] |= {"embed_dim": 32, "depth": 2, "num_heads": 1, "num_experts": 4}
    monkeypatch.setattr(script, "recipe", lambda: recipe)
    monkeypatch.setattr(script, "CLASSES", 2)
    return script


def test_saving_study_measures_resumes_and_reports(run_script, small_saving, photos, tmp_path, capsys) -> None:
    out = tmp_path / "saving.json"
    common = ("--out", out, "--cifar", photos)
    with pytest.raises(UserError, match="--stage speed"):
        run_script("saving", *common, "--stage", "train")
    run_script("saving", *common, "--stage", "speed", "--rounds", 2)
    (speed,) = json.loads(out.read_text())["speed"]
    budget_ms = 12 * speed["train"]["MoE"]["cpu_ms"][1]
    common += ("--budget-s", budget_ms / 1000)
    assert speed["train"]["MoE"]["cpu_ratio"] == [1.0, 1.0, 1.0]
    assert min(arm["wall_ms"][0] for phase in ("train", "infer") for arm in speed[phase].values()) > 0
    run_script("saving", *common, "--stage", "train", "--seeds", 1)
    first = json.loads(out.read_text())
    # Every arm gets the steps that fit into the budget, and half the patches dropped is tried at both counts.
    steps = {arm: round(budget_ms / speed["train"][arm]["cpu_ms"][1]) for arm in small_saving.ARMS}
    assert first["budget"]["steps"] == steps
    trained = [(run["arm"], run["steps"]) for run in first["runs"]]
    assert trained[:3] == [(arm, steps[arm]) for arm in ("MoE", "dense, equal FLOPs", "dense, equal parameters")]
    assert {("patch drop 50 %", steps["MoE"]), ("patch drop 50 %", steps["patch drop 50 %"])} <= set(trained)
    counts = [sum(layer["counts"]) for layer in first["runs"][0]["layers"]]
    assert counts == [16 * 64 * 2]  # test pictures x patches x K in the one MoE layer
    run_script("saving", *common, "--stage", "speed", "--rounds", 2)
    run_script("saving", *common, "--stage", "train", "--seeds", 2)
    record = json.loads(out.read_text())
    assert record["runs"][: len(trained)] == first["runs"]  # kept, not trained again
    assert record["budget"] == first["budget"]  # a later measurement moves no steps
    assert len(record["speed"]) == 2
    with pytest.raises(UserError, match="holds trainings of"):
        run_script("saving", *common, "--budget-s", budget_ms, "--stage", "train")
    capsys.readouterr()
    run_script("saving", "--out", out, "--stage", "report", "--figures", tmp_path)
    text = capsys.readouterr().out
    assert "“MoE” minus “dense, equal parameters”" in text
    assert "| 0* |" in text
    assert "| 1 |" in text
    assert min((tmp_path / name).stat().st_size for name in ("saving.png", "levers.png")) > 1000


def test_saving_report_states_what_the_record_says(run_script) -> None:
    """Three arms whose accuracies are means of rows and seeds plus the residuals of `test_tie_width_is_tukeys`."""
    report = __import__("_saving_report")
    left = ((1, -1, 0), (-1, 0, 1), (0, 1, -1))
    runs = [
        {"arm": arm, "steps": steps, "seed": seed, "test_top1": centre + block + 0.01 * left[row][seed]}
        for row, (arm, steps, centre) in enumerate(zip(report.SAVING, (9, 8, 7), (0.7, 0.69, 0.5), strict=True))
        for seed, block in enumerate((0.0, 0.05, -0.1))
    ]
    runs.append({"arm": "MoE", "steps": 5, "seed": 0, "test_top1": 0.0})  # of another budget: left out
    steps = dict(zip(report.SAVING, (9, 8, 7), strict=True))
    rows = report.equal_time({"runs": runs, "budget": {"steps": steps}}, report.SAVING)
    half = 100 * 5.04 * (6 * 0.01**2 / 4 / 3) ** 0.5  # 3.56 points
    tie, _, below = report.differences(rows)
    assert f"mean +1.0 (−{half - 1:.1f} to +{1 + half:.1f}): a tie" in tie
    assert "by seed, mean +19.0" in below
    assert "above" in below


def test_memory_of_an_arm_is_measured_in_its_own_process(run_script) -> None:
    """Training must at least hold the weights, their gradients and AdamW's two moments: 16 bytes per parameter."""
    measure = __import__("_saving_measure")
    found = measure.measure_memory(["MoE"], 1)["MoE"]
    parameters = sum(p.numel() for p in __import__("saving").build("MoE", 0).net.parameters())
    assert found["peak_mib"][0] - found["before_mib"][0] > 12 * parameters / 2**20  # the weights were there before


@pytest.mark.slow
def test_accumulation_is_measured_in_one_and_two_processes(run_script, tmp_path) -> None:
    """Exact at once, and for z in parts."""
    out = tmp_path / "accumulation.json"
    run_script("accumulation", "--images", 32, "--draws", 1, "--out", out)
    exact = [row for row in json.loads(out.read_text())["rows"] if row["parts"] == 1 or row["loss"] == "z"]
    assert [row["projection"] for row in exact] == pytest.approx([1] * len(exact))
    assert [row["cosine"] for row in exact] == pytest.approx([1] * len(exact))


def test_accumulation_page_has_the_lines_of_its_record(monkeypatch) -> None:
    """No mean leaves .9 to 1.1; with 256 images no draw leaves .92 to 1.08."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    record = json.loads((BENCHMARKS / "accumulation.json").read_text(encoding="utf-8"))
    assert not record["provenance"]["code"]["dirty"]
    rows = record["rows"]
    assert all(0.9 < row["projection"] < 1.1 for row in rows)
    assert round(min(row["least"] for row in rows if row["images"] == 256), 2) == 0.92
    assert round(max(row["most"] for row in rows if row["images"] == 256), 2) == 1.08
    page = (BENCHMARKS.parent / "docs" / "concepts.md").read_text(encoding="utf-8").splitlines()
    shown = [line for line in page if " pets | " in line or " noise | " in line]
    assert len(shown) == 9
    assert set(shown) <= set(__import__("accumulation").table(rows).splitlines())
