"""`moevision demo`: safe by default, says what it does, and starts quickly."""

import json
import runpy
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import segno

from moevision.cli import main as cli_main
from moevision.demo import server as launch
from moevision.demo.server import Serving, is_loopback
from moevision.errors import UserError
from moevision.models.io import save_model
from tests.demo.serving import running


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "arguments",
    [["--host", "0.0.0.0"], ["--host", "::"], ["--share"], ["--host", "192.168.1.7"], ["--host", "myhost"]],
)
def test_others_are_kept_out_without_a_password(arguments, cli):
    outcome = cli("demo", *arguments)
    assert outcome.code == 2
    assert "--auth USER:PASS" in outcome.err
    assert "--public" in outcome.err
    assert outcome.err.count("\n") == 1


def test_others_may_come_in_when_that_is_said():
    Serving(host="0.0.0.0", public=True).check()
    Serving(host="0.0.0.0", auth=("class", "secret")).check()
    Serving(share=True, auth=("class", "secret")).check()
    Serving().check()
    with pytest.raises(UserError):
        Serving(host="0.0.0.0").check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--auth", "nobody"], "colon"),
        (["--auth", ":x"], "colon"),
        (["--auth", "x:"], "colon"),
        (["--port", "0"], "--port is 0"),
        (["--allow-host", "https://lab.example.org"], "a host name without a port"),
        (["--allow-host", "lab.example.org:80"], "a host name without a port"),
        (["--allow-embed", "lab.example.org"], "https://lab.example.org"),
        (["--allow-embed", "https://x; script-src *"], "a website's origin"),
        (["--allow-embed", "https://lab.example.org/page"], "a website's origin"),
        (["--port", "99999"], "--port is 99999"),
        (["no/such/model"], "no/such/model"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_mistakes_in_one_sentence(arguments, words, cli):
    outcome = cli("demo", *arguments)
    assert outcome.code == 2
    assert words in outcome.err


@pytest.mark.parametrize(
    ("serving", "name", "expected"),
    [
        (Serving(), "localhost", True),
        (Serving(), "127.0.0.1", True),
        (Serving(), "::1", True),
        (Serving(), "192.168.1.7", True),  # a website with a name of its own can't send that
        (Serving(), "evil.example", False),
        (Serving(), "127.0.0.1.evil.example", False),
        (Serving(), f"{socket.gethostname()}.evil.example".lower(), False),
        (Serving(host="0.0.0.0"), socket.gethostname().lower(), True),
        (Serving(host="0.0.0.0"), f"{socket.gethostname()}.local".lower(), True),
        (Serving(host="0.0.0.0"), "evil.example", False),
        (Serving(host="moe.lab.example"), "moe.lab.example", True),
        (Serving(allow_host=("Moe.lab.example",)), "moe.lab.example", True),
        (Serving(allow_host=("*.lab.example",)), "moe.lab.example", True),
        (Serving(allow_host=("*.lab.example",)), "lab.example.evil.example", False),
        (Serving(allow_host=("*",)), "anything", True),
        (Serving(share=True), "abc.gradio.live", False),  # that of one's own tunnel is added when it is known
    ],
)
def test_names_that_the_page_goes_by(serving, name, expected):
    assert serving.known(name) is expected


def test_who_may_show_the_page_in_a_frame(monkeypatch):
    assert Serving().frames() == "http://localhost:* http://127.0.0.1:*"  # a notebook
    assert Serving(host="0.0.0.0").frames() == Serving(share=True).frames() == ""
    assert Serving(share=True, allow_embed=("https://lab.example", "*")).frames() == "https://lab.example *"
    monkeypatch.setenv("SPACE_ID", "me/moevision")
    space = Serving(host="0.0.0.0", public=True)
    assert space.frames() == "https://huggingface.co https://*.hf.space"
    assert space.known("me-moevision.hf.space")


def test_the_help_teaches(cli):
    outcome = cli("demo", "--help")
    assert outcome.code == 0
    for word in (
        "--data",
        "--host",
        "--port",
        "--auth",
        "--public",
        "--share",
        "--allow-host",
        "--allow-embed",
        "--no-browser",
        "moevision demo runs/pets",
    ):
        assert word in outcome.out
    assert "demo" in cli("--help").out


def test_the_help_loads_no_gradio():
    code = (
        "import sys; from moevision.cli import main; main(['demo', '--help']); main(['demo', '--share'])\n"
        "print([name for name in ('gradio', 'scipy', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.splitlines()[-1] == "[]"


def get(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


DOORS = {
    "GRADIO_SHARE": "True",
    "GRADIO_VIBE_MODE": "True",
    "GRADIO_MCP_SERVER": "True",
    "GRADIO_RUN_HISTORY": "True",
    "GRADIO_ANALYTICS_ENABLED": "True",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_ALLOWED_PATHS": "/",
}


@pytest.fixture(scope="module")
def mine(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    save_model(make(), folder / "model")
    return folder


@pytest.mark.slow
def test_a_model_of_ones_own_from_start_to_stop(mine):
    """The whole verb, with doors in the environment that must stay shut."""
    with running("-m", "moevision", "demo", str(mine), "--no-browser", env=DOORS) as server:
        assert server.url.startswith("http://127.0.0.1:")
        config = json.loads(get(server.url + "config"))
        assert "moevision" in get(server.url)
        port = server.url.rstrip("/").rpartition(":")[2]
        second = [sys.executable, "-m", "moevision", "demo", str(mine), "--port", port, "--no-browser"]
        taken = subprocess.run(second, capture_output=True, text=True, timeout=600)
        assert taken.returncode == 2
        assert "give another --port" in taken.stderr.splitlines()[-1]
        assert server.stop() == 0
    said = "\n".join(server.lines)
    assert "Stop it with Ctrl-C." in said
    assert "Only this computer can see it" in said
    assert said.endswith("Stopped.")
    assert "Traceback" not in said
    assert "gradio.live" not in said
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    assert config["footer_links"] == []
    assert not config.get("mcp_server")
    boot = next(part["props"]["value"]["boot"] for part in config["components"] if part["type"] == "html")
    assert [model["title"] for model in boot["models"]] == ["mine"]
    assert boot["local"] is True
    with pytest.raises(OSError, match="refused"):
        get(server.url)


@pytest.mark.slow
def test_app_py_serves_a_class(mine):
    shim = Path(__file__).parents[2] / "app.py"
    options = ("--host", "0.0.0.0", "--auth", "class:secret", "--no-browser")
    with running(str(shim), str(mine), *options) as server:
        port = server.url.rstrip("/").rpartition(":")[2]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"http://127.0.0.1:{port}/config")
        address = launch._address_for_others("0.0.0.0", server.url)  # as the QR code says
        assert "moevision" in get(address)
        evil = urllib.request.Request(address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="421"):
            get(evil)
        server.stop()
    said = "\n".join(server.lines)
    assert "and log in" in said
    assert "secret" not in said
    assert "▀" in said


def test_app_py_takes_the_same_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--share"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(__file__).parents[2] / "app.py"), run_name="__main__")
    assert stopped.value.code == cli_main(["demo", "--share"]) == 2


class FakeServer:
    url = "http://0.0.0.0:7861/"
    share_url = None


def test_the_announcement_for_others():
    text = launch.announcement(FakeServer, Serving(host="0.0.0.0", port=7861, auth=("class", "secret")))
    assert "and log in" in text
    assert ":7861/" in text
    assert "http://0.0.0.0:7861/" in text.splitlines()[0]
    assert "http://0.0.0.0" not in text.splitlines()[2]  # nobody else can open that
    assert "secret" not in text
    FakeServer.share_url = "https://x.gradio.live"
    shared = launch.announcement(FakeServer, Serving(share=True, public=True))
    assert "https://x.gradio.live: anyone" in shared


def test_the_qr_code_can_be_scanned():
    """The half blocks of the terminal, read back, are the code's modules with finder patterns in three corners."""
    halves = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
    lines = [line for line in launch.qr_code("http://192.168.1.7:7860/").splitlines() if line]
    plain = [line.replace("\x1b[7m", "").replace("\x1b[49m", "").replace("\x1b[0m", "") for line in lines]
    rows = [[halves[sign][half] for sign in line] for line in plain for half in (0, 1)]
    matrix = [list(row) for row in segno.make("http://192.168.1.7:7860/", micro=False).matrix_iter(border=2)]
    light = [[1 - module for module in row] for row in matrix]
    assert rows[: len(light)] in (light, matrix)
    # ISO/IEC 18004, 6.3.3: dark and light in 1 : 1 : 3 : 1 : 1
    side = len(matrix)
    for top, left in ((2, 2), (2, side - 9), (side - 9, 2)):
        assert matrix[top + 3][left : left + 7] == [1, 0, 1, 1, 1, 0, 1]
