"""Who may come in, and when: how the page is served, whose turn it is, how long a connection may keep silent.

Without turns a burst of visitors would fill the memory with waiting images, and one of them shut the others out.
"""

from __future__ import annotations

import asyncio
import errno
import fnmatch
import ipaddress
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from moevision.demo.wire import RequestError
from moevision.errors import UserError

T = TypeVar("T")
AUTH: Final = "MOEVISION_AUTH"
"""Environment variable, USER:PASSWORD, for a service: unlike an argument, others on the computer can't read it."""
WAITING = 64  # requests, beside those that run
MAX_ADDRESSES = 4096  # whose turns are remembered
MAX_CONNECTIONS = 512  # a browser keeps up to 6
ADDRESS_SHARE = 4  # an address has at most a fourth of connections, requests and bodies
PORTS: Final = {"http": 80, "https": 443}  # which browsers leave out
HEADER_S = 10.0
# Of an answer, a visitor takes at least so many bytes in such a time.
READING_S = 30.0
READ_BYTES = 16_384


@dataclass(frozen=True)
class Serving:
    """How the page is served; `moevision demo --help` has each field."""

    host: str = "127.0.0.1"
    port: int | None = None  # the first free one from 7860
    auth: tuple[str, str] | None = None  # user, password
    share: bool = False
    public: bool = False  # the user said that anyone may use it
    browser: bool = False
    allow_host: Sequence[str] = ()  # `*` stands for any characters
    allow_embed: Sequence[str] = ()
    root_path: str = ""  # the proxy may take it off or leave it

    @property
    def bare_host(self) -> str:
        """The host without the brackets that an IPv6 address has in a URL."""
        return self.host.removeprefix("[").removesuffix("]")

    @property
    def local(self) -> bool:
        """Whether only this computer can reach it."""
        return is_loopback(self.host) and not self.share

    @property
    def proxied(self) -> bool:
        """Whether `X-Forwarded-For` tells visitors apart: a proxy that sets it is known to be there."""
        return self.share or bool(self.allow_host) or _on_space()

    def check(self) -> None:
        """Refuse to open the page to others by accident, and names that are not written as ones: a UserError."""
        for name in self.allow_host:
            if not re.fullmatch(r"[\w.*-]+", name, re.ASCII):
                raise UserError(
                    f"--allow-host is {name!r}: give a host name without a port, as in lab.example.org."
                )
        for site in self.allow_embed:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*:(//[\w.*-]+(:(\d+|\*))?)?", site, re.ASCII):
                raise UserError(
                    f"--allow-embed is {site!r}: give a website's origin, as in https://lab.example.org."
                )
        if not re.fullmatch(r"(/[\w.~-]+)*", self.root_path, re.ASCII):
            raise UserError(
                f"--root-path is {self.root_path!r}: give a path without a slash at its end, as in /moe."
            )
        if not self.local and self.auth is None and not self.public:
            way = "--share" if self.share else f"--host {self.host}"
            raise UserError(
                f"{way} lets other people use the explorer on this computer: add --auth USER, which asks for a "
                f"password (or set {AUTH}=USER:PASSWORD), or --public if anyone may."
            )

    def listen(self) -> socket.socket:
        """A socket at the first of the host's addresses that is one of this computer, at a free port.

        A UserError if there is no such address, or the port is taken.
        """
        ports = range(7860, 7960) if self.port is None else (self.port,)
        error: OSError = OSError("it has none")
        try:
            # A computer without IPv6 may list ::1 for its own name all the same.
            addresses = socket.getaddrinfo(self.bare_host or None, 0, type=socket.SOCK_STREAM)
            for family, _, _, _, (name, _, *scope) in addresses:
                for port in ports:
                    try:
                        listener = socket.create_server((name, port, *scope), family=family)
                    except OSError as refused:
                        error = refused
                        continue
                    # Connections inherit it; without it an answer's end waits 40 ms for the browser.
                    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return listener
        except socket.gaierror as unresolved:
            error = unresolved
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            where = f"{host_in_url(self.bare_host)}:{ports[0]}"
            raise UserError(
                f"{where} can't be used ({error}): give another --port, or another --host."
            ) from error
        raise UserError(
            f"--host {self.host} is no address of this computer ({error}): give another."
        ) from error

    def accepts_host(self, name: str) -> bool:
        """Whether the page goes by this host name.

        A website that has its own name point to this computer (DNS rebinding) is refused; an IP address in the place of
        a name can't come from one. A Space is for everyone, and which names Hugging Face uses inside is its own affair.
        """
        computer = socket.gethostname().lower()
        if _on_space() or name in ("localhost", self.host.lower(), computer, f"{computer}.local"):
            return True
        return _ip(name) is not None or self.is_proxy_host(name)

    def is_proxy_host(self, name: str) -> bool:
        """Whether this is a name of `allow_host`, or the Space's, at which a proxy shows the page."""
        if name == "localhost" or _ip(name) is not None:
            return False
        patterns = list(self.allow_host)
        if _on_space():
            patterns.append(os.environ.get("SPACE_HOST", ""))
        return any(fnmatch.fnmatchcase(name, pattern.lower()) for pattern in patterns)

    def frames(self) -> str:
        """Who may show the page in a frame: itself, a notebook here, Hugging Face for a Space, who was named."""
        sites = ["'self'"]
        if self.local:
            sites += ["http://localhost:*", "http://127.0.0.1:*"]
        if _on_space():
            sites += ["https://huggingface.co", "https://*.hf.space"]
        return " ".join([*sites, *self.allow_embed])


def is_loopback(host: str) -> bool:
    """Whether an address to listen at can be reached from this computer only."""
    address = _ip(host.strip("[]"))
    return host == "localhost" or (address is not None and address.is_loopback)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is written as, without its zone; None of a name.

    IPv4 inside IPv6, as a socket of both kinds shows it, is the IPv4 address.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_host_port(authority: str, scheme: str = "http") -> tuple[str, int] | None:
    """Host and port of what `Host` says, or an origin behind its `scheme`, in lower case; None of anything else."""
    parts = re.fullmatch(r"(\[[^\[\]\s]+\]|[^\[\]\s:/?#@\\]+)(?::(\d{0,5}))?", authority)
    if parts is None or scheme not in PORTS:
        return None
    name = parts[1].strip("[]").rstrip(".")
    if not name:
        return None
    return name, int(parts[2] or PORTS[scheme])


def host_in_url(host: str) -> str:
    """A host as URLs have it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _on_space() -> bool:
    return "SPACE_ID" in os.environ


def client_address(client: tuple[str, int] | None, proxied: bool, forwarded: bool) -> str:
    """What counts as one address: an IPv4 address, the first half of an IPv6 one (its whole network), or a word.

    In `client` uvicorn has put the last untrusted address of `X-Forwarded-For` if the connection comes from this
    computer, or from a proxy named in `FORWARDED_ALLOW_IPS`. A request that has this header (`forwarded`) where no
    proxy is (`proxied`) made it up: all of them count as from one address.
    """
    if forwarded and not proxied:
        return "forwarded"
    host = client[0] if client else "unknown"
    address = _ip(host)
    if address is None:
        return host
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class FairExecutor:
    """Runs functions in its own few threads; addresses take turns.

    A free thread goes to the oldest request of the address that had its turn longest ago, or never: an address with one
    request waits for one that runs, however many another address has sent. An address alone may have all places. If
    all are taken, the address with most of them loses its newest one to an address with fewer.
    """

    def __init__(self, workers: int, waiting: int = WAITING) -> None:
        self.workers = workers
        self.waiting = waiting
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="moevision-demo")
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # by address, none of them empty
        self._last_turn: dict[str, int] = {}  # number of each address's last turn, oldest first
        self._num_turns = 0
        self._running = 0
        self._closed = False

    async def run(self, address: str, function: Callable[..., T], *args: Any) -> T:
        """What `function` returns, when it is the turn of this address.

        A RequestError with code "busy" if too many are waiting, or the place was given to another address.
        """
        self._make_room(address)
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._queues.setdefault(address, deque()).append(turn)
        self._give_turns()
        try:
            await turn
            if self._closed:
                raise _busy("The explorer is being stopped.")
            return await loop.run_in_executor(self._pool, function, *args)
        finally:
            had_its_turn = turn.done() and not turn.cancelled() and turn.exception() is None
            if had_its_turn:
                self._running -= 1
                self._give_turns()

    def close(self) -> None:
        """Let nobody in any more and wait for those inside."""
        self._closed = True
        self._pool.shutdown(wait=True)

    def _make_room(self, address: str) -> None:
        """If all places are taken, take one from the address with most of them, or refuse this address."""
        num_waiting = sum(map(len, self._queues.values()))
        if self._running + num_waiting < self.workers + self.waiting:
            return
        longest = max(self._queues.values(), key=len, default=deque())
        if len(longest) <= len(self._queues.get(address, ())) + 1:
            raise _busy()
        newest = longest.pop()
        if not newest.done():
            newest.set_exception(_busy())

    def _give_turns(self) -> None:
        """Let the next requests begin while threads are free."""
        while self._queues and self._running < self.workers:
            address = min(self._queues, key=lambda address: self._last_turn.get(address, 0))
            turn = self._queues[address].popleft()
            if not self._queues[address]:
                del self._queues[address]
            if turn.done():  # nobody waits for it any more
                continue
            self._running += 1
            self._num_turns += 1
            self._last_turn.pop(address, None)
            self._last_turn[address] = self._num_turns
            if len(self._last_turn) > MAX_ADDRESSES:
                del self._last_turn[next(iter(self._last_turn))]
            turn.set_result(None)


def _busy(
    message: str = "Many people are asking at this moment: try again in a few seconds.",
) -> RequestError:
    return RequestError(message, "busy")


class Connection(H11Protocol):
    """uvicorn's connection with time limits for headers and for reading an answer, and a limit on connections.

    uvicorn 0.54 waits for the rest of a header forever, and for a visitor who takes nothing of an answer; its
    `limit_concurrency` lets one client with unfinished headers shut out everyone else.

    One timer runs while it is the visitor's turn: `HEADER_S` from the end of an answer (or the start) until a whole
    request has arrived, or `READING_S` after `READING_S` while an answer waits to be read. None runs while we compute.
    """

    address = ""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or turn it away."""
        super().connection_made(transport)
        host = self.client[0] if self.client else ""
        self.address = client_address(self.client, proxied=False, forwarded=False)
        addresses = [getattr(connection, "address", "") for connection in self.connections]
        too_many = addresses.count(self.address) * ADDRESS_SHARE > MAX_CONNECTIONS
        if is_loopback(host):  # a proxy on this computer is everyone
            too_many = False
        if too_many or len(self.connections) > MAX_CONNECTIONS:
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            transport.close()
        else:
            self._start_timer()

    def handle_events(self) -> None:
        """Uvicorn has parsed what arrived: stop the timer if a request has begun.

        That of an answer which is not read goes on.
        """
        super().handle_events()
        if self._answering and not self.flow.write_paused:
            self._stop_timer()

    def pause_writing(self) -> None:
        """The socket takes no more of an answer: expect that it is read."""
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        """The socket takes bytes again: expect the next request, or nothing while this one is being answered."""
        super().resume_writing()
        self._start_timer()

    def on_response_complete(self) -> None:
        """The answer is written: expect that the rest of it is read, then the next request."""
        self._start_timer()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over: stop the timer."""
        super().connection_lost(exc)
        self._stop_timer()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        """Give the visitor time for what comes next: to read, or to ask."""
        self._stop_timer()
        unread = self.transport.get_write_buffer_size()
        if self.flow.write_paused or (unread and not self._answering):
            self._timer = self.loop.call_later(READING_S, self._check_progress, unread)
        elif not self._answering:
            self._timer = self.loop.call_later(HEADER_S, self.transport.abort)

    def _check_progress(self, unread: int) -> None:
        """End the connection of a visitor who has taken hardly anything of the bytes that were `unread` before."""
        still_unread = self.transport.get_write_buffer_size()
        if still_unread and unread - still_unread < READ_BYTES:
            self.transport.abort()
        else:
            self._start_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
