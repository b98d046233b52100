"""How many files one crosses while reading what happens; `tests/trips.py` counts.

python -m benchmarks trips                          # one MoE forward, one training batch
python -m benchmarks trips analyze MODEL DATA       # and this command line of moevision
python -m benchmarks trips --list                   # with the way of each trip, file by file
"""

from __future__ import annotations

import tempfile
from argparse import REMAINDER, ArgumentParser
from pathlib import Path

from benchmarks.house import put
from tests.trips import PACKAGE, Trip, batch_trip, forward_trip, moevision_command


def main() -> None:
    """Count and print."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--list", action="store_true", help="print the way of each trip too")
    add("--record", metavar="NAME", help="write into benchmarks/house/record.json, such as `after`")
    add("command", nargs=REMAINDER, help="arguments of moevision, to be counted as well")
    arguments = parser.parse_args()
    trips = {
        "MoE forward, `noisy_top_k`": forward_trip(),
        "MoE forward, `expert_choice`": forward_trip(router="expert_choice"),
    }
    with tempfile.TemporaryDirectory() as folder:
        trips["training batch"] = batch_trip(Path(folder))
    if arguments.command:
        with Trip() as trips[f"`moevision {arguments.command[0]}`"]:
            moevision_command(arguments.command)
    print("| trip | files | hops |\n|---|--:|--:|")
    for name, trip in trips.items():
        print(trip.row(name))
    if arguments.record:
        rows = {
            name: {"files": len(set(trip.way)), "hops": len(trip.way) - 1}
            for name, trip in trips.items()
        }
        put(arguments.record, "trips", rows, Path(PACKAGE))
    if arguments.list:
        for name, trip in trips.items():
            print(f"\n{name}\n  " + " → ".join(trip.way))
