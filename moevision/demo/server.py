"""A running explorer: gradio's server with our limits in front of it, safe by default.

The models, gradio and torch are imported when a server is made, so that `moevision demo --help` is quick.
"""

from __future__ import annotations

import fnmatch
import getpass
import ipaddress
import os
import re
import socket
import sys
import time
import urllib.request
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from moevision.errors import DataWarning, UserError
from moevision.limits import usable_cores

if TYPE_CHECKING:
    from moevision.demo.service import Explorer

# Doors that gradio opens when it finds these in the environment.
_DOORS = (
    "GRADIO_SHARE",
    "GRADIO_SERVER_NAME",
    "GRADIO_ALLOWED_PATHS",
    "GRADIO_VIBE_MODE",
    "GRADIO_MCP_SERVER",
    "GRADIO_SSR_MODE",
    "GRADIO_RUN_HISTORY",
)
SESSIONS = 512
AUTH = "MOEVISION_AUTH"
"""Environment variable, USER:PASSWORD, for a service: unlike an argument, others on the computer can't read it."""


@dataclass(frozen=True)
class Serving:
    """How the page is served.

    Attributes:
        host: address to listen at.
        port: None takes the first free one from 7860.
        auth: (user, password), or None.
        share: open a tunnel of gradio's.
        public: the user said that anyone may use it.
        browser: open a browser.
        allow_host: further names that the page goes by, as a proxy's; `*` stands for any characters.
        root_path: where a reverse proxy shows the page, as `/moe`; it may take the path off or leave it.
        allow_embed: websites that may show the page in a frame, as `https://lab.example.org`.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    auth: tuple[str, str] | None = None
    share: bool = False
    public: bool = False
    browser: bool = False
    allow_host: tuple[str, ...] = ()
    allow_embed: tuple[str, ...] = ()
    root_path: str = ""

    @property
    def bare_host(self) -> str:
        """The host without the brackets that an IPv6 address has in a URL."""
        return self.host.removeprefix("[").removesuffix("]")

    @property
    def local(self) -> bool:
        """Whether only this computer can reach it."""
        return is_loopback(self.host) and not self.share

    def check(self) -> None:
        """Refuse to open the page to others by accident, or at an address of another computer.

        Raises:
            UserError: if others could use it without a password and the user didn't say that they may, a name or a
                website is not written as one, or the host is no address of this computer.
        """
        for name in self.allow_host:
            if not re.fullmatch(r"[\w.*-]+", name, re.ASCII):
                raise UserError(f"--allow-host is {name!r}: give a host name without a port, as in lab.example.org.")
        for site in self.allow_embed:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*:(//[\w.*-]+(:(\d+|\*))?)?", site, re.ASCII):
                raise UserError(f"--allow-embed is {site!r}: give a website's origin, as in https://lab.example.org.")
        if not re.fullmatch(r"(/[\w.~-]+)*", self.root_path, re.ASCII):
            raise UserError(f"--root-path is {self.root_path!r}: give a path without a slash at its end, as in /moe.")
        if not self.local and self.auth is None and not self.public:
            way = "--share" if self.share else f"--host {self.host}"
            raise UserError(
                f"{way} lets other people use the explorer on this computer: add --auth USER, which asks for a "
                f"password (or set {AUTH}=USER:PASSWORD), or --public if anyone may."
            )
        if (error := _why_not_own(self.bare_host)) is not None:  # gradio would try a hundred ports, for seconds each
            raise UserError(f"--host {self.host} is no address of this computer ({error}): give another.") from error

    def known(self, name: str) -> bool:
        """Whether the page goes by this host name.

        A website that has its own name point to this computer (DNS rebinding) is refused; an IP address in the place of
        a name can't come from one. A Space is for everyone, and which names Hugging Face uses inside is its own affair.
        """
        own = {"localhost", self.host, socket.gethostname(), f"{socket.gethostname()}.local"}
        if _on_space() or name in {one.lower() for one in own}:
            return True
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return any(fnmatch.fnmatchcase(name, one.lower()) for one in self.allow_host)
        return True

    def frames(self) -> str:
        """Who may show the page in a frame: a notebook on this computer, Hugging Face for a Space, who was named."""
        here = ("http://localhost:*", "http://127.0.0.1:*") if self.local else ()
        space = ("https://huggingface.co", "https://*.hf.space") if _on_space() else ()
        return " ".join((*here, *space, *self.allow_embed))


class Server(AbstractContextManager["Server"]):
    """A running explorer; leaving the scope stops it.

    Attributes:
        url: where it is.
        share_url: where it is for others, with `share`.
        explorer: what answers.
    """

    def __init__(self, explorer: Explorer, serving: Serving) -> None:
        """Start to serve.

        Raises:
            UserError: if it may not be opened like this, or the port is taken.
        """
        serving.check()
        for name in _DOORS:
            os.environ.pop(name, None)
        from starlette.middleware import Middleware
        from starlette.middleware.gzip import GZipMiddleware

        from moevision.demo.gate import DECODERS, Gate
        from moevision.demo.page import MAX_THREADS, Doors, build_page
        from moevision.demo.web import Connection, Guard
        from moevision.demo.wire import MAX_BYTES

        self.explorer, self._doors = explorer, Doors(Gate(DECODERS), Gate(cpu_workers()))
        self._page, document = build_page(explorer, self._doors)
        proxied = serving.share or bool(serving.allow_host) or _on_space()
        guard = Middleware(
            Guard, known=self._known, home=document, frames=serving.frames(), proxied=proxied, root=serving.root_path
        )
        small = Middleware(GZipMiddleware, compresslevel=6)  # gradio compresses what has a file name only
        self._serving, self._tunnel = serving, ""
        _ask_directly(serving.bare_host)
        try:
            _, self.url, self.share_url = self._page.launch(
                server_name=in_url(serving.bare_host),
                server_port=serving.port,
                root_path=serving.root_path,
                auth=serving.auth,
                share=serving.share,
                inbrowser=serving.browser,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                strict_cors=True,
                max_file_size=MAX_BYTES,
                max_threads=MAX_THREADS,
                allowed_paths=[],
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                state_session_capacity=SESSIONS,
                app_kwargs={"middleware": [guard, small], "docs_url": None, "redoc_url": None, "openapi_url": None},
            )
        except Exception as error:  # where gradio can't reach itself it raises errors of httpx's and bare ones
            self._doors.close()
            where = f"{in_url(serving.bare_host)}:{serving.port or 7860}"
            raise UserError(f"{where} can't be used ({error}): give another --port, or another --host.") from error
        self._page.server.config.http_protocol_class = Connection  # uvicorn asks for it at every connection
        if serving.share and not self.share_url:
            self.close()
            raise UserError("The tunnel could not be opened: check the network, or use --host on your own network.")
        if self.share_url:
            self._tunnel = urlsplit(self.share_url).hostname or ""
            self._page.share = False  # the shared page would load its scripts from a server of gradio's

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop serving."""
        self.close()

    def _known(self, name: str) -> bool:
        return self._serving.known(name) or name == self._tunnel

    def close(self) -> None:
        """Stop serving."""
        self._page.close(verbose=False)
        self._doors.close()
        self.explorer.close()


def _why_not_own(host: str) -> OSError | None:
    """Why nothing can listen at any of a host's addresses: a computer without IPv6 may list ::1 for its own name."""
    error = None
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind) as probe:
                    probe.bind(address)
                    return None
            except OSError as refused:
                error = error or refused
    except OSError as unknown:
        return unknown
    return error


def in_url(host: str) -> str:
    """A host as URLs have it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _ask_directly(host: str) -> None:
    """Keep gradio's first request, to its own page, off the proxies that the environment names."""
    proxies = urllib.request.getproxies_environment()
    if proxies:
        os.environ["no_proxy"] = ",".join(filter(None, [proxies.get("no"), "localhost", host]))


def _on_space() -> bool:
    """Whether this is a Space of Hugging Face, which sets the variable."""
    return "SPACE_ID" in os.environ


def cpu_workers() -> int:
    """Requests that run at once: a small model is not faster on many cores, so each request gets one."""
    return min(4, usable_cores())


def open_explorer(model: str | None, data: str | None, root: str | None, *, local: bool = True) -> Explorer:
    """Load the models, start to look through their images, and warm everything up."""
    import torch

    from moevision.demo.bundle import DataOptions, open_entries
    from moevision.demo.galleries import Galleries
    from moevision.demo.service import Explorer

    torch.set_num_threads(max(1, usable_cores() // cpu_workers()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        entries = open_entries(model, DataOptions(data, root))
    for warning in caught:
        if issubclass(warning.category, DataWarning):
            print(f"note: {warning.message}", file=sys.stderr)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    explorer = Explorer(entries, Galleries(entries), local=local)
    explorer.warm()
    explorer.galleries.start(explorer.pages.prepare)
    return explorer


def is_loopback(host: str) -> bool:
    """Whether an address to listen at can be reached from this computer only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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
    address = server.share_url or _address_for_others(serving.bare_host, server.url)
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
    """The page's address with this computer's own one in the place of 0.0.0.0 and ::."""
    port = url.rstrip("/").rpartition(":")[2]
    if host in ("0.0.0.0", "::", ""):
        host = _own_address(socket.AF_INET6 if host == "::" else socket.AF_INET)
    return f"http://{in_url(host)}:{port}/"


def _own_address(family: socket.AddressFamily) -> str:
    """The address under which the local network knows this computer; no packet is sent to find it."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # RFC 5737 and 3849: they route like the world and belong to nobody.
            probe.connect(("2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _wait_for_interrupt() -> None:
    while True:
        time.sleep(3600)


def _login(argument: str | None) -> tuple[str, str] | None:
    """User and password: from `--auth`, asked for, or from the environment, which programs started here don't get.

    Raises:
        UserError: if one of both is missing, or must be asked for without a terminal.
    """
    variable = os.environ.pop(AUTH, None)
    given = variable if argument is None else argument
    if given is None:
        return None
    user, colon, password = given.partition(":")
    if argument is not None and colon and user and password:
        print(
            "note: others on this computer can read a password on the command line, and your shell keeps it: "
            f"--auth {user} asks for it, and {AUTH}=USER:PASSWORD sets it for a service.",
            file=sys.stderr,
        )
    elif argument is not None and not colon:
        if not sys.stdin.isatty():
            raise UserError(
                f"--auth {user} asks for a password, and here is no terminal: set {AUTH}=USER:PASSWORD instead."
            )
        password = getpass.getpass(f"Password for {user}: ")
    if not (user and password):
        name = AUTH if argument is None else "--auth"
        raise UserError(f"{name} needs a user and a password, neither of them empty, as in class:secret.")
    return user, password


def _serving(chosen: Namespace) -> Serving:
    if chosen.port is not None and not 0 < chosen.port < 65536:
        raise UserError(f"--port is {chosen.port}: give a number from 1 to 65535.")
    auth = _login(chosen.auth)
    return Serving(
        chosen.host,
        chosen.port,
        auth,
        chosen.share,
        chosen.public,
        chosen.browser,
        tuple(chosen.allow_host),
        tuple(chosen.allow_embed),
        chosen.root_path,
    )
