"""The command line as a person meets it: help, and one sentence with the remedy for every mistake."""

import inspect
import io
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer

import moevision
from moevision import config
from moevision.cli import VERBS
from moevision.data import ImageDataModule
from moevision.errors import DataWarning, UserError
from moevision.train.recipe import memory_advice
from moevision.train.resume import is_free
from moevision.train.task import ClassificationTask
from moevision.words import loading, shell_word
from tests.shared import assert_names, succeeded


def test_help_lists_every_verb(cli):
    outcome = succeeded(cli("--help"))
    for name, (summary, _) in VERBS.items():
        assert f"{name:10} {summary}" in outcome.out
    assert "fit --config quickstart" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(cli, verb, monkeypatch):
    """As wide as the terminal but for examples at its end, which are to be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    outcome = cli(verb, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "--" in outcome.out
    assert cli("help", verb) == outcome
    examples = outcome.out.partition("\nexamples\n")[2].partition("\n\n")[0].splitlines()
    assert 1 <= len(examples) <= 3
    assert all(f"moevision {verb}" in example for example in examples)
    wide = [line for line in outcome.out.splitlines() if len(line) > 80]
    assert set(wide) <= set(examples)


def test_fit_help_is_one_screen_with_examples_first(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "116")
    out = cli("fit", "--help").out
    assert len(out.splitlines()) <= 52
    assert max(map(len, out.splitlines())) <= 120
    assert out.index("fit path/to/images") < out.index("--pretrained TEXT")
    assert 12 <= len(re.findall(r"^  --", out, re.MULTILINE)) <= 18
    assert config.options()["model.arch.num_experts"].help in out
    assert "--model.arch.capacity_factor" not in out
    assert "--help-all" in out
    assert cli("train", "--help").out == out, "its other name"


def test_help_all_shows_at_most_90_options(cli):
    out = cli("fit", "--help-all").out
    assert 60 < len(re.findall(r"^  --", out, re.MULTILINE)) <= 90
    assert_names(out, config.options()["model.arch.capacity_factor"].help)
    assert cli("fit", "--help_all").out == out


def test_every_option_has_help():
    """But for the Trainer's own, which Lightning documents, and what only a checkpoint says."""
    silent = {name for name, option in config.options().items() if not option.help}
    assert silent == {f"trainer.{name}" for name in config.MORE_ARGUMENTS}


def test_the_data_module_takes_the_options_of_the_data():
    """With their defaults; a module without torch can't ask it."""
    taken = dict(inspect.signature(ImageDataModule).parameters)
    said = {
        name.removeprefix("data."): option
        for name, option in config.options().items()
        if name.startswith("data.")
    }
    assert {name: each.default for name, each in taken.items()} == {
        name: each.default for name, each in said.items()
    }


def test_the_task_takes_the_options_of_the_model():
    taken = inspect.signature(ClassificationTask).parameters
    assert list(taken) == [each.name for each in fields(config.Model)]
    assert {name: each.default for name, each in taken.items()} == vars(config.Model())


def test_lightnings_trainer_takes_every_argument():
    """But for what is fixed: logs lie in the run folder, and the data module shares images out."""
    taken = set(inspect.signature(Trainer).parameters) - {
        "kwargs",
        "default_root_dir",
        "use_distributed_sampler",
    }
    assert set(vars(config.Trainer())) | set(config.MORE_ARGUMENTS) == taken


DASHES = {"with_twin": True, "data.batch_size": 8, "runs_root": "a_b-c"}
AS_TYPED = {
    "--with-twin --data.batch_size=8 --runs_root a_b-c": DASHES,
    "--with_twin --data.batch-size=8 --runs-root a_b-c": DASHES,
    "--epochs 3 --lr=0.1 --image_size 64": {
        "trainer.max_epochs": 3,
        "model.optim.lr": 0.1,
        "data.image_size": 64,
    },
    "--gpus 2 --device cpu": {"trainer.devices": 2, "trainer.accelerator": "cpu"},
    "--parallel fsdp --parallel.expert=2": {"parallel.layout": "fsdp", "parallel.expert": 2},
    "--dense --compile --force": {
        "model.arch.twin": "active_flops",
        "model.compile": True,
        "check_memory": False,
    },
}


@pytest.mark.whole
@pytest.mark.parametrize("words", AS_TYPED)
def test_options_as_people_type_them(words):
    """Dash and underscore are one, and some options have short names."""
    args = config.parse_args("fit", ["x", *words.split()])
    assert (args.folder, args.options) == ("x", AS_TYPED[words])


def test_settings_survive_their_file():
    """What is written to config.yaml is read as the same settings."""
    given = {
        "data.mean": (0.1, 0.2, 0.3),
        "data.class_weights": {"a.b": 2.0},
        "trainer.max_epochs": 3,
    }
    made = config.to_settings(
        {**given, "trainer.limit_val_batches": 2, "model.arch.router": ["switch", "soft"]}
    )
    assert (
        config.to_settings(config.parse_config(yaml.safe_load(yaml.safe_dump(asdict(made))), "x"))
        == made
    )


def test_ctrl_c_ends_any_verb_with_one_line(cli, monkeypatch):
    def stopped(chosen):
        raise KeyboardInterrupt

    monkeypatch.setattr("moevision.commands.predict.run", stopped)
    outcome = cli("predict", "vit_tiny", __file__)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err.count("\n") == 2
    assert_names(outcome.err, "predict", "Ctrl-C")


def test_a_warning_about_the_images_has_one_line(cli, monkeypatch):
    """`analyze` named a line of this package, and printed it."""

    def warn(given):
        warnings.warn("1 x .heic", DataWarning, stacklevel=2)
        warnings.warn("of a library", UserWarning, stacklevel=2)

    monkeypatch.setattr("moevision.commands.info.run", warn)
    with pytest.warns(UserWarning, match="of a library") as others:
        assert cli("info", "vit_tiny").err == "warning: 1 x .heic\n"
    assert len(others) == 1


@pytest.mark.parametrize("help_of", [(), ("fit",)])
def test_help_lists_the_exit_codes(cli, help_of):
    """128 plus the numbers of the signals: SIGINT 2, SIGHUP 1, SIGTERM 15, SIGUSR1 10, SIGPIPE 13 (on Linux)."""
    out = cli(*help_of, "--help").out.partition("exit codes")[2]
    of_output = [] if help_of else [141]  # fit says how to go on instead
    listed = sorted(map(int, re.findall(r"\b\d+\b", out.partition("--help-all")[0])))
    assert listed == sorted([0, 2, 3, 129, 130, 138, 143, *of_output])


PRINTING = [
    ("predict {run} {image}", True),
    ("info {run}", True),
    ("--version", True),
    ("fit --help-all", True),
]
PRINTING += [("compare {run} {run}/twin", False), ("--help", False)]


def call(words, run, buffered, **streams):
    """The command in a process of its own, with these streams; its exit code and what it said on stderr."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    image = next((run.parents[1] / "pets").rglob("0*.png"))
    command = [sys.executable, "-m", "moevision", *words.format(run=run, image=image).split()]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, env=env, timeout=600, **streams
    )
    return done.returncode, done.stderr


@pytest.mark.deep
@pytest.mark.parametrize(("words", "buffered"), PRINTING)
def test_an_output_that_can_not_be_written_is_a_sentence(tiny_run, words, buffered):
    with open("/dev/full", "w") as full:
        code, said = call(words, tiny_run, buffered, stdout=full)
    assert code == 2
    assert_names(said.splitlines()[-1], "moevision: ", "No space left", "make room")
    assert "Traceback" not in said


@pytest.mark.deep
@pytest.mark.parametrize(("words", "buffered"), PRINTING)
def test_an_output_that_nobody_reads_any_more_is_no_error(tiny_run, words, buffered):
    """As in `moevision predict ... | head -1`; 141 is what a shell gives a program that SIGPIPE has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        code, said = call(words, tiny_run, buffered, stdout=writer)
    finally:
        os.close(writer)
    assert code == 141
    assert [line for line in said.splitlines() if "not calibrated" not in line] == []


def test_a_diverged_training_has_an_exit_code_of_its_own(cli, drawn_pets, tiny, strike):
    """No return is allowed and one is needed: 3, which a job script can tell from a mistake in the command."""
    strike("nan_weight@2")
    outcome = cli("fit", drawn_pets, *tiny, "--guard.max_rollbacks=0")
    assert outcome.code == 3
    assert "Traceback" not in outcome.err
    assert_names(outcome.err.splitlines()[-1], "moevision: ", "diverged", "head.weight")
    assert Path("runs/pets/divergence.md").is_file()
    assert Path("runs/pets/checkpoints/diverged.ckpt").is_file()


def test_version(cli):
    assert cli("--version").out == f"moevision {moevision.__version__}\n"
    first, python, *libraries = cli("--version", "--verbose").out.splitlines()
    assert (first, python) == (
        f"moevision {moevision.__version__}",
        f"python {sys.version.split()[0]}",
    )
    assert [line.split()[0] for line in libraries] == ["torch", "torchvision", "timm", "lightning"]
    assert libraries[0].split()[1].partition("+")[0] == torch.__version__.partition("+")[0]


def test_a_terminal_is_told_what_takes_long(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    for stream, told in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with loading("reading the model"):
            pass
        assert ("reading the model" in stream.getvalue()) is told


def test_no_argument_prints_the_usage_and_fails(cli):
    outcome = cli()
    assert outcome.code == 2
    assert "usage: moevision VERB" in outcome.out


def test_traceback_on_demand(cli):
    outcome = cli("fit", "nowhere", "--traceback")
    assert outcome.code == 2
    assert "Traceback" in outcome.err


def test_a_run_folder_is_tested_by_the_weights_that_fit_tested(cli, tiny_run):
    said = cli("test", tiny_run).out
    name = json.loads((tiny_run / "summary.json").read_text())["test"]["checkpoint"]
    assert said == cli("test", "--ckpt_path", tiny_run / "checkpoints" / name).out
    assert re.search(
        r"^\d+\.\d % .* test images right\n.*^test/top1 +[01]\.\d{4}$", said, re.M | re.S
    )
    assert "DataLoader" not in said


HALF = ["data.batch_size 32", "trainer.accumulate_grad_batches 4"]
FREE = ["model.grad_checkpointing"]  # what may change in a run that goes on; one image has no half


@pytest.mark.whole
@pytest.mark.parametrize(
    ("text", "batch", "goes_on", "options"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", 64, False, HALF),
        ("can't allocate memory: 9 bytes", 64, False, HALF),
        ("CUDA out of memory", 64, True, FREE),
        ("CUDA out of memory", 1, False, FREE),
    ],
)
def test_full_memory_gets_options_that_help(text, batch, goes_on, options):
    """Half the batch and twice the accumulation, or else what may change."""
    with pytest.raises(UserError) as caught, memory_advice(batch, 2, goes_on=goes_on):
        raise RuntimeError(text)
    assert re.findall(r"--([\w.]+(?: \d+)?)", str(caught.value)) == options
    assert is_free(FREE[0])


def test_other_errors_are_not_taken_for_full_memory():
    with pytest.raises(RuntimeError, match="shape"), memory_advice(64, 2):
        raise RuntimeError("shape mismatch")


def test_a_terminal_without_greek_letters_gets_the_help(monkeypatch):
    """As Windows' code page 1252 has neither σ nor ≥; it ended in a UnicodeEncodeError."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    assert moevision.cli.main(["fit", "--help-all"]) == 0
    sys.stdout.flush()
    assert "--model.arch" in raw.getvalue().decode("cp1252")


def test_a_printed_path_is_one_word_of_this_systems_shell(monkeypatch):
    """cmd.exe takes single quotes for a part of the name, and a backslash needs none."""
    assert shell_word("runs/my pets") == "'runs/my pets'"
    assert shell_word("runs/pets") == "runs/pets"
    with monkeypatch.context() as windows:
        windows.setattr("os.name", "nt")
        found = [shell_word(path) for path in (r"runs\pets", r"runs\my pets")]
    assert found == [r"runs\pets", '"runs\\my pets"']
