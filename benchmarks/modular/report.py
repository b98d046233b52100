"""README.md's tables and the gate's decision, from the records alone.

Axes: S seeds, I test images, M domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.markdown import table
from benchmarks.modular.domains import SEEDS, SETS, runs_of
from benchmarks.queue import is_dirty
from benchmarks.study import Contrast
from moevision.words import points, signed

Record = Mapping[str, Any]
GAIN, ENOUGH = 0.02, 2  # of accuracy; sets of domains
DECIDES = ("joined", "heads only, tuned")
PAIRS = (
    DECIDES,
    ("joined", "heads only"),
    ("joined", "one head, tuned"),
    ("joined", "no training"),
    ("joined", "dense joint"),
    ("joined", "dense joint, masked"),
    ("joined", "dense with replay, masked"),
    ("heads only, tuned", "no training"),
    ("joined, domain given", "heads only, tuned, domain given"),
)


def right(record: Record, arm: str) -> np.ndarray:
    """[I] whether each test image's class is found."""
    return np.array([a == b for a, b in zip(record["labels"], record["predicted"][arm], strict=True)])


def split(record: Record, values: np.ndarray) -> list[np.ndarray]:
    """Values [..., I] of each domain's test images; these come domain after domain."""
    return np.split(values, np.cumsum(record["test_images"])[:-1], axis=-1)


def accuracy(record: Record, arm: str) -> float:
    """Mean over domains."""
    return fmean(float(part.mean()) for part in split(record, right(record, arm)))


@dataclass(frozen=True)
class Gap:
    """One arm minus another on a set of domains: the mean over seeds and domains.

    Attributes:
        runs: of the set, by seed.
        first, second: arms.
    """

    runs: Sequence[Record]
    first: str
    second: str

    @cached_property
    def seeds(self) -> Contrast:
        """The gaps by seed, with Student's interval."""
        gaps = [accuracy(run, self.first) - accuracy(run, self.second) for run in self.runs]
        return Contrast(self.first, self.second, gaps)

    @cached_property
    def half(self) -> float:
        """Half the 95 % interval over test images: of an image's mean over seeds, domain by domain."""
        each = np.mean([right(run, self.first) * 1.0 - right(run, self.second) for run in self.runs], 0)
        parts = split(self.runs[0], each)
        return 1.96 * math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)

    @property
    def mean(self) -> float:
        """In shares."""
        return self.seeds.mean

    @property
    def brings(self) -> bool:
        """Whether it is as large as the rule wants, and above 0 over test images and over seeds."""
        return self.mean >= GAIN and self.mean - self.half > 0 and self.mean - self.seeds.half > 0

    @property
    def over_images(self) -> str:
        """`+1.62 (+0.21 to +2.93)`, in points."""
        mean, low, high = (f"{100 * (self.mean + side * self.half):+.2f}".replace("-", "−") for side in (0, -1, 1))
        return f"{mean} ({low} to {high})"


def having(runs: Sequence[Record], *arms: str) -> list[Record]:
    """Those with all of these arms."""
    return [run for run in runs if set(arms) <= set(run["predicted"])]


def decision(records: Sequence[Record]) -> str:
    """The gate's, by the protocol's rule."""
    both = {name: having(runs_of(records, name), *DECIDES) for name in SETS}
    done = [name for name, runs in both.items() if len(runs) == len(SEEDS)]
    gaps = {name: Gap(both[name], *DECIDES) for name in done}
    told = "; ".join(f"{name} {gap.over_images}" for name, gap in gaps.items())
    if len(done) < len(SETS):
        seeds = sum(map(len, both.values()))
        return f"Not run to an end: {seeds} of {len(SETS) * len(SEEDS)} seeds. {told}".strip()
    yes = sum(gap.brings for gap in gaps.values())
    verdict = "Build modular experts" if yes >= ENOUGH else "Don't build modular experts"
    return (
        f"{verdict}: joined minus tuned heads only is at least 2 points, with its intervals above 0, on {yes} of "
        f"{len(SETS)} sets of domains ({told})."
    )


def parts_of(records: Sequence[Record]) -> list[str]:
    """The decision and the tables, as Markdown."""
    found = {name: runs for name in SETS if (runs := runs_of(records, name))}
    return [f"**{decision(records)}**", *(part for title, text in (
        ("Accuracy", _accuracies(found)), ("Differences", _gaps(found)), ("The router of images", _routers(found)),
        ("A domain that is added later", _later(found)), ("Cost", _costs(found)),
    ) for part in (f"### {title}", text)), _origin(records)]  # fmt: skip


def _accuracies(found: Mapping[str, Sequence[Record]]) -> str:
    rows = []
    for name, runs in found.items():
        for arm in dict.fromkeys(arm for run in runs for arm in run["predicted"]):
            own = having(runs, arm)
            values = [100 * accuracy(run, arm) for run in own]
            domains = np.mean([[100 * part.mean() for part in split(run, right(run, arm))] for run in own], 0)
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            rows.append([name, arm, f"{fmean(values):.1f}{spread}", ", ".join(f"{value:.1f}" for value in values),
                         " / ".join(f"{value:.1f}" for value in domains)])  # fmt: skip
    return table(["set", "arm", "test top-1, % ± SD", "by seed", "by domain"], rows, "llrrr")


def _gaps(found: Mapping[str, Sequence[Record]]) -> str:
    rows = []
    for name, runs in found.items():
        for first, second in PAIRS:
            if not (both := having(runs, first, second)):
                continue
            gap = Gap(both, first, second)
            verdict = ("yes" if gap.brings else "no") if (first, second) == DECIDES else ""
            rows.append([name, f"{first} − {second}", gap.over_images, gap.seeds.interval,
                         ", ".join(map(points, gap.seeds.gaps)), verdict])  # fmt: skip
    heads = ["set", "difference", "points (95 % over test images)", "points (95 % over seeds)", "by seed", "enough"]
    return table(heads, rows, "llrrrl")


def _routers(found: Mapping[str, Sequence[Record]]) -> str:
    rows = []
    for name, (run, *_) in found.items():
        for domain, sent in zip(run["domains"], run["sent"], strict=True):
            shares = " / ".join(f"{100 * count / sum(sent):.1f}" for count in sent)
            home = sent[run["domains"].index(domain)] / sum(sent)
            rows.append([name, run["router"], f"{100 * run['routers_on_validation'][run['router']]:.1f}", domain,
                         f"{sum(sent):,}", f"{100 * home:.1f}", shares])  # fmt: skip
    heads = ["set", "router, chosen on validation", "home on validation, %", "test images of", "images", "home, %",
             "sent to each domain in turn, %"]  # fmt: skip
    return table(heads, rows, "llrlrrr")


def _later(found: Mapping[str, Sequence[Record]]) -> str:
    """What becomes of the other domains' answers: accuracy before and after, the mean over domains and seeds."""
    rows = []
    for name, runs in found.items():
        for arm in dict.fromkeys(arm for run in runs for arm in run["earlier"]):
            shares = [before_and_after(run, arm) for run in runs if arm in run["earlier"]]
            before, after = (fmean(share[place] for share in shares) for place in (0, 1))
            rows.append([name, runs[0]["domains"][-1], arm, f"{100 * before:.1f}", f"{100 * after:.1f}",
                         points(after - before), ", ".join(points(b - a) for a, b in shares)])  # fmt: skip
    heads = ["set", "added", "arm", "others before, %", "after, %", "points", "by seed"]
    return table(heads, rows, "lllrrrr")


def before_and_after(run: Record, arm: str) -> tuple[float, float]:
    """Accuracy on all but the last domain before that one is added, and afterwards."""
    after = split(run, right(run, arm))[:-1]
    digits = run["earlier"][arm]
    own = np.array([a == b for a, b in zip(run["labels"][: len(digits)], digits, strict=True)])
    before = np.split(own, np.cumsum(run["test_images"][:-1])[:-1])
    return fmean(float(part.mean()) for part in before), fmean(float(part.mean()) for part in after)


def seconds(runs: Sequence[Record], words: str) -> float:
    """CPU seconds of what is called so, the mean over runs that did it; 0 if none did."""
    each = [sum(time for name, time in run["cpu_s"].items() if name.startswith(words)) for run in runs]
    return fmean([value for value in each if value] or [0.0])


def mebibytes(run: Record) -> list[float]:
    """Of the trunk, all experts, all heads and the router's statistics (class means and one covariance), in float32."""
    size, classes = run["parameters"], sum(run["classes"])
    means = classes * (size["features"] + 1)
    parts = (size["trunk"], len(run["classes"]) * size["expert"], means, size["features"] ** 2 + means)
    return [4 * count / 2**20 for count in parts]


def _costs(found: Mapping[str, Sequence[Record]]) -> str:
    arms = ("router", "heads", "tuned head", "expert", "dense joint", "dense with replay")
    rows = [
        [name, f"{sum(runs[0]['training_images']):,}",
         *(f"{value:.1f}" if (value := seconds(runs, arm)) else "" for arm in arms),
         *(f"{value:.1f}" for value in mebibytes(runs[0]))]
        for name, runs in found.items()
    ]  # fmt: skip
    heads = ["set", "training rows", "router, CPU s", "heads", "tuned heads", "experts", "dense joint",
             "dense with replay", "trunk, MiB in float32", "experts", "heads", "router's statistics"]  # fmt: skip
    return table(heads, rows)


def _origin(records: Sequence[Record]) -> str:
    clean = [run for run in records if not is_dirty(run) and "trains" in run]
    minutes = sum(sum(run["cpu_s"].values()) for run in clean) / 60
    machines = sorted({run["machine"]["cpu"] for run in clean})
    spent = f"{len(clean)} records, {signed(minutes, 0)} CPU minutes beside those of the tokens"
    return f"- {spent}, on {' and '.join(machines)}."
