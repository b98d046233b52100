"""Draw the site's figures from the committed records: `python docs/figures.py`.

moe-block.svg is a drawing; load.svg shows benchmarks/balance/record.json, results.svg differences of docs/results.md.
Plain SVG text, so that `tests/docs/test_figures.py` can compare the files with what is drawn now.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent)]  # benchmarks/ is outside the package

from benchmarks.equal_time import recompute as equal_time  # noqa: E402
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


def figures() -> dict[str, str]:
    """Each file's text by its name."""
    record = json.loads(BALANCE.read_text(encoding="utf-8"))
    return {"moe-block.svg": blocks(), "load.svg": loads(record), "results.svg": forest(effects())}


if __name__ == "__main__":
    for name, drawn in figures().items():
        (IMAGES / name).write_text(drawn, encoding="utf-8")
