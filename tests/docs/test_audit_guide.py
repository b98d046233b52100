"""The guide "Audit a router": its hook runs as it stands there, and says what the guide shows."""

import re
import shutil

import pytest

from tests.docs.test_docs import DOCS, ROOT, python_blocks
from tests.shared import draw_folder, run_cli, succeeded

GUIDE = DOCS / "guides" / "audit-a-router.md"


def words_of(lines):
    """The sentences without numbers, which other processors round otherwise, and without what is in brackets."""
    return [
        re.sub(r"\(.*?\)|E\d|−?\d[\d.]*", "", line) for line in lines if line.startswith("L0: ")
    ]


@pytest.mark.needs("transformers")
def test_the_guides_hook_says_what_the_guide_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "tests" / "analysis" / "foreign.py", "my_net.py")
    (hook,) = python_blocks(GUIDE)
    (tmp_path / "my_model.py").write_text(hook)
    draw_folder(tmp_path / "images", per_class=60)
    outcome = succeeded(
        run_cli("audit", "my_model.py:audited", "--data", tmp_path / "images", "--quick")
    )
    shown = GUIDE.read_text().split("```text\n")[1].partition("```")[0].splitlines()
    said = outcome.out.splitlines()
    assert words_of(said)[: len(shown)] == words_of(shown)
    assert (tmp_path / "report" / "report.html").exists()
