"""Training steps of the shipped configs' models beside their dense twins, and beside plain timm in Lightning.

    python benchmarks/train_step.py cifar10 quickstart --out benchmarks/train

`moevision benchmark train CONFIG --peer lightning` for each config; further options are passed on, such as
`--repetitions 60`. Writes OUT/CONFIG/ with a record and a figure.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from moevision.commands.benchmark.command import main as benchmark


def main() -> None:
    """Measure each config."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="name or file of a config")
    parser.add_argument("--out", type=Path, required=True)
    options, rest = parser.parse_known_args()
    for config in options.configs:
        folder = options.out / Path(config).stem
        benchmark(["train", config, "--peer", "lightning", "--out", str(folder), *rest])


if __name__ == "__main__":
    main()
