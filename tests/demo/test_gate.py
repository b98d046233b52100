"""One visitor can't shut the others out: addresses take turns, and large images wait for each other."""

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from moevision.demo import wire
from moevision.demo.gate import FairExecutor, Serving
from moevision.demo.server import ExplorerApp
from moevision.demo.wire import RequestError, open_data_uri
from tests.demo import hostile
from tests.shared import says

SECONDS = 30  # on a busy machine


async def held(talk):
    """`talk(gate, go)` at a gate of one thread and 8 places, whose thread waits for `go` for the address "crowd"."""
    gate, go, begun = FairExecutor(workers=1, waiting=8), threading.Event(), threading.Event()

    def hold():
        begun.set()
        return go.wait(SECONDS)

    holding = asyncio.create_task(gate.run("crowd", hold))
    assert await asyncio.to_thread(begun.wait, SECONDS)
    try:
        await talk(gate, go)
    finally:
        go.set()
        await holding
        gate.close()


async def sent(gate, address, function, *args):
    """A request that has arrived at the gate."""
    task = asyncio.create_task(gate.run(address, function, *args))
    await asyncio.sleep(0)
    return task


def test_addresses_take_turns():
    order = []

    async def talk(gate, go):
        for address, count in (("crowd", 4), ("one", 1), ("two", 2)):
            for number in range(count):
                await sent(gate, address, order.append, f"{address} {number}")
        go.set()
        await gate.run("crowd", order.append, "end")

    asyncio.run(held(talk))
    # Whoever had no turn yet comes first, in the order of arrival; then the one whose turn was longest ago.
    assert order == ["one 0", "two 0", "crowd 0", "two 1", "crowd 1", "crowd 2", "crowd 3", "end"]


def test_one_request_after_another_starves_nobody():
    """Who asks anew as soon as there is an answer takes turns with those who wait, too."""
    order = []

    async def talk(gate, go):
        async def bee():
            for _ in range(4):
                await gate.run("bee", order.append, "busy bee")

        busy = asyncio.create_task(bee())
        await asyncio.sleep(0)
        crowd = [await sent(gate, "crowd", order.append, "crowd") for _ in range(6)]
        go.set()
        await asyncio.gather(busy, *crowd)

    asyncio.run(held(talk))
    # The bee's next request arrives when the crowd has got the turn that its last one left.
    assert order == ["busy bee", "crowd"] * 4 + ["crowd"] * 2


def test_an_address_alone_may_have_every_place_and_gives_them_up():
    async def talk(gate, go):
        crowd = [await sent(gate, "crowd", str, number) for number in range(8)]
        with pytest.raises(RequestError, match="try again") as refused:
            await gate.run("crowd", str, 8)
        assert refused.value.code == "busy"
        others = [await sent(gate, f"other {number}", str, number) for number in range(3)]
        shared = [
            await sent(gate, "class", str, number) for number in range(2)
        ]  # 3 of the crowd are left
        with pytest.raises(RequestError, match="try again"):
            await gate.run("class", str, 2)
        go.set()
        assert await asyncio.gather(*others, *shared) == ["0", "1", "2", "0", "1"]
        assert await asyncio.gather(*crowd[:3]) == ["0", "1", "2"]  # the newest ones went
        for task in crowd[3:]:
            with pytest.raises(RequestError, match="try again"):
                await task

    asyncio.run(held(talk))


def test_a_closed_gate_lets_nobody_in():
    async def talk(gate, go):
        waiting = await sent(gate, "one", str, 1)
        threading.Timer(0.1, go.set).start()
        await asyncio.to_thread(gate.close)
        with pytest.raises(RequestError, match="stopped"):
            await waiting
        with pytest.raises(RequestError, match="stopped"):
            await gate.run("one", str, 1)

    asyncio.run(held(talk))


def test_a_failing_request_and_one_that_nobody_waits_for_leave_their_place():
    async def talk(gate, go):
        left = await sent(gate, "one", str, 1)
        left.cancel()
        go.set()
        for _ in range(12):
            with pytest.raises(ZeroDivisionError):
                await gate.run("one", lambda: 1 / 0)
        assert gate._running == 0
        assert left.cancelled()

    asyncio.run(held(talk))


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

    async def talk():
        door = ExplorerApp(explorer, Serving())
        asked = [asyncio.create_task(door.ask("a", "route", upload)) for _ in range(5)]
        asked.append(asyncio.create_task(door.ask("a", "export_html", export)))
        example = await door.ask("a", "route", hostile.ROUTE)
        assert not any(task.done() for task in asked)
        go.set()
        answers = await asyncio.gather(*asked)
        door.close()
        return example, answers

    example, (first, *others, page) = asyncio.run(talk())
    assert most == 1
    assert example == explorer.answer("route", hostile.ROUTE)
    assert first == explorer.answer("route", upload)
    assert others == [first] * 4
    assert page == explorer.answer("export_html", export)


def test_what_an_image_may_have(explorer):
    """16 megapixels, or 50 of a JPEG, which is decoded in fewer; what is too large is told what to do."""

    def answer(data):
        return explorer.answer("route", {"picture": {"kind": "upload", "data": data}})

    assert "prediction" in answer(hostile.uri(hostile.png_bomb(4000, 4000)))
    refused = answer(hostile.uri(hostile.png_bomb(4001, 4000)))
    assert refused["code"] == "bad_image"
    assert says(refused["error"], "4001 x 4000", "16,000,000", "shrink it")
    photo = hostile.uri(hostile.picture_bytes("JPEG", (5472, 3648)))  # 20 megapixels
    assert "prediction" in answer(photo)
    assert open_data_uri(photo, 672).size == (2736, 1824)
    assert says(
        answer(hostile.uri(hostile.picture_bytes("JPEG", (7100, 7100))))["error"], "50,000,000"
    )


def ask_from(address, url, path, body):
    """What a request of someone at one of this computer's addresses is answered, and its seconds."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=120) as client:
        start = time.monotonic()
        return client.post(f"{url}{path}", json=body).json(), time.monotonic() - start


def upload(data):
    """To `route`, an image."""
    return "api/route", {"model": "pets", "picture": {"kind": "upload", "data": data}}


@pytest.mark.deep
def test_a_crowd_at_one_address_does_not_shut_out_another(server):
    """80 connections that send 2.6 megapixels again and again, and someone else with a small image."""
    large = upload(hostile.uri(hostile.png_bomb(1600, 1600)))
    small = upload(hostile.uri(hostile.picture_bytes("PNG")))
    over, met = threading.Event(), Counter()

    def code(answer):
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
