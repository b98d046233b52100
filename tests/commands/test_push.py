"""`moevision push`, against a hub of our own on this computer: what goes up, what comes back, and every refusal."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load

from benchmarks.demo import packed
from moevision import UserError
from moevision.analysis.collect import weights_sha256
from moevision.commands import push
from moevision.commands.push import FILES, check_repo_id
from moevision.models.io import load_model
from moevision.models.strangers import FILE as STRANGERS
from tests.models.fake_hub import FakeHub, fake_hub

KEPT = [name for name in FILES if name != STRANGERS]  # of a run with too few validation images for distances
CARD = "---\nlibrary_name: timm\n---\n# Pets\n"
LOAD = """
import sys, huggingface_hub, timm, torch, moevision.models
def logits():
    model = timm.create_model("hf-hub:me/pets", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["cat", "dog"]
    return model(torch.load(f"{sys.argv[1]}/images.pt"))
torch.save(logits(), f"{sys.argv[1]}/logits.pt")
huggingface_hub.constants.HF_HUB_OFFLINE = True
torch.save(logits(), f"{sys.argv[1]}/offline.pt")
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that this process publishes on."""
    with fake_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", running.token)
        yield running


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(outcome: Any, *words: str) -> None:
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("moevision: "), outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


@pytest.mark.deep
def test_pushed_and_loaded_it_is_the_same_model(
    hub: FakeHub, cli: Callable[..., Any], tiny_run: Path, tmp_path: Path
) -> None:
    """Loaded by timm in a process of its own, which finds the hub by its environment, then offline from its cache."""
    outcome = cli("push", tiny_run, "me/pets", "--license", "mit")
    assert outcome.out.startswith(f"{hub.url}/me/pets (only you can see it)\n"), outcome.err
    assert hub.private == {"me/pets": True}
    assert sorted(hub.files["me/pets"]) == sorted(KEPT)
    for name in ("config.json", "model.safetensors"):
        assert hub.files["me/pets"][name] == (tiny_run / "model" / name).read_bytes()
    card = ModelCard(hub.files["me/pets"]["README.md"].decode())
    assert card.data.license == "mit"
    assert 'timm.create_model("hf-hub:me/pets", pretrained=True)' in card.text
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", LOAD, tmp_path], env={**os.environ, **place}, check=True, timeout=600)
    expected = load_model(str(tiny_run)).net(images)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert torch.equal(torch.load(tmp_path / "offline.pt"), expected)


def test_for_everyone_with_a_card_of_ones_own(
    hub: FakeHub, cli: Callable[..., Any], tiny_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "card.md").write_text(CARD)
    outcome = cli("push", tiny_run / "model", "me/pets", "--public", f"--card={tmp_path / 'card.md'}")
    assert outcome.out.startswith(f"{hub.url}/me/pets (everyone can see it)\n"), outcome.err
    assert hub.private == {"me/pets": False}
    assert hub.files["me/pets"]["README.md"].decode() == CARD


def test_nothing_else_of_the_folder_goes_up(
    hub: FakeHub, cli: Callable[..., Any], distant_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(distant_model, tmp_path / "model")
    for name in ("pytorch_model.bin", "diary.txt", ".env"):
        (folder / name).write_text("secret")
    assert cli("push", folder, "me/pets").code == 0
    assert sorted(hub.files["me/pets"]) == sorted(FILES)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    pulled = load_model("hf-hub:me/pets")  # which fetches the distances, too
    for name, values in load_model(str(folder)).strangers.state_dict().items():
        assert torch.equal(pulled.strangers.state_dict()[name], values)


def test_a_packed_model_goes_up_as_timm_reads_it(
    hub: FakeHub, cli: Callable[..., Any], saved_model: Path, drawn_pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_model
    monkeypatch.setattr(packed, "SMALLEST", 256)
    monkeypatch.setattr(packed.pack, "__kwdefaults__", {"group": 8})
    packed.pack_folder(folder, str(drawn_pets))
    assert cli("push", folder, "me/pets").code == 0
    assert hub.files["me/pets"].keys() == {*FILES} - {STRANGERS}  # it has none
    weights, expected = load(hub.files["me/pets"]["model.safetensors"]), load_model(str(folder)).net.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name].to(value.dtype), value) for name, value in expected.items())


def test_a_damaged_model_does_not_go_up(hub: FakeHub, cli: Callable[..., Any], tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run / "model", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(cli("push", folder, "me/pets"), "can't be loaded")
    assert hub.private == {}


def test_a_new_version_needs_force_and_shows_nothing_by_accident(
    hub: FakeHub, cli: Callable[..., Any], tiny_run: Path
) -> None:
    assert cli("push", tiny_run, "me/pets").code == 0
    refused(cli("push", tiny_run, "me/pets"), "me/pets exists already", "--force")
    hub.files["me/pets"]["README.md"] = b"old"
    assert cli("push", tiny_run, "me/pets", "--force").code == 0
    assert hub.files["me/pets"]["README.md"] != b"old"
    hub.private["me/pets"] = False
    hub.files["me/pets"]["README.md"] = b"old"
    refused(cli("push", tiny_run, "me/pets", "--force"), "everyone can see it", "--public")
    assert hub.files["me/pets"]["README.md"] == b"old"
    assert cli("push", tiny_run, "me/pets", "--force", "--public").code == 0
    hub.private["me/pets"] = True
    refused(cli("push", tiny_run, "me/pets", "--force", "--public"), "is private", "settings")


def test_what_the_hub_refuses(
    hub: FakeHub, cli: Callable[..., Any], tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(cli("push", tiny_run, "you/pets"), "may not write to you/pets")
    monkeypatch.setenv("HF_TOKEN", "hf_stolen")
    refused(cli("push", tiny_run, "me/pets"), "does not accept the token")
    monkeypatch.setattr(push, "get_token", lambda: None)
    refused(cli("push", tiny_run, "me/pets"), "hf auth login", "HF_TOKEN")
    assert hub.private == {}


def test_no_network(cli: Callable[..., Any], tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as gone:
        pass
    monkeypatch.setenv("HF_TOKEN", gone.token)
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    refused(cli("push", tiny_run, "me/pets"), "can't be reached", "check the network", "--dry-run")


@pytest.mark.usefixtures("own_folder")
def test_dry_run(cli: Callable[..., Any], tiny_run: Path) -> None:
    outcome = cli("push", tiny_run, "me/pets", "--dry-run")
    assert outcome.code == 0, outcome.err
    folder = Path("hub/me/pets")
    assert sorted(file.name for file in folder.iterdir()) == sorted(KEPT)
    assert "seen by you alone" in outcome.out
    for name in KEPT:
        assert f"{name:21} {(folder / name).stat().st_size:>12,} bytes" in outcome.out
    before = (folder / "README.md").read_bytes()
    refused(cli("push", tiny_run, "me/pets", "--dry-run"), "hub/me/pets exists already", "--force")
    assert cli("push", tiny_run, "me/pets", "--dry-run", "--force", "--license=mit").code == 0
    assert (folder / "README.md").read_bytes() == before.replace(b"license: unknown", b"license: mit").replace(
        b"Licence of these weights: not chosen.", b"Licence of these weights: mit."
    )
    Path("mine").mkdir()
    Path("mine/diary.txt").touch()
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--force", "--out=mine"), "mine exists already")
    Path("file").touch()
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--out=file"), "file exists already")
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--out=file/x"), "give another place")


@pytest.mark.usefixtures("own_folder")
def test_the_card_takes_a_report_of_this_model_only(cli: Callable[..., Any], tiny_run: Path) -> None:
    report: dict[str, Any] = {
        "schema": "moevision.report/1",
        "model": {"name": "cats"},
        "verdict": {"answers": [{"sentence": "Open."}], "layers": []},
        "data": {"n_images": 12},
        "specialization": [],
        "effects": {"experts": [], "why": None},
        "provenance": {"weights_sha256": "0"},
    }
    Path("report").mkdir()
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--analysis=report"), "report holds no report")
    Path("report/report.json").write_text(json.dumps(report))
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--analysis=report"), "of another model (cats)")
    report["provenance"]["weights_sha256"] = weights_sha256(load_model(str(tiny_run)).net)
    Path("report/report.json").write_text(json.dumps(report))
    for place in ("report", "report/report.json"):
        assert cli("push", tiny_run, "me/pets", "--dry-run", f"--analysis={place}", f"--out={place}-out").code == 0
        assert "**Open.**" in Path(f"{place}-out/README.md").read_text()


@pytest.mark.usefixtures("own_folder")
def test_your_own_card(cli: Callable[..., Any], tiny_run: Path) -> None:
    Path("README.md").write_text(CARD)
    assert cli("push", tiny_run, "me/pets", "--dry-run", "--card=README.md").code == 0
    assert Path("hub/me/pets/README.md").read_text() == CARD
    both = cli("push", tiny_run, "me/pets", "--dry-run", "--card=README.md", "--license=mit", "--force")
    refused(both, "--card is a finished text")
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--card=none.md"), "none.md is no model card")
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--card=/dev/zero"), "/dev/zero is no model card")
    Path("README.md").write_text("---\n- a list\n---\n")
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--card=README.md"), "is no model card")


def test_mistakes(cli: Callable[..., Any], tiny_run: Path, tmp_path: Path) -> None:
    refused(cli("push", tmp_path, "me/pets", "--dry-run"), "is no saved model")
    refused(cli("push", tmp_path, "me/pets", "--out=mine"), "--out", "add --dry-run")  # nothing goes up by mistake
    refused(cli("push", "test_vit_moe", "me/pets", "--dry-run"), "There is no test_vit_moe", "a run folder")
    refused(cli("push", tiny_run, "me/pets", "--dry-run", "--license=My Own!"), "no abbreviation", "apache-2.0")
    refused(cli("push", tiny_run, "me/pets", "--dry-run", f"--seeds={tmp_path}"), "summary.json")


@pytest.mark.parametrize(
    "repo", ["pets", "me/my pets", "me/pets/moe", "/pets", "me/", "me/a--b", "me/a..b", "-me/pets", "me/x.git"]
)
def test_addresses_that_the_hub_would_refuse(repo: str) -> None:
    with pytest.raises(UserError, match="USER/NAME"):
        check_repo_id(repo)


@pytest.mark.parametrize("repo", ["me/pets", "a/b", "my-team/ViT_MoE-tiny.v2"])
def test_addresses_that_it_takes(repo: str) -> None:
    assert check_repo_id(repo) == repo
