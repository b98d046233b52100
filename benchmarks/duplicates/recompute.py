"""Recompute every measured number of README.md from record.json.

Question: which altered copies of images does the page of `moevision data score` list, how many test images of CIFAR-10
have a near-duplicate in its training set, and are images redundant for the experts those with alike features?

Code: commit 7bae0498 ran all three parts. The record has counts of copies and of test images, and the names of the
pairs that were not planted; medians and shares of the third part are as they were measured.

    python benchmarks/duplicates/recompute.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
COPIES_BY_EYE = {50: 20, 150: 17, 250: 14, 350: 13, 500: 2, 700: 3}
"""Rank in CIFAR-10's list across the splits -> copies among the 20 pairs from there on, as one judge saw them."""


def percent(share: float, digits: int = 0) -> str:
    """A share in per cent."""
    return f"{100 * share:.{digits}f} %"


def copy_rows(lists: dict[str, Any]) -> list[str]:
    """A row for each kind of copy: named and listed, in the list of all pairs and in that of leaks."""
    rows = []
    for kind in lists["all"]["kinds"]:
        cells = []
        for pairs in (lists["all"]["kinds"][kind], lists["leaks"]["kinds"][kind]):
            cells += [str(pairs["copies"]), percent(pairs["named"]), percent(pairs["listed"])]
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return rows


def precision(pairs: dict[str, Any]) -> float:
    """Planted pairs among the first pairs of a list, as many as were planted."""
    return 1 - len(pairs["not_planted"]) / pairs["planted"]


def near_rows(cifar10: dict[str, Any]) -> list[str]:
    """A row for each bound: test images with a training image so near."""
    rows = []
    for bound, unit in (("bits", "{} of 64 bits differ"), ("cosine", "cosine at least {}")):
        for value, images in cifar10[bound].items():
            rows.append(
                f"| {unit.format(value)} | {images:,} | {percent(images / cifar10['test'], 1)} |"
            )
    return rows


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    record = json.loads((HERE / "record.json").read_text(encoding="utf-8"))
    lists, cifar10, redundant = record["planted"]["lists"], record["cifar10"], record["redundant"]
    # Copies down to the last rank that was judged, to tens, if their share is linear between these ranks.
    shares = [copies / 20 for copies in COPIES_BY_EYE.values()]
    copies = round(np.trapezoid([shares[0], *shares], [0, *COPIES_BY_EYE]).item(), -1)
    readme = [
        *copy_rows(lists),
        f"Of the first {lists['all']['planted']} pairs of the list of near-duplicates, "
        f"{percent(precision(lists['all']))} are planted. Of the first {lists['leaks']['planted']} pairs of the list "
        f"of leaks, {percent(precision(lists['leaks']))} are planted.",
        f"{cifar10['train']:,} training and {cifar10['test']:,} test images",
        *near_rows(cifar10),
        f"Of {redundant['images']:,} training images, the pairs that the experts shared out most alike have features "
        f"of a median cosine of {redundant['cosine']:.2f}; the nearest by features have "
        f"{redundant['cosine_nearest']:.2f}, two images of a class {redundant['cosine_of_strangers']:.2f}. Both ways "
        f"name the same partner for {percent(redundant['same_partner'], 1)} of the images, and share "
        f"{percent(redundant['shared_tenth'])} of the most redundant tenth (chance: 10 %).",
        f"of the {len(lists['all']['not_planted'])} first pairs of photos that were not planted",
        f"about {copies:.0f} down to there, if shares are linear between these ranks",
    ]
    return {"benchmarks/duplicates/README.md": readme}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
