"""`moevision.fit` does what the command does."""

import json
import subprocess
import sys

import pytest
import yaml

import moevision
from moevision.commands.fit import command_line
from moevision.config import parse_args
from moevision.errors import UserError

OPTIONS = {
    "epochs": 1,
    "seed_everything": 3,
    "with_twin": False,
    "data.train_size": 64,
    "data.val_size": 32,
    "data.test_size": 32,
    "data.image_size": 32,
    "data.vflip": True,
    "model.arch.num_experts": [2, 4, 2],
    "model.aux.load_balancing": 0.02,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cli):
    """The finished run of Python, and the folder of the same one by the command."""
    root = tmp_path_factory.mktemp("fit")
    config = root / "small.yaml"
    config.write_text("data: {path: synthetic_pets, rotate90: true}\n")
    run = moevision.fit(config=[config], runs_root=root / "python", name="run", **OPTIONS)
    typed = [f"--{name}={json.dumps(value)}" for name, value in OPTIONS.items()]
    cli("fit", "--config", config, "--runs-root", root / "command", "--name=run", *typed)
    return run, root / "command" / "run"


def test_it_is_the_command_s_training(trained):
    run, command = trained
    assert run.run_dir == command.parents[1] / "python" / "run"
    assert (run.run_dir / "metrics.csv").read_text() == (command / "metrics.csv").read_text()

    mine, theirs = (
        yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run.run_dir, command)
    )
    assert mine.pop("runs_root") != theirs.pop("runs_root")
    assert mine == theirs
    assert mine["data"]["vflip"]
    assert mine["data"]["rotate90"]
    assert mine["model"]["arch"]["num_experts"] == [2, 4, 2]


def test_what_it_returns_has_the_result(trained):
    run, _ = trained
    assert run.summary.test.total == 32
    assert "of 32 test images right" in run.headline


@pytest.mark.parametrize(
    ("folder", "options", "sentence"),
    [
        ("nowhere", {}, "nowhere"),
        (None, {"epochs": "many"}, "--trainer.max_epochs is 'many'"),
        (None, {"epoch": 3}, "there is no option 'epoch', did you mean"),
        (None, {"with_twin": None}, "must be true or false"),
        (None, {"config": "--resume=auto"}, "--resume=auto"),  # a value is never an option
        ("--resume=auto", {"epochs": 1}, "--resume=auto"),  # nor is a folder
    ],
)
def test_mistakes_are_sentences(folder, options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        moevision.fit(folder, **options)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_options_without_a_value():
    """`dense` is one, `without_twin` another; False leaves it out."""
    spelled = parse_args("fit", command_line("photos", dense=True, without_twin=False, epochs=2))
    assert (spelled.folder, spelled.options) == (
        "photos",
        {"model.arch.twin": "active_flops", "trainer.max_epochs": 2},
    )


def test_importing_the_package_loads_no_torch():
    code = (
        "import moevision, sys; assert 'torch' not in sys.modules; assert callable(moevision.fit)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
