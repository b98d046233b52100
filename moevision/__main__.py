"""`python -m moevision` is the command `moevision`."""

import sys

from moevision.cli import main

sys.exit(main())
