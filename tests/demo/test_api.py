"""What programs ask over HTTP, the login, and what is not public."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from moevision.demo import gate, route_image
from moevision.demo.server import WRONG_LOGIN_S
from tests.demo.conftest import png
from tests.demo.serving import WRONG_S


def ask(url, name, data, **headers):
    return httpx.post(f"{url}api/{name}", json=data, headers=headers, timeout=120)


def test_a_program_gets_what_route_image_computes(server, explorer, pixels):
    entry = explorer.entries["pets"]
    alone = route_image(entry.variants["trained"].saved, pixels, dense=entry.dense).to_json()
    for data in (png(pixels), png(pixels).partition(",")[2]):
        answer = ask(server.url, "route", {"picture": {"kind": "upload", "data": data}}).json()
        assert answer["layers"] == alone["layers"]
        assert answer["prediction"] == alone["prediction"]
    assert list(server.files.iterdir()) == []  # images are not kept


def test_the_page_asks_the_same_explorer(server, explorer):
    request = {"model": "pets", "picture": {"kind": "example", "id": "pets/test/5"}}
    for name in explorer.handlers:
        data = {"boot": {}, "route": request, "export_html": request}.get(
            name, {"model": "pets", "layer": 1}
        )
        assert ask(server.url, name, data).json() == json.loads(
            json.dumps(explorer.answer(name, data))
        )


def test_an_idle_explorer_sleeps(server):
    """uvicorn looks 10 times a second for its end."""
    pages, before = 1 + len(server.doors), server.wakes()
    time.sleep(2)
    assert (server.wakes() - before) / 2 < 50 * pages


def test_headers_and_monitoring(server):
    answer = httpx.get(server.url, timeout=120)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert httpx.get(f"{server.url}monitoring/summary", timeout=120).status_code == 404
    foreign = httpx.get(
        f"{server.url}api/boot", headers={"origin": "https://evil.example"}, timeout=120
    )
    assert "access-control-allow-origin" not in foreign.headers


def log_in(url, password, address="127.0.0.1", **headers):
    """The status of a login that comes from one of this computer's addresses."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=120) as client:
        data = {"username": "class", "password": password}
        return client.post(f"{url}login", data=data, headers=headers).status_code


def test_with_a_password_nothing_answers_without_it(server):
    url = server.doors["locked"]
    assert ask(url, "boot", {}).status_code == 401
    for path in ("config", "openapi.json", "nothing"):
        assert httpx.get(url + path, timeout=120).status_code == 401
    assert "BOOT" not in httpx.get(url, timeout=120).text
    wrong = httpx.post(f"{url}login", data={"username": "class", "password": "guess"}, timeout=120)
    assert wrong.status_code == 401
    right = httpx.post(f"{url}login", data={"username": "class", "password": "secret"}, timeout=120)
    cookie = "; ".join(f"{name}={value}" for name, value in right.cookies.items())
    assert ask(url, "boot", {}, cookie=cookie).json()["default"]["model"] == "pets"
    # Guesses take their time, one after another, wherever they claim to come from.
    begin = time.monotonic()
    with ThreadPoolExecutor(80) as pool:
        guesses = [
            pool.submit(
                log_in, url, "guess", "127.0.0.1", **{"x-forwarded-for": f"203.0.113.{number}"}
            )
            for number in range(80)
        ]
        time.sleep(0.5)
        assert log_in(url, "secret", "127.0.0.2") == 200  # the others of the class notice nothing
        assert time.monotonic() - begin < 20
        found = Counter(guess.result() for guess in guesses)
    assert set(found) == {401, 429}
    assert found[401] <= 1 + (time.monotonic() - begin) / WRONG_S
    assert WRONG_LOGIN_S == 1
    assert log_in(url, "secret", "127.0.0.1") == 200


@pytest.mark.parametrize(
    ("client", "proxied", "forwarded", "expected"),
    [
        ("192.0.2.7", False, False, "192.0.2.7"),
        ("192.0.2.7", True, True, "192.0.2.7"),
        ("192.0.2.7", False, True, "forwarded"),
        ("2001:db8:1:2:3:4:5:6", False, False, "2001:db8:1:2::/64"),
        ("fe80::1%eth0", False, False, "fe80::/64"),
        ("::ffff:192.0.2.7", False, False, "192.0.2.7"),
        ("no address", True, True, "no address"),
        (None, False, False, "unknown"),
    ],
)
def test_what_counts_as_one_address(client, proxied, forwarded, expected):
    assert gate.client_address(client and (client, 9), proxied, forwarded) == expected


def test_behind_a_proxy_or_a_tunnel(server):
    """`--share` with a password, as a tunnel's requests look: its name, visitors' addresses in a header."""
    url = server.doors["locked-shared"]

    def get(name):
        return httpx.get(url, headers={"host": name}, timeout=120)

    assert [
        get(name).status_code
        for name in ("abc.tunnel.example", "moe.lab.example:80", "evil.example")
    ] == [
        200,
        200,
        421,
    ]
    shared = get("abc.tunnel.example")
    assert (
        "gradio.s3" not in shared.text
    )  # its scripts come from here, not from a server of gradio's
    assert "frame-ancestors 'self'" in shared.headers["content-security-policy"].split(";")[-1]
    assert "localhost" not in shared.headers["content-security-policy"]
    begin = time.monotonic()
    guesses = [
        {"x-forwarded-for": f"{claim}198.51.100.1"} for claim in ("", "203.0.113.9, ", "1.2.3.4, ")
    ]
    assert [log_in(url, "guess", **guess) for guess in guesses] == [401] * 3
    assert time.monotonic() - begin >= 3 * WRONG_S
    assert log_in(url, "secret", **{"x-forwarded-for": "198.51.100.2"}) == 200
