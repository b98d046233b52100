"""`upcycle`: a folder in, a folder out that `fit` trains on, with what it costs and how far it is from the source."""

import json
import re
import shlex
from pathlib import Path
from unittest.mock import patch

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
    """The sizes and colours of the new model, as `fit` needs them; here with layer decay and a frozen block."""
    outcome = succeeded(cli("upcycle", dense, "--out", "my moe", "--layers", "2,3", "--top-k", "2"))
    (command,) = re.findall(r"next: moevision (.*)", outcome.out)
    half = "[0.5, 0.5, 0.5]"  # AugReg's colours
    assert shlex.split(command) == [
        *("fit", "FOLDER", "--pretrained", "my moe", "--data.image_size", "32"),
        *("--data.mean", half, "--data.std", half),
    ]
    options = [
        "--data.image_size=32",
        "--data.mean=[0.5,0.5,0.5]",
        "--data.std=[0.5,0.5,0.5]",
        "--name=run",
    ]
    options += ["--model.optim.layer_decay=0.7", "--model.optim.freeze=1", "--trainer.max_epochs=1"]
    options += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    succeeded(cli("fit", drawn_pets, "--pretrained", "my moe", *options))
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
    options = (
        "--option",
        "noise=none",
        "--option",
        "capacity_factor=1.5",
        "--reinit",
        "0.5",
    )
    outcome = succeeded(
        cli("upcycle", dense, "--out", "more", "--num-classes", "5", "--image-size", "64", *options)
    )
    saved = load_model("more")
    assert (saved.image_size, len(saved.class_names)) == (64, 5)
    config = saved.net.moe_config
    assert (config["noise"], config["capacity_factor"], config["normalize_gates"]) == (
        "none",
        1.5,
        True,
    )


def test_the_same_seed_gives_the_same_file(cli, dense):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        succeeded(
            cli(
                "upcycle",
                dense,
                "--out",
                name,
                "--reinit",
                "0.1",
                "--num-classes",
                "7",
                "--seed",
                str(seed),
            )
        )
    one, again, other = (
        Path(name, "model.safetensors").read_bytes() for name in ("one", "again", "other")
    )
    assert one == again
    assert one != other


def test_class_names_are_kept(cli, tiny_run, tmp_path, monkeypatch):
    """The dense twin of a finished run: its classes are those of the folder."""
    monkeypatch.chdir(tmp_path)
    succeeded(cli("upcycle", tiny_run / "twin", "--out", "moe"))
    assert load_model("moe").class_names == ["cat", "dog"]


def test_a_model_is_there_whole_or_not_at_all(cli, dense):
    """The disk is full after the weights; then it has room, and the folder may be there if it is empty."""
    full = patch(
        "moevision.commands.upcycle.write_json_atomic",
        side_effect=OSError(28, "No space left", "moe"),
    )
    before = sorted(Path().iterdir())
    with full:
        outcome = cli("upcycle", dense, "--out", "moe")
    assert (outcome.code, "No space left" in outcome.err) == (2, True)
    assert sorted(Path().iterdir()) == before
    Path("moe").mkdir()
    assert cli("upcycle", dense, "--out", "moe").code == 0
    assert sorted(path.name for path in Path("moe").iterdir()) == [
        "config.json",
        "model.safetensors",
        "upcycle.json",
    ]
    assert sorted(Path().iterdir()) == sorted([*before, Path("moe")])


def test_routers_start_from_clusters_of_the_data(cli, dense, drawn_pets):
    options = (
        "--num-experts",
        "3",
        "--option",
        "route_by=image",
        "--router-start",
        "cluster",
        "--data",
        drawn_pets,
    )
    outcome = succeeded(cli("upcycle", dense, "--out", "moe", *options))
    assert_names(outcome.out, "routers start", "clusters of")
    record = json.loads(Path("moe/upcycle.json").read_text())
    assert record["moe_config"]["route_by"] == "image"
    assert record["router_start"]["kind"] == "cluster"
    for shares in record["router_start"]["shares"].values():
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0
    assert record["step0_gap"]["max_logit"] < 1e-5
    assert cli("upcycle", dense, "--out", "other", *options[:4]).code == 0
    nets = [load_model(name).net for name in ("moe", "other")]
    assert [from_clusters(net) for net in nets] == [True, False]
    started, random = (net.state_dict() for net in nets)
    different = {name for name, value in started.items() if not torch.equal(value, random[name])}
    assert different == {"blocks.1.mlp.router.weight", "blocks.3.mlp.router.weight"}


def test_the_first_blocks(cli, dense):
    """Five of six blocks: the FLOPs and outputs of those five."""
    options = (
        "--num-experts",
        "4",
        "--depth",
        "5",
        "--layers",
        "1,3",
    )
    outcome = succeeded(cli("upcycle", dense, "--out", "first", *options))
    assert_names(outcome.out, "4 experts of 128", "top_k 1")
    net = load_model("first").net
    assert (len(net.blocks), net.moe_config["expert_hidden"]) == (5, 128)
    record = json.loads(Path("first/upcycle.json").read_text())
    assert record["step0_gap"]["max_logit"] < 1e-5
    assert (
        record["costs"]["before"]["flops_per_image"] == record["costs"]["after"]["flops_per_image"]
    )
