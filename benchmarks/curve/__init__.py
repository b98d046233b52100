"""What fewer, chosen training images cost a run of yours: `python -m benchmarks curve of RUN`.

The study of CIFAR-10 is frozen: README.md, record.json, recompute.py.
"""

from __future__ import annotations

import sys

from benchmarks.curve import shares
from moevision.errors import UserError


def main() -> None:
    """The curve of a run.

    Raises:
        UserError: where the arguments don't begin with `of`.
    """
    if sys.argv[1:2] != ["of"]:
        raise UserError(
            "Say of which run: `python -m benchmarks curve of RUN`; `curve of --help` has its options."
        )
    shares.run(sys.argv[2:])
