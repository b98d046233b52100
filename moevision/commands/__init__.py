"""The verbs of the command line: a table of them, and where each is run. `parsers` says what they take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Verb(NamedTuple):
    """One verb: what it does, and `module:function` that does it.

    The function takes the parsed arguments; that of a verb without a parser in `moevision.commands.parsers`, the
    remaining arguments as a list.
    """

    summary: str
    target: str


VERBS = {
    "fit": Verb(
        "train a model on a folder of images, a dataset or a config; writes runs/NAME/",
        "moevision.train.fit:fit",
    ),
    "validate": Verb("evaluate a checkpoint on the validation images", "moevision.train.fit:validate"),
    "test": Verb("evaluate a checkpoint on the test images", "moevision.train.fit:test"),
    "predict": Verb("classify images with a saved model, as CSV or JSON", "moevision.commands.predict:run"),
    "info": Verb(
        "parameters and FLOPs of a model; --machine: what limits this machine",
        "moevision.commands.info:run",
    ),
    "compare": Verb(
        "are two trainings told apart on the same test images, and at what cost", "moevision.commands.compare:run"
    ),
    "upcycle": Verb(
        "turn a pretrained dense ViT into a Mixture of Experts that computes the same",
        "moevision.commands.upcycle:run",
    ),
    "surgery": Verb(
        "prune or merge experts, or collapse a model to a dense one, with what it costs",
        "moevision.commands.surgery:run",
    ),
    "export": Verb("write a model as ONNX or torch.export, checked against it", "moevision.commands.export:run"),
    "push": Verb("publish a saved model with its card on the Hugging Face hub", "moevision.commands.push:run"),
    "analyze": Verb("what the experts of a trained model do, as one report", "moevision.analysis.report.build:run"),
    "data": Verb("which training images are doubtful, hard or doubled; which to keep", "moevision.commands.data:run"),
    "demo": Verb("see in a browser which experts every patch of an image goes to", "moevision.demo.server:run"),
}


@contextmanager
def loading(what: str = "loading PyTorch") -> Iterator[None]:
    """Say on a terminal what is going on, such as the import of torch, which takes seconds."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
