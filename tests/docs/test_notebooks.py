"""Every notebook runs from top to bottom on what the package carries, in under a minute of CPU time."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("notebooks")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
PHOTOS = pytest.mark.needs("photos")
OF_PHOTOS = re.compile(r'bundled_\w+\(\\"(photos|cats_vs_dogs_two)')  # in a notebook's JSON
RUN = [
    pytest.param(
        path,
        id=path.stem,
        marks=PHOTOS if OF_PHOTOS.search(path.read_text(encoding="utf-8")) else (),
    )
    for path in NOTEBOOKS
]
LIMIT_S = 60
SMALL = 600_000  # bytes, saved outputs included


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebooks_are_here():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04", "05"]


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_a_notebook_imports_moevision_alone_and_keeps_the_installed_torch(path):
    """Beside the standard library; a code cell before installs, and holds torch at the version that is there.

    The layer from scratch is in torch, on scikit-learn's digits, drawn by matplotlib: moevision comes last.
    """
    cells = code_cells(read(path))
    sources = [cell.source for cell in cells]
    install = next(source for source in sources if 'f"{name}=={packages.version(name)}"' in source)
    assert "pip" in install
    assert not any("moevision import" in source for source in sources[: sources.index(install)])
    roots = set()
    for cell in cells:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add(node.module.split(".")[0])
    scratch = {"torch", "sklearn", "matplotlib"} if path.stem.startswith("00") else set()
    assert roots - set(sys.stdlib_module_names) == {"moevision"} | scratch


@each_notebook
def test_a_notebook_says_how_long_it_takes_and_ends_with_exercises(path):
    """Their solutions are hidden, and are Python."""
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    (seconds,) = re.findall(
        r"Takes about (\d+) seconds of one CPU core\.", cells[0].replace("\n", " ")
    )
    assert int(seconds) < LIMIT_S
    text = "\n".join(cells)
    assert re.findall(r"^\*\*(\d)\.\*\* ", text, re.M) == ["1", "2", "3"]
    solutions = re.findall(
        r"<details><summary>Solution</summary>\n\n(.*?)\n</details>", text, re.DOTALL
    )
    assert len(solutions) == 3
    for code in re.findall(r"^```python\n(.*?)^```", "\n".join(solutions), re.DOTALL | re.M):
        ast.parse(code)


def test_the_layer_from_scratch_has_forty_lines_and_shows_a_collapse():
    """The layer and its loss; without the loss most of the eight experts stay idle in every start, with it none."""
    notebook = read(NOTEBOOKS[0])
    source = code_cells(notebook)[0].source
    layer = source[: source.index("def train(")]
    assert len([line for line in layer.splitlines() if line.strip()]) <= 40
    (said,) = (
        cell.outputs[0].text
        for cell in code_cells(notebook)
        if "experts with more than 3 %" in cell.source
    )
    found = re.findall(r": (\d(?: · \d)+) of 8 experts", said)
    without, with_loss = ([int(each) for each in row.split(" · ")] for row in found)
    assert max(without) <= 4
    assert min(with_loss) == 8


@each_notebook
def test_a_notebook_is_saved_with_its_results_and_stays_small(path):
    assert path.stat().st_size < SMALL
    cells = code_cells(read(path))
    # what installs, what is imported, and the layer from scratch
    silent = [cell for cell in cells if not cell.outputs]
    assert len(silent) <= (3 if path.stem.startswith("00") else 2)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"
    ]


@pytest.mark.parametrize("path", RUN)
def test_a_notebook_runs(path):
    import nbclient

    notebook = read(path)
    before = os.times()
    nbclient.NotebookClient(notebook, timeout=10 * LIMIT_S, kernel_name="python3").execute()
    after = os.times()  # those of children count when a child, such as the kernel, has ended
    cpu_s = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    assert 0 < cpu_s < LIMIT_S
    shown = [output for cell in code_cells(notebook) for output in cell.get("outputs", ())]
    # A clean environment has no ipywidgets, which tqdm misses in a notebook.
    assert not [one for one in shown if "IProgress" in one.get("text", "")]
    has_view = any("text/html" in output.get("data", {}) for output in shown)
    assert has_view or "02" in path.stem  # the explorer's view
