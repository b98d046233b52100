"""benchmarks/accuracy/README.md."""

import statistics
from functools import partial
from typing import Any

from scipy.stats import t as student_t
from scipy.stats import ttest_ind

from benchmarks.records import Claim, Definition
from benchmarks.records.performance import TRAIN, moe
from benchmarks.records.quickstart import share
from moevision.stats import Gap

Json = dict[str, Any]
RUNS = "benchmarks/accuracy/runs.jsonl"
CIFAR = [f"{RUNS}#cifar10-s{seed}" for seed in range(3)]
TWIN = f"{RUNS}#cifar10-dense-s0"
LONG, LONGER = (f"{RUNS}#cifar10-long-s{seed}" for seed in range(2))
OUTSIDE = "benchmarks/accuracy/airbench.json"
START = "benchmarks/accuracy/head.json"
CIFAR_PRETRAINED = f"{RUNS}#cifar10-pretrained-s0"
FOLDERS = [f"{RUNS}#folder-clusters{seed}" for seed in ("", "-s1", "-s2")]
SHOWN, SHOWN_TWIN = (f"{RUNS}#cifar10-explorer{name}-s0" for name in ("", "-dense"))
FOLDER = FOLDERS[0]
NONE, BOTH = (f"{RUNS}#folder-{name}" for name in ("none", "twin"))
IMAGENETTE, IMAGENETTE_FOLDER = (f"{RUNS}#imagenette-{name}" for name in ("s0", "pretrained-s0"))
CATS_DENSE = [f"{RUNS}#cats-dense-s{seed}" for seed in range(2)]
CATS_DENSE_DATA = [f"{RUNS}#cats-dense-d{seed}" for seed in range(3)]
CATS = [f"{RUNS}#cats-moe-s{seed}" for seed in range(3)]


def of_run(record: Json) -> Json:
    """One row of the table."""
    cost, test = record["cost"], record["test"]
    return {
        "top1": share(test["correct"], test["total"]),
        "images": cost["images"],
        "pflop": cost["training_flops"] / 1e15,
        "cpu_s": cost["cpu_s"] or record["observed"]["cpu_s"],
        "loads": ", ".join(f"{layer['max_over_mean']:.2f}" for layer in record["layers"]),
    }


def mean(*records: Json) -> Json:
    """Test accuracy, validation's at the end, and that of the last epoch's batches: means over seeds."""
    _, val, train = zip(*(record["curve"][-1] for record in records), strict=True)
    tests = [record["test"]["correct"] / record["test"]["total"] for record in records]
    return {
        "mean": sum(tests) / len(tests),
        "val": sum(val) / len(val),
        "train": sum(train) / len(train),
    }


def extremes(*records: Json) -> Json:
    """The lowest and the highest test accuracy, in per cent."""
    tests = [100 * record["test"]["correct"] / record["test"]["total"] for record in records]
    return {"least": min(tests), "most": max(tests)}


def over_seeds(*records: Json) -> Json:
    """Mean test accuracy in per cent with Student's t interval over seeds (of three: t = 4.303)."""
    tests = [100 * record["test"]["correct"] / record["test"]["total"] for record in records]
    half = student_t.ppf(0.975, len(tests) - 1) * statistics.stdev(tests) / len(tests) ** 0.5
    return {"mean": statistics.fmean(tests), "half": half}


def moe_less_dense(*records: Json) -> Json:
    """Cats and dogs, the first three minus the rest: points with Welch's interval, and what it says in words."""
    tests = [100 * each["test"]["correct"] / each["test"]["total"] for each in records]
    found = ttest_ind(tests[:3], tests[3:], equal_var=False)
    low, high = found.confidence_interval()
    verdict = "not told apart" if low < 0 < high else "better" if low > 0 else "worse"
    gap = statistics.fmean(tests[:3]) - statistics.fmean(tests[3:])
    return {
        "mean": gap,
        "low": low,
        "high": high,
        "verdict": verdict,
        "moe": 3,
        "dense": len(tests) - 3,
    }


def pairs(*records: Json) -> Json:
    """MoE, its twin, another MoE, its twin, of one seed each: points between."""
    tests = [100 * each["test"]["correct"] / each["test"]["total"] for each in records]
    return {"first": tests[0] - tests[1], "second": tests[2] - tests[3]}


def reached(twin: Json, *records: Json) -> Json:
    """CPU seconds until 85 % of validation, each epoch an equal share."""
    spent = [
        next(place for place, (_, top1, _) in enumerate(each["curve"], 1) if top1 >= 0.85)
        / len(each["curve"])
        * each["cost"]["cpu_s"]
        for each in (twin, *records)
    ]
    return {"twin": spent[0], "moe": statistics.fmean(spent[1:])}


def of_folders(*records: Json) -> Json:
    """Minutes that `fit FOLDER` took, and what it reached."""
    minutes = [record["cost"]["duration_s"] / 60 for record in records]
    right = [record["test"]["correct"] / record["test"]["total"] for record in records]
    return {
        "fastest": min(minutes),
        "slowest": max(minutes),
        "least": 100 * min(right),
        "most": max(right),
        **mean(*records),
    }


def to_ninety(*records: Json) -> Json:
    """After how many epochs validation first has 90 %, and the CPU minutes until then, each epoch an equal share."""
    epochs = [
        next(place for place, (_, top1, _) in enumerate(each["curve"], 1) if top1 >= 0.9)
        for each in records
    ]
    shares = [epoch / len(each["curve"]) for epoch, each in zip(epochs, records, strict=True)]
    minutes = [
        share * each["cost"]["cpu_s"] / 60 for share, each in zip(shares, records, strict=True)
    ]
    return {
        "epochs": ", ".join(map(str, epochs)),
        "minutes": ", ".join(f"{each:.1f}" for each in minutes),
    }


def outside(record: Json) -> Json:
    """What airbench94 reaches: an image alone, the mean over views, and what it cost."""
    (run,) = record["runs"]
    alone, views = (share(run[name], run["total"]) for name in ("correct", "correct_of_views"))
    pflop = 3 * run["flops_per_image"] * run["images"] / 1e15  # backward is twice forward
    return {
        "alone": alone,
        "views": views,
        "pflop": pflop,
        "cpu_s": run["cpu_s"],
        "train": run["train_images"],
    }


def hours(record: Json) -> Json:
    """What a training took, stops left out."""
    return {"hours": record["cost"]["duration_s"] / 3600}


def more(long: Json, *short: Json) -> Json:
    """What the longer run has beyond the mean of the short ones."""
    times = long["cost"]["training_flops"] / short[0]["cost"]["training_flops"]
    return {"points": 100 * (mean(long)["mean"] - mean(*short)["mean"]), "times": times}


def of_folder(record: Json) -> Json:
    """What `fit FOLDER` reached, and the time that it had announced."""
    cost, choice = record["cost"], record["choice"]
    probe = (
        {}
        if choice is None
        else {"probe": share(*(choice["contenders"][0][name] for name in ("correct", "total")))}
    )
    return {
        **of_run(record),
        "expected_s": cost["expected_s"],
        "took_s": cost["duration_s"],
        **probe,
    }


def starts(record: Json) -> list[Json]:
    """A row for each seed: share of either data set's test images that is right with either start."""
    found: dict[int, Json] = {}
    for run in record["runs"]:
        name = f"{run['data']}_{run['start']}"
        found.setdefault(run["seed"], {"seed": run["seed"]})[name] = (
            run["test"]["correct"] / run["test"]["total"]
        )
    return [found[seed] for seed in sorted(found)]


def start_gain(record: Json, data: str) -> Json:
    """The probe's start minus a random one: points with Student's t interval over seeds, and mean CPU seconds."""
    spent = {
        start: statistics.fmean(
            run["cpu_s"] for run in record["runs"] if (run["data"], run["start"]) == (data, start)
        )
        for start in ("probe", "random")
    }
    gaps = [100 * (row[f"{data}_probe"] - row[f"{data}_random"]) for row in starts(record)]
    return {**vars(Gap.of(gaps)), **spent}


HEAD = (
    "{top1} % of {total:,} test images ({seeds}), {cpu_s} CPU seconds in bf16 on one thread. Validation after "
    "each epoch (seed {first}): {curve} %"
)
"""What the head of a config says, for `of_runs`."""


def of_choice(record: Json) -> Json:
    """What `fit --with-twin` compared, on the same test images."""
    shares = [share(each["correct"], each["total"]) for each in record["choice"]["contenders"]]
    return {**of_folder(record), **dict(zip(("probe", "dense", "moe"), shares, strict=True))}


def of_runs(*records: Json) -> Json:
    """A recipe's runs: accuracy and cost of each, and the first one's curve."""
    tests = [record["test"] for record in records]
    return {
        "top1": ", ".join(f"{100 * test['correct'] / test['total']:.1f}" for test in tests),
        "total": tests[0]["total"],
        "seeds": f"seed{'s' * (len(records) > 1)} "
        + ", ".join(str(record["seed"]) for record in records),
        "cpu_s": ", ".join(f"{record['cost']['cpu_s']:,.0f}" for record in records),
        "first": records[0]["seed"],
        "curve": ", ".join(f"{100 * top1:.1f}" for _, top1, _ in records[0]["curve"]),
    }


def _row(path: str, run: str) -> Claim:
    return Claim(
        path,
        f"{run} | {{top1}} | {{images:,}} | {{pflop:.3f}} | {{cpu_s:,.0f}} | {{loads}} |",
        of_run,
    )


def of_avx2(step: Json, run: Json) -> Json:
    """Seconds of the training steps of a run's images, in float32 on one thread without AVX-512."""
    assert (step["machine"]["instructions"], step["settings"]["precision"]) == ("AVX2", "fp32")
    return {"seconds": run["cost"]["images"] / moe(step)["images_per_s"]}


CLAIMS = [
    *(_row(path, f"seed {seed}") for seed, path in enumerate(CIFAR)),
    _row(TWIN, "dense twin, seed 0"),
    _row(SHOWN, "the explorer's, seed 0"),
    _row(SHOWN_TWIN, "dense twin of the explorer's"),
    Claim(tuple(CIFAR), "The mean of three seeds is {mean:.2%}", mean),
    Claim(
        tuple(CIFAR),
        "right on {train:.1%} of the last epoch's batches, {val:.1%} of validation",
        mean,
    ),
    Claim(
        (TRAIN.format("cifar10-avx2"), CIFAR[0]),
        "the images of a training take {seconds:,.0f} s of training steps",
        of_avx2,
    ),
    Claim(
        (LONG, *CIFAR),
        "gets {points:.2f} points more than the recipe for {times:.1f} times the FLOPs",
        more,
    ),
    Claim(LONG, "right on {train:.1%} of the last epoch's batches, {val:.1%} of validation", mean),
    Claim(LONGER, "on {train:.1%} of its harder batches, {val:.1%} of validation", mean),
    Claim(LONGER, "the second took {hours:.1f} hours", hours),
    Claim(
        OUTSIDE,
        "on the copy's {train:,} training images, is right on {alone} of the test images",
        outside,
    ),
    Claim(OUTSIDE, "and on {views} with the paper's mean over mirrored and shifted views", outside),
    Claim(
        OUTSIDE,
        "{pflop:.3f} PFLOP, {cpu_s:,.0f} CPU seconds in bf16 on one thread, other work",
        outside,
    ),
    _row(LONG, "26 epochs, seed 0"),
    _row(LONGER, "40 epochs, seed 1"),
    _row(CIFAR_PRETRAINED, "one epoch at 84 px, seed 0"),
    Claim(
        CIFAR_PRETRAINED,
        "{expected_s:,.0f} s were announced, {took_s:,.0f} s it took. Logistic",
        of_folder,
    ),
    Claim(
        CIFAR_PRETRAINED, "the frozen features is right on {probe} of 2,000 test images", of_folder
    ),
    *(_row(path, f"MoE, seed {seed}") for seed, path in enumerate(CATS)),
    _row(CATS_DENSE[0], "dense, seed 0"),
    _row(CATS_DENSE[1], "dense, flips alternate"),
    *(
        _row(path, f"dense, flips alternate, `--data.seed {seed}`")
        for seed, path in enumerate(CATS_DENSE_DATA)
    ),
    Claim(
        tuple(CATS), "The mean of the MoE's three seeds is {mean:.1f} ± {half:.1f} %", over_seeds
    ),
    Claim(
        tuple(CATS_DENSE_DATA), "The mean of these three is {mean:.1f} ± {half:.1f} %", over_seeds
    ),
    Claim(tuple(CATS), "has 90 % after epochs {epochs}: {minutes} CPU minutes", to_ninety),
    Claim(tuple(FOLDERS), "has 90 % after epochs {epochs}: {minutes} CPU minutes", to_ninety),
    Claim(
        FOLDER,
        "{top1}; {expected_s:.0f} s were announced, {took_s:.0f} s it took (without stops; one thread, bf16). Busiest "
        "experts at {loads} times the mean load.",
        of_folder,
    ),
    Claim(
        BOTH,
        "the MoE is right on {moe}, the dense model on {dense}, the probe on {probe}; {expected_s:.0f} s were "
        "announced for the MoE, {took_s:.0f} s it took",
        of_choice,
    ),
    Claim(
        NONE,
        "{top1}; {expected_s:,.0f} s were announced, {took_s:,.0f} s it took, other work beside it. One seed.",
        of_folder,
    ),
    Claim(FOLDER, "frozen features is right on {probe}", of_folder),
    Claim(
        tuple(FOLDERS[1:]),
        "With seeds 1 and 2: {tests}, busiest experts of the last block at {loads};",
        lambda *records: {
            "tests": ", ".join(of_run(record)["top1"] for record in records),
            "loads": ", ".join(of_run(record)["loads"].split(", ")[-1] for record in records),
        },
    ),
    Claim(tuple(FOLDERS), "the mean of three is {mean:.1%}", mean),
    Claim(
        START,
        "| seed {seed} | {cats_vs_dogs_probe:.1%} | {cats_vs_dogs_random:.1%} | {imagenette128_probe:.1%} "
        "| {imagenette128_random:.1%} |",
        starts,
    ),
    *(
        Claim(START, text, partial(start_gain, data=data))
        for data, on in (("cats_vs_dogs", "cats and dogs"), ("imagenette128", "Imagenette"))
        for text in (
            f"{{mean:+.1f}} points ({{low:+.1f}} to {{high:+.1f}}; {{seeds}} seeds) on {on}",
            f"{{probe:.0f}} and {{random:.0f}} CPU seconds on {on}",
        )
    ),
    _row(IMAGENETTE, "from scratch, `configs/imagenette.yaml`, seed 0"),
    _row(IMAGENETTE_FOLDER, "`fit FOLDER --pretrained FILE`, seed 0"),
]

DEFINITIONS = [
    Definition("the goal of 4,200 CPU seconds without bf16", "a goal"),
    Definition("ten blocks at 168 px, 5 epochs", "a recipe"),
    Definition("the goals were 97 % and, if possible, 98.5 %", "goals"),
    Definition("Student's 95 % over seeds", "the level of the interval"),
    Definition(
        "on 2,048 training photos of cats and dogs and the same 832 test photos", "the data"
    ),
    Definition("three epochs at 112 px", "what `fit` chose"),
    Definition("16 epochs at 128 px", "a recipe"),
    Definition("The goals were 80 % from scratch and 95 % from pretrained weights", "goals"),
    Definition(
        "It chose 112 px, three epochs and four experts of which one is active", "what `fit` chose"
    ),
    Definition("it chose `vit_moe_hybrid_patch8_32`, 64 px and 69 epochs", "what `fit` chose"),
    Definition("64 tokens, Muon, 10 epochs", "a recipe"),
    Definition("Wilson's 95 % over test images", "the level of the intervals"),
    Definition("the project's goals were 87 % and, if possible, 89 %", "goals"),
    Definition("The goal was 90 % within 2.5 hours", "a goal"),
    Definition("a convolutional net that reaches 94 % on the original", "the paper"),
    Definition("so the goal of 90 % is beyond it", "a goal"),
    Definition(
        "with width 192 and 16 tokens (`--model.arch.embed_dim 192 --model.arch.patch_size 8`)",
        "a recipe",
    ),
    Definition("`--data.random_erasing 0.5 --trainer.max_epochs 26`", "a recipe"),
    Definition(
        "`--data.augment trivialaugment --data.random_erasing 0.25 --trainer.max_epochs 40`",
        "a recipe",
    ),
    Definition("from its 16th epoch", "how it was run"),
]
