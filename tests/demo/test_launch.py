"""`moevision demo`: safe by default, says what it does, and starts quickly."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

import moevision
from moevision.commands import demo as launch
from moevision.demo import gate
from moevision.demo.gate import AUTH, Serving, is_loopback
from moevision.errors import UserError
from moevision.models.io import save_model
from tests.demo.serving import running
from tests.shared import free_port, refused, says

ROOT = Path(__file__).parents[2]


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.7", "localhost.evil.example", "")))


def test_others_may_come_in_when_that_is_said():
    login = ("class", "secret")
    for options in (
        {"host": "0.0.0.0", "public": True},
        {"host": "0.0.0.0", "auth": login},
        {"share": True, "auth": login},
    ):
        Serving(**options).check()


def test_a_password_need_not_stand_on_the_command_line(monkeypatch, capsys):
    monkeypatch.delenv(AUTH, raising=False)
    assert launch.login(None) is None
    monkeypatch.setattr(launch.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(launch.getpass, "getpass", {"Password for class: ": "a:secret"}.__getitem__)
    assert launch.login("class") == ("class", "a:secret")
    for argument, user in (
        (None, "other"),
        ("class", "class"),
    ):  # an argument comes before the variable
        monkeypatch.setenv(AUTH, "other:a:secret")
        assert launch.login(argument) == (user, "a:secret")
        assert AUTH not in os.environ  # the program of gradio's tunnel doesn't need it
    monkeypatch.setenv(AUTH, "class:of the variable")  # for this very user: nobody is asked
    assert launch.login("class") == ("class", "of the variable")
    monkeypatch.setenv(AUTH, "class:of the variable")
    assert capsys.readouterr().err == ""
    assert launch.login("class:secret") == ("class", "secret")
    note = capsys.readouterr().err
    assert says(note, "--auth class")
    assert "secret" not in note
    monkeypatch.setattr(launch.getpass, "getpass", lambda prompt: "")
    with pytest.raises(UserError, match="--auth needs"):
        launch.login("class")


def test_an_answer_is_sent_at_once():
    """Without TCP_NODELAY its last part waits until the browser confirms the first, 40 ms on Linux."""
    with (
        Serving(host="127.0.0.1").listen() as listener,
        socket.create_connection(listener.getsockname()),
    ):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_a_name_with_one_address_that_can_be_used_will_do(monkeypatch):
    """Without IPv6, /etc/hosts often lists ::1 for localhost all the same, before 127.0.0.1."""
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
        for address in ("192.0.2.1", "127.0.0.1")
    ]
    monkeypatch.setattr(gate.socket, "getaddrinfo", lambda *_, **__: found)
    with Serving(host="localhost").listen() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(gate.socket, "getaddrinfo", lambda *_, **__: found[:1])
    with pytest.raises(UserError, match="no address"):
        Serving(host="localhost").listen()


HOST = socket.gethostname().lower()
NAMES = [
    # A website with a name of its own can't send an address.
    (
        {},
        "localhost 127.0.0.1 ::1 192.168.1.7",
        f"evil.example 127.0.0.1.evil.example {HOST}.evil.example",
    ),
    ({"host": "0.0.0.0"}, f"{HOST} {HOST}.local", "evil.example"),
    ({"host": "moe.lab.example"}, "moe.lab.example", ""),
    ({"allow_host": ("Moe.lab.example",)}, "moe.lab.example", ""),
    ({"allow_host": ("*.lab.example",)}, "moe.lab.example", "lab.example.evil.example"),
    ({"allow_host": ("*",)}, "anything", ""),
    ({"share": True}, "", "abc.gradio.live"),  # that of one's own tunnel is added when it is known
]


@pytest.mark.parametrize(("options", "accepted", "refused"), NAMES)
def test_names_that_the_page_goes_by(options, accepted, refused):
    serving = Serving(**options)
    assert [name for name in accepted.split() if not serving.accepts_host(name)] == []
    assert [name for name in refused.split() if serving.accepts_host(name)] == []


def test_who_may_show_the_page_in_a_frame(monkeypatch):
    notebook = ["'self'", "http://localhost:*", "http://127.0.0.1:*"]
    assert Serving().frames().split() == notebook
    assert Serving(host="0.0.0.0").frames() == Serving(share=True).frames() == "'self'"
    sites = ("https://lab.example", "*")
    assert Serving(share=True, allow_embed=sites).frames().split() == ["'self'", *sites]
    monkeypatch.setenv("SPACE_ID", "me/moevision")
    space = Serving(host="0.0.0.0", public=True)
    assert space.frames().split() == ["'self'", "https://huggingface.co", "https://*.hf.space"]
    assert space.accepts_host("me-moevision.hf.space")


def test_the_help_teaches(cli):
    outcome = cli("demo", "--help")
    assert outcome.code == 0
    options = {f"-{field.name.replace('_', '-')}" for field in fields(Serving)}
    for word in (*options, "--data", "moevision demo runs/pets"):
        assert word in outcome.out
    assert "demo" in cli("--help").out


@pytest.mark.deep
def test_the_help_loads_no_gradio():
    code = (
        "import sys; from moevision.cli import main; main(['demo', '--help']); main(['demo', '--share'])\n"
        "print([name for name in ('gradio', 'scipy', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.splitlines()[-1] == "[]"


def get(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def mine(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    save_model(make(), folder / "model")
    return folder


@pytest.mark.deep
def test_two_models_of_ones_own(mine, tmp_path):
    other = shutil.copytree(mine, tmp_path / "other")
    with running("-m", "moevision", "demo", str(mine), str(other), "--no-browser") as server:
        page = get(server.url)
    boot = json.loads(re.search(r"^const BOOT = (.*);$", page, re.MULTILINE)[1])
    found = [(model["id"], model["title"]) for model in boot["models"]]
    assert found == [("own", "mine"), ("own-1", "other")]


def test_each_of_several_models_is_looked_for(mine, cli):
    refused(cli("demo", mine, "runs/nowhere"), "no run or model 'runs/nowhere'")


@pytest.mark.deep
def test_a_model_of_ones_own_from_start_to_stop(mine, cli):
    """The whole verb."""
    with running("-m", "moevision", "demo", str(mine), "--no-browser") as server:
        assert server.url.startswith("http://127.0.0.1:")
        page = get(server.url)
        port = server.url.rstrip("/").rpartition(":")[2]
        taken = cli("demo", mine, "--port", port, "--no-browser")
        refused(taken, "give another --port")
        assert server.stop() == 0
    said = "\n".join(server.lines)
    assert says(said, "Ctrl-C", "Only this computer")
    assert said.endswith("Stopped.")
    assert "Traceback" not in said
    boot = json.loads(re.search(r"^const BOOT = (.*);$", page, re.MULTILINE)[1])
    assert [model["title"] for model in boot["models"]] == ["mine"]
    assert boot["local"] is True
    with pytest.raises(OSError, match="refused"):
        get(server.url)


@pytest.fixture
def space(tmp_path):
    """A Space as its README says to make one: this folder's files with the package beside them."""
    folder = shutil.copytree(ROOT / "deploy" / "space", tmp_path / "space")
    (folder / "moevision").symlink_to(Path(moevision.__file__).parent)
    return folder


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_a_space_says_what_it_needs(space):
    matter = front_matter(space)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (space / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line[0] not in "#-"] == project["dependencies"]
    assert matter["sdk"] == "gradio"
    (gradio,) = (Requirement(line) for line in project["dependencies"] if line.startswith("gradio"))
    assert gradio.specifier.contains(matter["sdk_version"])
    assert (space / matter["app_file"]).is_file()
    assert matter["license"] == project["license"].lower()
    assert len(matter["short_description"]) <= 60  # Hugging Face refuses a longer one


@pytest.mark.deep
def test_a_space_serves_a_class_below_a_path(mine, space):
    app = space / front_matter(space)["app_file"]
    options = ("--auth", "class:secret", "--root-path", "/moe", "--port", str(free_port()))
    with running(
        str(app), str(mine), *options, env={"SPACE_ID": "me/moe", "PYTHONPATH": ""}
    ) as server:
        port = server.url.rstrip("/").rpartition(":")[2]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"http://127.0.0.1:{port}/api/boot")
        address = launch.address_for_others("0.0.0.0", server.url)  # as the QR code says
        assert "moevision" in get(address)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"host": "me-moe.hf.space"}, timeout=60
        ) as http:
            # The proxy leaves the path on, or takes it off.
            assert (
                http.post(
                    "/moe/login", data={"username": "class", "password": "secret"}
                ).status_code
                == 200
            )
            page = http.get("/moe/")
            assert page.text == http.get("/").text
            assert re.search(r"^const BOOT = ", page.text, re.MULTILINE)
            policy = page.headers["content-security-policy"]
            assert policy.split()[-2:] == ["https://huggingface.co", "https://*.hf.space"]
            assert "x-frame-options" not in page.headers
            assert http.post("/moe/api/boot", json={}).json()["models"][0]["title"] == "mine"
            assert http.get("/moebius").status_code == 404
        server.stop()
    said = "\n".join(server.lines)
    assert "and log in" in said
    assert "secret" not in said
    assert "▀" in said


SERVE = """
import sys, urllib.request
from pathlib import Path
from moevision.demo.models import open_entries
from moevision.demo.galleries import Galleries
from moevision.demo.gate import Serving
from moevision.demo.server import Server
from moevision.demo.service import Explorer
home, port, *hosts = sys.argv[1:]
entries = open_entries(None, home=Path(home))[:1]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for host in hosts:
    explorer = Explorer(entries, Galleries(entries))
    with Server(explorer, Serving(host=host, port=int(port), public=True)) as server:
        print(server.url, opener.open(server.url, timeout=60).status)
"""
PROXY = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "NO_PROXY": "",
    "no_proxy": "",
}


@pytest.mark.deep
def test_addresses_of_ipv6_and_a_proxy_that_can_not_be_reached(home):
    urls = {"127.0.0.1": "127.0.0.1", "0.0.0.0": "localhost"}
    if has_ipv6():
        urls |= {"::1": "[::1]", "[::1]": "[::1]", "::": "[::]"}
    port = str(free_port())
    run = [sys.executable, "-c", SERVE, str(home), port, *urls]
    env = {**os.environ, **PROXY}
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"http://{name}:{port}/ 200" for name in urls.values()]


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_the_address_for_others_is_a_url(monkeypatch):
    monkeypatch.setattr(
        launch,
        "_own_address",
        lambda family: {socket.AF_INET6: "fe::1", socket.AF_INET: "10.0.0.5"}[family],
    )
    for host, address in (
        ("0.0.0.0", "http://10.0.0.5:7861/"),
        ("::", "http://[fe::1]:7861/"),
        ("[::]", "http://[fe::1]:7861/"),
        ("fe::7", "http://[fe::7]:7861/"),
        ("[fe::7]", "http://[fe::7]:7861/"),
    ):
        monkeypatch.setattr(FakeServer, "share_url", None)
        assert f"Others open {address}:" in launch.announcement(
            FakeServer, Serving(host=host, public=True)
        )


class FakeServer:
    url = "http://0.0.0.0:7861/"
    share_url = None


def test_the_announcement_for_others():
    text = launch.announcement(
        FakeServer, Serving(host="0.0.0.0", port=7861, auth=("class", "secret"))
    )
    assert "and log in" in text
    assert ":7861/" in text
    assert "http://0.0.0.0:7861/" in text.splitlines()[0]
    assert "http://0.0.0.0" not in text.splitlines()[2]  # nobody else can open that
    assert "secret" not in text
    FakeServer.share_url = "https://x.gradio.live"
    shared = launch.announcement(FakeServer, Serving(share=True, public=True))
    assert says(shared, "https://x.gradio.live", "anyone")
