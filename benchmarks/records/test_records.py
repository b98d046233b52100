"""Every measured number of README.md, docs/ and benchmarks/*/README.md has a committed record; see `records/`."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import without_places
from benchmarks.records import PAGES as PAGES_FOLDER
from benchmarks.records import (
    ROOT,
    Claim,
    Page,
    all_records,
    checked_pages,
    claims_of,
    file_of,
    load,
    parts_of,
    pattern,
    read_record,
    trees_of,
    unclaimed,
)
from benchmarks.records.explorer import flipped
from tests.needs import PHOTO_MODEL

WITHOUT_COMMIT: set[str] = {
    "benchmarks/mutation_equivalent.json",  # reasons, written by hand
    "benchmarks/analysis/coverage.json",
}
"""Quoted records from before they named the commit that they were made from: each goes when it is measured again."""


PAGES = checked_pages()
RECORDS = sorted({path for page in PAGES for claim in page.claims for path in claim.paths})


def _param(page: Page) -> Any:
    """A page; some records lie beside the photos."""
    beside = any(path.startswith(PHOTO_MODEL) for claim in page.claims for path in claim.paths)
    return pytest.param(
        page,
        id=str(page.path.relative_to(ROOT)),
        marks=[pytest.mark.needs("photos")] if beside else [],
    )


@pytest.mark.parametrize("page", [_param(page) for page in PAGES])
def test_a_page_says_what_its_records_say(page: Page) -> None:
    """Every claim stands in it, no other measured number does, and no reason is for words that are gone."""
    texts = [(text, claim.records) for claim in page.claims for text in claim.texts]
    wordless = [text for text, _ in texts if not re.search(r"[^\W\d_]{2}", text)]
    assert wordless == [], "they would be found anywhere"
    assert [each for each in texts if not pattern(each[0]).search(page.text)] == []
    assert unclaimed(page) == []
    assert [text for text in page.not_measured if not pattern(text).search(page.text)] == []
    assert all(page.not_measured.values()), "each has a reason"


VERDICT = re.compile(
    r"\b(beats?|better|worse|above|below|slower|faster|told apart|offsets?|improves?|excluded|yes|no"
    r"|((is|are) not|isn't|aren't|not|is|are) shown|(as|more|less) accurate|stays)\b"
)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("README.md", "moevision"),
        ("README.md", "What experts bring, and what they cost"),
        ("docs/results.md", "Results"),
    ],
)
def test_no_verdict_of_a_headline_is_without_a_record(name: str, section: str) -> None:
    """Words such as "better" and "not told apart" stand in claims, which fill them in from the record."""
    page = next(page for page in PAGES if page.path == ROOT / name)
    rest = re.search(rf"^#+ {section}$(.*?)(?=^## |\Z)", page.text, re.M | re.S)
    assert rest is not None
    assert VERDICT.search(rest[1]), "nothing to check"
    left = rest[1]
    for text in page.accounted:
        left = pattern(text).sub("…", left)
    assert [match.group() for match in VERDICT.finditer(left)] == []


ADVICE = [claim for page in PAGES for claim in page.claims if claim.take]


def test_every_advice_of_the_guide_comes_from_a_verdict() -> None:
    """Each row of the table has its claim with `take`, in this order."""
    page = (ROOT / "docs" / "guides" / "when-experts.md").read_text()
    table = re.search(r"^\| your case .*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)
    assert table is not None
    rows = [row.split(" | ")[0] for row in table[1].splitlines()]
    assert rows == [claim.text.split(" | ")[0] for claim in ADVICE]


def _more_accurate(run: dict[str, Any]) -> None:
    if run["arm"] == "moe" and run["test_top1"]:
        run["test_top1"] += 0.008


def _twice_as_fast(row: dict[str, Any]) -> None:
    row["after"]["ratio"]["median"] /= 2


def _on_a_gpu(record: dict[str, Any]) -> None:
    record["machine"]["gpus"] = ["NVIDIA H100"]


def _always_right(run: dict[str, Any]) -> None:
    run["predicted"]["joined"] = run["labels"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_more_accurate, {"excluded": "shown"}),
        (_twice_as_fast, {"slower": "faster", "about as fast": "faster"}),
        (_on_a_gpu, {"not measured": "measured"}),
        (_always_right, {"not on every set": "on every set"}),
    ],
)
def test_an_advice_changes_with_its_records(change: Any, said: dict[str, str]) -> None:
    """The records of each advice whose verdict is named, changed; each verdict becomes the other."""
    advices = [claim for claim in ADVICE if set(said) & set(claim.take)]
    assert advices
    for advice in advices:
        records, asked = load(advice.records), replace(advice, take={})
        (before,) = asked.values_of(records)
        for record in records:
            change(record)
        (after,) = asked.values_of(records)
        assert after["verdict"] == said[before["verdict"]]


def test_every_file_of_claims_has_a_page() -> None:
    """A page that moved without its file would no longer be checked."""
    assert set(PAGES_FOLDER.rglob("*.toml")) <= {file_of(page.path) for page in PAGES}


def test_a_command_names_no_place_of_the_machine() -> None:
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.json*")]
    commands = [
        command for text in files for command in re.findall(r'"command": "([^"\n]*)"', text)
    ]
    assert len(commands) > 100
    assert [command for command in commands if command != without_places(command)] == []


@pytest.mark.needs("photos")
def test_records_come_from_committed_trees() -> None:
    assert [path for path in RECORDS if any(tree["dirty"] for tree in trees_of(ROOT / path))] == []
    assert {path for path in RECORDS if not trees_of(ROOT / path)} == WITHOUT_COMMIT


def test_no_record_is_of_a_dry_run() -> None:
    """`--quick` shows that a benchmark runs, and measures nothing."""
    assert [
        path
        for path in all_records()
        if any(part.get("dry_run") for part in parts_of(read_record(path)))
    ] == []


CIFAR10_LABELS = "".join(1000 * str(label) for label in range(10))
"""Of its test images by class, a digit each: records of this data leave them out."""


def contradictions(record: Any) -> Iterator[str]:
    """Numbers of a record that don't follow from the counts beside them."""
    for part in parts_of(record):
        correct = part.get("correct")
        images = next(
            (part[name] for name in ("total", "n", "test_images", "images") if name in part), None
        )
        if "total" in part and not 0 <= correct <= images:
            yield f"{correct} of {images} correct"
        rows = part.get("per_class", [])  # name, correct, images
        if rows and (sum(row[1] for row in rows), sum(row[2] for row in rows)) != (correct, images):
            yield f"the classes don't add up to {correct} of {images}"
        shares = [part[name] for name in ("top1", "top1_before") if name in part and images]
        shares += (
            part["accuracy"].values() if {"accuracy", "test_images"} <= part.keys() else []
        )  # of a bundled model and its twin
        for share in shares:
            if not math.isclose(share * images, round(share * images), rel_tol=0, abs_tol=1e-3):
                yield f"{share} of {images} images is no number of images"
        if isinstance(part.get("predicted"), str):
            labels = part.get("labels", CIFAR10_LABELS)
            right = sum(map(str.__eq__, part["predicted"], labels)) / len(labels)
            top1 = part.get("top1", part.get("test_top1"))
            if len(part["predicted"]) != len(labels):
                yield f"{len(part['predicted'])} predicted classes of {len(labels)} images"
            elif not math.isclose(top1, right, abs_tol=1e-6):
                yield f"{right} of the predicted classes are right, not {top1}"
        if "max_over_mean" in part and "counts" in part:
            counts, mean = part["counts"], sum(part["counts"]) / len(part["counts"])
            cv_squared = sum((count / mean - 1) ** 2 for count in counts) / len(counts)
            found = {
                "max_over_mean": max(counts) / mean,
                "cv_squared": cv_squared,
                "dead": counts.count(0),
            }
            for name, value in found.items():
                if not math.isclose(part[name], value, rel_tol=1e-6, abs_tol=1e-12):
                    yield f"{name} of {counts} isn't {part[name]}"
        if (
            "layers" in part and "test" in part
        ):  # every image is as many tokens, each with as many experts
            for choices in (sum(layer.get("counts", ())) for layer in part["layers"]):
                if choices % part["test"]["total"]:
                    yield f"{choices} choices of {part['test']['total']} images"


def test_what_a_record_says_follows_from_its_counts() -> None:
    assert {
        path: found for path in all_records() if (found := list(contradictions(read_record(path))))
    } == {}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"correct": 9, "total": 8}, "9 of 8"),
        (
            {"test": {"correct": 3, "total": 4, "per_class": [["cat", 1, 2], ["dog", 1, 2]]}},
            "add up to 3 of 4",
        ),
        ({"top1": 0.7, "images": 832}, "0.7 of 832"),
        ({"test_images": 2000, "accuracy": {"moe": 0.99, "dense": 0.9871}}, "0.9871 of 2000"),
        (
            {"labels": "0011", "predicted": "0010", "top1": 1.0},
            "0.75 of the predicted classes are right, not 1.0",
        ),
        ({"predicted": CIFAR10_LABELS[1:] + "0", "test_top1": 1.0}, "0.999 of the predicted"),
        (
            {"predicted": CIFAR10_LABELS[1:], "test_top1": 0.999},
            "9999 predicted classes of 10000 images",
        ),
        (
            {"layers": [{"counts": [1, 3], "max_over_mean": 1.5, "cv_squared": 0.2, "dead": 0}]},
            "cv_squared",
        ),
        ({"test": {"correct": 2, "total": 3}, "layers": [{"counts": [6, 7]}]}, "13 choices of 3"),
    ],
)
def test_a_contradiction_is_found(record: dict[str, Any], said: str) -> None:
    (found,) = contradictions(record)
    assert said in found


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("The step takes 2.5 ms.", 1),
        ("It is 3 % faster and took fifteen minutes.", 2),
        ("42 of 42 cells", 1),
        ("All lie between .92 and 1.08, at 1e-5, in L1.5", 2),
        ("8 experts, 64 px, `--lr 0.1`, arXiv:1701.06538, [0.5](docs/0.5.md)", 1),
        ("| rows | 306 |\n|---|---|\n| MoE | 306 |\n| twin | 365 to 366 |", 2),
        ("## In 2.5 ms\n\n```sh\nsleep 2.5\n```\n", 0),
    ],
)
def test_measured_numbers_are_found(words: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(words)
    assert len(unclaimed(Page(path))) == count


def test_a_claim_takes_its_numbers_away(tmp_path: Path) -> None:
    """In a page whose words break elsewhere and whose minus is the true one; another number stays."""
    record, path = tmp_path / "record.json", tmp_path / "page.md"
    record.write_text('{"rows": [{"gain": -0.25}, {"gain": 0.5}]}')
    path.write_text("It gains\n−25.0 % here. It gains +50.0 % here. It gains 51 % there.")
    claim = Claim("It gains {gain:+.1%} here.", (str(record),), at="rows")
    assert all(pattern(text).search(path.read_text()) for text in claim.texts)
    assert len(unclaimed(Page(path, [claim]))) == 1


def test_a_text_divides_and_takes_rows_and_several_records(tmp_path: Path) -> None:
    record = tmp_path / "runs.jsonl"
    runs = [{"name": f"moe-s{seed}", "ms": 1500 * seed, "steps": 3} for seed in (1, 2)]
    record.write_text("\n".join(map(json.dumps, runs)))
    rows = {"seed 1": f"{record}#moe-s1", "seed 2": f"{record}#moe-s2"}
    claims = claims_of({"text": "{row}: {ms/1000:.1f} s, {ms/steps:.0f} each", "rows": rows})
    assert [claim.texts for claim in claims] == [
        ["seed 1: 1.5 s, 500 each"],
        ["seed 2: 3.0 s, 1000 each"],
    ]
    assert Claim("{0[ms]*2:.0f}, {1[ms]}", (f"{record}#moe-*",)).texts == ["3000, 3000"]
    with pytest.raises(LookupError, match="there is no"):
        load([f"{record}#dense-*"])


def test_an_answer_flips_if_any_expert_changes_it() -> None:
    record = {
        "all": "0123",
        "without": {"a": "0124", "b": "1123"},
        "at_random": {"a": "0123", "b": "0103"},
    }
    assert flipped(record, "without").tolist() == [True, False, False, True]
    assert flipped(record, "at_random").tolist() == [False, False, True, False]
