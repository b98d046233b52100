"""Recompute every measured number of README.md from runs.jsonl and left_out.jsonl, with NumPy and SciPy alone.

Question: a classifier names one of its classes whatever it is shown. How often does the distance from the nearest class
say that an image shows something else, and how often does it say so of the model's own kind?

Code: each record names the commit that measured it; commit 404600b4 has the measures beside Mahalanobis's. Areas under
ROC curves and their bootstrap intervals are as they were measured; shares, Wilson's intervals and means over sets are
computed from counts of images.

    python benchmarks/strangers/recompute.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

TITLES = {
    "photos": "photos",
    "cats_vs_dogs_two": "cats and dogs, two experts",
    "cifar10": "CIFAR-10",
    "pets": "drawn pets",
    "emoji": "pages of emoji",
}
CHOSEN_BY = ("Imagenette, first half", "CIFAR-10, other classes")
IN_THE_RATE = (
    "Imagenette, second half",
    "photos of other animals",
    "Tiny-ImageNet, other classes",
    "cats and dogs",
    "CIFAR-10",
)
OWN_KIND = "own: "  # begins the names of sets that show the model's classes
Record = dict[str, Any]


def share_beyond(images: Record) -> float:
    """Share of the images that lie beyond the threshold."""
    return images["beyond"] / images["images"]


def count_cells(images: Record) -> str:
    """Number of images, share beyond the threshold, and Wilson's 95 % interval of it."""
    interval = binomtest(images["beyond"], images["images"]).proportion_ci(0.95, method="wilson")
    return f"{images['images']:,} | {share_beyond(images):.1%} | {interval.low:.1%} to {interval.high:.1%}"


def recognized(record: Record) -> float:
    """Mean share beyond the threshold, over the sets of photos that the measure was not chosen by."""
    sets = record["sets"].items()
    return float(np.mean([share_beyond(images) for name, images in sets if name in IN_THE_RATE]))


def set_rows(record: Record) -> list[str]:
    """A row for the model's own test images and for each other set."""
    title = TITLES[record["name"]]
    rows = [f"| {title} | its own test images | {count_cells(record['test'])} |  | refused |"]
    for name, images in record["test"].get("of_class", {}).items():
        rows.append(f"| {title} | of these, {name} | {count_cells(images)} |  | refused |")
    for name, images in record["sets"].items():
        area = "{:.3f} ({:.3f} to {:.3f})".format(images["auroc"], *images["interval"])
        use = "chosen by" if name in CHOSEN_BY else "in the rate" if name in IN_THE_RATE else ""
        if name.startswith(OWN_KIND):
            area, use = "", "refused"
        rows.append(
            f"| {title} | {name.removeprefix(OWN_KIND)} | {count_cells(images)} | {area} | {use} |"
        )
    return rows


def measure_rows(record: Record) -> list[str]:
    """A row for each measure of distance: own test images refused, and means over both groups of sets."""
    title, test, rows = TITLES[record["name"]], record["test"], []
    for measure in ("Mahalanobis", *test.get("others", ())):
        is_main = measure == "Mahalanobis"
        refused = test["beyond"] if is_main else test["others"][measure]
        cells = [f"{refused / test['images']:.1%}"]
        for group in (CHOSEN_BY, IN_THE_RATE):
            sets = [images for name, images in record["sets"].items() if name in group]
            results = [images if is_main else images["others"][measure] for images in sets]
            pairs = zip(results, sets, strict=True)
            share = np.mean([result["beyond"] / images["images"] for result, images in pairs])
            area = np.mean([result["auroc"] for result in results])
            cells += [f"{area:.3f}", f"{share:.0%}"]
        rows.append(f"| {title} | {measure} | {' | '.join(cells)} |")
    return rows


def left_out_texts(records: list[Record]) -> list[str]:
    """Of models of photos that never learned one class: what that class's photos are to them."""
    rows = []
    for record in records:
        unsure = record["unsure"]
        areas = "{:.3f} | {:.3f}".format(record["auroc"][0], unsure["auroc"][0])
        name, count = next(iter(record["called"].items()))
        rows.append(
            f"| {record['name']} | {share_beyond(record):.1%} | {unsure['beyond'] / record['images']:.1%} | {areas} "
            f"| {name}, {count / record['images']:.0%} |"
        )
    shares = np.mean([share_beyond(record) for record in records])
    unsure = np.mean([record["unsure"]["beyond"] / record["images"] for record in records])
    refused = np.mean([share_beyond(record["own"]) for record in records])
    accuracy = np.mean([record["test"]["correct"] / record["test"]["total"] for record in records])
    return [
        *rows,
        f"the distance recognizes {shares:.1%} of a left-out class, the largest probability {unsure:.1%}",
        f"{refused:.1%} of their own test photos are refused, and {accuracy:.1%} named right",
    ]


def read(name: str) -> list[Record]:
    """The records of a file beside this one."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    records = read("runs.jsonl")
    rates = "; ".join(f"{TITLES[record['name']]} {recognized(record):.0%}" for record in records)
    readme = [
        f"Recognized, mean over the sets of photos that the measure was not chosen by: {rates}."
    ]
    for record in records:
        readme += set_rows(record) + measure_rows(record)
    readme += left_out_texts(read("left_out.jsonl"))
    best_first = sorted(records, key=recognized, reverse=True)
    files = ", ".join(f"`{record['name']}` {100 * recognized(record):.0f}" for record in best_first)
    return {"benchmarks/strangers/README.md": readme, "docs/reference/files.md": [f"{files} %."]}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
