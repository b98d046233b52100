"""The one public endpoint, over HTTP: gradio_client, curl's two steps, the login, and what is not public."""

import base64
import io
import json
import threading

import httpx
import pytest
from gradio_client import Client
from PIL import Image

from moevision.demo import route_image
from moevision.demo.gate import Gate
from moevision.demo.requests import RequestError
from tests.demo import serving
from tests.demo.serving import running


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
    body = {"data": data, "component_id": 1, "session_hash": "test", "fn_name": name}
    return httpx.post(f"{url}gradio_api/component_server", json=body, headers=headers, timeout=120)


def test_the_page_asks_the_same_explorer(server, explorer):
    request = {"model": "pets", "picture": {"kind": "example", "id": "pets/test/5"}}
    for name in explorer.handlers:
        data = {"boot": {}, "route": request, "export_html": request}.get(name, {"model": "pets", "layer": 1})
        assert ask(server.url, name, data).json() == json.loads(json.dumps(explorer.answer(name, data)))


def test_headers_and_monitoring(server):
    answer = httpx.get(server.url, timeout=120)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert httpx.get(f"{server.url}monitoring/summary", timeout=120).status_code == 404
    foreign = httpx.get(f"{server.url}config", headers={"origin": "https://evil.example"}, timeout=120)
    assert "access-control-allow-origin" not in foreign.headers


def test_with_a_password_nothing_answers_without_it(home):
    with running(serving.__file__, str(home), "--auth", "class:secret") as server:
        assert ask(server.url, "boot", {}).status_code == 401
        for path in ("config", "gradio_api/info", "gradio_api/queue/status"):
            assert httpx.get(server.url + path, timeout=120).status_code == 401
        call = httpx.post(f"{server.url}gradio_api/call/route", json={"data": ["", "pets/test/1"]}, timeout=120)
        assert call.status_code == 401
        wrong = httpx.post(f"{server.url}login", data={"username": "class", "password": "guess"}, timeout=120)
        assert wrong.status_code == 400
        right = httpx.post(f"{server.url}login", data={"username": "class", "password": "secret"}, timeout=120)
        cookie = "; ".join(f"{name}={value}" for name, value in right.cookies.items())
        assert ask(server.url, "boot", {}, cookie=cookie).json()["default"]["model"] == "pets"
        signed_in = Client(server.url, auth=("class", "secret"), verbose=False)
        assert signed_in.predict(example="pets/test/1", api_name="/route")["schema"] == "moevision.view/2"


def test_a_full_gate_says_busy():
    gate, go = Gate(workers=1, waiting=2), threading.Event()
    inside = [gate.submit(go.wait, 10) for _ in range(3)]
    with pytest.raises(RequestError, match="try again") as refused:
        gate.submit(go.wait, 10)
    assert refused.value.code == "busy"
    go.set()
    assert all(future.result(10) for future in inside)
    assert gate.submit(lambda: "in again").result(10) == "in again"
    gate.close()
    with pytest.raises(RequestError, match="stopped"):
        gate.submit(go.wait, 10)


def test_a_failing_request_leaves_its_place():
    gate = Gate(workers=1, waiting=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            gate.submit(lambda: 1 / 0).result(10)
    gate.close()
