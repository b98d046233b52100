"""The explorer for everyone who can reach this machine, as a Space serves it; more arguments of `demo` may follow."""

import sys

from moevision.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", "--host", "0.0.0.0", "--port", "7860", "--public", "--no-browser", *sys.argv[1:]]))
