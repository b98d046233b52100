"""A running explorer on Starlette, safe by default.

    /           the page, or the form that asks for the password
    /api/NAME   a question of the page or of a program: a JSON object in, one out (`Explorer.handlers`)

Every request passes `ExplorerApp.__call__` first, which checks its host name, its origin, its login, and how many
requests from its address are in flight.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
import webbrowser
from collections import Counter
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from socket import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from moevision.demo.gate import (
    ADDRESS_SHARE,
    MAX_CONNECTIONS,
    PORTS,
    Connection,
    FairExecutor,
    Serving,
    client_address,
    host_in_url,
    parse_host_port,
)
from moevision.demo.html import OFFLINE, app_page, lesson_page, login_page
from moevision.demo.wire import MAX_CHARACTERS, RequestError
from moevision.errors import UserError
from moevision.limits import usable_cores
from moevision.types import Json

if TYPE_CHECKING:
    from moevision.demo.service import Explorer

MAX_BODY = MAX_CHARACTERS + 16_384  # bytes
MAX_LOGIN = 4096  # bytes
MAX_PARTS = 4096  # values in the JSON of a request: parsing millions would delay all visitors
MAX_BODIES = 16 * MAX_BODY  # bytes of all requests that are being read or answered
READ_S = 60.0  # for a request to arrive
DRAIN_S = 5.0  # for the rest of a refused request to arrive
WRONG_LOGIN_S = 1.0  # delay of the answer to a wrong login
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; img-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors "
)


@dataclass
class RequestBody:
    """Receives the body of one request, and enforces the limits on its size, its time and the memory of all bodies."""

    receive_message: Receive  # of the server
    # address -> bytes of all its bodies that are in memory; shared between requests
    body_bytes: Counter[str]
    address: str
    max_bytes: int
    num_bytes: int = 0  # received so far

    def __post_init__(self) -> None:
        self.deadline: float | None = asyncio.get_running_loop().time() + READ_S

    async def receive(self) -> Message:
        """The next ASGI message of the request; an HTTPException if it comes too late or there are too many bytes."""
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive_message()
        except TimeoutError as error:
            raise HTTPException(408, "The request took too long to arrive.") from error
        if not message.get("more_body", False):
            self.deadline = None  # the request is complete; the next message will be the disconnect

        size = len(message.get("body", b""))
        self.num_bytes += size
        self.body_bytes[self.address] += size
        if self.num_bytes > self.max_bytes:
            raise _too_large(self.max_bytes)
        address_exceeds = self.body_bytes[self.address] > MAX_BODIES / ADDRESS_SHARE
        if address_exceeds or self.body_bytes.total() > MAX_BODIES:
            raise HTTPException(503, "Many people are sending images: try again in a few seconds.")
        return message

    async def drain(self) -> None:
        """Read and discard the rest: a visitor who is still sending when the connection closes may miss the answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while (await self.receive_message()).get("more_body", False):
                    pass


class ExplorerApp:
    """The explorer as an ASGI app, which answers the visitors that `serving` admits."""

    def __init__(self, explorer: Explorer, serving: Serving) -> None:
        self.explorer = explorer
        self.serving = serving
        self.tunnel = ""  # host name of the public address, while there is a tunnel
        self._page = app_page(explorer.start_boot(), explorer.start_views())
        self._cookie = f"moevision-{secrets.token_hex(4)}"
        self._session_token = secrets.token_urlsafe(16)
        self._decoding = FairExecutor(1)  # a visitor's image takes up to 0.4 GB
        self._answering = FairExecutor(cpu_workers())
        self._logins = FairExecutor(1)  # one, so that wrong logins wait for each other
        self._requests_in_flight = Counter[str]()  # by address
        self._body_bytes = Counter[str]()  # by address
        self._app = Starlette(
            routes=[
                Route("/", self._app_page),
                Route("/lesson.html", self._lesson_page),
                Route("/login", self._log_in, methods=["POST"]),
                Route("/api/{name}", self._answer, methods=["POST"]),
            ],
            middleware=[Middleware(GZipMiddleware, compresslevel=6)],
            exception_handlers={HTTPException: _refuse},
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; meanwhile count it, and the bytes of its body, for its address."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        scope = self._normalize(scope)
        address = scope["client"][0]
        max_bytes = MAX_LOGIN if scope["path"] == "/login" else MAX_BODY
        body = RequestBody(receive, self._body_bytes, address, max_bytes)
        send = partial(_send_with_headers, send)

        self._requests_in_flight[address] += 1
        try:
            self._check(Request(scope), max_bytes)
            await self._app(scope, body.receive, send)
        except HTTPException as refused:
            await body.drain()
            await _refuse(None, refused)(scope, body.receive, send)
        finally:
            # `-=` of a Counter removes an address whose count becomes 0.
            self._requests_in_flight -= Counter({address: 1})
            self._body_bytes -= Counter({address: body.num_bytes})

    def _normalize(self, scope: Scope) -> Scope:
        """The scope with the path below `root_path`, and with the visitor's address (`client_address`) as client."""
        root = self.serving.root_path
        path = scope["path"]
        if root and f"{path}/".startswith(f"{root}/"):  # the proxy didn't remove it
            path = path.removeprefix(root) or "/"
        forwarded = "x-forwarded-for" in Headers(scope=scope)
        address = client_address(scope["client"], self.serving.proxied, forwarded)
        return {**scope, "path": path, "raw_path": path.encode(), "client": (address, 0)}

    def _check(self, request: Request, max_bytes: int) -> None:
        """Refuse a request, by an HTTPException, where its path and headers are enough to decide it."""
        headers = request.headers
        path = request.scope["path"]
        if not self._accepts_host(headers.get("host", "")):
            raise HTTPException(
                421, "The explorer doesn't go by this name: start it with --allow-host NAME."
            )
        address = request.scope["client"][0]
        if self._requests_in_flight[address] * ADDRESS_SHARE > MAX_CONNECTIONS:
            raise HTTPException(
                503, "Too many requests from this address: try again in a few seconds."
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > max_bytes:
            raise _too_large(max_bytes)
        if path in ("/", "/lesson.html"):
            return
        if not self._is_same_origin(headers):
            raise HTTPException(403, "Another website may not ask this explorer.")
        if path != "/login" and not self._is_logged_in(request):
            raise HTTPException(401, "This explorer asks for a login first: open its page.")

    def _accepts_host(self, authority: str) -> bool:
        """Whether the explorer goes by the host name in `authority` (HOST or HOST:PORT)."""
        host_port = parse_host_port(authority.lower())
        if host_port is None:
            return False
        host, _ = host_port
        return host == self.tunnel or self.serving.accepts_host(host)

    def _is_same_origin(self, headers: Headers) -> bool:
        """Whether a request is from the page itself or from a program, not from a page of another site or port.

        As in Go's `http.CrossOriginProtection`, `Sec-Fetch-Site` decides. Browsers leave it out over http, except to
        localhost; then `Origin` must be the host and port to which the request was sent.
        """
        site = headers.get("sec-fetch-site")
        origin = headers.get("origin")
        if site is not None or origin is None:
            return site in (None, "none", "same-origin")

        scheme, _, authority = origin.lower().partition("://")
        source = parse_host_port(authority, scheme)
        if source is None:
            return False

        hosts = [headers["host"]]
        if self.serving.proxied:  # a script of another site can't set this header
            hosts.append(headers.get("x-forwarded-host", "").partition(",")[0].strip())
        targets = [parse_host_port(host.lower(), scheme) for host in hosts]
        if source in targets:
            return True

        # A proxy may have replaced the name in `Host`: if that is none of the known proxy names, the origin may be one.
        if any(target is not None and self._is_proxy_host(target[0]) for target in targets):
            return False
        return self._is_proxy_host(source[0]) and source[1] == PORTS[scheme]

    def _is_proxy_host(self, name: str) -> bool:
        return name == self.tunnel or self.serving.is_proxy_host(name)

    def _is_logged_in(self, request: Request) -> bool:
        if self.serving.auth is None:
            return True
        cookie = request.cookies.get(self._cookie, "")
        return secrets.compare_digest(cookie.encode(), self._session_token.encode())

    async def _app_page(self, request: Request) -> Response:
        if not self._is_logged_in(request):
            return self._login_page(request)
        policy = f"{self._page.policy}; {POLICY}{self.serving.frames()}"
        return HTMLResponse(
            self._page.text,
            headers={"content-security-policy": policy, "cache-control": "no-cache"},
        )

    async def _lesson_page(self, request: Request) -> Response:
        if not self._is_logged_in(request):
            return self._login_page(request)
        page = lesson_page()
        if page is None:
            raise HTTPException(404)
        policy = f"{OFFLINE}; frame-ancestors {self.serving.frames()}"
        return HTMLResponse(page, headers={"content-security-policy": policy})

    def _login_page(self, request: Request, is_wrong: bool = False) -> Response:
        headers = {
            "content-security-policy": POLICY + self.serving.frames(),
            "cache-control": "no-store",
            # Under "no-referrer" the browser would send the form with `Origin: null`.
            "referrer-policy": "same-origin",
        }
        status = 401 if is_wrong else 200
        return HTMLResponse(login_page(request.url.query, is_wrong), status, headers)

    async def _log_in(self, request: Request) -> Response:
        if self.serving.auth is None:
            raise HTTPException(404)
        async with request.form() as form:
            user = str(form.get("username", "")).strip()
            password = str(form.get("password", ""))
        address = request.scope["client"][0]
        try:
            is_right = await self._logins.run(address, self._is_right, user, password)
        except RequestError as busy:
            raise HTTPException(429, str(busy)) from busy
        if not is_right:
            return self._login_page(request, is_wrong=True)

        refresh = f"0; url=./?{request.url.query}"
        answer = HTMLResponse("You are logged in.", headers={"refresh": refresh})
        # In a frame of another website browsers only keep cookies with SameSite=None, which requires Secure, and https.
        secure = request.url.scheme == "https"
        answer.set_cookie(
            self._cookie,
            self._session_token,
            httponly=True,
            secure=secure,
            samesite="none" if secure else "lax",
        )
        return answer

    def _is_right(self, *login: str) -> bool:
        """Whether `login` is user and password. A wrong one takes `WRONG_LOGIN_S`, which makes guessing slow."""
        expected = "\n".join(self.serving.auth or ())
        is_right = secrets.compare_digest("\n".join(login).encode(), expected.encode())
        if not is_right:
            time.sleep(WRONG_LOGIN_S)
        return is_right

    async def ask(self, address: str, name: str, request: Any) -> Json:
        """The answer to a question from an address, when it is its turn; an image is decoded in a turn of its own."""
        from moevision.demo.service import brings_image, error_json

        try:
            if brings_image(request):
                request = await self._decoding.run(address, self.explorer.opened, name, request)
            return await self._answering.run(address, self.explorer.answer, name, request)
        except Exception as error:  # such as an invalid image or a full executor
            return error_json(error, name)

    async def _answer(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.explorer.handlers:
            raise HTTPException(404)
        answer = await self.ask(request.scope["client"][0], name, await _json_object(request))
        return Response(orjson.dumps(answer), media_type="application/json")

    def close(self) -> None:
        """Refuse new requests and wait for those that run."""
        for executor in (self._decoding, self._answering, self._logins):
            executor.close()


class Server(AbstractContextManager["Server"]):
    """A running explorer at `url`, and with `share` also at the public `share_url`; leaving the scope stops it.

    `listener` is the result of `serving.listen()`, if that was called already. Raises a UserError if `serving.check()`
    refuses the settings, or the port is taken.
    """

    def __init__(
        self, explorer: Explorer, serving: Serving, listener: socket | None = None
    ) -> None:
        serving.check()
        listener = listener or serving.listen()
        self.explorer = explorer
        self.share_url = ""
        self._app = ExplorerApp(explorer, serving)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._app,
                http=Connection,
                ws="none",
                log_level="warning",
                timeout_graceful_shutdown=5,
            )
        )
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([listener],), name="moevision-server"
        )
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            time.sleep(0.01)

        host = serving.bare_host
        if host in ("", "0.0.0.0"):
            host = "localhost"
        port = listener.getsockname()[1]
        self.url = f"http://{host_in_url(host)}:{port}/"
        if serving.share:
            self.share_url = self._open_tunnel(host, port)
        if serving.browser:
            webbrowser.open(self.share_url or self.url)

    def _open_tunnel(self, host: str, port: int) -> str:
        """Open a tunnel to this port; its public URL."""
        from gradio import networking

        try:
            address = networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
        # Errors of httpx and of the program that gradio downloads, and plain `Exception`.
        except Exception as error:
            self.close()
            raise UserError(
                f"The tunnel could not be opened ({error}): check the network, or use --host on your own network."
            ) from error
        self._app.tunnel = urlsplit(address).hostname or ""
        return urlsplit(address)._replace(scheme="https").geturl()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving."""
        self._uvicorn.should_exit = True
        self._app.close()
        self._thread.join()
        self.explorer.close()


def cpu_workers() -> int:
    """Number of requests that are computed at once: one per core, as a small model isn't faster on several."""
    return min(4, usable_cores())


async def _json_object(request: Request) -> Json:
    """The body of a request; an HTTPException if it isn't a JSON object or has too many values."""
    body = await request.body()
    request_json = None
    # These characters bound the number of values; an image, in base64, has none of them.
    if sum(map(body.count, (b"[", b"{", b","))) <= MAX_PARTS:
        with suppress(ValueError, RecursionError):
            request_json = json.loads(body)
    if not isinstance(request_json, dict):
        raise HTTPException(400, "The body must be a JSON object.")
    return request_json


async def _send_with_headers(send: Send, message: Message) -> None:
    """Send an ASGI message; the start of a response gets those of `HEADERS` that it lacks."""
    if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
    await send(message)


def _refuse(_: Request | None, refused: Exception) -> Response:
    """The response to a refused request: a JSON object with `error` and `code`."""
    assert isinstance(refused, HTTPException)
    status = refused.status_code
    code = {413: "too_large", 429: "busy", 503: "busy"}.get(status, "bad_request")
    messages = {404: "There is nothing here.", 405: "This method isn't used here."}
    message = messages.get(status, refused.detail)
    # The connection can't be used again, as the rest of the body isn't read.
    headers = {"connection": "close"} if status in (408, 413, 503) else None
    return JSONResponse({"error": message, "code": code}, status, headers)


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"A request has at most {max_bytes:,} bytes here: send less.")
