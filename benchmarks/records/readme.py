"""README.md."""

from typing import Any

from benchmarks.records import Claim, Definition, accuracy, infer, quickstart, sparsity, specialization
from benchmarks.records.performance import TRAIN, side_by_side

STEP = TRAIN.format("cifar10")


def few_and_many(*rows: dict[str, Any]) -> dict[str, float]:
    """Time ÷ the dense twin's of the trained model in float32, for 1 and for 64 images."""
    found = {
        row["batch"]: row["after"]["ratio"]["median"]
        for row in rows
        if (row["model"], row["precision"], row["threads"]) == ("trained", "fp32", 1)
    }
    return {"one": found[1], "many": found[64]}


# docs/guides/when-experts.md says the same.
MORE_ACCURATE = [
    Claim(
        sparsity.FILES,
        "is {verdict} its dense twin at equal steps: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {seeds} seeds)",
        sparsity.first,
    ),
    Claim(
        sparsity.FILES,
        "when both train for as long {shown}: {mean:+.1f} ({low:+.1f} to {high:+.1f}; {seeds} seeds)",
        sparsity.at_equal_time,
    ),
]
CLAIMS = [
    Claim(
        quickstart.NOW,
        "{seconds} CPU seconds of plain, busy cores and gets {tests} % of its test images right",
        quickstart.of_command,
    ),
    Claim(
        tuple(accuracy.FOLDERS),
        "took {fastest:.0f} to {slowest:.0f} minutes of one CPU thread, from pretrained weights, and {mean:.1%} of the "
        "test photos were right (mean of three seeds)",
        accuracy.of_folders,
    ),
    Claim(
        specialization.BUNDLED,
        "exchanging a class's favourite expert of the first MoE layer with any other costs {first_whole_points:.1f} "
        "points of accuracy; with {first_equal:.0f} % of the choices moved the favourite costs "
        "{first_favourite_points:.1f} points, any two other experts {first_any_two_points:.1f}",
        specialization.first_of("cifar10"),
    ),
    Claim(sparsity.FILES, "With {moe:.0%} of its FLOPs in experts", sparsity.shares),
    *MORE_ACCURATE,
    Claim(
        (*accuracy.CATS, *accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        "Fine-tuned on cats and dogs: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {moe} trainings against {dense})",
        accuracy.moe_less_dense,
    ),
    Claim(infer.BEFORE, "{one:.2f} times the time for one image in float32, {many:.2f} times for 64", few_and_many),
    Claim(
        STEP,
        "training {moe:.0f} against {twin:.0f} images/s and {moe_mib:.0f} against {twin_mib:.0f} MiB",
        side_by_side,
    ),
]

DEFINITIONS = [
    Definition("Apache-2.0", "the licence"),
    Definition("Python 3.11", "a version"),
    Definition("a lesson of 45 minutes", "a plan"),
    Definition("2,048 photos of cats and dogs", "what was trained on"),
]
