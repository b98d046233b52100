"""Scores of the training images, lists of images to keep or relabel, and how a split is changed by such lists.

**Scores** (`scores.csv`): means over an image's visits. A visit is one image in one optimizer step that was applied;
its outputs are those of the training's own forward pass (augmented, with dropout and router noise). p = softmax(logits)
[C], y is the image's label. The number of visits differs between images: a bad file is replaced by another image,
sampling may be balanced, and several processes drop the last images of an epoch.

- `aum`: mean of logit_y - max_{c≠y} logit_c, the area under the margin (arXiv:2001.10528, §3);
- `el2n`: mean of ‖p - onehot(y)‖₂ (arXiv:2107.07075, §2; there over trainings at one epoch);
- `loss_mean`, `loss_last`: -ln p_y, without label smoothing and class weights;
- `p_mean`, `p_std`: mean and standard deviation of p_y, confidence and variability (arXiv:2009.10795, §2);
- `forgetting`: correct at one visit and wrong at the next one (arXiv:1812.05159, algorithm 1), per visit;
- `correct`: share of the visits at which argmax p = y;
- `L<block>.E<expert>`: share of the image's token choices that this expert computed, mean over the visits in the last
  third of the training.

**Lists** (`moevision data prune`): of n images with scores and a share s to keep, round(s n) are kept. Ties are broken
at random, every class keeps at least one image, and images without a visit are kept. The methods differ in which images
they drop first:

- `aum` and `loss`: images whose label seems wrong (small-loss rule: arXiv:1804.06872);
- `el2n` and `forgetting`: easy images; one that was never classified correctly counts as the most forgotten;
- `ccs`: the share β with the lowest AUM; the rest is divided into 50 strata of equal width in AUM, and the same number
  of images is drawn from each, or all of a stratum that has fewer (arXiv:2210.15809, algorithm 1);
- `random`: images drawn at random, the baseline: below a kept share of about 30 % it beat the scores
  (arXiv:2302.06960);
- `decisions`: the images that a person dropped on the page of `moevision data score`.

**Using lists** (`--data.keep`, `--data.relabel`): CSV files with one row per image, named as in `splits.csv`. `keep` is
`yes` or `no` (without this column all listed images are kept); `new_label` is the class that the image is trained with
(empty: its own). Only training images may be listed, and the lists are applied after the split is drawn. The result is
written to `splits.csv`, where dropped images are `unused`; a resumed run reads the split from there.

Axes: n training images, B visits, C classes, E experts, H = sum of the experts over all MoE layers.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moevision.data.collection import Sample, labels_in
from moevision.data.splits import Splits
from moevision.errors import UserError, escape_csv_cell, name_bytes
from moevision.files import csv_text, read_csv, write_text_atomic
from moevision.types import Array, Flags, Floats, Ints, State

FILE = "scores.csv"
# The columns that are measured at each visit, in this order.
MEASURES = ("margin", "el2n", "loss", "p", "correct")
SCORES = (
    "aum",
    "el2n",
    "loss_mean",
    "loss_last",
    "p_mean",
    "p_std",
    "forgetting",
    "correct",
)
METHODS = ("aum", "el2n", "forgetting", "loss", "random", "ccs", "decisions")
# A person's decision -> the reason in the list.
DECISIONS = {
    "keep": "decided: keep",
    "relabel": "decided: wrong label",
    "drop": "decided: drop",
}
KEEP, NEW_LABEL, DECISION = "keep", "new_label", "decision"
YES, NO = "yes", "no"
LIST_HEAD = f"image,label,{KEEP},{NEW_LABEL},reason"
_SCORES_HEAD = ("image", "label", "visits", *SCORES)
_STRATA = 50
_STARVATION_RATIO = 0.5  # new / former share below which a class or an expert is warned about
_MAX_ROWS = 20  # of a printed table


def row_type(experts: Mapping[int, int]) -> np.dtype[Any]:
    """The dtype of one image's running sums and means; `experts` is block -> number of experts."""
    means = ("margin", "el2n", "loss", "loss_last", "p", "p_squares")
    counts = ("visits", "correct", "was_correct", "forgotten", "routed")
    fields: list[Any] = [(name, np.float32) for name in means]
    fields += [(name, np.int32) for name in counts]
    # Not float16: it rounded away small increases of a running mean near 1: 0.95 became 0.88 in 1,000 visits.
    fields.append(("shares", np.float32, (sum(experts.values()),)))
    return np.dtype(fields)


def keys_of(ids: Iterable[str]) -> Ints:
    """[n] 64-bit hashes of stable sample ids, which identify images in a checkpoint; ids may be long."""
    digests = b"".join(blake2b(name_bytes(name), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, np.int64)


class ScoreSums:
    """Running sums and means over visits: `rows` [n] of dtype `row_type`, one per training image.

    `keys` [n] are the images' `keys_of`. `experts` is block -> number of experts, in order of depth; it is empty for a
    dense model. Visits change `rows` alone.
    """

    def __init__(self, keys: Ints, experts: Mapping[int, int]) -> None:
        self.keys = keys
        self.experts = dict(experts)
        self.rows = np.zeros(len(keys), row_type(experts))

    def add(self, index: Ints, measures: Floats, shares: Floats | None = None) -> None:
        """Add visits in their order; `index` [B] is each one's row, and may hold an image several times.

        Measures are [B, 5] (`MEASURES`), the experts' shares [B, H]; None before the last third of the training.
        """
        remaining = np.arange(len(index))  # visits that aren't added yet
        while len(remaining):
            # One visit of each image at a time, the first of the remaining ones; nearly always these are all.
            _, first = np.unique(index[remaining], return_index=True)
            visits = remaining[first]
            visit_shares = None if shares is None else shares[visits]
            self._add_distinct(index[visits], measures[visits], visit_shares)
            remaining = np.delete(remaining, first)

    def _add_distinct(self, index: Ints, measures: Floats, shares: Floats | None) -> None:
        """Add visits of distinct images."""
        rows = self.rows[index]  # a copy, [B]
        margin, el2n, loss, p, correct = measures.T
        rows["visits"] += 1
        rows["margin"] += margin
        rows["el2n"] += el2n
        rows["loss"] += loss
        rows["loss_last"] = loss

        # Welford's running mean and sum of squared deviations: a difference of two sums would lose a small spread.
        change = p - rows["p"]
        rows["p"] += change / rows["visits"]
        rows["p_squares"] += change * (p - rows["p"])

        # Forgotten: correct at the visit before, and wrong now.
        rows["forgotten"] += (rows["was_correct"] > correct).astype(np.int32)
        rows["was_correct"] = correct
        rows["correct"] += rows["was_correct"]
        if shares is not None:
            rows["routed"] += 1
            rows["shares"] += (shares - rows["shares"]) / rows["routed"][:, None]
        self.rows[index] = rows

    def state_dict(self) -> State:
        """The state for a checkpoint; its tensor of rows shares memory with `rows`."""
        data = torch.from_numpy(self.rows.view(np.uint8).reshape(len(self.rows), -1))  # [n, bytes]
        return {"keys": torch.from_numpy(self.keys.copy()), "rows": data, "layout": self._layout()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Load the rows of these images, in whatever order a checkpoint has them; False if it has other columns."""
        if state["layout"] != self._layout():
            return False
        saved_rows = np.ascontiguousarray(state["rows"].numpy()).view(self.rows.dtype)[:, 0]
        _, own_index, saved_index = np.intersect1d(
            self.keys, state["keys"].numpy(), assume_unique=True, return_indices=True
        )
        self.rows[own_index] = saved_rows[saved_index]
        return True

    def _layout(self) -> str:
        return repr((self.rows.dtype.descr, list(self.experts.items())))

    def table(self, images: Sequence[str], labels: Sequence[str]) -> Scores:
        """The scores, with the name and the class of each image."""
        rows = self.rows
        visits = rows["visits"].astype(np.int64)
        divisor = np.maximum(visits, 1)
        scores = {
            "aum": rows["margin"] / divisor,
            "el2n": rows["el2n"] / divisor,
            "loss_mean": rows["loss"] / divisor,
            "loss_last": rows["loss_last"],
            "p_mean": rows["p"],
            "p_std": np.sqrt(rows["p_squares"] / divisor),
            "forgetting": rows["forgotten"] / divisor,
            "correct": rows["correct"] / divisor,
        }
        shares = _nan_where(rows["routed"][:, None] == 0, rows["shares"])  # [n, H]
        ends = np.cumsum([*self.experts.values()], dtype=int)
        # [n, E] each, and an empty one after the last end
        shares_by_block = np.split(shares, ends, axis=1)
        return Scores(
            images=list(images),
            labels=list(labels),
            visits=visits,
            scores={name: _nan_where(visits == 0, values) for name, values in scores.items()},
            experts=dict(zip(self.experts, shares_by_block, strict=False)),
        )


def _nan_where(is_unknown: Flags, values: Array) -> Floats:
    return np.where(is_unknown, np.nan, values).astype(np.float32)


@dataclass(frozen=True)
class Scores:
    """The table of scores: one row for each of n training images, in the order of the split."""

    images: list[str]  # stable sample ids; if read from a file, escaped by `escape_csv_cell`
    labels: list[str]  # class names
    visits: Ints  # [n], how often each was in an applied update
    scores: dict[str, Floats]  # name (`SCORES`) -> [n]; NaN without visits
    # block -> [n, E], share of the image's token choices that each expert computed; NaN if none was counted
    experts: dict[int, Floats]

    def write(self, path: Path) -> None:
        """Write the CSV whole or not at all."""
        head = list(_SCORES_HEAD)
        for block, shares in self.experts.items():
            head += [f"L{block}.E{expert}" for expert in range(shares.shape[1])]
        columns = [*map(self.scores.__getitem__, SCORES), *self.experts.values()]
        numbers = np.column_stack(columns)  # [n, columns]
        write_text_atomic(path, csv_text(head, self._rows(numbers)))

    def _rows(self, numbers: Floats) -> Iterator[list[Any]]:
        """The cells of each image; NaN is written as an empty cell."""
        for row, image in enumerate(self.images):
            cells = ["" if math.isnan(x) else f"{x:.5g}" for x in numbers[row].tolist()]
            label = escape_csv_cell(self.labels[row])
            yield [escape_csv_cell(image), label, int(self.visits[row]), *cells]

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read `scores.csv`; raises UserError if the file isn't there or is no such table."""
        images, labels, numbers = [], [], array("f")
        try:
            with path.open(newline="", encoding="utf-8") as file:
                lines = csv.reader(file)
                head = next(lines, [])
                if tuple(head[: len(_SCORES_HEAD)]) != _SCORES_HEAD:
                    raise ValueError(f"its first line begins with {','.join(head[:3])}")
                for image, label, *cells in lines:
                    images.append(image)
                    labels.append(label)
                    numbers.extend(float(cell or "nan") for cell in cells)
            # All columns but the two names.
            values = np.frombuffer(numbers, np.float32).reshape(len(images), len(head) - 2)
        except OSError as error:
            raise UserError(
                f"{path} can't be read ({error.strerror}): it is in the folder of a run that fit finished, without "
                "--data.scores false, Mixup, CutMix, several labels of an image, or 200,000 images and more."
            ) from error
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path} is no table of scores ({error}): fit writes it.") from error

        # Visits [n, 1], scores [n, 8], the experts' shares [n, H].
        visits, scores, shares = np.split(values, [1, 1 + len(SCORES)], axis=1)
        expert_names = head[len(_SCORES_HEAD) :]  # L<block>.E<expert>
        blocks = np.array([int(name.split(".")[0].removeprefix("L")) for name in expert_names], int)
        return cls(
            images=images,
            labels=labels,
            visits=visits[:, 0].astype(np.int64),
            scores=dict(zip(SCORES, scores.T, strict=True)),
            experts={block: shares[:, blocks == block] for block in dict.fromkeys(blocks.tolist())},
        )


# ---- which images to keep


@dataclass
class KeepMask:
    """Which of n images are kept, why, and under which labels."""

    keep: Flags  # [n]
    reason: list[str]  # of each image
    # row -> class, for images that a person relabelled
    new_label: dict[int, str] = field(default_factory=dict)

    def write(self, path: Path, scores: Scores, *, relabelled: bool) -> None:
        """Write the list: image, label, keep, new_label, reason.

        `relabelled` says that the run was trained with `--data.relabel`. Then `new_label` is filled in every row, so
        that the list can be passed to `--data.relabel` too.
        """
        rows = (self._cells(row, scores, relabelled) for row in range(len(scores.images)))
        text = csv_text(LIST_HEAD.split(","), rows)
        try:
            write_text_atomic(path, text)
        except OSError as error:
            raise UserError(
                f"{path} can't be written ({error.strerror}): give --out another file."
            ) from error

    def _cells(self, row: int, scores: Scores, relabelled: bool) -> list[str]:
        label = scores.labels[row]
        new_label = self.new_label.get(row, label if relabelled else "")
        image = escape_csv_cell(scores.images[row])
        keep = YES if self.keep[row] else NO
        return [image, escape_csv_cell(label), keep, escape_csv_cell(new_label), self.reason[row]]


def prune(
    scores: Scores, by: str, share: float, *, hardest: float = 0.1, seed: int = 0
) -> KeepMask:
    """Choose a share of the scored images to keep by a score (one of `METHODS`, but `decisions`).

    `hardest` is β of `ccs`; `seed` decides what is drawn, and the order of ties.
    """
    scored = np.flatnonzero(scores.visits)  # rows of images with scores
    count = max(1, round(share * len(scored)))

    priority = _priority(scores, by)
    tie_breaker = np.random.default_rng(seed).permutation(len(scored))
    # Rows by falling priority: `lexsort` sorts by its last key first.
    order = scored[np.lexsort((tie_breaker, -priority[scored]))]

    value = scores.scores["loss_mean"] if by == "loss" else priority
    mask = KeepMask(scores.visits == 0, ["never visited, so it has no score"] * len(scores.images))
    if by == "ccs":
        _keep_from_strata(mask, priority, order, count, hardest, seed)
    else:
        mask.keep[order[:count]] = True
        for rank, row in enumerate(order.tolist(), start=1):
            measured = "drawn" if by == "random" else f"{by} {value[row]:.4g}"
            mask.reason[row] = f"{measured}: rank {rank} of {len(order):,}"

    # The image of the highest priority of each class of which none is kept.
    _, labels = np.unique(scores.labels, return_inverse=True)  # [n]
    classes, best_of_class = np.unique(labels[order], return_index=True)  # positions in `order`
    is_emptied = ~np.isin(classes, labels[mask.keep])
    for row in order[best_of_class[is_emptied]].tolist():
        mask.keep[row] = True
        mask.reason[row] = "the last of its class"
    return mask


def _priority(scores: Scores, by: str) -> Floats:
    """The value [n] of each image by which they are kept, the highest first."""
    if by == "random":
        return np.zeros(len(scores.images), np.float32)
    if by == "loss":
        return -scores.scores["loss_mean"]
    if by == "forgetting":
        never_correct = scores.scores["correct"] == 0
        return np.where(never_correct, np.float32(np.inf), scores.scores["forgetting"])
    return scores.scores["aum" if by == "ccs" else by]


def _keep_from_strata(
    mask: KeepMask, aum: Floats, order: Ints, count: int, hardest: float, seed: int
) -> None:
    """CCS: keep `count` of the rows in `order`, which is by falling AUM."""
    num_hardest = int(hardest * len(order))
    candidates, lowest = np.split(order, [len(order) - num_hardest])
    if len(candidates) < count:
        raise UserError(
            f"--hardest {hardest:g} drops more than --keep allows: {len(candidates):,} images are left and {count:,} "
            "are to be kept. Lower one of them."
        )
    for row in lowest.tolist():
        mask.reason[row] = f"aum {aum[row]:.4g}: among the {hardest:.0%} with the lowest"

    low, high = float(aum[candidates].min()), float(aum[candidates].max())
    width = (high - low) / _STRATA or 1.0
    stratum_of = np.minimum((aum[candidates] - low) / width, _STRATA - 1).astype(np.int64)
    sizes = np.bincount(stratum_of)

    # The smallest stratum first: if it has fewer images than its quota, the quotas of the others grow.
    rng = np.random.default_rng(seed)
    smallest_first = [stratum for stratum in np.argsort(sizes, kind="stable") if sizes[stratum]]
    for num_done, stratum in enumerate(smallest_first):
        members = rng.permutation(candidates[stratum_of == stratum])
        quota = count // (len(smallest_first) - num_done)
        drawn = members[:quota]
        count -= len(drawn)
        mask.keep[drawn] = True
        of_stratum = f"stratum {stratum + 1} of {_STRATA}, {len(drawn)} of {len(members)} drawn"
        for row in members.tolist():
            mask.reason[row] = f"aum {aum[row]:.4g}: {of_stratum}"


def choose_kept_images(scores: Scores, path: Path) -> KeepMask:
    """Keep, relabel or drop images by a person's decisions: a CSV with the columns image, decision, new_label."""
    classes = {escape_csv_cell(label) for label in scores.labels}
    index_of = {escape_csv_cell(image): index for index, image in enumerate(scores.images)}
    rows = read_list(path, DECISION, "--decisions")
    if unknown := len(rows.keys() - index_of.keys()):
        raise UserError(
            f"--decisions: {path} names {unknown:,} images that the run wasn't trained on: give its own."
        )
    mask = KeepMask(np.ones(len(index_of), bool), ["not decided"] * len(index_of))
    for image, row in rows.items():
        decision = row.cells[DECISION]
        if decision not in DECISIONS:
            raise row.mistake(f"decision is {decision!r} and must be one of {', '.join(DECISIONS)}")
        if decision == "relabel":
            new_label = escape_csv_cell(row.cells.get(NEW_LABEL, ""))
            if new_label not in classes:
                raise row.mistake(
                    f"new_label is {new_label!r}, and the training images have no such class"
                )
            mask.new_label[index_of[image]] = new_label
        mask.reason[index_of[image]] = DECISIONS[decision]
        mask.keep[index_of[image]] = decision != "drop"
    return mask


class Share(NamedTuple):
    """A class or an expert: its name, and its share of the images or token choices before and after pruning."""

    name: str
    before: float
    after: float


def class_shares(scores: Scores, mask: KeepMask) -> list[Share]:
    """Each class's share of the images, before and after images are dropped and relabelled."""
    new_labels = [mask.new_label.get(row, label) for row, label in enumerate(scores.labels)]
    before = Counter(scores.labels)
    after = Counter(compress(new_labels, mask.keep.tolist()))
    return [
        Share(name, before[name] / max(1, before.total()), after[name] / max(1, after.total()))
        for name in sorted(before.keys() | mask.new_label.values())
    ]


def expert_shares(scores: Scores, keep: Flags) -> list[Share]:
    """Each expert's share of the token choices of its layer, before and after; empty if no routing was counted."""
    result = []
    for block, shares in scores.experts.items():
        is_routed = ~np.isnan(shares[:, 0])
        before = shares[is_routed].mean(0, dtype=np.float64)
        after = shares[is_routed & keep].mean(0, dtype=np.float64)
        for expert, pair in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            result.append(Share(f"L{block}.E{expert}", *pair))
    return result


def starvation_warnings(shares: Sequence[Share], what: str) -> list[str]:
    """A sentence for each share that has fallen by more than half; `what` is class or expert."""
    return [
        f"{what} {share.name} starves: its share falls from {share.before:.1%} to {share.after:.1%}"
        for share in shares
        if share.after < _STARVATION_RATIO * share.before
    ]


def shares_table(shares: Sequence[Share], what: str) -> list[str]:
    """Lines of a table headed by `what`, of the shares that fall most if there are more than `_MAX_ROWS`."""
    rows = list(shares)
    if len(rows) > _MAX_ROWS:
        rows = sorted(rows, key=lambda share: share.after / (share.before or 1))[:_MAX_ROWS]
    num_hidden = len(shares) - len(rows)
    width = max(map(len, [what, *(share.name for share in rows)]))
    lines = [f"{what:<{width}}   before    after"]
    lines += [f"{share.name:<{width}} {share.before:>8.1%} {share.after:>8.1%}" for share in rows]
    if num_hidden:
        lines.append(f"and {num_hidden:,} that lose less")
    return lines


# ---- lists are applied to a split


class ListRow(NamedTuple):
    """The row of a list for one image."""

    cells: Mapping[str, str]  # by column
    file: str  # the option and its file, for error messages
    line: int

    def mistake(self, problem: str) -> UserError:
        """The error to raise for an invalid row."""
        return UserError(f"{self.file} can't be used: line {self.line}: {problem}.")


def read_list(path: Path, column: str, option: str) -> dict[str, ListRow]:
    """The rows of a CSV with one row per image, by the image's name as `escape_csv_cell` writes it.

    It must have the columns `image` and `column`, of which `keep` alone is optional. `option` named the file.
    """
    file = f"{option}: {path}"
    try:
        table = read_csv(path, {"image", column} - {KEEP})
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}): give a CSV file.") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} can't be used: {error}.") from error
    rows: dict[str, ListRow] = {}
    for line, cells in enumerate(table, start=2):
        name = escape_csv_cell(cells["image"])
        if name in rows:
            raise UserError(f"{file} can't be used: it lists {name!r} twice: keep one of the rows.")
        rows[name] = ListRow(cells, file, line)
    return rows


def apply_lists(
    splits: Splits, class_names: Sequence[str], keep: Path | None, relabel: Path | None
) -> Splits:
    """The split with the labels of the file `relabel` and without the training images that the file `keep` drops."""
    if relabel is not None:
        splits = _relabel(splits, class_names, relabel)
    if keep is not None:
        splits = _keep(splits, class_names, keep)
    return splits


def _relabel(splits: Splits, class_names: Sequence[str], path: Path) -> Splits:
    """The split with its training images under the labels of `--data.relabel`."""
    if any(sample.labels for sample in splits.samples["train"]):
        raise UserError(
            f"--data.relabel gives an image one class, and these have several labels: correct them in the CSV, "
            f"and leave {path} out."
        )
    label_of = {escape_csv_cell(name): label for label, name in enumerate(class_names)}
    rows = _rows_of_training_images(path, NEW_LABEL, "--data.relabel", splits)
    names = [escape_csv_cell(row.cells[NEW_LABEL]) if row is not None else "" for row in rows]
    train = []
    changed = 0
    for sample, row, name in zip(splits.samples["train"], rows, names, strict=True):
        if row is not None and name not in ("", *label_of):
            classes = ", ".join(list(label_of)[:8])
            raise row.mistake(f"the data have no class {name!r} ({classes})")
        label = label_of.get(name, sample.label)
        train.append(Sample(sample.sample_id, label))
        changed += label != sample.label
    note = f"{changed:,} with another label by {path.name}"
    return _with_train(splits, train, note, class_names, path)


def _keep(splits: Splits, class_names: Sequence[str], path: Path) -> Splits:
    """The split with only the training images that `--data.keep` keeps."""
    rows = _rows_of_training_images(path, KEEP, "--data.keep", splits)
    train, dropped = [], []
    for sample, row in zip(splits.samples["train"], rows, strict=True):
        if row is not None and _read_keep(row):
            train.append(sample)
        else:
            dropped.append(sample)
    splits = replace(splits, unused=[*splits.unused, *dropped])
    note = f"{len(dropped):,} left out by {path.name}"
    return _with_train(splits, train, note, class_names, path)


def _read_keep(row: ListRow) -> bool:
    """Whether the row keeps its image; a UserError if that can't be read from it."""
    if DECISION in row.cells:
        raise row.mistake(
            "it has a column 'decision': `moevision data prune RUN --by decisions --decisions FILE` makes a list of "
            "such a file"
        )
    answer = row.cells.get(KEEP, YES)
    if answer not in (YES, NO):
        raise row.mistake(f"keep is {answer!r} and must be {YES} or {NO}")
    return answer == YES


def _with_train(
    splits: Splits, train: list[Sample], note: str, class_names: Sequence[str], path: Path
) -> Splits:
    """The split with other training images; a UserError if a class loses all of its own."""
    if lost := sorted(labels_in(splits.samples["train"]) - labels_in(train)):
        raise UserError(
            f"{path} leaves the class {class_names[lost[0]]!r} without a training image: keep some of it."
        )
    notes = splits.notes | {"train": f"{splits.notes['train']}, {note}"}
    return replace(splits, samples=splits.samples | {"train": train}, notes=notes)


def _rows_of_training_images(
    path: Path, column: str, option: str, splits: Splits
) -> list[ListRow | None]:
    """The file's row of each training image; None if it lists none. Other images are a UserError."""
    rows = read_list(path, column, option)
    names = [escape_csv_cell(sample.sample_id) for sample in splits.samples["train"]]
    train_names = set(names)
    foreign = [name for name in rows if name not in train_names]
    if foreign:
        raise UserError(
            f"{option}: {path} lists {len(foreign):,} images that are not among the training images, the first is "
            f"{foreign[0]!r}: give a list of these data in this split (--data.seed and the fractions decide it)."
        )
    return [rows.get(name) for name in names]
