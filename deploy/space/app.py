"""The explorer for everyone who can reach this machine, as a Space serves it; arguments of `moevision demo` are added."""

import sys

from moevision.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", "--host", "0.0.0.0", "--port", "7860", "--public", "--no-browser", *sys.argv[1:]]))
