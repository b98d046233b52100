"""Names that steer a terminal, are no UTF-8 or begin a formula: every verb, every file that a run leaves.

A folder from an archive of unknown origin may bear any names; what a person then sees must not depend on them.
"""

import csv
import io
import json
import os
import re
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moevision.analysis import RoutingTrace
from moevision.analysis.images import labels_in
from moevision.analysis.plots import figure_png, plot_effects
from moevision.commands.predict import Prediction, to_csv
from moevision.data import SyntheticPets
from moevision.data.folder import read_folder
from moevision.data.splits import Splits, SplitSettings, make_splits, read_splits
from moevision.demo.models import open_entries
from moevision.errors import (
    DataWarning,
    UserError,
    escape_controls,
    escape_csv_cell,
    json_text,
    name_bytes,
)
from moevision.files import csv_text, read_csv, write_text_atomic
from moevision.train.report import without_example
from tests.shared import TINY, Outcome, run_cli

pytestmark = pytest.mark.deep

# C0 and C1 controls, DEL, bidirectional controls, line separators, invisible signs, lone surrogates.
STEERING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
CLASSES = ("\x1b[2Jca\u202et", "=1+1", os.fsdecode(b"d\xffg"))
FILES = (
    "\x1b]0;owned\x07.png",
    os.fsdecode(b"not\xfeutf8.png"),
    "mirrored \u202egnp.png",
    "two\nlines\x9b31m.png",
    "-2+3 (1).png",
)


def hostile_folder(root: Path, per_class: int = 20) -> Path:
    """A folder per class of hostile name; its first files have hostile names too."""
    pets = SyntheticPets(per_class * len(SyntheticPets.classes), 32, 0, "train")
    members: dict[int, list[int]] = {}
    for index in range(len(pets)):
        members.setdefault(pets.label(index), []).append(index)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for place, index in enumerate(members[label]):
            file = FILES[place] if place < len(FILES) else f"{index:04d}.png"
            Image.fromarray(pets.image(index)).save(root / name / file, format="png")
    return root


def assert_harmless(text: str, where: object) -> None:
    """Nothing in it steers a terminal, and it can be encoded."""
    found = STEERING.search(text)
    assert found is None, (where, text[max(0, found.start() - 60) : found.end() + 60])


def assert_harmless_outcome(outcome: Outcome, code: int = 0) -> None:
    assert outcome.code == code, outcome.err
    assert_harmless(outcome.out, "stdout")
    assert_harmless(outcome.err, "stderr")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("names")


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    root = hostile_folder(home / "pe\x1bts")
    (root / CLASSES[0] / "br\x1boken\udcff.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def outcome(home: Path, folder: Path) -> Outcome:
    options = ("--data.max_bad_fraction=0.2", "--checkpoint.every_steps=4")
    return run_cli("fit", folder, *TINY, *options, f"--runs_root={home / 'runs'}")


@pytest.fixture(scope="module")
def run(home: Path, outcome: Outcome) -> Path:
    assert outcome.code == 0, outcome.err
    return next((home / "runs").iterdir())


def test_fit_says_nothing_that_steers(outcome):
    assert_harmless_outcome(outcome)


def test_every_file_of_the_run_is_harmless(run, folder):
    texts = [file for file in run.rglob("*") if file.suffix in (".csv", ".json", ".md", ".yaml")]
    assert {file.name for file in texts} >= {
        "splits.csv",
        "bad_images.csv",
        "predictions_test.csv",
        "summary.md",
    }
    for file in texts:
        assert_harmless(file.read_bytes().decode("utf-8").replace("\r\n", "\n"), file.name)
    for file in (file for file in texts if file.suffix == ".csv"):
        cells = [
            cell
            for row in read_csv(file)
            for name, cell in row.items()
            if name in ("path", "image", "class")
        ]
        assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r")]
    bad = json.loads((run / "summary.json").read_text())["bad_images"]
    assert [str(folder / path) for path, _, _ in bad] == [
        str(folder / CLASSES[0] / "br\x1boken\udcff.png")
    ]


def test_ids_round_trip_and_the_split_is_read_back(run, folder):
    collection = read_folder(folder)
    ids = {sample.sample_id for sample in collection.samples["all"]}
    assert collection.class_names == ["\\x1b[2Jca\\u202et", "=1+1", "d\\udcffg"]
    splits, class_names = read_splits(run / "splits.csv", collection)
    assert (class_names, splits.warnings) == (collection.class_names, [])
    assert {sample.sample_id for part in splits.samples.values() for sample in part} == ids
    drawn = make_splits(collection, SplitSettings(test_fraction=0.3))
    assert splits.samples == drawn.samples


def test_splits_of_older_runs_hold_names_as_they_are(folder, tmp_path):
    collection = read_folder(folder)
    samples = [
        sample
        for sample in collection.samples["all"]
        if not re.search("[\ud800-\udfff]", sample.sample_id)
    ]
    splits = Splits({"train": samples, "val": samples, "test": samples}, {})
    rows = [
        (split, sample.sample_id.split("/")[0], sample.sample_id)
        for split, members in splits.samples.items()
        for sample in members
    ]
    write_text_atomic(tmp_path / "splits.csv", csv_text(["split", "class", "path"], rows))
    found, class_names = read_splits(tmp_path / "splits.csv", collection)
    assert found.samples == splits.samples
    assert class_names == collection.class_names[:2]


def test_an_interrupted_run_goes_on(folder, run, send_signal, strike, own_folder):
    """guard.csv and the checkpoint hold names of images; the last line can be typed."""
    strike("nan_loss@2, nan_loss@3")
    send_signal(6)
    outcome = run_cli("fit", folder, *TINY, "--data.max_bad_fraction=0.2")
    assert_harmless_outcome(outcome, 143)
    resume = shlex.split(outcome.err.splitlines()[-1])
    outcome = run_cli(*resume[1:])
    assert_harmless_outcome(outcome)
    assert "bit-identical" not in outcome.err
    stopped = Path(resume[-1])
    rows = read_csv(stopped / "guard.csv")
    assert [bool(row["samples"]) for row in rows] == [True, True]
    assert_harmless((stopped / "guard.csv").read_text(encoding="utf-8"), "guard.csv")
    assert (stopped / "splits.csv").read_bytes() == (run / "splits.csv").read_bytes()


def test_predict(run, folder, tmp_path):
    outcome = run_cli("predict", run / "model", folder, "--format", "json")
    assert_harmless_outcome(outcome)
    rows = json.loads(outcome.out)
    assert {row["path"] for row in rows} == {str(file) for file in folder.rglob("*.png")}
    assert {row["class"] for row in rows if not row["error"]} <= {
        "\\x1b[2Jca\\u202et",
        "=1+1",
        "d\\udcffg",
    }
    outcome = run_cli("predict", run / "model", folder)
    assert_harmless_outcome(outcome)
    assert len(outcome.out.splitlines()) == len(rows) + 1
    for row in csv.DictReader(io.StringIO(outcome.out)):
        assert not [cell for cell in row.values() if cell[:1] in tuple("=+-@")]
    for name in (CLASSES[1], CLASSES[1] + "/" + FILES[4]):  # a formula in front of a relative path
        rows = list(csv.DictReader(io.StringIO(to_csv([Prediction(name, (CLASSES[1],), (1.0,))]))))
        assert {cell[:1] for cell in (rows[0]["path"], rows[0]["class"], rows[0]["top5"])} == {"'"}


def test_verbs_say_so_when_something_of_such_a_name_is_missing(folder):
    for arguments in (
        ("predict", folder / "gone\x1b[0m", "x.png"),
        ("info", folder / "gone\x1b[0m[/red]"),
        ("fit", folder / "gone\x1b[0m"),
        ("fit", "--resume", folder / "gone\x1b[0m"),
        ("fit", folder, "--name", "\udcff"),
        ("fit", folder / "\udcff"),
        ("test", folder, "--ckpt_path", folder / "gone\x1b[0m"),
        ("analyze", folder / "gone\x1b[0m"),
        ("demo", folder / "gone\x1b[0m"),
        ("no\x1bverb",),
    ):
        outcome = run_cli(*arguments)
        assert outcome.code == 2
        assert_harmless(outcome.out + outcome.err, arguments[0])


def test_info(run):
    model = run / "[bold]" / "mo\x1b[/]"
    shutil.copytree(run / "model", model)
    for form in ("table", "json"):
        outcome = run_cli("info", model, "--format", form)
        assert_harmless_outcome(outcome)
    assert json.loads(outcome.out)["model"] == str(model)


def test_analyze_knows_the_run_s_own_classes(run, tmp_path):
    out = tmp_path / "report\x1b"
    options = ("--limit", "20", "--permutations", "20", "--quick")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = run_cli("analyze", run, "--out", out, *options)
    assert_harmless_outcome(outcome)
    sentences = [str(warning.message) for warning in caught]
    assert not [
        sentence for sentence in sentences if "unlabelled" in sentence or "Glyph" in sentence
    ]
    numbers = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert numbers["data"]["n_labelled"] == numbers["data"]["n_images"] > 0
    for file in ("report.json", "report.html"):
        assert_harmless((out / file).read_bytes().decode("utf-8"), file)
    names = RoutingTrace.load(out / "trace.safetensors").picture_names
    assert set(names) <= {
        sample.sample_id for sample in read_folder(run.parent.parent / "pe\x1bts").samples["all"]
    }


def test_the_explorer_names_pictures_in_json(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        [entry] = open_entries(str(run))
    assert entry.examples.has_pictures
    found = entry.examples.on_first_screen()
    assert {example.label for example in found if example.label} <= set(entry.facts.class_names)
    for example in found:
        assert_harmless(f"{example.id} {example.name} {example.label}", "example")
    assert_harmless(f"{entry.card} {entry.facts.title} {entry.facts.data_text}", "card")


def test_the_card_leaves_file_names_out():
    sentence = "2 images came later and are left out (for example cat/my (1) photo.png)"
    assert without_example(sentence) == "2 images came later and are left out"


def test_names_that_look_alike_in_a_file_are_refused(tmp_path):
    root = hostile_folder(tmp_path / "pets", per_class=2)
    shutil.copytree(root / CLASSES[0], root / "\\x1b[2Jca\\u202et")
    with pytest.raises(UserError, match="look the same"):
        read_folder(root)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("Käfer 雪 👩‍🔬.png", "Käfer 雪 👩‍🔬.png"),
        ("a\tb\nc", "a\\tb\\nc"),
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u202eb\u2066c\u200f", "a\\u202eb\\u2066c\\u200f"),
        ("\udcff", "\\udcff"),
        ("a\\x1b", "a\\x1b"),
    ],
)
def test_shown(name, seen):
    assert escape_controls(name) == seen == escape_controls(seen)
    assert (
        escape_csv_cell(escape_csv_cell(f"={name}")) == escape_csv_cell(f"={name}") == f"'={seen}"
    )
    assert json.loads(json_text({name: [name]})) == {name: [name]}
    assert_harmless(json_text([name], indent=2), name)


def test_hashes_of_ordinary_names_are_as_ever():
    assert name_bytes("Käfer 雪.png") == "Käfer 雪.png".encode()
    assert len({name_bytes(name) for name in ("\udcc3\udca4", "ä", "\ud800", "\udcff")}) == 4


def test_class_names_of_a_dataset_in_python_compare_equal():
    assert labels_in(("\x1bcat", "dog"), ["\\x1bcat", "dog"]) == (("\\x1bcat", "dog"), [0, 1])


def test_dollar_signs_in_a_class_name_are_no_mathematics():
    effect = np.array([[1.0, 0.1], [0.2, 2.0]])
    figure = plot_effects(
        [effect], [np.zeros_like(effect)], ["L1"], ["$^{$", "dog"], what="tokens move"
    )
    assert figure_png(figure).startswith(b"\x89PNG")
