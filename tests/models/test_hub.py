"""What fit leaves in RUN/model is a model on the hub: `hf upload` against a hub of our own, and back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from moevision.models.io import load_model
from tests.models.fake_hub import fake_hub

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


@pytest.mark.deep
def test_uploaded_by_hf_and_loaded_it_is_the_same_model(
    tiny_run, distant_model, tmp_path, monkeypatch
):
    """Loaded by timm in a process of its own, then offline from its cache; by moevision with its distances."""
    folder = shutil.copytree(distant_model, tmp_path / "model")
    shutil.copy(tiny_run / "model" / "README.md", folder)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    with fake_hub() as hub:
        place = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
        }
        environment = {**os.environ, **place, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        hf = Path(sys.executable).with_name("hf")
        command = [hf, "upload", "me/pets", folder, "--private"]
        subprocess.run(command, env=environment, check=True, timeout=600)
        assert hub.private == {"me/pets": True}
        assert hub.files["me/pets"] == {file.name: file.read_bytes() for file in folder.iterdir()}
        card = ModelCard(hub.files["me/pets"]["README.md"].decode())
        assert card.data.library_name == "timm"
        subprocess.run(
            [sys.executable, "-c", LOAD, tmp_path], env=environment, check=True, timeout=600
        )
        address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        pulled, local = load_model("hf-hub:me/pets"), load_model(str(distant_model))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), local.net(images))
    assert torch.equal(torch.load(tmp_path / "offline.pt"), local.net(images))
    assert local.strangers is not None
    assert pulled.strangers is not None
    for name, values in local.strangers.state_dict().items():
        assert torch.equal(pulled.strangers.state_dict()[name], values)
