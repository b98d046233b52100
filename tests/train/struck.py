"""The command line, of a training that is struck by faults: `python -m tests.train.struck FAULTS fit ...`."""

import sys
from collections.abc import Callable

from moevision.cli import main
from moevision.train import fit as training
from tests.train.faults import FaultInjector


def strike(faults: str, setattr: Callable[..., None] = setattr) -> None:
    """Put the injector in front of what watches over every training of this process."""
    watching = training.watching
    setattr(training, "watching", lambda **options: [FaultInjector(faults), *watching(**options)])


if __name__ == "__main__":
    strike(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
