"""What pages say in a word of one or several studies: which model to take, and what isn't shown."""

from __future__ import annotations

from typing import Any

from benchmarks.cats_and_dogs import recompute as cats_and_dogs
from benchmarks.equal_time import recompute as equal_time
from benchmarks.experts_pay import recompute as experts_pay
from benchmarks.modular import recompute as modular
from benchmarks.records import parts_of
from benchmarks.records.speed import step, trained
from benchmarks.sparsity import recompute as sparsity

Json = dict[str, Any]


def compared(*ratios: float) -> str:
    """How a model that takes so many times another's time compares; a tenth isn't counted."""
    if min(ratios) > 1.1:
        return "slower"
    return "faster" if max(ratios) < 1 / 1.1 else "about as fast"


def few_steps(*runs: Json) -> Json:
    """Whether experts are more accurate at equal steps: with a classifier of the patches' mean, or also of places."""
    judged = sparsity.judged(list(runs))
    mean, places = (judged[name].verdict == "positive" for name in ("H1", "H7"))
    verdict = "with any classifier" if mean and places else "with the mean" if mean else "no"
    return {"verdict": verdict}


def full_length(*runs: Json) -> Json:
    """Whether half a point more at equal time and full length is shown."""
    return {"verdict": equal_time.half_a_point_more(list(runs))}


def on_emoji(*runs: Json) -> Json:
    """Whether experts are shown to pay where many kinds of emoji are the classes."""
    kinds = experts_pay.Task(runs, "kinds")
    return {"verdict": "shown" if experts_pay.is_shown(kinds) else "not shown"}


def on_gpus(*records: Json) -> Json:
    """Whether one of these was measured on a machine with a GPU."""
    measured = any(part.get("gpus") for record in records for part in parts_of(record))
    return {
        "verdict": "measured" if measured else "not measured",
        "text": "GPUs were" if measured else "No GPU was",
        "machines": "CPUs and GPUs" if measured else "CPUs",
    }


def one_image(*rows: Json) -> Json:
    """The trained model's time for one image beside the dense twin's."""
    ratios = trained(*rows)
    return {"verdict": compared(ratios["one"], ratios["bf16"])}


def many_images(*rows: Json) -> Json:
    """The same for 64 images."""
    return {"verdict": compared(trained(*rows)["many"])}


def added_folders(*runs: Json) -> Json:
    """Whether experts trained apart and joined beat the linear rule on every set."""
    above = modular.is_above_the_rule(list(runs))
    return {"verdict": "on every set" if above else "not on every set"}


def expert_each(*runs: Json) -> Json:
    """Whether an expert for each class is shown."""
    return {"verdict": cats_and_dogs.verdict_of(list(runs))}


def seen_inside(record: Json) -> Json:
    """Whether an answer changes without some expert."""
    return {
        "verdict": "an answer changes"
        if record["models"]["cifar10"]["case"]
        else "no answer changes"
    }


def beside_dense(*records: Json) -> Json:
    """The dense twin in words: its accuracy at equal time and full length, its time for one image and for a step."""
    runs = [record for record in records if "arm" in record]
    (of_step,) = (step(record) for record in records if "rows" in record)
    rows = [record for record in records if "arm" not in record and "rows" not in record]
    moe = equal_time.lead(runs)
    slower = compared(trained(*rows)["one"], of_step["twin"] / of_step["moe"]) == "slower"
    return {
        **on_gpus(*records),
        "accurate": {"": "as accurate", "better": "less accurate", "worse": "more accurate"}[moe],
        "faster": "faster" if slower else "not faster",
    }
