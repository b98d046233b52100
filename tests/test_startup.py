"""What `import moevision` and `moevision --help` cost beside `import timm`, and what they must not load."""

import itertools
import json
import os
import statistics
import subprocess
import sys

import pytest

ROUNDS = 5
HELP_S = 0.3
HEAVY = ("lightning", "pytorch_lightning", "gradio", "torchmetrics", "matplotlib", "jsonargparse")
STEPS = """
import contextlib, io, json, sys, time
marks = [time.process_time()]
import timm
marks.append(time.process_time())
import moevision
marks.append(time.process_time())
from moevision.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
marks.append(time.process_time())
print(json.dumps(marks))
"""


def cpu_seconds():
    """CPU time of `import timm`, of `import moevision` after it, and of the help after both, in one new interpreter.

    moevision imports timm, so the second number is all that it adds; what slows the machine slows all three.
    """
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        check=True,
        timeout=600,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    marks = json.loads(done.stdout.splitlines()[-1])
    return [after - before for before, after in itertools.pairwise(marks)]


@pytest.mark.slow
def test_import_and_help_cost_little_more_than_timm():
    timm, moevision, help_text = zip(*(cpu_seconds() for _ in range(ROUNDS)), strict=True)
    added = statistics.median(ours / theirs for ours, theirs in zip(moevision, timm, strict=True))
    assert added <= 0.1, (timm, moevision)
    assert statistics.median(help_text) <= HELP_S, help_text


def test_the_help_loads_nothing_heavy():
    code = (
        "import sys; from moevision.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['nonsense'], []): main(arguments)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.splitlines()[-1] == "[]"
