"""Draw the site's figures from the committed records: `python docs/figures.py`.

moe-block.svg is a drawing; load.svg shows benchmarks/balance/record.json, results.svg differences of docs/results.md,
when-experts-pay.svg gains of experts_pay, doses and equal_time, without-its-experts.svg losses of experts_pay.
Plain SVG text, so that `tests/docs/test_figures.py` can compare the files with what is drawn now.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent)]  # benchmarks/ is outside the package

from benchmarks.doses import recompute as doses  # noqa: E402
from benchmarks.equal_time import recompute as equal_time  # noqa: E402
from benchmarks.experts_pay import recompute as experts_pay  # noqa: E402
from benchmarks.records import load, trainings  # noqa: E402
from benchmarks.sparsity import recompute as sparsity  # noqa: E402
from benchmarks.upcycling import recompute as upcycling  # noqa: E402

IMAGES = DOCS / "img"
BALANCE = DOCS.parent / "benchmarks" / "balance" / "record.json"
INK, GREY, LINE, PAPER = "#1f2430", "#5d6470", "#c9ccd3", "#fbfbf9"
# Okabe & Ito's colours and a grey, as the explorer has them for experts.
EXPERTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a8f99")
MINUS = "\N{MINUS SIGN}"


def text(
    x: float,
    y: float,
    words: str,
    size: int = 15,
    anchor: str = "start",
    color: str = INK,
    bold: bool = False,
) -> str:
    """A line of text; y is its baseline."""
    weight = ' font-weight="600"' if bold else ""
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{color}"{weight}'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str = "#ffffff",
    stroke: str = LINE,
    extra: str = "",
) -> str:
    """A rectangle with round corners."""
    style = f'rx="6" fill="{fill}" stroke="{stroke}"{extra}'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {style}/>'


def line(
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    color: str = GREY,
    width: float = 1.5,
    extra: str = "",
) -> str:
    """A straight line."""
    return f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{color}" stroke-width="{width:g}"{extra}/>'


def arrow(x0: float, y0: float, x1: float, y1: float, color: str = GREY, width: float = 1.5) -> str:
    """A line with a head."""
    return line(x0, y0, x1, y1, color, width, ' marker-end="url(#head)"')


def svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    """A drawing on light paper, which is readable on the dark site too."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>'
    )
    body = "\n".join(
        [head, f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>', *parts]
    )
    fonts = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="{fonts}">\n'
        f"<title>{escape(title)}</title>\n{body}\n</svg>\n"
    )


# ---- a dense block and one with experts


def blocks() -> str:
    """One token's way through the MLP of either block."""
    dense, sparse, gap = 84, 404, 178
    parts = [text(dense, 34, "Dense block", 18, "middle", bold=True)]
    parts += [text(sparse, 34, "Mixture-of-Experts block", 18, "middle", bold=True)]
    parts += [line(gap, 20, gap, 424, LINE, 1, ' stroke-dasharray="4 5"')]
    for x, top in ((dense, 332), (sparse, 372)):
        parts += [
            box(x - 60, 384, 120, 36),
            text(x, 408, "a token x", 16, "middle"),
            arrow(x, 384, x, top),
        ]
    parts += [
        box(dense - 68, 196, 136, 132, "#e8eaf0"),
        text(dense, 252, "one MLP", 17, "middle", bold=True),
    ]
    parts += [
        text(dense, 276, "every token uses", 15, "middle", GREY),
        text(dense, 295, "all its weights", 15, "middle", GREY),
    ]
    parts += [
        arrow(dense, 196, dense, 92),
        box(dense - 60, 52, 120, 36),
        text(dense, 76, "MLP(x)", 16, "middle"),
    ]
    parts += [
        box(sparse - 92, 328, 184, 42, "#fff3d6", "#e0b94f"),
        text(sparse, 354, "router: 8 scores", 16, "middle", bold=True),
    ]
    left, step, side = 192, 54, 46
    chosen = {2: "0.7", 5: "0.3"}
    for number, color in enumerate(EXPERTS):
        x, on = left + number * step, number in chosen
        middle = x + side / 2
        style = "" if on else ' stroke-dasharray="4 3"'
        parts.append(
            box(x, 200, side, 60, color if on else "#ffffff", color if on else LINE, style)
        )
        parts.append(text(middle, 236, str(number), 18, "middle", "#ffffff" if on else GREY, on))
        if not on:
            parts.append(line(sparse, 328, middle, 264, LINE, 1))
            continue
        parts += [arrow(sparse, 328, middle, 263, color, 2.5)]
        parts += [arrow(middle, 200, sparse + (middle - sparse) * 0.25, 138, color, 2.5)]
        side_of = -10 if middle < sparse else 10
        parts.append(
            text(
                middle + side_of,
                176,
                f"× {chosen[number]}",
                16,
                "end" if side_of < 0 else "start",
                INK,
                True,
            )
        )
    parts += [text(628, 320, "two of eight run", 15, "end", GREY)]
    parts += [
        f'<circle cx="{sparse}" cy="122" r="16" fill="#ffffff" stroke="{GREY}" stroke-width="1.5"/>'
    ]
    parts += [text(sparse, 128, "+", 20, "middle"), arrow(sparse, 106, sparse, 92)]
    parts += [
        box(sparse - 120, 52, 240, 36),
        text(sparse, 76, "0.7 · f₂(x) + 0.3 · f₅(x)", 16, "middle"),
    ]
    return svg(640, 440, parts, "A dense block and a Mixture-of-Experts block")


# ---- load over a training


def loads(record: Mapping[str, Any]) -> str:
    """Shares of the tokens of each expert over the steps, one panel without and one with a balance loss."""
    parts = []
    width, height, top = 194, 200, 70
    for place, arm in enumerate(record["arms"]):
        x0 = 52 + place * (width + 60)
        steps, shares = arm["steps"], arm["shares"]

        def at(step: float, share: float, x0: float = x0, last: float = steps[-1]) -> str:
            return f"{x0 + width * step / last:.1f} {top + height * (1 - share):.1f}"

        parts.append(text(x0, 34, arm["title"], 17, bold=True))
        parts.append(text(x0, 54, f"busiest: {8 * max(shares[-1]):.1f} × the mean", 15, color=GREY))
        for expert in range(8):
            low = [sum(row[:expert]) for row in shares]
            high = [sum(row[: expert + 1]) for row in shares]
            edge = [at(step, share) for step, share in zip(steps, low, strict=True)]
            back = [at(step, share) for step, share in zip(steps, high, strict=True)][::-1]
            parts.append(
                f'<path d="M{" L".join(edge + back)}Z" fill="{EXPERTS[expert]}" stroke="{PAPER}" stroke-width="1"/>'
            )
        for share in (0, 0.5, 1):
            parts.append(
                text(x0 - 8, top + height * (1 - share) + 5, f"{share:.0%}", 14, "end", GREY)
            )
        for step in (0, steps[-1]):
            anchor = "end" if step else "start"
            parts.append(
                text(
                    x0 + width * step / steps[-1],
                    top + height + 20,
                    f"step {step}" if step else "start",
                    14,
                    anchor,
                    GREY,
                )
            )
    parts.append(
        text(
            260, 324, "share of the patches that each of eight experts computes", 15, "middle", GREY
        )
    )
    return svg(
        520, 340, parts, "Load of eight experts over a training, without and with a balance loss"
    )


# ---- what the studies found


@dataclass(frozen=True)
class Effect:
    """A difference in test accuracy, in points, with the ends of its 95 % interval.

    Attributes:
        verdict: 1 if the first is better, -1 if it is worse, 0 if no difference is shown, by the study's own rule.
    """

    name: str
    mean: float
    low: float
    high: float
    verdict: int

    @property
    def words(self) -> str:
        """`+1.5 (+0.4 to +2.5)`."""
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})".replace("-", MINUS)


def of_hypothesis(name: str, result: sparsity.Result, sign: int = 1) -> Effect:
    """A hypothesis of the sparsity study, or with the sign -1 the other way round."""
    low, high = sorted(100 * sign * end for end in result.difference.interval)
    verdict = {"positive": 1, "negative": -1, "tie": 0}[result.verdict]
    return Effect(name, 100 * sign * result.difference.mean, low, high, sign * verdict)


def of_ends(name: str, ends: Sequence[float], verdict: str) -> Effect:
    """A mean and the ends of its interval, as shares of the test images, and the study's word for it."""
    side = {"better": 1, "above": 1, "worse": -1, "below": -1}
    mean, low, high = (100 * end for end in ends)
    return Effect(name, mean, low, high, side.get(verdict, 0))


def effects() -> list[Effect]:
    """The differences of the figure, from the records."""
    judged = sparsity.judged(sparsity.read_runs())
    runs, upcycled = equal_time.read_runs(), upcycling.read_record()
    at_full_length = equal_time.decide(runs)[1]
    dense_parameters = equal_time.judged_contrasts(runs)[equal_time.CONTRASTS[2]][0]
    minus_continued = upcycling.differences(upcycled, "continued")
    cats = load([f"accuracy/runs.jsonl#cats-{arm}*" for arm in ("moe-s", "dense-s", "dense-d")])
    fine_tuned = trainings.moe_less_dense(*cats)
    with_loss = of_hypothesis("With − without balance loss", judged["H5"])
    return [
        of_hypothesis("Experts − dense model, equal steps", judged["H1"]),
        of_hypothesis("The same, places read", judged["H7"]),
        of_hypothesis("Experts − dense model, equal time", judged["H2"]),
        of_ends(
            "The same after 10 epochs (97 %)",
            equal_time.interval(at_full_length),
            equal_time.lead(runs),
        ),
        of_ends("Dense, larger − smaller (97 %)", equal_time.interval(dense_parameters), ""),
        of_hypothesis("Much sparse compute − little", judged["H3"]),
        of_hypothesis("Learned router − rule by position", judged["H4"]),
        replace(
            with_loss, verdict=0
        ),  # the hypothesis is that it costs at most a point, not which is better
        of_ends(
            "Upcycled − dense, trained on",
            upcycling.interval(minus_continued),
            upcycling.verdict(upcycled, "continued"),
        ),
        of_ends(
            "Fine-tuned: experts − dense",
            [fine_tuned[name] / 100 for name in ("mean", "low", "high")],
            fine_tuned["verdict"],
        ),
    ]


def forest(found: Sequence[Effect]) -> str:
    """For each difference a line of words, and below it a dot and its interval."""
    width, left, right, top, row = 520, 36, 490, 62, 54
    least, most = -2.0, 3.0

    def x(value: float) -> float:
        return round(left + (right - left) * (value - least) / (most - least), 1)

    bottom = top + row * len(found)
    parts = [text(24, 34, "Points of test accuracy, with 95 % intervals", 18, bold=True)]
    for value in range(int(least), int(most) + 1):
        parts.append(
            line(
                x(value),
                top - 6,
                x(value),
                bottom - 4,
                GREY if value == 0 else LINE,
                1.2 if value == 0 else 0.8,
            )
        )
        parts.append(
            text(
                x(value),
                bottom + 14,
                f"{value:+d}".replace("-", MINUS) if value else "0",
                14,
                "middle",
                GREY,
            )
        )
    for place, effect in enumerate(found):
        y = top + row * place
        color = {1: "#0072b2", 0: GREY, -1: "#b84a00"}[effect.verdict]
        parts.append(f'<rect x="20" y="{y}" width="480" height="24" fill="{PAPER}"/>')
        parts.append(text(24, y + 18, effect.name, 16))
        parts.append(text(500, y + 18, effect.words, 16, "end", color, bool(effect.verdict)))
        parts.append(
            line(x(effect.low), y + 36, x(effect.high), y + 36, color, 4, ' stroke-linecap="round"')
        )
        parts.append(f'<circle cx="{x(effect.mean):g}" cy="{y + 36}" r="6.5" fill="{color}"/>')
    note = "Blue: the first is better; orange: worse; grey: neither is shown."
    parts.append(text(24, bottom + 42, note, 15, color=GREY))
    return svg(width, bottom + 58, parts, "Differences in test accuracy that the studies measured")


# ---- when experts pay


@dataclass(frozen=True)
class Gain:
    """Experts minus dense at equal time, in points, and the ends of its interval; `dose`: things to remember."""

    name: str
    mean: float
    low: float
    high: float
    dose: int = 0

    @property
    def color(self) -> str:
        """Blue: experts are better; orange: worse; grey: neither is shown."""
        return "#0072b2" if self.low > 0 else "#b84a00" if self.high < 0 else GREY


def gain_of(name: str, ends: Sequence[float], dose: int = 0) -> Gain:
    """From shares of the test images."""
    mean, low, high = (100 * end for end in ends)
    return Gain(name, mean, low, high, dose)


def texture_gains() -> dict[float, list[Gain]]:
    """CPU seconds of training -> the gains on textures."""
    found: dict[float, list[Gain]] = {}
    for cell in doses.texture_cells():
        gain = gain_of("", cell.gain(doses.EXPERTS), int(cell.dose))
        found.setdefault(cell.seconds, []).append(gain)
    return found


def other_gains() -> list[Gain]:
    """The gains on everything else, the largest first."""
    runs = experts_pay.read_runs()
    pages = [experts_pay.Task(runs, name) for name in ("kinds", "groups")]
    kinds, groups = (experts_pay.pays(task, experts_pay.best_moe(task)) for task in pages)
    cifar10 = equal_time.interval(equal_time.decide(equal_time.read_runs())[1])
    emoji = [gain_of("emoji, 55 kinds", kinds), gain_of("emoji, nine groups", groups)]
    run = [gain_of(name, cell.gain(arm)) for name, cell, arm in doses.SHOWN]
    found = [*run, *emoji, gain_of("photos, CIFAR-10", cifar10)]
    return sorted(found, key=lambda gain: -gain.mean)


def gains(textures: Mapping[float, Sequence[Gain]], others: Sequence[Gain]) -> str:
    """Lines of the gain on textures by their number, one for each time; beside them other tasks on the same scale."""
    left, right, strip, top, bottom = 56, 440, 478, 88, 470
    every = [gain for line_of in textures.values() for gain in line_of] + list(others)
    least = 10 * math.floor(min(gain.low for gain in every) / 10)
    most = 10 * math.ceil(max(gain.high for gain in every) / 10)
    fewest, largest = (
        pick(gain.dose for line_of in textures.values() for gain in line_of) for pick in (min, max)
    )

    def x(dose: float) -> float:
        return (
            left + 14 + (right - left - 60) * math.log(dose / fewest) / math.log(largest / fewest)
        )

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - least) / (most - least), 1)

    parts = [
        text(20, 34, "Experts − dense model at equal time, points of test accuracy", 19, bold=True)
    ]
    parts.append(text(left, 64, "M textures to remember; CPU seconds of training", 15, color=GREY))
    parts.append(text(strip - 4, 64, "other tasks, each in one time", 15, color=GREY))
    parts.append(text(780, bottom + 22, "bars: 95 % intervals, CIFAR-10: 97 %", 14, "end", GREY))
    for value in range(least, most + 1, 10):
        color, width = (GREY, 1.6) if value == 0 else (LINE, 0.8)
        parts.append(line(left, y(value), strip + 40, y(value), color, width))
        label = f"{value:+d}".replace("-", MINUS) if value else "0"
        parts.append(text(left - 8, y(value) + 5, label, 14, "end", GREY))
    for dose in sorted({gain.dose for line_of in textures.values() for gain in line_of}):
        parts.append(
            text(
                x(dose),
                bottom + 22,
                f"{dose:,}" if dose > fewest else f"M = {dose}",
                14,
                "middle",
                GREY,
            )
        )

    for (seconds, found), color in zip(sorted(textures.items()), TIME_COLORS, strict=True):
        path = " ".join(f"{x(gain.dose):.1f},{y(gain.mean)}" for gain in found)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts += [mark(x(gain.dose), gain, y, color) for gain in found]
        peak = max(found, key=lambda gain: gain.mean)
        label = f"{seconds:g} s"
        if len(found) > 1:
            place, anchor = (x(peak.dose) + 10, y(peak.mean) - 8), "start"
        else:  # slopes of other lines pass beside a point alone
            place, anchor = (x(peak.dose), y(peak.high) - 8), "middle"
        parts.append(text(*place, label, 15, anchor, color, bold=True))

    heights = spread([y(gain.mean) for gain in others], 22, top, bottom)
    for place, (gain, height) in enumerate(zip(others, heights, strict=True)):
        middle = strip + 12 * (place % 3)
        parts.append(line(middle + 8, y(gain.mean), strip + 48, height, LINE, 1))
        parts.append(mark(middle, gain, y, gain.color))
        parts.append(text(strip + 52, height + 5, gain.name, 15))
        mean = f"{gain.mean:+.1f}".replace("-", MINUS)
        parts.append(text(780, height + 5, mean, 15, "end", gain.color, bold=True))
    return svg(800, 512, parts, "The gain of experts against how much must be remembered")


TIME_COLORS = ("#56b4e9", "#0072b2", "#00395a")


def mark(x: float, gain: Gain, y: Callable[[float], float], color: str) -> str:
    """A dot and its interval."""
    bar = line(x, y(gain.low), x, y(gain.high), color, 3, ' stroke-linecap="round"')
    return f'{bar}<circle cx="{x:g}" cy="{y(gain.mean):g}" r="5.5" fill="{color}"/>'


def spread(heights: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Increasing heights, moved as little as needed to be `gap` apart and to stay between top and bottom."""
    found = list(heights)
    for _ in range(200):
        for place in range(len(found) - 1):
            missing = gap - (found[place + 1] - found[place])
            if missing > 0:
                found[place] -= missing / 2
                found[place + 1] += missing / 2
        found = [min(max(height, top), bottom) for height in found]
    return [round(height, 1) for height in found]


# ---- what is missed without its experts


@dataclass(frozen=True)
class Loss:
    """Accuracy on a group's own pages and on all others, in percent, with all experts and without the group's.

    `seeds`: in how many the group has an expert, and of how many.
    """

    group: str
    seeds: str
    own: tuple[float, float]
    others: tuple[float, float]
    at_random: float  # own pages, where as many emoji of any group are sent past their experts

    @property
    def lost(self) -> float:
        """Points that its own pages lose."""
        return self.own[0] - self.own[1]


def losses(task: experts_pay.Task, arm: str) -> list[Loss]:
    """Means over the seeds in which a group has an expert, the largest loss first."""
    found = []
    for place, group in enumerate(experts_pay.GROUPS):
        runs = [run["knock_out"] for run in task.of_arm(arm)]
        records = [record for record in runs if group in record["without"]]
        if not records:
            continue
        before = [record["with_all"] for record in records]
        without = [record["without"][group] for record in records]
        after = [entry["accuracy_by_class"] for entry in without]
        own, others = (
            tuple(100 * fmean(of(row) for row in rows) for rows in (before, after))
            for of in (itemgetter(place), partial(experts_pay.others, index=place))
        )
        at_random = own[0] - 100 * fmean(entry["random"] for entry in without)
        seeds = f"{len(records)} of {len(runs)}"
        found.append(Loss(group, seeds, own, others, at_random))
    return sorted(found, key=lambda loss: -loss.lost)


def missed(found: Sequence[Loss]) -> str:
    """For each group the accuracy of its own pages: with all experts, without its own, with as many moved at random."""
    left, right, top, row = 120, 530, 96, 44
    bottom = top + row * len(found)
    least = 10 * math.floor(min(loss.own[1] for loss in found) / 10)

    def x(percent: float) -> float:
        return round(left + (right - left) * (percent - least) / (100 - least), 1)

    title = "A group's experts taken away: accuracy on pages of emoji, %"
    parts = [text(20, 34, title, 19, bold=True)]
    parts += [text(left, 66, "the group's own pages", 15, color=GREY)]
    parts += [
        text(690, 66, "all other pages", 15, "end", GREY),
        text(780, 66, "seeds", 15, "end", GREY),
    ]
    for percent in range(least, 101, 10):
        parts.append(line(x(percent), top - 14, x(percent), bottom - 14, LINE, 0.8))
        parts.append(text(x(percent), bottom + 8, str(percent), 14, "middle", GREY))
    for place, loss in enumerate(found):
        y, (before, after) = top + 10 + row * place, loss.own
        parts.append(text(left - 14, y + 5, loss.group, 16, "end"))
        parts.append(line(x(before), y, x(after), y, MISSED, 4))
        parts.append(f'<circle cx="{x(before):g}" cy="{y}" r="6.5" fill="{INK}"/>')
        parts.append(f'<circle cx="{x(after):g}" cy="{y}" r="6.5" fill="{MISSED}"/>')
        ring = f'fill="none" stroke="{GREY}" stroke-width="2"'
        parts.append(f'<circle cx="{x(loss.at_random):g}" cy="{y}" r="10" {ring}/>')
        change = f"{loss.others[0]:.0f} → {loss.others[1]:.0f}"
        parts.append(text(690, y + 5, change, 16, "end", GREY))
        parts.append(text(780, y + 5, loss.seeds, 16, "end", GREY))
    y = bottom + 36
    for start, words, drawn in (
        (30, "all experts", f'r="6.5" fill="{INK}"'),
        (160, "without its own", f'r="6.5" fill="{MISSED}"'),
        (322, "with as many emoji, at random, sent past their experts", f'r="9" {ring}'),
    ):
        parts.append(f'<circle cx="{start}" cy="{y}" {drawn}/>')
        parts.append(text(start + 16, y + 5, words, 15))
    return svg(800, bottom + 58, parts, "What pages of emoji lose without a group's experts")


MISSED = "#d55e00"


def figures() -> dict[str, str]:
    """Each file's text by its name."""
    record = json.loads(BALANCE.read_text(encoding="utf-8"))
    groups = experts_pay.Task(experts_pay.read_runs(), "groups")
    return {
        "moe-block.svg": blocks(),
        "load.svg": loads(record),
        "results.svg": forest(effects()),
        "when-experts-pay.svg": gains(texture_gains(), other_gains()),
        "without-its-experts.svg": missed(losses(groups, experts_pay.named_arm(groups))),
    }


if __name__ == "__main__":
    for name, drawn in figures().items():
        (IMAGES / name).write_text(drawn, encoding="utf-8")
