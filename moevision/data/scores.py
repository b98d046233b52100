"""Scores of the training images, the lists made of them, and what these lists do to a training.

**Scores** (`scores.csv`): means over visits, of which one is one image in one applied update, in the training's own
forward pass (augmented, with dropout and router noise); p = softmax(logits) [C], y its label. Images are not visited
equally often: a stand-in for a bad file, balanced sampling and the tail that several processes drop.

- `aum`: mean of logit_y - max_{c≠y} logit_c, the area under the margin (arXiv:2001.10528, §3);
- `el2n`: mean of ‖p - onehot(y)‖₂ (arXiv:2107.07075, §2; there over trainings at one epoch);
- `loss_mean`, `loss_last`: -ln p_y, without label smoothing and class weights;
- `p_mean`, `p_std`: mean and standard deviation of p_y, confidence and variability (arXiv:2009.10795, §2);
- `forgetting`: correct at one visit and wrong at the next one (arXiv:1812.05159, algorithm 1), per visit;
- `correct`: share of the visits at which argmax p = y;
- `L<block>.E<expert>`: share of the image's choices that this expert computed, mean over the visits of the last third
  of the training.

**Lists** (`moevision data prune`): with n scored images and the share s, round(s n) are kept; methods differ in what
they give up first, ties are broken at random, no class loses its last image, and an image without a visit is kept:

- `aum` and `loss`: what speaks against its label (small-loss rule: arXiv:1804.06872);
- `el2n` and `forgetting`: what is easy; an image that was never correct counts as forgotten most;
- `ccs`: the share β with the lowest AUM; then it draws equally from strata of equal width in AUM, and all of a
  stratum that has too few (arXiv:2210.15809, algorithm 1; 50 strata as there);
- `random` draws, the baseline: below a kept share of about 30 % scores lost to it (arXiv:2302.06960);
- `decisions`: what a person dropped on the page of `moevision data score`.

**What lists do** (`--data.keep`, `--data.relabel`): CSV files with a row per image, named as in `splits.csv`: `keep` is
`yes` or `no` (without this column a file lists what is kept), `new_label` the class that the image is trained with
(empty: its own). Only training images may be named, and they are chosen after the split is drawn. The result stands in
`splits.csv` (what is left out as `unused`), by which a run goes on.

Axes: n training images, B visits, C classes, E experts, H = sum of the experts over all MoE layers.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from moevision.data.collection import Sample
from moevision.data.splits import Splits
from moevision.errors import UserError, escape_csv_cell, name_bytes
from moevision.files import csv_text, read_csv, write_text_atomic

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_T = TypeVar("_T")

FILE: Final = "scores.csv"
MEASURES: Final = (
    "margin",
    "el2n",
    "loss",
    "p",
    "correct",
)  # what is measured at a visit, in this order
SCORES: Final = (
    "aum",
    "el2n",
    "loss_mean",
    "loss_last",
    "p_mean",
    "p_std",
    "forgetting",
    "correct",
)
METHODS: Final = ("aum", "el2n", "forgetting", "loss", "random", "ccs", "decisions")
DECISIONS: Final = ("keep", "relabel", "drop")
KEEP, NEW_LABEL, DECISION = "keep", "new_label", "decision"
YES, NO = "yes", "no"
LIST_HEAD: Final = f"image,label,{KEEP},{NEW_LABEL},reason"
_SCORES_HEAD: Final = ("image", "label", "visits", *SCORES)
_STRATA: Final = 50
_STARVED: Final = 0.5  # of its former share: below that a class or an expert is warned about
_MAX_ROWS = 20


def row_type(experts: Mapping[int, int]) -> np.dtype[Any]:
    """What is kept of one image; `experts` has the number of experts by block."""
    numbers = ("margin", "el2n", "loss", "loss_last", "p", "p_squares")
    counts = ("visits", "correct", "was_correct", "forgotten", "routed")
    # In half precision a running mean near 1 takes up decreases only: 0.95 became 0.88 in 1,000 visits.
    shares = ("shares", np.float32, (sum(experts.values()),))
    return np.dtype(
        [*((name, np.float32) for name in numbers), *((name, np.int32) for name in counts), shares]
    )


def keys_of(ids: Iterable[str]) -> Ints:
    """[n] 64-bit hashes of stable sample ids; in a checkpoint they stand for the names, which may be long."""
    digests = b"".join(blake2b(name_bytes(name), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, np.int64)


class ScoreSums:
    """The `rows` [n] (`row_type`) of all training images, by their `keys_of` [n]; nothing else changes.

    `experts` has the number of experts by block, in order of depth; it is empty for a dense model.
    """

    def __init__(self, keys: Ints, experts: Mapping[int, int]) -> None:
        self.keys, self.experts = keys, dict(experts)
        self.rows = np.zeros(len(keys), row_type(experts))

    def add(self, index: Ints, measures: Floats, shares: Floats | None = None) -> None:
        """Take visits of images (rows [B]) in their order; an image may be among them several times.

        Measures are [B, 5] (`MEASURES`), the experts' shares [B, H]; None before the last third of the training.
        """
        left = np.arange(len(index))
        while len(left):
            _, first = np.unique(index[left], return_index=True)  # nearly always all of them
            now = left[first]
            left = np.delete(left, first)
            rows = self.rows[index[now]]  # a copy
            margin, el2n, loss, p, correct = measures[now].T
            rows["visits"] += 1
            rows["margin"] += margin
            rows["el2n"] += el2n
            rows["loss"] += loss
            rows["loss_last"] = loss
            # Welford's running mean and squares: the difference of two sums would lose a small spread.
            change = p - rows["p"]
            rows["p"] += change / rows["visits"]
            rows["p_squares"] += change * (p - rows["p"])
            rows["forgotten"] += (rows["was_correct"] > correct).astype(np.int32)
            rows["was_correct"] = correct
            rows["correct"] += rows["was_correct"]
            if shares is not None:
                rows["routed"] += 1
                rows["shares"] += (shares[now] - rows["shares"]) / rows["routed"][:, None]
            self.rows[index[now]] = rows

    def state_dict(self) -> dict[str, Any]:
        """Tensors that share memory with the rows, for a checkpoint."""
        data = torch.from_numpy(self.rows.view(np.uint8).reshape(len(self.rows), -1))
        return {"keys": torch.from_numpy(self.keys.copy()), "rows": data, "layout": self._layout()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Take what a checkpoint has of these images, wherever they stand in it; False if its rows are others."""
        if state["layout"] != self._layout():
            return False
        saved = np.ascontiguousarray(state["rows"].numpy()).view(self.rows.dtype)[:, 0]
        _, here, there = np.intersect1d(
            self.keys, state["keys"].numpy(), assume_unique=True, return_indices=True
        )
        self.rows[here] = saved[there]
        return True

    def _layout(self) -> str:
        return repr((self.rows.dtype.descr, list(self.experts.items())))

    def table(self, images: Sequence[str], labels: Sequence[str]) -> Scores:
        """The scores, with the name and the class of each image."""
        rows, visits = self.rows, self.rows["visits"]
        with np.errstate(invalid="ignore"):  # an image without visits has no scores: 0 / 0
            mean = {
                name: rows[name] / visits.astype(np.float32) for name in ("margin", "el2n", "loss")
            }
            seen, routed = visits > 0, rows["routed"] > 0
            found = {
                "aum": mean["margin"],
                "el2n": mean["el2n"],
                "loss_mean": mean["loss"],
                "loss_last": np.where(seen, rows["loss_last"], np.nan),
                "p_mean": np.where(seen, rows["p"], np.nan),
                "p_std": np.sqrt(rows["p_squares"] / visits),
                "forgetting": rows["forgotten"] / visits,
                "correct": rows["correct"] / visits,
            }
        shares = np.where(routed[:, None], rows["shares"], np.float32(np.nan))
        ends = np.cumsum([*self.experts.values()], dtype=int)
        return Scores(
            list(images),
            list(labels),
            visits.astype(np.int64),
            {name: values.astype(np.float32) for name, values in found.items()},
            dict(
                zip(self.experts, np.split(shares, ends, axis=1), strict=False)
            ),  # nothing is behind the last end
        )


@dataclass(frozen=True)
class Scores:
    """The table: what training found about each of its n images, in the order of the split."""

    images: list[str]  # stable sample ids; read from a file, as `escape_csv_cell` writes them
    labels: list[str]  # the class of each in words
    visits: Ints  # [n], how often each was in an applied update
    scores: dict[str, Floats]  # name (`SCORES`) -> [n]; NaN without visits
    # block -> [n, E], share of the image's choices that each expert computed; NaN where there is none
    experts: dict[int, Floats]

    def write(self, path: Path) -> None:
        """Write the CSV whole or not at all."""
        experts = [
            f"L{block}.E{expert}"
            for block, shares in self.experts.items()
            for expert in range(shares.shape[1])
        ]
        cells = np.concatenate(
            [*(self.scores[name][:, None] for name in SCORES), *self.experts.values()], axis=1
        )
        rows = (
            [
                escape_csv_cell(image),
                escape_csv_cell(label),
                visits,
                *("" if x != x else f"{x:.5g}" for x in numbers.tolist()),
            ]
            for image, label, visits, numbers in zip(
                self.images, self.labels, self.visits.tolist(), cells, strict=True
            )
        )
        write_text_atomic(path, csv_text([*_SCORES_HEAD, *experts], rows))

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read `scores.csv`; raises UserError if the file isn't there or is no such table."""
        try:
            with path.open(newline="", encoding="utf-8") as file:
                lines = csv.reader(file)
                head = next(lines, [])
                if tuple(head[: len(_SCORES_HEAD)]) != _SCORES_HEAD:
                    raise ValueError(f"its first line begins with {','.join(head[:3])}")
                images, labels, numbers = [], [], array("f")
                for image, label, *cells in lines:
                    if len(cells) != len(head) - 2:
                        raise ValueError(
                            f"{image} has {len(cells) + 2} cells and the first line {len(head)}"
                        )
                    images.append(image)
                    labels.append(label)
                    numbers.extend(float(cell or "nan") for cell in cells)
        except OSError as error:
            raise UserError(
                f"{path} can't be read ({error.strerror}): it is in the folder of a run that fit finished, without "
                "--data.scores false, Mixup, CutMix, or 200,000 images and more."
            ) from error
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path} is no table of scores ({error}): fit writes it.") from error
        values = np.frombuffer(numbers, np.float32).reshape(len(images), len(head) - 2)
        blocks = [
            int(name.partition(".E")[0].removeprefix("L")) for name in head[len(_SCORES_HEAD) :]
        ]
        shares = values[:, 1 + len(SCORES) :]
        return cls(
            images,
            labels,
            values[:, 0].astype(np.int64),
            {name: values[:, 1 + column] for column, name in enumerate(SCORES)},
            {block: shares[:, np.array(blocks) == block] for block in dict.fromkeys(blocks)},
        )


# ---- which images to keep


@dataclass
class KeepMask:
    """What becomes of each of n images."""

    keep: npt.NDArray[np.bool_]  # [n]
    reason: Ints  # [n], which of `reasons` it is
    reasons: list[str]  # words, with `{value}` and `{rank}` where they stand in them
    value: Floats  # [n], the score that decided
    rank: Ints  # [n], 1 for the first to keep; 0 without an order
    new_label: dict[int, str] = field(
        default_factory=dict
    )  # row -> class, for those that a person gave another one

    def write(self, path: Path, scores: Scores, *, relabelled: bool) -> None:
        """Write the list: image, label, keep, new_label, reason.

        `relabelled`: the run had other labels than its data; then every row says the label, so that the list is the one
        of `--data.relabel` too.
        """

        def rows() -> Iterator[tuple[str, ...]]:
            for row, label in enumerate(scores.labels):
                new = self.new_label.get(row, label if relabelled else "")
                value = "never learned" if np.isinf(self.value[row]) else f"{self.value[row]:.4g}"
                reason = self.reasons[self.reason[row]].format(value=value, rank=self.rank[row])
                keep = YES if self.keep[row] else NO
                yield (
                    escape_csv_cell(scores.images[row]),
                    escape_csv_cell(label),
                    keep,
                    escape_csv_cell(new),
                    reason,
                )

        try:
            write_text_atomic(path, csv_text(LIST_HEAD.split(","), rows()))
        except OSError as error:
            raise UserError(
                f"{path} can't be written ({error.strerror}): give --out another file."
            ) from error


def prune(
    scores: Scores, by: str, share: float, *, hardest: float = 0.1, seed: int = 0
) -> KeepMask:
    """Choose a share of the scored images to keep by a score (one of `METHODS`, but `decisions`).

    `hardest` is β of `ccs`, the seed that of what is drawn, and of ties.
    """
    known, n = scores.scores, len(scores.images)
    scored = np.flatnonzero(scores.visits > 0)
    if not len(scored):
        raise UserError("The scores are of no image: the training has made no step.")
    count = max(1, round(share * len(scored)))
    # value [n]: the higher the sooner kept
    value = known.get("aum" if by == "ccs" else by, np.zeros(n, np.float32))
    if by == "loss":
        value = -known["loss_mean"]
    if by == "forgetting":
        value = np.where(known["correct"] == 0, np.float32(np.inf), value)
    draw = np.random.default_rng(seed).permutation(len(scored))
    # The last key decides first; equal values stand in the order of the draw.
    order = scored[np.lexsort((draw, -value[scored]))]
    found = KeepMask(np.zeros(n, bool), np.zeros(n, np.int64), [], value, np.zeros(n, np.int64))
    if by == "ccs":
        chosen = _from_strata(found, order, count, hardest, seed)
    else:
        chosen = order[:count]
        said = "drawn" if by == "random" else f"{by} {{value}}"
        found.reasons = [f"{said}: rank {{rank}} of {len(scored):,}"]
    found.value = known["loss_mean"] if by == "loss" else value
    found.keep[chosen] = True
    found.rank[order] = np.arange(1, len(order) + 1)
    never = scores.visits == 0
    _, labels = np.unique(scores.labels, return_inverse=True)
    classes, first = np.unique(
        labels[order], return_index=True
    )  # the first in `order` of each class
    empty = np.bincount(labels[found.keep | never], minlength=labels.max() + 1)[classes] == 0
    for rows, reason in (
        (np.flatnonzero(never), "never visited, so it has no score"),
        (order[first[empty]], "the last of its class"),
    ):
        found.keep[rows] = True
        found.reason[rows] = len(found.reasons)
        found.reasons.append(reason)
    return found


def _from_strata(found: KeepMask, order: Ints, count: int, hardest: float, seed: int) -> Ints:
    """CCS: the images to keep, of those in `order`, by falling AUM; the reasons go into `found`."""
    aum, left = found.value, order[: len(order) - int(hardest * len(order))]
    if len(left) < count:
        raise UserError(
            f"--hardest {hardest:g} drops more than --keep allows: {len(left):,} images are left and {count:,} are to "
            "be kept. Lower one of them."
        )
    low, high = float(aum[left].min()), float(aum[left].max())
    width = (high - low) / _STRATA or 1.0
    stratum = np.minimum((aum[left] - low) / width, _STRATA - 1).astype(np.int64)
    sizes = np.bincount(stratum, minlength=_STRATA)
    generator, budget, drawn = np.random.default_rng(seed), count, {}
    filled = [int(each) for each in np.argsort(sizes, kind="stable") if sizes[each]]
    for done, each in enumerate(filled):  # the smallest first: what it can't give, the others do
        members = left[stratum == each]
        drawn[each] = generator.permutation(members)[: budget // (len(filled) - done)]
        budget -= len(drawn[each])
    found.reasons = [
        f"aum {{value}}: among the {hardest:.0%} with the lowest",
        *(
            f"aum {{value}}: stratum {each + 1} of {_STRATA}, {len(drawn.get(each, ()))} of {sizes[each]} drawn"
            for each in range(_STRATA)
        ),
    ]
    found.reason[left] = 1 + stratum
    return np.concatenate(list(drawn.values()))


def choose_kept_images(scores: Scores, path: Path) -> KeepMask:
    """Choose by the decisions of a person, a CSV with the columns image, decision, new_label."""
    classes = {escape_csv_cell(label) for label in scores.labels}

    def decision(row: Mapping[str, str]) -> tuple[int, str]:
        if row[DECISION] not in DECISIONS:
            raise ValueError(
                f"decision is {row[DECISION]!r} and must be one of {', '.join(DECISIONS)}"
            )
        new = escape_csv_cell(row.get(NEW_LABEL, "")) if row[DECISION] == "relabel" else ""
        if new not in classes and row[DECISION] == "relabel":
            raise ValueError(f"new_label is {new!r}, and the training images have no such class")
        return DECISIONS.index(row[DECISION]), new

    listed = read_list(path, DECISION, decision, "--decisions")
    row_of = {escape_csv_cell(image): row for row, image in enumerate(scores.images)}
    if strange := len(listed.keys() - row_of.keys()):
        raise UserError(
            f"--decisions: {path} names {strange:,} images that the run wasn't trained on: give its own."
        )
    n = len(scores.images)
    reasons = ["decided: keep", "decided: wrong label", "decided: drop", "not decided"]
    found = KeepMask(
        np.ones(n, bool),
        np.full(n, len(DECISIONS)),
        reasons,
        np.zeros(n, np.float32),
        np.zeros(n, np.int64),
    )
    for image, (what, new) in listed.items():
        found.reason[row_of[image]] = what
        if new:
            found.new_label[row_of[image]] = new
    found.keep = found.reason != DECISIONS.index("drop")
    for name, before, after in class_shares(scores, found):
        if before and not after:
            raise UserError(f"{path} leaves no image of the class {name!r}: keep some of it.")
    return found


class Share(NamedTuple):
    """A class or an expert: its name, and its share of the images or choices before and after."""

    name: str
    before: float
    after: float


def class_shares(scores: Scores, kept: KeepMask) -> list[Share]:
    """Share of the images of each class, under the labels before and after."""
    names, numbers = np.unique([*scores.labels, *kept.new_label.values()], return_inverse=True)
    before = numbers[: len(scores.labels)]
    after = before.copy()
    after[list(kept.new_label)] = numbers[len(scores.labels) :]
    shares = [
        np.bincount(each, minlength=len(names)) / max(1, len(each))
        for each in (before, after[kept.keep])
    ]
    return [
        Share(*each)
        for each in zip(names.tolist(), *(share.tolist() for share in shares), strict=True)
    ]


def expert_shares(scores: Scores, keep: npt.NDArray[np.bool_]) -> list[Share]:
    """Share of the choices of its layer that each expert computes; none without routing."""
    found = []
    for block, shares in scores.experts.items():
        routed = ~np.isnan(shares[:, 0])
        if (routed & keep).any():
            both = [
                shares[chosen].mean(0, dtype=np.float64).tolist()
                for chosen in (routed, routed & keep)
            ]
            found += [
                Share(f"L{block}.E{expert}", *each)
                for expert, each in enumerate(zip(*both, strict=True))
            ]
    return found


def starvation_warnings(shares: Sequence[Share], what: str) -> list[str]:
    """A sentence for each whose share has fallen by more than half."""
    return [
        f"{what} {share.name} starves: its share falls from {share.before:.1%} to {share.after:.1%}"
        for share in shares
        if share.after < _STARVED * share.before
    ]


def shares_table(shares: Sequence[Share], what: str) -> list[str]:
    """Lines of a table; of many only those that lose most."""
    rows = list(shares)
    if len(rows) > _MAX_ROWS:
        rows = sorted(rows, key=lambda share: share.after / share.before if share.before else 1.0)[
            :_MAX_ROWS
        ]
    left_out = len(shares) - len(rows)
    width = max([len(what), *(len(share.name) for share in rows)])
    lines = [f"{what:<{width}}   before    after"]
    lines += [f"{share.name:<{width}} {share.before:>8.1%} {share.after:>8.1%}" for share in rows]
    return lines + ([f"and {left_out:,} that lose less"] if left_out else [])


# ---- what lists do to a split


def read_list(
    path: Path, column: str, meaning: Callable[[Mapping[str, str]], _T], option: str
) -> dict[str, _T]:
    """What a CSV says of each image, by its name as `escape_csv_cell` writes it.

    `column` is which it must have, besides `image` (`keep` may be absent); `meaning` of a row raises ValueError if it
    says nothing that can be used; `option` asked for it.
    """
    found: dict[str, _T] = {}
    try:
        for line, row in enumerate(read_csv(path, {"image", column} - {KEEP}), start=2):
            name = escape_csv_cell(row["image"])
            if name in found:
                raise ValueError(f"it lists {name!r} twice: keep one of the rows")
            try:
                found[name] = meaning(row)
            except ValueError as error:
                raise ValueError(f"line {line}: {error}") from error
    except OSError as error:
        raise UserError(
            f"{option}: {path} can't be read ({error.strerror}): give a CSV file."
        ) from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{option}: {path} can't be used: {error}.") from error
    return found


def apply_lists(
    splits: Splits, class_names: Sequence[str], keep: Path | None, relabel: Path | None
) -> Splits:
    """The split with the training images that the files choose under the labels that they give, as it was otherwise."""
    number_of = {escape_csv_cell(name): number for number, name in enumerate(class_names)}

    def new_label(row: Mapping[str, str]) -> int | None:
        name = escape_csv_cell(row[NEW_LABEL])
        if name and name not in number_of:
            raise ValueError(f"the data have no class {name!r} ({', '.join(list(number_of)[:8])})")
        return number_of.get(name)

    def is_kept(row: Mapping[str, str]) -> bool:
        if DECISION in row:
            raise ValueError(
                "it has a column 'decision': `moevision data prune RUN --by decisions --decisions FILE` makes a list "
                "of such a file"
            )
        answer = row.get(KEEP, YES)
        if answer not in (YES, NO):
            raise ValueError(f"keep is {answer!r} and must be {YES} or {NO}")
        return answer == YES

    if relabel is not None:
        train = splits.samples["train"]
        labels = _of_training_images(relabel, NEW_LABEL, new_label, "--data.relabel", splits)
        if not any(label is not None for label in labels):
            raise UserError(f"--data.relabel: {relabel} gives no image a new label: leave it out.")
        new = [
            old if label is None else old._replace(label=label)
            for old, label in zip(train, labels, strict=True)
        ]
        changed = sum(one != other for one, other in zip(new, train, strict=True))
        splits = _with_train(
            splits, new, f"{changed:,} with another label by {relabel.name}", class_names, relabel
        )
    if keep is not None:
        train = splits.samples["train"]
        kept = _of_training_images(keep, KEEP, is_kept, "--data.keep", splits)
        left_out = list(compress(train, (not each for each in kept)))
        found = replace(splits, unused=[*splits.unused, *left_out])
        note = f"{len(left_out):,} left out by {keep.name}"
        splits = _with_train(found, list(compress(train, kept)), note, class_names, keep)
    return splits


def _with_train(
    splits: Splits, train: list[Sample], note: str, class_names: Sequence[str], path: Path
) -> Splits:
    before, after = (
        {sample.label for sample in members} for members in (splits.samples["train"], train)
    )
    if lost := sorted(before - after):
        raise UserError(
            f"{path} leaves the class {class_names[lost[0]]!r} without a training image: keep some of it."
        )
    notes = splits.notes | {"train": f"{splits.notes['train']}, {note}"}
    return replace(splits, samples=splits.samples | {"train": train}, notes=notes)


def _of_training_images(
    path: Path, column: str, meaning: Callable[[Mapping[str, str]], _T], option: str, splits: Splits
) -> list[_T | None]:
    """What the file says of each training image; None where it says nothing."""
    listed = read_list(path, column, meaning, option)
    names = [escape_csv_cell(sample.sample_id) for sample in splits.samples["train"]]
    known = set(names)
    if strangers := [name for name in listed if name not in known]:
        parts = {**splits.samples, "no split": splits.unused}
        place = next(
            (
                s
                for s, part in parts.items()
                if any(escape_csv_cell(e.sample_id) == strangers[0] for e in part)
            ),
            None,
        )
        where = f"it is in {place}" if place else "the data have no such image"
        raise UserError(
            f"{option}: {path} lists {len(strangers):,} images that are not among the training images, the first is "
            f"{strangers[0]!r} ({where}): give a list of these data in this split (--data.seed and the fractions "
            "decide it)."
        )
    return [listed.get(name) for name in names]
