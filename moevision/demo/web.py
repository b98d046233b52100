"""What stands between the network and gradio: connections, hosts, routes, bodies, uploads, logins, and headers.

gradio 6.31 serves the calls of the page at `/gradio_api/component_server`, behind the login if there is one, with any
body of any size, and keeps a session for every `session_hash` that it hears of. So here

- a connection that doesn't complete a request's header in time is closed, and there are only so many (`Connection`);
- a request must name a host that the explorer goes by, or any website could reach it by DNS rebinding;
- only the routes that the page and gradio's clients use exist, for GET as for POST;
- a body is read up to a limit, within a time, and only as long as all bodies together fit;
- one address has at most a fourth of these bodies, and of the requests that are being answered;
- it must be a JSON object (forms aside) whose names of sessions and functions are short, and not empty: an empty
  `session_hash` ends the loop of gradio's queue, and with it the API for everyone;
- an uploaded file stays in memory for one request (`Uploads`), so that gradio opens no path and no address;
- wrong logins are slowed down (`Brake`).
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from uvicorn.protocols.http.h11_impl import H11Protocol

from moevision.demo.gate import Brake, client_address
from moevision.demo.html import Document
from moevision.demo.server import is_loopback
from moevision.demo.wire import MAX_BYTES, MAX_CHARACTERS

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY: Final = MAX_CHARACTERS + 16_384
MAX_BODIES: Final = 16 * MAX_BODY
EACH: Final = 4  # an address may have a fourth of that, and of the requests that are being answered
READ_S: Final = 60.0
MAX_WORD: Final = 100
API: Final = "/gradio_api"
LOGIN: Final = ("/login", "/login/")
UPLOAD: Final = f"{API}/upload"
MAX_LOGIN: Final = 4096
MAX_UPLOADS: Final = 8 * MAX_BYTES
UPLOAD_S: Final = 600.0
HEADER_S: Final = 10.0
MAX_CONNECTIONS: Final = 512  # a browser keeps up to 6, of which one stays open
MAX_CONNECTIONS_EACH: Final = MAX_CONNECTIONS // EACH
# What the page and gradio's clients use; a name that ends in "/" stands for all that begins with it.
_GET: Final = (
    "/assets/",
    "/static/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/robots.txt",
    "/manifest.json",
    f"{API}/info",
    f"{API}/theme.css",
    f"{API}/login_check",
    f"{API}/startup-events",
    f"{API}/heartbeat/",
    f"{API}/queue/data",
    f"{API}/queue/status",
    f"{API}/call/",
)
_POST: Final = (
    *LOGIN,
    UPLOAD,
    f"{API}/component_server",
    f"{API}/queue/join",
    f"{API}/call/",
    f"{API}/run/",
    f"{API}/api/",
    f"{API}/cancel",
    f"{API}/reset",
)
# gradio answers these without a login, or they are ours.
_PRIVATE: Final = (UPLOAD, f"{API}/heartbeat/", f"{API}/cancel", f"{API}/reset")
log = logging.getLogger(__name__)
# gradio's page, where a visitor logs in, has scripts inside its HTML and makes functions from the components' templates
# ("unsafe-inline" and "unsafe-eval"); everything else comes from here and goes nowhere else.
POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self' "
)
# Ours has one script, which is known.
HOME_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; img-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self' "
)
HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)


class Refused(Exception):  # noqa: N818  (an answer, not an error)
    """A request that doesn't reach gradio: status and sentence."""

    def __init__(self, status: int, sentence: str, code: str = "bad_request") -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.code = status, sentence, code


class Guard:
    """The middleware.

    Args:
        app: what it protects.
        known: whether a host name is one of the explorer's own.
        home: the page, for those who are logged in.
        frames: who may show the page in a frame besides itself, as sources of a Content-Security-Policy.
        root: path below which a proxy shows the page.
        proxied: whether `X-Forwarded-For` tells visitors apart: a proxy that sets it is known to be there.
        max_body: largest body of one request, in bytes.
        max_bodies: of all bodies that are being read or answered; an address has at most a fourth of it.
        read_s: how long reading a body may take.
    """

    def __init__(
        self,
        app: App,
        known: Callable[[str], bool],
        home: Document,
        frames: str = "",
        proxied: bool = False,
        root: str = "",
        max_body: int = MAX_BODY,
        max_bodies: int = MAX_BODIES,
        read_s: float = READ_S,
    ) -> None:
        self.app, self.known, self.proxied, self.root = app, known, proxied, root
        self.max_body, self.max_bodies, self.read_s = max_body, max_bodies, read_s
        policy, own = (POLICY + frames).strip(), (HOME_POLICY + frames).strip()
        self.headers = (*HEADERS, (b"content-security-policy", policy.encode()))
        self.home_headers = (*HEADERS, (b"content-security-policy", f"{home.policy}; {own}".encode()))
        self.home = home.text.encode()
        self.home_gzip = gzip.compress(self.home, mtime=0)
        self.uploads, self.brake = Uploads(), Brake()
        # By address: requests that are being answered, and bytes of bodies. Touched by the event loop's thread only.
        self._inside: Counter[str] = Counter()
        self._held: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root and f"{scope['path']}/".startswith(f"{self.root}/"):  # a proxy that leaves it on
            path = scope["path"].removeprefix(self.root) or "/"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        answer = _Answer(send, self.headers, scope["method"] == "POST")
        body = bytearray()
        address = client_address(scope["client"], self.proxied, "x-forwarded-for" in Headers(scope=scope))
        scope = {**scope, "client": (address, 0)}  # who takes turns with others in `Gate`
        self._inside[address] += 1
        try:
            path = scope["path"]
            if self._inside[address] > MAX_CONNECTIONS_EACH:
                raise Refused(503, "Too many requests from this address: try again in a few seconds.", "busy")
            self._check_host(scope)
            _check_route(scope["method"], path)
            if path.startswith(_PRIVATE) and not await self._may_enter(scope, receive):
                raise Refused(401, "This explorer asks for a login first.")
            if scope["method"] == "POST":
                await self._read(scope, receive, body)
                if path == UPLOAD:
                    await answer.json(200, [await self.uploads.keep(scope, bytes(body))])
                    return
                login = path in LOGIN
                receive = _replayed(bytes(body) if login else _check_body(bytes(body), self.uploads), receive)
                await (self._log_in if login else self._run)(scope, receive, answer)
            elif path == "/" and await self._may_enter(scope, receive):
                await self._show_home(scope, _Answer(send, self.home_headers, False))
            else:
                await self._run(scope, receive, answer)
        except Refused as refused:
            await answer.refuse(refused)
        finally:
            _take(self._inside, address, 1)
            _take(self._held, address, len(body))

    async def _show_home(self, scope: Scope, answer: _Answer) -> None:
        packed = "gzip" in Headers(scope=scope).get("accept-encoding", "")
        body = self.home_gzip if packed else self.home
        headers = [
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-cache"),
            (b"vary", b"accept-encoding"),
            *([(b"content-encoding", b"gzip")] if packed else []),
        ]
        await answer({"type": "http.response.start", "status": 200, "headers": headers})
        await answer({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _check_host(self, scope: Scope) -> None:
        given = Headers(scope=scope).get("host", "")
        try:
            name = (urlsplit(f"//{given}").hostname or "").rstrip(".")
        except ValueError:
            name = ""
        if not name or not self.known(name):
            raise Refused(421, f"The explorer doesn't go by the name {name[:99]!r}: start it with --allow-host NAME.")

    async def _may_enter(self, scope: Scope, receive: Receive) -> bool:
        """Whether gradio takes the visitor for logged in; there may be no login."""
        path, found = f"{API}/login_check", 0

        async def hear(message: MutableMapping[str, Any]) -> None:
            nonlocal found
            found = message.get("status", found)

        await self.app({**scope, "method": "GET", "path": path, "raw_path": path.encode()}, receive, hear)
        return found == 200

    async def _log_in(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Let gradio check a login when its address may have one checked."""
        address = scope["client"][0]
        wait_s = self.brake.pause(address)
        if wait_s is None:
            raise Refused(429, "Too many wrong logins from this address: wait a minute and try again.", "busy")
        await asyncio.sleep(wait_s)
        await self._run(scope, receive, answer)
        if answer.status < 400:
            self.brake.release(address)

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            # gradio looks up components, functions and arguments without asking whether they exist; what fails in our
            # own handlers is told in their answer and doesn't come this way.
            if answer.status or scope["method"] != "POST":
                raise
            log.warning("gradio could not answer %s", scope["path"], exc_info=True)
            raise _misfit() from error
        if answer.misfit:
            raise _misfit()

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        address = scope["client"][0]
        most = MAX_LOGIN if scope["path"] in LOGIN else self.max_body
        too_large = Refused(413, f"A request has at most {most:,} bytes here: send less.", "too_large")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or len(announced) > 18 or int(announced) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.read_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "The request broke off.")
                    chunk = message.get("body", b"")
                    body += chunk
                    self._held[address] += len(chunk)
                    if len(body) > most:
                        raise too_large
                    if self._held[address] * EACH > self.max_bodies or self._held.total() > self.max_bodies:
                        raise Refused(503, "Many people are sending images: try again in a few seconds.", "busy")
                    if not message.get("more_body", False):
                        return
        except TimeoutError as error:
            raise Refused(408, "The request took too long to arrive.") from error


class _Answer:
    """`send` with our headers, which knows whether the answer has begun, and with which status.

    An answer to a POST with 422 (a list of pydantic's complaints) or 500 (no handler of ours fails so) is held back:
    the body didn't fit.
    """

    def __init__(self, send: Send, headers: tuple[tuple[bytes, bytes], ...], post: bool) -> None:
        self.send, self.headers, self.post = send, headers, post
        self.status, self.misfit = 0, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.misfit = self.post and not self.status and message["status"] in (422, 500)
            if not self.misfit:
                self.status = message["status"]
                names = {name for name, _ in self.headers}
                kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
                message["headers"] = [*kept, *self.headers]
        if not self.misfit:
            await self.send(message)

    async def json(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status in (408, 413, 503):  # what is left of the body is not read
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    async def refuse(self, refused: Refused) -> None:
        self.misfit = False
        await self.json(refused.status, {"error": refused.sentence, "code": refused.code})


class Uploads:
    """Files that gradio's clients send ahead of a request, in memory, each for one request and at most 10 minutes.

    gradio would write them to a folder and later open the path that a request names, or fetch it if it is an address.
    Here the "path" of a file is a random word, and `text_of` puts the file itself in its place.

    Args:
        limit: bytes of all files; the oldest one of the address with most bytes makes room.
    """

    def __init__(self, limit: int = MAX_UPLOADS) -> None:
        self.limit = limit
        self._files: dict[str, tuple[str, bytes]] = {}  # address and content

    async def keep(self, scope: Scope, body: bytes) -> str:
        """Take the one file of a multipart form.

        Returns:
            The name by which a request may ask for it.
        """

        async def stream() -> AsyncGenerator[bytes, None]:
            yield body

        headers = Headers(scope=scope)
        if not headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused(400, "A file is sent as multipart/form-data.")
        parser = MultiPartParser(headers, stream(), max_files=1, max_fields=0)
        parser.spool_max_size = len(body) + 1  # nothing is written to disk
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError, UnicodeError) as error:
            raise Refused(400, "The form must hold one file, named 'files'.") from error
        file = form.get("files")
        if file is None or isinstance(file, str):
            raise Refused(400, "The form must hold one file, named 'files'.")
        data = await file.read()
        await form.close()
        if len(data) > MAX_BYTES:
            raise Refused(413, f"The file is larger than {MAX_BYTES // 2**20} MB: save it smaller.", "too_large")
        name = f"upload:{secrets.token_urlsafe(16)}"
        self._files[name] = (scope["client"][0], data)
        while self._held().total() > self.limit:
            ((most, _),) = self._held().most_common(1)
            del self._files[next(one for one, (address, _) in self._files.items() if address == most)]
        asyncio.get_running_loop().call_later(UPLOAD_S, self._files.pop, name, None)
        return name

    def text_of(self, path: str) -> str:
        """The file of this name as base64 text, once; any other path as it is, which nothing opens."""
        _, data = self._files.pop(path, ("", None))
        return path if data is None else base64.b64encode(data).decode("ascii")

    def _held(self) -> Counter[str]:
        held: Counter[str] = Counter()
        for address, data in self._files.values():
            held[address] += len(data)
        return held


class Connection(H11Protocol):
    """uvicorn's connection with a time limit for headers, and a limit on connections.

    uvicorn 0.54 waits for the rest of a header forever, and its `limit_concurrency` lets one client with unfinished
    headers shut out everyone else.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or turn it away."""
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        each = sum((getattr(other, "client", None) or ("",))[0] == address for other in self.connections)
        crowd = each > MAX_CONNECTIONS_EACH and not is_loopback(address)  # a proxy on this computer stands for everyone
        if crowd or len(self.connections) > MAX_CONNECTIONS:
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            transport.close()
        else:
            self._expect_header()

    def handle_events(self) -> None:
        """Stop the clock when a request has begun."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_clock()

    def on_response_complete(self) -> None:
        """Expect the next request."""
        self._expect_header()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def _expect_header(self) -> None:
        self._stop_clock()
        self._late = self.loop.call_later(HEADER_S, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()


def _take(held: Counter[str], address: str, amount: int) -> None:
    """Subtract, and forget an address that has nothing left."""
    held[address] -= amount
    if not held[address]:
        del held[address]


def _misfit() -> Refused:
    return Refused(400, "The body doesn't have the form that this route takes: look at /gradio_api/info.")


def _check_route(method: str, path: str) -> None:
    if method not in ("GET", "HEAD", "POST"):
        raise Refused(405, f"The method {method[:20]} isn't used here.")
    routes = _POST if method == "POST" else _GET
    found = any(path.startswith(one) if one.endswith("/") else path in (one, f"{one}/") for one in routes)
    if not found and not (path == "/" and method != "POST"):
        raise Refused(404, "There is nothing here: images are sent inside a request, files are never opened.")


def _check_body(body: bytes, uploads: Uploads) -> bytes:
    """Check a JSON body, and put an uploaded file in the place of its name."""
    files = 0

    def exchanged(found: dict[str, Any]) -> Any:
        nonlocal files
        if not ("meta" in found and isinstance(found.get("path"), str)):
            return found
        files += 1
        return uploads.text_of(found["path"])

    try:
        found = json.loads(body, object_hook=exchanged)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The body must be a JSON object.") from error
    if not isinstance(found, dict):
        raise Refused(400, "The body must be a JSON object.")
    if files > 1:
        raise Refused(400, "A request holds one file.")
    for name in ("session_hash", "fn_name", "event_id"):
        value = found.get(name)
        if value is not None and not (isinstance(value, str) and value.isascii() and 0 < len(value) <= MAX_WORD):
            raise Refused(400, f"{name} must be a text of 1 to {MAX_WORD} ASCII characters.")
    return json.dumps(found).encode() if files else body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body that was read already, and then what comes after it."""
    done = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal done
        if done:
            return await receive()
        done = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
