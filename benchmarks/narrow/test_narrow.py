"""The queue of a study, and the order of this one: search, the candidate, its seeds."""

from argparse import Namespace
from types import SimpleNamespace

from benchmarks import queue
from benchmarks.narrow import SEARCHED, all_runs


def test_a_run_is_a_line_and_is_not_repeated(tmp_path, capsys) -> None:
    """The second call does the run that the first one's limit left, the third finds nothing."""
    jobs = [SimpleNamespace(name=name) for name in ("first", "second")]
    for limit, printed in ((1, "first: 1\n"), (0, "second: 1\n"), (0, "")):
        options = Namespace(limit=limit, out=tmp_path / "runs.jsonl", work=tmp_path)
        queue.do_runs(
            lambda _: jobs, lambda *_: {"steps": 1}, lambda j, r: f"{j.name}: {r['steps']}", options
        )
        assert capsys.readouterr().out == printed
    assert queue.read_records(options.out) == [{"name": job.name, "steps": 1} for job in jobs]


def test_a_rate_is_searched_past_an_edge_that_wins() -> None:
    assert queue.rate_beyond({0.1: 0.5, 0.2: 0.7}) == 0.4
    assert queue.rate_beyond({0.1: 0.7, 0.2: 0.5}) == 0.05
    assert queue.rate_beyond({0.1: 0.5, 0.2: 0.7, 0.4: 0.6}) is None


def test_the_candidate_is_the_best_of_the_search() -> None:
    """Accuracy is best at .012 for all of CIFAR-10's arms, and of these for 16 experts; of photos' arms for eight."""

    def result(run):
        bonus = run.arm in ("16-half", "8-k1")
        return {**vars(run), "name": run.name, "val_top1": bonus - abs(run.lr - 0.012)}

    records = []
    while new := [run for run in all_runs(records) if run.name not in {r["name"] for r in records}]:
        records.append(result(new[0]))
    compared = [(r["task"], r["arm"], r["seed"]) for r in records if r["stage"] == "comparison"]
    assert compared[:3] == [("photos", "8-k1", 0), ("photos", "8-k2", 0), ("photos", "dense", 0)]
    assert compared[18:] == [("cifar10", "16-half", seed) for seed in range(200, 206)]
    rates = {r["lr"] for r in records if (r["arm"], r["stage"]) == ("16-half", "search")}
    assert rates == {0.006, 0.012, 0.024}  # past the edge .012, which had won
    seeds = [r["seed"] for r in records if r["stage"] == "search" and r["lr"] == 0.012]
    assert seeds.count(101) == len(SEARCHED["cifar10"])
