"""Which record every measured number of a page comes from; `test_records.py` holds them together.

Pages are README.md, docs/, the lab notes benchmarks/*/README.md and the heads of configs/*.yaml. What a page says of
its records stands in the file of the same name below `pages/` (docs/faq.md: pages/docs/faq.toml):

    [[claim]]
    record = "reliability/soak.json"                  # below benchmarks/; or a list of several
    text = "{steps:,} steps | {rss_mb:.0f} MB | {correct/total:.1%} right"
    at = "training"                                   # the part of the record that fills the text; else all of it
    of = "speed.steps"                                # a function of the records that computes it instead
    with = { batch = 8 }                              # and its arguments
    rows = { "seed 0" = "accuracy/runs.jsonl#s0" }    # one claim for each: {row} is the name, instead of `record`
    take = { yes = "experts", no = "dense" }          # {take} is what stands here for the value {verdict}

    [not_measured]                                    # a setting, a confidence level, a bound that a test asserts
    "95 % intervals" = "their level"                  # words of the page, and why they need no record

    [not_measured_pattern]                            # the same, as a regular expression over the page's lines

A text is read as `str.format` reads it, with `a/b`, `a*b` and `list!n` (how many) in addition; {0[key]} and {1[key]}
are of the first and the second record. It fills once for each mapping that `of` or `at` gives. `FILE.jsonl#NAME` are
the lines of that name, where * stands for any letters. Of a frozen study `recompute.py` says what the pages say.

A page and a claim may differ in line breaks, in "7 %" for "7%", and in the minus sign. After a new measurement,
`python -m benchmarks records` rewrites the pages from the records.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property, reduce
from importlib import import_module
from pathlib import Path
from string import Formatter
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = Path(__file__).with_name("pages")
SCRIPTS = sorted((ROOT / "benchmarks").glob("*/recompute.py"))
Reader = Callable[[str], str]
"""Gives the text of a file below the repository."""


def read_text(path: str) -> str:
    """The text of a file as it is now."""
    return (ROOT / path).read_text(encoding="utf-8")


def path_of(record: str) -> str:
    """The file that a claim names, below the repository."""
    path = record.partition("#")[0]
    return path if path.startswith(("moevision/", "/")) else f"benchmarks/{path}"


def load(records: Sequence[str], read: Reader = read_text) -> list[Any]:
    """The records that a claim names, in their order; of a `.jsonl` file each line is one."""
    loaded = []
    for record in records:
        path, name = path_of(record), record.partition("#")[2]
        text = read(path)
        entries = text.splitlines() if path.endswith(".jsonl") else [text]
        found = [json.loads(entry) for entry in entries]
        if name:
            found = [entry for entry in found if fnmatchcase(entry["name"], name)]
        if not found:
            raise LookupError(f"there is no {record}")
        loaded += found
    return loaded


def part_at(record: Any, keys: str) -> Any:
    """The part of a record at `key.key`; a number is the index in a list."""
    steps = [int(key) if key.isdigit() else key for key in keys.split(".")] if keys else []
    return reduce(lambda part, key: part[key], steps, record)


class Arithmetic(Formatter):
    """`str.format` that also divides and multiplies: `{correct/total:.1%}`, `{latency[p50_ms]/1000:.1f}`."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """The value of a field, and the name that it used."""
        name, operator, second = re.fullmatch(r"([^*/]+)([*/]?)(.*)", field_name).groups()  # type: ignore[union-attr]
        value, used = super().get_field(name, args, kwargs)
        if operator:
            number = second[0].isdigit()
            other = float(second) if number else super().get_field(second, args, kwargs)[0]
            value = value / other if operator == "/" else value * other
        return value, used

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """`{circles!n}` is how many there are."""
        return len(value) if conversion == "n" else super().convert_field(value, conversion)


@dataclass(frozen=True)
class Claim:
    """A text that a page shows once for each mapping of values; the attributes are those of a `[[claim]]`."""

    text: str
    records: tuple[str, ...] = ()
    at: str = ""
    of: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    take: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """The records' files."""
        return tuple(map(path_of, self.records))

    @cached_property
    def texts(self) -> list[str]:
        """The text for each mapping of values, made once: several tests ask."""
        return self.rendered()

    def values_of(self, records: Sequence[Any]) -> list[Mapping[str, Any]]:
        """What fills the text, from these records."""
        if self.of:
            module, _, name = self.of.partition(".")
            function = getattr(import_module(f"{__name__}.{module}"), name)
            values = function(*records, **self.arguments)
        elif self.at:
            values = part_at(records[0], self.at)
        else:
            values = records[0] if len(records) == 1 else {}
        rows = [values] if isinstance(values, Mapping) else values
        return [{**row, "take": self.take[row["verdict"]]} if self.take else row for row in rows]

    def rendered(self, read: Reader = read_text) -> list[str]:
        """The text for each mapping of values; `read` gives a record's text."""
        records = load(self.records, read)
        return [Arithmetic().vformat(self.text, records, row) for row in self.values_of(records)]


def claims_of(entry: Mapping[str, Any]) -> Iterator[Claim]:
    """The claims of one `[[claim]]`: one, or one for each of its rows."""
    record = entry.get("record", [])
    for name, of_row in entry.get("rows", {"": record}).items():
        yield Claim(
            text=entry["text"].replace("{row}", name),
            records=(of_row,) if isinstance(of_row, str) else tuple(of_row),
            at=entry.get("at", ""),
            of=entry.get("of", ""),
            arguments=entry.get("with", {}),
            take=entry.get("take", {}),
        )


@dataclass(frozen=True)
class Page:
    """A page with its claims and its words that aren't measured."""

    path: Path
    claims: Sequence[Claim] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)

    @property
    def accounted(self) -> list[str]:
        """Everything in it that comes from a record or needs none, the longest text first."""
        texts = [text for claim in self.claims for text in claim.texts]
        texts += frozen_statements().get(self.path, [])
        return sorted([*texts, *self.not_measured], key=len, reverse=True)

    @property
    def text(self) -> str:
        """What it says."""
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The text for readers: of a config its comments."""
        if self.path.suffix != ".yaml":
            return self.text
        comments = [line for line in self.text.splitlines(keepends=True) if line.startswith("#")]
        return "".join(line.removeprefix("#").removeprefix(" ") for line in comments)


def all_pages() -> list[Path]:
    """README.md, docs/, the lab notes of benchmarks/ and the configs."""
    patterns = ("README.md", "docs/**/*.md", "benchmarks/*/README.md", "configs/*.yaml")
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def file_of(page: Path) -> Path:
    """Where the claims of a page stand."""
    return (PAGES / page.relative_to(ROOT)).with_suffix(".toml")


def statements_of(script: Path) -> dict[str, list[str]]:
    """What `recompute.py` of a frozen study says of the record beside it: page -> texts. It is loaded anew."""
    statements: dict[str, list[str]] = runpy.run_path(str(script))["statements"]()
    return statements


@cache
def frozen_statements() -> dict[Path, list[str]]:
    """Page -> texts of all frozen studies; computed when the first page asks, not where tests are collected."""
    statements = defaultdict(list)
    for script in SCRIPTS:
        for page, texts in statements_of(script).items():
            statements[ROOT / page] += texts
    return dict(statements)


def checked_pages() -> list[Page]:
    """All pages, with what their files say of them."""
    pages = []
    for path in all_pages():
        file = file_of(path)
        own = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        not_measured = dict(own.get("not_measured", {}))
        for expression, why in own.get("not_measured_pattern", {}).items():
            lines = re.findall(expression, path.read_text(encoding="utf-8"), re.M)
            assert lines, f"{path} has no line like {expression}"
            not_measured |= dict.fromkeys(lines, why)
        claims = [claim for entry in own.get("claim", []) for claim in claims_of(entry)]
        pages.append(Page(path, claims, not_measured))
    return pages


def all_records() -> list[Path]:
    """Every JSON file of benchmarks/, and what the bundled models say of themselves."""
    folders = [ROOT / "benchmarks", ROOT / "moevision/demo/models"]
    return sorted(path for folder in folders for path in folder.rglob("*.json*"))


def read_record(path: Path) -> Any:
    """A record: of .jsonl a list, one entry a line."""
    text = path.read_text(encoding="utf-8")
    return list(map(json.loads, text.splitlines())) if path.suffix == ".jsonl" else json.loads(text)


def parts_of(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a record."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from parts_of(part)


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
_HEADS_OF_TABLES = re.compile(r"^\|.*\|\n(?=\|[-:| ]+\|$)", re.M)
_NAMES = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv:[\d.]+")
_UNITS = r"%|percent|ms|s|min|minutes?|seconds?|hours?|images/s|[kMGT]i?B|points?|times|bits?|×|[MGTP]?FLOPs?|GFLOP/s"
_WORDS = "two|three|four|five|six|seven|eight|nine|ten|fifteen|twenty|thirty|forty|fifty|sixty|ninety|hundred"
_MEASURED = re.compile(rf"(?<![\w.])\d*\.\d+|\d+ of \d+|(?:\d|\b(?:{_WORDS}))\s?(?:{_UNITS})(?!\w)")


def unclaimed(page: Page) -> list[str]:
    """Measured numbers that stand in a page without a claim or a reason, each with the words around it."""
    rest = _CODE_AND_HEADINGS.sub("", page.prose)
    for text in page.accounted:
        rest = pattern(text).sub("…", rest)
    rest = _NAMES.sub("…", _HEADS_OF_TABLES.sub("", rest))
    numbers = [match.span() for match in _MEASURED.finditer(rest)]
    for cell in _cells(rest):
        if not any(cell[0] <= start < cell[1] for start, _ in numbers):
            numbers.append(cell)
    return [" ".join(rest[max(0, start - 40) : end + 20].split()) for start, end in sorted(numbers)]


def _cells(text: str) -> Iterator[tuple[int, int]]:
    """Where cells of tables stand that hold a number and no words."""
    for line in re.finditer(r"^\|.*\|$", text, re.M):
        for cell in re.finditer(r"(?<=\|)[^|]+", line.group()):
            words = cell.group().replace(" to ", " ")
            if re.search(r"\d", words) and not re.search(r"[^\W\d]", words):
                yield line.start() + cell.start(), line.start() + cell.end()


# ---- after a new measurement


def committed(path: str) -> str:
    """A record's text as of HEAD; of a file that is new, its text now."""
    command = ["git", "show", f"HEAD:{path}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return shown.stdout if shown.returncode == 0 else read_text(path)


def typeset(text: str) -> str:
    """As the pages write it: a blank before %, a true minus sign."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", re.sub(r"\s*%", " %", text))


def main() -> None:
    """Rewrite the pages: what the committed records say gives way to what the files say now."""
    for page in checked_pages():
        text = page.text
        for claim in page.claims:
            for before, now in zip(claim.rendered(committed), claim.rendered(), strict=True):
                if before != now:
                    text = pattern(before).sub(lambda _, now=now: typeset(now), text)
        if text != page.text:
            page.path.write_text(text, encoding="utf-8")
            print(f"{page.path.relative_to(ROOT)} rewritten")
