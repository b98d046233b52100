"""README.md."""

from benchmarks.records import Claim, Definition, accuracy, sparsity, specialization
from benchmarks.records.performance import INFER, TRAIN, inference, side_by_side

STEP = TRAIN.format("cifar10")
CLAIMS = [
    Claim(
        specialization.BUNDLED,
        "exchanging a class's favourite expert of the first MoE layer with any other costs {first_whole_points:.1f} "
        "points of accuracy; with {first_equal:.0f} % of the choices moved the favourite costs "
        "{first_favourite_points:.1f} points, any two other experts {first_any_two_points:.1f}",
        specialization.first_of("cifar10"),
    ),
    Claim(sparsity.FILES, "that they make a model better in the same training time {shown}.", sparsity.at_equal_time),
    *(
        Claim(
            INFER,
            f"| one image, {name} | {{{key}_moe:.1f}} ms | {{{key}_twin:.1f}} ms | {{{key}_large:.1f}} ms |",
            inference,
        )
        for name, key in (("float32", "fp32"), ("bf16", "bf16"))
    ),
    Claim(STEP, "| training, images/s | {moe:.0f} | {twin:.0f} | {large:.0f} |", side_by_side),
    Claim(STEP, "| training, MiB | {moe_mib:.0f} | {twin_mib:.0f} | {large_mib:.0f} |", side_by_side),
    Claim(
        tuple(accuracy.CIFAR),
        "is right on {mean:.1%} of the test images, the mean of three seeds",
        accuracy.mean,
    ),
    Claim(
        (accuracy.TWIN, *accuracy.CIFAR),
        "its dense twin, trained once, on {twin:.1%}: {mean:.1f} ± {half:.1f} points",
        accuracy.against_one,
    ),
    Claim(tuple(accuracy.CATS), "A ViT-S fine-tuned on cats and dogs is right on {mean:.1%}", accuracy.mean),
    Claim(
        (*accuracy.CATS, *accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        "{verdict} from dense: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {moe} trainings against {dense})",
        accuracy.moe_less_dense,
    ),
    Claim(sparsity.FILES, "with {moe:.0%} of its FLOPs in experts (here {cifar10:.0%})", sparsity.shares),
    Claim(
        sparsity.FILES,
        "was {verdict} its twin at equal steps, {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {seeds} seeds)",
        sparsity.first,
    ),
    Claim(
        sparsity.FILES,
        "{verdict} it at equal time, {mean:+.1f} ({low:+.1f} to {high:+.1f}; {seeds} seeds)",
        sparsity.at_equal_time,
    ),
]

DEFINITIONS = [Definition("Apache-2.0", "the licence"), Definition("Python ≥ 3.11", "a version")]
