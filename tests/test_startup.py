"""What `import moevision` and `moevision --help` cost beside `import timm`, and what they must not load."""

import os
import subprocess
import sys

import pytest

resource = pytest.importorskip("resource", reason="CPU time of a child process: POSIX only")

ROUNDS = 5
NOISE_S = 0.05
HELP_S = 0.3
COMMANDS = {
    "timm": "import timm",
    "moevision": "import moevision",
    "help": "import sys; sys.argv = ['moevision', '--help']; from moevision.cli import main; main()",
}
HEAVY = ("lightning", "pytorch_lightning", "gradio", "torchmetrics", "matplotlib", "jsonargparse")


def cpu_seconds(code):
    """User and system time of a fresh interpreter; waiting for the disk or for other processes is not in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


@pytest.mark.slow
def test_import_and_help_cost_little_more_than_timm():
    """Rounds are interleaved, and each command counts with its fastest: a busy machine only ever adds time."""
    seconds = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, code in COMMANDS.items():
            seconds[name].append(cpu_seconds(code))
    timm, moevision, help_text = (min(seconds[name]) for name in COMMANDS)
    assert moevision <= 1.1 * timm + NOISE_S, seconds
    assert help_text <= 1.1 * timm + NOISE_S + HELP_S, seconds


def test_the_help_loads_nothing_heavy():
    code = (
        "import sys; from moevision.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['nonsense'], []): main(arguments)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
