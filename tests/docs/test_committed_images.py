"""Committed images show drawn images or bundled photos, and nobody else's pictures.

What an image shows can't be computed, so `committed_images.json` says it: for each file with images (by their bytes,
whatever its name; also inside notebooks, HTML, scripts and JSON) what it shows and the SHA-256 of each. An image that
is new or has changed is an error until somebody has looked at it:

    python -m tests.docs.test_committed_images       writes the hashes anew and leaves "shows" empty where one is new

Photos in a bundled model's examples/ need no line: its SOURCES.json has theirs, with a licence.
"""

import base64
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from moevision.data.folder import DATASET_NAMES
from moevision.data.named import DRAWN

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("committed_images.json")
SHOWS = {
    "drawn": "images that this package draws",
    "bundled photos": "photos of a bundled model's examples",
    "Noto Emoji": "emoji of moevision/data/assets/emoji.png; NOTICE has their licence",
    "no image": "curves, bars, tables, a logo",
}
_SIGNS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"%PDF", b"\0\0\1\0")
_EMBEDDED = re.compile(r"data:image/[\w.+-]+(?:;[\w=-]+)*;base64,([A-Za-z0-9+/=\s]{40,})")
_NOTEBOOK_IMAGE = re.compile(r"image/(png|jpeg|gif|webp|svg\+xml)")


def is_image(data: bytes) -> bool:
    """By the first bytes of the formats."""
    known = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    known |= data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"heic", b"mif1")
    vector = (
        b"<svg" in data[:400] and data.lstrip()[:1] == b"<" and b"<html" not in data[:400].lower()
    )
    return known or vector or data.startswith(_SIGNS)


def images_in(path: Path) -> list[str]:
    """SHA-256 of the file if it is an image, or of each image embedded in it; sorted, each once."""
    data = path.read_bytes()
    if is_image(data):
        return [hashlib.sha256(data).hexdigest()]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return []
    found = [base64.b64decode(text) for text in _EMBEDDED.findall(text)]
    if path.suffix == ".ipynb":
        found = [image for output in outputs(path) for image in _of_output(output)]
    return sorted({hashlib.sha256(image).hexdigest() for image in found})


def outputs(notebook: Path) -> list[dict[str, str]]:
    """What the cells of a notebook show: kind -> text."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    return [{kind: "".join(value) for kind, value in data.items()} for data in shown]


def _of_output(output: dict[str, str]) -> list[bytes]:
    found = []
    for kind, text in output.items():
        if _NOTEBOOK_IMAGE.fullmatch(kind):
            found.append(text.encode() if kind.endswith("svg+xml") else base64.b64decode(text))
        found += [base64.b64decode(each) for each in _EMBEDDED.findall(text)]
    return found


def committed(root: Path = ROOT) -> list[Path]:
    """All files under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout of the repository")
    return [
        root / name.decode()
        for name in listed.stdout.split(b"\0")
        if name and (root / name.decode()).is_file()
    ]


def is_bundled_photo(path: Path) -> bool:
    """Whether a file is a photo that its model's SOURCES.json names with author and licence."""
    parts = path.relative_to(ROOT).parts
    if parts[:3] != ("moevision", "demo", "models") or parts[4:5] != ("examples",):
        return False
    home = ROOT.joinpath(*parts[:5])
    row = json.loads((home / "SOURCES.json").read_text(encoding="utf-8")).get(
        path.relative_to(home).as_posix(), {}
    )
    return bool(row.get("author")) and bool(row.get("licence"))


def with_images(root: Path = ROOT) -> dict[str, list[str]]:
    """Path -> hashes of all committed files that hold images, but for bundled photos."""
    found = {
        path: images_in(path)
        for path in committed(root)
        if root != ROOT or not is_bundled_photo(path)
    }
    return {path.relative_to(root).as_posix(): images for path, images in found.items() if images}


def complaints(found: dict[str, list[str]], known: dict[str, dict[str, object]]) -> list[str]:
    """What is wrong with the list, one sentence for each file."""
    wrong = [f"{path} is gone: take it off the list" for path in known.keys() - found.keys()]
    for path, images in found.items():
        if path not in known:
            wrong.append(f"{path} holds images that nobody has looked at")
        elif known[path]["images"] != images:
            wrong.append(f"{path} has changed: look at it again")
        elif known[path]["shows"] not in SHOWS:
            wrong.append(f"{path}: say what it shows, one of {', '.join(SHOWS)}")
    return sorted(wrong)


def test_every_committed_image_is_known():
    assert complaints(with_images(), json.loads(LIST.read_text())) == []


# ---- that this can fail

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def add(repository: Path, name: str, data: bytes) -> None:
    (repository / name).write_bytes(data)
    subprocess.run(["git", "add", name], cwd=repository, check=True)


def test_images_are_found_by_their_bytes_and_inside_other_files(repository):
    text = base64.b64encode(PIXEL).decode()
    outputs = [
        {"data": {"image/png": text}},
        {"data": {"text/html": [f"<img src='data:image/png;base64,{text}'>"]}},
    ]
    add(repository, "photo.txt", PIXEL)
    add(repository, "page.html", f"<img src='data:image/png;base64,{text}'>".encode())
    add(repository, "look.ipynb", json.dumps({"cells": [{"outputs": outputs}]}).encode())
    add(repository, "drawing.xml", b"<?xml version='1.0'?><svg xmlns='x'/>")
    add(repository, "plain.md", b"data:image/png;base64, is how an image is embedded")
    (repository / "untracked.png").write_bytes(PIXEL)
    found = with_images(repository)
    digest = hashlib.sha256(PIXEL).hexdigest()
    assert found.pop("drawing.xml") != [digest]
    assert found == {name: [digest] for name in ("photo.txt", "page.html", "look.ipynb")}


def test_what_is_new_changed_gone_or_not_looked_at_is_said():
    shows = {"empty": "", "foreign": "photos from the web"}
    known: dict[str, dict[str, object]] = {
        name: {"shows": shows.get(name, "drawn"), "images": ["a"]}
        for name in ("same", "changed", "gone", "empty", "foreign")
    }
    found = {"same": ["a"], "changed": ["b"], "empty": ["a"], "foreign": ["a"], "new": ["a"]}
    files = [sentence.split()[0].rstrip(":") for sentence in complaints(found, known)]
    assert files == ["changed", "empty", "foreign", "gone", "new"]


# ---- where images of notebooks and screenshots come from, without anybody's word

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_FOREIGN = re.compile(
    rf"[\"'/]({'|'.join(sorted(set(DATASET_NAMES) - DRAWN.keys()))}|photo/\w+|lion|cheetah)\b"
)


def foreign_data(code: str) -> list[str]:
    """Datasets and photos that a script opens; the name of a bundled model, or of its photos, is no dataset."""
    return _FOREIGN.findall(re.sub(r"bundled_(?:model|photos|folder)\([^)]*\)|model=\w+", "", code))


def foreign_ids(text: str) -> list[str]:
    """Ids of images in views of the explorer that are neither drawn nor of a bundled model's examples."""
    carried = {
        f"data/{name}"
        for file in (ROOT / "moevision/demo/models").glob("*/examples/SOURCES.json")
        for name in json.loads(file.read_text(encoding="utf-8"))
    }
    ids = re.findall(r'\\?"picture\\?"\s*:\s*\{\s*\\?"id\\?"\s*:\s*\\?"([^"\\]+)', text)
    ids += re.findall(r"[?&]picture2?=([\w%.-]+)", text)
    plain = [id.replace("%2F", "/") for id in ids]
    return [id for id in plain if not id.startswith("pets/") and id not in carried]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_drawn_images_or_bundled_photos(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert foreign_data(code) == []
    shown = "\n".join(text for output in outputs(path) for text in output.values())
    assert foreign_ids(shown) == []


def test_screenshots_are_of_drawn_images_or_bundled_photos():
    script = (ROOT / "docs" / "screenshots.py").read_text(encoding="utf-8")
    assert "picture=" in script
    assert foreign_ids(script) == []
    assert foreign_data(script) == []


def test_foreign_images_are_seen():
    assert foreign_ids('{"picture":{"id":"photo/lion","name"') == ["photo/lion"]
    assert foreign_ids('{\\"picture\\": {\\"id\\": \\"data/cat/1.jpg\\"') == ["data/cat/1.jpg"]
    assert foreign_ids("?model=pets&picture=pets%2Ftest%2F0&layer=3") == []
    assert foreign_ids("?picture=data%2Fcat%2F0.jpg") == ["data/cat/0.jpg"]
    assert foreign_data('open_pictures("cifar10", 32); bundled_model("pets")') == ["cifar10"]
    assert foreign_data("open_pictures('pets', 32)") == ["pets"]


if __name__ == "__main__":
    listed: dict[str, dict[str, object]] = json.loads(LIST.read_text()) if LIST.is_file() else {}
    now = {
        path: {
            "shows": old["shows"] if (old := listed.get(path)) and old["images"] == images else "",
            "images": images,
        }
        for path, images in sorted(with_images().items())
    }
    lines = (f"{json.dumps(path)}: {json.dumps(each)}" for path, each in now.items())
    LIST.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    for path, each in now.items():
        if not each["shows"]:
            print(f"look at {path} and say what it shows")
