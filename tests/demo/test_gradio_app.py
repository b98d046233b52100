"""The Gradio app: its answer is the model's, its view shows what was taken away, its endpoint is typed."""

import base64
import json
import os
import random
import re
import subprocess
import sys
import time
from contextlib import closing
from html import unescape
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image

from moevision.data.synthetic import SyntheticPets
from moevision.demo.gradio_app import RoutingApp, examples, experts
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from moevision.demo.view import route_image
from moevision.demo.wire import MAX_BYTES
from tests.demo import hostile
from tests.demo.conftest import png
from tests.demo.serving import running
from tests.scopes import ablate
from tests.shared import free_port, says

ROOT = Path(__file__).parents[2]
LION = (200, 150, 90)
META = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def entries(home):
    return {entry.card.title: entry for entry in open_entries(None, home=home)}


@pytest.fixture(scope="module")
def routing_app(entries):
    return RoutingApp(entries)


def shown(page):
    """The view inside the frame."""
    return json.loads(re.search(r"const VIEW = (.*);", unescape(page))[1])


def test_the_answer_is_the_models_with_and_without_an_expert(entries, routing_app):
    title, entry = next(iter(entries.items()))
    photo, saved = Image.new("RGB", (90, 64), LION), entry.variants["trained"].saved
    label, page, routing = routing_app.route(photo, title, [])
    expected = route_image(saved, photo).to_json()
    assert label == {one["class"]: one["p"] for one in expected["prediction"]["moe"]}
    assert shown(page)["layers"] == expected["layers"]
    assert page.startswith("<iframe")
    assert 'sandbox="allow-scripts"' in page
    label, page, routing = routing_app.route(photo, title, ["L3·E1"])
    with ablate(saved.net, 3, 1):
        expected = route_image(saved, photo).to_json()
    assert label == {one["class"]: one["p"] for one in expected["prediction"]["moe"]}
    assert shown(page)["settings"]["away"] == [[3, 1]]
    assert routing["layers"][1]["experts"] == expected["layers"][1]["experts"]
    assert routing["layers"][1]["weights"] == expected["layers"][1]["weights"]
    assert routing["grid"] == expected["model"]["grid"]
    assert routing_app.route(photo, title, ["L3.E1"]) == (
        label,
        page,
        routing,
    )  # as the page's links
    assert routing_app.route(None, title, []) == (None, "", None)


def data_uri(image):
    """What a program may send in the place of a file."""
    return {"path": None, "url": png(np.asarray(image))}


def test_what_is_transparent_is_white(entries, routing_app):
    """As everywhere else; what lies under it is black here."""
    title, photo = next(iter(entries)), Image.new("RGBA", (90, 64), (0, 0, 0, 0))
    white = Image.new("RGB", (90, 64), "white")
    assert (
        routing_app.answer_program(data_uri(photo), title, [])[0]
        == routing_app.route(white, title, [])[0]
    )


WRONG_AWAY = [
    (["L3·E4"], "no expert 'L3·E4'"),
    (["L1·E0", "L5·E99"], "no expert 'L5·E99'"),
    (["L3.E4"], "no expert 'L3.E4'"),
    (["L3E1"], "no expert 'L3E1'"),
    ([""], "no expert ''"),
    (["x" * 9999], "no expert 'xxxx"),
    ([3, 1], "no expert '3'"),
    ([[3, 1]], "no expert '[3, 1]'"),
    ([None], "no expert 'None'"),
    ([{"a": 1}], "no expert \"{'a': 1}\""),
    ("L3·E1", "a list of names such as 'L1·E0'"),
    ({"0": "L3·E1"}, "a list of names such as 'L1·E0'"),
    (3, "a list of names such as 'L1·E0'"),
    (["L3·E1"] * 9, "at most 8 pairs"),
]


@pytest.mark.parametrize(("away", "words"), WRONG_AWAY)
def test_an_expert_that_is_not_there_is_named(entries, routing_app, away, words):
    """An answer as if nothing had been taken away would pass for a measurement without effect."""
    title, photo = next(iter(entries)), data_uri(Image.new("RGB", (90, 64), LION))
    for image in (photo, None):
        with pytest.raises(gr.Error) as refused:
            routing_app.answer_program(image, title, away)
        assert words in refused.value.message


def test_the_page_may_keep_the_experts_of_the_model_before_for_a_moment(entries, routing_app):
    title, photo = next(iter(entries)), data_uri(Image.new("RGB", (90, 64), LION))
    kept = routing_app.answer_program(photo, title, ["L3·E1"])
    assert routing_app.answer_page(photo, title, ["L3·E1", "L9·E9"]) == (kept.classes, kept.view)


@pytest.mark.parametrize("model", ["nope", "", None, 3, ["The pets"], {"The pets": 1}])
def test_a_model_that_is_not_there_is_a_sentence(routing_app, model):
    for ask in (routing_app.answer_program, routing_app.answer_page):
        with pytest.raises(gr.Error, match="'model' must be"):
            ask(None, model, [])


def test_examples_are_as_large_as_their_data(entries):
    found = examples(entries)
    assert [one.model for one in found] == ["The pets"] * 3  # the other model has none here
    assert found[0].image.size == (672, 672)  # drawn
    assert list(experts(next(iter(entries.values()))))[:5] == [
        "L1·E0",
        "L1·E1",
        "L1·E2",
        "L1·E3",
        "L3·E0",
    ]


def test_an_example_is_routed_as_the_page_routes_it(entries, routing_app):
    """Made smaller from many pixels it would be another image than the one drawn small."""
    title, entry = next(iter(entries.items()))
    example, facts = examples(entries)[0], entry.examples.usable(0, 1)[0]
    view = Explorer([entry]).route({"picture": {"kind": "example", "id": facts.id}})
    found = routing_app.answer_program(data_uri(example.image), title, [])
    assert found.classes == {one["class"]: one["p"] for one in view["prediction"]["moe"]}
    assert found.routing["layers"][0]["experts"] == view["layers"][0]["experts"]


class Asking:
    """What a program that knows no manners asks of a launched app."""

    def __init__(self, url):
        self.http = httpx.Client(base_url=f"{url}/gradio_api/", timeout=300)
        self.components = self.http.get("../config").json()["components"]
        dropdowns = [one for one in self.components if one["type"] == "dropdown"]
        self.model = dropdowns[0]["props"]["choices"][0][0]

    def upload(self, data, name="photo.png"):
        """Where the server has put a file."""
        answer = self.http.post("upload", files={"files": (name, data, "image/png")})
        assert answer.status_code == 200, answer.text
        return answer.json()[0]

    def ask(self, image, away=()):
        """The answer's label, or the sentence of an error; past the queue."""
        answer = self.http.post("run/route", json={"data": [image, self.model, list(away)]})
        said = answer.json()
        return said["data"][0]["label"] if answer.status_code == 200 else said["error"]


SERVE = """
import sys, threading
import gradio as gr
from PIL import ImageFile
from moevision.demo import gradio_app

load = ImageFile.ImageFile.load
def noted(image):
    open(sys.argv[1], "a").write(f"{image.size}\\n")
    return load(image)

gradio_app.DELETE_CACHE_S = (1, 1)
alone, inner = gradio_app.blocks(), gradio_app.blocks()
with gr.Blocks() as within, gr.Tab("Routing"):
    inner.render()
for app, name, port in ((alone, "alone", sys.argv[2]), (within, "within", sys.argv[3])):
    app.launch(server_port=int(port), prevent_thread_lock=True, quiet=True)
    print("door", name, app.local_url)
ImageFile.ImageFile.load = noted
print("The explorer is at", within.local_url, flush=True)
try:
    threading.Event().wait()
except KeyboardInterrupt:
    for app in (alone, within):
        app.close()
"""


@pytest.fixture(scope="module")
def apps(tmp_path_factory):
    """Two apps in a process that notes the sizes of images that Pillow decodes: alone, and in a tab of other Blocks.

    The one alone deletes uploads after a second.
    """
    files = tmp_path_factory.mktemp("gradio")
    arguments = (str(files / "decoded"), str(free_port()), str(free_port()))
    env = {"GRADIO_TEMP_DIR": str(files / "uploads")}
    with running("-c", SERVE, *arguments, env=env) as server:
        found = {name: Asking(url.rstrip("/")) for name, url in server.doors.items()}
        found["within"].decoded = files / "decoded"
        yield found
        for asking in found.values():
            asking.http.close()


@pytest.fixture(scope="module")
def launched(apps):
    return apps["within"]


@pytest.mark.deep
def test_within_other_blocks_it_opens_filled(launched):
    kinds = ("image", "label", "html")
    shown = [one for one in launched.components if one["type"] in kinds]
    values = {one["type"]: one["props"].get("value") for one in shown}
    assert values["image"]["path"].endswith(".png")
    assert values["label"]["confidences"]
    assert "<iframe" in values["html"]


@pytest.mark.deep
def test_the_endpoint_is_named_and_typed(launched):
    ((name, endpoint),) = launched.http.get("info").json()["named_endpoints"].items()
    assert name == "/route"
    assert endpoint["description"].startswith("Route an image")
    image, model, away = endpoint["parameters"]
    assert [one["parameter_name"] for one in (image, model, away)] == ["image", "model", "away"]
    assert {"L8·E3", "L0·E2"} <= set(away["type"]["items"]["enum"])  # of two models
    assert [one["component"] for one in endpoint["returns"]] == ["Label", "Html", "Json"]


@pytest.fixture
def decoded(launched):
    """The sizes of images that Pillow has decoded since the test began, whoever routing_app for it."""
    launched.decoded.write_text("")
    return lambda: set(launched.decoded.read_text().splitlines())


@pytest.mark.deep
def test_what_is_too_large_is_never_decoded(launched, decoded):
    """Gradio itself would take 57 s and 3.8 GB, in the only place of its queue."""
    data = hostile.large_png(13_300)
    assert len(data) < 700_000
    for image in ({"path": launched.upload(data), **META}, {"url": hostile.uri(data)}):
        assert says(launched.ask(image), "13300 x 13300", "16,000,000")
    assert decoded() == set()
    assert launched.ask({"path": launched.upload(hostile.picture_bytes("PNG")), **META}) in (
        "cat",
        "dog",
    )
    assert decoded() == {"(40, 30)"}


@pytest.mark.deep
def test_only_uploaded_files_are_opened(launched, tmp_path, decoded):
    """Gradio checks a path beside the word "meta" alone."""
    mine = tmp_path / "mine.png"
    mine.write_bytes(hostile.picture_bytes("PNG"))
    uploads = Path(launched.upload(b"x")).parents[1]
    paths = [
        str(mine),
        f"{uploads}/../{mine.parent.name}/{mine.name}",
        str(uploads),
        "",
        "a" * 5000,
        "\0",
        *hostile.PATHS,
    ]
    for path in paths + hostile.ADDRESSES:
        for more in ({}, {"is_stream": True}, {"url": path}, {"url": f"/gradio_api/file={path}"}):
            said = launched.ask({"path": path, **more})
            assert says(said, "can't be used"), (path, more)
    for more in (META, {**META, "is_stream": True}):
        assert launched.ask({"path": str(mine), **more}) not in (
            "cat",
            "dog",
        )  # Gradio's own refusal, without a word
    assert decoded() == set()


@pytest.mark.deep
def test_odd_images_are_sentences(launched):
    odd = [text for text in hostile.uploads(random.Random(0)) if text.startswith("data:image")]
    assert len(odd) > 60
    for text in odd:
        encoded = text.partition(",")[2]
        data = base64.b64decode(encoded) if ";base64," in text else encoded.encode()
        for image in ({"url": text}, {"path": launched.upload(data, "odd.svg"), **META}):
            said = launched.ask(image)
            assert said in ("cat", "dog") or says(said, "can't be used"), text[:80]


@pytest.mark.deep
def test_uploads_are_deleted_and_examples_are_not(apps):
    """In an app that gets one: gradio 6.31 deletes no more once a file has arrived while it went through the list."""
    asking = apps["alone"]
    path = Path(asking.upload(hostile.picture_bytes("PNG", (41, 31))))
    examples = {file for file in path.parents[1].rglob("*.*") if file != path}
    assert examples
    end = time.monotonic() + 60
    while path.exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert says(asking.ask({"path": str(path)}), "no longer", "choose it again")
    assert all(file.exists() for file in examples)


def peak_mb(process):
    """The most memory that a process has had so far, in MB (Linux)."""
    return int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.deep
def test_app_py_has_a_typed_endpoint():
    from gradio_client import Client, handle_file

    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert any("local URL" in line for line in process.stdout)
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        ((name, endpoint),) = client.view_api(return_format="dict", print_info=False)[
            "named_endpoints"
        ].items()
        assert name == "/route"
        assert [one["component"] for one in endpoint["parameters"]] == [
            "Image",
            "Dropdown",
            "Dropdown",
        ]
        label, page, routing = client.predict(
            handle_file(ROOT / "docs/img/pets.jpg"), "Drawn pets", ["L1·E3"], api_name="/route"
        )
        assert label["label"] in SyntheticPets.classes
        assert shown(page)["settings"]["away"] == [[1, 3]]
        assert all(3 not in experts for experts in routing["layers"][0]["experts"])
        asking, before, start = (
            Asking(f"http://127.0.0.1:{port}"),
            peak_mb(process),
            time.monotonic(),
        )
        with closing(asking.http):
            assert "exceeds the limit" in asking.ask(
                {"path": asking.upload(hostile.large_png(13_300)), **META}
            )
            assert (
                asking.http.post(
                    "upload", files={"files": ("a.png", bytes(MAX_BYTES + 1))}
                ).status_code
                == 413
            )
        assert peak_mb(process) < before + 100  # decoded it has 700 MB
        assert time.monotonic() - start < 60
    finally:
        process.terminate()
        process.communicate()
