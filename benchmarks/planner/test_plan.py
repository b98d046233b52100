"""`plan`: the recommended command, what is said to be assumed, and what can't be planned."""

import json
import re
import time
from pathlib import Path

import pytest
import timm
import torch

from benchmarks.planner.footprint import checkpointed_blocks
from benchmarks.planner.machine import measured_links, sheet_machine
from benchmarks.planner.plan import open_planned
from moevision.analysis.trace import RoutingTrace
from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.layers.routers import ROUTERS
from moevision.models.io import SavedModel, save_model

OLD = Path(__file__).parents[2] / "tests" / "fixtures" / "formats" / "0.1"
TRACE = OLD / "report" / "trace.safetensors"


def test_everything_assumed_is_said_and_the_command_has_options_that_exist(bench, cli):
    outcome = bench("plan", "test_vit_moe", "--gpus=16", "--batch=1024", "--option", "router=switch", "--format=json")
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    said = {each["name"] for each in facts["assumed"]}
    assert said >= {name for name in facts["machine"] if name != "name"}
    assert said >= {"cv", "classes"}
    assert facts["measured"] == []
    command = facts["command"].split()
    assert command[0] == "torchrun"
    assert "--nnodes=2" in command
    assert command[command.index("-m") + 1 :][:3] == ["moevision", "fit", "FOLDER"]
    options = {word.partition("=")[0] for word in command[command.index("fit") :] if word.startswith("--")}
    assert options - {"--parallel", "--parallel.expert"} <= set(re.findall(r"--[\w.-]+", cli("fit", "--help-all").out))
    assert "--data.batch_size=64" in command


def test_tables_and_the_verdict(bench):
    """A small model computes so little that rows travel longer than they are computed."""
    out = bench("plan", "vit_moe_micro_patch4_32", "--gpus=8", "--batch=512").out
    assert "Expert parallelism does not pay here" in out
    assert "assumed: peak_flops 989 TFLOPS (H100 SXM, data sheet)" in out
    assert all(name in out for name in ("DDP", "FSDP2", "EP 8 + DDP", "EP 8 x FSDP2"))


def test_measured_here_is_not_called_assumed(bench):
    facts = json.loads(bench("plan", "quickstart", "--measure", "--format=json").out)
    assert facts["measured"] == ["matmul_flops", "memory_bytes_per_s", "memory_bytes"]
    assert not {each["name"] for each in facts["assumed"]} & {*facts["measured"], "peak_flops"}
    assert facts["command"].startswith("moevision fit --config quickstart --data.batch_size=64")
    assert [each["name"] for each in facts["layouts"]] == ["one GPU"]


@pytest.mark.parametrize(
    ("model", "option", "said"),
    [("test_vit_moe", "top_k=0", "top_k is 0"), ("vit_moe", "base=nonsense", "There is no model 'nonsense'")],
)
def test_options_that_make_no_model(bench, model, option, said):
    outcome = bench("plan", model, "--option", option)
    assert outcome.code == 2
    assert said in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_planned(bench, router):
    outcome = bench("plan", "test_vit_moe", "--gpus=2", "--option", f"router={router}")
    assert outcome.code == 0, outcome.err


def test_a_pretrained_start_is_planned(bench, tmp_path):
    arch = "pretrained: test_vit, num_experts: 4, upcycle_noise: 0.1, upcycle_reinit: 0.5"
    (tmp_path / "up.yaml").write_text(f"model: {{arch: {{{arch}}}}}\n")
    outcome = bench("plan", tmp_path / "up.yaml", "--gpus=2", "--format=json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["command"].startswith("torchrun")


def test_fp16_is_planned_for_what_trains_in_it(bench):
    """`fit --parallel` refuses 16-mixed but for DDP."""
    facts = json.loads(bench("plan", "test_vit_moe", "--gpus=4", "--gpu=t4", "--format=json").out)
    assert [each["name"] for each in facts["layouts"]] == ["DDP"]
    assert "--trainer.precision=16-mixed" in facts["command"]


def test_links_are_measured_between_processes(monkeypatch):
    """Two of them, 2 ms and 1 GB/s: each sends as many bytes as there are, by a clock that all-reduces move."""
    passed = [0.0]

    def travel(tensor, op=None):
        passed[0] += 2e-3 + tensor.nbytes / 1e9

    monkeypatch.setattr(time, "perf_counter", lambda: passed[0])
    for name, fake in {"get_world_size": lambda: 2, "barrier": lambda: None, "all_reduce": travel}.items():
        monkeypatch.setattr(torch.distributed, name, fake)
    sheet = sheet_machine("h100")
    found = measured_links(sheet, torch.device("cpu"), one_node=False)
    assert found.latency_s == pytest.approx(2e-3, rel=1e-4)
    assert found.network_bytes_per_s == pytest.approx(1e9, rel=1e-4)
    assert sheet.assumed.keys() - found.assumed.keys() == {"latency_s", "network_bytes_per_s"}


def test_a_saved_run_with_the_loads_of_a_trace(bench):
    """The loads take the place of a CV: the sum of each half of the experts, the larger over the mean."""
    facts = json.loads(bench("plan", OLD / "runs/finished", "--gpus=2", f"--trace={TRACE}", "--format=json").out)
    assert "cv" not in {each["name"] for each in facts["assumed"]}
    halves = [layer.counts().sum(0).reshape(2, -1).sum(1) for layer in RoutingTrace.load(TRACE).layers]
    busiest = next(each["busiest_over_mean"] for each in facts["layouts"] if each["name"] == "EP 2 + DDP")
    assert busiest == pytest.approx(sum(half.max() / half.mean() for half in halves) / len(halves))
    outcome = bench("plan", "vit_moe_micro_patch4_32", f"--trace={TRACE}")
    assert outcome.code == 2
    assert "give this model's trace" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("test_vit_moe", "--gpus=3", "--batch=64"), "--batch 63"),
        (("test_vit_moe", "--gpus=12", "--batch=768"), "--gpus 8 or 16"),
        (("test_vit_moe", "--option", "nothing=1"), "'nothing'"),
        (("test_vit", "--option", "num_experts=4"), "vit_moe with --option base=test_vit"),
        (("runs/nowhere",), "runs/nowhere"),
        (("resnet18",), "no ViT"),
    ],
)
def test_what_cannot_be_planned(bench, arguments, words):
    outcome = bench("plan", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def config(text):
    """`plan` of a configuration, which is opened as far as it is counted."""
    Path("mine.yaml").write_text(text)
    return open_planned("mine.yaml", {})


def test_a_configuration_is_planned_as_fit_trains_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = config("model:\n  arch: {name: test_vit_moe}\n")
    assert plain.image_size == ImageDataModule(".").image_size == 64
    frozen = config("model:\n  arch: {name: test_vit_moe}\n  optim: {freeze: 2}\n  grad_checkpointing: [1, 3]\n")
    assert checkpointed_blocks(frozen.net) == (1, 3)
    assert not any(parameter.requires_grad for parameter in frozen.net.blocks[:2].parameters())
    assert all(parameter.requires_grad for parameter in frozen.net.blocks[2:].parameters())
    assert config("model:\ndata:\n").image_size == 64  # empty: fit's own model


@pytest.mark.parametrize(
    ("text", "words"),
    [("model:\n  arch: {num_expert: 4}\n", "no option 'num_expert'"), ("model: 3\n", "'model' of a configuration")],
)
def test_a_mistake_in_a_configuration(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        config(text)


def test_a_saved_dense_model_is_planned_as_dense(tmp_path):
    """Its own size too: fit fine-tunes dense weights at 112 px on a CPU."""
    net = timm.create_model("test_vit_moe", num_classes=2, img_size=32, moe_layers=[])
    save_model(SavedModel(net.eval(), ["cat", "dog"], 32, (0.5,) * 3, (0.25,) * 3), tmp_path / "dense")
    place = str(tmp_path / "dense")
    assert open_planned(place, {}).arguments == ["FOLDER", "--pretrained", place, "--dense", "--data.image_size=32"]
    sparse = open_planned(str(OLD / "runs/finished"), {})
    assert "--dense" not in sparse.arguments
    assert sparse.arguments[-1] == f"--data.image_size={sparse.image_size}"
