"""Experts trained apart and joined: routers, replay, what an added domain leaves alone, the rule, one tiny study."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import timm
import torch

from benchmarks.modular import domains, report, training
from benchmarks.modular.domains import DOMAINS, SETS, SOURCES, Images, Job, images_of, owners, queue, summary
from benchmarks.queue import BEGIN, END, read_records, write_run
from moevision.data import SyntheticPets
from tests.shared import draw_folder

PROTOCOL = " ".join(training.PROTOCOL.read_text(encoding="utf-8").split())


def test_the_protocol_lists_what_the_code_does() -> None:
    assert [name for name in (*SETS, *DOMAINS) if name not in PROTOCOL] == []
    assert f"{len(list(queue()))} runs" in PROTOCOL
    steps = f"Three passes over these training images, in batches of {training.BATCH}"
    assert training.PASSES == 3
    assert [source.copies for source in SOURCES.values()] == [3, 1, 1, 1]
    for words in (
        f"{domains.SIDE} px", steps, f"{len(training.CANDIDATES)} candidates", "AdamW 10⁻³", "a tenth of",
        "at least 2 points", "at least two of the three sets",
    ):  # fmt: skip
        assert words in PROTOCOL, words
    assert (training.EXPERT, training.REPLAYED, report.GAIN, report.ENOUGH) == ({"lr": 1e-3}, 0.1, 0.02, 2)


def test_domains_hold_their_sources_classes() -> None:
    """Both halves of Imagenette are all of it, once; no class is in two domains of a set, but a source may be."""
    halves = [each for domain in SETS["imagenette"] for each in DOMAINS[domain][1]]
    assert sorted(halves) == sorted(SOURCES["imagenette"].classes)
    for names in SETS.values():
        pairs = [(DOMAINS[name][0], each) for name in names for each in DOMAINS[name][1]]
        assert len(pairs) == len(set(pairs)) == len(owners(names)) <= len(training.DIGITS)
    assert owners(SETS["sources"]).tolist() == [0] * 2 + [1] * 10 + [2] * 8


def test_discriminants_are_those_of_the_formula() -> None:
    """Two groups of one feature, means 0 and 2, variance 1: log-density ratio of x is 2 x - 2; shrinking one feature
    by its own variance changes nothing."""
    x = torch.tensor([[-1.0], [1.0], [1.0], [3.0]])
    for shrink in (0.0, 0.3):
        scores = training.fit_lda(x, torch.tensor([0, 0, 1, 1]), shrink)(torch.tensor([[0.0], [1.0], [5.0]]))
        assert (scores[:, 1] - scores[:, 0]).tolist() == pytest.approx([-2.0, 0.0, 8.0])


def test_a_router_sums_over_classes_or_takes_the_nearest() -> None:
    """Domain 0 has classes at -1 and 1, domain 1 one at 0.4: at .25 one class is nearer, two are likelier together."""
    torch.manual_seed(0)
    centres = torch.tensor([-1.0, 1.0, 0.4])
    labels = torch.arange(3).repeat(2000)
    x = (centres[labels] + 1.5 * torch.randn(6000))[:, None]
    train = Images(torch.empty(0), torch.cat([x, -x], 1), labels, (labels == 2).long())
    owner, seen = torch.tensor([0, 0, 1]), torch.tensor([[0.25, -0.25]])
    to = {
        tells: training.routed(training.Candidate(reads, tells, 0.0), train, owner, seen).item()
        for tells in ("all classes", "nearest class") for reads in ("before the experts", "at the end")
    }  # fmt: skip
    assert to == {"all classes": 0, "nearest class": 1}
    assert training.answers(torch.tensor([[3.0, 1.0, 2.0]]), owner).tolist() == [0]
    assert training.answers(torch.tensor([[3.0, 1.0, 2.0]]), owner, torch.tensor([1])).tolist() == [2]


def test_a_quarter_of_a_batch_is_replayed() -> None:
    new, old = torch.arange(100), torch.arange(1000, 1010)
    order = training.with_replay(new, old, 0)
    assert len(order) == 12 * 32  # three passes over 100 rows, 24 a batch
    for batch in order.split(32):
        assert (batch < 1000).tolist() == [True] * 24 + [False] * 8
    assert set(order[order >= 1000].tolist()) <= set(old.tolist())
    assert sorted(training.with_replay(new, old[:0], 0).tolist()) == sorted(3 * new.tolist())


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two blocks of width 8, of which the second one is trained."""
    for module in (domains, training):
        monkeypatch.setattr(module, "FIRST", 1)
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 14,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 2,
    }
    return timm.create_model("vit_small_patch14_dinov2", **made).eval()


def test_a_tail_starts_as_the_trunk_and_learns_in_its_mlps_alone(vit: Any) -> None:
    torch.manual_seed(1)
    start, x = torch.nn.Linear(16, 3), torch.randn(64, 5, 8)
    tail = training.Tail(vit, start)
    with torch.no_grad():
        torch.testing.assert_close(tail(x), start(summary(vit.norm(vit.blocks[1](x)))))
    before = {name: value.clone() for name, value in tail.state_dict().items()}
    training.fit(tail, x, torch.arange(64) % 3, torch.arange(64), {"lr": 1e-2}, 32, 0)
    changed = {name for name, value in tail.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".mlp.")[0] for name in changed if ".mlp." in name} == {"blocks.1"}
    assert {name for name in changed if ".mlp." not in name} == {"head.weight", "head.bias"}
    for name, value in vit.blocks[1].state_dict().items():  # the trunk that others share
        assert torch.equal(value, before[f"blocks.1.{name}"]), name


def record(name: str, seed: int, arms: dict[str, str], **more: Any) -> dict[str, Any]:
    """Two domains of four test images each, classes 0 and 1."""
    return {
        "name": Job(name, seed).name, "set": name, "seed": seed, "trains": "experts",
        "domains": list(SETS[name])[:2], "classes": [1, 1],
        "training_images": [8, 8], "test_images": [4, 4], "labels": "00001111", "predicted": arms, "router": "r",
        "routers_on_validation": {"r": 0.9}, "sent": [[3, 1], [0, 4]],
        "earlier": {arm: "0000" for arm in ("joined", "heads only", "dense with replay")},
        "parameters": {"trunk": 2**18, "expert": 2**18, "features": 15}, "cpu_s": {"router": 1.0, "expert 0": 59.0},
        "code": {"git_commit": "c", "dirty": False}, "machine": {"cpu": "a CPU"}, **more,
    }  # fmt: skip


def arms(**changed: str) -> dict[str, str]:
    names = {name for pair in report.PAIRS for name in pair} | {"dense with replay"}
    return {
        **dict.fromkeys(names, "11111111"),
        **{key.replace("__", ", ").replace("_", " "): text for key, text in changed.items()},
    }


def study(**joined: str) -> list[dict[str, Any]]:
    """All runs; of some sets with other answers than the heads', which say 1 to everything."""
    return [
        record(job.set, job.seed, arms(joined=joined.get(job.set, "11111111")))
        for job in queue()
        if job.trains == "experts"
    ]


def test_a_difference_is_the_mean_of_domains_with_both_intervals() -> None:
    """The first domain gains 1 of 4 images in two of three seeds: an image's means are 0, 0, 2/3, 0, variance 1/9; the
    gaps by seed 12.5, 12.5 and 0 points, SD 7.217, times 4.303 / √3."""
    runs = [
        record("imagenette", seed, arms(joined="00011111" if seed else "00111111", heads_only__tuned="00111111"))
        for seed in range(3)
    ]
    gap = report.Gap(runs, *report.DECIDES)
    assert gap.mean == pytest.approx(1 / 12)
    assert gap.half == pytest.approx(1.96 * np.sqrt((1 / 9) / 4) / 2)
    assert gap.seeds.half == pytest.approx(0.125 / np.sqrt(3) * 4.3027 / np.sqrt(3), rel=1e-4)
    assert not gap.brings
    assert report.accuracy(runs[1], "joined") == pytest.approx((0.75 + 1) / 2)


@pytest.mark.parametrize(
    ("better", "said"), [((), "Don't"), (("far",), "Don't"), (("far", "imagenette"), "Build"), (tuple(SETS), "Build")]
)
def test_the_gate_opens_by_two_sets(better: tuple[str, ...], said: str) -> None:
    """All of a domain right that was wrong, in every seed: 50 points without any spread."""
    runs = study(**dict.fromkeys(better, "00001111"))
    assert report.decision(runs).startswith(said)
    assert report.decision(runs[:-1]).startswith("Not run to an end: 8 of 9 seeds")
    dirty = {**runs[-1], "code": {"git_commit": "c", "dirty": True}}
    assert report.decision([*runs[:-1], dirty]).startswith("Not run")


def test_tables_say_what_the_records_do() -> None:
    text = "\n".join(report.parts_of(study(far="00001111")))
    assert "| far | joined − heads only, tuned | +50.00 (" in text
    assert "75.0 / 25.0" in text
    assert "| imagenette | Imagenette, outdoors | joined | 100.0 | 0.0 | −100.0 |" in text


def test_a_tiny_study(vit: Any, bench: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of drawn images through the whole of it; a second set takes the same tokens."""
    classes = tuple(SyntheticPets.classes)[:4]
    folder = draw_folder(tmp_path / "images", classes, size=28)
    monkeypatch.setattr(domains, "SIDE", 28)
    monkeypatch.setattr(domains, "SOURCES", {"cats": domains.Source(tuple(sorted(classes)), {}, 12)})
    halves = {"a": ("cats", classes[:2]), "b": ("cats", classes[2:])}
    for module in (domains, training, report):
        monkeypatch.setattr(module, "DOMAINS", halves, raising=False)
        monkeypatch.setattr(module, "SETS", {"halves": ("a", "b"), "swapped": ("b", "a")})
        monkeypatch.setattr(module, "trunk_of", lambda options: vit, raising=False)
    options = Namespace(work=tmp_path / "work", cats=folder, imagenette=None, cifar10=None, pretrained=None)
    out = tmp_path / "runs.jsonl"
    for job in (Job("halves", 0), Job("swapped", 0), Job("halves", 0, "heads"), Job("halves", 0, "dense")):
        write_run(out, job.name, {**training.run_job(job, options), "code": {"dirty": False}})
    found, swapped, *_ = read_records(out)
    # An expert is the same whatever other domains there are, and in whatever order they came.
    own, place = found["test_images"][0], swapped["test_images"][0]
    alone, again = (training.read(run["predicted"]["joined, domain given"]) for run in (found, swapped))
    assert alone[:own] == [each - 2 for each in again[place:]]
    assert alone[own:] == [each + 2 for each in again[:place]]
    assert sum(found["test_images"]) == len(found["labels"]) == len(found["predicted"]["joined"])
    assert found["earlier"]["joined"].strip("01") == ""  # before b is there, its classes are no answers
    # An image that goes to the same expert before and after gets the same answer: here all of a's that stay at home.
    train, test = (images_of(("a", "b"), split, options) for split in ("train", "test"))
    router = next(each for each in training.CANDIDATES if each.name == found["router"])
    to = training.routed(router, train, torch.tensor([0, 0, 1, 1]), test.seen)
    home = ((to == 0) & (test.domains == 0)).nonzero().flatten().tolist()
    assert [found["predicted"]["joined"][i] for i in home] == [found["earlier"]["joined"][i] for i in home]
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert bench("modular", "report", "--out", out, "--readme", readme).code == 0
    assert "Not run to an end: 1 of 6 seeds" in readme.read_text()
    for first, second in report.PAIRS:
        assert f"| halves | {first} − {second} |" in readme.read_text()
    assert "| halves | b | dense with replay |" in readme.read_text()
