"""Files and configurations from elsewhere: nothing in them is run, and none takes memory that it doesn't hold.

What must be refused is made here byte by byte from the format's description, not by the code under test.
"""

import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from moevision import UserError
from moevision.cli import VERBS
from moevision.commands.info import load_any
from moevision.config import MoEConfig
from moevision.demo.atlas import load_atlas
from moevision.demo.models import read_card
from moevision.models import io as models_io
from moevision.models.config import build_model
from moevision.models.io import (
    SavedModel,
    create_from,
    describe,
    load_model,
    open_model,
    save_model,
)
from moevision.models.safe_files import parse_yaml, read_config, read_header, read_json, read_yaml
from moevision.models.upcycle import load_dense
from moevision.models.vit_moe import NO_SOURCE
from moevision.train.checkpoint import load_trained
from moevision.train.recipe import read_config as read_options
from moevision.train.start import choose_start, pretrained_options
from tests.models.fake_hub import FakeHub, fake_hub
from tests.shared import refused, succeeded

Cli = Callable[..., Any]


class Payload:
    """What a malicious pickle does: call something when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("a pickle was run"),)


def evil_checkpoint(path: Path) -> Path:
    """A file as torch.save writes it, in torch's own pickle protocol, whose pickle calls a function."""
    content = {"state_dict": Payload(), "hyper_parameters": {"arch": {}}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return path


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: header's length, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(
    shape: list[object], begin: object, end: object, dtype: object = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture(autouse=True)
def _no_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In no test of this file, each in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "a pickle was run").exists()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub of our own, which the real client asks."""
    from huggingface_hub import constants

    with fake_hub() as own:
        address = f"{own.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield own


# --- pickles

ON_MODELS = ("predict", "info", "analyze", "demo", "export", "upcycle")


@pytest.mark.parametrize(
    "verb", [verb for verb in ON_MODELS if find_spec(VERBS[verb][1].split(":")[0])]
)
def test_no_verb_on_models_reads_a_pickle(verb, cli, saved_model, drawn_pets, tmp_path):
    """As a checkpoint, under timm's name for pickled weights, and under a false name."""
    evil = evil_checkpoint(tmp_path / "evil.ckpt")
    others = {"predict": [drawn_pets], "export": ["--out", "new.onnx"], "upcycle": ["--out", "new"]}
    rest = others.get(verb, [])
    refused(cli(verb, evil, *rest))
    weights = saved_model / "model.safetensors"
    weights.write_bytes(evil.read_bytes())
    refused(cli(verb, saved_model, *rest))
    weights.rename(saved_model / "pytorch_model.bin")
    refused(cli(verb, saved_model, *rest))


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_checkpoint_is_data_only(verb, cli, tiny, drawn_pets, tmp_path):
    """Even where a .ckpt is taken, nothing in it is called."""
    evil = evil_checkpoint(tmp_path / "evil.ckpt")
    refused(cli(verb, drawn_pets, *tiny, "--ckpt_path", evil), "evil.ckpt")


def test_going_on_with_a_run_never_runs_a_pickle(cli, tiny, tiny_run, drawn_pets):
    """In the place of last.ckpt; what is no checkpoint is named, and auto begins afresh."""
    run = Path("runs/pets")
    (run / "checkpoints").mkdir(parents=True)
    config = (tiny_run / "config.yaml").read_text().replace("with_twin: true", "with_twin: false")
    (run / "config.yaml").write_text(config)
    evil_checkpoint(run / "checkpoints" / "last.ckpt")
    refused(cli("fit", "--resume", run), "last.ckpt")
    outcome = succeeded(cli("fit", drawn_pets, *tiny, "--name=pets", "--resume=auto"))
    assert "last.ckpt" in outcome.err


def test_the_payload_works(tmp_path):
    """Unpickled, it does run: the tests of this file would see it."""
    torch.load(evil_checkpoint(tmp_path / "evil.ckpt"), weights_only=False)
    Path("a pickle was run").unlink()


def test_the_hub_is_asked_for_safetensors_only(hub, saved_model, tmp_path):
    """A repository that has only a pickle, then one with both."""
    config = (saved_model / "config.json").read_bytes()
    pickled = evil_checkpoint(tmp_path / "evil.bin").read_bytes()
    hub.private |= {"you/pickled": False, "you/both": False}
    hub.files["you/pickled"] = {"config.json": config, "pytorch_model.bin": pickled}
    weights = (saved_model / "model.safetensors").read_bytes()
    hub.files["you/both"] = {**hub.files["you/pickled"], "model.safetensors": weights}
    with pytest.raises(UserError, match="only safetensors are read, never pickles"):
        load_model("hf-hub:you/pickled")
    loaded, local = load_model("hf-hub:you/both").net, load_model(str(saved_model)).net
    assert all(map(torch.equal, loaded.parameters(), local.parameters()))
    assert str(tmp_path) not in json.dumps(loaded.pretrained_cfg, default=str)
    assert not any("pytorch_model" in path for _, path in hub.asked)


def test_without_the_hub_it_is_said_so(hub, saved_model, monkeypatch):
    """What the hub doesn't have; then it has gone, with nothing or only config.json in the cache."""
    hub.private |= {"you/half": False, "you/without": False}
    config = {"config.json": (saved_model / "config.json").read_bytes()}
    hub.files |= {"you/half": config, "you/without": config}
    open_model("hf-hub:you/half", weights=False)
    for name, file in (("you/without", "model.safetensors"), ("you/nothing", "config.json")):
        with pytest.raises(UserError, match=re.escape(f"{name} has no {file} on the hub")):
            load_model(f"hf-hub:{name}")

    address = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # nobody is there
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
    # its client tries six times
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    for name, file in (("you/half", "model.safetensors"), ("you/other", "config.json")):
        said = (
            f"The hub can't be reached, and {file} of {name} is not in its cache on this computer"
        )
        with pytest.raises(UserError, match=re.escape(said)):
            load_model(f"hf-hub:{name}")


def test_a_checkpoint_asks_no_hub(hub, cli, tiny, saved_model, drawn_pets):
    """A training that began on the hub keeps what its checkpoints need; of other checkpoints the cache has it, or none.

    The model's architecture stands in the hub's config.json, its weights in the checkpoint.
    """
    hub.private["you/model"] = False
    hub.files["you/model"] = {file.name: file.read_bytes() for file in saved_model.iterdir()}
    sizes = (option for option in tiny if ".arch." not in option)
    succeeded(cli("fit", drawn_pets, "--pretrained=hf-hub:you/model", *sizes))
    checkpoints = Path("runs/pets/checkpoints")
    asking = ("predict", checkpoints / "last.ckpt", next(drawn_pets.glob("cat/*")))
    with cut_off():
        succeeded(cli(*asking))
    shutil.rmtree(checkpoints / "start")  # as an earlier version left it
    with cut_off():
        succeeded(cli(*asking))
    shutil.rmtree("cache")
    with cut_off():
        outcome = cli(*asking)
    way_on = "if you trust it, fetch it by moevision info hf-hub:you/model"
    refused(outcome, "nothing is fetched for a checkpoint", way_on)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("everything", [True, False])
def test_whole_numbers_are_no_weights(saved_model, dtype, everything):
    """Neither all of them nor one; BatchNorm's counter is one, and the model loads with it."""
    file = saved_model / "model.safetensors"
    weights = load_file(file)
    assert weights["patch_embed.backbone.0.bn.num_batches_tracked"].dtype == torch.int64
    name = next(name for name in weights if name.endswith("fc1.weight"))
    save_file(
        {key: t.to(dtype) if everything or key == name else t for key, t in weights.items()}, file
    )
    for call in (
        lambda: load_model(str(saved_model)),
        lambda: create_from("test_vit_moe", weights=file),
    ):
        said = r"holds whole numbers \(\w+\), and the model has weights"
        with pytest.raises(UserError, match=said):
            call()


def test_a_timm_name_means_safetensors(tmp_path, monkeypatch):
    """Its file is fetched, checked and given to timm; what is published only as a pickle or archive is refused."""
    net = timm.create_model("test_vit", num_classes=1000)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    asked: list[tuple[str, ...]] = []

    def download(repository: str, file: str, **options: Any) -> str:
        asked.append((repository, file))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    same = open_model("test_vit.r160_in1k")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))
    known = timm.get_pretrained_cfg("test_vit.r160_in1k")
    for change in ({"hf_hub_id": None, "url": "https://x/y.pth"}, {"hf_hub_filename": "w.npz"}):
        changed = type(known)(**{**known.to_dict(), **change})
        monkeypatch.setattr(
            models_io.timm, "get_pretrained_cfg", lambda name, changed=changed: changed
        )
        with pytest.raises(
            UserError, match="not published as safetensors, and pickles are never read"
        ):
            open_model("test_vit.r160_in1k")
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    monkeypatch.setattr(models_io.timm, "get_pretrained_cfg", lambda name: known)
    with pytest.raises(UserError, match="no safetensors file"):
        open_model("test_vit.r160_in1k")


# --- safetensors


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in read_header(file).items()}


def test_a_header_says_what_safetensors_says(saved_model, tmp_path):
    """Independent source: the safetensors library; and a file without what is wrong with the bombs."""
    file = saved_model / "model.safetensors"
    assert shapes_in(file) == {name: tuple(t.shape) for name, t in load_file(file).items()}
    (tmp_path / "good.safetensors").write_bytes(tensors(GOOD, b"x" * 19))
    assert shapes_in(tmp_path / "good.safetensors") == {"a": (2, 2), "b": (3,)}


GOOD = {"a": entry([2, 2], 0, 16), "b": entry([3], 16, 19, "U8")}
BOMBS = {
    "a header of 2^62 bytes": tensors(b"{}", length=2**62),
    "a header longer than the file": tensors(b"{}", length=100),
    "no header": b"\x01",
    "nothing": b"",
    "no JSON": tensors(b"{]"),
    "no object": tensors([1]),
    "a tensor of an exabyte": tensors({"a": entry([2**30, 2**28], 0, 2**60)}, b"1234"),
    "sizes that overflow 64 bits to a small number": tensors({"a": entry([2**32, 2**32], 0, 0)}),
    "a negative size": tensors({"a": entry([-1, -1], 0, 4)}, b"1234"),
    "a broken size": tensors({"a": entry([1.0], 0, 4)}, b"1234"),
    "a switch for a size": tensors({"a": entry([True], 0, 4)}, b"1234"),
    "an unknown type": tensors({"a": entry([1], 0, 4, "F31")}, b"1234"),
    "a list for a type": tensors({"a": entry([1], 0, 4, ["F32"])}, b"1234"),
    "another size than its shape": tensors({"a": entry([2], 0, 4)}, b"1234"),
    "tensors over one another": tensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"),
    "a hidden gap": tensors({"a": entry([1], 4, 8)}, b"12345678"),
    "hidden bytes at the end": tensors(GOOD, b"x" * 40),
    "the end cut off": tensors(GOOD, b"x" * 18),
    "metadata of numbers": tensors({"__metadata__": {"a": 1}}),
    "lists in lists": tensors(b"[" * 100_000),
}


@pytest.mark.parametrize("what", BOMBS)
def test_header_bombs(what, saved_model):
    weights = saved_model / "model.safetensors"
    weights.write_bytes(BOMBS[what])
    with pytest.raises(UserError, match=r"can't be loaded|damaged|values"):
        read_header(weights)
    with pytest.raises(UserError, match=r"can't be loaded|damaged|values"):
        load_model(str(saved_model))


EXPERTS, VARIANCE = "blocks.1.mlp.experts.fc1.weight", "patch_embed.backbone.0.bn.running_var"


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (EXPERTS, math.nan, f"its weight {EXPERTS} holds NaN or infinity"),
        # BatchNorm takes its square root: every answer would be NaN.
        (VARIANCE, -1, f"its variance {VARIANCE} is negative"),
    ],
)
def test_weights_that_give_no_numbers_are_refused(name, value, said, saved_model):
    weights = load_file(saved_model / "model.safetensors")
    weights[name].view(-1)[5] = value
    save_file(weights, saved_model / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(said)):
        load_model(str(saved_model))


# --- config.json


def change_config(folder: Path, where: str = "", **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[where] if where else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


HUGE: dict[str, dict[str, object]] = {
    "experts": {"num_experts": 60_000, "expert_hidden": 60_000},
    "more experts than numbers have digits": {"num_experts": 10**30},
    "width": {"embed_dim": 32_768},
    "depth": {"depth": 10**9},
    "picture": {"img_size": [10**6, 10**6]},
    "tokens": {"img_size": 4096, "patch_size": 1},
    "classes": {"num_classes": 10**9},
    "hidden": {"mlp_ratio": 1e30},
}


@pytest.mark.parametrize("what", HUGE)
def test_a_config_takes_no_more_memory_than_its_weights(what, saved_model):
    """The limit of the process would stop the allocation, and with it the test: 700 MB for what holds 0.1 million."""
    change_config(saved_model, "model_args", **HUGE[what])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20, hard))
    try:
        with pytest.raises(UserError, match="can't be loaded"):
            load_model(str(saved_model))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


FOREIGN: list[tuple[str, dict[str, object], str]] = [
    ("", {"architecture": "../../evil"}, "is no architecture's name"),
    ("", {"architecture": "hf-hub:evil/model"}, "is no architecture's name"),
    (
        "model_args",
        {"num_classes": 5},
        "two numbers of classes",
    ),  # the form of 0.1 gave it here, too
    ("", {"num_classes": 5}, ""),
    ("", {"label_names": {"first": "cat"}}, ""),
    ("", {"model_args": []}, "config.json can't be loaded"),
    ("", {"pretrained_cfg": "none"}, "config.json can't be loaded"),
    ("model_args", {"base": "hf-hub:evil/model"}, "is no architecture's name"),
    ("model_args", {"base": "local-dir:/tmp/evil"}, "is no architecture's name"),
    ("model_args", {"checkpoint_path": "evil.pth"}, "may not hold 'checkpoint_path'"),
    ("model_args", {"pretrained_cfg_overlay": {"file": "evil.pth"}}, "may not hold"),
    ("model_args", {"features_only": True}, "may not hold"),
    ("model_args", {"in_chans": 1}, ""),
    ("pretrained_cfg", {"state_dict": {}}, "state_dict"),
]


@pytest.mark.parametrize(("where", "changes", "words"), FOREIGN)
def test_what_a_config_may_not_say(where, changes, words, saved_model):
    change_config(saved_model, where, **changes)
    with pytest.raises(UserError, match=r"can't be (loaded|used)") as caught:
        load_model(str(saved_model))
    assert words in str(caught.value)
    if words:
        with pytest.raises(UserError):
            create_from(saved_model, load_weights=False)


NO_COLOURS: list[object] = [[0, 0.2], [0.2] * 4, ["a", "b", "c"], [None] * 3, {"a": 1}, "abc", 0.5]
NO_COLOURS += [[[1]] * 3, [math.nan, 1, 1], [1e30] * 3]
NO_DEVIATIONS = [[0, 0.2, 0.2], [-0.2, 0.2, 0.2], [1e-30, 1, 1]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("mean", "std") for value in NO_COLOURS),
        *(("std", value) for value in NO_DEVIATIONS),
    ],
)
def test_colours_that_are_none_are_refused(name, value, saved_model):
    change_config(saved_model, "pretrained_cfg", **{name: value})
    said = f"can't be used: its {name} is .* and must be three numbers"
    with pytest.raises(UserError, match=said):
        load_model(str(saved_model))


@pytest.mark.parametrize("side", [0, -32, 4097, 224.5, "x", None])
def test_a_side_that_no_image_has_is_refused(side, tmp_path):
    """A convolutional network takes any side, and a large one would take memory that no file holds."""
    net = timm.create_model("test_resnet", num_classes=2)
    save_model(SavedModel(net, ["a", "b"], 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), tmp_path)
    assert load_model(str(tmp_path)).image_size == 32
    change_config(tmp_path, "pretrained_cfg", input_size=[3, side, side])
    with pytest.raises(
        UserError, match=r"The model takes images of .* px: a side is a whole number from 1 to 4096"
    ):
        load_model(str(tmp_path))


def test_whole_numbers_are_colours(saved_model):
    """As a person writes them."""
    change_config(saved_model, "pretrained_cfg", mean=[0, 0, 0], std=[1, 1, 1])
    saved = load_model(str(saved_model))
    assert (saved.mean, saved.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


# What is just allowed, and what is not any more; the shortest form that timm takes has all fields in one object.
LIMITS: list[tuple[dict[str, object], dict[str, object], str]] = [
    (
        {"model_args": {"depth": 512}},
        {"model_args": {"depth": 513}},
        "model_args.depth has more than 512 layers",
    ),
    ({}, {"state_dict": {}}, "weights stand in it"),
    ({"pretrained_cfg": {}}, {"pretrained_cfg": {}, "state_dict": {}}, "weights stand in it"),
    # Without a number of classes timm builds a model of 1000.
    (
        {"model_args": {"num_classes": 1000}},
        {"model_args": {"num_classes": 1001}},
        "two numbers of classes",
    ),
]


@pytest.mark.parametrize(("allowed", "too_much", "words"), LIMITS)
def test_where_a_config_becomes_too_much(allowed, too_much, words, tmp_path):
    file = tmp_path / "config.json"
    for changes in (allowed, too_much):
        config = {"architecture": "test_vit", **changes}
        file.write_text(json.dumps(config))
        if changes is allowed:
            assert read_config(file) == config
    with pytest.raises(UserError, match=re.escape(words)):
        read_config(file)
    assert timm.create_model("test_vit").num_classes == 1000, (
        "without a number, as read_config takes it"
    )


def test_where_weights_are_said_to_lie_is_not_looked_at(saved_model):
    """The folder's own safetensors are read, whatever config.json says about files and addresses."""
    sources = hostile_sources(saved_model)
    evil_checkpoint(Path(str(sources["file"])))
    del sources["state_dict"]  # weights in it are refused
    expected = load_model(str(saved_model)).net.state_dict()
    change_config(saved_model, "pretrained_cfg", **sources)
    found = load_model(str(saved_model)).net.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_names_cannot_steer_a_terminal(saved_model):
    change_config(saved_model, label_names=["\x1b[2Jcat", "dog\u202egod"])
    assert load_model(str(saved_model)).class_names == ["\\x1b[2Jcat", "dog\\u202egod"]


ODD: list[object] = [None, True, -1, 0, 3, 10**9, 2**70, 1e308, "", "x", "hf-hub:a/b", [], [1]]
ODD += [{"a": 1}, [64, 32], [[[[[[1]]]]]]]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for key, each in inner for found in places(each, (*path, key)))]


def opened(folder: Path) -> SavedModel | None:
    """None if it is refused."""
    try:
        return load_model(str(folder))
    except UserError:
        return None


def test_a_mutated_config_gives_a_model_or_a_user_error(saved_model):
    """Any value anywhere; a model that loads also takes an image."""
    rng, file = random.Random(0), saved_model / "config.json"
    kept, refusals = file.read_text(), 0
    paths = [path for path in places(json.loads(kept)) if path]
    for _ in range(40):
        config = json.loads(kept)
        *above, last = rng.choice(paths)
        target = config
        for key in above:
            target = target[key]
        target[last] = rng.choice(ODD)
        file.write_text(json.dumps(config))
        model = opened(saved_model)
        refusals += model is None
        if model is not None:
            logits = model.net(torch.zeros(1, 3, model.image_size, model.image_size))
            assert logits.shape == (1, len(model.class_names))
    assert 12 <= refusals < 40


@pytest.mark.deep
def test_a_mutated_weights_file_gives_a_model_or_a_user_error(saved_model):
    """Flipped, cut and inserted bytes, most of them in the header."""
    rng, weights = random.Random(0), saved_model / "model.safetensors"
    kept = weights.read_bytes()
    header = 8 + int.from_bytes(kept[:8], "little")
    refusals = 0
    for _ in range(150):
        data = bytearray(kept)
        place = rng.randrange(header if rng.random() < 0.9 else len(data))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + rng.randrange(1, 9)]
            case _:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
        weights.write_bytes(data)
        refusals += opened(saved_model) is None
    assert refusals >= 100


# --- no way to the network

REACHED: list[str] = []
"""Addresses that were asked, programs that were started and forbidden files that were opened while a test watched."""
_WATCHED = {
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "subprocess.Popen",
    "os.system",
    "os.exec",
}
_watching = False
ELSEWHERE = "elsewhere"  # in the name of files that nothing may open


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    """Python's audit hook: it can't be taken out again, and so does nothing while no test watches."""
    opens_elsewhere = event == "open" and ELSEWHERE in str(arguments[0])
    if _watching and (event in _WATCHED or opens_elsewhere):
        REACHED.append(f"{event} {arguments[:2]}")
        raise PermissionError(f"a test forbids {event}")


sys.addaudithook(_watch)


@contextmanager
def cut_off() -> Iterator[None]:
    """Fail if anything asks an address, starts a program or opens a file `elsewhere`, even if it bears the refusal."""
    global _watching
    REACHED.clear()
    _watching = True
    try:
        with patch(
            "huggingface_hub.constants.HF_HUB_OFFLINE", False
        ):  # another test may have set it
            yield
    finally:
        _watching = False
        assert not REACHED  # in place of the error that the refusal became


def hostile_sources(folder: Path) -> dict[str, object]:
    """What a config.json may say about the place of its weights, by the fields that timm has for it."""
    return {
        "url": "http://127.0.0.1:9/alexnet-owt-7be5be79.pth",
        "hf_hub_id": "evil/model",
        "hf_hub_filename": "pytorch_model.bin",
        "custom_load": True,
        "file": str(folder.parent / f"{ELSEWHERE}.safetensors"),
        "source": "hf-hub",
        "state_dict": {"head.weight": [1.0]},
    }


def test_timm_has_no_place_of_weights_that_is_not_known_here():
    """Its own list of them, and all fields of its description that `has_weights` or a loader reads."""
    from timm.models._builder import _PRETRAINED_SOURCE_KEYS

    assert {*_PRETRAINED_SOURCE_KEYS, "source", "state_dict", "custom_load"} == {*NO_SOURCE}
    assert {*NO_SOURCE} == {*hostile_sources(Path())}
    assert not timm.models.PretrainedCfg(**NO_SOURCE).has_weights


def dense_source(address: str) -> None:
    """What `upcycle` reads: the model, and how it sees images."""
    describe(load_dense(address, None, num_classes=None, image_size=None, depth=None, seed=0))


def pretrained_start(address: str) -> None:
    """What `fit --pretrained` does with an address: choose options by the model, build it, load its weights."""
    weights = choose_start(address, 40)[0]
    assert weights is not None
    options = pretrained_options(weights, 40)
    arch = MoEConfig(pretrained=address, moe_layers=options.get("model.arch.moe_layers"))
    build_model(arch, 5, int(options["data.image_size"]))


# How each verb opens a model.
OPENS: dict[str, Callable[[str], object]] = {
    "predict, export": load_trained,
    "info": load_any,
    "analyze, demo": load_model,
    "upcycle": dense_source,
    "fit --pretrained": pretrained_start,
}
ODD_NUMBERS: list[object] = [None, True, -1, 0, 0.5, 3, 7, 1e9, 1e308, 2**70, math.nan, "x", []]
ODD_NUMBERS += [[1], [1, 2]]
NUMBERS = ["mean", "std", "input_size", "test_input_size", "crop_pct", "interpolation", "in_chans"]
NUMBERS += ["crop_mode", "num_classes", "first_conv", "classifier", "label_offset", "pool_size"]
NUMBERS += ["fixed_input_size", "label_names"]
ARCHITECTURES = ["hf-hub:evil/model", "local-dir:elsewhere", "../elsewhere", "", "x", "test_vit"]
ARCHITECTURES += ["vit_moe", "resnet18", "iformer_t", "vit_tiny_patch16_224.augreg_in21k"]
# With pretrained=True timm fetches a ResNet for these two from the hub, whatever their own weights are.
ARCHITECTURES += ["vit_small_resnet50d_s16_224", "vit_base_resnet26d_224"]


def mutate_config(config: dict[str, Any], folder: Path, rng: random.Random) -> None:
    """Let a config.json name other places of weights, and often change one or two things more."""
    pretrained, arguments = config["pretrained_cfg"], config["model_args"]
    sources = hostile_sources(folder)
    for change in [0, *rng.choices(range(1, 6), k=rng.choice([0, 0, 1, 2]))]:
        match change:
            case 0 | 1:
                named = rng.sample([*sources], rng.randint(1, len(sources) - 1))
                if rng.random() < 0.8 and "state_dict" in named:
                    named.remove("state_dict")
                pretrained.update({name: sources[name] for name in named})
            case 2:
                names = (
                    "pretrained",
                    "pretrained_cfg",
                    "pretrained_cfg_overlay",
                    "checkpoint_path",
                )
                values = [*sources.values(), True, dict(sources), "hf-hub:evil/model"]
                arguments[rng.choice([*sources, *names, "base"])] = rng.choice(values)
            case 3:
                config["architecture"] = rng.choice(ARCHITECTURES)
            case 4:
                target = rng.choice([pretrained, arguments, config])
                target[rng.choice(NUMBERS)] = rng.choice(ODD_NUMBERS)
            case _:
                config["calibration"] = {"temperature": rng.choice(ODD_NUMBERS)}
                config["strangers"] = rng.random() < 0.5


def mutate_tensors(tensors: dict[str, torch.Tensor], rng: random.Random, empty: bool) -> None:
    """Take tensors away, or give one another name, shape or value; in five of twelve cases leave all."""
    names = [*tensors]
    name = rng.choice(names)
    match 0 if empty else rng.randrange(12):
        case 0 | 1:
            tensors.clear()
        case 2:
            del tensors[name]
        case 3:
            for each in rng.sample(names, len(names) // 2):
                del tensors[each]
        case 4:
            tensors["state_dict"] = tensors.pop(name)
        case 5:
            tensors[name] = torch.zeros(rng.randint(0, 3), 5)
        case 6:
            tensors[name] = torch.full_like(tensors[name], -1)
        case _:
            pass


# The first cases of a format have no weights at all, and these places for them: timm fell back on those.
FALLBACKS = (("url",), ("url", "custom_load"), ("hf_hub_id",), ("hf_hub_id", "hf_hub_filename"))


def write_mutated(kind: str, run: Path, folder: Path, case: int) -> str:
    """A mutated copy of the tiny run's model in one format; what to give a verb."""
    (folder.parent / f"{ELSEWHERE}.safetensors").touch()
    rng, empty = random.Random(f"{kind} {case}"), case < len(FALLBACKS)
    config = json.loads((run / "model" / "config.json").read_text())
    if empty:
        sources = hostile_sources(folder)
        config["pretrained_cfg"].update({name: sources[name] for name in FALLBACKS[case]})
    else:
        mutate_config(config, folder, rng)
    if kind == "checkpoint":
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        mutate_tensors(state["state_dict"], rng, empty)
        places = [None, "hf-hub:evil/model", "http://127.0.0.1:9/x", str(folder)]
        places.append(f"local-dir:{folder.parent}/elsewhere")
        arch = state["hyper_parameters"]["arch"]
        if empty:
            arch["pretrained"] = "hf-hub:evil/model"
        else:
            arch[rng.choice(["pretrained", "pretrained", "base"])] = rng.choice(places)
        if not empty and rng.random() < 0.5:
            (folder / "start").mkdir()
            (folder / "start" / "config.json").write_text(json.dumps(config))
        colours = state["moevision"]["data"]["mean_std"]
        colours[rng.randrange(2)][0] = rng.choice([0.5] * 30 + ODD_NUMBERS)
        torch.save(state, folder / "last.ckpt")
        return str(folder / "last.ckpt")
    home, tensors = folder, load_file(run / "model" / "model.safetensors")
    mutate_tensors(tensors, rng, empty)
    metadata: dict[str, str] = {}
    if kind == "rest":  # two packed files: what the second lacks is in the first
        home, first = (folder / name / "trained" for name in ("own", "first"))
        metadata["rest"] = rng.choice(["first", "first", "first", f"../{ELSEWHERE}"])
        first.mkdir(parents=True)
        home.mkdir(parents=True)
        shared = {name: tensors.pop(name) for name in [*tensors][::2]}
        save_file(shared, first / "model.int8")
    file = home / ("model.safetensors" if kind == "safetensors" else "model.int8")
    save_file({name: each.contiguous() for name, each in tensors.items()}, file, metadata or None)
    if rng.random() < 0.1:
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    (home / "config.json").write_text(json.dumps(config))
    return str(home)


def open_mutated(kind: str, cases: range, run: Path, home: Path) -> Counter[str]:
    """Open these mutated models of a format in each way; how often each opened one, or refused it."""
    outcomes: Counter[str] = Counter()
    for case in cases:
        folder = home / f"{kind}-{case}"
        folder.mkdir()
        address = write_mutated(kind, run, folder, case)
        for verb, opens in OPENS.items():
            try:
                with cut_off(), redirect_stderr(io.StringIO()):
                    opens(address)
            except UserError as error:
                outcome = "refused" if "\n" not in str(error) else "refused in several lines"
            else:
                outcome = "opened"
            outcomes[f"{verb}: {outcome}"] += 1
        shutil.rmtree(folder)
    return outcomes


KINDS = ("safetensors", "int8", "rest", "checkpoint")


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS)
def test_no_mutated_model_reaches_the_network(kind, tiny_run, tmp_path):
    """Every verb gets a model, or one sentence; `rest` stands for sharded weights, which nothing here reads."""
    outcomes = open_mutated(kind, range(6), tiny_run, tmp_path)
    assert outcomes["predict, export: refused"] >= 3
    assert outcomes.total() == 6 * len(OPENS)


def test_a_model_inside_a_model_is_not_fetched_either(tmp_path):
    """The first part of this architecture is a ResNet, which timm fetches from the hub under pretrained=True."""
    name, arguments = (
        "vit_small_resnet26d_224",
        {"embed_dim": 16, "depth": 1, "num_heads": 1, "num_classes": 2},
    )
    with torch.device("meta"):
        net = timm.create_model(name, **arguments)
    header, end = {}, 0
    for key, tensor in net.state_dict().items():
        header[key] = entry([*tensor.shape], end, end := end + 4 * tensor.numel())
    file = tmp_path / "model.safetensors"
    file.write_bytes(tensors(header))
    with file.open("ab") as opened:  # zeros that take no room
        opened.truncate(file.stat().st_size + end)
    pretrained = {"num_classes": 2, "input_size": [3, 224, 224]}
    config = {"architecture": name, "pretrained_cfg": pretrained, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with cut_off():
        assert load_model(str(tmp_path)).image_size == 224


@pytest.mark.deep
@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_another_one(kind, tiny_run, tmp_path):
    """In the hundred of all formats is every change of `mutate_config` and `mutate_tensors`, alone and with others."""
    outcomes = open_mutated(kind, range(6, 35), tiny_run, tmp_path)
    assert outcomes["predict, export: refused"] >= 12
    assert outcomes["predict, export: opened"] >= 1


# --- JSON, YAML and what lies in a folder


def test_json_that_is_refused(tmp_path):
    """Each kind of file that is read says so in its own words; a terabyte of zeros takes no room, and isn't read."""
    file = tmp_path / "x.json"
    for text in (b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 99_999, b"1" * 5_000):
        file.write_bytes(text)
        for read in (read_json, read_config, load_atlas, read_card):
            with pytest.raises(UserError, match=r"x\.json"):
                read(file)
    with file.open("wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(UserError, match="larger than"):
        read_json(file)


def test_a_card_of_another_form(tmp_path):
    card = tmp_path / "card.json"
    card.write_text('{"id": "x", "title": "X"}')
    assert read_card(card).title == "X"
    for text in ('{"id": "x"}', '{"id": "x", "title": "X", "x": "y"}', "[]"):
        card.write_text(text)
        with pytest.raises(UserError, match=r"card\.json"):
            read_card(card)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files")
def test_only_regular_files_are_read(name, saved_model, tmp_path):
    """A pipe would wait for ever, a device never ends; a link is followed, and what it leads to is judged."""
    file = saved_model / name
    kept = tmp_path / "kept"
    file.rename(kept)
    kinds: list[Callable[[], object]] = [lambda: os.mkfifo(file), file.mkdir]
    targets = (
        "/dev/zero",
        file,
        "../../../../../../etc/passwd",
    )  # a device, a circle, another file
    kinds += [lambda target=target: file.symlink_to(target) for target in targets]
    for make in kinds:
        make()
        with pytest.raises(UserError) as caught:
            load_model(str(saved_model))
        assert "root:" not in str(caught.value)
        file.rmdir() if file.is_dir() else file.unlink()
    file.symlink_to(kept)  # as the hub's cache is built
    assert load_model(str(saved_model)).image_size == 32


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


def test_yaml_that_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    for text in (
        LAUGHS,
        "[" * 50_000,
        "a: !!python/object/apply:os.system [ls]",
        "a: [",
        "x" * 2**21,
        "\x00",
    ):
        file.write_text(text)
        with pytest.raises(UserError):
            read_yaml(file)
    file.write_text("data: {path: '2 * 3', note: a & b}\n")
    assert read_yaml(file) == {"data": {"path": "2 * 3", "note": "a & b"}}
    with pytest.raises(UserError, match="anchors"):
        parse_yaml("a: &b 1\nc: *b")


HOSTILE_YAML = {
    "a time that is none": "a: !!timestamp x",
    "a switch that is none": "a: !!bool x",
    "400 digits": "model: {optim: {lr: " + "9" * 400 + "}}",
    "400 hexadecimal digits": "model: {optim: {lr: 0x" + "f" * 400 + "}}",
    "4,301 digits": "a: " + "9" * 4_301,
    "a number to the base of 60": "a: 1" + ":59" * 300_000,
    "a fraction to the base of 60": "a: 1" + ":59" * 300_000 + ".5",
    "a value of 100,000 letters": "data: {batch_size: " + "x" * 100_000 + "}",
    "a key of 100,000 letters": "? " + "x" * 100_000 + "\n: 1",
    "keys in keys": "{a: " * 300 + "1" + "}" * 300,
}


@pytest.mark.whole
@pytest.mark.parametrize("what", HOSTILE_YAML)
def test_hostile_yaml_is_one_short_sentence_at_once(what, tmp_path):
    """PyYAML's own errors are of any type; a number to the base of 60, 0.9 MB, took 19 s."""
    (tmp_path / "c.yaml").write_text(HOSTILE_YAML[what])
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        read_options(tmp_path / "c.yaml")
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_long_name_in_a_config_is_not_quoted_in_full(saved_model):
    change_config(saved_model, "model_args", **{"depth" + "x" * 100_000: 10**9})
    with pytest.raises(UserError) as caught:
        load_model(str(saved_model))
    assert len(str(caught.value)) < 600 + len(str(saved_model))


# --- configurations

CONFIG = """
data: {{path: synthetic_pets, image_size: 32, train_size: 16, val_size: 8, test_size: 8, batch_size: 4}}
model: {{arch: {{name: test_vit_moe, patch_size: 8}}}}
trainer: {{fast_dev_run: 1, enable_progress_bar: false, {0}}}
"""
EVIL = """
from pathlib import Path
from lightning.pytorch.callbacks import Callback
Path("a class was imported").touch()
class Evil(Callback): pass
def function(*arguments): Path("a function was called").touch()
"""
NAMED = {
    "a callback": "callbacks: [{class_path: evilmod.Evil}]",
    "a logger": "logger: {class_path: evilmod.Evil}",
    "a strategy": "strategy: {class_path: evilmod.Evil}",
    "a plugin": "plugins: [{class_path: evilmod.Evil}]",
    "a profiler": "profiler: {class_path: evilmod.Evil}",
    "a function": "callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: "
    "{on_fit_start: evilmod.function}}]",
    "a system call": "callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: "
    "{on_fit_start: os.system}}]",
    "an import through a friend": "callbacks: [{class_path: moevision.train.fit.shutil.rmtree}]",
    "jsonargparse": "callbacks: [{class_path: jsonargparse.set_parsing_settings}]",
}


FUNCTION = "moevision.train.provenance.differences"  # is imported, as all of moevision.train may be
CALLABLES = {
    "LambdaCallback": f"callbacks: [{{class_path: LambdaCallback, init_args: {{on_fit_start: {FUNCTION}}}}}]",
    "BackboneFinetuning": f"callbacks: [{{class_path: BackboneFinetuning, init_args: {{lambda_func: {FUNCTION}}}}}]",
    "ModelPruning": f"callbacks: [{{class_path: ModelPruning, init_args: {{pruning_fn: {FUNCTION}}}}}]",
    "DDPStrategy": f"strategy: {{class_path: lightning.pytorch.strategies.DDPStrategy, "
    f"init_args: {{ddp_comm_hook: {FUNCTION}}}}}",
}


@pytest.mark.parametrize("what", CALLABLES)
@pytest.mark.parametrize("trial", ["fast_dev_run: 1", "fast_dev_run: false"])
def test_a_configuration_calls_no_function(what, trial, cli):
    """Without a trial config.yaml would be written, which can't hold a function."""
    text = CONFIG.format(CALLABLES[what]).replace("fast_dev_run: 1", trial)
    Path("evil.yaml").write_text(text)
    said = f"{FUNCTION} is not called: configurations name no functions"
    refused(cli("fit", "--config", "evil.yaml"), said)
    assert not Path("runs").exists()


@pytest.fixture
def evil_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evilmod.py").write_text(EVIL)
    return tmp_path


@pytest.mark.parametrize("what", NAMED)
def test_a_configuration_imports_nothing_foreign(what, cli, evil_module):
    (evil_module / "evil.yaml").write_text(CONFIG.format(NAMED[what]))
    refused(cli("fit", "--config", "evil.yaml"))
    outcome = cli("fit", "synthetic_pets", "--trainer.callbacks=[{class_path: evilmod.Evil}]")
    refused(outcome, "'evilmod.Evil' is not imported", "use your own classes from Python")
    assert "evilmod" not in sys.modules
    assert not list(evil_module.glob("a *"))
    assert not (evil_module / "runs").exists()


def test_lightnings_own_parts_may_be_named(cli):
    stopping = "callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/top1}}]"
    Path("good.yaml").write_text(CONFIG.format(stopping))
    succeeded(cli("fit", "--config", "good.yaml"))


@pytest.mark.parametrize(
    "text", [LAUGHS, "a: " + "[" * 20_000, "model: http://localhost:1/evil.yaml", "x" * 2**21]
)
def test_configuration_bombs(text, cli):
    """A few lines that stand for billions of values, nesting, an address, and a long file."""
    Path("evil.yaml").write_text(text)
    refused(cli("fit", "--config", "evil.yaml"))
