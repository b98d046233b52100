"""Is a training that was interrupted and resumed the same as one that wasn't, bit for bit?

    python -m benchmarks resume                  # every cell, about 4 s of CPU each
    python -m benchmarks resume --only bf16      # those whose name holds this

`tests/train/resume_matrix.py` has the cells. The record is written after each; cells that are in it already are left
out, unless --again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import HERE, about, argument_parser
from benchmarks.lines import write_lines
from moevision.train.fit import quiet_lightning
from tests.train.resume_matrix import cells, run_cell, train


def main() -> None:
    """Run what the command line asks for."""
    parser = argument_parser("resume", __doc__)
    add = parser.add_argument
    add("--only", default="", help="cells whose name holds this")
    add("--again", action="store_true", help="also those that are in the record")
    add("--out", type=Path, default=HERE / "reliability" / "resume.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    origin = about()
    record = json.loads(options.out.read_text()) if options.out.is_file() else {"cells": {}}
    chosen = [
        (setting, place)
        for setting, place in cells()
        if options.only in f"{setting.name} / {place}"
    ]
    baselines: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary, quiet_lightning():
        root = Path(temporary)
        for setting, place in chosen:
            name = f"{setting.name} / {place}"
            if name in record["cells"] and not options.again:
                continue
            started = time.process_time()
            if setting.name not in baselines:
                baselines[setting.name] = train(Path(tempfile.mkdtemp(dir=root)), setting)
            found = run_cell(setting, place, baselines[setting.name], root)
            record["cells"][name] = found | {"cpu_s": round(time.process_time() - started, 1)}
            record["provenance"] = origin
            write_lines(options.out, record)
            print(
                f"{name}: {'DIFFERS in ' + ', '.join(found['differs'][:3]) if found['differs'] else 'identical'}",
                flush=True,
            )
    bad = [name for name, found in record["cells"].items() if found["differs"] or found["leaked"]]
    print(f"{len(record['cells']) - len(bad)} of {len(record['cells'])} cells are bit-identical")
    sys.exit(bool(bad))
