"""Scores of the training images: what every visit adds to an image's row, and the table `scores.csv` made of the rows.

One visit is one image in one applied update; p = softmax(logits) [C], y its label.

- `aum`: mean of logit_y - max_{c≠y} logit_c, the area under the margin (arXiv:2001.10528, §3); low where other images
  speak against the label;
- `el2n`: mean of ‖p - onehot(y)‖₂ (arXiv:2107.07075, §2). There the mean is over trainings at one epoch, here over the
  visits of one training;
- `loss_mean`, `loss_last`: -ln p_y, without label smoothing and class weights, whatever the training's own loss has;
- `p_mean`, `p_std`: mean and standard deviation of p_y, confidence and variability (arXiv:2009.10795, §2);
- `forgetting`: correct at one visit and wrong at the next one (arXiv:1812.05159, algorithm 1), per visit. An image
  that was never correct is never forgotten: `correct` is 0 there;
- `correct`: share of the visits at which argmax p = y;
- `L<block>.E<expert>`: share of the image's choices that this expert computed, mean over the visits of the last third
  of the training.

All are means over visits, because images are not visited equally often: a stand-in for a bad file, balanced sampling
and the tail that several processes drop. They are of the training's own forward pass: augmented, with dropout and
router noise. Numbers lie in one array with a row per image, so that memory is known in advance: 52 + 4 H bytes an
image, with its key.

Axes: n training images, B visits, C classes, H = sum of the experts over all MoE layers.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.names import csv_name, name_bytes

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FILE: Final = "scores.csv"
MEASURES: Final = ("margin", "el2n", "loss", "p", "correct")
"""What is measured at a visit, in this order."""
SCORES: Final = ("aum", "el2n", "loss_mean", "loss_last", "p_mean", "p_std", "forgetting", "correct")
_HEAD: Final = ("image", "label", "visits", *SCORES)
_BLOCK = 10_000  # rows that are turned into text at once


def row_type(experts: Mapping[int, int]) -> np.dtype[Any]:
    """What is kept of one image; `experts` has the number of experts by block."""
    numbers = ("margin", "el2n", "loss", "loss_last", "p", "p_squares")
    counts = ("visits", "correct", "was_correct", "forgotten", "routed")
    # In half precision a running mean near 1 takes up decreases only: 0.95 became 0.88 in 1,000 visits.
    shares = ("shares", np.float32, (sum(experts.values()),))
    return np.dtype([*((name, np.float32) for name in numbers), *((name, np.int32) for name in counts), shares])


def keys_of(ids: Iterable[str]) -> Ints:
    """[n] 64-bit hashes of stable sample ids; in a checkpoint they stand for the names, which may be long."""
    digests = b"".join(blake2b(name_bytes(name), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, np.int64)


def rows_of(keys: Ints, wanted: Ints) -> Ints:
    """[m] the row of `keys` [n] in which each of `wanted` [m] stands; -1 where it doesn't."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys)
    row = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where(keys[row] == wanted, row, -1)


class ScoreSums:
    """The rows of all training images.

    Args:
        keys: [n] of the images, by `keys_of`.
        experts: block -> number of experts, in order of depth; empty for a dense model.

    Attributes:
        rows: [n] of `row_type`; nothing else changes.
    """

    def __init__(self, keys: Ints, experts: Mapping[int, int]) -> None:
        self.keys, self.experts = keys, dict(experts)
        self.rows = np.zeros(len(keys), row_type(experts))

    def add(self, index: Ints, measures: Floats, shares: Floats | None = None) -> None:
        """Take visits in their order; an image may be among them several times.

        Args:
            index: [B], the images' rows.
            measures: [B, 5], see `MEASURES`.
            shares: [B, H], the experts' shares; None before the last third of the training.
        """
        left = np.arange(len(index))
        while len(left):
            _, first = np.unique(index[left], return_index=True)  # nearly always all of them
            now = left[first]
            self._add_distinct(index[now], measures[now], None if shares is None else shares[now])
            left = np.delete(left, first)

    def _add_distinct(self, index: Ints, measures: Floats, shares: Floats | None) -> None:
        rows = self.rows[index]  # a copy
        margin, el2n, loss, p, correct = measures.T
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
            rows["shares"] += (shares - rows["shares"]) / rows["routed"][:, None]
        self.rows[index] = rows

    def state_dict(self) -> dict[str, Any]:
        """Tensors that share memory with the rows, for a checkpoint."""
        data = torch.from_numpy(self.rows.view(np.uint8).reshape(len(self.rows), -1))
        return {"keys": torch.from_numpy(self.keys.copy()), "rows": data, "layout": self._layout()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Take what a checkpoint has of these images, wherever they stand in it; False if its rows are others."""
        if state["layout"] != self._layout():
            return False
        saved = np.ascontiguousarray(state["rows"].numpy()).view(self.rows.dtype)[:, 0]
        _, here, there = np.intersect1d(self.keys, state["keys"].numpy(), assume_unique=True, return_indices=True)
        self.rows[here] = saved[there]
        return True

    def _layout(self) -> str:
        return repr((self.rows.dtype.descr, list(self.experts.items())))

    def table(self, images: Sequence[str], labels: Sequence[str]) -> Scores:
        """The scores, with the name and the class of each image."""
        rows, visits = self.rows, self.rows["visits"]
        with np.errstate(invalid="ignore"):  # an image without visits has no scores: 0 / 0
            mean = {name: rows[name] / visits.astype(np.float32) for name in ("margin", "el2n", "loss")}
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
        ends = np.cumsum(list(self.experts.values()))
        return Scores(
            list(images),
            list(labels),
            visits.astype(np.int64),
            {name: values.astype(np.float32) for name, values in found.items()},
            {
                block: shares[:, end - count : end]
                for (block, count), end in zip(self.experts.items(), ends, strict=True)
            },
        )


@dataclass(frozen=True)
class Scores:
    """The table: what training found about each of its n images, in the order of the split.

    Attributes:
        images: stable sample ids; read from a file, as `csv_name` writes them.
        labels: the class of each in words.
        visits: [n], how often each was in an applied update.
        scores: name (`SCORES`) -> [n]; NaN without visits.
        experts: block -> [n, E], share of the image's choices that each expert computed; NaN where there is none.
    """

    images: list[str]
    labels: list[str]
    visits: Ints
    scores: dict[str, Floats]
    experts: dict[int, Floats]

    def write(self, path: Path) -> None:
        """Write the CSV whole or not at all, without holding its text in memory."""
        write_text_atomic(path, self._text())

    def _text(self) -> Iterator[str]:
        names = [f"L{block}.E{expert}" for block, shares in self.experts.items() for expert in range(shares.shape[1])]
        yield ",".join([*_HEAD, *names]) + "\n"
        for start in range(0, len(self.images), _BLOCK):
            part = slice(start, start + _BLOCK)
            scores = np.stack([self.scores[name][part] for name in SCORES], axis=1)
            shares = [values[part] for values in self.experts.values()]
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            cells = np.concatenate([scores, *shares], axis=1).tolist()
            for image, label, visits, row in zip(
                self.images[part], self.labels[part], self.visits[part].tolist(), cells, strict=True
            ):
                numbers = ["" if value != value else f"{value:.5g}" for value in row]
                writer.writerow([csv_name(image), csv_name(label), visits, *numbers])
            yield text.getvalue()

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read `scores.csv`.

        Raises:
            UserError: if the file isn't there or is no such table.
        """
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return cls._parse(csv.reader(file))
        except OSError as error:
            raise UserError(
                f"{path} can't be read ({error.strerror}): it is in the folder of a run that fit finished, unless "
                "--data.scores was false."
            ) from error
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path} is no table of scores ({error}): fit writes it.") from error

    @classmethod
    def _parse(cls, lines: Iterator[list[str]]) -> Scores:
        head = next(lines, [])
        if tuple(head[: len(_HEAD)]) != _HEAD:
            raise ValueError(f"its first line begins with {','.join(head[:3])}")
        images: list[str] = []
        labels: list[str] = []
        numbers = array("f")
        for image, label, *cells in lines:
            if len(cells) != len(head) - 2:
                raise ValueError(f"{image} has {len(cells) + 2} cells and the first line {len(head)}")
            images.append(image)
            labels.append(label)
            numbers.extend(float(cell or "nan") for cell in cells)
        values = np.frombuffer(numbers, np.float32).reshape(len(images), len(head) - 2)
        blocks = [int(name.partition(".E")[0].removeprefix("L")) for name in head[len(_HEAD) :]]
        shares = values[:, 1 + len(SCORES) :]
        return cls(
            images,
            labels,
            values[:, 0].astype(np.int64),
            {name: values[:, 1 + column] for column, name in enumerate(SCORES)},
            {block: shares[:, np.array(blocks) == block] for block in dict.fromkeys(blocks)},
        )
