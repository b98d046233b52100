"""How many files one crosses while reading what happens: in an MoE forward, a training batch, and any command.

Counted are the calls of Python functions below moevision/ in the main thread: the files whose functions run, and the
hops, how often a call is in another file than the call before. Returns don't count, nor what an import or a
comprehension runs. A training batch is the time from one `training_step` to the next in `moevision fit` of a tiny model
on images in memory, so it holds one of everything: forward, backward, update, callbacks, the next batch's images.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image

import moevision
from moevision import MoEMlp

PACKAGE = f"{Path(moevision.__file__).parent}{os.sep}"
_COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
_TINY = (
    "--model.arch.name=test_vit_moe",
    "--model.arch.patch_size=8",
    "--data.image_size=32",
    "--data.batch_size=8",
    "--data.num_workers=0",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
)


class Trip:
    """The way through the files of moevision while it is entered.

    Args:
        turn: the name of a function; the trip is then from its second call to its third.
        until: the name of a function; the trip ends where it is first called.
    """

    def __init__(self, turn: str | None = None, until: str | None = None) -> None:
        self.turn, self.turns, self.until = turn, 0, until
        self.way: list[str] = []

    def __enter__(self) -> Trip:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if (
            event != "call"
            or not code.co_flags & inspect.CO_OPTIMIZED
            or code.co_name in _COMPREHENSIONS
        ):
            return  # bodies of modules and classes aren't "optimized"
        if not code.co_filename.startswith(PACKAGE):
            return
        self.turns += code.co_name == self.turn
        name = code.co_filename.removeprefix(PACKAGE)
        if (self.turn is None or self.turns == 2) and self.way[-1:] != [name]:
            self.way.append(name)
        if code.co_name == self.until:
            sys.setprofile(None)

    def row(self, name: str) -> str:
        """Of the table."""
        return f"| {name} | {len(set(self.way))} | {len(self.way) - 1} |"


def forward_trip(**options: Any) -> Trip:
    """One forward pass of a layer in training mode."""
    layer, x = MoEMlp(32, 64, num_experts=4, **options), torch.randn(2, 9, 32)
    layer(x)
    with Trip() as trip:
        layer(x)
    return trip


def moevision_command(arguments: Sequence[str]) -> None:
    """Run a command line in this process; what it prints is dropped."""
    before, sys.argv = sys.argv, ["moevision", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module("moevision", run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = before


def batch_trip(folder: Path) -> Trip:
    """The second batch of a training on noise."""
    rng = np.random.default_rng(0)
    for number in range(80):
        path = folder / "images" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    with Trip("training_step") as trip:
        options = (
            *_TINY,
            "--record_routing.images=null",
            f"--runs_root={folder / 'runs'}",
        )  # few batches have a moment
        moevision_command(["fit", str(folder / "images"), *options])
    return trip
