"""What stands between the network and gradio: limits on bodies, closed doors, and headers. An ASGI middleware.

gradio 6.31 serves the calls of the page at `/gradio_api/component_server`, behind the login if there is one, with any
body of any size, and keeps a session for every `session_hash` that it hears of. So here

- a body is read up to a limit, within a time, and only as long as all bodies together fit;
- it must be a JSON object (the login form aside) whose names of sessions and functions are short;
- routes that the explorer doesn't use (uploads, files, proxy, editing) don't exist.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from moevision.demo.wire import MAX_CHARACTERS

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY: Final = MAX_CHARACTERS + 16_384
MAX_BODIES: Final = 16 * MAX_BODY
READ_S: Final = 60.0
MAX_WORD: Final = 100
API: Final = "/gradio_api"
# Calls of the page, of the API, and what gradio's own client and page need besides.
_POST: Final = ("/component_server", "/queue/join", "/call/", "/run/", "/api/", "/cancel", "/reset")
_FORMS: Final = ("/login",)
_CLOSED: Final = (
    "/upload",
    "/file",
    "/proxy=",
    "/stream/",
    "/process_recording",
    "/vibe",
    "/undo-vibe",
    "/run-history",
    "/runs",
    "/custom_component",
    "/profiling",
    "/dev/",
    "/deep_link",
)
_CLOSED_ROOT: Final = ("/monitoring", "/gradio_api/deep_link", "/svelte")
log = logging.getLogger(__name__)
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
        max_body: largest body of one request, in bytes.
        max_bodies: of all bodies that are being read or answered.
        read_s: how long reading a body may take.
    """

    def __init__(
        self, app: App, max_body: int = MAX_BODY, max_bodies: int = MAX_BODIES, read_s: float = READ_S
    ) -> None:
        self.app, self.max_body, self.max_bodies, self.read_s = app, max_body, max_bodies, read_s
        self._held = 0  # bytes; touched by the event loop's thread only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        body = bytearray()
        try:
            path = scope["path"]
            _check_route(scope["method"], path)
            if scope["method"] == "POST":
                await self._read(scope, receive, body)
                _check_body(path, bytes(body))
                receive = _replayed(bytes(body), receive)
            await self._run(scope, receive, answer)
        except Refused as refused:
            await answer.refuse(refused)
        finally:
            self._held -= len(body)

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            # gradio looks up components, functions and arguments without asking whether they exist; what fails in our
            # own handlers is told in their answer and doesn't come this way.
            if answer.started or scope["method"] != "POST":
                raise
            log.warning("gradio could not answer %s", scope["path"], exc_info=True)
            raise Refused(400, "This request fits nothing here: look at /gradio_api/info.") from error

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        too_large = Refused(413, f"A request has at most {self.max_body:,} bytes: send a smaller picture.", "too_large")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or len(announced) > 18 or int(announced) > self.max_body:
            raise too_large
        try:
            async with asyncio.timeout(self.read_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "The request broke off.")
                    chunk = message.get("body", b"")
                    body += chunk
                    self._held += len(chunk)
                    if len(body) > self.max_body:
                        raise too_large
                    if self._held > self.max_bodies:
                        raise Refused(503, "Many people are sending pictures: try again in a few seconds.", "busy")
                    if not message.get("more_body", False):
                        return
        except TimeoutError as error:
            raise Refused(408, "The request took too long to arrive.") from error


class _Answer:
    """`send` with our headers, which knows whether the answer has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.started = send, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            names = {name for name, _ in HEADERS}
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
            message["headers"] = [*kept, *HEADERS]
        await self.send(message)

    async def refuse(self, refused: Refused) -> None:
        body = json.dumps({"error": refused.sentence, "code": refused.code}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refused.status in (408, 413, 503):  # what is left of the body is not read
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def _check_route(method: str, path: str) -> None:
    inner = path.removeprefix(API) if path.startswith(API) else None
    closed = path.startswith(_CLOSED_ROOT) if inner is None else inner.startswith(_CLOSED)
    if closed:
        raise Refused(404, "There is nothing here: pictures are sent inside a request, files are never opened.")
    if method not in ("GET", "HEAD", "POST", "OPTIONS"):
        raise Refused(405, f"The method {method} isn't used here.")
    if method == "POST" and not (path.startswith(_FORMS) if inner is None else inner.startswith(_POST)):
        raise Refused(404, "There is nothing to post to here.")


def _check_body(path: str, body: bytes) -> None:
    if path.startswith(_FORMS):
        if len(body) > 4096:
            raise Refused(413, "A login form is shorter than this.", "too_large")
        return
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The body must be a JSON object.") from error
    if not isinstance(found, dict):
        raise Refused(400, "The body must be a JSON object.")
    for name in ("session_hash", "fn_name", "event_id"):
        value = found.get(name)
        if value is not None and not (isinstance(value, str) and len(value) <= MAX_WORD):
            raise Refused(400, f"{name} must be a text of at most {MAX_WORD} characters.")


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
