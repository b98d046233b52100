"""`fit FOLDER --pretrained ...`: what is chosen, asked, fetched and refused, with a hub of our own on this computer."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file

from moevision import UserError
from moevision.config import flatten, parse_args
from moevision.layers import moe_layers
from moevision.models.convert import routes_read
from moevision.models.io import PATIENCE_S, describe, from_clusters, load_model, save_model
from moevision.train import health, start
from moevision.train.recipe import (
    choose_recipe,
    read_request,
    resolve_settings,
    resumed_settings,
    weights_alone,
)
from moevision.train.start import AUTO, NONE, choose_start, pretrained_options
from tests.models.fake_hub import FakeHub, fake_hub
from tests.shared import assert_names, succeeded

ROOT = Path(__file__).parents[2]
NAME = "test_vit.r160_in1k"
REPOSITORY = f"timm/{NAME}"
IMAGES = 500


@pytest.fixture(autouse=True)
def one_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny model is all there is to choose; the hub's cache is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "fitting", lambda images: [NAME])
    monkeypatch.setattr(start, "_on_terminal", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the weights of `NAME`."""
    torch.manual_seed(0)
    with fake_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        address = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        running.private[REPOSITORY] = False
        weights = save(timm.create_model("test_vit").state_dict())
        running.files[REPOSITORY] = {"model.safetensors": weights}
        yield running


def typed(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """A terminal at which somebody types these answers."""
    waiting = list(answers)
    monkeypatch.setattr(start, "_on_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", lambda *_: waiting.pop(0))
    return waiting


def test_without_a_terminal_nothing_is_downloaded(hub):
    weights, said = choose_start(None, IMAGES)
    assert weights is None
    assert hub.asked == []
    assert "start: from scratch" in said
    assert "--pretrained auto" in said


def test_auto_downloads_once(hub, capsys):
    found, line = choose_start(AUTO, IMAGES)
    assert found.source == NAME
    size = len(hub.files[REPOSITORY]["model.safetensors"]) / 1e6
    said = capsys.readouterr().err
    assert f"downloading {NAME} from {REPOSITORY}, {size:.1f} MB, licence apache-2.0" in said
    assert "500 images are few" in line
    asked = len(hub.asked)
    again, line = choose_start(None, IMAGES)  # from the cache: nobody is asked
    assert again is not None
    assert len(hub.asked) == asked
    assert "the hub's cache" in line


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write in small pieces, as of a large file, and don't wait between two tries."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def test_a_download_that_is_given_up_leaves_nothing_half(hub, monkeypatch):
    impatient(monkeypatch)
    hub.breaks[:] = [100_000] + [0] * 20
    with pytest.raises(UserError, match=r"broke off .*same command again"):
        choose_start(AUTO, IMAGES)
    assert hub.ranges[1:] == ["bytes=100000-"] * 5
    assert choose_start(None, IMAGES).weights is None  # nothing that looks whole is in the cache
    hub.breaks.clear()
    assert choose_start(AUTO, IMAGES).weights is not None
    torch.manual_seed(0)
    expected = timm.create_model("test_vit").state_dict()
    loaded = start.create_from(NAME).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("nobody", ["refuses", "is silent", "HF_HUB_OFFLINE"])
def test_offline_is_known_within_three_seconds(nobody, monkeypatch):
    import socket

    silent = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    port = silent.getsockname()[1] if nobody == "is silent" else 9
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    if nobody == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with silent, pytest.raises(UserError) as stopped:
        choose_start(AUTO, IMAGES)
    assert time.monotonic() - began < PATIENCE_S + 2  # two seconds for a busy machine
    said = str(stopped.value)
    assert nobody != "HF_HUB_OFFLINE" or nobody in said
    download = f"hf download {REPOSITORY} config.json model.safetensors --local-dir"
    assert_names(said, "--pretrained auto", "be reached", download, f"--pretrained {NONE}")


def test_who_named_weights_is_stopped_by_a_hub_that_cannot_be_reached(monkeypatch):
    """With a configuration, too; at a terminal nobody is who asked for none."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hf download"):
        weights_alone(AUTO, {})
    with pytest.raises(UserError, match="can't be reached"):
        choose_start(NAME, IMAGES)
    monkeypatch.setattr(start, "_on_terminal", lambda: True)
    weights, said = choose_start(None, IMAGES)
    assert weights is None
    assert_names(said, "start: from scratch", "be reached")


def test_what_the_hub_s_own_program_fetched_is_a_start(hub, drawn_pets, tmp_path):
    """The folder that the error of `auto` asks for: the hub's config.json and weights, in timm's form."""
    net = timm.create_model("test_vit")
    (tmp_path / "weights").mkdir()
    config = {"architecture": "test_vit", "num_classes": 1000, "num_features": 64}
    preprocessing = {"input_size": [3, 160, 160], "license": "apache-2.0", "num_classes": 1000}
    text = json.dumps(config | {"pretrained_cfg": preprocessing})
    (tmp_path / "weights" / "config.json").write_text(text)
    save_file(net.state_dict(), tmp_path / "weights" / "model.safetensors")
    recipe = resolved(drawn_pets, "--pretrained=weights")
    assert recipe["model.arch.pretrained"] == "weights"
    assert hub.asked == []


def test_what_cannot_become_experts_is_not_even_downloaded(hub):
    with pytest.raises(UserError, match=r"ResNet .* transformer blocks"):
        choose_start("resnet18", IMAGES)
    assert hub.asked == []


def test_a_licence_that_is_not_free_must_be_named(hub):
    hub.licence = "cc-by-nc-4.0"
    with pytest.raises(UserError, match=f"cc-by-nc-4.0.*--pretrained {NAME}"):
        choose_start(AUTO, IMAGES)
    assert hub.ranges == []  # nothing was fetched
    named, said = choose_start(NAME, IMAGES)
    assert named is not None
    assert_names(said, "licence cc-by-nc-4.0", "which restricts")


def test_what_is_lost_is_what_the_records_say():
    """Said where nothing could be had, not to who wants to start from scratch."""
    seeds = {
        "pretrained": ("folder-clusters", "folder-clusters-s1", "folder-clusters-s2"),
        "scratch": ("folder-none",),
    }
    lines = (ROOT / "benchmarks" / "accuracy" / "runs.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    tests = {
        start: [record["test"] for record in records if record["name"] in names]
        for start, names in seeds.items()
    }
    pretrained, scratch = (
        f"{100 * sum(test['correct'] for test in of) / sum(test['total'] for test in of):.0f} %"
        for of in tests.values()
    )
    assert (
        f"reached {pretrained}, training from scratch {scratch}." in choose_start(None, IMAGES).line
    )
    assert choose_start(NONE, IMAGES) == (None, "")


def test_yes_at_a_terminal(hub, monkeypatch, capsys):
    waiting = typed(monkeypatch, "")
    found = choose_start(None, IMAGES).weights
    assert found.source == NAME
    assert waiting == []
    question = capsys.readouterr().err
    assert_names(question, "500 images", f"Start from {NAME} (", "MB, licence apache-2.0)")


def test_no_at_a_terminal_and_another_choice(hub, monkeypatch, tmp_path):
    typed(monkeypatch, "n")
    assert choose_start(None, IMAGES).weights is None
    assert hub.ranges == []
    save_model(describe(timm.create_model("test_vit", num_classes=2)), tmp_path / "dense")
    typed(monkeypatch, "dense")
    found = choose_start(None, IMAGES).weights
    assert found.source == "dense"


@pytest.fixture
def weight_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {
        name: value.half()
        for name, value in timm.create_model("test_vit", num_classes=0).state_dict().items()
    }
    about = {"architecture": "test_vit", "source": "drawn at random", "license": "mit"}
    save_file(state, tmp_path / "weights.safetensors", about)
    return tmp_path / "weights.safetensors"


def recipe(folder: Path, pretrained: str | None, *typed: str) -> dict[str, Any]:
    return choose_recipe(str(folder), pretrained, parse_args("fit", typed).options)


def resolved(*arguments: object) -> dict[str, Any]:
    settings = resolve_settings(read_request("fit", parse_args("fit", list(map(str, arguments)))))
    return flatten(asdict(settings))


def test_a_file_of_weights(weight_file, drawn_pets, capsys):
    found = recipe(drawn_pets, str(weight_file))
    assert found["model.arch.pretrained"] == str(weight_file)
    assert found["model.arch.base"] == "test_vit"
    assert (found["model.arch.moe_layers"], found["model.arch.top_k"]) == ("last2", 1)
    assert found["model.arch.global_pool"] == "avg"
    assert found["model.optim.lr"] == 3e-4
    assert "model.arch.name" not in found
    assert found["router_start"] == "cluster"
    other = recipe(drawn_pets, str(weight_file), "--model.arch.router", "expert_choice")
    assert "router_start" not in other, "which has no row for each expert"
    said = capsys.readouterr().err
    assert_names(said, "weights.safetensors as test_vit", "licence mit", "drawn at random")


def test_sizes_follow_device_and_weights(monkeypatch):
    def side(name: str, **options: Any) -> int:
        return int(
            start.image_side(timm.create_model(name, **options), options.get("img_size", 224))
        )

    monkeypatch.setattr(start, "has_gpu", lambda: False)
    assert side("vit_tiny_patch16_224") == 112
    assert side("test_vit", img_size=96) == 96  # never larger than the weights know
    monkeypatch.setattr(start, "has_gpu", lambda: True)
    assert side("vit_tiny_patch16_384", img_size=384) == 224


def test_colours_and_heads_of_the_weights():
    """AugReg's colours, not ImageNet's; a distilled DeiT can't pool, and keeps its last block dense."""
    augreg = start.StartWeights("x", None, timm.create_model("vit_tiny_patch16_224", num_classes=0))
    assert pretrained_options(augreg, IMAGES)["data.mean"] == [0.5, 0.5, 0.5]
    distilled = start.StartWeights("x", None, timm.create_model("deit_tiny_distilled_patch16_224"))
    options = pretrained_options(distilled, IMAGES)
    assert options["model.arch.moe_layers"] == [7, 9]
    assert "model.arch.global_pool" not in options
    assert "data.mean" not in options


@pytest.mark.parametrize(("images", "epochs"), [(100, 20), (800, 10), (2_880, 3), (20_000, 3)])
def test_epochs_follow_the_number_of_images(monkeypatch, images, epochs):
    monkeypatch.setattr(start, "has_gpu", lambda: False)
    assert start.epochs_for(images) == epochs


def test_a_slow_cpu_gets_the_smaller_model_and_a_gpu_of_12_gib_the_larger_one(monkeypatch):
    """Torch sees 11.75 of them."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for threads, images, expected in (
        (4, 2_000, start.SMALL),
        (1, 19_000, start.TINY),
        (64, 19_000, start.SMALL),
    ):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert start.fitting(images)[0] == expected
    monkeypatch.setattr(start, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for gib, expected in ((11.75, start.BASE), (10.75, start.SMALL)):
        seen = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, seen=seen: seen)
        assert start.fitting(IMAGES)[0] == expected


def test_who_names_a_model_is_not_asked(drawn_pets, hub, monkeypatch):
    typed(monkeypatch)  # an answer would be an IndexError
    monkeypatch.setattr("moevision.train.recipe.available_memory_bytes", lambda: 2**30)
    deeper = recipe(drawn_pets, None, "--model.arch.depth", "4")
    assert deeper["model.arch.name"].startswith("vit_moe_hybrid")
    assert deeper["model.optim.name"] == "muon"
    named = recipe(drawn_pets, None, "--model.arch.name=test_vit_moe")
    assert not {"model.arch.name", "model.optim.name", "model.arch.pretrained"} & named.keys()
    assert (named["data.image_size"], named["model.arch.patch_size"]) == (
        64,
        8,
    )  # one choice: 64 tokens
    sized = ["--model.arch.name=vit_moe_base_patch16_224", "--data.image_size", "224"]
    assert "model.arch.patch_size" not in recipe(drawn_pets, None, *sized)
    assert choose_recipe("synthetic_pets") == choose_recipe("synthetic_pets", NONE)
    assert choose_recipe("imagenet") == choose_recipe(
        "imagenet", NONE
    )  # 1.3 million are enough to learn from
    assert hub.asked == []


def test_the_command_line(own_folder):
    run = Path("run")
    run.mkdir()
    (run / "config.yaml").write_text("model: {arch: {pretrained: x}}")
    goes_on = read_request("fit", parse_args("fit", ["--pretrained=auto", "--resume=run"]))
    recorded, resumed = resumed_settings(goes_on)
    assert recorded == resumed, "it has chosen its start"
    assert resolved("--config=quickstart", "--pretrained=none") == resolved("quickstart") | {
        "model.arch.pretrained": None
    }


def test_a_dataset_with_a_recipe_from_scratch_gets_another_for_pretrained_weights(weight_file):
    """configs/imagenette.yaml is a hybrid under Muon: neither is for a ViT that was trained already."""
    for from_scratch in (resolved("imagenette"), resolved("imagenette", "--pretrained=none")):
        assert from_scratch["model.arch.name"] == "vit_moe_hybrid_patch16_128"
    found = resolved("imagenette", f"--pretrained={weight_file}")
    assert found["model.arch.name"] is None
    assert (found["model.optim.layer_decay"], found["data.download"]) == (0.75, True)
    assert found["data.path"] == "imagenette"


def test_fit_trains_from_a_download_that_broke_off(cli, drawn_pets, hub, monkeypatch):
    """The hub is asked for the rest, and the training starts from the whole of what it sent."""
    impatient(monkeypatch)
    hub.breaks[:] = [100_000]
    options = (
        "--trainer.max_epochs=1",
        "--trainer.precision=32-true",
        "--data.image_size=32",
        "--name=run",
    )
    done = succeeded(
        cli(
            "fit", drawn_pets, "--pretrained", NAME, *options, "--trainer.enable_progress_bar=false"
        )
    )
    assert hub.ranges == ["", "bytes=100000-"]
    assert f"start: {NAME} (" in done.err
    provenance = json.loads(Path("runs/run/provenance.json").read_text())
    sent = hub.files[REPOSITORY]["model.safetensors"]
    assert provenance["run"]["pretrained_sha256"] == hashlib.sha256(sent).hexdigest()
    assert load_model("runs/run/model").class_names == ["cat", "dog"]


@pytest.fixture
def long_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each probe takes 1000 s of the clock and of the CPU."""
    passed_s: list[int] = []
    regression, now, cpu_s = start._best_regression, time.monotonic, health.cpu_s
    monkeypatch.setattr(
        start, "_best_regression", lambda *given: passed_s.append(1000) or regression(*given)
    )
    clock = SimpleNamespace(monotonic=lambda: now() + sum(passed_s), process_time=time.process_time)
    monkeypatch.setattr(health, "time", clock)
    monkeypatch.setattr(health, "cpu_s", lambda: cpu_s() + sum(passed_s))


@pytest.mark.usefixtures("long_probe")
def test_fit_from_a_file_with_its_twin(cli, drawn_pets, weight_file, tmp_path):
    """Probe, head, experts whose routes all count, and one table that says which model to use.

    Experts are no exact copies, so that their features aren't those of the weights, which the probe is of.
    """
    options = [
        "--model.arch.upcycle_reinit=0.5",
        "--trainer.max_epochs=1",
        "--trainer.precision=32-true",
    ]
    options += [
        "--data.test_fraction=0.3",
        "--trainer.enable_progress_bar=false",
        "--data.image_size=32",
        "--name=run",
    ]
    outcome = succeeded(
        cli("fit", drawn_pets, "--pretrained", weight_file, "--with-twin", *options)
    )
    assert outcome.err.count("start: ") == 1  # no twin's
    (line,) = re.findall(r"^linear probe: .*$", outcome.out, re.M)[:1]
    assert outcome.out.count("routers start from") == 1  # no twin's
    assert "router_start: cluster" in Path("runs/run/config.yaml").read_text()
    probe = json.loads(Path("runs/run/probe.json").read_text())
    assert len(probe["test_correct"]) == 12
    assert f"of {probe['val_images']} validation" in line
    assert json.loads(Path("runs/run/twin/probe.json").read_text()) == probe  # fitted once
    summary = json.loads(Path("runs/run/summary.json").read_text())
    for each in (summary, json.loads(Path("runs/run/twin/summary.json").read_text())):
        assert all(1000 < each[name] < 2000 for name in ("expected_s", "duration_s", "cpu_s")), (
            "the probe's time, too"
        )
    rows = summary["choice"]["contenders"]
    assert [row["name"] for row in rows] == [
        "linear probe",
        "dense fine-tune",
        "Mixture of Experts",
    ]
    assert rows[0]["correct"] == sum(probe["test_correct"].values())
    assert [row["correct"] for row in rows[1:]] == [
        summary["twin"]["correct"],
        summary["test"]["correct"],
    ]
    assert all(row["ms_per_image"] > 0 and row["mbytes"] > 0 and row["train_s"] > 0 for row in rows)
    assert rows[2]["mbytes"] > rows[1]["mbytes"] == pytest.approx(rows[0]["mbytes"], rel=0.05)
    text = Path("runs/run/summary.md").read_text()
    assert_names(text, "## Should this", "**Use ")
    net = load_model("runs/run/model").net
    assert from_clusters(net), "the model's own folder says so, for question 2 of `analyze`"
    assert [layer.layer_index for layer in moe_layers(net)] == [3, 5]
    assert routes_read(net) == [True, True]
    again = cli("fit", drawn_pets, "--pretrained", AUTO, "--resume=auto", *options)
    assert (again.code, "nothing to do" in again.err) == (0, True), (
        again.err
    )  # nor is anything chosen again


@pytest.mark.parametrize(("gpu", "device"), [(True, "a GPU."), (False, "a CPU (threads: ")])
def test_the_device_that_the_weights_suit_is_named(gpu, device, hub, monkeypatch):
    monkeypatch.setattr(start, "has_gpu", lambda: gpu)
    assert f"it suits {device}" in choose_start(AUTO, IMAGES).line
