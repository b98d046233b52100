"""Which training images to keep: a list with a reason per row, made of a run's scores or of a person's decisions.

Methods differ in what they give up first. With n scored images and the share s, round(s n) are kept:

- `aum` and `loss` give up what speaks against its label: the lowest area under the margin (arXiv:2001.10528), the
  highest mean loss (the small-loss rule, arXiv:1804.06872);
- `el2n` and `forgetting` give up what is easy: the lowest EL2N (arXiv:2107.07075), the least forgotten, where an image
  that was never correct counts as forgotten most (arXiv:1812.05159, §3);
- `ccs` gives up the share β with the lowest AUM, then draws equally from strata of equal width in AUM, and all of a
  stratum that has too few (arXiv:2210.15809, algorithm 1; 50 strata as there);
- `random` draws, the baseline for all others: below a kept share of about 30 % scores lost to it (arXiv:2302.06960);
- `decisions` gives up what a person dropped on the page of `moevision data score`.

Ties are broken at random. No class loses its last image. An image without a visit has no score, and is kept.

Axes: n images, E experts.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from moevision.data.choices import DECISION, KEEP, NEW_LABEL, NO, YES, read_listed
from moevision.data.scores import Floats, Ints, Scores, keys_of, rows_of
from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.names import csv_name

METHODS: Final = ("aum", "el2n", "forgetting", "loss", "random", "ccs", "decisions")
DECISIONS: Final = ("keep", "relabel", "drop")
HEAD: Final = f"image,label,{KEEP},{NEW_LABEL},reason"
STRATA: Final = 50
STARVED: Final = 0.5  # of its former share: below that a class or an expert is warned about
_BLOCK = 10_000
_MAX_ROWS = 20
Bools = npt.NDArray[np.bool_]


@dataclass
class Plan:
    """What becomes of each of n images.

    Attributes:
        keep: [n].
        reason: [n], which of `reasons` it is.
        reasons: words, with `{value}` and `{rank}` where they stand in them.
        value: [n], the score that decided.
        rank: [n], 1 for the first to keep.
        new_label: row -> class, for those that a person gave another one.
    """

    keep: Bools
    reason: Ints
    reasons: list[str]
    value: Floats
    rank: Ints = field(init=False)
    new_label: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Without ranks so far."""
        self.rank = np.zeros(len(self.keep), np.int64)

    def write(self, path: Path, scores: Scores, *, relabelled: bool) -> None:
        """Write the list: image, label, keep, new_label, reason.

        Args:
            path: the file, replaced if it is there.
            scores: whose images these are.
            relabelled: whether the run had other labels than its data: then every row says the label, so that the list
                is the one of `--data.relabel` too.

        Raises:
            UserError: if it can't be written.
        """
        try:
            write_text_atomic(path, self._text(scores, relabelled))
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}): give --out another file.") from error

    def _text(self, scores: Scores, relabelled: bool) -> Iterator[str]:
        yield HEAD + "\n"
        for start in range(0, len(self.keep), _BLOCK):
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            for row in range(start, min(start + _BLOCK, len(self.keep))):
                label = scores.labels[row]
                new = self.new_label.get(row, label if relabelled else "")
                value = "never learned" if np.isinf(self.value[row]) else f"{self.value[row]:.4g}"
                reason = self.reasons[self.reason[row]].format(value=value, rank=self.rank[row])
                keep = YES if self.keep[row] else NO
                writer.writerow([csv_name(scores.images[row]), csv_name(label), keep, csv_name(new), reason])
            yield text.getvalue()


def prune(scores: Scores, by: str, share: float, *, hardest: float = 0.1, seed: int = 0) -> Plan:
    """Choose by a score.

    Args:
        scores: of the training images.
        by: one of `METHODS`, but `decisions`.
        share: of the scored images to keep, in (0, 1].
        hardest: β of `ccs`.
        seed: of what is drawn, and of ties.

    Raises:
        UserError: if nothing was scored, or β leaves fewer images than are to be kept.
    """
    scored = np.flatnonzero(scores.visits > 0)
    if not len(scored):
        raise UserError("The scores are of no image: the training has made no step.")
    count = max(1, round(share * len(scored)))
    draw = np.random.default_rng(seed).permutation(len(scored))
    value = _values(scores, by)
    # The last key decides first; equal values stand in the order of the draw.
    order = scored[np.lexsort((draw, -value[scored]))]
    if by == "ccs":
        chosen, plan = _stratified(value, order, count, hardest, seed)
    else:
        chosen = order[:count]
        said = "drawn" if by == "random" else f"{by} {{value}}"
        reasons = [f"{said}: rank {{rank}} of {len(scored):,}"]
        plan = Plan(np.zeros(len(value), bool), np.zeros(len(value), np.int64), reasons, value)
    plan.value = scores.scores["loss_mean"] if by == "loss" else plan.value
    plan.keep[chosen] = True
    plan.rank[order] = np.arange(1, len(order) + 1)
    _keep_unscored(plan, scores.visits)
    _keep_a_last_one(plan, class_numbers(scores.labels)[0], order)
    return plan


def _values(scores: Scores, by: str) -> Floats:
    """[n], the higher the sooner kept."""
    known = scores.scores
    if by == "forgetting":
        return np.where(known["correct"] == 0, np.float32(np.inf), known["forgetting"])
    if by == "random":
        return np.zeros(len(scores.images), np.float32)
    return -known["loss_mean"] if by == "loss" else known["aum" if by == "ccs" else by]


def _stratified(aum: Floats, order: Ints, count: int, hardest: float, seed: int) -> tuple[Ints, Plan]:
    """CCS: the images to keep, and a plan with the reasons; `order` is by falling AUM."""
    left = order[: len(order) - int(hardest * len(order))]
    if len(left) < count:
        raise UserError(
            f"--hardest {hardest:g} drops more than --keep allows: {len(left):,} images are left and {count:,} are to "
            "be kept. Lower one of them."
        )
    low, high = float(aum[left].min()), float(aum[left].max())
    width = (high - low) / STRATA or 1.0
    stratum = np.minimum((aum[left] - low) / width, STRATA - 1).astype(np.int64)
    sizes = np.bincount(stratum, minlength=STRATA)
    generator, budget, drawn = np.random.default_rng(seed), count, {}
    filled = [int(each) for each in np.argsort(sizes, kind="stable") if sizes[each]]
    for done, each in enumerate(filled):  # the smallest first: what it can't give, the others do
        members = left[stratum == each]
        drawn[each] = generator.permutation(members)[: budget // (len(filled) - done)]
        budget -= len(drawn[each])
    reasons = [f"aum {{value}}: among the {hardest:.0%} with the lowest", *(
        f"aum {{value}}: stratum {each + 1} of {STRATA}, {len(drawn.get(each, ()))} of {sizes[each]} drawn"
        for each in range(STRATA)
    )]  # fmt: skip
    reason = np.zeros(len(aum), np.int64)
    reason[left] = 1 + stratum
    plan = Plan(np.zeros(len(aum), bool), reason, reasons, aum)
    return np.concatenate(list(drawn.values())), plan


def _keep_unscored(plan: Plan, visits: Ints) -> None:
    plan.reasons.append("never visited, so it has no score")
    without = visits == 0
    plan.keep |= without
    plan.reason[without] = len(plan.reasons) - 1


def _keep_a_last_one(plan: Plan, labels: Ints, order: Ints) -> None:
    """Keep the first in `order` of each class that would be empty."""
    plan.reasons.append("the last of its class")
    kept = np.bincount(labels[plan.keep], minlength=labels.max() + 1)
    classes, first = np.unique(labels[order], return_index=True)
    last = order[first[kept[classes] == 0]]
    plan.keep[last] = True
    plan.reason[last] = len(plan.reasons) - 1


def decide(scores: Scores, path: Path) -> Plan:
    """Choose by the decisions of a person, a CSV with the columns image, decision, new_label.

    Raises:
        UserError: if the file can't be used, or drops all images of a class.
    """
    n, words, names = len(scores.images), [*DECISIONS, ""], [""]
    classes = {csv_name(label) for label in scores.labels}

    def number(row: Mapping[str, str]) -> int:
        if row[DECISION] not in DECISIONS:
            raise ValueError(f"decision is {row[DECISION]!r} and must be one of {', '.join(DECISIONS)}")
        if row[DECISION] != "relabel":
            return words.index(row[DECISION]) - len(words)  # negative: no name
        new = csv_name(row.get(NEW_LABEL, ""))
        if new not in classes:
            raise ValueError(f"new_label is {new!r}, and the training images have no such class")
        names.append(new)
        return len(names) - 1

    keys, numbers = read_listed(path, DECISION, number, "--decisions")
    place = rows_of(keys_of(map(csv_name, scores.images)), keys)
    if strange := int((place < 0).sum()):
        raise UserError(f"--decisions: {path} names {strange:,} images that the run wasn't trained on: give its own.")
    reason = np.full(n, len(words) - 1)
    reason[place] = np.where(numbers < 0, numbers + len(words), words.index("relabel"))
    reasons = ["decided: keep", "decided: wrong label", "decided: drop", "not decided"]
    new_label = {int(row): names[name] for row, name in zip(place, numbers, strict=True) if name > 0}
    plan = Plan(reason != words.index("drop"), reason, reasons, np.zeros(n, np.float32), new_label)
    for name, before, after in class_shares(scores, plan):
        if before and not after:
            raise UserError(f"{path} leaves no image of the class {name!r}: keep some of it.")
    return plan


class Share(NamedTuple):
    """A class or an expert: its name, and its share of the images or choices before and after."""

    name: str
    before: float
    after: float


def class_numbers(labels: Sequence[str]) -> tuple[Ints, list[str]]:
    """[n] numbers of the classes, and their names in the order in which they occur."""
    numbers: dict[str, int] = {}
    found = np.fromiter((numbers.setdefault(label, len(numbers)) for label in labels), np.int64, len(labels))
    return found, list(numbers)


def class_shares(scores: Scores, plan: Plan) -> list[Share]:
    """Share of the images of each class, under the labels before and after."""
    numbers, names = class_numbers([*scores.labels, *plan.new_label.values()])
    before = numbers[: len(scores.labels)]
    after = before.copy()
    after[list(plan.new_label)] = numbers[len(scores.labels) :]
    shares = [np.bincount(each, minlength=len(names)) / max(1, len(each)) for each in (before, after[plan.keep])]
    return sorted(map(Share, names, *(each.tolist() for each in shares)))


def expert_shares(scores: Scores, keep: Bools) -> list[Share]:
    """Share of the choices of its layer that each expert computes; none without routing."""
    found = []
    for block, shares in scores.experts.items():
        routed = ~np.isnan(shares[:, 0])
        if (routed & keep).any():
            both = [shares[chosen].mean(0, dtype=np.float64).tolist() for chosen in (routed, routed & keep)]
            found += [Share(f"L{block}.E{expert}", *each) for expert, each in enumerate(zip(*both, strict=True))]
    return found


def starved(shares: Sequence[Share], what: str) -> list[str]:
    """A sentence for each whose share has fallen by more than half."""
    return [
        f"{what} {share.name} starves: its share falls from {share.before:.1%} to {share.after:.1%}"
        for share in shares
        if share.after < STARVED * share.before
    ]


def shares_table(shares: Sequence[Share], what: str) -> list[str]:
    """Lines of a table; of many only those that lose most."""
    rows = list(shares)
    if len(rows) > _MAX_ROWS:
        rows = sorted(rows, key=lambda share: share.after / share.before if share.before else 1.0)[:_MAX_ROWS]
    left_out = len(shares) - len(rows)
    width = max([len(what), *(len(share.name) for share in rows)])
    lines = [f"{what:<{width}}   before    after"]
    lines += [f"{share.name:<{width}} {share.before:>8.1%} {share.after:>8.1%}" for share in rows]
    return lines + ([f"and {left_out:,} that lose less"] if left_out else [])
