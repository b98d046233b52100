"""The explorer for everyone who can reach this machine, as a Space serves it; more arguments of `demo` may follow."""

import os
import sys

from moevision.cli import main

if __name__ == "__main__":
    if (
        "SPACE_ID" in os.environ
    ):  # Hugging Face's proxy has an address of this network and says who a visitor is
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "127.0.0.1,10.0.0.0/8")
    sys.exit(
        main(
            [
                "demo",
                "--host",
                "0.0.0.0",
                "--port",
                "7860",
                "--public",
                "--no-browser",
                *sys.argv[1:],
            ]
        )
    )
