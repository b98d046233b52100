"""benchmarks/demo/README.md."""

from statistics import median
from typing import Any

from benchmarks.demo.flips import flipped
from benchmarks.records import Claim, Definition

Json = dict[str, Any]
LATENCY, LOAD = "benchmarks/demo/latency.json", "benchmarks/demo/load.json"
PHOTOS, WHEEL = "benchmarks/demo/photos.json", "benchmarks/demo/wheel.json"
FLIPS = "benchmarks/demo/flips.json"
MATTERS = ("benchmarks/demo/matters.json", "moevision/demo/models/cifar10/card.json")
PACKED, LIVE = "benchmarks/demo/packed.json", "benchmarks/demo/live.json"
STALL, STALL_BEFORE = "benchmarks/demo/stall.json", "benchmarks/demo/stall_before.json"
CROWDS = {  # as the page calls them
    "png_49_megapixels": "PNG of 49 megapixels in 381 KB",
    "png_16_megapixels": "PNG of 16 megapixels in 124 KB",
    "jpeg_400": "JPEG of 400 x 400, 97 KB",
}
STEPS = {
    "forward": "the model alone, one image",
    "first_page": "first page, after the server is up",
    "layer_change": "another layer",
    "patch_click": "click on a patch",
    "new_picture": "another image, until the overlay is there",
    "expert_away": "an expert taken away",
    "away_cpu": "the same, its server's CPU",
    "own_picture": "one's own image",
}


def waiting(record: Json) -> list[Json]:
    """Median and 95 % of every step, by model, with the goal of the median."""
    rows = []
    for name, what in STEPS.items():
        models = [record["models"][model][name] for model in ("cats_vs_dogs", "pets")]
        times = [f"{own['median_ms']:.0f} ({own['p95_ms']:.0f}) ms" for own in models]
        goals = dict.fromkeys(
            "" if own["limit_ms"] is None else f"{own['limit_ms']:.0f}" for own in models
        )
        rows.append(
            {
                "what": what,
                "cells": " | ".join([*times, ", ".join(goals) + (" ms" if any(goals) else "")]),
            }
        )
    return rows


def crowds(*records: Json) -> list[Json]:
    """What the visitor beside each crowd met, and the most memory, in each record."""
    rows = []
    for name, what in CROWDS.items():
        cells = []
        for record in records:
            one = record["attacks"][name]
            met = [one["visitor"].get(word, 0) for word in ("ok", "busy", "unanswered")]
            latency = one["visitor"]["max_ms"]
            longest = "" if latency is None else f", at most {latency / 1e3:.1f} s"
            cells += [
                "{} / {} / {}".format(*met) + longest,
                f"{one['server_rss']['most_mb']:,.0f} MB",
            ]
        rows.append({"what": what, "cells": " | ".join(cells)})
    return rows


def installed(record: Json) -> Json:
    """Megabytes of the wheel, and photos right and asked for."""
    cat, dog = (record["classes"][name] for name in ("cat", "dog"))
    balanced = (cat["correct"] / cat["total"] + dog["correct"] / dog["total"]) / 2
    found = {
        name: f"{each['correct']} of {each['total']} {name}s"
        for name, each in (("cat", cat), ("dog", dog))
    }
    return {
        "mb": record["wheel_mb"],
        "total": cat["total"] + dog["total"],
        "balanced": f"{balanced:.1%}",
        **found,
    }


def packings(record: Json) -> list[Json]:
    """A packed model's bytes and answers beside bfloat16's."""
    rows = [
        {"name": "bfloat16", "cells": f"{record['bfloat16']['right']} | | | |"}
        | _megabytes(record["bfloat16"])
    ]
    for arm in record["packed"]:
        first, pair = (
            ", ".join(f"{layer[key]:.1%}" for layer in arm["layers"])
            for key in ("same_first", "same_set")
        )
        cells = f"{arm['right']} | {arm['same_class']} | {first} | {pair} |"
        rows.append({"name": arm["name"], "cells": cells} | _megabytes(arm))
    return rows


def live(record: Json) -> list[Json]:
    """Seconds to the first answer of each model in the browser, of processors and by the clock, and to the next one."""
    names = {"pets": "drawn pets", "cifar10": "CIFAR-10 photos", "cats_vs_dogs": "cats and dogs"}
    rows = []
    for model, name in names.items():
        own = record["models"][model]
        times = {
            "ran": own["cold_cpu_median_s"],
            "cold": median(own["cold_s"]),
            "next": own["next_median_s"],
        }
        rows.append({"name": name, **{key: f"{value:.1f}" for key, value in times.items()}})
    return rows


def of_all(record: Json) -> Json:
    """Own images of all models in the browser, counted."""
    own: Json = record["all"]
    return own


def of_flips(record: Json) -> Json:
    """Of answers that are right, how many change without some expert, and how many with as much away at random."""
    right = [label == answer for label, answer in zip(record["labels"], record["all"], strict=True)]
    sure = [own and p >= 0.7 for own, p in zip(right, record["sure"], strict=True)]
    told = {"images": len(right), "right": sum(right), "sure": sum(sure)}
    for kind in ("without", "at_random"):
        changed = flipped(record, kind)
        told |= {
            kind: changed[right].mean(),
            f"sure_{kind}": changed[sure].mean(),
            f"all_{kind}": changed.mean(),
        }
    return told


def opening(record: Json, card: Json) -> Json:
    """The image of README and of the site's start: what it is without the expert, and with as much away at random.

    A class with more than half of the probability is the answer.
    """
    case = record["case"]
    assert case == card["matters"], "the explorer leads to another case than the record's"
    before, after = (case[when]["class"] for when in ("before", "after"))
    stays = min(record["at_random"]) > 0.5
    return {
        "expert": case["away"][0][1],
        "before": before,
        "after": after,
        "stays": f"stays a {before}" if stays else "may change too",
        "still": f"still {before}" if stays else "not always",
    }


OPENING = Claim(
    MATTERS,
    "{before}'s photo: its patches fly into the boxes of eight small networks; without one of them the model says "
    "{after}, without as much at random {still}",
    opening,
)
"""What stands in the place of the image where it isn't shown."""


def of_bundled(record: Json) -> Json:
    """Of how many photos the opening's is the strongest, and what as much at random leaves of it."""
    draws = record["at_random"]
    before = record["case"]["before"]["class"]
    most = {
        "draws": len(draws),
        "keep": sum(each > 0.5 for each in draws),
        "least": min(draws),
        "before": before,
    }
    return {**record, **most}


def _megabytes(arm: Json) -> Json:
    return {
        "file": f"{arm['bytes'] / 1e6:.1f} MB",
        "compressed": f"{arm['compressed'] / 1e6:.1f} MB",
    }


CLAIMS = [
    Claim(PACKED, "| {name} | {file} | {compressed} | {cells}", packings),
    Claim(PACKED, "The {images} test photos, in float32"),
    Claim(PACKED, "at most {max_probability_change:.2f}", lambda record: record["packed"][1]),
    Claim(LIVE, "has {mb:.1f} MB, and beside them {photos_mb:.1f} MB of the photo model"),
    Claim(
        LIVE,
        "Of {images} own images, drawn pets and photos, {same_class} have Python's class, and {same_first:,} of "
        "{choices:,} first choices are Python's",
        of_all,
    ),
    Claim(LIVE, "(load average {load_average_before:.0f})", lambda record: record["machine"]),
    Claim(LIVE, "| {name} | {ran} | {cold} | {next} |", live),
    Claim(WHEEL, "the wheel of this checkout, {mb:.1f} MB,", installed),
    Claim(WHEEL, "{total} test photos, which no training saw", installed),
    Claim(WHEEL, "balanced accuracy {balanced}, {cat} and {dog}", installed),
    Claim(
        FLIPS,
        "Of {images:,} test images of CIFAR-10 {right:,} are named right. Without some one of 16 experts {without:.1%} "
        "of these get another class, with as many patches moved at random in as many draws {at_random:.1%}; of the "
        "{sure:,} that are as sure as the dog (.7 and more) {sure_without:.1%} and {sure_at_random:.1%}",
        of_flips,
    ),
    Claim(
        MATTERS[0],
        "each of {images} bundled photos. {right} are named right, and the answer of {flips} of these changes with "
        "some expert. The strongest case is the {before} of README",
        of_bundled,
    ),
    Claim(
        MATTERS[0],
        "{keep} of {draws} draws leave at least {least:.0%} to the {before}.",
        of_bundled,
    ),
    Claim(LATENCY, "in headless Chromium on {cpus} cores ({cpu}"),
    Claim(LATENCY, "| {what} | {cells} |", waiting),
    Claim(
        "benchmarks/demo/latency_before.json",
        "The page before took {layer_change[median_ms]:.0f} ms for another layer of the photo model on the same "
        "machine and {expert_away[median_ms]:.0f} ms for an expert taken away",
        lambda record: record["models"]["cats_vs_dogs"],
    ),
    Claim(LOAD, "{visitors} visitors for {seconds} s with different images"),
    Claim(
        LOAD,
        "{answers:,} answers, {answers_per_s:.1f} a second: {mixed_up} wrong, {busy} refused as busy, {error} failed",
    ),
    Claim(
        LOAD,
        "A new image took {latency[new picture][p50_ms]:.0f} ms (95 %: {latency[new picture][p95_ms]:.0f} ms), a "
        "what-if {latency[what_if][p50_ms]:.0f} ms ({latency[what_if][p95_ms]:.0f} ms)",
    ),
    Claim(LOAD, "memory went from {server_rss[start_mb]:.1f} MB to {server_rss[end_mb]:.1f} MB"),
    Claim(STALL, "{connections} connections from one address repeat an image, for {seconds:.0f} s"),
    Claim((STALL_BEFORE, STALL), "| {what} | {cells} |", crowds),
    Claim(
        (STALL_BEFORE, STALL),
        "(load average {before:.0f} and {after:.0f})",
        lambda *records: dict(
            zip(
                ("before", "after"),
                (record["machine"]["load_average_before"] for record in records),
                strict=True,
            )
        ),
    ),
    Claim(PHOTOS, "All {photos} views of bundled photos", lambda record: record["bundled"]),
    Claim(
        PHOTOS,
        "of the test photos {right} of {photos} are named right",
        lambda record: record["unseen"],
    ),
    Claim(
        PHOTOS,
        "{complaints} complaints of the browser, {too_wide} pages too wide",
        lambda record: {
            **record["bundled"],
            "complaints": sum(record[kind]["complaints"] for kind in ("bundled", "unseen")),
        },
    ),
]

DEFINITIONS = [
    Definition("median and, in brackets, 95 %", "a percentile"),
    Definition("the model alone and 50 ms", "a goal"),
    Definition("without an answer in 60 s", "a limit of the benchmark"),
]
