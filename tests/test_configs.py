"""Every shipped config parses, says where it comes from, and trains: by its name, from any folder."""

import itertools
import re
from pathlib import Path

import pytest
import timm
import yaml
from safetensors.torch import save_file

from moevision.data.folder import DATASET_NAMES
from moevision.train.recipe import find_config, shipped_configs
from tests.shared import refused, succeeded

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIGS = shipped_configs()
# One step on a handful of drawn pictures: what the config says is kept, but for the size of the data and of the batch.
SMALL = (
    "--data.batch_size=4",
    "--data.num_workers=0",
    "--data.download=false",
    "--data.train_size=16",
    "--data.val_size=8",
    "--data.test_size=8",
    "--trainer.fast_dev_run=1",
    "--trainer.enable_progress_bar=false",
)


def test_there_are_configs():
    assert {"quickstart", "cifar10", "imagenette", "cats_vs_dogs", "cats_vs_dogs_two"} <= set(
        CONFIGS
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_called_as_its_file_and_says_how_it_is_run(name):
    text = CONFIGS[name].read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    assert config["name"] == name
    assert config["data"]["path"] in DATASET_NAMES
    comment = "".join(itertools.takewhile(lambda line: line[0] == "#", text.splitlines(True)))
    assert re.search(rf"moevision fit (--config )?{name}\b", comment)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_trains(cli, drawn_pets, name):
    config = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    arch, start = config["model"]["arch"], ()
    if "upcycle_reinit" in arch:  # trains pretrained weights only: here drawn ones
        weights = timm.create_model(arch["base"]).state_dict()
        save_file(weights, "drawn.safetensors", metadata={"architecture": arch["base"]})
        start = ("--pretrained", "drawn.safetensors")
    outcome = succeeded(cli("fit", "--config", name, "--data.path", drawn_pets, *start, *SMALL))
    assert arch.get("base", arch["name"]) in outcome.out
    assert f"{config['data']['image_size']} x {config['data']['image_size']} pixels" in outcome.out


def test_a_config_of_pretrained_weights_says_so_without_them(cli, drawn_pets):
    refused(
        cli("fit", "--config", "cats_vs_dogs_two", "--data.path", drawn_pets, *SMALL),
        "--model.arch.upcycle_reinit",
        "give --pretrained",
    )


def test_quickstart_trains_on_its_own_data(cli):
    outcome = succeeded(cli("fit", "quickstart", *SMALL))
    assert "from synthetic_pets" in outcome.out


def test_a_file_of_ones_own_comes_before_a_shipped_config():
    assert find_config("quickstart") == CONFIGS["quickstart"]
    Path("quickstart").write_text("name: mine\n")
    assert find_config("quickstart") == Path("quickstart")
