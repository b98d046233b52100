"""Cats to one expert, dogs to the other: the supervised loss, the rules, the tables from records, one tiny study."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from benchmarks.cats_and_dogs import report, training
from benchmarks.cats_and_dogs.gates import (
    GATES,
    LEARN,
    SEEDS,
    Job,
    different,
    holds,
    in_own,
    own_experts,
    queue,
    separate,
    to_show,
)
from benchmarks.queue import BEGIN, END, read_records, write_run
from benchmarks.specialization.trunk import Tokens
from moevision.demo import bundled_model
from moevision.models.io import load_model
from moevision.models.upcycle import upcycle
from tests.shared import draw_folder

PROTOCOL = training.PROTOCOL.read_text(encoding="utf-8")


def interval(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def cost(value: float) -> dict[str, Any]:
    return {"log_loss": interval(value), "points": interval(100 * value), "moved": 1.0}


def layer(name: str = "L7", share: Any = ((0.95, 0.05), (0.08, 0.92)), without: float = 0.1, swap: float = 0.5) -> Any:
    """As it stands it separates the classes, and its experts differ; of each class 100 photos."""
    removed = [[round(100 * part) for part in row] for row in share]
    away = {"log_loss": [[0.2, None], [-0.1, 0.4]], "points": [[2.0, None], [-1.0, 4.0]], "removed": removed,
            "own": 0.3, "others": -0.05, "p_value": 0.005}  # fmt: skip
    told = {"guess": 0.6, "bits": interval(0.1)}
    return {
        "name": name, "answers": ["yes", "not shown", "yes"], "share": [list(row) for row in share],
        "load": [sum(row[e] for row in share) / 2 for e in range(len(share[0]))],
        "guess": 0.93, "bits": interval(0.6), "probe": told, "before": [told],
        "clusters": [told, {**told, "guess": 0.8}],
        "swap": {**cost(swap), "without": cost(without), "routes": cost(0.1), "knock_out": away},
        "sent": [{"right": [0.99, 0.2], "log_loss": [0.1, 2.0]}, {"right": [0.3, 0.98], "log_loss": [1.5, 0.1]}],
    }  # fmt: skip


def record(
    gate: str, seed: int, top1: float = 0.95, trunk: str = "pretrained", learn: str = "experts", **more: Any
) -> dict[str, Any]:
    layers = [layer(), layer("L9", ((0.6, 0.4), (0.4, 0.6)))] if GATES[gate].experts else []
    return {
        "name": Job(gate, learn, seed, trunk).name, "gate": gate, "learn": learn, "seed": seed, "trunk": trunk,
        "top1": top1, "layers": layers, "own": {"right": [0.96, 0.94], "log_loss": [0.1, 0.2]}, "images": 200,
        "cpu_s": {"training": 100.0, "asking": 20.0}, "code": {"git_commit": "c", "dirty": False},
        "protocol_sha256": "p", "machine": {"cpu": "a CPU"}, **more,
    }  # fmt: skip


def study(**changed: Any) -> list[dict[str, Any]]:
    """All runs, those of the gates in `changed` with these layers."""
    own = {gate: {"layers": layers} for gate, layers in changed.items()}
    return [record(gate, seed, learn=learn, **own.get(gate, {})) for seed in SEEDS for learn in LEARN for gate in GATES]


MIXED = [layer("L7", swap=0.0), layer("L9", swap=0.0)]


def test_the_protocol_lists_what_the_code_does() -> None:
    assert [gate for gate in GATES if f"`{gate}`" not in PROTOCOL] == []
    assert f"{len(list(queue([])))} runs" in PROTOCOL
    steps = f"{training.EPOCHS} copies of each training photo, batches of {training.BATCH}"
    assert training.OPTIM == {"experts": {"lr": 1e-3}, "blocks": {"lr": 5e-4}}
    for words in (steps, "AdamW 10⁻³ where experts alone learn, 5 · 10⁻⁴ where blocks do", "at least 90 %"):
        assert words in " ".join(PROTOCOL.split()), words


def test_only_one_gate_is_told_the_class() -> None:
    assert [gate for gate, spec in GATES.items() if "label" in spec.aux] == ["class"]
    assert GATES["class"].aux == {"label": 1.0}


def test_experts_belong_to_the_class_that_uses_them_more() -> None:
    four = layer(share=((0.5, 0.1, 0.4, 0.0), (0.0, 0.3, 0.1, 0.6)))
    assert in_own(four) == [pytest.approx(0.9), pytest.approx(0.9)]
    assert own_experts(four) == (0, 3)
    assert in_own(layer(share=((0.05, 0.95), (1.0, 0.0)))) == [0.95, 1.0]
    collapsed = layer(share=((1.0, 0.0), (1.0, 0.0)))
    assert in_own(collapsed) == [1.0, 0.0]
    assert own_experts(collapsed) == (0, 1)
    assert not separate(collapsed)


@pytest.mark.parametrize(
    ("change", "is_separate", "is_different"),
    [
        ({}, True, True),
        ({"share": ((0.89, 0.11), (0.0, 1.0))}, False, True),
        ({"without": 0.005}, True, False),  # the layer contributes nothing that is shown
        ({"swap": 0.0}, True, False),
    ],
)
def test_what_separate_and_different_mean(change: Any, is_separate: bool, is_different: bool) -> None:
    assert (separate(layer(**change)), different(layer(**change))) == (is_separate, is_different)


def test_the_learned_gate_is_shown_if_it_holds_in_every_seed_of_one_layer() -> None:
    runs = study()
    assert holds(runs, "balanced", "blocks")
    assert to_show(runs) == ("balanced", "experts")
    names = [job.name for job in queue(runs)]
    assert names[24:27] == [
        "balanced-experts-bundled-s0", "dense-experts-bundled-s0", "balanced-4-experts-pretrained-s0"
    ]  # fmt: skip
    assert len(set(names)) == 32
    last = next(run for run in runs if run["name"] == "balanced-experts-pretrained-s2")
    last["layers"] = [layer(swap=0.0), layer("L9")]
    assert not holds(runs, "balanced", "experts")
    assert to_show(runs) == ("balanced", "blocks")
    assert to_show(study(balanced=MIXED)) == ("class", "experts")
    last["code"]["dirty"] = True
    assert to_show(runs) is None


def test_the_answer_follows_from_the_records() -> None:
    runs = study()
    verdict, text = report.answer(runs)
    assert verdict == "yes"
    titles = ("learned alone", "learned with balance", "supervised by the class")
    apart = ", ".join(f"{title} 6 of 12" for title in titles)
    said = f"Cats and dogs get experts of their own in so many layers: {apart}"
    assert text == f"{said}; of these, experts are also shown to do different things in 6, 6 and 6"
    assert report.answer(study(alone=MIXED, balanced=MIXED))[0] == report.ONLY_TOLD
    assert report.answer(study(alone=MIXED, balanced=MIXED, **{"class": MIXED}))[0] == report.OPEN
    verdict, text = report.answer(runs[:-5])
    assert verdict == ""
    assert text.startswith(
        "So far (20 of 24 runs): cats and dogs get experts of their own in so many layers: learned alone 5 of 10"
    )


def test_tables_follow_from_the_records(tmp_path: Any) -> None:
    """A class's loss without an expert: per choice, times the share of the class that chose it."""
    assert report.without(layer(), "log_loss") == [[0.2 * 0.95, 0], [pytest.approx(-0.1 * 0.08), 0.4 * 0.92]]
    runs = study()
    for run in runs:
        run["top1"] = 0.9 + 0.01 * run["seed"] + 0.02 * (run["gate"] == "class")
    runs.append(record("balanced", 0, trunk="bundled"))
    text = "\n".join(report.parts_of(runs))
    alone = "| experts alone | supervised by the class |"
    assert f"{alone} 3 | 93.0 ± 1.0 | 92.0, 93.0, 94.0 | +2.0 (+2.0 to +2.0) | above |" in text
    shares = "95 / 92, 95 / 92, 95 / 92"
    assert f"{alone} L7 | {shares} | 52 | 93.0 | 60.0 | 80.0 | 3 of 3 | yes 3 | not shown 3 |" in text
    assert "| 0.100 (10.0) | 0.190 (1.9) | 0.000 (0.0) | −0.008 (−0.1) | 0.368 (3.7) | 0.500 (50.0) |" in text
    assert f"{alone} L7 | 96 / 94 | 99 / 20 | 30 / 98 |" in text
    assert "### In the explorer's network" in text
    report.draw(runs, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 10_000
    assert report.parts_of([]) == ["Not run."]


@pytest.mark.parametrize(("learn", "parts"), [("experts", r"mlp\."), ("blocks", "")])
@pytest.mark.parametrize("experts", [0, 2])
def test_only_what_shall_learn_is_trained(small: None, learn: str, parts: str, experts: int) -> None:
    """Experts, or where there are none the MLPs; or whole blocks with the last norm; and the classifier."""
    tokens = Tokens(torch.randn(16, 5, 64, dtype=torch.bfloat16), torch.arange(16) % 2)
    net = training.new_dense(Job("dense", learn, 0), None)
    if experts:
        net = upcycle(net, layers=training.LAYERS, num_experts=experts, router="vmoe_top_k", route_by="image")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    training.fit(net, tokens, GATES["class" if experts else "dense"], learn, 0)
    moved = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    places = "|".join(map(str, training.LAYERS))
    wanted = rf"(blocks\.({places})\.{parts}|head\." + ("" if parts else r"|norm\.|fc_norm\.") + ")"
    assert moved == {name for name in before if re.match(wanted, name)}


@pytest.mark.needs("photos")
def test_the_trunk_of_the_shown_model_is_the_explorers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=training.SIDE, depth=10)
    monkeypatch.setattr(training, "create_from", lambda *_, **__: pretrained)
    net = training.new_dense(Job("class", "experts", 0, "bundled"), Namespace(pretrained=None))
    given, own = bundled_model("cats_vs_dogs").net.state_dict(), net.state_dict()
    still = {name for name in own if not training.learns(name, "experts")}
    assert still == {name for name in given if not training.learns(name, "experts")}
    assert all(own[name].equal(given[name]) for name in still)


def test_a_photo_is_computed_once_by_an_expert_and_once_without() -> None:
    """Silenced experts, ~0 and ~1, both leave the residual alone."""
    asked = []

    def run(place: int, images: Any, experts: Any) -> Any:
        asked.extend(zip(images.tolist(), experts[:, 0, 0].tolist(), strict=True))
        return np.stack([10.0 * images, experts[:, 0, 0].clip(-1)], 1)

    again = training.remembered(run)
    for _ in range(2):
        experts = np.array([0, 1, ~0, ~1, 1]).reshape(-1, 1, 1)
        found = again(0, np.array([4, 4, 4, 4, 5]), experts)
        assert found.tolist() == [[40, 0], [40, 1], [40, -1], [40, -1], [50, 1]]
    assert sorted(asked) == [(4, ~1), (4, 0), (4, 1), (5, 1)]
    again(1, np.array([4]), np.zeros((1, 1, 1), int))
    assert len(asked) == 5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn images of 32 px, the test ViT of four blocks, two of which learn; one epoch."""

    def new_dense(job: Job, options: Any) -> torch.nn.Module:
        torch.manual_seed(job.seed)
        return timm.create_model("test_vit", num_classes=training.CLASSES, img_size=32, global_pool="avg").eval()

    depth = len(new_dense(Job("dense", "experts", 0), None).blocks)
    values = {"new_dense": new_dense, "SIDE": 32, "FIRST": depth - 2, "DEPTH": depth, "LAYERS": [depth - 2, depth - 1],
              "EPOCHS": 1, "BATCH": 8, "PRECISION": "fp32"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(training, name, value)


def test_a_tiny_study_from_end_to_end(bench: Any, small: None, tmp_path: Any) -> None:
    out, readme = tmp_path / "runs.jsonl", tmp_path / "README.md"
    photos = draw_folder(tmp_path / "photos", per_class=60)
    common = ("cats-and-dogs", "run", "--cats", photos, "--pretrained", "none", "--out", out)
    outcome = bench(*common, "--work", tmp_path / "work", "--allow-dirty", "--limit", 4)
    assert outcome.code == 0, outcome.err
    dense, alone, *_, by_class = records = read_records(out)
    assert [run["gate"] for run in records] == ["dense", "alone", "balanced", "class"]
    assert dense["layers"] == []
    for run in records:
        right = [a == b for a, b in zip(run["labels"], run["predicted"], strict=True)]
        assert run["top1"] == pytest.approx(np.mean(right))
        assert run["images"] == len(right)
        for found in run["layers"]:
            by_label = [[found["routes"][i] == str(e) for i in range(len(right)) if run["labels"][i] == str(c)]
                        for c in range(2) for e in range(2)]  # fmt: skip
            assert np.ravel(found["share"]) == pytest.approx([np.mean(each) for each in by_label], abs=1e-4)
            assert np.shape([each["right"] for each in found["sent"]]) == (2, 2)
    assert len(alone["layers"]) == len(by_class["layers"]) == 2
    assert str(tmp_path) not in json.dumps(records)
    out.unlink()
    for run in records:  # as if they came from a committed tree
        write_run(out, run["name"], {**run, "code": {"git_commit": "c", "dirty": False}})
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    assert bench("cats-and-dogs", "report", "--out", out, "--readme", readme).code == 0
    assert "So far (4 of 24 runs)" in readme.read_text()
    assert readme.with_name("gates.png").exists()


def test_what_is_to_be_shown_is_saved_as_a_run(bench: Any, small: None, tmp_path: Any, monkeypatch: Any) -> None:
    """Before and after its training; as loaded again it answers as recorded."""
    jobs = [Job(gate, "experts", 0, "bundled") for gate in ("class", "dense")]
    monkeypatch.setattr("benchmarks.cats_and_dogs.queue", lambda records: jobs)
    photos, out = draw_folder(tmp_path / "photos", per_class=60), tmp_path / "runs.jsonl"
    common = ("--cats", photos, "--pretrained", "none", "--out", out, "--work", tmp_path)
    outcome = bench("cats-and-dogs", "run", *common, "--allow-dirty", "--limit", 0)
    assert outcome.code == 0, outcome.err
    for job, run in zip(jobs, read_records(out), strict=True):
        home = tmp_path / job.name
        model, start = (load_model(str(home / name)) for name in ("model", "start"))
        assert model.class_names == ["cat", "dog"]
        test = load_file(tmp_path / "tokens-bundled-test.safetensors")["tokens"]
        predicted = training.logits_of(model.net, test).argmax(1)
        assert "".join(map(str, predicted)) == run["predicted"]
        assert not torch.equal(start.net.head.weight, model.net.head.weight)
        assert json.loads((home / "provenance.json").read_text())["seed"] == 0
