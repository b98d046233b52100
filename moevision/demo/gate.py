"""Access to the explorer: settings and host names, the order of requests, limits on connections and their time.

Without a limited and fair queue a burst of requests would fill the memory with waiting images, and one visitor could
block the others.
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
from itertools import product
from typing import Any, TypeVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from moevision.demo.wire import RequestError
from moevision.errors import UserError

T = TypeVar("T")
AUTH = "MOEVISION_AUTH"
"""Environment variable with USER:PASSWORD: unlike an argument, other users of the computer can't read it."""
WAITING = 64  # requests that may wait, in addition to those that run
MAX_ADDRESSES = 4096  # addresses whose last turn is remembered
MAX_CONNECTIONS = 512  # a browser keeps up to 6
# An address may have at most 1 / 4 of all connections, requests and bytes of bodies.
ADDRESS_SHARE = 4
PORTS = {"http": 80, "https": 443}  # default ports, which browsers leave out
HEADER_S = 10.0  # for the headers of a request to arrive
# While a visitor receives an answer, at least `READ_BYTES` in every `READING_S`.
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
    root_path: str = ""  # of the page behind a proxy, which may remove it from paths or leave it

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
        """Whether the page is known to be behind a proxy, which says in `X-Forwarded-For` who a visitor is."""
        return self.share or bool(self.allow_host) or _on_space()

    def check(self) -> None:
        """Refuse, by a UserError, to open the page to others by accident, and malformed names, sites and paths."""
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
        """A listening socket: the first address of `host` on which this computer can listen, and its first free port.

        A UserError if there is no such address, or the port is taken.
        """
        ports = range(7860, 7960) if self.port is None else (self.port,)
        error: OSError = OSError("it has none")  # the last failure, for the message
        try:
            # A computer without IPv6 may list ::1 for its own name all the same.
            addresses = socket.getaddrinfo(self.bare_host or None, 0, type=socket.SOCK_STREAM)
            for (family, _, _, _, (name, _, *scope)), port in product(addresses, ports):
                try:
                    listener = socket.create_server((name, port, *scope), family=family)
                except OSError as refused:
                    error = refused
                    continue
                # Inherited by connections. Without it the end of an answer waits 40 ms for an acknowledgement.
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
        """Whether requests to this host name are answered.

        Unknown names are refused, because a website could let its own name point to this computer (DNS rebinding); an
        IP address isn't such a name. On a Space all names are accepted: it is public, and Hugging Face may use any.
        """
        hostname = socket.gethostname().lower()
        if _on_space() or name in ("localhost", self.host.lower(), hostname, f"{hostname}.local"):
            return True
        return _ip(name) is not None or self.is_proxy_host(name)

    def is_proxy_host(self, name: str) -> bool:
        """Whether this is a name under which a proxy serves the page: one of `allow_host`, or the Space's."""
        if name == "localhost" or _ip(name) is not None:
            return False
        patterns = list(self.allow_host)
        if _on_space():
            patterns.append(os.environ.get("SPACE_HOST", ""))
        return any(fnmatch.fnmatchcase(name, pattern.lower()) for pattern in patterns)

    def frames(self) -> str:
        """The sites that may show the page in a frame, for the header `frame-ancestors`.

        The page itself, notebooks on this computer, Hugging Face for a Space, and `allow_embed`.
        """
        sites = ["'self'"]
        if self.local:
            sites += ["http://localhost:*", "http://127.0.0.1:*"]
        if _on_space():
            sites += ["https://huggingface.co", "https://*.hf.space"]
        return " ".join([*sites, *self.allow_embed])


def is_loopback(host: str) -> bool:
    """Whether a host to listen on can only be reached from this computer."""
    address = _ip(host.strip("[]"))
    return host == "localhost" or (address is not None and address.is_loopback)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address, without its zone, if the host is one; None if it is a name.

    An IPv4 address mapped into IPv6, as sockets for both give it, becomes the IPv4 address.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_host_port(authority: str, scheme: str = "http") -> tuple[str, int] | None:
    """Host and port of a lower-case `Host` header, or of an origin after its `scheme`; None if malformed."""
    parts = re.fullmatch(r"(\[[^\[\]\s]+\]|[^\[\]\s:/?#@\\]+)(?::(\d{0,5}))?", authority)
    if parts is None or scheme not in PORTS:
        return None
    name = parts[1].strip("[]").rstrip(".")
    if not name:
        return None
    return name, int(parts[2] or PORTS[scheme])


def host_in_url(host: str) -> str:
    """A host as written in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _on_space() -> bool:
    return "SPACE_ID" in os.environ


def client_address(client: tuple[str, int] | None, proxied: bool, forwarded: bool) -> str:
    """The address for which a visitor is counted: an IPv4 address, the /64 network of an IPv6 one, or a word.

    If the connection comes from this computer, or from a proxy named in `FORWARDED_ALLOW_IPS`, uvicorn has set `client`
    to the last untrusted address of `X-Forwarded-For`. Where no proxy is expected (`proxied` is false), a request with
    this header (`forwarded`) has forged it: all such requests count as one address.
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
    """Runs functions in its own few threads, and gives the addresses of visitors turns.

    A free thread takes the oldest request of the address whose last turn is longest ago, or that never had one. However
    many requests another address has sent, an address with a single one therefore waits for the running ones at most.

    At most `waiting` requests wait. A single address may fill the queue; when it is full, a request of an address with
    fewer waiting requests displaces the newest one of the address with most.
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
        """The result of `function`, called in a thread when it is the turn of this request.

        A RequestError with code "busy" if the queue is full, or this request was displaced by that of another address.
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
            # `_give_turns` resolves the future. One that was cancelled (the visitor left) or has an exception (it was
            # displaced) was never counted as running.
            had_its_turn = turn.done() and not turn.cancelled() and turn.exception() is None
            if had_its_turn:
                self._running -= 1
                self._give_turns()

    def close(self) -> None:
        """Refuse new requests and wait for those that run."""
        self._closed = True
        self._pool.shutdown(wait=True)

    def _make_room(self, address: str) -> None:
        """If the queue is full, displace a request of the address with most of them, or refuse this address."""
        num_waiting = sum(map(len, self._queues.values()))
        if self._running + num_waiting < self.workers + self.waiting:
            return
        longest_queue = max(self._queues.values(), key=len, default=deque())
        length_with_this = len(self._queues.get(address, ())) + 1
        if len(longest_queue) <= length_with_this:
            raise _busy()
        newest = longest_queue.pop()
        if not newest.done():
            newest.set_exception(_busy())

    def _give_turns(self) -> None:
        """Start the next requests while threads are free."""
        while self._queues and self._running < self.workers:
            address = min(self._queues, key=lambda address: self._last_turn.get(address, 0))
            turn = self._queues[address].popleft()
            if not self._queues[address]:
                del self._queues[address]
            if turn.done():  # cancelled, or displaced
                continue

            self._running += 1
            self._num_turns += 1
            self._last_turn.pop(address, None)  # so that the address moves to the end
            self._last_turn[address] = self._num_turns
            if len(self._last_turn) > MAX_ADDRESSES:
                del self._last_turn[next(iter(self._last_turn))]
            turn.set_result(None)


def _busy(
    message: str = "Many people are asking at this moment: try again in a few seconds.",
) -> RequestError:
    return RequestError(message, "busy")


class Connection(H11Protocol):
    """uvicorn's connection with time limits for receiving headers and sending an answer, and a limit on connections.

    uvicorn 0.54 waits forever for the rest of a header, and for a visitor who doesn't read an answer; its
    `limit_concurrency` lets one client with unfinished headers block everyone else.

    A connection has at most one timer, and none while an answer is being computed:
    - `HEADER_S`, from the start of the connection or the end of an answer, until the headers of a request have arrived;
    - `READING_S`, again and again while bytes of an answer wait to be read, of which some must be read each time.
    """

    address = ""  # of the visitor, as `client_address` has it
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or refuse it if there are too many."""
        super().connection_made(transport)
        host = self.client[0] if self.client else ""
        self.address = client_address(self.client, proxied=False, forwarded=False)
        addresses = [getattr(connection, "address", "") for connection in self.connections]
        too_many = addresses.count(self.address) * ADDRESS_SHARE > MAX_CONNECTIONS
        if is_loopback(host):  # may be a proxy, with the connections of all visitors
            too_many = False
        if too_many or len(self.connections) > MAX_CONNECTIONS:
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            transport.close()
        else:
            self._start_timer()

    def handle_events(self) -> None:
        """Called when uvicorn has parsed received bytes: stop the timer if a request has begun.

        The timer of an earlier answer that isn't fully read goes on.
        """
        super().handle_events()
        if self._answering and not self.flow.write_paused:
            self._stop_timer()

    def pause_writing(self) -> None:
        """Called when the write buffer is full: start the timer for reading."""
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        """Called when the write buffer has room again: start the timer that is due now, if any."""
        super().resume_writing()
        self._start_timer()

    def on_response_complete(self) -> None:
        """Called when an answer is written: start the timer for reading the rest of it, or for the next request."""
        self._start_timer()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection is closed: stop the timer."""
        super().connection_lost(exc)
        self._stop_timer()

    @property
    def _answering(self) -> bool:
        """Whether a request has begun whose answer isn't complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        """Restart the timer: for reading an answer, for the next request, or none while an answer is computed."""
        self._stop_timer()
        unread = self.transport.get_write_buffer_size()
        if self.flow.write_paused or (unread and not self._answering):
            self._timer = self.loop.call_later(READING_S, self._check_progress, unread)
        elif not self._answering:
            self._timer = self.loop.call_later(HEADER_S, self.transport.abort)

    def _check_progress(self, unread: int) -> None:
        """Close the connection if fewer than `READ_BYTES` were read since there were `unread` bytes; else go on."""
        still_unread = self.transport.get_write_buffer_size()
        if still_unread and unread - still_unread < READ_BYTES:
            self.transport.abort()
        else:
            self._start_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
