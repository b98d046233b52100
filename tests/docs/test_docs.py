"""The docs: examples run, commands exist, links lead somewhere, pages are in plain words, the site builds.

The commands of Start and the guides are run, and the site is built.
"""

import ast
import contextlib
import doctest
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from moevision.cli import TASKS, main
from moevision.config import options
from moevision.train.recipe import shipped_configs
from tests.forks import Forked
from tests.needs import chromium
from tests.shared import TINY, draw_folder, run_cli, succeeded

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTES = sorted((ROOT / "benchmarks").glob("*/README.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]

# Plain words (docs only; JSON keys and code are looked at nowhere).
BANNED = {
    r"\bpictures?\b": "image",
    r"\brefus\w+ update|\bupdates? (?:is|are|was|were) refused": "skipped update",
    r"\bmatrix units?\b": "AMX",
    r"all there is to tell": "a share of the entropy",
    r"\btold apart|\btells? apart": "no difference was found, distinguish",
    r"\btold wrong": "misclassified",
    r"\bgo(?:es)? on\b": "continues",
    r"\bstands? (?:beside|above|below|there)|\bbeside (?:it|them|that) (?:stands?|lies?)": "is, are",
    r"\bin the place of": "instead of",
    r"\bworktree|\bhelper agent|\bissue #?\d+": "nothing",
}


def page_id(path: Any) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)[:60]


def prose(path: Path) -> str:
    """A page without code and addresses."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.M)
    return re.sub(r"`[^`\n]+`|\]\([^)]*\)", "", text)


def python_blocks(path: Path) -> list[str]:
    """The Python of a page, in its order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.M)


def commands(path: Path) -> list[str]:
    """The lines of a page that call moevision."""
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.DOTALL | re.M)).replace(
        "\\\n", " "
    )
    return [line.strip() for line in re.findall(r"^(?:.*&& )?(moevision [^\n#]+)", shell, re.M)]


def run(path: Path, blocks: list[str], scope: dict[str, Any]) -> None:
    """Run a page's Python in one namespace."""
    scope.setdefault("__name__", "docs")
    for block in blocks:
        exec(compile(block, path.name, "exec"), scope)


@cache
def flags_of(verb: str) -> frozenset[str]:
    """The long options that a verb's help names."""
    training = verb in ("fit", "validate", "test")
    asked = [[], *([task] for task in TASKS if verb == "data")]
    text = "".join(
        run_cli(verb, *task, "--help-all" if training else "--help").out for task in asked
    )
    known = set(re.findall(r"(?<![\w-])--[\w.-]+", text))
    return frozenset(known | {f"--{name}" for name in options()} if training else known)


def check_command(command: str) -> None:
    """The verb is there, its options too, and a configuration that it names."""
    verb, *rest = shlex.split(command)[1:]
    from moevision.cli import VERBS

    assert verb in VERBS
    given = [word.partition("=")[0] for word in rest if word.startswith("--")]
    assert set(given) <= flags_of(verb)
    if "--config" in rest:
        name = rest[rest.index("--config") + 1]
        assert name in shipped_configs() or name.endswith(".yaml")


# ---- words


@pytest.mark.parametrize("path", FRONT, ids=page_id)
def test_words_are_plain(path):
    text = prose(path)
    found = {
        match.group(): instead
        for banned, instead in BANNED.items()
        for match in re.finditer(banned, text, re.I)
    }
    assert found == {}


def test_contributing_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"`([\w/-]+(?:\.(?:py|md|toml|yml|yaml|cff)|/))`", text))
    names = {name for name in names if "NAME" not in name}
    places = [ROOT, ROOT / "moevision"]
    assert [
        name for name in sorted(names) if not any((place / name).exists() for place in places)
    ] == []


# ---- links, as they are on a forge


def _anchors(path: Path) -> set[str]:
    """Those that a forge makes of headings."""
    heads = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.M), re.M
    )
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", head) for head in heads)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in plain}


@pytest.mark.parametrize("path", [*FRONT, *NOTES, ROOT / "SECURITY.md"], ids=page_id)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", path.read_text(), flags=re.DOTALL | re.M)
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


# ---- Python


SCRIPTS = ("# my_fit.py",)  # run as a file, below
NEEDS = {
    "load_dataset": "datasets",
    "json, numpy as np, onnxruntime": "onnx",
    "AutoModelForImageClassification": "transformers",
}


@pytest.fixture
def workspace(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the docs speak of: runs/pets, path/to/images, image.jpg, docs/."""
    make_workspace(tiny_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_workspace(tiny_run: Path, home: Path) -> None:
    shutil.copytree(tiny_run, home / "runs" / "pets")
    images = draw_folder(home / "path" / "to" / "images")
    for name in ("image.jpg", "cat.jpg"):
        shutil.copy(next((images / "cat").glob("*.png")), home / name)
    for name in ("images", "more/images"):
        shutil.copytree(images, home / name)
    (home / "docs").symlink_to(DOCS)


def _marks(path: Path) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs(name) for words, name in NEEDS.items() if words in path.read_text()]


PYTHON = [
    pytest.param(path, id=page_id(path), marks=_marks(path))
    for path in PAGES
    if python_blocks(path)
    # test_own_loop.py; below; test_audit_guide.py
    and path.stem not in ("own-loop", "serve", "audit-a-router")
]


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guide "Serve it" exports."""
    file = tmp_path_factory.mktemp("exported") / "pets.onnx"
    assert main(["export", str(tiny_run), "--out", str(file)]) == 0
    return file


@pytest.mark.parametrize("path", PYTHON)
def test_python_runs(path, workspace, monkeypatch, request):
    """One page after the other, each in a namespace of its own."""
    blocks = [block for block in python_blocks(path) if not block.startswith(SCRIPTS)]
    if any('"images.npy"' in block for block in blocks):
        command = ["runs/pets", "path/to/images", "--features", "images.npy", "--out", "images.csv"]
        assert main(["predict", *command]) == 0
    if any("onnxruntime" in block for block in blocks):
        shutil.copy(request.getfixturevalue("exported"), "pets.onnx")
    if any("load_dataset" in block for block in blocks):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workspace / "cache")
    from moevision.layers import ROUTERS

    known = dict(ROUTERS)
    with contextlib.redirect_stdout(sys.stderr):
        run(path, blocks, {})
    ROUTERS.clear()
    ROUTERS.update(known)


@pytest.mark.parametrize("block", python_blocks(ROOT / "README.md"))
def test_python_of_the_readme_prints_something(block, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(ROOT / "README.md", [block], {})
    assert capsys.readouterr().out


def test_a_program_gets_an_answer(workspace):
    """The block of Serve it, asked of a server of the tiny run."""
    from moevision.demo.models import open_entries
    from tests.demo.serving import served

    (block,) = python_blocks(DOCS / "guides" / "serve.md")
    with served(open_entries("runs/pets", "path/to/images")) as url:
        block = block.replace("http://127.0.0.1:7860", url).replace(
            'answer["prediction"]["moe"]', 'found = answer["prediction"]["moe"]'
        )
        scope: dict[str, Any] = {}
        run(DOCS / "guides" / "serve.md", [block], scope)
    assert scope["found"]


def test_a_router_of_ones_own_trains(workspace):
    blocks = python_blocks(DOCS / "guides" / "write-a-router.md")
    (workspace / "my_router.py").write_text(blocks[0])
    (workspace / "my_fit.py").write_text(
        next(block for block in blocks if block.startswith(SCRIPTS))
    )
    command = ["my_fit.py", "fit", "path/to/images", "--model.arch.router", "context", *TINY]
    process = Forked(command, workspace, os.environ)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "context" in (workspace / "runs" / "images" / "summary.md").read_text()


WITH_EXAMPLES = [
    path
    for path in sorted((ROOT / "moevision").rglob("*.py"))
    if re.search(r"^\s+>>> ", path.read_text(), re.M)
]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=page_id)
def test_docstrings_run(path, workspace):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    scope = {"torch": importlib.import_module("torch"), **vars(module)}
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, extraglobs=scope, optionflags=options)
    assert result.attempted > 0
    assert result.failed == 0


# ---- the command line

README = ROOT / "README.md"
COMMANDS = [
    (path, command) for path in (README, *PAGES) for command in dict.fromkeys(commands(path))
]


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=page_id)
def test_commands_exist(path, command):
    check_command(command)


def test_the_readme_has_the_commands_of_a_newcomer_and_of_a_developer():
    shell = re.findall(r"^```sh\n(.*?)\n```", README.read_text(), re.M | re.S)
    found = {command.strip() for block in shell for command in block.split("&&")}
    assert {"pip install .", "moevision fit --config quickstart"} <= found
    assert {'pip install ".[test]"', "pytest"} <= found
    assert len(commands(README)) >= 4


# What a test can't run here, and why.
ELSEWHERE = {
    "moevision demo": "runs until Ctrl-C; tests/demo starts it",
    "deit_tiny_patch16_224": "weights from the hub",
    "--pretrained auto": "weights from the hub; tests/train/test_start.py",
    "vit_small_patch16_224.augreg_in21k": "weights from the hub",
    "--config cifar10": "a download",
    "--config imagenette": "a download",
    "--config cats_vs_dogs": "a download",
    "--seeds": "three trainings",
    "fit saved": "tests/data/test_tables.py",
    "--resume runs/images": "tests/train/test_resume.py",
    "--parallel": "several processes; tests/train/test_parallel_command.py",
    "--data.keep": "the list must be of these images; tests/commands/test_data.py",
    "--decisions": "saved by the page; tests/analysis/test_good_data.py",
    "--pretrained tiny_moe": "made of weights from the hub",
    "runs/dense": "a dense run",
    "birds.yaml": "written by the reader; its keys are checked below",
    "runs/photos": "docs/tutorial.py ran it; its output is checked by test_tutorial.py",
    "my_fit.py": "above",
    "--out pets.onnx": "above",
    ">": "a shell's redirection",
}
JOURNEY = [
    (path, command)
    for path, command in {command: (path, command) for path, command in COMMANDS}.values()
    if path.parent.name in ("docs", "guides") and not any(part in command for part in ELSEWHERE)
]
SMALL = (*TINY, "--trainer.max_epochs=1")
SIZES = ("train_size=64", "val_size=32", "test_size=32", "image_size=32")
QUICK = ("--trainer.max_epochs=1", *(f"--data.{size}" for size in SIZES))


@pytest.fixture(scope="module")
def journey(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace for all commands, as a reader would have it."""
    home = tmp_path_factory.mktemp("journey")
    make_workspace(tiny_run, home)
    shutil.copytree(home / "runs" / "pets", home / "runs" / "images")
    shutil.copytree(home / "runs" / "pets", home / "runs" / "quickstart")
    return home


@pytest.mark.parametrize(("path", "command"), JOURNEY, ids=page_id)
def test_commands_run(path, command, journey, monkeypatch):
    """With smaller models and fewer images than the docs have."""
    monkeypatch.chdir(journey)
    verb, *rest = shlex.split(command)[1:]
    if verb == "fit":
        rest += [
            *(QUICK if "--config" in rest else SMALL),
            f"--name=try{len(list(journey.glob('runs/*')))}",
        ]
    if verb == "analyze":
        rest += ["--quick", "--permutations=20", "--limit=20"]
    succeeded(run_cli(verb, *rest))


def test_the_yaml_of_the_docs_has_keys_that_exist():
    for path in PAGES:
        for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.DOTALL | re.M):
            for key in _keys(yaml.safe_load(block)):
                assert f"--{key}" in flags_of("fit"), (path.name, key)


def _keys(tree: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and "class_path" not in value:
            yield from _keys(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


# ---- the reference holds what the code has


def test_every_option_is_in_the_reference():
    """Names and defaults of docs/reference/config.md are those of a run's config.yaml, but for Lightning's trainer."""
    rows = re.findall(
        r"^\| `([\w.]+)` \| (.*?) \|", (DOCS / "reference" / "config.md").read_text(), re.M
    )
    said = {name: yaml.safe_load(value.strip("`")) for name, value in rows if name != "resume"}
    printed = yaml.safe_load(
        run_cli("fit", "synthetic_pets", "--config=quickstart", "--print_config").out
    )
    del printed["trainer"]
    has = {name for name in _keys(printed)}
    assert said.keys() == has - {"ckpt_path", "resume"}
    for name, value in said.items():
        default = options()[name].default
        default = list(default) if isinstance(default, tuple) else default
        assert value == default or (
            value in ("none", "the data's") and default in (None, "none")
        ), name


def test_every_router_public_name_and_verb_is_in_the_reference():
    import moevision
    from moevision.cli import VERBS
    from moevision.layers import ROUTERS

    pages = ("routers.md", "api.md", "cli.md")
    routers, api, cli = ((DOCS / "reference" / name).read_text() for name in pages)
    assert [verb for verb in VERBS if f"`{verb}`" not in cli] == []
    assert [name for name in ROUTERS if f"| `{name}` |" not in routers] == []
    homes = {name: f"{getattr(moevision, name).__module__}.{name}" for name in moevision.__all__}
    listed = set(re.findall(r"^::: (\S+)$", api, re.M))
    assert [name for name in homes if not listed & {f"moevision.{name}", homes[name]}] == []


MODELS = re.findall(
    r"^\| `(vit_moe_\w+)` \| .* \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) \|$",
    (DOCS / "reference" / "models.md").read_text(),
    re.M,
)


def test_every_model_is_in_the_table():
    import timm

    import moevision.models  # noqa: F401

    assert {row[0] for row in MODELS} == set(timm.list_models("vit_moe_*", module="vit_moe"))


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row[0])
def test_the_table_of_models(row):
    import timm

    import moevision.models  # noqa: F401
    from moevision.efficiency import measure_cost

    name, total, active, flops = row
    net = timm.create_model(name).eval()
    cost = measure_cost(net, net.patch_embed.img_size[0])
    assert f"{cost.total_parameters / 1e6:.2f}" == total
    assert f"{cost.active_parameters / 1e6:.2f}" == active
    assert f"{(cost.flops_per_image + cost.router_flops_per_image) / 1e9:.2f}" == flops


# ---- the site


class _Resources(HTMLParser):
    """What a browser would load for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        names = ("src", "srcset", "data", "poster") if tag != "link" else ("href",)
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev", "edit"):
            return
        self.loaded += [given[name] for name in names if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.needs("mkdocs")
def test_the_site_builds_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        parser = _Resources()
        parser.feed(page.read_text())
        assert [each for each in parser.loaded if re.match(r"(https?:)?//", each)] == [], page
    styles = [
        url
        for file in site.rglob("*.css")
        for url in re.findall(r"url\(([^)]+)\)", file.read_text())
    ]
    assert [url for url in styles if re.match(r"['\"]?(https?:)?//", url)] == []


@pytest.mark.needs("mkdocs")
def test_every_link_of_the_site_leads_to_a_file(site):
    dead = []
    for page in site.rglob("index.html"):
        text = re.sub(
            r"<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL
        )  # code may write such words itself
        for link in re.findall(r'(?:href|src)="([^"#?]+)', text):
            target = page.parent / unquote(link)
            if not re.match(r"[a-z]+:", link) and not (
                target.is_file() or (target / "index.html").is_file()
            ):
                dead.append(f"{page.relative_to(site)} -> {link}")
    assert dead == []


@pytest.mark.needs("mkdocs", "chromium", "playwright")
def test_a_phone_shows_every_page_with_margins_and_none_scrolls_sideways(site):
    """At 390 px: what is too wide (code, formulas, a figure of four plots) scrolls by itself."""
    from playwright.sync_api import sync_playwright

    measure = "() => [document.documentElement.scrollWidth, document.querySelector('h1').getBoundingClientRect().left]"
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": 390, "height": 844})
        found = {}
        for path in PAGES:
            folder = path.relative_to(DOCS).with_suffix("")
            page.goto(
                (site / folder.parent / folder.name.replace("index", "") / "index.html").as_uri()
            )
            width, left = page.evaluate(measure)
            if width > 390 or left < 8:
                found[page_id(path)] = (width, left)
    assert found == {}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_lists_within_lists_are_indented_as_the_site_needs(path):
    """By four spaces: a forge takes two or three, too, the site would number them on."""
    assert re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", prose(path), re.M) == []


@pytest.mark.needs("mkdocs")
def test_formulas_and_sources_are_in_the_pages(site):
    balance = (site / "concepts" / "balance" / "index.html").read_text()
    assert balance.count("<math") > 10
    assert "arithmatex" not in balance
    walk = re.sub(r"<[^>]+>", "", (site / "concepts" / "walk" / "index.html").read_text())
    for node in ast.parse((ROOT / "moevision" / "layers" / "reference.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "NoisyTopKRouter":
            assert f"class {node.name}" in walk
