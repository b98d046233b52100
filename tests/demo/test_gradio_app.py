"""The Gradio app: its answer is the model's, its view shows what was taken away, its endpoint is typed."""

import json
import os
import re
import socket
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from moevision.data.synthetic import SyntheticPets
from moevision.demo.gradio_app import examples, experts, route
from moevision.demo.models import open_entries
from moevision.demo.view import route_image
from tests.scopes import ablate

ROOT = Path(__file__).parents[2]
LION = (200, 150, 90)


@pytest.fixture(scope="module")
def entries(home):
    return {entry.card.title: entry for entry in open_entries(None, home=home)}


def shown(page):
    """The view inside the frame."""
    return json.loads(re.search(r"const VIEW = (.*);", unescape(page))[1])


def test_the_answer_is_the_models_with_and_without_an_expert(entries):
    title, entry = next(iter(entries.items()))
    photo, saved = Image.new("RGB", (90, 64), LION), entry.variants["trained"].saved
    label, page = route(entries, photo, title, [])
    expected = route_image(saved, photo).to_json()
    assert label == {one["class"]: one["p"] for one in expected["prediction"]["moe"]}
    assert shown(page)["layers"] == expected["layers"]
    assert page.startswith("<iframe")
    assert 'sandbox="allow-scripts"' in page
    label, page = route(entries, photo, title, ["L3·E1", "L9·E9"])
    with ablate(saved.net, 3, 1):
        expected = route_image(saved, photo).to_json()
    assert label == {one["class"]: one["p"] for one in expected["prediction"]["moe"]}
    assert shown(page)["settings"]["away"] == [[3, 1]]
    assert route(entries, None, title, []) == (None, "")


def test_what_is_transparent_is_white(entries):
    """As everywhere else; what lies under it is black here."""
    title, photo = next(iter(entries)), Image.new("RGBA", (90, 64), (0, 0, 0, 0))
    assert route(entries, photo, title, [])[0] == route(entries, Image.new("RGB", (90, 64), "white"), title, [])[0]


def test_examples_are_as_large_as_their_data(entries):
    found = examples(entries)
    assert [title for _, title in found] == ["The pets"] * 3  # the other model has none here
    assert found[0][0].size == (672, 672)  # drawn
    assert experts(next(iter(entries.values())))[:5] == ["L1·E0", "L1·E1", "L1·E2", "L1·E3", "L3·E0"]


@pytest.mark.deep
def test_app_py_has_a_typed_endpoint():
    from gradio_client import Client, handle_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py")], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert any("Running on local URL" in line for line in process.stdout)
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        ((name, endpoint),) = client.view_api(return_format="dict", print_info=False)["named_endpoints"].items()
        assert name == "/route"
        assert [one["component"] for one in endpoint["parameters"]] == ["Image", "Dropdown", "Dropdown"]
        label, page = client.predict(
            handle_file(ROOT / "docs/img/pets.jpg"), "Drawn pets", ["L1·E3"], api_name="/route"
        )
        assert label["label"] in SyntheticPets.classes
        assert shown(page)["settings"]["away"] == [[1, 3]]
    finally:
        process.terminate()
        process.communicate()
