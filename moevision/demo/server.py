"""A running explorer on Starlette, safe by default.

    /           the page, or the form that asks for the password
    /api/NAME   a question of the page or of a program: a JSON object in, one out (`Explorer.handlers`)

`ExplorerApp.__call__` meets every request first: which host it names, whose it is, and how many requests of its
address are in flight.
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
from typing import TYPE_CHECKING, Any, Final
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
from moevision.demo.wire import MAX_CHARACTERS, Json, RequestError
from moevision.errors import UserError
from moevision.limits import usable_cores

if TYPE_CHECKING:
    from moevision.demo.service import Explorer

MAX_BODY = MAX_CHARACTERS + 16_384
MAX_LOGIN = 4096
MAX_PARTS = 4096  # of a request; of millions, parsing alone would hold everybody up
MAX_BODIES = 16 * MAX_BODY  # of all requests that are being read or answered
READ_S = 60.0  # for a request to arrive
DRAIN_S = 5.0  # for the rest of a request that is refused
WRONG_LOGIN_S = 1.0
HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
POLICY: Final = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; img-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors "
)


@dataclass
class RequestBody:
    """The body of one request: at most `max_bytes` within `READ_S`, and at most its share of what all bodies hold.

    `body_bytes` counts the bytes of all bodies by address.
    """

    messages: Receive
    body_bytes: Counter[str]
    address: str
    max_bytes: int
    num_bytes: int = 0

    def __post_init__(self) -> None:
        self.deadline: float | None = asyncio.get_running_loop().time() + READ_S

    async def receive(self) -> Message:
        """The next message of the request; an HTTPException if it comes too late or there are too many bytes."""
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.messages()
        except TimeoutError as error:
            raise HTTPException(408, "The request took too long to arrive.") from error
        if not message.get("more_body", False):
            self.deadline = None  # it has arrived; what comes is that the visitor leaves

        size = len(message.get("body", b""))
        self.num_bytes += size
        self.body_bytes[self.address] += size
        if self.num_bytes > self.max_bytes:
            raise _too_large(self.max_bytes)
        of_address = self.body_bytes[self.address] * ADDRESS_SHARE
        if max(of_address, self.body_bytes.total()) > MAX_BODIES:
            raise HTTPException(503, "Many people are sending images: try again in a few seconds.")
        return message

    async def drain(self) -> None:
        """Take what still arrives: a visitor who is sending when the connection is closed may lose the answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while (await self.messages()).get("more_body", False):
                    pass


class ExplorerApp:
    """The explorer as an ASGI app, for those whom `serving` admits."""

    def __init__(self, explorer: Explorer, serving: Serving) -> None:
        self.explorer = explorer
        self.serving = serving
        self.tunnel = ""  # its host name
        self._page = app_page(explorer.start_boot(), explorer.start_views())
        self._cookie = f"moevision-{secrets.token_hex(4)}"
        self._session_token = secrets.token_urlsafe(16)
        self._decoding = FairExecutor(1)  # a visitor's image takes up to 0.4 GB
        self._answering = FairExecutor(cpu_workers())
        self._logins = FairExecutor(1)  # wrong ones wait for each other
        self._requests_in_flight = Counter[str]()  # by address
        self._body_bytes = Counter[str]()  # by address
        self._app = Starlette(
            routes=[
                Route("/", self._show),
                Route("/lesson.html", self._lesson),
                Route("/login", self._log_in, methods=["POST"]),
                Route("/api/{name}", self._answer, methods=["POST"]),
            ],
            middleware=[Middleware(GZipMiddleware, compresslevel=6)],
            exception_handlers={HTTPException: _refuse},
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; count it for its address, and its body while that arrives."""
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
            # `-=` forgets an address that has nothing left.
            self._requests_in_flight -= Counter({address: 1})
            self._body_bytes -= Counter({address: body.num_bytes})

    def _normalize(self, scope: Scope) -> Scope:
        """The request with the path below the root, and as client the address that counts."""
        root = self.serving.root_path
        path = scope["path"]
        if root and f"{path}/".startswith(f"{root}/"):  # a proxy that leaves it on
            path = path.removeprefix(root) or "/"
        forwarded = "x-forwarded-for" in Headers(scope=scope)
        address = client_address(scope["client"], self.serving.proxied, forwarded)
        return {**scope, "path": path, "raw_path": path.encode(), "client": (address, 0)}

    def _check(self, request: Request, max_bytes: int) -> None:
        """Refuse a request by its head alone: an HTTPException."""
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
        host_port = parse_host_port(authority.lower())
        if host_port is None:
            return False
        return host_port[0] == self.tunnel or self.serving.accepts_host(host_port[0])

    def _is_same_origin(self, headers: Headers) -> bool:
        """Whether the page itself asks, or a program; not a script of another website, nor of another port.

        As Go's `http.CrossOriginProtection`: the browser says it in `Sec-Fetch-Site`; if it doesn't, which is so on
        http but for localhost, `Origin` must be where the request went.
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
        if self.serving.proxied:  # no script can send this to another website
            hosts.append(headers.get("x-forwarded-host", "").partition(",")[0].strip())
        targets = [parse_host_port(host.lower(), scheme) for host in hosts]
        if source in targets:
            return True
        # A proxy may have put a name of its own in the place of Host's.
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

    async def _show(self, request: Request) -> Response:
        if not self._is_logged_in(request):
            return self._form(request)
        policy = f"{self._page.policy}; {POLICY}{self.serving.frames()}"
        return HTMLResponse(
            self._page.text,
            headers={"content-security-policy": policy, "cache-control": "no-cache"},
        )

    async def _lesson(self, request: Request) -> Response:
        if not self._is_logged_in(request):
            return self._form(request)
        page = lesson_page()
        if page is None:
            raise HTTPException(404)
        policy = f"{OFFLINE}; frame-ancestors {self.serving.frames()}"
        return HTMLResponse(page, headers={"content-security-policy": policy})

    def _form(self, request: Request, wrong: bool = False) -> Response:
        headers = {
            "content-security-policy": POLICY + self.serving.frames(),
            "cache-control": "no-store",
            # Without a referrer a browser doesn't say that the form comes from here.
            "referrer-policy": "same-origin",
        }
        status = 401 if wrong else 200
        return HTMLResponse(login_page(request.url.query, wrong), status, headers)

    async def _log_in(self, request: Request) -> Response:
        if self.serving.auth is None:
            raise HTTPException(404)
        async with request.form() as form:
            user = str(form.get("username", "")).strip()
            password = str(form.get("password", ""))
        address = request.scope["client"][0]
        try:
            right = await self._logins.run(address, self._is_right, user, password)
        except RequestError as busy:
            raise HTTPException(429, str(busy)) from busy
        if not right:
            return self._form(request, wrong=True)

        refresh = f"0; url=./?{request.url.query}"
        answer = HTMLResponse("You are logged in.", headers={"refresh": refresh})
        # Without `secure` no browser keeps a login in another website's frame.
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
        """Whether these are user and password; wrong ones take a second, one after another, so that nobody guesses."""
        expected = "\n".join(self.serving.auth or ())
        right = secrets.compare_digest("\n".join(login).encode(), expected.encode())
        if not right:
            time.sleep(WRONG_LOGIN_S)
        return right

    async def ask(self, address: str, name: str, request: Any) -> Json:
        """The answer to a question that comes from this address; an image is decoded before its turn to be answered."""
        from moevision.demo.service import brings_image, error_json

        try:
            if brings_image(request):
                request = await self._decoding.run(address, self.explorer.opened, name, request)
            return await self._answering.run(address, self.explorer.answer, name, request)
        except Exception as error:  # the image is none, or an executor is full
            return error_json(error, name)

    async def _answer(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.explorer.handlers:
            raise HTTPException(404)
        answer = await self.ask(request.scope["client"][0], name, await _json_object(request))
        return Response(orjson.dumps(answer), media_type="application/json")

    def close(self) -> None:
        """Let nobody in any more and wait for those inside."""
        for executor in (self._decoding, self._answering, self._logins):
            executor.close()


class Server(AbstractContextManager["Server"]):
    """A running explorer at `url`, and with `share` at `share_url` for others; leaving the scope stops it.

    `listener` is from `serving.listen()`, if somebody called that already. Raises a UserError if it may not be opened
    like this, or the port is taken.
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
        from gradio import networking

        try:
            address = networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
        # One of httpx's, of the program that gradio downloads, or a bare one.
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
    """Requests that run at once: a small model is not faster on many cores, so each request gets one."""
    return min(4, usable_cores())


async def _json_object(request: Request) -> Json:
    body = await request.body()
    request_json = None
    # An image, in base64, has none of these.
    if sum(map(body.count, (b"[", b"{", b","))) <= MAX_PARTS:
        with suppress(ValueError, RecursionError):
            request_json = json.loads(body)
    if not isinstance(request_json, dict):
        raise HTTPException(400, "The body must be a JSON object.")
    return request_json


async def _send_with_headers(send: Send, message: Message) -> None:
    """Send a message of the app; the head of an answer gets those of `HEADERS` that it lacks."""
    if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
    await send(message)


def _refuse(_: Request | None, refused: Exception) -> Response:
    assert isinstance(refused, HTTPException)
    status = refused.status_code
    code = {413: "too_large", 429: "busy", 503: "busy"}.get(status, "bad_request")
    messages = {404: "There is nothing here.", 405: "This method isn't used here."}
    message = messages.get(status, refused.detail)
    # What is left of a body is not read.
    headers = {"connection": "close"} if status in (408, 413, 503) else None
    return JSONResponse({"error": message, "code": code}, status, headers)


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"A request has at most {max_bytes:,} bytes here: send less.")
