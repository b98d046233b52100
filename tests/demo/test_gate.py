"""One visitor can't shut the others out: addresses take turns, and large images wait for each other."""

import asyncio
import io
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from moevision.demo import wire
from moevision.demo.gate import Gate
from moevision.demo.page import Doors
from moevision.demo.requests import RequestError
from moevision.demo.service import failure
from moevision.demo.wire import open_data_uri
from tests.demo import hostile
from tests.demo.test_hostile import ask_guard

SECONDS = 30  # on a busy machine


@pytest.fixture
def held():
    """A gate of one thread and 8 places whose thread waits for `go`, for a function of the address "crowd"."""
    gate, go, begun = Gate(workers=1, waiting=8), threading.Event(), threading.Event()

    def hold():
        begun.set()
        return go.wait(SECONDS)

    gate.submit("crowd", hold)
    assert begun.wait(SECONDS)
    yield gate, go
    go.set()
    gate.close()


def test_addresses_take_turns(held):
    gate, go = held
    order = []
    for address, count in (("crowd", 4), ("one", 1), ("two", 2)):
        for number in range(count):
            gate.submit(address, order.append, f"{address} {number}")
    go.set()
    gate.submit("crowd", order.append, "end").result(SECONDS)
    # Whoever had no turn yet comes first, in the order of arrival; then the one whose turn was longest ago.
    assert order == ["one 0", "two 0", "crowd 0", "two 1", "crowd 1", "crowd 2", "crowd 3", "end"]


def test_one_request_after_another_starves_nobody(held):
    """Who asks anew as soon as there is an answer takes turns with those who wait, too."""
    gate, go = held
    order = []
    done = threading.Event()

    def again(number):
        order.append("busy bee")
        if number:
            gate.submit("bee", again, number - 1)
        else:
            done.set()

    gate.submit("bee", again, 3)
    for _ in range(3):
        gate.submit("crowd", order.append, "crowd")
    go.set()
    assert done.wait(SECONDS)
    assert order == ["busy bee", "crowd"] * 3 + ["busy bee"]


def test_an_address_alone_may_have_every_place_and_gives_them_up(held):
    gate, go = held
    crowd = [gate.submit("crowd", str, number) for number in range(8)]
    with pytest.raises(RequestError, match="try again") as refused:
        gate.submit("crowd", str, 8)
    assert refused.value.code == "busy"
    others = [gate.submit(f"other {number}", str, number) for number in range(3)]
    shared = [gate.submit("class", str, number) for number in range(2)]  # 3 of the crowd are left
    with pytest.raises(RequestError, match="try again"):
        gate.submit("class", str, 2)
    go.set()
    assert [future.result(SECONDS) for future in (*others, *shared)] == ["0", "1", "2", "0", "1"]
    assert [future.result(SECONDS) for future in crowd[:3]] == ["0", "1", "2"]  # the newest ones went
    for future in crowd[3:]:
        with pytest.raises(RequestError, match="try again"):
            future.result(SECONDS)


def test_a_closed_gate_lets_nobody_in(held):
    gate, go = held
    waiting = gate.submit("one", str, 1)
    threading.Timer(0.1, go.set).start()
    gate.close()
    with pytest.raises(RequestError, match="stopped"):
        waiting.result(0)
    with pytest.raises(RequestError, match="stopped"):
        gate.submit("one", str, 1)


def test_a_failing_request_leaves_its_place():
    gate = Gate(workers=1, waiting=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            gate.submit("one", lambda: 1 / 0).result(SECONDS)
    gate.close()


def test_images_are_decoded_one_by_one_and_do_not_hold_up_the_rest(explorer, monkeypatch):
    """What has no upload is answered while an image is being decoded."""
    inside, most, go = 0, 0, threading.Event()
    real = wire.safe_open

    def counted(*args, **kwargs):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        go.wait(SECONDS)
        inside -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(wire, "safe_open", counted)
    upload = {"picture": {"kind": "upload", "data": hostile.uri(hostile.picture_bytes("PNG"))}}
    export = {**upload, "model": "pets"}
    doors = Doors(Gate(1), Gate(4))

    async def talk():
        asked = [asyncio.create_task(doors.ask(explorer, "a", "route", upload)) for _ in range(5)]
        asked.append(asyncio.create_task(doors.ask(explorer, "a", "export_html", export)))
        example = await doors.ask(explorer, "a", "route", hostile.ROUTE)
        assert not any(task.done() for task in asked)
        go.set()
        return example, await asyncio.gather(*asked)

    example, (first, *others, page) = asyncio.run(talk())
    doors.close()
    assert most == 1
    assert example == explorer.answer("route", hostile.ROUTE)
    assert first == explorer.answer("route", upload)
    assert others == [first] * 4
    assert page == explorer.answer("export_html", export)


def jpeg(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 60, 20)).save(buffer, "JPEG", quality=30)
    return hostile.uri(buffer.getvalue(), "image/jpeg")


def test_what_an_image_may_have(explorer):
    """16 megapixels, or 50 of a JPEG, which is decoded in fewer; what is too large is told what to do."""

    def answer(data):
        return explorer.answer("route", {"picture": {"kind": "upload", "data": data}})

    assert "prediction" in answer(hostile.uri(hostile.png_bomb(4000, 4000)))
    assert answer(hostile.uri(hostile.png_bomb(4001, 4000))) == failure(
        "This image can't be used: its size of 4001 x 4000 pixels exceeds the limit of 16,000,000; shrink it.",
        "bad_image",
    )
    photo = jpeg(5472, 3648)  # 20 megapixels
    assert "prediction" in answer(photo)
    assert open_data_uri(photo, 672).size == (2736, 1824)
    assert "exceeds the limit of 50,000,000" in answer(jpeg(7100, 7100))["error"]


def test_a_fourth_of_all_bodies_is_for_one_address():
    start, reached, guard = ask_guard([b"x" * 26], max_bodies=100)
    assert (start["status"], reached, guard._held, guard._inside) == (503, [], {}, {})
    start, reached, _ = ask_guard([b'{"data": "' + b"x" * 13 + b'"}'], max_bodies=100)
    assert (start["status"], len(reached[0])) == (200, 25)


def ask_from(address, url, path, body):
    """What a request of someone at one of this computer's addresses is answered, and its seconds."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=120) as client:
        start = time.monotonic()
        return client.post(f"{url}gradio_api/{path}", json=body).json(), time.monotonic() - start


def as_page(data):
    request = {"model": "pets", "picture": {"kind": "upload", "data": data}}
    return "component_server", {"data": request, "component_id": 1, "session_hash": "test", "fn_name": "route"}


def as_program(data):
    return "run/route", {"data": [data, "", "pets", "trained", None, None, None]}


@pytest.mark.deep
@pytest.mark.parametrize("way", [as_page, as_program])
def test_a_crowd_at_one_address_does_not_shut_out_another(server, way):
    """80 connections that send 2.6 megapixels again and again, and someone else with a small image."""
    large = way(hostile.uri(hostile.png_bomb(1600, 1600)))
    small = way(hostile.uri(hostile.picture_bytes("PNG")))
    over, met = threading.Event(), Counter()

    def code(answer):
        answer = answer["data"][0] if "data" in answer else answer
        return answer.get("code", answer.get("schema"))

    def attack():
        while not over.is_set():
            answer, _ = ask_from("127.0.0.1", server.url, *large)
            met[code(answer)] += 1

    with ThreadPoolExecutor(80) as pool:
        crowd = [pool.submit(attack) for _ in range(80)]
        try:
            end = time.monotonic() + SECONDS
            while not met["busy"] and time.monotonic() < end:  # until every place is taken
                time.sleep(0.05)
            answers = [ask_from("127.0.0.2", server.url, *small) for _ in range(5)]
        finally:
            over.set()
    for one in crowd:
        one.result()
    assert [code(answer) for answer, _ in answers] == ["moevision.view/2"] * 5
    assert max(seconds for _, seconds in answers) < SECONDS
    assert met["busy"] > 0
    assert met["moevision.view/2"] > 0
