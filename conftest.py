"""Which tests run, in which process, and what is said of those that can't; what tests share is in `tests/shared.py`."""

import gc
import os
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent
# `tests` and `benchmarks` are packages of the checkout. At the end of the path: an installed moevision comes first.
sys.path.append(str(ROOT))
pytest_plugins = ["tests.shared"]

from tests.needs import NEEDS  # noqa: E402

# ---- tiers

TIERS = ("deep", "browser", "docs", "studies")
"""What `pytest` alone leaves out, each a marker: `pytest -m deep`."""
FOLDERS = {"tests/browser": "browser", "tests/docs": "docs", "benchmarks": "studies"}
"""Everything below these is of that tier, unless a test is marked with another."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` runs the product's tests in two processes; a file, or a folder of a tier, that is named runs whole."""
    option = config.option
    named = [argument.removeprefix(f"{ROOT}/") for argument in config.args]
    if config.args_source is config.ArgsSource.ARGS and any(
        ".py" in name or name.startswith(tuple(FOLDERS)) for name in named
    ):
        return
    option.markexpr = option.markexpr or f"not ({' or '.join(TIERS)})"
    is_worker = hasattr(config, "workerinput")  # one of the two, which would start two of its own
    if option.numprocesses is None and not (is_worker or option.usepdb or option.collectonly):
        option.numprocesses = 2
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # two processes with all cores each would be in each other's way


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected, 800,000 objects, stays to the end: nobody looks through it for garbage.

    While it grows that took 3 of the 17 CPU seconds of collecting everything, and afterwards a second each time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in the folder of a tier; and of a test with many cases, all but two are deep.

    Those two are the first one and one that the test's name chooses, so that different tests try different routers. A
    test marked `whole` keeps all its cases.
    """
    cases = defaultdict(list)
    for item in items:
        path = item.path.relative_to(ROOT).as_posix()
        tier = next(
            (tier for folder, tier in FOLDERS.items() if path.startswith(f"{folder}/")), None
        )
        if tier:
            item.add_marker(tier)
        elif "server" in getattr(item, "fixturenames", ()):  # the explorer in a process of its own
            item.add_marker("deep")
        elif not any(map(item.get_closest_marker, (*TIERS, "whole"))):
            cases[item.nodeid.partition("[")[0]].append(item)
    for test, of_test in cases.items():
        chosen = {0, zlib.crc32(test.encode()) % len(of_test)}
        for number, item in enumerate(of_test):
            if number not in chosen:
                item.add_marker("deep")


WHOLE = ("tests/browser", "tests/demo")
"""Each goes whole to one process: their files share a server, an explorer, a browser. `test_live.py` shares nothing."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist=loadfile`, with those folders as if they were a file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            folder, _, name = file.rpartition("/")
            return folder if folder in WHOLE and name != "test_live.py" else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


# ---- what is missing here: skipped, and summed up at the end


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `needs(NAME, ...)` where one of those isn't here."""
    for name in (name for mark in item.iter_markers("needs") for name in mark.args):
        if not NEEDS[name].is_here():
            pytest.skip(_MISSING + name)


_MISSING, _COMPLETE = "not here: ", "MOEVISION_TESTS_COMPLETE"


def _missing(reporter: pytest.TerminalReporter) -> Counter[str]:
    """How many tests were skipped for each missing thing."""
    reasons = (str(report.longrepr[2]) for report in reporter.stats.get("skipped", ()))
    return Counter(reason.partition(_MISSING)[2] for reason in reasons if _MISSING in reason)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where nothing may be missing, a test that was skipped for it is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get(_COMPLETE) == "1" and reporter is not None and _missing(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """One paragraph on what could not run here, below everything else."""
    yield
    missing = _missing(terminalreporter)
    if not missing:
        return
    fails = os.environ.get(_COMPLETE) == "1"
    terminalreporter.section("not run here", red=fails, yellow=not fails)
    listed = (
        f"{count} for want of {NEEDS[name].name} ({NEEDS[name].command})"
        for name, count in missing.items()
    )
    verdict = f" {_COMPLETE} is set, so this is a failure." if fails else ""
    terminalreporter.write_line(f"Skipped tests: {', '.join(listed)}.{verdict}")
