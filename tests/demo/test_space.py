"""deploy/space: the folder for a Space is complete, and its README's examples get answers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moevision.demo.models import open_entries
from tests.demo.serving import served

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "deploy" / "space"
PAGE_BLOCK = re.findall(
    r"^```python\n(.*?)^```", (SPACE / "README.md").read_text(), re.DOTALL | re.M
)[0]


def test_torch_is_that_for_cpus() -> None:
    options = (SPACE / "requirements.txt").read_text().split()
    assert options[options.index("--extra-index-url") + 1].endswith("pytorch.org/whl/cpu")


@pytest.mark.skipif(os.name != "posix", reason="a shell's script")
def test_the_folder_holds_all_and_its_card_has_an_address(tmp_path: Path) -> None:
    made = tmp_path / "space"
    subprocess.run(["bash", SPACE / "make.sh", "someone/moe", made], check=True)
    _, head, _ = (made / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (
        card["thumbnail"] == "https://huggingface.co/spaces/someone/moe/resolve/main/thumbnail.jpg"
    )
    assert (made / card["app_file"]).is_file()
    assert card["sdk_version"] in (SPACE / "README.md").read_text()
    carried = {
        line.split()[0].removeprefix("*")
        for line in (made / ".gitattributes").read_text().splitlines()[1:]
    }
    large = {
        file.suffix
        for file in made.rglob("*")
        if file.is_file() and file.stat().st_size > 1_000_000
    }
    assert large <= carried | {".json"}
    out = subprocess.run(
        [sys.executable, "-c", "import moevision; print(moevision.__file__)"],
        cwd=made,
        env=os.environ | {"PYTHONPATH": str(made)},
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == str(made / "moevision" / "__init__.py")


@pytest.mark.deep
@pytest.mark.needs("photos")
def test_every_intervention_of_the_readme_gets_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT / "moevision/demo/models/photos/examples/cat")
    code = PAGE_BLOCK.replace("cat.jpg", "chelsea.jpg")
    photos = [entry for entry in open_entries(None) if entry.card.id == "photos"]
    with served(photos) as url:
        here = code.replace("http://127.0.0.1:7860", url.rstrip("/"))
        exec(compile(here, "README.md", "exec"), {})
    said = [line for line in capsys.readouterr().out.splitlines() if "(" in line]
    assert len(said) == PAGE_BLOCK.count("print(") == 9
    assert all("'cat'" in line for line in said[:1])
    assert len(set(line.rpartition("(")[2] for line in said)) == 9  # each changes the probability
