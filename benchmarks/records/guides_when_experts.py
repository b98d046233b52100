"""docs/guides/when-experts.md."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.cats_and_dogs import recompute as cats_and_dogs
from benchmarks.equal_time import recompute as equal_time
from benchmarks.modular import recompute as modular
from benchmarks.records import Claim, accuracy, demo, infer, performance, readme
from benchmarks.records.studies import on_gpus
from benchmarks.sparsity import recompute as sparsity


def one_in_bf16(*rows: dict[str, Any]) -> dict[str, float]:
    """Time ÷ the dense twin's of the trained model for one image in bf16."""
    (found,) = (
        row["after"]["ratio"]["median"]
        for row in rows
        if (row["model"], row["batch"], row["precision"], row["threads"])
        == ("trained", 1, "bf16", 1)
    )
    return {**readme.few_and_many(*rows), "bf16": found}


@dataclass(frozen=True)
class Advice:
    """What to take in a case.

    Attributes:
        records: those that decide, as a claim names them.
        verdict: what they say, in a word.
        take: the guide's cell for each verdict; where one has none, the row is to be written anew.
    """

    records: str | tuple[str, ...]
    verdict: Callable[..., str]
    take: Mapping[str, str]

    def of(self, *records: Any) -> dict[str, str]:
        """The cell, and the verdict."""
        verdict = self.verdict(*records)
        return {"take": self.take[verdict], "verdict": verdict}


def few_steps(*runs: Any) -> str:
    """Whether experts are more accurate at equal steps: with a classifier of the patches' mean, or also of places."""
    judged = sparsity.judged(list(runs))
    mean, places = (judged[name].verdict == "positive" for name in ("H1", "H7"))
    return "with any classifier" if mean and places else "with the mean" if mean else "no"


SPARSITY, MODULAR, CATS_AND_DOGS = (
    f"benchmarks/{study}/runs.jsonl" for study in ("sparsity", "modular", "cats_and_dogs")
)
DENSE_IF_SLOWER = {"slower": "dense", "about as fast": "either", "faster": "experts"}
TAKE = {
    # the guide's first column: what decides the second one
    "a few thousand photos, pretrained weights": Advice(
        (*accuracy.CATS, *accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        lambda *records: accuracy.moe_less_dense(*records)["verdict"],
        {"better": "experts", "not told apart": "`fit --dense`", "worse": "`fit --dense`"},
    ),
    "from scratch, few steps": Advice(
        SPARSITY,
        few_steps,
        {"with any classifier": "experts", "with the mean": "dense", "no": "dense"},
    ),
    "from scratch, in a given time or to the end": Advice(
        readme.EQUAL_TIME,
        lambda *runs: equal_time.half_a_point_more(list(runs)),
        {"shown": "experts", "excluded": "dense", "neither shown nor excluded": "`--with-twin`"},
    ),
    "many images, on GPUs": Advice(
        (SPARSITY, readme.EQUAL_TIME, performance.TRAIN.format("cifar10")),
        lambda *records: "measured" if on_gpus(*records) else "not measured",
        {"not measured": "`--with-twin`"},
    ),
    "one image at a time, on a CPU": Advice(
        infer.BEFORE,
        lambda *rows: infer.speed(one_in_bf16(*rows)["one"], one_in_bf16(*rows)["bf16"]),
        DENSE_IF_SLOWER,
    ),
    "many images at a time, to predict": Advice(
        infer.BEFORE, lambda *rows: infer.speed(readme.few_and_many(*rows)["many"]), DENSE_IF_SLOWER
    ),
    "new folders of classes, added later": Advice(
        MODULAR,
        lambda *runs: (
            "on every set" if modular.is_above_the_rule(list(runs)) else "not on every set"
        ),
        {
            "on every set": "experts trained apart and joined",
            "not on every set": "[a frozen model and a linear rule](#add-a-folder-without-training)",
        },
    ),
    "an expert for each class": Advice(
        CATS_AND_DOGS,
        lambda *runs: cats_and_dogs.verdict_of(list(runs)),
        {
            "yes": "experts",
            "only if told": "a router that is [told the class](../concepts/balance.md#told-the-class)",
            "not shown": "dense",
        },
    ),
    "to see inside a model, or to teach": Advice(
        demo.MATTERS[0],
        lambda record: "an answer changes" if record["case"] else "no answer changes",
        {"an answer changes": "experts", "no answer changes": "either"},
    ),
}

CLAIMS = [
    *(Claim(advice.records, f"| {case} | {{take}} |", advice.of) for case, advice in TAKE.items()),
    Claim(
        TAKE["many images, on GPUs"].records,
        "| {take} | {verdict} |",
        TAKE["many images, on GPUs"].of,
    ),
    Claim(
        (*accuracy.CATS, *accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        "cats and dogs by {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {moe} trainings against {dense})",
        accuracy.moe_less_dense,
    ),
    Claim(
        infer.BEFORE,
        "{one:.2f} times the time of a dense model of equal FLOPs in float32, {bf16:.2f} times in bf16",
        one_in_bf16,
    ),
    Claim(infer.BEFORE, "64 take {many:.2f} times the time", readme.few_and_many),
]
DEFINITIONS: list[Any] = []
