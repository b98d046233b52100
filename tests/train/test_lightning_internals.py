"""Lightning's private parts: those that are used exist in this version, and one module alone names them."""

import ast
import re
from pathlib import Path

import lightning
import pytest
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ModelParallelStrategy

import moevision

PACKAGE = Path(moevision.__file__).parent
HOME = "train/lightning_internals.py"
# `data` imports nothing of `train`, and asks the loop (by a public name) how many batches it has fetched.
READS_THE_LOOP = "data/module.py"


def test_the_version_is_the_one_that_was_read():
    """Another one may count batches otherwise: read its loops, then `lightning_internals`, then change this."""
    assert lightning.__version__.startswith("2.6.")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (subprocess_script, "_basic_subprocess_cmd"),
        (ExperimentWriter, "_check_log_dir_exists"),
        (ExperimentWriter, "_rewrite_with_new_header"),
        (CSVLogger, "_experiment"),
        (_TrainingEpochLoop, "_should_check_val_fx"),
        (_TrainingEpochLoop, "_batches_that_stepped"),
        (_FitLoop, "_data_fetcher"),
        (_FitLoop, "_iteration_based_training"),
        (ModelParallelStrategy, "_data_parallel_size"),
        (ModelParallelStrategy, "_process_group_backend"),
        (RichProgressBar, "_get_train_description"),
    ],
)
def test_what_is_used_is_there(owner, name):
    """As an attribute, or as one that its methods set."""
    source = Path(__import__("inspect").getfile(owner)).read_text()
    assert hasattr(owner, name) or f"self.{name}" in source
    assert name in (PACKAGE / HOME).read_text()


def private_names_of_lightning() -> set[str]:
    """Methods, attributes and functions that begin with one underscore, anywhere in Lightning."""
    root = Path(lightning.__file__).parent
    pattern = re.compile(r"(?:def |self\.)(_[a-z]\w+)")
    return {name for path in root.rglob("*.py") for name in pattern.findall(path.read_text())}


def foreign_attributes(tree: ast.AST) -> set[str]:
    """Attributes that a module reads or sets, and names that it imports from Lightning, but for its own."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names |= set() if of_self else {node.attr}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            names |= {alias.name for alias in node.names}
    return names - own


def test_no_other_module_uses_them():
    private = private_names_of_lightning() | {"batch_progress", "epoch_progress"}
    assert "_should_check_val_fx" in private
    for path in PACKAGE.rglob("*.py"):
        name, source = path.relative_to(PACKAGE).as_posix(), path.read_text()
        if name != HOME and re.search(r"\blightning\b", source):
            used = foreign_attributes(ast.parse(source)) & private
            assert used <= ({"batch_progress"} if name == READS_THE_LOOP else set()), name
