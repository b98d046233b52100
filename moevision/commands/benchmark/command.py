"""`moevision benchmark layer|train|infer|data`: measure, tell it in tables, and write it down."""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from moevision.commands.benchmark.options import build_parser


def main(arguments: list[str]) -> None:
    """Run with command-line arguments."""
    options = vars(build_parser().parse_args(arguments))
    if options["quick"]:
        options = vars(build_parser(quick=True).parse_args(arguments))
    kind = options.pop("kind")
    del options["quick"]
    options["command"] = shlex.join(["moevision", "benchmark", *arguments])
    record = run(kind, options)
    report = _report(kind)
    report.show(record)
    if options["out"] is not None:
        from moevision.commands.benchmark.record import write_record

        for path in write_record(options["out"], record, lambda path: report.draw(record, path)):
            print(f"written: {path}", file=sys.stderr)


def run(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Measure what these options ask for.

    Args:
        kind: `layer`, `train`, `infer` or `data`.
        options: as the parser gives them.

    Returns:
        The record.
    """
    from moevision.commands.benchmark import machine  # torch: not for --help

    device = machine.find_device(options.pop("device"))
    machine.use_threads(options.pop("threads"))
    machine.keep_memory_as_fit_does()
    settings: dict[str, Any] = {**options, "device": str(device)}
    if kind in ("train", "data") and settings["precision"] is None:
        settings["precision"] = machine.usual_precision()
    if kind != "data":
        precisions = settings["precision"] if isinstance(settings["precision"], list) else [settings["precision"]]
        settings["peak"] = {} if settings.pop("no_peak") else machine.measure_peaks(device, precisions)
    if kind == "layer":
        return _layer(settings)
    if kind == "data":
        from moevision.commands.benchmark.data import DataSettings, benchmark_data

        return benchmark_data(DataSettings(**settings))
    settings["energy"] = not settings.pop("no_energy")
    if kind == "train":
        from moevision.commands.benchmark.train import TrainSettings, benchmark_train

        return benchmark_train(TrainSettings(**settings))
    from moevision.commands.benchmark.infer import InferSettings, benchmark_infer

    return benchmark_infer(InferSettings(**settings))


def _layer(settings: dict[str, Any]) -> dict[str, Any]:
    from moevision.commands.benchmark.layer import LayerSettings, benchmark_layer
    from moevision.commands.benchmark.peers import chosen_peers

    both = ["vmoe_top_k", "noisy_top_k"]
    settings["router"] = settings["router"] or (both if settings["preset"] == "bars" else both[:1])
    settings["peers"] = chosen_peers(settings["peers"] or (["none"] if settings["preset"] == "growth" else ["all"]))
    settings["total_params"] = not settings.pop("no_total_params")
    return benchmark_layer(LayerSettings(**settings))


def _report(kind: str) -> ModuleType:
    """The module that shows and draws this kind of record."""
    return import_module(f"moevision.commands.benchmark.{kind}_report")
