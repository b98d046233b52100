"""`moevision demo`: the command line, and what it prints."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable

from moevision.demo.server import Server, Serving, open_explorer
from moevision.errors import UserError


def run(chosen: Namespace, wait: Callable[[], None] | None = None) -> None:
    """Run with parsed command-line arguments until Ctrl-C, or until `wait` returns."""
    serving = _serving(chosen)
    serving.check()
    print("Loading the models …", file=sys.stderr)
    explorer = open_explorer(chosen.model, chosen.data, chosen.root, local=serving.local)
    with Server(explorer, serving) as server:
        print(announcement(server, serving), flush=True)
        try:
            (wait or _wait_for_interrupt)()
        except KeyboardInterrupt:
            print("\nStopped.")


def announcement(server: Server, serving: Serving) -> str:
    """What is printed when the page is up: address, how to stop, who can see it, and a QR code for others."""
    lines = [f"The explorer is at {server.url}", "Stop it with Ctrl-C."]
    if serving.local:
        return "\n".join([*lines, "Only this computer can see it; --host and --share show it to others."])
    address = server.share_url or _address_for_others(serving.host, server.url)
    lines.append(
        f"Others open {address}" + (" and log in." if serving.auth else ": anyone who can reach it may use it.")
    )
    return "\n".join([*lines, "", qr_code(address)])


def qr_code(address: str) -> str:
    """A QR code as text for a terminal."""
    import io

    import segno

    text = io.StringIO()
    segno.make(address, micro=False).terminal(text, border=2, compact=True)
    return text.getvalue()


def _address_for_others(host: str, url: str) -> str:
    """The page's address with this computer's own one in the place of 0.0.0.0."""
    port = url.rstrip("/").rpartition(":")[2]
    return f"http://{_own_address() if host in ('0.0.0.0', '::', '') else host}:{port}/"


def _own_address() -> str:
    """The address under which the local network knows this computer; no packet is sent to find it."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737: routes like the world, belongs to nobody
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _wait_for_interrupt() -> None:
    while True:
        time.sleep(3600)


def _serving(chosen: Namespace) -> Serving:
    auth: tuple[str, str] | None = None
    if chosen.auth is not None:
        user, colon, password = chosen.auth.partition(":")
        if not (user and colon and password):
            raise UserError("--auth takes a user and a password with a colon between them, as in --auth class:secret.")
        auth = (user, password)
    if chosen.port is not None and not 0 < chosen.port < 65536:
        raise UserError(f"--port is {chosen.port}: give a number from 1 to 65535.")
    return Serving(
        chosen.host,
        chosen.port,
        auth,
        chosen.share,
        chosen.public,
        chosen.browser,
        tuple(chosen.allow_host),
        tuple(chosen.allow_embed),
    )
