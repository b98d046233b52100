"""docs/guides/when-experts.md."""

from typing import Any

from benchmarks.records import Claim, accuracy, cats_and_dogs, infer, modular, readme


def one_in_bf16(*rows: dict[str, Any]) -> dict[str, float]:
    """Time ÷ the dense twin's of the trained model for one image in bf16."""
    (found,) = (
        row["after"]["ratio"]["median"]
        for row in rows
        if (row["model"], row["batch"], row["precision"], row["threads"]) == ("trained", 1, "bf16", 1)
    )
    return {**readme.few_and_many(*rows), "bf16": found}


CLAIMS = [
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
