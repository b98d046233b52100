"""`python app.py`: the explorer, as `moevision demo` serves it; the same arguments work."""

import sys

from moevision.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
