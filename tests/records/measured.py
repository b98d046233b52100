"""docs/measured.md: one paragraph of each study, from the same records."""

from typing import Any

from tests.records import (
    Claim,
    Definition,
    accumulation,
    accuracy,
    analysis,
    curve,
    demo,
    duplicates,
    label_noise,
    levers,
    performance,
    quickstart,
    reliability,
    routers,
    saving,
    sparsity,
    specialization,
    stem,
    surgery,
    upcycling,
    waiting,
)
from tests.records.studies import report

Json = dict[str, Any]
TRAIN, SURGERY = performance.TRAIN.format("cifar10"), surgery.BOTH


def _restarted(record: Json) -> Json:
    """The upcycled model beside the restarted dense one, in points."""
    text = report("upcycling").differences(record)[0]
    assert "not told apart" in text
    return {"mean": text.split("mean ")[1].split(", p")[0]}


def least_and_most(*records: Json) -> Json:
    """The smallest and the largest cost of an operation, in points."""
    costs = {
        (model, name): -100 * record["accuracy"]["difference"]["difference"]
        for model, part in (("pets", records[:7]), ("cifar10", records[7:]))
        for name, record in zip(surgery.OPERATIONS, part, strict=True)
    }
    least, most = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
    assert (least, most) == (("cifar10", "prune_2"), ("pets", "most_used"))
    return {"least": costs[least], "most": costs[most]}


def class_in_l3(record: Json) -> Json:
    """What block 3 of the bundled pets tells about the class."""
    return analysis.of_layer(record, 3, "class")


CLAIMS = [
    Claim(
        quickstart.QUICKSTART, "the quickstart's model is right on {moe} of {total:,} test images", quickstart.of_run
    ),
    Claim(
        tuple(accuracy.CIFAR),
        "the recipe's model is right on {mean:.1%} of the test images, the mean of three seeds",
        accuracy.mean,
    ),
    Claim(accuracy.TWIN, "its dense twin, trained once, on {mean:.1%}", accuracy.mean),
    Claim(accuracy.CIFAR_PRETRAINED, "from a pretrained ViT-S gives {mean:.1%}, one seed", accuracy.mean),
    Claim(tuple(accuracy.CATS), "{mean:.1%} as a MoE (three seeds)", accuracy.mean),
    Claim(
        (*accuracy.CATS_DENSE, *accuracy.CATS_DENSE_DATA),
        "{least:.1f} to {most:.1f} % dense (five trainings)",
        accuracy.extremes,
    ),
    Claim(tuple(accuracy.FOLDERS), "`fit FOLDER` on the same photos: {mean:.1%} (three seeds)", accuracy.mean),
    Claim(accuracy.OUTSIDE, "is right on {alone} of its test images", accuracy.outside),
    Claim(accuracy.IMAGENETTE, "{mean:.1%} from scratch", accuracy.mean),
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
    Claim(routers.STUDY, "at {least:.2f} to {most:.2f} times its images/s", routers._speeds),
    Claim(
        saving.STUDY,
        "saves {flops_saved:.0%} of the FLOPs per image and is {above_large:.1f} points better after 200 s of one "
        "thread",
        saving._ratios,
    ),
    Claim(
        saving.STUDY,
        "that one trains at {small_train:.2f} times its images/s with {small_memory:.2f} times the memory, and is "
        "{above_small:.1f} points behind after what was planned as the same time: the MoE took "
        "{longer_than_small:.0%} more",
        saving._ratios,
    ),
    Claim(
        sparsity.FILES,
        "the MoE is {mean:.1f} points ({low:.1f} to {high:.1f}; {seeds} seeds) above its dense twin. "
        "A run took {moe:.0f} CPU seconds, the twin's {twin:.0f}",
        sparsity.first,
    ),
    Claim(
        sparsity.FILES,
        "instead of the learned router, the model is {mean:.1f} points ({low:.1f} to {high:.1f}; {seeds} seeds) better",
        sparsity.learned,
    ),
    Claim(
        sparsity.FILES,
        "isn't told apart from its twin: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {seeds} seeds)",
        sparsity.at_equal_time,
    ),
    Claim(
        sparsity.FILES,
        "isn't shown: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {seeds} seeds) from .1 to .4",
        sparsity.by_share,
    ),
    Claim(
        sparsity.FILES,
        "with them the MoE is {mean:.1f} points ({low:.1f} to {high:.1f}; {seeds} seeds) better, and its busiest "
        "expert has {moe:.2f} times the mean load in place of {unbalanced:.2f}",
        sparsity.balanced,
    ),
    *levers.CLAIMS[:2],
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
        label_noise.FILES,
        "The finished model's margin has {random_margin:.2f} and {similar_margin:.2f} on the first two",
        label_noise.of_moe,
    ),
    Claim(
        label_noise.FILES,
        "the shares of the experts alone have {random_experts:.2f} and {similar_experts:.2f}, its pooled features "
        "{random_features:.2f} and {similar_features:.2f}",
        label_noise.of_moe,
    ),
    Claim(
        curve.FILES,
        "Of 8,000 clean images of CIFAR-10 and for as many steps (three seeds), 70 % drawn at random cost {random_70} "
        "points, 70 % chosen by CCS {ccs_70} and by AUM {aum_70}",
        curve.beside_all,
    ),
    Claim(
        duplicates.FILES,
        "Of {planted} altered copies planted among photos {named:.0%} were matched to their original, and of the first "
        "{planted} pairs listed {precision:.0%} are planted ones",
        duplicates.of_planted,
    ),
    *stem.CLAIMS[1:3],
    Claim(upcycling.STUDY, "the dense model trained on: {mean}", _restarted),
    Claim(
        SURGERY,
        "taking experts out cost {least:.2f} points at least (2 of 8 experts pruned, CIFAR-10) and {most:.2f} at most",
        least_and_most,
    ),
    Claim(
        analysis.ATLAS,
        "the choice of expert in block 3 tells {value_bits:.3f} bits about the class (95 % interval {low:.3f} to "
        "{high:.3f})",
        class_in_l3,
    ),
    Claim(analysis.ATLAS, "clusters of the layer's input tell {kmeans_input:.3f} bits", class_in_l3),
    Claim(
        analysis.COVERAGE,
        "in at least {score:.1%} of simulations",
        lambda record: record["lowest_coverage"],
    ),
    Claim(TRAIN, "runs at {twin} times its dense twin's speed", performance.moe),
    Claim(TRAIN, "{ratio} times the images/s of that twin in plain timm and Lightning", performance.in_lightning),
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
        "{without} times as long as under an even load where an uneven router learns without a balance loss, "
        "{with_loss} times with one",
        waiting.extremes,
    ),
    Claim(reliability.RESUME, "bit-identical in {equal} of {cells} cells", reliability.equal_cells),
]

DEFINITIONS = [
    Definition("airbench94, which reaches 94 % on the original", "the paper"),
    Definition("Balance losses cost at most 1 point", "the margin of H5 in `benchmarks/sparsity/protocol.md`"),
    Definition("less than 2 points of accuracy is not shown", "the margin; see `reliability.mean_difference`"),
]
