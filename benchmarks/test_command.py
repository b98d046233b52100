"""`python -m benchmarks`: what it records can be computed again, and what others break is reported."""

import json
import statistics
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import nn

from benchmarks import layer as layer_module
from benchmarks.__main__ import VERBS
from benchmarks.layer import peers
from benchmarks.layer.peers import PEERS, build_peer
from moevision.errors import UserError

KINDS = ("layer", "train", "infer")
TRAINING = """
data: {path: synthetic_pets, image_size: 32, batch_size: 8, train_size: 64, val_size: 8, test_size: 8}
model:
  arch: {name: test_vit_moe, router: vmoe_top_k}
  aux: {importance: 0.05}
trainer: {max_epochs: 1}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TRAINING)
    return path


@pytest.fixture(scope="module")
def records(bench, config, tiny_run, tmp_path_factory, forked_processes):
    """Record of one quick run of each kind."""
    out = tmp_path_factory.mktemp("benchmark")
    calls = {
        "layer": ("--router", "vmoe_top_k", "noisy_top_k"),
        "train": (config,),
        "infer": (tiny_run,),
    }
    for kind, options in calls.items():
        outcome = bench(kind, *options, "--quick", "--out", out)
        assert outcome.code == 0, outcome.err
        assert "torch" in outcome.out
    assert (out / "benchmark-layer.png").stat().st_size > 5000
    return {kind: json.loads((out / f"benchmark-{kind}.json").read_text()) for kind in KINDS}


def tables_of(record):
    """Every list of rows in a record, those that have times."""
    parts = [record, *record.get("comparisons", ())]
    for rows in [rows for part in parts for rows in part.values() if isinstance(rows, list)]:
        if timed := [row for row in rows if isinstance(row, dict) and "seconds" in row]:
            yield timed


close = partial(pytest.approx, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_says_where_it_comes_from(records, kind):
    record = records[kind]
    assert (record["benchmark"], record["format"]) == (kind, 1)
    assert record["command"].startswith(f"python -m benchmarks {kind} ")
    assert set(record["code"] or ()) <= {"git_commit", "dirty"}  # none: installed from a wheel
    machine = {"cpu", "usable_cores", "torch_threads", "memory_gib", "gpus", "device"}
    assert machine <= set(record["machine"])
    assert {"moevision", "python", "torch", "timm"} <= set(record["versions"])
    assert record["cuda"] in ("measured", "not measured: no CUDA device")


@pytest.mark.parametrize("kind", KINDS)
def test_ratios_follow_from_the_recorded_times(records, kind):
    """Pair by pair, then the median: by the standard library from `seconds` alone."""
    tables = list(tables_of(records[kind]))
    assert tables
    for rows in tables:
        seconds = {row["name"]: row["seconds"] for row in rows}
        for row in rows:
            own = row["seconds"]
            assert row["time_ms"]["n"] == len(own) >= 3
            assert row["time_ms"]["median"] == close(1e3 * statistics.median(own))
            assert row["ratio_to"]
            for other, ratio in row["ratio_to"].items():
                pairs = [mine / its for mine, its in zip(own, seconds[other], strict=True)]
                assert ratio["median"] == close(statistics.median(pairs))
                assert ratio["quartile_1"] <= ratio["median"] <= ratio["quartile_3"]
                speed = statistics.median(1 / pair for pair in pairs)
                assert row["speed_to"][other]["median"] == close(speed)


def test_layer_names_what_it_compared(records):
    """FLOPs of two matrix products of [T, D] and [D, k H], forward and twice in the backward pass."""
    record = records["layer"]
    (comparison,) = record["comparisons"]
    sizes = {"tokens": 128, "width": 32, "experts": 4, "top_k": 2, "hidden": 64}
    assert sizes.items() <= comparison.items()
    assert comparison["flops"] == 3 * 2 * (2 * 128 * 32 * (2 * 64))
    rows = {row["name"]: row for row in comparison["rows"]}
    assert rows["dense k·H"]["parameters"] == 32 * 128 + 128 + 128 * 32 + 32
    ours = rows["moevision vmoe_top_k"]
    assert ours["parameters"] == 4 * (32 * 64 + 64 + 64 * 32 + 32) + 4 * 32  # and the router
    assert ours["slowest_over_mean"] >= 1
    rate = comparison["flops"] / (ours["time_ms"]["median"] / 1e3)
    assert ours["active_flops_per_s"] == close(rate)
    assert ours["mfu"] == close(rate / record["measured_peak_flops"]["bf16"])
    assert set(PEERS) <= set(rows)  # measured, or with the reason why not


def test_train_accounts_for_the_whole_step(records):
    record = records["train"]
    for part in record["breakdown"].values():
        phases = part["phases"].values()
        assert sum(phase["ms"] for phase in phases) == close(part["step_ms"])
        assert sum(phase["share"] for phase in phases) == close(1)
    moe, twin, large = (set(part["phases"]) for part in record["breakdown"].values())
    assert {"router", "dispatch and combine", "experts"} <= moe
    assert not {"router", "experts"} & (twin | large)
    assert "attention" in twin


def test_train_tells_speed_and_load(records):
    record = records["train"]
    peak = record["measured_peak_flops"][record["settings"]["precision"]]
    for row in record["rows"]:
        assert row["images_per_s"] == close(4e3 / row["time_ms"]["median"])
        assert row["mfu"] == close(row["images_per_s"] * row["training_flops_per_image"] / peak)
    moe, twin, large = record["rows"]
    assert twin["parameters"] < moe["parameters"]
    assert twin["training_flops_per_image"] < large["training_flops_per_image"]
    assert [layer["block"] for layer in record["load"]] == [1, 3]
    for layer in record["load"]:
        counts = layer["counts"]
        assert sum(counts) == 4 * 16 * 2  # images x patches x k
        assert layer["slowest_over_mean"] == close(max(counts) / (sum(counts) / 4))


def test_train_explains_memory(records):
    """Weights and moments are float32: twice as many bytes of moments as of weights, and as many of gradients."""
    memory = records["train"]["memory"]
    sizes = {row["name"]: 4 * row["parameters"] / 2**20 for row in records["train"]["rows"]}
    for name, model in memory["models"].items():
        mib = {key.removesuffix("_mib"): value for key, value in model.items()}
        parts = ("weights", "gradients", "optimizer", "activations", "other")
        assert sum(mib[part] for part in parts) == pytest.approx(mib["peak"], rel=1e-3)
        assert mib["gradients"] == pytest.approx(sizes[name], rel=1e-3)
        assert mib["weights"] >= mib["gradients"] * (1 - 1e-4)  # and buffers
        assert mib["optimizer"] == pytest.approx(2 * mib["gradients"], rel=1e-2)  # and counters
        assert mib["activations"] > 0
        least = mib["weights"] + mib["optimizer"] + mib["activations"]
        assert least < mib["tensors"] < mib["peak"] + mib["activations"]
    moe, twin, _ = memory["models"].values()
    extra = sum(moe[f"{part}_mib"] - twin[f"{part}_mib"] for part in ("weights", "optimizer"))
    beside, peak = memory["moe_beside"]["dense twin, same active FLOPs"], twin["peak_mib"]
    assert beside["whole"] == close(moe["peak_mib"] / peak)
    assert beside["beyond_extra_weights_and_optimizer"] == close((moe["peak_mib"] - extra) / peak)


def test_infer_tells_latency(records):
    comparisons = records["infer"]["comparisons"]
    cases = [(each["batch_size"], each["precision"]) for each in comparisons]
    assert cases == [(batch, precision) for batch in (1, 2) for precision in ("fp32", "bf16")]
    for comparison in comparisons:
        assert len(comparison["rows"]) == 3
        for row in comparison["rows"]:
            p50, p95 = row["latency_ms"]["p50"], row["latency_ms"]["p95"]
            assert p50 == close(row["time_ms"]["median"])
            assert p50 <= p95 <= 1e3 * max(row["seconds"]) * 1.0001
            rate = 1e3 * comparison["batch_size"] / p50
            assert row["images_per_s"] == pytest.approx(rate, rel=1e-3)


def test_every_verb_is_there(bench):
    text = bench("--help").out
    assert all(
        f"  {name} " in text and find_spec(f"benchmarks.{module}")
        for name, (_, module) in VERBS.items()
    )
    assert bench("nothing").code == 2


def test_it_runs_from_a_checkout_without_anything_installed_for_it():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert "python -m benchmarks VERB" in done.stdout


class BrokenPeer(nn.Module):
    """A peer that fails when it runs."""

    def forward(self, x):
        raise RuntimeError("no such kernel")


def broken_build(name, router, **sizes):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("build", [broken_build, lambda name, router, **sizes: BrokenPeer()])
def test_a_broken_peer_is_reported_and_the_rest_goes_on(bench, tmp_path, monkeypatch, build):
    monkeypatch.setattr(layer_module, "build_peer", build)
    outcome = bench("layer", "--quick", "--no-peak", "--peers", "torchtitan", "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "torchtitan: RuntimeError: no such kernel" in outcome.out
    rows = json.loads((tmp_path / "benchmark-layer.json").read_text())["comparisons"][0]["rows"]
    assert [row["name"] for row in rows if "error" in row] == ["torchtitan"]
    assert len([row for row in rows if "seconds" in row]) == 2


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(peers, "package_version", lambda name: None)
    sizes = ("width", "hidden", "num_experts", "top_k", "dtype", "device")
    with pytest.raises(UserError, match="transformers is not installed"):
        build_peer("mixtral eager", None, **dict.fromkeys(sizes))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("layer", "--top-k", 9), ("top_k=9", "num_experts=8")),
        (("train", "cifar"), ("'cifar'", "cifar10")),
        (("infer", "nowhere"), ("'nowhere'",)),
    ],
)
def test_mistakes_are_one_sentence(bench, arguments, words, tmp_path):
    outcome = bench(*arguments, "--no-peak", "--out", tmp_path / "o")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err
    assert not (tmp_path / "o").exists()
