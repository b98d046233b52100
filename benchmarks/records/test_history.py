"""No record changes in silence: what the history of this repository says of every run.

Who edits a record and lets the pages be rewritten has every other test on their side, for the pages then say what the
record says. The history can't be edited with it: a run that was committed once is still there, unchanged, and what it
names as its code and its protocol is older than itself.
"""

import io
import json
import math
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import ROOT, all_records, parts_of, read_record

pytestmark = pytest.mark.needs("history")

MEASURED_AGAIN = {
    # lines that gave way to a new measurement of the same: file, run, and when it began; the commit says why
    "waiting/runs.jsonl 2026-11-27T20:23:42+00:00",  # ea39e7da
    "waiting/runs.jsonl 2026-11-27T20:25:07+00:00",
    "waiting/runs.jsonl 2026-11-27T20:26:00+00:00",
    "quickstart/runs.jsonl before-s0 2026-11-30T03:50:00+00:00",  # d2e111bf
    "quickstart/runs.jsonl now-s0 2026-11-30T03:49:58+00:00",
    "strangers/runs.jsonl pets 2026-11-29T20:48:16+00:00",  # 9f00d148
    "quickstart/runs.jsonl emoji-s0 2026-12-01T20:51:26+00:00",  # 4c0e8026
    "quickstart/runs.jsonl emoji-s1 2026-12-01T20:58:55+00:00",
    "quickstart/runs.jsonl emoji-s2 2026-12-01T21:04:53+00:00",
    "strangers/runs.jsonl emoji 2026-12-01T21:27:03+00:00",  # a44c1feb
    "specialization/scratch.jsonl pets 2026-11-29T10:31:34+00:00",  # a3e625d8
    "specialization/scratch.jsonl cifar10 2026-11-29T10:31:34+00:00",
    "specialization/scratch.jsonl cats_vs_dogs 2026-11-29T10:40:57+00:00",
    "strangers/runs.jsonl cats_vs_dogs 2026-11-29T20:44:42+00:00",  # 1481d4b9: other models
    "strangers/runs.jsonl cats_vs_dogs_two 2026-11-30T07:32:17+00:00",
    "strangers/runs.jsonl cats_vs_dogs_two 2026-12-03T05:29:32+00:00",  # 816755f6
    # two of trees with changes
    'several_labels/runs.jsonl {"code": {"git_commit": "f7b85c218f527d2d71fb98c6fd315d6285a',
    'several_labels/runs.jsonl pairs {"name": "pairs", "code": {"git_commit": "f7b85c218f527d2d71',
}
RUNS, PROTOCOLS = "benchmarks/*.jsonl", "benchmarks/*protocol.md"


@dataclass(frozen=True)
class Version:
    """What a file was in some commit: the earliest one that has it, in seconds since 1970."""

    path: Path
    text: bytes
    committed_s: int


@dataclass(frozen=True)
class History:
    """The history of HEAD in a checkout, and the records that lie there now.

    A study goes by the name of its folder, and a file by that and its own (`study/runs.jsonl`): a study may move.
    """

    checkout: Path

    def git(self, *words: str, stdin: str = "") -> bytes:
        """What git answers."""
        command = ["git", "-C", str(self.checkout), *words]
        return subprocess.run(command, input=stdin.encode(), capture_output=True, check=True).stdout

    @cached_property
    def commits(self) -> dict[str, int]:
        """Hash of each commit, and when it was made."""
        lines = self.git("log", "--format=%H %ct").decode().splitlines()
        return {commit: int(seconds) for commit, seconds in map(str.split, lines)}

    def versions(self, pattern: str) -> list[Version]:
        """All that the files of this pattern ever were; also on branches that were merged."""
        options = ("--full-history", "-m", "--no-renames", "--raw", "--no-abbrev", "--format=%ct")
        earliest: dict[tuple[str, str], int] = {}
        seconds = 0
        for line in self.git("log", *options, "--", pattern).decode().splitlines():
            # Modes before and after, blobs before and after, status, tab, path.
            if line.startswith(":"):
                facts, path = line.split("\t")
                blob = facts.split()[3]
                earliest[path, blob] = min(seconds, earliest.get((path, blob), seconds))
            elif line:
                seconds = int(line)
        existing = {
            key: seconds for key, seconds in earliest.items() if int(key[1], 16)
        }  # zeros: deleted there
        contents = io.BytesIO(
            self.git("cat-file", "--batch", stdin="".join(f"{blob}\n" for _, blob in existing))
        )
        versions = []
        for (path, _), seconds in existing.items():
            size = int(contents.readline().split()[2])
            versions.append(Version(Path(path), contents.read(size), seconds))
            contents.readline()
        return versions

    def lost_lines(self) -> set[str]:
        """Runs that a commit has and the checkout has not, or not as they were."""
        now, ever = defaultdict(set), defaultdict(set)
        for path in self.checkout.glob("benchmarks/**/*.jsonl"):
            now[file_of(path)] |= set(path.read_text(encoding="utf-8").splitlines())
        for version in self.versions(RUNS):
            ever[file_of(version.path)] |= set(version.text.decode().splitlines())
        return {name_of(line, file) for file, lines in ever.items() for line in lines - now[file]}

    @cached_property
    def protocols(self) -> dict[tuple[str, str], int]:
        """Study and hash of each version of a protocol, and when it was committed first."""
        earliest: dict[tuple[str, str], int] = {}
        for version in self.versions(PROTOCOLS):
            key = version.path.parent.name, sha256(version.text).hexdigest()
            earliest[key] = min(version.committed_s, earliest.get(key, version.committed_s))
        return earliest

    def wrong_origins(self, study: str, record: Any) -> Iterator[str]:
        """What a record, or a part of it, names that isn't in the history, or was committed after it began."""
        for part in parts_of(record):
            if "git_commit" in part and part["git_commit"] not in self.commits:
                yield f"{study}: no commit {part['git_commit']}"
            if "started_utc" not in part or not part.get("code"):
                continue
            began = datetime.fromisoformat(part["started_utc"]).timestamp()
            run = f"{study} {part.get('name', '')}, begun {part['started_utc']}"
            if self.commits.get(part["code"]["git_commit"], 0) > began:
                yield f"{run}: its commit is younger"
            protocol = part.get("protocol_sha256")
            if protocol and self.protocols.get((study, protocol), math.inf) > began:
                yield f"{run}: no commit before it has its protocol, {protocol[:12]}"

    def struck_lines(self) -> set[str]:
        """Lines of a protocol that a run followed, which no longer stand in it; "None." were its amendments so far."""
        followed = set()
        for path in self.checkout.glob("benchmarks/**/*.jsonl"):
            followed |= {
                (path.parent.name, run.get("protocol_sha256")) for run in read_record(path)
            }
        now = defaultdict(set)
        for path in self.checkout.glob("benchmarks/**/*protocol.md"):
            now[path.parent.name] |= {"None.", *path.read_text(encoding="utf-8").splitlines()}
        struck = set()
        for version in self.versions(PROTOCOLS):
            study = version.path.parent.name
            if (study, sha256(version.text).hexdigest()) in followed:
                struck |= {
                    f"{study}: {line}"
                    for line in set(version.text.decode().splitlines()) - now[study]
                }
        return struck


def file_of(path: Path) -> str:
    """`study/runs.jsonl`."""
    return f"{path.parent.name}/{path.name}"


def name_of(line: str, file: str) -> str:
    """`study/runs.jsonl moe-s200 2026-11-30T16:14:02+00:00`: the file, the run, and when it began."""
    run = json.loads(line)
    began = next(
        (part["started_utc"] for part in parts_of(run) if "started_utc" in part), line[:60]
    )
    return " ".join(filter(None, [file, run.get("name"), began]))


def test_every_run_that_was_committed_is_still_there_unchanged() -> None:
    """One that is measured again is named in MEASURED_AGAIN, with the reason in its commit."""
    assert History(ROOT).lost_lines() == MEASURED_AGAIN


def test_the_code_and_the_protocol_of_a_run_were_committed_before_it_began() -> None:
    """Of all records, and of the trainings of the bundled models."""
    history = History(ROOT)
    records = [(path.parent.name, read_record(path)) for path in all_records()]
    assert sum("git_commit" in part for _, record in records for part in parts_of(record)) > 500
    assert [
        each for study, record in records for each in history.wrong_origins(study, record)
    ] == []


def test_a_protocol_that_a_run_followed_only_grows() -> None:
    """An amendment adds lines, and says when."""
    assert History(ROOT).struck_lines() == set()


def test_no_run_is_told_twice() -> None:
    """Of two with one name a report takes the later one: a line added would change a run as one edited does."""
    files = [path for path in all_records() if path.name == "runs.jsonl"]
    names = {
        file_of(path): [run["name"] for run in read_record(path) if "name" in run] for path in files
    }
    assert sum(map(len, names.values())) > 500
    assert {
        file: len(own) - len(set(own)) for file, own in names.items() if len(own) > len(set(own))
    } == {}


# ---- what these find, in a history that is made up

START = datetime.fromisoformat("2026-11-30T12:00:00+00:00")
PROTOCOL = "Half a point decides.\n"


class MadeUp(History):
    """A study `taste` with one run, in a repository of its own."""

    @property
    def folder(self) -> Path:
        return self.checkout / "benchmarks" / "taste"

    def commit(self, hours: float) -> str:
        """Commit everything, so many hours after START; its hash."""
        when = (START + timedelta(hours=hours)).isoformat()
        self.git("add", "--all")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GIT_COMMITTER_DATE", when)
            self.git("commit", "--quiet", "--message=x")
        return self.git("rev-parse", "HEAD").decode().strip()

    def write(self, **changes: Any) -> None:
        """The study's runs: one, with these changes."""
        run = {"name": "moe-s0", "test_top1": 0.87, "started_utc": START.isoformat(), **changes}
        (self.folder / "runs.jsonl").write_text(json.dumps(run) + "\n")

    def wrong(self) -> list[str]:
        """What its runs name wrongly."""
        return list(self.wrong_origins("taste", read_record(self.folder / "runs.jsonl")))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[MadeUp, dict[str, Any]]:
    """Committed three hours before the run, the run an hour after it; and where the run says it comes from."""
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)  # in a hook they name the repository that is at work
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for variable in ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"):
        monkeypatch.setenv(f"GIT_{variable}", "somebody")
    history = MadeUp(tmp_path)
    history.folder.mkdir(parents=True)
    history.git("init", "--quiet")
    (history.folder / "protocol.md").write_text(PROTOCOL)
    code = {"git_commit": history.commit(-3), "dirty": False}
    origin = {"code": code, "protocol_sha256": sha256(PROTOCOL.encode()).hexdigest()}
    history.write(**origin)
    history.commit(1)
    return history, origin


def test_a_run_that_is_as_it_was_is_right(study: tuple[MadeUp, dict[str, Any]]) -> None:
    history, _ = study
    assert (history.lost_lines(), history.wrong(), history.struck_lines()) == (set(), [], set())
    (history.checkout / "benchmarks" / "decided").mkdir()
    history.folder.rename(history.checkout / "benchmarks" / "decided" / "taste")
    history.commit(2)
    assert history.lost_lines() == set()


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_a_run_that_was_changed_or_taken_out_is_found(study, change: str, committed: bool) -> None:
    history, origin = study
    history.write(**origin, test_top1=0.878)
    if change == "deleted":
        (history.folder / "runs.jsonl").unlink()
    if committed:
        history.commit(2)
    assert history.lost_lines() == {f"taste/runs.jsonl moe-s0 {START.isoformat()}"}


def test_a_run_that_only_a_merge_took_out_is_found(study) -> None:
    """The branch adds a run, and the merge keeps the file of the other side."""
    history, origin = study
    history.git("checkout", "--quiet", "-b", "branch")
    history.write(**origin, name="moe-s1")
    history.commit(2)
    history.git("checkout", "--quiet", "-")
    (history.folder / "README.md").write_text("Something else.\n")
    history.commit(3)
    history.git("merge", "--no-commit", "--strategy=ours", "branch")
    history.commit(4)
    assert history.lost_lines() == {f"taste/runs.jsonl moe-s1 {START.isoformat()}"}


def test_a_protocol_that_was_rewritten_after_its_runs_is_found(study) -> None:
    history, _ = study
    (history.folder / "protocol.md").write_text(f"{PROTOCOL}Amended: another seed.\n")
    history.commit(2)
    assert history.struck_lines() == set()
    (history.folder / "protocol.md").write_text("A tenth decides.\n")
    assert history.struck_lines() == {f"taste: {PROTOCOL.strip()}"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol_sha256": 64 * "0"}, "no commit before it has its protocol, 000000000000"),
        (
            {"protocol_sha256": sha256(b"A tenth decides.\n").hexdigest()},
            "no commit before it has its protocol",
        ),
        ({"started_utc": (START - timedelta(days=9)).isoformat()}, "its commit is younger"),
        ({"code": {"git_commit": 40 * "1", "dirty": False}}, f"no commit {40 * '1'}"),
    ],
)
def test_a_run_older_than_what_it_names_is_found(study, changes: dict[str, Any], said: str) -> None:
    """The second protocol is committed, two hours after the run began."""
    history, origin = study
    (history.folder / "protocol.md").write_text("A tenth decides.\n")
    history.commit(2)
    history.write(**{**origin, **changes})
    assert said in history.wrong()[0]
