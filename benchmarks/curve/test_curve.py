"""The study of fewer images: the record becomes the table, the sentences and the figure of `curve of`."""

import json

from benchmarks.curve import _origin, parts_of


def test_the_record_becomes_table_sentences_and_figure(bench, tmp_path):
    """Of 1,000 test images; 70 % drawn at random lose 2 and 4 points beside all images: 3 in the mean."""
    correct = {("all", 1.0, 0): 800, ("all", 1.0, 1): 820, ("random", 0.7, 0): 780, ("random", 0.7, 1): 780}
    trainings = [
        {"by": by, "share": share, "seed": seed, "images": round(share * 8000), "correct": right, "total": 1000}
        for (by, share, seed), right in correct.items()
    ]
    record = {"methods": ["random"], "margin": 1.0, "trainings": trainings}
    shown, said = parts_of(record)
    assert "-3.00" in shown
    assert "Training on 70 % of the images, drawn at random" in said
    (tmp_path / "record.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text("<!-- tables: begin -->\n<!-- tables: end -->\n")
    outcome = bench("curve", "report", "--out", tmp_path / "record.json", "--readme", tmp_path / "README.md")
    assert outcome.code == 0, outcome.err
    assert shown in (tmp_path / "README.md").read_text()
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_trainings_of_two_commits_are_refused(bench, tmp_path):
    file = tmp_path / "origin.json"
    assert _origin(file) == json.loads(file.read_text())
    file.write_text(json.dumps({**json.loads(file.read_text()), "code": {"git_commit": "another"}}))
    options = ("--data", tmp_path, "--work", tmp_path, "--allow-dirty")
    outcome = bench("curve", "run", *options)
    assert outcome.code == 2
    assert "is of another commit" in outcome.err
