"""The rows of scores: what visits add up to, what a checkpoint brings back, what they cost, and the table's file."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from moevision.data.scores import SCORES, Scores, ScoreSums, keys_of

NAMES = ["cat/a.png", "cat/b.png", "dog/c.png"]
LABELS = ["cat", "cat", "dog"]
EXPERTS = {1: 2, 3: 3}


def sums(names: list[str] = NAMES, experts: dict[int, int] = EXPERTS) -> ScoreSums:
    return ScoreSums(keys_of(names), experts)


def visit(index: list[int], *measures: list[float], shares: Any = None) -> tuple:
    """Arguments of `ScoreSums.add`."""
    share_array = None if shares is None else np.array(shares, np.float32)
    return np.array(index), np.array(measures, np.float32), share_array


def test_means_are_over_visits_by_hand():
    """Image 0 is visited three times (twice in one batch), image 2 once, image 1 never."""
    found = sums()
    #                         margin el2n loss  p    correct
    found.add(*visit([0, 2], [1.0, 0.5, 0.25, 0.8, 1], [-2.0, 1.25, 2.0, 0.1, 0]))
    found.add(*visit([0, 0], [-0.5, 1.0, 1.0, 0.4, 0], [2.5, 0.0, 0.25, 0.9, 1]))
    table = found.table(NAMES, LABELS)
    assert table.visits.tolist() == [3, 0, 1]
    first = {name: float(table.scores[name][0]) for name in SCORES}
    assert first == pytest.approx(
        {
            "aum": (1 - 0.5 + 2.5) / 3,
            "el2n": 1.5 / 3,
            "loss_mean": 1.5 / 3,
            "loss_last": 0.25,  # of the second visit in the batch
            "p_mean": (0.8 + 0.4 + 0.9) / 3,
            "p_std": np.std([0.8, 0.4, 0.9]),
            "forgetting": 1 / 3,  # correct, wrong, correct
            "correct": 2 / 3,
        },
        rel=1e-6,
    )
    assert all(np.isnan(table.scores[name][1]) for name in SCORES)
    assert [float(table.scores[name][2]) for name in ("aum", "p_std", "forgetting")] == [-2, 0, 0]


def test_visits_within_a_batch_count_one_after_the_other():
    """Correct, wrong, wrong, correct, wrong of one image in one batch: forgotten twice, as in five batches."""
    one, five = sums(), sums()
    visits = ((0.9, 1), (0.2, 0), (0.1, 0), (0.7, 1), (0.3, 0))
    outcomes = [[0.0, 0.0, 0.0, p, correct] for p, correct in visits]
    one.add(*visit([1] * 5, *outcomes))
    for outcome in outcomes:
        five.add(*visit([1], outcome))
    assert one.rows["forgotten"].tolist() == [0, 2, 0]
    assert one.rows.tobytes() == five.rows.tobytes()


def test_shares_are_means_over_the_visits_that_have_them():
    found = sums()
    nothing = [0.0] * 5
    found.add(*visit([0], nothing))
    found.add(*visit([0], nothing, shares=[[0.25, 0.75, 0.0, 0.5, 0.5]]))
    found.add(*visit([0], nothing, shares=[[0.75, 0.25, 0.0, 1.0, 0.0]]))
    table = found.table(NAMES, LABELS)
    first = {block: shares[0].tolist() for block, shares in table.experts.items()}
    assert first == {1: [0.5, 0.5], 3: [0, 0.75, 0.25]}
    assert np.isnan(table.experts[3][1:]).all()


def test_running_means_of_shares_stay_at_the_mean_over_many_visits():
    """Images routed as a whole have shares of 0 and 1; a mean near 1 has little room for what a visit adds to it."""
    chosen = np.random.default_rng(0).random(1000) < 0.95
    shares = np.stack([chosen, ~chosen, *np.zeros((3, 1000))], 1).astype(np.float32)
    found = sums()
    for row in shares:
        found.add(*visit([0], [0.0] * 5, shares=[row]))
    table = found.table(NAMES, LABELS)
    mine = np.concatenate([each[0] for each in table.experts.values()])
    np.testing.assert_allclose(mine, shares.mean(0), atol=1e-5)


def test_a_checkpoint_is_read_by_name():
    """One image has vanished since and another one came: rows follow their names, not their places."""
    before = sums()
    before.add(*visit([0, 1, 2], *([value] * 5 for value in (1.0, 2.0, 3.0))))
    after = sums(["cat/b.png", "dog/c.png", "dog/new.png"])
    assert after.load_state_dict(before.state_dict())
    assert after.rows["margin"].tolist() == [2, 3, 0]
    other = sums(experts={1: 2, 3: 4})
    assert not other.load_state_dict(before.state_dict())
    assert not other.rows["visits"].any()


def test_what_a_checkpoint_holds_follows_the_rows():
    """The guard may go back while a checkpoint is being made: the tensors are the rows' own memory."""
    found = sums()
    state, empty = found.state_dict(), found.rows.copy()
    found.add(*visit([0], [1.0] * 5))
    assert state["rows"].any()
    found.rows[:] = empty
    assert not state["rows"].any()


def test_memory_at_imagenets_size(tmp_path):
    """1.3 M images, two layers of 8 experts: 52 + 4 · 16 = 116 bytes each, 151 MB; a batch and the file add little."""
    count, experts = 1_300_000, {9: 8, 11: 8}
    keys = np.arange(count)
    random = np.random.default_rng(0)
    index = random.choice(count, 1024, replace=False)
    measures, shares = random.random((1024, 5), np.float32), random.random((1024, 16), np.float32)
    tracemalloc.start()
    found = ScoreSums(keys, experts)
    found.add(index, measures, shares)
    state = found.state_dict()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.rows.nbytes + keys.nbytes == 116 * count
    assert state["rows"].nbytes == found.rows.nbytes
    assert peak < found.rows.nbytes + keys.nbytes + 2**20, "1 MiB for a batch of 1,024"
    assert found.rows["visits"].sum() == 1024


@pytest.mark.parametrize("experts", [{}, EXPERTS])
def test_the_file_by_hand(tmp_path, experts):
    """Names that a spreadsheet would run are quoted as everywhere; without visits there are no scores."""
    found = sums(["=cmd.png", "b, c.png"], experts)
    found.add(*visit([0], [0.5, 0.25, 2.0, 0.125, 0]))
    found.table(["=cmd.png", "b, c.png"], ["cat", "dog"]).write(tmp_path / "scores.csv")
    text = (tmp_path / "scores.csv").read_text().splitlines()
    head = "image,label,visits,aum,el2n,loss_mean,loss_last,p_mean,p_std,forgetting,correct"
    routed = ",L1.E0,L1.E1,L3.E0,L3.E1,L3.E2" if experts else ""
    empty = "," * sum(experts.values())
    assert text == [
        head + routed,
        "'=cmd.png,cat,1,0.5,0.25,2,2,0.125,0,0,0" + empty,
        '"b, c.png",dog,0,,,,,,,,' + empty,
    ]
    table = Scores.read(tmp_path / "scores.csv")
    assert (table.images, table.experts.keys()) == (["'=cmd.png", "b, c.png"], experts.keys())
    assert np.isnan(table.scores["aum"]).tolist() == [False, True]
