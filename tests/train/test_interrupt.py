"""Signals, and the file of metrics that only grows."""

import csv
import os
import signal

import pytest

from moevision.train.lightning_internals import MetricsFile
from moevision.train.processes import Interrupted, Interruption, stop_signals

pytestmark = [pytest.mark.deep, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Listen to signals even where the tests were started by nohup or in the background, which ignore some."""
    handlers = {
        "SIGINT": signal.default_int_handler,
        "SIGHUP": signal.SIG_DFL,
        "SIGTERM": signal.SIG_DFL,
    }
    earlier = {
        name: signal.signal(getattr(signal, name), handler) for name, handler in handlers.items()
    }
    yield
    for name, handler in earlier.items():
        signal.signal(getattr(signal, name), handler)


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGHUP", 129), ("SIGTERM", 143), ("SIGUSR1", 138)]
)
def test_outside_training_a_signal_ends_at_once(name, code):
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Interrupted) as stopped, Interruption():
        send(name)
    assert (stopped.value.code, stopped.value.signal_name) == (code, name)
    assert signal.getsignal(getattr(signal, name)) == before


def test_in_training_it_is_noted_and_the_second_one_does_not_wait(capsys):
    with Interruption() as interruption:
        interruption.training = True
        send("SIGTERM")
        assert interruption.requested == signal.SIGTERM
        assert "SIGTERM: saving" in capsys.readouterr().err
        with pytest.raises(Interrupted) as stopped:
            send("SIGINT")
        assert stopped.value.code == 130


def test_nohup_is_respected():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send("SIGHUP")
            assert interruption.requested is None
        assert [each.name for each in stop_signals()] == ["SIGINT", "SIGTERM", "SIGUSR1"]
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_forked_worker_leaves_the_decision_to_the_main_process():
    with Interruption() as interruption:
        worker = os.fork()
        if worker == 0:
            send("SIGTERM")
            os._exit(7 if interruption.requested is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7


def written(path):
    return path.read_bytes().decode().split("\r\n")


def test_rows_are_kept_and_columns_may_come_later(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path.parent)
    first.log_metrics({"b": 1.5}, 0)
    first.save()
    again = MetricsFile(path.parent)
    assert again.flush_and_count() == 1
    again.log_metrics({"b": 2.5}, 1)
    again.log_metrics({"a": 3}, 1)
    again.save()
    assert written(path) == ["a,b,step", ",1.5,0", ",2.5,1", "3,,1", ""]
    assert MetricsFile(path.parent).flush_and_count() == 3


def test_rows_survive_a_death_while_columns_are_added(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path.parent)
    metrics.log_metrics({"b": 1.5}, 0)
    metrics.save()
    before = path.read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writeheader", die)
    metrics.log_metrics({"a": 3}, 1)
    with pytest.raises(KeyboardInterrupt):
        metrics.save()
    assert path.read_bytes() == before


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path.parent)
    for step in range(5):
        metrics.log_metrics({"a": step / 3}, step)
        metrics.save()
        if step == 2:
            known = metrics.flush_and_count()
    whole = written(path)
    for _ in range(2):
        MetricsFile(path.parent).truncate(known)
        assert written(path) == [*whole[:4], ""]
