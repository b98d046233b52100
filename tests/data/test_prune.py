"""Which images each method keeps, worked out by hand; what no method may do; and the file that fit takes."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moevision.data.collection import Sample
from moevision.data.scores import (
    METHODS,
    SCORES,
    Scores,
    Share,
    apply_lists,
    choose_kept_images,
    class_shares,
    expert_shares,
    prune,
    shares_table,
    starvation_warnings,
)
from moevision.data.splits import Splits
from tests.data.conftest import names


def scores(labels: str, experts: list[list[float]] | None = None, **values: list[float]) -> Scores:
    """Images a, b, c, ... with a class of one letter each; scores that aren't given are 0, visits 2."""
    n = len(labels)
    visits = np.array(values.pop("visits", [2] * n), np.int64)
    table = {name: np.array(values.get(name, [0.0] * n), np.float32) for name in SCORES}
    shares = {} if experts is None else {1: np.array(experts, np.float32)}
    return Scores([chr(97 + i) for i in range(n)], list(labels), visits, table, shares)


def kept(found: Scores, by: str, share: float, **options: float) -> str:
    plan = prune(found, by, share, **options)  # type: ignore[arg-type]
    return "".join(np.array(found.images)[plan.keep])


def test_what_each_score_gives_up_first():
    found = scores(
        "xxxx",
        aum=[3, -1, 2, 0],
        el2n=[0.1, 0.9, 0.4, 0.2],
        loss_mean=[0.1, 2.0, 1.0, 0.5],
        forgetting=[0, 0, 0.5, 0.25],
        correct=[1, 0, 0.5, 0.5],  # b was never correct: forgotten most
    )
    for by, images in {"aum": "ac", "el2n": "bc", "loss": "ad", "forgetting": "bc"}.items():
        assert kept(found, by, 0.5) == images, by


def test_ccs_draws_equally_from_strata_and_gives_up_the_hardest():
    """Algorithm 1 by hand: β = 0.2 drops two; strata of width (49 - 0) / 50 hold 1, 1 and 6 images; 5 are to be kept:
    5 // 3 = 1 of the first, (5 - 1) // 2 = 2 of which the second has 1, and the 3 that are left of the third."""
    aum = [-9, -5, 0, 25, 49, 49, 49, 49, 49, 49]
    found = scores("x" * 10, aum=aum)
    plans = [prune(found, "ccs", 0.5, hardest=0.2, seed=seed) for seed in range(20)]
    for plan in plans:
        assert plan.keep[:4].tolist() == [False, False, True, True]
        assert plan.keep[4:].sum() == 3
        names(plan.reason[0], "aum -9", "20%", "lowest")
        names(plan.reason[3], "stratum 26", "1 of 1")
        names(plan.reason[9], "stratum 50", "3 of 6")
    assert len({plan.keep.tobytes() for plan in plans}) > 5  # drawn


def test_random_and_ties_are_drawn_by_the_seed():
    found = scores("x" * 8)
    for by in ("random", "aum"):
        drawn = Counter("".join(kept(found, by, 0.25, seed=seed) for seed in range(200)))
        assert min(drawn[letter] for letter in "abcdefgh") > 25  # of 200 x 2 draws 50, SD 6.1
        assert kept(found, by, 0.25, seed=3) == kept(found, by, 0.25, seed=3)


@pytest.mark.parametrize("by", METHODS[:-1])
def test_no_class_is_emptied_and_what_was_never_seen_stays(by):
    """z has one image, the worst by every score; d was never visited."""
    worst = {"aum": -9.0, "loss_mean": 9.0, "el2n": -9.0, "forgetting": -9.0}
    values = {name: [0.0, 1.0, 2.0, 0.0, bad] for name, bad in worst.items()}
    found = scores("xxxxz", visits=[2, 2, 2, 0, 2], correct=[1] * 5, **values)
    plan = prune(found, by, 0.25, hardest=0.25)
    # one by its score, d, and z
    assert plan.keep.sum() in ((2, 3) if by == "random" else (3,))
    assert plan.keep[3:].all()
    assert plan.reason[3].startswith("never visited")


def test_shares_before_and_after_and_who_starves():
    """a and b go; class x falls from 3 of 4 to 1 of 2, expert 0 from (.9 + .9 + .3 + 0) / 4 to (.3 + 0) / 2."""
    experts = [[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.0, 1.0]]
    found = scores("xxxz", experts, aum=[0, 1, 2, 3])
    plan = prune(found, "aum", 0.5)
    assert class_shares(found, plan) == [("x", 0.75, 0.5), ("z", 0.25, 0.5)]
    shares = expert_shares(found, plan.keep)
    assert [share.name for share in shares] == ["L1.E0", "L1.E1"]
    assert np.array([share[1:] for share in shares]) == pytest.approx(
        np.array([[0.525, 0.15], [0.475, 0.85]])
    )
    (warning,) = starvation_warnings(shares, "expert")
    names(warning, "expert L1.E0", "52.5%", "15.0%")
    assert shares_table(shares, "expert")[1] == "L1.E0     52.5%    15.0%"
    assert starvation_warnings(class_shares(found, plan), "class") == []


def test_the_list_says_why_and_is_what_fit_takes(tmp_path):
    found = scores("xx=z", aum=[1.5, -2, 3, 4])
    found.labels[2] = found.images[2] = "=evil,\x1b"
    plan = prune(found, "aum", 0.75)
    for relabelled in (False, True):
        plan.write(tmp_path / "keep.csv", found, relabelled=relabelled)
        with (tmp_path / "keep.csv").open(newline="") as file:
            head, *rows = csv.reader(file)
        assert head == ["image", "label", "keep", "new_label", "reason"]
        label = r"'=evil,\x1b"
        assert rows[1] == ["b", "x", "no", "x" if relabelled else "", "aum -2: rank 4 of 4"]
        assert rows[2] == [label, label, "yes", label if relabelled else "", "aum 3: rank 2 of 4"]
    names = ["x", "=evil,\x1b", "z"]
    train = [
        Sample(*pair) for pair in zip(found.images, map(names.index, found.labels), strict=True)
    ]
    file = tmp_path / "keep.csv"
    splits = apply_lists(Splits({"train": train}, {"train": ""}), names, file, file)
    assert splits.samples["train"] == [train[0], train[2], train[3]]


def decided(tmp_path: Path, text: str) -> Path:
    (tmp_path / "decisions.csv").write_text(f"image,label,decision,new_label\n{text}")
    return tmp_path / "decisions.csv"


def test_decisions_drop_and_relabel_and_leave_the_rest(tmp_path):
    found = scores("xxxzz")
    plan = choose_kept_images(found, decided(tmp_path, "b,x,drop,\nc,x,relabel,z\na,x,keep,\n"))
    assert plan.keep.tolist() == [True, False, True, True, True]
    assert plan.new_label == {2: "z"}
    reasons = ["keep", "drop", "wrong label"]
    assert plan.reason == [*(f"decided: {reason}" for reason in reasons), *["not decided"] * 2]
    assert class_shares(found, plan) == [("x", 0.6, 0.25), ("z", 0.4, 0.75)]


def test_one_image():
    assert kept(scores("x"), "ccs", 0.5) == "a"


def test_of_many_shares_those_that_fall_most_are_shown():
    shares = [Share(f"c{number:02}", 0.04, number / 1000) for number in range(22)]
    *rows, rest = shares_table(shares, "class")[1:]
    assert [row.split()[0] for row in rows] == [share.name for share in shares[:20]]
    assert rest == "and 2 that lose less"
