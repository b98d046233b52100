"""What the tests of the benchmarks share: their command line called in this process, and processes that are forks."""

import io
import sys
from collections.abc import Callable, Generator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import pytest

from tests.shared import Outcome


def run_bench(*arguments: object) -> Outcome:
    """Call `python -m benchmarks` in this process, and put back the number of threads."""
    import torch

    from benchmarks.__main__ import main

    out, err, argv, threads = io.StringIO(), io.StringIO(), sys.argv, torch.get_num_threads()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def bench() -> Callable[..., Outcome]:
    """`python -m benchmarks`, with these arguments."""
    return run_bench


@pytest.fixture(scope="module")
def forked_processes() -> Generator[None, None, None]:
    """Processes that the benchmarks spawn are forks of one that has imported torch, instead of each importing it."""
    from torch import multiprocessing

    from benchmarks import harness
    from tests import forks

    forks.begin()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(harness, "get_context", lambda method: forks.CONTEXT)
        patched.setattr(
            multiprocessing,
            "spawn",
            partial(multiprocessing.start_processes, start_method="forkserver"),
        )
        yield
