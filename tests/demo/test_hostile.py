"""Whatever is sent, the answer is a sentence or a 4xx, soon, and the server goes on answering correctly."""

import asyncio
import json
import socket
import threading
import time
from contextlib import ExitStack

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from moevision.demo import gate
from moevision.demo import server as server_module
from moevision.demo.gate import HEADER_S, Connection, Serving
from moevision.demo.server import ExplorerApp
from tests.demo import hostile

pytestmark = pytest.mark.deep

CODES = {"bad_request", "bad_image", "too_large"}
SECONDS = 30  # on a busy machine; a decoder without bounds would take minutes


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=120) as http:
        yield http


@pytest.fixture
def still_right(http, explorer):
    """Afterwards the server must answer as if nothing had happened."""
    yield
    answer = http.post("api/route", json=hostile.ROUTE)
    assert answer.json() == json.loads(json.dumps(explorer.answer("route", hostile.ROUTE)))


def post(http, name, body):
    start = time.monotonic()
    answer = http.post(
        f"api/{name}",
        content=body.encode("utf-8", "surrogatepass"),
        headers={"content-type": "application/json"},
    )
    return answer, time.monotonic() - start


def test_more_than_three_hundred_hostile_calls(http, server, still_right):
    bodies = hostile.calls()
    assert len(bodies) >= 300
    assert len(set(bodies)) == len(bodies)
    before, slowest = server.rss_mb(), 0.0
    for name, body in bodies:
        answer, seconds = post(http, name, body)
        slowest = max(slowest, seconds)
        what = (name, body[:200])
        if answer.status_code == 200:
            told = answer.json()
            assert set(told) == {"error", "code"}, what
            assert told["code"] in CODES, (what, told)
            assert len(told["error"]) > 20, what
            assert told["error"].rstrip().endswith("."), told
            assert "Traceback" not in told["error"]
            assert "/work" not in told["error"]
        else:
            assert 400 <= answer.status_code < 500, (answer.status_code, what)
    assert slowest < SECONDS
    assert server.rss_mb() < before + 200  # the largest image that is decoded has 50 million pixels


def test_past_the_page(http, still_right):
    for method, path, body in hostile.raw():
        headers = {"content-type": "application/json"} if body else {}
        answer = http.request(method, path, content=body, headers=headers)
        assert 400 <= answer.status_code < 500, (answer.status_code, method, path, body[:80])
        assert answer.json()["error"].endswith("."), (answer.text[:200], method, path)


@pytest.fixture
def unfinished():
    """Opens connections that have begun a request's header and say no more."""
    found = []

    def begin(url, times=1):
        host, port = url.split("/")[2].rsplit(":", 1)
        new = [socket.create_connection((host, int(port)), timeout=20) for _ in range(times)]
        found.extend(new)
        for one in new:
            one.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        return new

    yield begin
    for one in found:
        one.close()


def drip(connection, piece, seconds, every):
    """Send a piece again and again; whether the other side closed the connection within that time."""
    connection.settimeout(every)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            connection.sendall(piece)
            if not connection.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def test_an_unfinished_header_is_given_up(server, http, unfinished):
    slow = unfinished(server.url, times=20)
    assert http.get("").status_code == 200
    begin = time.monotonic()
    assert all(drip(one, b"x", HEADER_S + SECONDS, 0.2) for one in slow)
    assert time.monotonic() - begin < HEADER_S + SECONDS


@pytest.fixture
def tiny(monkeypatch):
    """uvicorn alone, with our connections and small limits, before an app that says "fine"."""
    monkeypatch.setattr(gate, "HEADER_S", 0.6)
    monkeypatch.setattr(gate, "READING_S", 0.6)
    monkeypatch.setattr(gate, "MAX_CONNECTIONS", 4)

    async def app(scope, receive, send):
        if scope["path"] == "/long":
            await asyncio.sleep(1.5)
        body = bytes(LARGE) if scope["path"] == "/large" else b"fine"
        length = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": body})

    own = socket.socket()
    own.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=Connection, lifespan="off", log_level="critical", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{own.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)
    own.close()
    assert not thread.is_alive()


def test_a_header_has_a_time_and_a_long_answer_has_not(tiny, unfinished):
    (slow,) = unfinished(tiny)
    assert drip(slow, b"x", 5, 0.1)
    with httpx.Client(base_url=tiny, timeout=20) as http:
        assert http.get("long").text == "fine"


def test_a_body_that_nobody_reads_is_given_up(tiny, unfinished):
    (slow,) = unfinished(tiny)
    slow.sendall(b"1\r\nContent-Length: 99999\r\n\r\n")
    assert drip(slow, b"x", 5, 0.1)


def test_connections_are_counted(tiny, unfinished):
    kept = unfinished(tiny, times=4)
    with socket.create_connection(kept[0].getpeername(), timeout=20) as one_more:
        assert b"503" in one_more.recv(100)
    assert all(
        drip(one, b"x", 5, 0.1) for one in kept
    )  # and when those are gone there is room again
    with httpx.Client(base_url=tiny, timeout=20) as http:
        assert http.get("").text == "fine"


LARGE = 20_000_000  # more than the buffers of a connection hold


def ask_and_not_read(url, times=1):
    """A connection with a small buffer, on which so many large answers were asked for and nothing was read."""
    host, port = url.split("/")[2].rsplit(":", 1)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n" * times)
    return connection


def has_room(url, seconds):
    """Whether somebody else is answered within that time; asked again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with httpx.Client(base_url=url, timeout=20) as http:
            if http.get("").status_code == 200:
                return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("times", [1, 3])
def test_who_never_reads_an_answer_loses_the_connection(tiny, times):
    """64 of them, 4 at once, who hold every place."""
    for _ in range(16):
        with ExitStack() as held:
            for _ in range(4):
                held.enter_context(ask_and_not_read(tiny, times))
            assert has_room(tiny, SECONDS)


def test_who_reads_hardly_anything_loses_the_connection(tiny):
    with ExitStack() as held:
        slow = [held.enter_context(ask_and_not_read(tiny)) for _ in range(4)]
        end = time.monotonic() + SECONDS
        while not has_room(tiny, 0.1):
            assert time.monotonic() < end
            for connection in slow:
                connection.recv(100)


def test_who_reads_slowly_gets_the_whole_answer(tiny):
    """Many times as long as a header may take, and as nobody may read nothing."""
    got, begin = 0, time.monotonic()
    with ask_and_not_read(tiny) as slow:
        while got < LARGE:
            part = slow.recv(200_000)
            assert part, f"cut off after {got:,} bytes"
            got += len(part)
            time.sleep(max(0.0, begin + 3 * got / LARGE - time.monotonic()))
    assert time.monotonic() - begin > 2.5


class Wire:
    """A connection's transport that notes what was done to it."""

    def __init__(self, address):
        self.address, self.written, self.closed = address, b"", False

    def get_extra_info(self, name):
        return (self.address, 9) if name == "peername" else None

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    abort = close

    def get_write_buffer_size(self):
        return 0


@pytest.mark.parametrize(
    ("others", "taken"),
    [
        ([f"2001:db8:1::{number}" for number in range(1, 6)], 4),  # one network of 2^64 addresses
        ([f"2001:db8:1:0:{number}::1" for number in range(1, 6)], 4),
        ([f"2001:db8:{number}::1" for number in range(1, 6)], 5),
        (["192.0.2.1"] * 5, 4),
        (["192.0.2.1", "::ffff:192.0.2.1"] * 3, 4),  # as a socket for both kinds shows it
        ([f"192.0.2.{number}" for number in range(1, 6)], 5),
        (["127.0.0.1", "::1", "::ffff:127.0.0.1"] * 3, 9),  # a proxy on this computer is everyone
    ],
)
def test_connections_are_counted_by_network(monkeypatch, others, taken):
    """One IPv6 host has a /64 to itself (RFC 6177), so a full address says nothing about who it is."""
    monkeypatch.setattr(gate, "MAX_CONNECTIONS", 16)

    async def app(scope, receive, send):
        raise AssertionError("nobody asks")

    async def talk():
        state, config = ServerState(), uvicorn.Config(app, http=Connection, log_config=None)
        wires = [Wire(address) for address in [*others, "2001:db8:ffff::1"]]
        connections = [Connection(config, state, {}) for _ in wires]
        for connection, wire in zip(connections, wires, strict=True):
            connection.connection_made(wire)
        for connection in connections:
            connection._stop_timer()
        return [wire.closed for wire in wires]

    *refused, visitor = asyncio.run(talk())
    assert refused == [False] * taken + [True] * (len(others) - taken)
    assert visitor is False


def test_only_localhost_and_addresses_are_names_of_ours(http):
    """Or a website could have its name point to this computer, and read the answers."""
    for host in ("evil.example", "localhost.evil.example", "evil.example:7860", "", "a b", "["):
        answer = http.get("", headers={"host": host})
        assert answer.status_code == 421, host
        assert "--allow-host" in answer.json()["error"]
    for host in (
        "localhost",
        "LOCALHOST:9",
        "127.0.0.1",
        "[::1]:7860",
        "localhost.",
        "192.168.1.7",
    ):
        assert http.get("", headers={"host": host}).status_code == 200, host


@pytest.mark.parametrize("data", hostile.PATHS + hostile.ADDRESSES)
def test_no_path_and_no_address_is_ever_opened(explorer, data, monkeypatch):
    import builtins
    import pathlib
    import socket

    def forbidden(*args, **kwargs):
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr(builtins, "open", forbidden)
    monkeypatch.setattr(pathlib.Path, "open", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    for picture in ({"kind": "upload", "data": data}, {"kind": "example", "id": data}):
        assert explorer.answer("route", {"picture": picture})["code"] in CODES


@pytest.fixture
def ask_door(explorer, monkeypatch):
    """What the door answers to a body that arrives in chunks, and its counts by address afterwards."""

    def ask(
        chunks,
        *,
        path="/api/route",
        host="localhost",
        headers=(),
        delay=0.0,
        serving=None,
        tunnel="",
        **limits,
    ):
        for name, value in limits.items():
            monkeypatch.setattr(server_module, name, value)
        sent, left = [], list(chunks)

        async def receive():
            await asyncio.sleep(delay)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message):
            sent.append(message)

        given = [(b"host", host.encode()), *headers]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": given,
            "client": ("192.0.2.1", 9),
        }

        async def talk():
            door = ExplorerApp(explorer, Serving(**(serving or {})))
            door.tunnel = tunnel
            await door(scope, receive, send)
            door.close()
            return sent, door

        return asyncio.run(talk())

    return ask


def test_a_body_in_pieces_arrives_whole(ask_door, explorer):
    text = json.dumps(hostile.ROUTE).encode()
    (start, *parts), door = ask_door([text[:9], text[9:]])
    assert start["status"] == 200
    assert json.loads(b"".join(part["body"] for part in parts)) == explorer.answer(
        "route", hostile.ROUTE
    )
    assert (b"x-content-type-options", b"nosniff") in start["headers"]
    assert (door._body_bytes, door._requests_in_flight) == ({}, {})


@pytest.mark.parametrize(
    ("text", "status"), [(b"[" * 5_000_000, 400), (b'{"a":[' + b"1," * 5_000_000 + b"1]}", 400)]
)
def test_a_body_of_millions_of_parts_is_refused_before_it_is_parsed(
    ask_door, monkeypatch, text, status
):
    """Parsing it takes seconds in which nobody else is answered."""
    parsed = []
    monkeypatch.setattr(server_module.json, "loads", lambda body: parsed.append(body) or {})
    (start, *_), _ = ask_door([text])
    assert (start["status"], parsed) == (status, [])
    (start, *_), _ = ask_door([json.dumps(hostile.ROUTE).encode()])
    assert (start["status"], len(parsed)) == (200, 1)


ANNOUNCED = [b"101", b"-1", b"1e9", b"9" * 30, b""]  # lengths
FORM = [(b"content-type", b"application/x-www-form-urlencoded")]
BODIES = [
    ([b"x" * 60] * 3, {"MAX_BODY": 100}, 413),  # counted where no length was announced
    *(([b"{}"], {"headers": [(b"content-length", n)], "MAX_BODY": 100}, 413) for n in ANNOUNCED),
    ([b"{"] * 500, {"delay": 0.02, "READ_S": 0.1}, 408),
    ([b"x" * 60] * 2, {"MAX_BODIES": 100}, 503),
    ([b"x" * 26], {"MAX_BODIES": 100}, 503),  # a fourth of all is for one address
    ([b'{"data": "' + b"x" * 13 + b'"}'], {"MAX_BODIES": 100}, 200),
    (
        [b"x" * 5000],
        {"path": "/login", "headers": FORM, "serving": {"auth": ("class", "secret")}},
        413,
    ),
]


@pytest.mark.parametrize(("chunks", "options", "status"), BODIES)
def test_a_body_has_a_size_and_a_time_and_is_forgotten_afterwards(
    ask_door, chunks, options, status
):
    (start, *_), door = ask_door(chunks, **options)
    assert (start["status"], door._body_bytes, door._requests_in_flight) == (status, {}, {})


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
)
def test_another_website_may_not_ask(http, headers):
    """With the visitor's login, if there is one; the page itself may be linked to."""
    for method, path in (
        ("POST", "api/boot"),
        ("POST", "api/route"),
        ("POST", "login"),
        ("GET", "nothing"),
    ):
        assert http.request(method, path, headers=headers).status_code == 403
    assert http.get("", headers=headers).status_code == 200


def test_the_page_itself_may_ask(http, server):
    for headers in ({"sec-fetch-site": "same-origin"}, {"origin": server.url.rstrip("/")}, {}):
        assert http.post("api/boot", json={}, headers=headers).status_code == 200


HERE, LAN, NAME = "localhost:7860", "192.168.1.7:7860", "moe.lab.example"
NAMED = {"allow_host": (NAME, "*.class.example")}
ORIGINS = [
    # Host, Origin, whether a page of that origin may ask; how it is served, and other headers
    (HERE, "http://localhost:7860", True, {}, {}),
    (HERE, "HTTP://LOCALHOST:7860", True, {}, {}),
    ("LocalHost:7860", "http://localhost:7860", True, {}, {}),
    ("localhost.:7860", "http://localhost.:7860", True, {}, {}),
    (HERE, "http://localhost:3000", False, {}, {}),  # another program's page
    (HERE, "http://localhost", False, {}, {}),
    (HERE, "https://localhost", False, {}, {}),
    (HERE, "http://127.0.0.1:7860", False, {}, {}),
    (HERE, "null", False, {}, {}),
    (HERE, "", False, {}, {}),
    (HERE, "http://", False, {}, {}),
    (HERE, "//localhost:7860", False, {}, {}),
    (HERE, "localhost:7860", False, {}, {}),
    (HERE, "file://localhost:7860", False, {}, {}),
    (HERE, "chrome-extension://localhost:7860", False, {}, {}),
    (HERE, "http://localhost:7860/", False, {}, {}),
    (HERE, "http://evil.example#@localhost:7860", False, {}, {}),
    (HERE, "http://evil@localhost:7860", False, {}, {}),
    (HERE, "http://localhost:7860@evil.example", False, {}, {}),
    (HERE, "http://localhost:7860.evil.example", False, {}, {}),
    (HERE, "http://localhost:78600", False, {}, {}),
    (HERE, "http://localhost:7860000000000000", False, {}, {}),
    (HERE, "http://localhost:7860 http://evil.example", False, {}, {}),
    (HERE, "http://localhost\\:7860", False, {}, {}),
    (LAN, "http://192.168.1.7:7860", True, {}, {}),
    (LAN, "http://203.0.113.5", False, {}, {}),
    (LAN, "http://192.168.1.7", False, {}, {}),
    (LAN, "http://192.168.1.8:7860", False, {}, {}),
    (LAN, "https://[2001:db8::1]", False, {}, {}),
    ("[2001:db8::7]:7860", "http://[2001:db8::7]:7860", True, {}, {}),
    ("[2001:DB8::7]:7860", "http://[2001:db8::7]:7860", True, {}, {}),
    ("[2001:db8::7]:7860", "http://[2001:db8::8]:7860", False, {}, {}),
    ("[2001:db8::7]", "http://[2001:db8::7]:80", True, {}, {}),
    ("[::1]:7860", "http://[::1]evil:7860", False, {}, {}),
    ("192.168.1.7", "http://192.168.1.7", True, {}, {}),  # default ports, which browsers leave out
    ("192.168.1.7:80", "http://192.168.1.7", True, {}, {}),
    ("192.168.1.7", "http://192.168.1.7:80", True, {}, {}),
    ("192.168.1.7", "https://192.168.1.7", True, {}, {}),  # behind a proxy that ends TLS
    ("192.168.1.7:443", "https://192.168.1.7", True, {}, {}),
    ("192.168.1.7", "https://192.168.1.7:8443", False, {}, {}),
    ("192.168.1.7:443", "http://192.168.1.7", False, {}, {}),
    (NAME, f"https://{NAME}", True, NAMED, {}),  # a proxy that leaves Host as it was
    (f"{NAME}:8443", f"https://{NAME}:8443", True, NAMED, {}),
    (NAME, f"http://{NAME}:3000", False, NAMED, {}),
    (NAME, "https://other.class.example", False, NAMED, {}),
    ("127.0.0.1:7860", f"https://{NAME}", True, NAMED, {}),  # ... and one that doesn't
    (HERE, f"http://{NAME}", True, NAMED, {}),
    ("127.0.0.1:7860", "https://a.class.example", True, NAMED, {}),
    ("127.0.0.1:7860", f"https://{NAME}:8443", False, NAMED, {}),
    ("127.0.0.1:7860", f"https://{NAME}:8443", True, NAMED, {"x-forwarded-host": f"{NAME}:8443"}),
    (
        "127.0.0.1:7860",
        f"https://{NAME}:8443",
        True,
        NAMED,
        {"x-forwarded-host": f"{NAME}:8443, inner"},
    ),
    ("127.0.0.1:7860", "https://evil.example", False, NAMED, {"x-forwarded-host": NAME}),
    (
        "127.0.0.1:7860",
        f"https://{NAME}",
        False,
        {},
        {"x-forwarded-host": NAME},
    ),  # no proxy is known to be there
    ("127.0.0.1:7860", f"https://{NAME}.evil.example", False, NAMED, {}),
    ("127.0.0.1:7860", "https://203.0.113.5", False, {"allow_host": ("*",)}, {}),
    ("127.0.0.1:7860", "http://localhost", False, {"allow_host": ("*",)}, {}),
    ("abc.tunnel.example", "https://abc.tunnel.example", True, {"share": True, "public": True}, {}),
    (HERE, "https://abc.tunnel.example", True, {"share": True, "public": True}, {}),
    (HERE, "https://abd.tunnel.example", False, {"share": True, "public": True}, {}),
    # What the browser says of itself, which no page can make up, counts more.
    (HERE, "https://proxy.example", True, {}, {"sec-fetch-site": "same-origin"}),
    (HERE, "http://localhost:7860", False, {}, {"sec-fetch-site": "same-site"}),
    (HERE, "http://localhost:7860", False, {}, {"sec-fetch-site": "cross-site"}),
    (HERE, "http://localhost:7860", False, {}, {"sec-fetch-site": "SAME-ORIGIN"}),
]


@pytest.mark.parametrize(("host", "origin", "allowed", "serving", "more"), ORIGINS)
def test_only_a_page_from_here_may_ask(ask_door, host, origin, allowed, serving, more):
    """Host and port of `Origin` are those that the request went to (RFC 6454, 4)."""
    headers = [
        (name.encode(), value.encode()) for name, value in {"origin": origin, **more}.items()
    ]
    (start, *_), _ = ask_door(
        [b"{}"],
        path="/api/boot",
        host=host,
        headers=headers,
        serving=serving,
        tunnel="abc.tunnel.example",
    )
    assert start["status"] == (200 if allowed else 403)


def test_a_space_may_ask_itself(ask_door, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "me/moe")
    monkeypatch.setenv("SPACE_HOST", "me-moe.hf.space")
    for host in ("me-moe.hf.space", "10.0.0.7:7860"):
        for origin, status in (("https://me-moe.hf.space", 200), ("https://you-moe.hf.space", 403)):
            headers = [(b"origin", origin.encode())]
            (start, *_), _ = ask_door([b"{}"], path="/api/boot", host=host, headers=headers)
            assert start["status"] == status


def test_there_are_no_sockets(http):
    headers = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "x",
    }
    assert http.get("", headers=headers).status_code == 200
