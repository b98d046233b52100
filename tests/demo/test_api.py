"""The one public endpoint, over HTTP: gradio_client, curl's two steps, the login, and what is not public."""

import asyncio
import base64
import io
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from moevision.demo import gate, route_image
from moevision.demo.server import WRONG_LOGIN_S, Uploads
from tests.demo import hostile
from tests.demo.serving import LOGIN, WRONG_S


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False)


@pytest.fixture
def picture(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_route_is_the_only_endpoint_and_documents_itself(client):
    info = client.view_api(return_format="dict", print_info=False)
    assert list(info["named_endpoints"]) == ["/route"]
    assert info["unnamed_endpoints"] == {}
    route = info["named_endpoints"]["/route"]
    names = [parameter["parameter_name"] for parameter in route["parameters"]]
    assert names == ["picture", "example", "model", "variant", "top_k", "capacity", "intervention"]
    assert "moevision.view/2" in route["description"]
    assert route["parameters"][0]["python_type"]["type"] == "filepath | str"


def test_gradio_client_gets_what_route_image_computes(client, explorer, pixels, picture):
    answer = client.predict(picture=picture, api_name="/route")
    entry = explorer.entries["pets"]
    alone = route_image(entry.variants["trained"].saved, pixels, dense=entry.dense).to_json()
    assert answer["layers"] == alone["layers"]
    assert answer["prediction"] == alone["prediction"]
    assert client.predict(picture=f"data:image/png;base64,{picture}", api_name="/route")["layers"] == alone["layers"]


def test_every_setting_of_the_endpoint(client, explorer):
    change = {"kind": "ablate", "layer": 3, "expert": 1, "fill": "zero", "seed": 0}
    given = {"variant": "unbalanced", "top_k": 3, "capacity": 1.5, "intervention": change}
    answer = client.predict(example="pets/test/3", model="pets", **given, api_name="/route")
    request = {"model": "pets", "picture": {"kind": "example", "id": "pets/test/3"}, **given}
    assert answer == explorer.answer("route", request)


def test_mistakes_come_back_as_a_sentence(client):
    assert client.predict(api_name="/route")["code"] == "bad_request"
    assert client.predict(picture="no picture", api_name="/route")["code"] == "bad_image"
    assert client.predict(picture="/etc/passwd", api_name="/route")["code"] == "bad_image"
    assert client.predict(example="pets/test/3", top_k=99, api_name="/route")["code"] == "bad_request"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("call/v2/route", lambda picture: {"picture": picture}),
        ("call/route", lambda picture: {"data": [picture, "", "pets", "trained", None, None, None]}),
    ],
)
def test_curl(server, explorer, picture, path, body):
    """The two steps that gradio documents for curl; by names the others keep their defaults."""
    answer = httpx.post(f"{server.url}gradio_api/{path}", json=body(picture), timeout=120)
    lines = httpx.get(f"{server.url}gradio_api/call/route/{answer.json()['event_id']}", timeout=120).text.splitlines()
    assert lines[0] == "event: complete"
    request = {"picture": {"kind": "upload", "data": picture}}
    assert json.loads(lines[1].removeprefix("data: ")) == [explorer.answer("route", request)]


def ask(url, name, data, **headers):
    return httpx.post(f"{url}api/{name}", json=data, headers=headers, timeout=120)


def test_the_page_asks_the_same_explorer(server, explorer):
    request = {"model": "pets", "picture": {"kind": "example", "id": "pets/test/5"}}
    for name in explorer.handlers:
        data = {"boot": {}, "route": request, "export_html": request}.get(name, {"model": "pets", "layer": 1})
        assert ask(server.url, name, data).json() == json.loads(json.dumps(explorer.answer(name, data)))


def test_an_idle_explorer_sleeps(server):
    """gradio looks 20 times a second for calls and for progress, uvicorn 10 times for its end; else 1,100 times.

    Without this each idle page kept 4 % of a core busy.
    """
    pages, before = 1 + len(server.doors), server.wakes()
    time.sleep(2)
    assert (server.wakes() - before) / 2 < 100 * pages


def test_headers_and_monitoring(server):
    answer = httpx.get(server.url, timeout=120)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert httpx.get(f"{server.url}monitoring/summary", timeout=120).status_code == 404
    foreign = httpx.get(f"{server.url}config", headers={"origin": "https://evil.example"}, timeout=120)
    assert "access-control-allow-origin" not in foreign.headers


@pytest.fixture
def file(tmp_path, pixels):
    path = tmp_path / "bear.png"
    Image.fromarray(pixels).save(path)
    return path


def test_a_file_is_taken_as_everyones_client_sends_it(client, explorer, file, picture):
    answer = client.predict(picture=handle_file(file), api_name="/route")
    assert answer == explorer.answer("route", {"picture": {"kind": "upload", "data": picture}})


def upload(url, data, name="x.png", **headers):
    return httpx.post(f"{url}gradio_api/upload", files={"files": (name, data)}, headers=headers, timeout=120)


def route_file(server, path, **more):
    """What `route` answers about a file object, as gradio's clients write it."""
    given = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
    call = httpx.post(f"{server.url}gradio_api/call/v2/route", json={"picture": given}, timeout=120)
    lines = httpx.get(f"{server.url}gradio_api/call/route/{call.json()['event_id']}", timeout=120).text.splitlines()
    assert lines[0] == "event: complete"
    return json.loads(lines[1].removeprefix("data: "))[0]


def test_a_file_serves_one_request(server, file):
    (path,) = upload(server.url, file.read_bytes()).json()
    assert route_file(server, path)["schema"] == "moevision.view/2"
    assert route_file(server, path)["code"] == "bad_image"


@pytest.fixture
def counted():
    """A web server on this computer, and the paths that it was asked for."""
    hits = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}/x.png", hits
        web.shutdown()
        thread.join()


def test_a_file_object_opens_no_path_and_no_address(server, file, counted, client, gradio_dir):
    address, hits = counted
    folder = gradio_dir  # where gradio alone would look
    link = folder / "moevision-test" / "link.png"
    link.parent.mkdir()
    link.symlink_to(file)
    found = [
        route_file(server, path, **more)
        for path in (str(file), f"{folder}/../{file}", str(link), address, "/nothing/here.png", "upload:", "")
        for more in ({}, {"url": address}, {"is_stream": True}, {"orig_name": str(file), "mime_type": "image/png"})
    ]
    link.unlink()
    assert {answer["code"] for answer in found} == {"bad_image", "bad_request"}  # "" is no image at all
    assert client.predict(picture=handle_file(address), api_name="/route")["code"] == "bad_image"
    assert hits == []


def test_a_file_has_the_limits_of_a_picture(server):
    for data in (hostile.png_bomb(11_000, 11_000), b"%PDF-1.7", b"", hostile.picture_bytes("PNG")[:30]):
        (path,) = upload(server.url, data).json()
        assert route_file(server, path)["code"] in ("bad_image", "bad_request")
    for size in (8 * 2**20 + 1, 12 * 2**20):
        assert upload(server.url, b"x" * size).status_code == 413
    two = [("files", ("a", b"a")), ("files", ("b", b"b"))]
    for wrong in ({"files": two}, {"data": {"files": "x"}}, {"files": {"other": b"x"}}, {"json": {}}):
        assert httpx.post(f"{server.url}gradio_api/upload", timeout=20, **wrong).status_code == 400


def test_uploads_make_room_and_a_request_holds_one():
    """At most 20 bytes: of the address with most, the oldest goes; an address with one file keeps it."""

    async def four():
        uploads = Uploads(limit=20)
        return uploads, [uploads.keep(address, b"1234567") for address in "abbb"]

    uploads, names = asyncio.run(four())
    content = base64.b64encode(b"1234567").decode()
    files = [{"path": name, "meta": {}} for name in names]
    assert [uploads.text_of(file) for file in files] == [content, names[1], names[2], content]
    assert uploads.text_of(files[0]) == names[0]


def log_in(url, password, address="127.0.0.1", **headers):
    """The status of a login that comes from one of this computer's addresses."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=120) as client:
        data = {"username": "class", "password": password}
        return client.post(f"{url}login", data=data, headers=headers).status_code


def test_with_a_password_nothing_answers_without_it(server, file, gradio_dir):
    url = server.doors["locked"]
    assert ask(url, "boot", {}).status_code == 401
    for path in ("config", "gradio_api/info", "gradio_api/queue/data", "openapi.json", "nothing"):
        assert httpx.get(url + path, timeout=120).status_code == 401
    assert "BOOT" not in httpx.get(url, timeout=120).text
    assert upload(url, b"x").status_code == 401
    cancel = {"session_hash": "x", "fn_index": 0, "event_id": "x"}
    assert httpx.post(f"{url}gradio_api/cancel", json=cancel, timeout=120).status_code == 401
    call = httpx.post(f"{url}gradio_api/call/route", json={"data": ["", "pets/test/1"]}, timeout=120)
    assert call.status_code == 401
    wrong = httpx.post(f"{url}login", data={"username": "class", "password": "guess"}, timeout=120)
    assert wrong.status_code == 401
    right = httpx.post(f"{url}login", data={"username": "class", "password": "secret"}, timeout=120)
    cookie = "; ".join(f"{name}={value}" for name, value in right.cookies.items())
    assert ask(url, "boot", {}, cookie=cookie).json()["default"]["model"] == "pets"
    assert upload(url, b"x", cookie=cookie).status_code == 200
    signed_in = Client(url, auth=LOGIN, verbose=False)
    assert signed_in.predict(example="pets/test/1", api_name="/route")["schema"] == "moevision.view/2"
    assert signed_in.predict(picture=handle_file(file), api_name="/route")["schema"] == "moevision.view/2"
    assert [path for path in gradio_dir.glob("**/*") if path.is_file()] == []  # images are not kept
    # Guesses take their time, one after another, wherever they claim to come from.
    begin = time.monotonic()
    with ThreadPoolExecutor(80) as pool:
        guesses = [
            pool.submit(log_in, url, "guess", "127.0.0.1", **{"x-forwarded-for": f"203.0.113.{number}"})
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

    assert [get(name).status_code for name in ("abc.tunnel.example", "moe.lab.example:80", "evil.example")] == [
        200,
        200,
        421,
    ]
    shared = get("abc.tunnel.example")
    assert "gradio.s3" not in shared.text  # its scripts come from here, not from a server of gradio's
    assert "frame-ancestors 'self'" in shared.headers["content-security-policy"].split(";")[-1]
    assert "localhost" not in shared.headers["content-security-policy"]
    begin = time.monotonic()
    guesses = [{"x-forwarded-for": f"{claim}198.51.100.1"} for claim in ("", "203.0.113.9, ", "1.2.3.4, ")]
    assert [log_in(url, "guess", **guess) for guess in guesses] == [401] * 3
    assert time.monotonic() - begin >= 3 * WRONG_S
    assert log_in(url, "secret", **{"x-forwarded-for": "198.51.100.2"}) == 200
