"""`moevision analyze MODEL`: what the experts of a trained model do, as one self-contained report."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from moevision.analysis.report.build import analyze
from moevision.analysis.report.measure import ReportSettings
from moevision.names import shown


def run(chosen: Namespace) -> None:
    """Write the report, and print its headline and what it says of each layer."""
    settings = ReportSettings(
        model=chosen.model,
        data=chosen.data,
        out=Path(chosen.out),
        limit=chosen.limit if chosen.limit is not None else 300 if chosen.quick else 1000,
        seeds=tuple(chosen.seeds),
        permutations=chosen.permutations if chosen.permutations is not None else 200 if chosen.quick else 1000,
        seed=chosen.seed,
        quick=chosen.quick,
        command=chosen.command,
    )
    numbers = analyze(settings)
    print(shown(numbers["verdict"]["headline"]))
    for layer in numbers["verdict"]["layers"]:
        print("\n".join(f"  {shown(sentence)}" for sentence in layer["sentences"]))
    print(f"The report is {shown(str(settings.out / 'report.html'))}")
