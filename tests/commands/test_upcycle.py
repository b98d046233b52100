"""`upcycle`: a folder in, a folder out that `fit` trains on, with what it costs and how far it is from the source."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

from moevision.layers import moe_layers
from moevision.models.io import describe, from_clusters, load_model, save_model
from tests.shared import assert_names, succeeded

# vit of width 32, depth 6, 32 px in 8 px patches and a class token: 17 tokens; MLP 32 -> 128 -> 32.
D, HIDDEN, TOKENS = 32, 128, 17
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 6, "num_heads": 2}


@pytest.fixture
def dense(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(
        describe(timm.create_model("vit_tiny_patch16_224", num_classes=2, **SIZE)), Path("dense")
    )
    return Path("dense")


def test_upcycle_writes_a_model_and_what_it_costs(cli, dense):
    outcome = succeeded(cli("upcycle", dense, "--out", "moe", "--num-experts", "4"))
    assert_names(outcome.out, "dense: 2 classes, 32 px", "4 experts of 128", "top_k 1")
    assert_names(outcome.out, "router vmoe_top_k", "in blocks 1, 3", "same class for 100%")
    assert "no answer" not in outcome.out
    assert "other outputs" not in outcome.out
    record = json.loads(Path("moe/upcycle.json").read_text())
    before, after = record["costs"]["before"], record["costs"]["after"]
    mlp, router = 2 * D * HIDDEN + HIDDEN + D, 4 * D
    assert after["total_parameters"] - before["total_parameters"] == 2 * (3 * mlp + router)
    assert after["flops_per_image"] == before["flops_per_image"]
    assert (
        after["router_flops_per_image"] == 2 * 2 * TOKENS * D * 4
    )  # two layers; a multiply-add is two FLOPs
    assert f"{after['total_parameters']:,}" in outcome.out
    assert record["step0_gap"]["max_logit"] < 1e-5
    net = load_model("moe").net
    assert (net.num_classes, [layer.layer_index for layer in moe_layers(net)]) == (2, [1, 3])
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), load_model("dense").net(x), rtol=0, atol=1e-5)


def test_the_next_command_trains_the_model(cli, dense, drawn_pets):
    """At the size of the new model, with its colours; here with layer decay and a frozen block."""
    outcome = succeeded(cli("upcycle", dense, "--out", "my moe", "--layers", "2,3", "--top-k", "2"))
    (command,) = re.findall(r"next: moevision (.*)", outcome.out)
    words = ["fit", "FOLDER", "--pretrained", "my moe", "--data.image_size", "32"]
    assert shlex.split(command) == words
    options = ["--model.optim.layer_decay=0.7", "--model.optim.freeze=1", "--trainer.max_epochs=1"]
    options += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    succeeded(cli("fit", drawn_pets, *words[2:], "--name=run", *options))
    assert load_model("runs/run").mean == (0.5, 0.5, 0.5), "AugReg's colours"
    start, end = (load_model(name).net.state_dict() for name in ("my moe", "runs/run"))
    assert torch.equal(start["blocks.0.mlp.fc1.weight"], end["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(
        start["blocks.2.mlp.experts.fc1.weight"], end["blocks.2.mlp.experts.fc1.weight"]
    )


def test_routes_that_nobody_reads_are_named(cli, dense):
    """Behind a class token those of the last block; named blocks are taken as they are."""
    outcome = succeeded(
        cli("upcycle", dense, "--out", "last", "--layers", "last2", "--num-experts", "2")
    )
    assert_names(outcome.out, "in blocks 3, 5", "patches in block 5", "no answer")


def test_what_changes_outputs_is_said(cli, dense):
    outcome = succeeded(cli("upcycle", dense, "--out", "soft", "--router", "soft"))
    assert_names(outcome.out, "other outputs", "reinit")
    options = "--option noise=none --option capacity_factor=1.5 --reinit 0.5 --depth 5"
    sizes = ("--num-classes", "5", "--image-size", "64")
    outcome = succeeded(cli("upcycle", dense, "--out", "more", *sizes, *options.split()))
    saved = load_model("more")
    assert (saved.image_size, len(saved.class_names), len(saved.net.blocks)) == (64, 5, 5)
    config = saved.net.moe_config
    assert (config["noise"], config["capacity_factor"], config["normalize_gates"]) == (
        "none",
        1.5,
        True,
    )


def test_the_same_seed_gives_the_same_file(cli, dense):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        options = f"--out {name} --reinit 0.1 --num-classes 7 --seed {seed}"
        succeeded(cli("upcycle", dense, *options.split()))
    one, again, other = (
        Path(name, "model.safetensors").read_bytes() for name in ("one", "again", "other")
    )
    assert one == again
    assert one != other


def test_class_names_are_kept(cli, tiny_run, own_folder):
    """The dense twin of a finished run: its classes are those of the folder."""
    succeeded(cli("upcycle", tiny_run / "twin", "--out", "moe"))
    assert load_model("moe").class_names == ["cat", "dog"]


def test_routers_start_from_clusters_of_the_data(cli, dense, drawn_pets):
    options = ["--num-experts", "3", "--option", "route_by=image"]
    clusters = ["--router-start", "cluster", "--data", drawn_pets]
    outcome = succeeded(cli("upcycle", dense, "--out", "moe", *options, *clusters))
    assert_names(outcome.out, "routers start", "clusters of")
    record = json.loads(Path("moe/upcycle.json").read_text())
    assert record["moe_config"]["route_by"] == "image"
    assert record["router_start"]["kind"] == "cluster"
    for shares in record["router_start"]["shares"].values():
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0
    assert record["step0_gap"]["max_logit"] < 1e-5
    assert cli("upcycle", dense, "--out", "other", *options).code == 0
    nets = [load_model(name).net for name in ("moe", "other")]
    assert [from_clusters(net) for net in nets] == [True, False]
    started, random = (net.state_dict() for net in nets)
    different = {name for name, value in started.items() if not torch.equal(value, random[name])}
    assert different == {"blocks.1.mlp.router.weight", "blocks.3.mlp.router.weight"}
