"""Whatever is sent, the answer is a sentence or a 4xx, soon, and the server goes on answering correctly."""

import asyncio
import json
import time

import httpx
import pytest

from moevision.demo.web import Guard
from tests.demo import hostile

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
    answer = http.post("gradio_api/component_server", json=json.loads(hostile.body(json.dumps(hostile.ROUTE))))
    assert answer.json() == json.loads(json.dumps(explorer.answer("route", hostile.ROUTE)))


def post(http, body):
    start = time.monotonic()
    answer = http.post(
        "gradio_api/component_server",
        content=body.encode("utf-8", "surrogatepass"),
        headers={"content-type": "application/json"},
    )
    return answer, time.monotonic() - start


@pytest.mark.slow
def test_more_than_three_hundred_hostile_calls(http, server, still_right):
    bodies = hostile.calls()
    assert len(bodies) >= 300
    assert len(set(bodies)) == len(bodies)
    before, slowest = server.rss_mb(), 0.0
    for body in bodies:
        answer, seconds = post(http, body)
        slowest = max(slowest, seconds)
        what = body[:200]
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
    assert server.rss_mb() < before + 200  # the largest picture that is decoded has 50 million pixels


@pytest.mark.slow
def test_past_the_page(http, still_right):
    for method, path, body in hostile.raw():
        headers = {"content-type": "application/json"} if body else {}
        answer = http.request(method, path, content=body, headers=headers)
        assert 400 <= answer.status_code < 500, (answer.status_code, method, path, body[:80])
        assert "root:" not in answer.text
        assert "Traceback" not in answer.text


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


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("top_k", 5, "from 1 to 4"),
        ("top_k", True, "from 1 to 4"),
        ("capacity", float("nan"), "0.05 to 16"),
        ("capacity", "1", "0.05 to 16"),
        ("model", "nope", "pets, photos"),
        ("variant", "better", "trained, unbalanced, untrained"),
        ("picture", None, "one JSON object"),
        ("picture", {"kind": "url"}, "example, upload"),
        ("picture", {"kind": "upload"}, "'data'"),
        ("picture", {"kind": "example", "id": "pets/test/2000"}, "choose one of the examples"),
        ("pictures", 1, "no field 'pictures'"),
        ("intervention", {"kind": "swap"}, "ablate, force, random"),
        ("intervention", {"kind": "ablate", "expert": 1}, "one of 1, 3"),
        ("intervention", {"kind": "ablate", "layer": 2, "expert": 1}, "one of 1, 3"),
        ("intervention", {"kind": "force", "layer": 1, "expert": 4}, "from 0 to 3"),
        ("intervention", {"kind": "random", "layer": None, "seed": -1}, "'seed'"),
    ],
)
def test_a_mistake_is_answered_by_what_would_be_right(explorer, field, value, words):
    answer = explorer.answer("route", {**hostile.ROUTE, field: value})
    assert answer["code"] == "bad_request"
    assert words in answer["error"]


def test_too_large_says_how_large_it_may_be(explorer):
    answer = explorer.answer("route", {"picture": {"kind": "upload", "data": "A" * 12_000_000}})
    assert answer["code"] == "too_large"
    assert "8 MB" in answer["error"]


def ask_guard(chunks, *, path="/gradio_api/component_server", method="POST", headers=(), delay=0.0, **limits):
    """What the middleware answers to a body that arrives in chunks, and what reached the app behind it."""
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-content-type-options", b"x")]})
        await send({"type": "http.response.body", "body": b"fine"})

    async def talk():
        left = list(chunks)

        async def receive():
            await asyncio.sleep(delay)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message):
            sent.append(message)

        guard = Guard(app, **limits)
        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        await guard(scope, receive, send)
        return guard

    guard = asyncio.run(talk())
    return sent[0], reached, guard


def test_a_body_in_pieces_arrives_whole():
    start, reached, guard = ask_guard([b'{"da', b'ta": 1}'])
    assert start["status"] == 200
    assert reached == [b'{"data": 1}']
    assert guard._held == 0
    assert start["headers"].count((b"x-content-type-options", b"nosniff")) == 1
    assert (b"x-content-type-options", b"x") not in start["headers"]


def test_a_body_without_a_length_is_counted():
    start, reached, guard = ask_guard([b"x" * 60, b"x" * 60, b"x" * 60], max_body=100)
    assert (start["status"], reached, guard._held) == (413, [], 0)


@pytest.mark.parametrize("length", [b"101", b"-1", b"1e9", b"9" * 30, b""])
def test_an_announced_length_is_believed_before_a_byte_is_read(length):
    start, reached, _ = ask_guard([], headers=[(b"content-length", length)], max_body=100)
    assert (start["status"], reached) == (413, [])


def test_a_slow_body_is_given_up():
    start, reached, guard = ask_guard([b"{"] * 500, delay=0.02, read_s=0.1)
    assert (start["status"], reached, guard._held) == (408, [], 0)


def test_all_bodies_together_are_bounded():
    start, reached, guard = ask_guard([b"x" * 60, b"x" * 60], max_bodies=100)
    assert (start["status"], reached, guard._held) == (503, [], 0)


def test_sockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(None)({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
