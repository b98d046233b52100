"""`surgery`: what it measures, that it measures on other images than it decides on, and what it refuses."""

import csv
import json
import shutil

import pytest
import torch

from moevision.analysis.collect import network_input
from moevision.analysis.images import pictures_for, read_images
from moevision.layers import forward_routing, moe_layers
from moevision.models.io import load_model


def refused(outcome, *words):
    assert (outcome.code, outcome.out) == (2, "")
    for word in words:
        assert word in outcome.err
    assert outcome.err.count("\n") == 1


def held_out(run, split):
    """The network's input, the labels and the names of a run's images."""
    model = load_model(str(run))
    pictures = pictures_for(str(run), model, split=split)
    indices = range(len(pictures))
    labels = torch.tensor([pictures.label(index) for index in indices])
    names = [pictures.picture_name(index) for index in indices]
    return network_input(model, read_images(pictures, indices)), labels, names


@pytest.fixture(scope="module")
def pruned(cli, tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("surgery") / "pruned"
    outcome = cli("surgery", tiny_run, "--prune", 1, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    return out, json.loads((out / "surgery.json").read_text()), outcome.out


def test_the_new_model_is_there(pruned):
    out, record, _ = pruned
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "surgery.json"}
    net = load_model(str(out)).net
    assert [layer.router.num_experts for layer in moe_layers(net)] == [3, 3]
    assert load_model(str(out)).class_names == ["cat", "dog"]
    assert record["operation"] == {"kind": "prune", "amount": 1, "align": True}
    assert record["provenance"]["command_line"].startswith("moevision surgery ")
    assert "code" in record["provenance"]


def test_accuracy_is_that_of_the_test_pictures(pruned, tiny_run):
    out, record, _ = pruned
    images, labels, _ = held_out(tiny_run, "test")
    with torch.inference_mode():
        correct = [load_model(str(place)).net(images).argmax(-1) == labels for place in (tiny_run, out)]
    found = record["accuracy"]
    assert found["n"] == len(labels)
    assert [found[name]["correct"] for name in ("before", "after")] == [int(hits.sum()) for hits in correct]
    difference = found["difference"]
    assert difference["only_a"] == int((correct[1] & ~correct[0]).sum())  # right after the operation only
    assert difference["only_b"] == int((correct[0] & ~correct[1]).sum())
    assert difference["difference"] == pytest.approx(found["after"]["top1"] - found["before"]["top1"])
    assert difference["low"] <= difference["difference"] <= difference["high"]


def test_the_control_is_the_model_without_its_experts(pruned, tiny_run):
    """Output weights and biases of 0 leave nothing of an expert."""
    net = load_model(str(tiny_run)).net
    for layer in moe_layers(net):
        for parameter in layer.experts.fc2.parameters():
            parameter.data.zero_()
    images, labels, _ = held_out(tiny_run, "test")
    with torch.inference_mode():
        correct = int((net(images).argmax(-1) == labels).sum())
    assert pruned[1]["accuracy"]["without"]["correct"] == correct
    assert "no MoE layers" in pruned[2]


def test_experts_are_chosen_on_the_validation_pictures(pruned, tiny_run):
    """None of which is a test image; the run's own split says which they are."""
    _, record, _ = pruned
    with (tiny_run / "splits.csv").open() as file:
        split_of = {row["path"]: row["split"] for row in csv.DictReader(file)}
    images, _, names = held_out(tiny_run, "val")
    assert {split_of[name] for name in names} == {"val"}
    with torch.inference_mode():
        _, routings = forward_routing(load_model(str(tiny_run)).net, images)
    for routing in routings:
        layer = record["use"]["layers"][str(routing.layer)]
        assert layer["counts"] == routing.counts().tolist()
        least = layer["counts"][::-1].index(min(layer["counts"]))  # of equal ones the later
        assert layer["kept"] == [expert for expert in range(4) if expert != 3 - least]
    assert "val set" in record["use"]["pictures"]
    assert "test set" in record["accuracy"]["pictures"]


def test_costs_are_counted(pruned):
    """One of four experts (hidden 64, D 32) and its two router rows less in each of two layers; a token still has 2."""
    _, record, out = pruned
    before, after = record["costs"]["before"], record["costs"]["after"]
    expert = 2 * 32 * 64 + 64 + 32
    assert before["total_parameters"] - after["total_parameters"] == 2 * (expert + 2 * 32)
    assert before["active_parameters"] - after["active_parameters"] == 2 * (2 * 32)
    assert before["flops_per_image"] == after["flops_per_image"]
    for number in (before["total_parameters"], after["active_parameters"]):
        assert f"{number:,}" in out


@pytest.mark.parametrize("options", [("--merge", 2), ("--merge", 2, "--no-align"), ("--collapse", "average")])
def test_other_operations(cli, tiny_run, tmp_path, options):
    outcome = cli("surgery", tiny_run, *options, "--out", tmp_path / "new", "--limit", 6, "--use-limit", 4)
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads((tmp_path / "new" / "surgery.json").read_text())
    assert record["accuracy"]["n"] == 6
    assert record["operation"]["align"] == ("--no-align" not in options)
    layers = moe_layers(load_model(str(tmp_path / "new")).net)
    if options[0] == "--collapse":
        assert layers == []
        assert cli("info", tmp_path / "new").code == 0
    else:
        assert [layer.router.num_experts for layer in layers] == [2, 2]
        for layer in record["use"]["layers"].values():
            assert sorted(expert for group in layer["groups"] for expert in group) == [0, 1, 2, 3]


def test_what_a_folder_holds_is_not_lost(cli, tiny_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "surgery.json").write_text("old")
    command = ("surgery", tiny_run, "--collapse", "most_used", "--out", tmp_path, "--limit", 4)
    refused(cli(*command), "is there already", "--force")
    assert (tmp_path / "surgery.json").read_text() == "old"
    assert cli(*command, "--force").code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "surgery.json").read_text())["operation"]["amount"] == "most_used"
    assert len(list(tmp_path.iterdir())) == 4  # nothing temporary is left


def test_a_model_without_its_run_needs_data(cli, tiny_run, drawn_pets, tmp_path, draw):
    model = shutil.copytree(tiny_run / "model", tmp_path / "model")
    command = ("surgery", model, "--prune", 1, "--out", tmp_path / "new")
    refused(cli(*command), "say which, with --data")
    assert cli(*command, "--data", drawn_pets).code == 0
    foxes = draw(tmp_path / "foxes", ("fox", "owl"))
    refused(cli(*command, "--data", foxes, "--force"), "fox, owl", "cat, dog", "data of the model's classes")


def test_refusals_leave_nothing(cli, tiny_run, tmp_path):
    out = tmp_path / "new"
    refused(cli("surgery", tiny_run, "--prune", 3, "--out", out), "a token takes 2: leave at least 2")
    refused(cli("surgery", tiny_run, "--merge", 1, "--out", out), "or collapse the model")
    refused(cli("surgery", tiny_run / "twin", "--prune", 1, "--out", out), "not a dense one")
    refused(cli("surgery", "runs/nowhere", "--prune", 1, "--out", out), "There is no model")
    for options in (("--prune", 1), ("--collapse", "most_used")):
        refused(cli("surgery", tiny_run, *options, "--no-align", "--out", out), "average nothing")
    same = ("--split", "val", "--use-split", "val")
    refused(cli("surgery", tiny_run, "--prune", 1, "--out", out, *same), "never choose on the set that is reported")
    assert not out.exists()


@pytest.mark.parametrize(
    "options", [(), ("--prune", 1, "--merge", 2), ("--prune", 0), ("--collapse", "best"), ("--prune", "two")]
)
def test_one_operation_is_asked_for(options, cli, tiny_run, tmp_path):
    outcome = cli("surgery", tiny_run, "--out", tmp_path / "new", *options)
    assert outcome.code == 2
    assert "moevision surgery: error:" in outcome.err
    assert not (tmp_path / "new").exists()
