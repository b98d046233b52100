"""`moevision demo`: loads the models, serves the explorer until Ctrl-C, and says who can see it.

The models and torch are imported when all arguments are known to be right.
"""

from __future__ import annotations

import getpass
import io
import os
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from moevision.demo.gate import AUTH, Serving, host_in_url
from moevision.errors import UserError
from moevision.limits import usable_cores

if TYPE_CHECKING:
    from moevision.demo.server import Server
    from moevision.demo.service import Explorer


def run(args: Namespace, wait: Callable[[], None] | None = None) -> None:
    """Run with parsed command-line arguments until Ctrl-C, or until `wait` returns."""
    if args.port is not None and not 0 < args.port < 65536:
        raise UserError(f"--port is {args.port}: give a number from 1 to 65535.")
    options = {field.name: getattr(args, field.name) for field in fields(Serving)}
    options["auth"] = login(args.auth)
    serving = Serving(**options)
    serving.check()
    # Listen before the models are loaded, which takes seconds: early visitors wait instead of being refused.
    with serving.listen() as listener:
        print("Loading the models …", file=sys.stderr)
        explorer = open_explorer(args.model, args.data, args.root, local=serving.local)
        from moevision.demo.server import Server

        with Server(explorer, serving, listener) as server:
            print(announcement(server, serving), flush=True)
            try:
                (wait or _wait_for_interrupt)()
            except KeyboardInterrupt:
                print("\nStopped.")


def login(argument: str | None) -> tuple[str, str] | None:
    """User and password: from `--auth`, asked for, or from the environment."""
    variable = os.environ.pop(AUTH, None)  # so that programs started from here don't get it
    if variable and variable.partition(":")[0] == argument:
        argument = None  # of the same user: the environment has the password, too
    credentials = variable if argument is None else argument
    if credentials is None:
        return None

    user, colon, password = credentials.partition(":")
    if argument is not None and not colon:
        password = _ask_for_password(user)
    elif argument is not None and user and password:
        print(
            "note: others on this computer can read a password on the command line, and your shell keeps it: "
            f"--auth {user} asks for it, and {AUTH}=USER:PASSWORD sets it for a service.",
            file=sys.stderr,
        )
    if not (user and password):
        source = AUTH if argument is None else "--auth"
        raise UserError(
            f"{source} needs a user and a password, neither of them empty, as in class:secret."
        )
    return user, password


def _ask_for_password(user: str) -> str:
    if not sys.stdin.isatty():
        raise UserError(
            f"--auth {user} asks for a password, and here is no terminal: set {AUTH}=USER:PASSWORD instead."
        )
    return getpass.getpass(f"Password for {user}: ")


def open_explorer(
    models: Sequence[str], data: str | None, root: str | None, *, local: bool = True
) -> Explorer:
    """Load the models, else the bundled ones, warm them up, and begin to look through their images."""
    import torch

    from moevision.demo.galleries import Galleries
    from moevision.demo.models import open_entries, open_own
    from moevision.demo.server import cpu_workers
    from moevision.demo.service import Explorer

    # The cores are divided among the server's workers.
    torch.set_num_threads(max(1, usable_cores() // cpu_workers()))
    entries = [open_own(model, data, root, number) for number, model in enumerate(models)]
    entries = entries or open_entries(None, data, root)  # the bundled models
    explorer = Explorer(entries, Galleries(entries), local=local)
    explorer.warm()
    explorer.galleries.start(explorer.pages.prepare)  # in the background
    return explorer


def announcement(server: Server, serving: Serving) -> str:
    """What is printed when the page is up: address, how to stop, who can see it, and a QR code for others."""
    lines = [f"The explorer is at {server.url}", "Stop it with Ctrl-C."]
    if serving.local:
        lines.append("Only this computer can see it; --host and --share show it to others.")
        return "\n".join(lines)
    address = server.share_url or address_for_others(serving.bare_host, server.url)
    access = " and log in." if serving.auth else ": anyone who can reach it may use it."
    lines += [f"Others open {address}{access}", "", qr_code(address)]
    return "\n".join(lines)


def qr_code(address: str) -> str:
    """A QR code as text for a terminal."""
    import segno

    text = io.StringIO()
    segno.make(address, micro=False).terminal(text, border=2, compact=True)
    return text.getvalue()


def address_for_others(host: str, url: str) -> str:
    """The page's address with this computer's own one in the place of 0.0.0.0 and ::."""
    port = url.rstrip("/").rpartition(":")[2]
    if host in ("0.0.0.0", "::", ""):
        host = _own_address(socket.AF_INET6 if host == "::" else socket.AF_INET)
    return f"http://{host_in_url(host)}:{port}/"


def _own_address(family: socket.AddressFamily) -> str:
    """The address under which the local network knows this computer; no packet is sent to find it."""
    # Addresses for documentation (RFC 5737, RFC 3849), to which packets would take the way to the internet.
    remote = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((remote, 9))  # of UDP: any port, nothing is sent
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _wait_for_interrupt() -> None:
    while True:
        time.sleep(3600)
