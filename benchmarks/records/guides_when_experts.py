"""docs/guides/when-experts.md."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.records import (
    Claim,
    accuracy,
    cats_and_dogs,
    demo,
    equal_time,
    infer,
    modular,
    performance,
    readme,
    sparsity,
)
from benchmarks.records.studies import on_gpus
from moevision.analysis.questions import NOT_SHOWN, YES


def one_in_bf16(*rows: dict[str, Any]) -> dict[str, float]:
    """Time ÷ the dense twin's of the trained model for one image in bf16."""
    (found,) = (
        row["after"]["ratio"]["median"]
        for row in rows
        if (row["model"], row["batch"], row["precision"], row["threads"]) == ("trained", 1, "bf16", 1)
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


def few_steps(*found: Any) -> str:
    """Whether experts are more accurate at equal steps: with a classifier of the patches' mean, or also of places."""
    mean, places = (sparsity.decided(name, *found)["verdict"] == sparsity.WORDS["positive"] for name in ("H1", "H7"))
    return "with any classifier" if mean and places else "with the mean" if mean else "no"


DENSE_IF_SLOWER = {"slower": "dense", "about as fast": "either", "faster": "experts"}
TAKE = {
    # the guide's first column: what decides the second one
    "a few thousand photos, pretrained weights": Advice(
        (*accuracy.CATS, *accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        lambda *records: accuracy.moe_less_dense(*records)["verdict"],
        {"better": "experts", "not told apart": "`fit --dense`", "worse": "`fit --dense`"},
    ),
    "from scratch, few steps": Advice(
        sparsity.FILES, few_steps, {"with any classifier": "experts", "with the mean": "dense", "no": "dense"}
    ),
    "from scratch, in a given time or to the end": Advice(
        equal_time.FILES[0],
        lambda *runs: equal_time.at_full_length(*runs)["found"],
        {"shown": "experts", "excluded": "dense", "neither shown nor excluded": "`--with-twin`"},
    ),
    "many images, on GPUs": Advice(
        (sparsity.FILES[0], equal_time.FILES[0], performance.TRAIN.format("cifar10")),
        lambda *records: "measured" if on_gpus(*records) else "not measured",
        {"not measured": "`--with-twin`"},
    ),
    "one image at a time, on a CPU": Advice(
        infer.BEFORE, lambda *rows: infer.speed(one_in_bf16(*rows)["one"], one_in_bf16(*rows)["bf16"]), DENSE_IF_SLOWER
    ),
    "many images at a time, to predict": Advice(
        infer.BEFORE, lambda *rows: infer.speed(readme.few_and_many(*rows)["many"]), DENSE_IF_SLOWER
    ),
    "new folders of classes, added later": Advice(
        modular.FILES,
        modular.above_the_rule,
        {
            "on every set": "experts trained apart and joined",
            "not on every set": "[a frozen model and a linear rule](#add-a-folder-without-training)",
        },
    ),
    "an expert for each class": Advice(
        cats_and_dogs.FILES,
        lambda *runs: cats_and_dogs.answer(runs)[0],
        {
            YES: "experts",
            cats_and_dogs.ONLY_TOLD: "a router that is [told the class](../concepts/balance.md#told-the-class)",
            NOT_SHOWN: "dense",
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
    Claim(TAKE["many images, on GPUs"].records, "| {take} | {verdict} |", TAKE["many images, on GPUs"].of),
    Claim(
        (*accuracy.CATS, *accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        "cats and dogs by {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {moe} trainings against {dense})",
        accuracy.moe_less_dense,
    ),
    *readme.MORE_ACCURATE,
    Claim(
        infer.BEFORE,
        "{one:.2f} times the time of a dense model of equal FLOPs in float32, {bf16:.2f} times in bf16",
        one_in_bf16,
    ),
    Claim(infer.BEFORE, "64 take {many:.2f} times the time", readme.few_and_many),
    Claim(
        cats_and_dogs.FILES,
        "told or not, two experts were {least} to {most} points below dense where only experts learned (told − "
        "balanced {class_balanced}); from the expert that an untold router chose in block 7, the class is guessed in "
        "{alone_experts_L7[guess]:.0%} to "
        "{alone_blocks_L7[guess]:.0%} (chance 50), with balance losses in {balanced_experts_L7[guess]:.0%} to "
        "{balanced_blocks_L7[guess]:.0%}",
        cats_and_dogs.result,
    ),
    Claim(
        modular.FILES,
        "beside the rule, experts trained apart and joined bring {joined[sources]}, {joined[far]} and "
        "{joined[imagenette]} points on three sets, tuned heads for each folder {heads[sources]}, {heads[far]} and "
        "{heads[imagenette]}",
        modular.beside_the_rule,
    ),
    Claim(
        modular.FILES,
        "such a rule reached {rule[sources]:.1f}, {rule[far]:.1f} and {rule[imagenette]:.1f} %, tuned heads for each "
        "folder behind it {heads[sources]:.1f}, {heads[far]:.1f} and {heads[imagenette]:.1f} %, joined experts "
        "{joined[sources]:.1f}, {joined[far]:.1f} and {joined[imagenette]:.1f} %",
        modular.reached,
    ),
    Claim(modular.FILES, "Rule and heads took {cheap:.0f} CPU seconds, experts {experts:.0f}", modular.prices),
]
DEFINITIONS: list[Any] = []
