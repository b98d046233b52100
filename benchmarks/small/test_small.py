"""The control that reads every place, and the small studies: queue, shifted images, tables from records."""

import json

import pytest
import timm
import torch

from benchmarks import queue as queueing
from benchmarks.places import MICRO, PLACES, shifted
from benchmarks.small import BASE_LR, PROTOCOL, Job, queue, rate_of
from benchmarks.small.report import (
    batch_contrasts,
    batches_answer,
    counted,
    head_contrasts,
    parts_of,
    rate_contrasts,
    rates_answer,
)

TINY = {
    "num_classes": 3,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 8,
    "num_experts": 4,
}


@pytest.mark.parametrize(("pooling", "reading"), PLACES.items())
def test_only_the_classifier_differs(pooling, reading) -> None:
    nets = []
    for name in (pooling, reading):
        torch.manual_seed(0)
        nets.append(timm.create_model(name, num_classes=10))
    one, other = (net.state_dict() for net in nets)
    shared = one.keys() & other.keys() - {"head.weight"}
    assert all(one[name].equal(other[name]) for name in shared)
    assert one.keys() - shared == {"fc_norm.weight", "fc_norm.bias", "head.weight"}
    assert other.keys() - shared == {"norm.weight", "norm.bias", "head.weight"}
    places, width = nets[1].patch_embed.num_patches, nets[1].embed_dim
    assert other["head.weight"].shape == (10, places * width)


def test_the_classifier_is_a_sum_over_places() -> None:
    net = timm.create_model(PLACES[MICRO], **TINY).eval()
    tokens = net.forward_features(torch.randn(2, 3, 32, 32))  # [2, 16, D], normalized
    weight = net.head.weight.unflatten(1, (16, 16))  # [C, N, D]
    expected = torch.einsum("bnd,cnd->bc", tokens, weight) + net.head.bias
    torch.testing.assert_close(net.forward_head(tokens), expected)
    assert not torch.allclose(
        net.forward_head(tokens.flip(1)), expected
    )  # it knows the place, as a mean doesn't
    mean = timm.create_model(MICRO, class_token=False, **TINY).eval()
    torch.testing.assert_close(mean.forward_head(tokens.flip(1)), mean.forward_head(tokens))


def test_images_are_moved_left_right_up_and_down() -> None:
    image = torch.arange(1.0, 10).view(1, 1, 3, 3).expand(4, 1, 3, 3)
    left, right, up, down = shifted(image, 1, torch.arange(4))[:, 0].tolist()
    assert left == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    assert right == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]
    assert up == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert down == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert shifted(image, 0, torch.arange(4)).equal(image)


def run(question, arm, seed, top1, lr=BASE_LR, **more):
    job = Job(question, arm, lr, seed, **more)
    tops = {"val_top1": top1, "test_top1": top1, "shifted_4": top1 - 0.01, "shifted_8": top1 - 0.1}
    rest = {"failed": None, "refused": 0, "returns": 0, "cpu_s": 20.0, "steps": 500}
    return {
        "name": job.name,
        **vars(job),
        **tops,
        **rest,
        "code": {"git_commit": "c", "dirty": False},
    }


def of_row(runs):
    return [
        job
        for job in queue(runs)
        if (job.question, job.arm, job.head) == ("heads", "dense", "mean")
    ]


def test_rates_are_tuned_before_seeds_and_beyond_a_winning_edge() -> None:
    row = Job("heads", "dense", BASE_LR, 0)
    runs = [run("heads", "dense", 100, 0.4 + lr, lr=lr) for lr in (1e-3, 2e-3, 4e-3)]
    assert rate_of(runs, row) is None  # the highest of three won
    assert {job.lr for job in of_row(runs)} == {1e-3, 2e-3, 4e-3, 8e-3}
    runs.append(run("heads", "dense", 100, 0.3, lr=8e-3))
    assert rate_of(runs, row) == 4e-3
    assert [(job.lr, job.seed) for job in of_row(runs)[-5:]] == [(4e-3, seed) for seed in range(5)]
    assert len([job for job in queue([]) if job.question == "rates"]) == 60


def test_contrasts_follow_from_the_records() -> None:
    runs = [run("heads", "dense", seed, 0.45 + seed / 100, head="mean") for seed in range(5)]
    runs += [run("heads", "dense", seed, 0.52 + seed / 100, head="places") for seed in range(5)]
    runs += [
        run("heads", "position", seed, 0.53 + seed / 100 + seed / 1000, head="places")
        for seed in range(5)
    ]
    found = {(each.first, each.second): each for each in head_contrasts(runs)}
    assert found["dense, places", "dense, mean"].mean == pytest.approx(0.07)
    assert found["position, places", "dense, places"].mean == pytest.approx(0.012)
    runs = []
    for seed in range(5):
        for batch, gain in ((16, 0.0), (64, 0.01), (256, 0.02), (1024, 0.05)):
            runs += [
                run("batches", "dense", seed, 0.4, batch=batch),
                run("batches", "learned", seed, 0.4 + gain, batch=batch),
            ]
        for factor, loss in ((1, 0.0), (4, 0.01), (16, 0.03)):
            runs.append(run("rates", "dense", seed, 0.45, lr=BASE_LR * factor))
            runs.append(run("rates", "learned", seed, 0.46 - loss, lr=BASE_LR * factor))
    assert [round(each.mean, 6) for each in batch_contrasts(runs)] == [-0.01, 0.01, 0.04]
    assert [round(each.mean, 6) for each in rate_contrasts(runs)] == [-0.01, -0.03]
    runs[-1]["failed"], runs[-1]["test_top1"] = "the weights are not finite", None
    assert len(rate_contrasts(runs)[1].gaps) == 4
    assert "| learned | × 16 | off |" in "\n".join(parts_of(runs))


def test_a_run_is_a_line_and_is_not_repeated(bench, drawn_pets, tmp_path) -> None:
    out = tmp_path / "runs.jsonl"
    call = (
        "small",
        "run",
        "--cifar",
        drawn_pets,
        "--images",
        64,
        "--allow-dirty",
        "--out",
        out,
        "--work",
        tmp_path,
    )
    for _ in range(2):
        outcome = bench(*call)
        assert outcome.code == 0, outcome.err
    first, second = queueing.read_records(out)
    assert [first["lr"], second["lr"]] == [1e-3, 2e-3]
    assert (first["steps"], first["failed"], len(first["predictions"])) == (1, None, 64)
    assert str(tmp_path) not in json.dumps(first)
    assert PROTOCOL.name == "protocol.md"


@pytest.mark.parametrize(
    ("loss", "spread", "failed", "expected"),
    [
        (0.03, 0.001, 0, "yes"),
        (0.0, 0.001, 0, "no"),
        (0.0, 0.05, 0, "not shown"),
        (-0.03, 0.001, 1, "yes"),
    ],
)
def test_instability_is_judged_by_its_protocol(loss, spread, failed, expected) -> None:
    """Learned loses `loss` more than dense at 4 and 16 times the rate, give or take; or it fails once."""
    runs = []
    for seed, sign in enumerate((1, -1, 1, -1, 1)):
        for factor in (1, 4, 16):
            for guard in (False, True):
                lr, gap = BASE_LR * factor, (factor > 1) * (sign * spread - loss)
                runs.append(run("rates", "dense", seed, 0.45, lr=lr, guard=guard))
                runs.append(run("rates", "learned", seed, 0.46 + gap, lr=lr, guard=guard))
    if failed:
        next(run for run in reversed(runs) if not run["guard"])["failed"] = (
            "the weights are not finite"
        )
    assert rates_answer(counted(runs))[0] == expected


@pytest.mark.parametrize(
    ("gain", "spread", "expected"),
    [(0.03, 0.001, "only with the mean"), (0.0, 0.001, "no"), (0.0, 0.05, "not shown")],
)
def test_large_batches_are_judged_by_their_protocol(gain, spread, expected) -> None:
    runs = []
    for seed, sign in enumerate((1, -1, 1, -1, 1)):
        for batch in (16, 64, 256, 1024):
            more = (batch > 64) * (gain + sign * spread)
            runs.append(run("batches", "dense", seed, 0.45, batch=batch))
            runs.append(run("batches", "learned", seed, 0.46 + more, batch=batch))
    assert batches_answer(counted(runs))[0] == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.03, "yes"), (0.0, "only with the mean")])
def test_large_batches_are_judged_with_places_read_too(gain, expected) -> None:
    """With the mean the lead grows by three points; with places read as much, or by nothing."""
    runs = []
    for seed in range(5):
        for head, more in (("mean", 0.03), ("places", gain)):
            for batch in (16, 64, 256, 1024):
                top1 = 0.46 + (batch > 64) * more + 0.001 * (seed % 2) * (batch > 64)
                runs.append(run("batches", "dense", seed, 0.45, batch=batch, head=head))
                runs.append(run("batches", "learned", seed, top1, batch=batch, head=head))
    assert batches_answer(counted(runs))[0] == expected
