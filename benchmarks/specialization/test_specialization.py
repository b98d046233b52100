"""The specialization study: its rule, the matching of experts, and one tiny run of the whole of it."""

import json
from argparse import Namespace
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import cohen_kappa_score

from benchmarks.queue import BEGIN, END, read_records, write_run
from benchmarks.specialization import report, training, trunk
from benchmarks.specialization.arms import ARMS, CLASS, CONFIRMING_SEEDS, DATA_SETS, SEEDS, queue
from benchmarks.specialization.rule import (
    CHOOSING,
    CONDITIONS,
    chosen,
    cohen_kappa,
    confirmation,
    failures,
    pair_counts,
    settings_of,
)
from moevision.layers import ROUTERS
from moevision.models.convert import pool_patches

PROTOCOL = training.PROTOCOL.read_text(encoding="utf-8")


def interval(value, half=0.01):
    return {"value": value, "low": value - half, "high": value + half}


def layer(name="L11", guess=0.9, load=(0.3, 0.25, 0.25, 0.2), bits=0.5, before=0.2, swap=5.0):
    """What a record says of a layer; as it stands it keeps the rule."""

    def reading(unit, of):
        return {"unit": unit, "guess": interval(guess), "chance": 0.5, "bits": interval(of)}

    words = ("yes", "yes" if bits > before else "not shown", "yes" if swap > 1 else "not shown")
    return {
        "name": name, "answers": [{"answer": word} for word in words], "readings": [reading("patch", bits)],
        "load": {"share": list(load), "max_over_mean": len(load) * max(load), "effective_experts": 3.9,
                 "class_share": [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]},
        "probe": reading("patch", 0.9), "controls": {"before": [reading("patch", before)],
                                                    "clusters": [reading("patch", 0.3)]},
        "same": {"before": [reading("patch", bits)]},
        "swap": {"points": interval(swap, 1.0), "random": interval(1.0, 1.0), "more": interval(swap - 1.0, 1.0)},
    }  # fmt: skip


def record(arm, seed, split="val", layers=None, **more):
    """A run on photos, as much of it as the report reads."""
    routes = ["".join(map(str, row)) for row in np.random.default_rng(0).integers(0, 4, (8, 64))]
    layers = layers or [layer("L9", guess=0.6), layer()]
    return {
        "data": CHOOSING, "arm": arm, "seed": seed, "split": split, "answers": {CLASS: layers},
        "classes": {CLASS: ["cat", "dog"]},
        "routes": [routes] * len(layers), "images": 512, "experts": 4, "top1": 0.95, "top1_before": 0.94,
        "trunk": {"sha256": "t"}, "cpu_s": {"training": 60.0, "asking": 20.0}, "code": {"dirty": False},
        "protocol_sha256": "p", "machine": {"cpu": "a CPU"}, **more,
    }  # fmt: skip


def study(**worse):
    """All runs on validation photos, those of an arm by the name of `worse` with another last layer."""
    poor = [layer("L9", guess=0.6), layer(guess=0.55)]
    return [
        record(arm, seed, layers=[layer("L9", guess=0.6), worse[arm]] if arm in worse else poor)
        for arm in DATA_SETS[CHOOSING].arms
        for seed in SEEDS
    ]


def test_the_protocol_lists_what_the_code_does() -> None:
    assert [arm for arm in ARMS if f"`{arm}`" not in PROTOCOL] == []
    assert [name for name in DATA_SETS if f"`{name}`" not in PROTOCOL] == []
    flat = " ".join(PROTOCOL.split())
    assert [name for name in CONDITIONS if name not in flat] == []
    assert [text for text in report.OUTCOMES.values() if text not in flat] == []
    runs = list(queue({}))
    assert f"{len(runs)} runs" in PROTOCOL
    assert len({run.name for run in runs}) == len(runs)
    seconds = sum(run.seconds for run in runs) + sum(
        spec.trunk_s * (len(SEEDS) if spec.trunk_seeds else 1) for spec in DATA_SETS.values()
    )
    assert f"{seconds:,} CPU seconds" in PROTOCOL
    assert {arm.router for arm in ARMS.values()} <= set(ROUTERS)
    assert {(arm.unit, arm.layers) for arm in ARMS.values()} == {
        (unit, layers) for unit in ("token", "image") for layers in ("last2", "every2")
    }
    vehicle = DATA_SETS["cifar10"].units["animal or vehicle"]
    assert sorted(name for group in vehicle.values() for name in group) == [
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "condition"),
    [
        ({"load": (0.4, 0.2, 0.2, 0.2)}, "max/mean"),
        ({"load": (0.34, 0.32, 0.3, 0.04)}, "no expert below"),
        ({"guess": 0.7}, "guessed right"),
        ({"before": 0.49}, "before training"),  # intervals overlap
        ({"swap": 0.5}, "the swap"),
    ],
)
def test_the_rule_wants_every_condition_in_every_seed(change, condition) -> None:
    good = settings_of([record("switch-image", seed) for seed in SEEDS], CHOOSING, CLASS)[1]
    assert failures(good) == []
    runs = [record("switch-image", seed) for seed in SEEDS[:-1]]
    runs.append(record("switch-image", SEEDS[-1], layers=[layer("L9"), layer(**change)]))
    (failed,) = failures(settings_of(runs, CHOOSING, CLASS)[1])
    assert condition in failed


def test_the_rule_chooses_by_the_worst_seed_and_only_when_all_runs_are_there() -> None:
    records = study(**{"switch-image": layer(guess=0.8), "vmoe_top_k-token": layer(guess=0.9)})
    records[-1]["answers"][CLASS][1] = layer(guess=0.55)
    setting = chosen(records)
    assert (setting.arm, setting.layer) == ("vmoe_top_k-token", "L11")
    assert chosen(records[:-1]) is None  # one run is missing
    for run in records:
        if run["arm"] == "vmoe_top_k-token" and run["seed"] == SEEDS[1]:
            run["answers"][CLASS][1] = layer(guess=0.76)
    assert chosen(records).arm == "switch-image"
    dirty = study(**{"switch-image": layer()})
    dirty[0]["code"] = {"dirty": True}
    assert chosen(dirty) is None


def test_one_failing_seed_of_every_setting_decides_without_the_others() -> None:
    records = [run for run in study(**{"switch-image": layer()}) if run["seed"] == SEEDS[0]]
    assert report.wanted(records) == [report.OUTCOMES["open"]]  # one setting may still keep the rule
    records = [run for run in study() if run["seed"] == SEEDS[0]]
    assert report.wanted(records)[0] == report.OUTCOMES["none"].format(count=24)
    assert report.wanted(records[1:]) == [report.OUTCOMES["open"]]  # nobody knows about the missing arm


def test_what_is_chosen_is_confirmed_by_new_seeds_on_other_photos() -> None:
    records = study(**{"switch-image": layer()})
    setting = chosen(records)
    runs = [job for job in queue({CHOOSING: setting.arm}) if job.split == "test" and job.data == CHOOSING]
    assert [(job.arm, job.seed) for job in runs] == [("switch-image", seed) for seed in CONFIRMING_SEEDS]
    assert not set(CONFIRMING_SEEDS) & set(SEEDS)
    assert report.OUTCOMES["chosen"].format(name=setting.name) in report.wanted(records)
    again = [record("switch-image", seed, "test") for seed in CONFIRMING_SEEDS]
    assert confirmation([*records, *again[:-1]], setting) is None
    assert report.wanted([*records, *again])[0] == report.OUTCOMES["confirmed"].format(name=setting.name)
    again[0]["answers"][CLASS][1] = layer(swap=0.0)
    assert (
        "not confirmed by new trainings on other photos (the swap costs accuracy)"
        in (report.wanted([*records, *again])[0])
    )


def test_no_setting_is_an_outcome_too() -> None:
    sentence, table = report.wanted(study(**{"switch-image": layer(swap=0.0)}))
    assert sentence == report.OUTCOMES["none"].format(count=24)
    assert "| the swap costs accuracy | 23 of 24 | `switch-image, L11` |" in table


def test_kappa_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(5, size=400)
    b = np.where(rng.random(400) < 0.6, a, rng.integers(5, size=400))
    assert cohen_kappa(pair_counts(a, b, 5)) == pytest.approx(cohen_kappa_score(a, b))
    assert cohen_kappa(np.array([[7, 0], [0, 0]])) == 0  # both always say the same: nothing to agree beyond
    assert cohen_kappa(np.diag([3, 4])) == 1


def test_experts_are_matched_whatever_their_numbers() -> None:
    """Seed 1 has the experts of seed 0 under other numbers; seed 2 chooses on its own."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, (40, 16))
    renamed = np.array([2, 0, 3, 1])[first]
    runs = [record("switch-token", seed) for seed in SEEDS]
    for run, choices in zip(runs, (first, renamed, rng.integers(0, 4, (40, 16))), strict=True):
        run["routes"] = [["".join(map(str, image)) for image in choices.tolist()]] * 2
    same, alone = (settings_of(chosen, CHOOSING, CLASS)[0] for chosen in (runs[:2], runs[1:]))
    assert same.kappa == pytest.approx(1)
    assert abs(alone.kappa) < 0.1
    assert settings_of(runs, CHOOSING, CLASS)[0].kappa == pytest.approx((same.kappa + 2 * alone.kappa) / 3, abs=0.1)


def test_an_answer_is_the_weakest_of_any_seed() -> None:
    runs = [record("switch-token", seed) for seed in SEEDS]
    assert [settings_of(runs, CHOOSING, CLASS)[1].answer(question) for question in range(3)] == ["yes"] * 3
    runs[1]["answers"][CLASS][1]["answers"][1] = {"answer": "a little"}
    assert settings_of(runs, CHOOSING, CLASS)[1].answer(1) == "a little"


@pytest.fixture
def small(monkeypatch):
    """Four steps on 16 px tokens of drawn images, a trunk of depth 4."""
    spec = replace(
        DATA_SETS["pets"], experts=4, depth=4, trunk_steps=4, batch=8, images=32, asked=("test", 32), trunk_seeds=False
    )
    monkeypatch.setitem(DATA_SETS, "pets", spec)
    monkeypatch.setattr(trunk, "HYBRID", {"name": "test_vit_moe", "top_k": 1, "twin": "active_flops"})
    monkeypatch.setattr(training, "SWAP_IMAGES", 16)
    return spec


@pytest.mark.parametrize("name", ["test_vit_moe", "vit_moe"])
def test_the_last_blocks_go_on_where_the_first_ones_stopped(name) -> None:
    """With a class token, whose patches are pooled, and without; and only they learn."""
    base = {"base": "test_vit", "img_size": 32, "num_classes": 3} if name == "vit_moe" else {"num_classes": 3}
    net = pool_patches(timm.create_model(name, **base)).eval()
    torch.nn.init.normal_(net.head.weight)
    images, last = torch.randn(2, 3, 32, 32), len(net.blocks) - 1
    tail = trunk.Tail(net, last).eval()
    torch.testing.assert_close(tail(trunk.before(net, last, images)), net(images))
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert learning == {
        name for name, _ in net.named_parameters() if name.startswith((f"blocks.{last}.", "norm.", "fc_norm.", "head."))
    }


def test_an_arm_sees_what_its_trunk_would_have_seen_next(small) -> None:
    data = trunk.open_images("pets", Namespace())
    batches = data.train_batches()
    whole = list(islice(trunk.training_batches(data), batches + 2))
    rest = list(islice(trunk.training_batches(data, small.trunk_steps), batches + 2 - small.trunk_steps))
    for one, other in zip(whole[small.trunk_steps :], rest, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["index"], other["index"])
    indices = torch.cat([batch["index"] for batch in whole[:batches]])
    assert len(indices.unique()) == len(indices)  # a pass sees every image once
    assert not torch.equal(whole[batches]["image"], whole[0]["image"])  # the next one in another order


def test_a_tiny_study_from_end_to_end(bench, small, tmp_path) -> None:
    out, work, readme = tmp_path / "runs.jsonl", tmp_path / "work", tmp_path / "README.md"
    common = ("specialization", "run", "--only", "pets", "--work", work, "--out", out)
    assert "about" in bench(*common, "--list").out
    outcome = bench(*common, "--allow-dirty", "--limit", 2)
    assert outcome.code == 0, outcome.err
    names = [job.name for job in queue({}, ["pets"])][:2]
    token, image = records = read_records(out)
    assert [record["name"] for record in records] == names
    assert (token["steps"], token["images"], len(token["routes"])) == (4, 32, 2)
    assert [found["name"] for found in token["answers"][CLASS]] == ["L1", "L3"]
    assert set(token["answers"][CLASS][0]["controls"]) == {"before", "clusters"}
    assert token["answers"][CLASS][0]["swap"]["n_images"] > 0
    assert (len(token["routes"][0][0]), len(image["routes"][0][0])) == (16, 1)
    assert token["top1_before"] == image["top1_before"] == token["trunk"]["top1"]  # upcycling changes nothing
    assert str(tmp_path) not in json.dumps(token)
    out.unlink()
    for record in records:  # as if they came from a committed tree
        write_run(out, record["name"], {**record, "code": {"dirty": False}})
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    assert bench("specialization", "report", "--out", out, "--readme", readme).code == 0
    assert "| `vmoe_top_k-token`, L3 | 1 |" in readme.read_text()
    assert readme.read_text().endswith("after\n")
    assert f"| {names[0]} |" not in bench(*common, "--list").out
