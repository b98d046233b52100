"""How large the house is and how dense its sentences are, at one fixed layout; `tests/house.py` counts.

python -m benchmarks counts                  # of this checkout
python -m benchmarks counts path/to/checkout
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from benchmarks.house import put
from tests.house import LONG_FUNCTION, PACKAGE, SHORT_FUNCTION, count


def main() -> None:
    """Count and print."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[2])
    add("--record", metavar="NAME", help="write into benchmarks/house/record.json, such as `after`")
    options = parser.parse_args()

    counts = count(options.checkout)
    print(f"{'folder':32} {'modules':>7} {'lines of code':>13} {'tokens':>8}")
    for name, size in (*counts["folders"].items(), ("all", counts)):
        print(f"{name:32} {size['modules']:7} {size['code_lines']:13,} {size['tokens']:8,}")
    print(f"tokens a line: {counts['tokens_a_line']:.2f}")
    print(
        f"median over functions of at least {SHORT_FUNCTION} lines: {counts['median_tokens_a_line_of_functions']:.2f}"
    )
    print(
        f"conditional expressions in 1,000 lines: {counts['conditional_expressions_per_1000_lines']:.1f}"
    )
    print(f"functions of more than {LONG_FUNCTION} tokens: {len(counts['long_functions'])}")
    for name, size in counts["long_functions"].items():
        print(f"  {size:5,} {name}")
    print(f"largest folder: {counts['largest_folder']} modules")
    print(f"imported by exactly one other: {counts['single_importers']} modules")
    for circle in counts["circles"]:
        print(f"import circle: {', '.join(circle)}")

    if options.record:
        put(options.record, "counts", counts, options.checkout / PACKAGE)
