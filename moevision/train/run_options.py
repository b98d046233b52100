"""Options of a run beside those of model, data and Trainer, and the callbacks that they ask for."""

from __future__ import annotations

import lightning as L
from jsonargparse import ActionYesNo
from lightning.pytorch.cli import LightningArgumentParser

from moevision.train.callbacks import RouterHealth
from moevision.train.faults import KINDS, FaultInjector
from moevision.train.guard import GuardConfig, StabilityGuard
from moevision.train.optim import EmaConfig, WeightEMA
from moevision.train.resume import CheckpointConfig


def add_run_options(parser: LightningArgumentParser) -> None:
    """Resuming, checkpoints, guard, moving average, faults, the name of the run and its twin."""
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="Go on with an interrupted run: its folder, such as runs/pets; or auto: the run folder of this very "
        "command, if a valid checkpoint is there, else a fresh start. Images are compared with the run's by path, "
        "label and file size, not by content. For fit, on the command line only.",
    )
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    parser.add_class_arguments(GuardConfig, "guard")
    parser.add_class_arguments(EmaConfig, "ema")
    parser.add_argument(
        "--fault",
        type=str | None,
        default=None,
        help="Faults to inject, to see what the guard does about them: KIND@BATCH, ... such as 'nan_loss@7, "
        f"inf_grad@9:expert3, spike@20x50, nan_weight@12'. Kinds: {', '.join(KINDS)}.",
    )
    parser.add_argument("--name", type=str, default=None, help="Name of the run folder, runs/NAME.")
    parser.add_argument(
        "--with-twin",
        action=ActionYesNo(yes_prefix="with-", no_prefix="without-"),
        help="Train the dense twin by the same recipe too, and compare both on the same test images.",
    )
    parser.add_argument("--runs_root", type=str, default="runs", help="The folder in which run folders are made.")


def watching(fault: str | None, ema: EmaConfig, guard: GuardConfig) -> list[L.Callback]:
    """Faults, moving average, guard and router health; the order matters, each sees what the ones before it did."""
    faults = [FaultInjector(fault)] if fault else []
    average = [WeightEMA(ema)] if ema.decay is not None else []
    guards = [StabilityGuard(guard)] if guard.enabled else []
    return [*faults, *average, *guards, RouterHealth()]
