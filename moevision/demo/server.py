"""A running explorer on Starlette, safe by default.

    /           the page, or the form that asks for the password
    /api/NAME   a question of the page or of a program: a JSON object in, one out (`Explorer.handlers`)

`Door.__call__` meets every request first: which host it names, whose it is, how much its address has inside already.
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
    EACH,
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

if TYPE_CHECKING:
    from moevision.demo.service import Explorer, Json

MAX_BODY: Final = MAX_CHARACTERS + 16_384
MAX_LOGIN: Final = 4096
MOST_PARTS: Final = 4096  # of a request; of millions, parsing alone would hold everybody up
MAX_BODIES: Final = 16 * MAX_BODY  # of all requests that are being read or answered
READ_S, DRAIN_S, WRONG_LOGIN_S = 60.0, 5.0, 1.0
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


class ExplorerApp:
    """The explorer as an ASGI app, for whom `serving` lets in."""

    def __init__(self, explorer: Explorer, serving: Serving) -> None:
        self.explorer, self.serving, self.tunnel = explorer, serving, ""
        self._page = app_page(explorer.start_boot(), explorer.start_views())
        self._cookie, self._word = f"moevision-{secrets.token_hex(4)}", secrets.token_urlsafe(16)
        # Decoding a visitor's image takes up to 0.4 GB; wrong logins wait for each other.
        self._decoding, self._answering, self._logins = (
            FairExecutor(1),
            FairExecutor(cpu_workers()),
            FairExecutor(1),
        )
        self._inside, self._held = (
            Counter[str](),
            Counter[str](),
        )  # by address: requests, and bytes of their bodies
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
        path, root, headers = scope["path"], self.serving.root_path, Headers(scope=scope)
        if root and f"{path}/".startswith(f"{root}/"):  # a proxy that leaves it on
            path = path.removeprefix(root) or "/"
        address = client_address(
            scope["client"], self.serving.proxied, "x-forwarded-for" in headers
        )
        scope = {**scope, "path": path, "raw_path": path.encode(), "client": (address, 0)}
        most = MAX_LOGIN if path == "/login" else MAX_BODY
        held, more, end = 0, True, asyncio.get_running_loop().time() + READ_S

        async def counted() -> Message:
            nonlocal held, more
            try:
                async with asyncio.timeout_at(end if more else None):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, "The request took too long to arrive.") from error
            more, size = more and message.get("more_body", False), len(message.get("body", b""))
            held += size
            self._held[address] += size
            if held > most:
                raise _too_large(most)
            if self._held[address] * EACH > MAX_BODIES or self._held.total() > MAX_BODIES:
                raise HTTPException(
                    503, "Many people are sending images: try again in a few seconds."
                )
            return message

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                for header in HEADERS.items():
                    MutableHeaders(scope=message).setdefault(*header)
            await send(message)

        self._inside[address] += 1
        try:
            self._check(Request(scope), address, most)
            await self._app(scope, counted, protected)
        except HTTPException as refused:
            with suppress(
                TimeoutError
            ):  # who still sends when the connection is closed may lose the answer
                async with asyncio.timeout(DRAIN_S):
                    while (await receive()).get("more_body", False):
                        pass
            await _refuse(None, refused)(scope, counted, protected)
        finally:
            self._inside -= Counter({address: 1})  # which forgets an address that has nothing left
            self._held -= Counter({address: held})

    def _check(self, request: Request, address: str, most: int) -> None:
        headers, path = request.headers, request.scope["path"]
        if not self._is_known(headers.get("host", "")):
            raise HTTPException(
                421, "The explorer doesn't go by this name: start it with --allow-host NAME."
            )
        if self._inside[address] * EACH > MAX_CONNECTIONS:
            raise HTTPException(
                503, "Too many requests from this address: try again in a few seconds."
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise _too_large(most)
        if path in ("/", "/lesson.html"):
            return
        if not self._is_own(headers):
            raise HTTPException(403, "Another website may not ask this explorer.")
        if path != "/login" and not self._is_logged_in(request):
            raise HTTPException(401, "This explorer asks for a login first: open its page.")

    def _is_known(self, host: str) -> bool:
        called = parse_host_port(host.lower())
        return called is not None and (self.serving.known(called[0]) or called[0] == self.tunnel)

    def _is_own(self, headers: Headers) -> bool:
        """Whether the page itself asks, or a program; not a script of another website, nor of another port.

        As Go's `http.CrossOriginProtection`: the browser says it in `Sec-Fetch-Site`; if it doesn't, which is so on
        http but for localhost, `Origin` must be where the request went.
        """
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is not None or origin is None:
            return site in (None, "none", "same-origin")
        scheme, _, authority = origin.lower().partition("://")
        asking = parse_host_port(authority, scheme)
        if asking is None:
            return False
        hosts = [headers["host"]]
        if self.serving.proxied:  # no script can send this to another website
            hosts.append(headers.get("x-forwarded-host", "").partition(",")[0].strip())
        asked = [parse_host_port(host.lower(), scheme) for host in hosts]
        if asking in asked:
            return True
        # A proxy may have put a name of its own in the place of Host's.
        rewritten = not any(self._is_outside(one[0]) for one in asked if one is not None)
        return rewritten and self._is_outside(asking[0]) and asking[1] == PORTS[scheme]

    def _is_outside(self, name: str) -> bool:
        return name == self.tunnel or self.serving.outside(name)

    def _is_logged_in(self, request: Request) -> bool:
        given = request.cookies.get(self._cookie, "")
        return self.serving.auth is None or secrets.compare_digest(
            given.encode(), self._word.encode()
        )

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
        if (page := lesson_page()) is None:
            raise HTTPException(404)
        policy = f"{OFFLINE}; frame-ancestors {self.serving.frames()}"
        return HTMLResponse(page, headers={"content-security-policy": policy})

    def _form(self, request: Request, wrong: bool = False) -> Response:
        headers = {
            "content-security-policy": POLICY + self.serving.frames(),
            "cache-control": "no-store",
        }
        # Without a referrer a browser doesn't say that the form comes from here.
        return HTMLResponse(
            login_page(request.url.query, wrong),
            401 if wrong else 200,
            {**headers, "referrer-policy": "same-origin"},
        )

    async def _log_in(self, request: Request) -> Response:
        if self.serving.auth is None:
            raise HTTPException(404)
        async with request.form() as form:
            given = str(form.get("username", "")).strip(), str(form.get("password", ""))
        try:
            right = await self._logins.run(request.scope["client"][0], self._is_right, *given)
        except RequestError as busy:
            raise HTTPException(429, str(busy)) from busy
        if not right:
            return self._form(request, wrong=True)
        answer = HTMLResponse(
            "You are logged in.", headers={"refresh": f"0; url=./?{request.url.query}"}
        )
        secure = (
            request.url.scheme == "https"
        )  # without which no browser keeps a login in another website's frame
        answer.set_cookie(
            self._cookie,
            self._word,
            httponly=True,
            secure=secure,
            samesite="none" if secure else "lax",
        )
        return answer

    def _is_right(self, *given: str) -> bool:
        """Whether these are user and password; wrong ones take a second, one after another, so that nobody guesses."""
        right = secrets.compare_digest(
            "\n".join(given).encode(), "\n".join(self.serving.auth or ()).encode()
        )
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
        except Exception as error:  # the image is none, or a gate is full
            return error_json(error, name)

    async def _answer(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.explorer.handlers:
            raise HTTPException(404)
        answer = await self.ask(request.scope["client"][0], name, await _json(request))
        return Response(orjson.dumps(answer), media_type="application/json")

    def close(self) -> None:
        """Let nobody in any more and wait for those inside."""
        for gate in (self._decoding, self._answering, self._logins):
            gate.close()


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
        self.explorer, self._door, self.share_url = explorer, ExplorerApp(explorer, serving), ""
        config = uvicorn.Config(
            self._door, http=Connection, ws="none", log_level="warning", timeout_graceful_shutdown=5
        )
        self._uvicorn, port = uvicorn.Server(config), listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([listener],), name="moevision-server"
        )
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            time.sleep(0.01)
        host = serving.bare_host if serving.bare_host not in ("", "0.0.0.0") else "localhost"
        self.url = f"http://{host_in_url(host)}:{port}/"
        if serving.share:
            self.share_url = self._open_tunnel(host, port)
        if serving.browser:
            webbrowser.open(self.share_url or self.url)

    def _open_tunnel(self, host: str, port: int) -> str:
        from gradio import networking

        try:
            address = networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
        except (
            Exception
        ) as error:  # of httpx's, of the program that gradio downloads, or a bare one
            self.close()
            raise UserError(
                f"The tunnel could not be opened ({error}): check the network, or use --host on your own network."
            ) from error
        self._door.tunnel = urlsplit(address).hostname or ""
        return urlsplit(address)._replace(scheme="https").geturl()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving."""
        self._uvicorn.should_exit = True
        self._door.close()
        self._thread.join()
        self.explorer.close()


def cpu_workers() -> int:
    """Requests that run at once: a small model is not faster on many cores, so each request gets one."""
    return min(4, usable_cores())


async def _json(request: Request) -> dict[str, Any]:
    body, found = await request.body(), None
    if (
        sum(map(body.count, (b"[", b"{", b","))) <= MOST_PARTS
    ):  # an image, in base64, has none of them
        with suppress(ValueError, RecursionError):
            found = json.loads(body)
    if not isinstance(found, dict):
        raise HTTPException(400, "The body must be a JSON object.")
    return found


def _refuse(_: Request | None, refused: Exception) -> Response:
    assert isinstance(refused, HTTPException)
    status = refused.status_code
    code = {413: "too_large", 429: "busy", 503: "busy"}.get(status, "bad_request")
    sentence = {404: "There is nothing here.", 405: "This method isn't used here."}.get(
        status, refused.detail
    )
    # What is left of a body is not read.
    headers = {"connection": "close"} if status in (408, 413, 503) else None
    return JSONResponse({"error": sentence, "code": code}, status, headers)


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"A request has at most {most:,} bytes here: send less.")
