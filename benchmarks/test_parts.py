"""What the benchmarks are made of: turns, phases, memory, load, and other libraries' layers."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import phases, timing
from benchmarks.accuracy import record_of
from benchmarks.harness import in_a_process
from benchmarks.layer.peers import PEERS, build_peer, flops_beside_ours, gated_width
from benchmarks.lines import put_run
from benchmarks.memory import beside_twin, peak_bytes, saved_bytes, tensors_peak_bytes
from benchmarks.phases import PhaseClock, measure_load, named_phases
from benchmarks.subject import NAMES, Subject, TrainingStep, find_subject, noise_batch
from benchmarks.timing import Candidate, interleave, ratio_of, spread
from moevision.errors import UserError
from moevision.layers import MoEMlp, moe_layers, record_routing

MIB = 2**20


def test_candidates_take_turns_in_an_order_that_rotates():
    calls = []
    candidates = [Candidate(name, lambda name=name: calls.append(name)) for name in "abc"]
    timings = interleave(
        candidates, repetitions=3, warm_up=1, prepare=lambda number: calls.append(number)
    )
    assert calls == [0, "a", "b", "c", 1, "b", "c", "a", 2, "c", "a", "b", 3, "a", "b", "c"]
    assert [len(timings.seconds[name]) for name in "abc"] == [3, 3, 3]


@pytest.fixture
def work(monkeypatch):
    """Work of so many seconds by the clock of `interleave`, which stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_time_is_that_of_the_run_alone(work):
    """1 s of work beside 5 s of resetting and 7 s of preparing."""
    candidate = Candidate("a", lambda: work(1), reset=lambda: work(5))
    (seconds,) = interleave(
        [candidate], repetitions=3, warm_up=0, prepare=lambda _: work(7)
    ).seconds.values()
    assert seconds == [1, 1, 1]


def test_what_fails_later_is_left_out_whole():
    counts = []

    def fail():
        counts.append(1)
        if len(counts) == 3:
            raise ValueError("too late")

    candidates = [Candidate("good", lambda: None), Candidate("bad", fail, optional=True)]
    timings = interleave(candidates, repetitions=4, warm_up=1)
    assert list(timings.seconds) == ["good"]
    assert timings.failures == {"bad": "ValueError: too late"}
    assert len(counts) == 3
    with pytest.raises(ValueError, match="too late"):
        interleave([Candidate("bad", _raise)], repetitions=1, warm_up=0)


def _raise():
    raise ValueError("too late")


def test_spread_and_ratio_by_hand():
    assert spread([4, 1, 3, 2, 5]) == {"quartile_1": 2, "median": 3, "quartile_3": 4, "n": 5}
    assert spread([0.25], 1e3) == {"quartile_1": 250, "median": 250, "quartile_3": 250, "n": 1}
    # The machine got slower by half: pairs agree, medians of each alone would say 2 / 1.5.
    assert ratio_of([2, 4, 4], [1, 2, 2])["median"] == 2


def test_phases_are_exclusive_and_add_up(monkeypatch):
    """Marks at 0, 1, 3, 6, 10, 15 s: outer from 0 to 1, inner to 3, innermost to 6, inner to 10, outer to 15."""
    marks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(marks))
    clock = PhaseClock()
    with clock.phase("rest"), clock.phase("experts"), clock.phase("router"):
        pass
    assert clock.seconds == {"rest": 1 + 5, "experts": 2 + 4, "router": 3}


def test_hooks_are_gone_afterwards():
    net = Subject("tiny", {"name": "test_vit_moe"}).build()
    names = [name for _, name in named_phases(net)]
    counts = {"dispatch and combine": 2, "router": 2, "experts": 2, "attention": 4, "dense MLPs": 2}
    assert Counter(names) == counts
    clock = PhaseClock()
    with clock.watching(net), clock.phase("rest"):
        net(torch.randn(2, 3, 32, 32))
    assert set(clock.seconds) == {*names, "rest"}
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in net.modules()
    )


@pytest.mark.parametrize(
    ("checkpointing", "optimizer"), [(False, "adamw"), (True, "adamw"), (False, "muon")]
)
def test_a_step_is_fit_s_step(checkpointing, optimizer):
    """All parameters move, clocks or not, and what is computed again in the backward pass counts as forward work."""
    given = {"optim": {"name": optimizer}, "grad_checkpointing": checkpointing}
    subject = Subject("tiny", {"name": "test_vit_moe"}, batch_size=4, **given)
    step = TrainingStep(subject, "moe", "fp32", torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in step.net.parameters()]
    clock = PhaseClock()
    with clock.watching(step.net):
        for seed in range(2):
            step(*noise_batch(subject, torch.device("cpu"), seed), clock)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, step.net.parameters(), strict=True)
    )
    assert all(parameter.grad is None for parameter in step.net.parameters())
    assert {"router", "experts", "backward", "clip and optimizer"} <= set(clock.seconds)


def test_another_model_by_a_config_s_recipe():
    plain, other = find_subject("cifar10"), find_subject("cifar10", arch="vit_moe_hybrid_patch8_32")
    assert other.arch == {**plain.arch, "name": "vit_moe_hybrid_patch8_32"}
    assert other.optim == plain.optim
    assert other.name == "cifar10 with vit_moe_hybrid_patch8_32"
    with pytest.raises(UserError, match="no model 'vit_moe_hybrid'"):
        find_subject("cifar10", arch="vit_moe_hybrid")


def known_peaks():
    """Of 64 MiB held and 128 MiB more for a moment, then of 32 MiB for a moment; in MiB."""
    kept = []

    def work():
        kept.append(torch.ones(64 * MIB, dtype=torch.uint8))
        torch.ones(128 * MIB, dtype=torch.uint8)

    return [
        peak_bytes(each) / MIB for each in (work, lambda: torch.ones(32 * MIB, dtype=torch.uint8))
    ]


def test_peak_memory_of_a_known_allocation():
    """Pages count once they are written. In a process of its own: memory that other tests left counts as there."""
    assert in_a_process(known_peaks) == pytest.approx([192, 32], abs=3)


def test_the_peak_of_tensors_by_hand():
    """64 MiB held, then 128 more for a moment, then 32; what is freed from before doesn't count."""
    kept = [torch.ones(256 * MIB, dtype=torch.uint8)]

    def work():
        kept[0] = torch.ones(64 * MIB, dtype=torch.uint8)
        torch.ones(128 * MIB, dtype=torch.uint8)
        torch.ones(32 * MIB, dtype=torch.uint8)

    assert tensors_peak_bytes(work) == 192 * MIB
    assert tensors_peak_bytes(lambda: None) == 0


def test_kept_activations_by_hand():
    """Of exp(linear(x)) autograd keeps x and the result, 8 x 4 float32 numbers each; the weight isn't an activation."""
    net = nn.Linear(4, 4)
    x = torch.randn(8, 4)
    assert saved_bytes(lambda: net(x).exp().sum().backward(), net) == 2 * 8 * 4 * 4


def test_memory_beside_the_twin_by_hand():
    parts = ("peak_mib", "weights_mib", "gradients_mib", "optimizer_mib", "tensors_mib")
    moe, twin = (
        dict(zip(parts, sizes, strict=True))
        for sizes in ((200, 20, 20, 40, 130), (100, 10, 10, 20, 80))
    )
    assert beside_twin(moe, twin) == {
        "whole": 2.0,
        "beyond_extra_weights_and_optimizer": 1.7,  # (200 - 10 - 20) / 100
        "beyond_extra_state": 1.6,
        "tensors_beyond_extra_weights_and_optimizer": 1.25,  # (130 - 10 - 20) / 80
    }


def test_dropped_choices_are_waste():
    """With a capacity each expert keeps what fits; all T · K rows are computed all the same."""
    torch.manual_seed(0)
    layer = MoEMlp(
        16, 32, num_experts=4, top_k=2, router="vmoe_top_k", capacity_factor=0.5, backend="loop"
    )
    layer.train()
    x = torch.randn(2, 64, 16)
    with record_routing(layer) as routings:
        torch.manual_seed(1)
        layer(x)
    kept = routings[0].kept
    torch.manual_seed(1)
    (load,) = measure_load(layer, lambda: layer(x))
    assert sum(load["counts"]) == int(kept.sum()) < kept.numel()
    assert load["padding_waste"] == pytest.approx(1 - kept.float().mean().item(), rel=1e-4)
    assert not layer.experts._forward_pre_hooks


def test_the_dense_backend_has_no_rows_to_count():
    layer = MoEMlp(16, 32, num_experts=4, top_k=2, backend="dense")
    (load,) = measure_load(layer, lambda: layer(torch.randn(2, 8, 16)))
    assert load["padding_waste"] is None
    assert sum(load["counts"]) == 2 * 8 * 2


def test_gated_experts_get_the_same_flops():
    """Three matrices of 2 H / 3 instead of two of H; 768 and 1536 divide, 384 · 2 / 3 is 256."""
    assert [gated_width(hidden) for hidden in (384, 768, 1536, 64)] == [256, 512, 1024, 40]
    assert flops_beside_ours("mixtral eager", 384) == 1
    assert flops_beside_ours("torchtitan", 64) == pytest.approx(3 * 40 / 128)
    assert flops_beside_ours("nemotron_h eager", 64) == 1


SIZES = {"width": 32, "hidden": 64, "num_experts": 4, "top_k": 2}


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("nemotron_h")])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_nemotron_s_experts_compute_our_function(name):
    """An independent implementation of the same layer: equal outputs and gradients in float32."""
    torch.manual_seed(0)
    ours = MoEMlp(32, 64, num_experts=4, top_k=2, router="vmoe_top_k", bias=False).eval()
    peer = build_peer(name, ours.router, dtype=torch.float32, device=torch.device("cpu"), **SIZES)
    weights = dict(peer.experts.named_parameters())
    with torch.no_grad():
        weights["experts.up_proj"].copy_(ours.experts.fc1.weight)
        weights["experts.down_proj"].copy_(ours.experts.fc2.weight)
    x = torch.randn(2, 32, 32, requires_grad=True)
    outputs = [ours(x), peer(x)]
    gradient = torch.randn_like(x)
    gradients = [torch.autograd.grad(output, x, gradient)[0] for output in outputs]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PEERS if not name.startswith("nemotron_h")])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_gated_peers_compute_a_gated_mixture(name):
    """By hand: Σ over the chosen experts of weight · down(silu(gate x) · up x), in bf16 accuracy."""
    pytest.importorskip(PEERS[name])
    torch.manual_seed(0)
    router = MoEMlp(32, 64, num_experts=4, top_k=2, router="vmoe_top_k").eval().router
    peer = build_peer(name, router, dtype=torch.bfloat16, device=torch.device("cpu"), **SIZES)
    weights = {
        key: value.detach() * 10 for key, value in peer.experts.named_parameters()
    }  # else outputs are tiny
    with torch.no_grad():
        for key, value in peer.experts.named_parameters():
            value.copy_(weights[key])
    if name == "torchtitan":
        gate, up, down = (weights[f"experts.{key}"] for key in ("w1_EFD", "w3_EFD", "w2_EDF"))
    else:
        gate, up = weights["experts.gate_up_proj"].chunk(2, dim=1)
        down = weights["experts.down_proj"]
    x = torch.randn(2, 32, 32)
    routing = router(x)
    hidden = nn.functional.silu(torch.einsum("bnd,efd->bnef", x, gate)) * torch.einsum(
        "bnd,efd->bnef", x, up
    )
    every = torch.einsum("bnef,edf->bned", hidden, down)
    expected = (every * routing.expert_weights().unsqueeze(-1)).sum(2)
    found = peer(x).float()
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_subjects():
    cifar = find_subject("cifar10")
    assert (cifar.batch_size, cifar.image_size, cifar.arch["router"]) == (128, 32, "vmoe_top_k")
    assert cifar.aux == {"importance": 0.05, "load": 0.05}
    dense = find_subject("vit_tiny_patch16_224", batch_size=2, num_classes=3)
    assert (dense.batch_size, dense.num_classes, dense.image_size) == (2, 3, 224)
    assert dense.arch == {"name": "vit_moe", "base": "vit_tiny_patch16_224"}
    tiny = find_subject("test_vit_moe", image_size=32)
    assert [len(moe_layers(tiny.build(which))) for which in NAMES] == [2, 0, 0]
    assert Subject(**asdict(tiny)) == tiny
    with pytest.raises(UserError, match="cifar10"):
        find_subject("cifar")


def test_a_config_of_another_program_is_refused(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("model: {arch: {name: test_vit_moe, experts: 3}}")
    with pytest.raises(UserError, match=r"no option .model\.arch\.experts"):
        find_subject(str(path))


def test_the_record_of_a_run():
    """16 images, each costing three forward passes; two validations, of 8 and of 16 images seen."""
    record = record_of(Path(__file__).parents[1] / "tests/fixtures/formats/0.1/runs/finished")
    assert (record["test"]["correct"], record["test"]["total"]) == (4, 8)
    assert record["cost"]["training_flops"] == 3 * (827_456 + 4_096) * 16
    assert record["curve"] == [(8, 0.5, 0.375), (16, 0.5, 0.875)]
    assert record["layers"][0]["max_over_mean"] == 128 / 64
    assert record["command"].startswith("moevision fit pets ")
    assert record["cost"]["cpu_s"] is None, "that version didn't count it"


def test_an_unfinished_run_has_no_record(tmp_path):
    with pytest.raises(UserError, match="isn't finished"):
        record_of(tmp_path)


def test_a_run_is_a_line_and_takes_the_place_of_an_earlier_one(tmp_path):
    out = tmp_path / "runs.jsonl"
    for name, steps in (("first", 1), ("second", 1), ("first", 2)):
        put_run(out, {"name": name, "steps": steps})
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"name": "second", "steps": 1},
        {"name": "first", "steps": 2},
    ]
