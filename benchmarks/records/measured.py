"""docs/measured.md: one paragraph of each study, from the same records."""

from typing import Any

from benchmarks.records import (
    Claim,
    Definition,
    accumulation,
    accuracy,
    analysis,
    demo,
    duplicates,
    label_noise,
    modular,
    performance,
    quickstart,
    reliability,
    routers,
    small,
    sparsity,
    specialization,
    stem,
    strangers,
    upcycling,
    waiting,
)

Json = dict[str, Any]
TRAIN = performance.TRAIN.format("cifar10")


CLAIMS = [
    Claim(
        modular.FILES,
        "bring {sources}, {far} and {imagenette} points over heads alone, on three sets of domains",
        modular.gaps,
    ),
    Claim(
        strangers.FILE,
        "the model of cats and dogs recognizes {cats_vs_dogs:.0%} of photos of other things (mean of objects and of "
        "animals), the CIFAR-10 model {cifar10:.0%}, that of drawn pets {pets:.0%}",
        lambda *runs: {run["name"]: run["recognized"] for run in runs},
    ),
    Claim(small.FILES, "{text}", small.answers),
    Claim(small.FILES, "reads every place gains {mean:.1f} ({bounds}; {seeds} seeds)", small.heads),
    Claim(
        quickstart.QUICKSTART, "the quickstart's model is right on {moe} of {total:,} test images", quickstart.of_run
    ),
    Claim(
        tuple(accuracy.CIFAR),
        "the recipe's model is right on {mean:.1%} of the test images, the mean of three seeds",
        accuracy.mean,
    ),
    Claim(
        (accuracy.TWIN, *accuracy.CIFAR),
        "its dense twin, trained once, on {twin:.1%}: three against one leave ±{half:.1f} points",
        accuracy.against_one,
    ),
    Claim(
        (accuracy.CIFAR[0], accuracy.TWIN, accuracy.SHOWN, accuracy.SHOWN_TWIN),
        "The two pairs of one seed differ by {first:+.1f} and {second:+.1f} points",
        accuracy.pairs,
    ),
    Claim(
        (accuracy.TWIN, *accuracy.CIFAR),
        "To 85 % of validation the MoE takes {moe:,.0f} CPU seconds, the twin {twin:,.0f} (one seed)",
        accuracy.reached,
    ),
    Claim(
        (*accuracy.CATS, *accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        "{verdict}: {mean:+.1f} points ({low:+.1f} to {high:+.1f})",
        accuracy.moe_less_dense,
    ),
    Claim(accuracy.CIFAR_PRETRAINED, "one epoch of CIFAR-10 from a pretrained ViT-S {mean:.1%}", accuracy.mean),
    Claim(tuple(accuracy.CATS), "{mean:.1%} as a MoE (three seeds)", accuracy.mean),
    Claim(
        (*accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        "{least:.1f} to {most:.1f} % dense (five trainings)",
        accuracy.extremes,
    ),
    Claim(tuple(accuracy.FOLDERS), "`fit FOLDER` on the same photos: {mean:.1%} (three seeds)", accuracy.mean),
    Claim(accuracy.OUTSIDE, "is right on {alone} of its test images", accuracy.outside),
    Claim(accuracy.IMAGENETTE, "Imagenette {mean:.1%} from scratch", accuracy.mean),
    Claim(accuracy.IMAGENETTE_FOLDER, "{mean:.1%} from pretrained weights", accuracy.mean),
    Claim(
        quickstart.CATS_CARD,
        "the bundled model of cats and dogs on {moe} of {total:,} test photos, beside {dense} for its dense twin",
        quickstart.of_card,
    ),
    Claim(
        quickstart.QUICKSTART,
        "of the quickstart has {most:.2f} times the mean load",
        lambda record: {"most": max(float(value) for value in quickstart.loads(record)["slowest"].split(", "))},
    ),
    Claim(routers.STUDY, "`position` and `hash` are {position:.1f} and {hash:.1f} points above", routers._above),
    Claim(
        routers.STUDY, "`expert_choice` are {least_above:.1f} to {most_above:.1f} points above the twin", routers._above
    ),
    Claim(
        routers.STUDY,
        "`random` is {verdict} it: {mean:+.1f} ({low:+.1f} to {high:+.1f}; {seeds} seeds, unadjusted)",
        routers.at_random,
    ),
    Claim(
        routers.STUDY,
        "`noisy_top_k`, which `fit FOLDER` takes from scratch, `bias_balanced`, `sigmoid` and `soft` are "
        "not told apart",
        routers._above,
    ),
    Claim(routers.STUDY, "at {least:.2f} to {most:.2f} times its images/s", routers._speeds),
    Claim(
        sparsity.FILES,
        "{cifar10:.0%} of the FLOPs of the shipped recipe for CIFAR-10, {imagenette:.0%} for Imagenette, "
        "{cats_vs_dogs:.0%} for cats and dogs, {quickstart:.0%} for the quickstart",
        sparsity.shares,
    ),
    Claim(sparsity.FILES, "a MoE with {moe:.0%} of its FLOPs in experts", sparsity.shares),
    Claim(
        sparsity.FILES,
        "experts by place are {lost:.1f} points worse ({least:.1f} to {most:.1f}; {seeds} seeds) and the learned MoE "
        "isn't told apart ({mean:+.1f}, {low:+.1f} to {high:+.1f})",
        sparsity.with_places,
    ),
    Claim(sparsity.FILES, "After one epoch of CIFAR-10 ({right:.0%} right)", sparsity.accuracy),
    Claim(sparsity.FILES, "in the same training time {shown}", sparsity.at_equal_time),
    Claim(
        sparsity.FILES,
        "is {verdict} its dense twin by {mean:.1f} points ({low:.1f} to {high:.1f}; {seeds} seeds)",
        sparsity.first,
    ),
    Claim(
        sparsity.FILES,
        "{more:.0%} more steps give the twin {mean:.1f} ({low:.1f} to {high:.1f}; {seeds} seeds)",
        sparsity.more_steps,
    ),
    Claim(
        sparsity.FILES,
        "At equal CPU time the MoE is {verdict} its twin: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; "
        "{seeds} seeds)",
        sparsity.at_equal_time,
    ),
    Claim(
        sparsity.FILES,
        "The learned router is {verdict} the place in the image by {mean:.1f} points ({low:.1f} to "
        "{high:.1f}; {seeds} seeds)",
        sparsity.learned,
    ),
    Claim(
        sparsity.FILES,
        "beside `hash` it has {mean:+.1f} ({low:+.1f} to {high:+.1f}; {seeds} seeds; unadjusted)",
        sparsity.hashed,
    ),
    Claim(
        sparsity.FILES,
        "grows with the share of routed FLOPs {shown}: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {seeds} seeds)",
        sparsity.by_share,
    ),
    Claim(
        sparsity.FILES,
        "experts by place were {mean:.1f} points ({low:.1f} to {high:.1f}; {seeds} seeds) {above} the "
        "twin at equal CPU time",
        sparsity.by_place,
    ),
    Claim(
        sparsity.FILES,
        "with them the MoE is {mean:.1f} points ({low:.1f} to {high:.1f}; {seeds} seeds) better, and its busiest "
        "expert has {moe:.2f} times the mean load in place of {unbalanced:.2f}",
        sparsity.balanced,
    ),
    Claim(
        label_noise.FILES,
        "has an area under the ROC curve of {random_aum:.2f} where CIFAR-10's labels were flipped at random, "
        "{similar_aum:.2f} where similar classes were mixed up, {cats_aum:.2f} on photos of cats and dogs and "
        "{folder_aum:.2f} on a folder of drawn animals",
        label_noise.of_moe,
    ),
    Claim(
        label_noise.FILES,
        "the model is better by {dropped} points; without a tenth drawn at random it isn't told apart: {drawn}",
        label_noise.dropped,
    ),
    Claim(
        duplicates.FILES,
        "Of {planted} altered copies planted among photos {named:.0%} were matched to their original, and of the first "
        "{planted} pairs listed {precision:.0%} are planted ones",
        duplicates.of_planted,
    ),
    *stem.CLAIMS[1:3],
    Claim(
        upcycling.STUDY,
        "was then {verdict} from the dense model trained on: {mean} points; {nor}, by its adjusted p, "
        "from a dense model in "
        "one schedule of as many steps: {in_one}.",
        upcycling.rivals,
    ),
    Claim(
        analysis.ATLAS,
        "the first choice in block 3 tells {bits} bits about the class. That training the router added to that is "
        "{training}: clusters of the layer's input tell {clusters} bits. In block 1 the experts differ a little: "
        "exchanging a class's favourite expert with any other costs {points} points of accuracy, but no more than",
        analysis.answers,
    ),
    Claim(
        analysis.COVERAGE,
        "in at least {score:.1%} of simulations",
        lambda record: record["lowest_coverage"],
    ),
    Claim(
        performance.INFER,
        "has {fp32_speed} times its dense twin's speed in float32, {bf16_speed} in bf16",
        performance.inference,
    ),
    Claim(
        performance.INFER,
        "{fp32_large:.1f} against {fp32_moe:.1f} ms, in bf16 {bf16_large:.1f} against {bf16_moe:.1f} ms",
        performance.inference,
    ),
    Claim(TRAIN, "A training step runs at {twin} times the twin's speed", performance.moe),
    Claim(TRAIN, "takes {moe_mib:.0f} MiB, the twin's {twin_mib:.0f}", performance.side_by_side),
    Claim(
        performance.ALL_BARS,
        "In {lowest} of {cases} cases the layer's median time is below that of every peer",
        performance.overlapping,
    ),
    Claim(
        demo.LATENCY,
        "the first page of the photo model stands after {first_page[median_ms]:.0f} ms, another layer after "
        "{layer_change[median_ms]:.0f} ms and one's own photo after {own_picture[median_ms]:.0f} ms",
        lambda record: record["models"]["cats_vs_dogs"],
    ),
    Claim(
        demo.LOAD,
        "{visitors} simulated visitors got {answers:,} answers in {seconds} s: {mixed_up} wrong, {busy} refused as "
        "busy, {error} failed",
    ),
    Claim(
        accumulation.ACCUMULATION,
        "With 256 images its projection lies between {least:.2f} and {most:.2f}",
        accumulation.extremes(256, "least", "most"),
    ),
    Claim(
        accumulation.ACCUMULATION,
        "with 32 images between {least:.2f} and {most:.2f}",
        accumulation.extremes(32, "least", "most"),
    ),
    Claim(reliability.COST, "The guard costs {cost_percent:.2f} % of the CPU time of a step"),
    Claim(reliability.COST, "steps with it took {pair_ratio_median} times as long"),
    Claim("benchmarks/guard/scores_cost.json", "scores of the training images costs {cost_percent:.2f} % of"),
    Claim(
        specialization.FILES,
        "in {pets} settings on drawn pets, {cifar10} on CIFAR-10 and {cats_vs_dogs} on photos of cats and dogs",
        specialization.yes,
    ),
    Claim(specialization.BUNDLED, specialization.FIRST, specialization.first_of("cifar10")),
    Claim(specialization.SEEDS, specialization.SMALL, specialization.over_seeds),
    Claim(
        waiting.RUNS,
        "computes {rows:.2f} times the mean rows where an uneven router learns without a balance loss, and the other "
        "waits {without} times as long for them as under an even load. With the loss it is {rows_with_loss:.2f} times "
        "the rows and {with_loss} times the wait; longer without it in {longer} of {runs} runs",
        waiting.extremes,
    ),
    Claim(reliability.RESUME, "bit-identical in {equal} of {cells} cells", reliability.equal_cells),
]

DEFINITIONS = [
    Definition("with 5 % of validation refused", "`moevision.models.strangers.REFUSED`"),
    Definition("95 % intervals over seeds", "the level of `benchmarks/study.py`"),
    Definition("from .1 to .4", "the routed shares of H3's arms"),
    Definition("airbench94, which reaches 94 % on the original", "the paper"),
    Definition("Balance losses cost at most 1 point", "the margin of H5 in `benchmarks/sparsity/protocol.md`"),
    Definition("less than 2 points of accuracy is not shown", "the margin; see `reliability.mean_difference`"),
]
