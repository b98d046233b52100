"""The study of layouts: which trainings it has, and its table by hand."""

from benchmarks.layouts import jobs, table


def test_every_layout_of_two_and_four_processes_has_its_training() -> None:
    titles = [job.title for job in jobs(None)]
    assert titles == [
        *["one process"] * 5,
        *("2 processes, DDP", "2 processes, EP 2 + DDP", "2 processes, FSDP2", "2 processes, EP 2 x FSDP2"),
        *("4 processes, DDP", "4 processes, EP 2 + DDP", "4 processes, EP 4 + DDP"),
        *("4 processes, FSDP2", "4 processes, EP 2 x FSDP2", "4 processes, EP 4 x FSDP2"),
        *["one process, a batch in 2 parts"] * 3,
        *["one process, a batch in 4 parts"] * 3,
    ]
    assert len({job.name for job in jobs(None)}) == len(titles)


def test_the_table_by_hand() -> None:
    """Losses 0.4, 0.5, 0.6: mean 0.5, SD 0.1; 0.35 lies 1.5 of them below."""
    same = {"parallel": "ddp", "expert": 1, "steps": 86}
    alone = [
        {**same, "processes": 1, "title": "one process", "loss": loss, "top1": loss + 0.1} for loss in (0.5, 0.4, 0.6)
    ]
    two = {**same, "processes": 2, "title": "2 processes, DDP", "loss": 0.35, "top1": 0.7}
    assert table([two, *alone])[2:] == [
        "| one process | 3 | 86 | 50.0 to 70.0 | 0.400 to 0.600 |  |",
        "| 2 processes, DDP | 1 | 86 | 70.0 | 0.350 | -1.5 |",
    ]
