"""Which record every measured number of a page comes from; `test_records.py` holds them together.

Pages are README.md, docs/, the lab notes benchmarks/*/README.md and the heads of configs/*.yaml. A page with measured
numbers has a module here, named as the page (docs/reference/files.md: reference_files.py, benchmarks/routers/README.md:
routers.py); `pages.py` has those with a number or two. A module has two lists:

CLAIMS: what the page says, as a format; the record that says it; and which of its values fill the format.

    Claim(
        "benchmarks/reliability/soak.json",
        "{steps:,} training steps | {rss_mb:.0f} MB at the end",
        lambda record: record["training"],
    )

Rows of a table are one claim: its values are then a list, one mapping for each row.

Of a frozen study `recompute.py` says what the pages say: `frozen.py` asks it.

DEFINITIONS: numbers that nobody measured (a setting, a confidence level, a bound that a test asserts), as they stand in
the page, with the reason.

A page and a claim may differ in line breaks, in "7 %" for "7%", and in the minus sign. After a new measurement,
`python -m benchmarks records` rewrites the pages from the records.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Values = Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """One format that a page shows once for each mapping of values.

    Attributes:
        records: JSON file below the repository, or several; `FILE.jsonl#NAME` is the line of that name.
        text: as `str.format` reads it; `{share:.1%}` and `{wait_ms[median]:.1f}` work.
        values: what fills the text, from the loaded records in their order; the one record itself unless said. A
            `.jsonl` file without a name gives one for each line.
    """

    records: str | tuple[str, ...]
    text: str
    values: Callable[..., Values] = lambda record: record

    @property
    def places(self) -> tuple[str, ...]:
        """The records, each a file with a name behind it or not."""
        return (self.records,) if isinstance(self.records, str) else self.records

    @property
    def paths(self) -> tuple[str, ...]:
        """The records' files."""
        return tuple(place.partition("#")[0] for place in self.places)

    @cached_property
    def texts(self) -> list[str]:
        """The text for each mapping of values, made once: several tests ask."""
        return self.rendered()

    def loaded(
        self, read: Callable[[str], str] = lambda path: (ROOT / path).read_text()
    ) -> list[Any]:
        """The records in their order, of a `.jsonl` file each line; `read` gives a file's text."""
        return [record for place in self.places for record in _records(place, read)]

    def rendered(
        self, read: Callable[[str], str] = lambda path: (ROOT / path).read_text()
    ) -> list[str]:
        """The text for each mapping of values; `read` gives a record's text."""
        values = self.values(*self.loaded(read))
        return [
            self.text.format_map(row)
            for row in ([values] if isinstance(values, Mapping) else values)
        ]


def _records(place: str, read: Callable[[str], str]) -> list[Any]:
    """The one record of a JSON file or of that name, or all of a file with one in each line."""
    path, _, name = place.partition("#")
    found = [
        json.loads(part)
        for part in (read(path).splitlines() if path.endswith(".jsonl") else [read(path)])
    ]
    return [next(record for record in found if record["name"] == name)] if name else found


@dataclass(frozen=True)
class Definition:
    """Words of a page with a number that isn't measured, and why it needs no record."""

    text: str
    why: str


@dataclass(frozen=True)
class Page:
    """A page with its claims and definitions, and what frozen studies say in it."""

    path: Path
    claims: list[Claim]
    definitions: list[Definition]
    frozen: list[str] = field(default_factory=list)

    @property
    def accounted(self) -> list[str]:
        """Everything in it that comes from a record or needs none, the longest text first."""
        texts = [text for claim in self.claims for text in claim.texts]
        return sorted(
            texts + self.frozen + [each.text for each in self.definitions], key=len, reverse=True
        )

    @property
    def text(self) -> str:
        """What it says."""
        return self.path.read_text()

    @property
    def prose(self) -> str:
        """The text for readers: of a config its comments."""
        lines = self.text.splitlines(keepends=True)
        if self.path.suffix != ".yaml":
            return self.text
        return "".join(
            line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#")
        )


def all_pages() -> list[Path]:
    """README.md, docs/, the lab notes of benchmarks/ and the configs."""
    notes, configs = (ROOT / "benchmarks").glob("*/README.md"), (ROOT / "configs").glob("*.yaml")
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted(notes),
        *sorted(configs),
    ]


def all_records() -> list[Path]:
    """Every JSON file of benchmarks/, and what the bundled models say of themselves."""
    return sorted(
        path
        for folder in ("benchmarks", "moevision/demo/models")
        for path in (ROOT / folder).rglob("*.json*")
    )


def read_record(path: Path) -> Any:
    """A record: of .jsonl a list, one entry a line."""
    text = path.read_text(encoding="utf-8")
    return (
        [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(text)
    )


def parts_of(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a record."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from parts_of(part)


def module_of(path: Path) -> str:
    """The name of a page's module here."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "benchmarks":
        return parts[1]
    return "_".join(parts[1:] if parts[0] == "docs" else parts).lower().replace("-", "_")


def checked_pages() -> list[Page]:
    """All pages, with what their modules here claim, `pages` of those with a number or two, and frozen studies."""
    few, frozen = (importlib.import_module(f"{__name__}.{name}") for name in ("pages", "frozen"))
    statements, pages = frozen.statements_by_page(), []
    for path in all_pages():
        name, relative = module_of(path), str(path.relative_to(ROOT))
        here = (Path(__file__).parent / f"{name}.py").is_file()
        module = importlib.import_module(f"{__name__}.{name}") if here else None
        claims = [*getattr(module, "CLAIMS", []), *few.CLAIMS.get(relative, [])]
        definitions = [*getattr(module, "DEFINITIONS", []), *few.DEFINITIONS.get(relative, [])]
        if path.is_relative_to(ROOT / "benchmarks"):
            definitions += frozen.DEFINITIONS.get(name, [])
        pages.append(Page(path, claims, definitions, statements.get(relative, [])))
    return pages


def trees_of(record: Path) -> list[dict[str, Any]]:
    """Each commit with its dirty flag that a record names, or the provenance.json beside it."""
    files = [file for file in (record, record.with_name("provenance.json")) if file.is_file()]
    return [part for file in files for part in parts_of(read_record(file)) if "git_commit" in part]


def pattern(text: str) -> re.Pattern[str]:
    """What finds these words in a page, whatever its line breaks, blanks before % and minus signs; also in comments."""
    words = re.escape(" ".join(text.replace("−", "-").split()))
    words = words.replace(r"\ %", "%").replace("%", r"\s*%").replace(r"\-", "[-−]")
    return re.compile(words.replace(r"\ ", r"(?:\s|\n#)+"))


_CODE_AND_HEADINGS = re.compile(
    r"^```.*?^```|^ {4}[^\n]*|^#+ [^\n]*|<!--.*?-->|\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL | re.M
)
_NAMES = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv:[\d.]+")
_UNITS = r"%|percent|ms|s|min|minutes?|seconds?|hours?|images/s|[kMGT]i?B|points?|times|bits?|×|[MGTP]?FLOPs?|GFLOP/s"
_WORDS = "two|three|four|five|six|seven|eight|nine|ten|fifteen|twenty|thirty|forty|fifty|sixty|ninety|hundred"
_MEASURED = re.compile(rf"(?<![\w.])\d*\.\d+|\d+ of \d+|(?:\d|\b(?:{_WORDS}))\s?(?:{_UNITS})(?!\w)")


def unclaimed(page: Page) -> list[str]:
    """Measured numbers that stand in a page without a claim or a definition, each with the words around it."""
    rest = _CODE_AND_HEADINGS.sub("", page.prose)
    for text in page.accounted:
        rest = pattern(text).sub("…", rest)
    rest = re.sub(r"^\|.*\|\n(?=\|[-:| ]+\|$)", "", rest, flags=re.M)  # heads of tables
    rest = _NAMES.sub("…", rest)
    found = [(match.start(), match.end()) for match in _MEASURED.finditer(rest)]
    found += [
        cell for cell in _cells(rest) if not any(cell[0] <= start < cell[1] for start, _ in found)
    ]
    return [" ".join(rest[max(0, start - 40) : end + 20].split()) for start, end in sorted(found)]


def _cells(text: str) -> Iterator[tuple[int, int]]:
    """Where cells of tables stand that hold a number and no words."""
    for line in re.finditer(r"^\|.*\|$", text, re.M):
        for cell in re.finditer(r"(?<=\|)[^|]+", line.group()):
            if re.search(r"\d", cell.group()) and not re.search(
                r"[^\W\d]", cell.group().replace(" to ", " ")
            ):
                yield line.start() + cell.start(), line.start() + cell.end()
