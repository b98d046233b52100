"""Everything that docs/ quotes about the speed of one MoE layer: the bars, and how the ratio grows with each size.

    python benchmarks/moe_layer.py --out benchmarks/layer

`moevision benchmark layer` with the two presets, at E = 8 and 32, in bf16 and fp32; further options are passed on to
both, such as `--repetitions 40` or `--threads 2`. Writes OUT/bars/ and OUT/growth/ with a record and a figure each.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from moevision.commands.benchmark.command import main as benchmark

PRESETS = {
    "bars": ["--experts", "8", "32", "--precision", "bf16", "fp32"],
    "growth": ["--router", "vmoe_top_k", "--no-total-params"],
}


def main() -> None:
    """Measure both presets."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options, rest = parser.parse_known_args()
    for preset, arguments in PRESETS.items():
        benchmark(["layer", "--preset", preset, *arguments, "--out", str(options.out / preset), *rest])


if __name__ == "__main__":
    main()
