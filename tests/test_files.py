"""Files that are written whole or not at all: what is left open, and which errors of a folder count."""

import os
from pathlib import Path

import pytest

from moevision import files


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted by /proc")
def test_nothing_stays_open(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    files.write_bytes_atomic(tmp_path / "new" / "file", b"x")
    files.sync_file(tmp_path / "new" / "file")
    with pytest.raises(IsADirectoryError):
        files.write_bytes_atomic(tmp_path / "new", b"x")
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_is_flushed_may_be_written(tmp_path, monkeypatch):
    """Windows flushes nothing through a descriptor that may only read, and says EBADF."""
    (tmp_path / "x").touch()
    written = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: written.append(os.write(descriptor, b"x")))
    files.sync_file(tmp_path / "x")
    assert written == [1]


def test_json_is_indented_by_two_and_ends_its_line(tmp_path):
    files.write_json_atomic(tmp_path / "x.json", {"a": ["ü"]})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "a": [\n    "ü"\n  ]\n}\n'.encode()


def test_csv_is_read_as_it_was_written(tmp_path):
    rows = [["a,b", 'say "x"', "two\nlines"], ["ü", "", "1"]]
    text = files.csv_text(["path", "class", "note"], rows)
    assert text == 'path,class,note\n"a,b","say ""x""","two\nlines"\nü,,1\n'
    files.write_text_atomic(
        tmp_path / "x.csv", f"\N{BOM}{text}short\n"
    )  # Excel begins with this mark
    found = files.read_csv(tmp_path / "x.csv", {"path", "note"})
    assert [list(row.values()) for row in found] == [*rows, ["short", "", ""]]
    assert [*found[0]] == ["path", "class", "note"]
    with pytest.raises(ValueError, match="it has no column label"):
        files.read_csv(tmp_path / "x.csv", {"path", "label"})
