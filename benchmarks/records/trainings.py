"""What pages say of trainings: accuracy, load, cost, and differences over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from benchmarks.flops import routed_share
from benchmarks.subject import find_subject
from moevision.stats import Gap, accuracy_interval

Json = dict[str, Any]


def share(correct: int, total: int) -> str:
    """An accuracy with Wilson's 95 % interval."""
    low, high = accuracy_interval(correct, total)
    return f"{correct / total:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def right(run: Json) -> float:
    """Share of the test images that are right."""
    accuracy: float = run["test"]["correct"] / run["test"]["total"]
    return accuracy


def joined(values: Any, form: str = ".1f") -> str:
    """Numbers in a row."""
    return ", ".join(format(value, form) for value in values)


def of_run(run: Json) -> Json:
    """A run's accuracy, its layers' busiest experts, its CPU time, and what else it was compared with."""
    contenders = (run.get("choice") or {}).get("contenders", ())
    compared = zip(("probe", "dense", "moe"), contenders, strict=False)
    return {
        **run,
        "top1": share(run["test"]["correct"], run["test"]["total"]),
        "cpu_s": run["cost"]["cpu_s"] or run.get("observed", {}).get("cpu_s"),
        "loads": joined((layer["max_over_mean"] for layer in run["layers"]), ".2f"),
        **{name: share(each["correct"], each["total"]) for name, each in compared},
    }


def of_runs(*runs: Json) -> Json:
    """Several runs: mean accuracy with Student's t interval over seeds, extremes, cost, and each run's numbers."""
    shares, minutes = [right(run) for run in runs], [run["cost"]["duration_s"] / 60 for run in runs]
    _, val, train = zip(*(run["curve"][-1] for run in runs), strict=True)
    gap = Gap.of(shares)
    rows = [of_run(run) for run in runs]
    return {
        **{
            "mean": statistics.fmean(shares),
            "half": gap.high - gap.mean,
            "least": min(shares),
            "most": max(shares),
        },
        **{"val": statistics.fmean(val), "train": statistics.fmean(train)},
        **{"fastest": min(minutes), "slowest": max(minutes)},
        "total": runs[0]["test"]["total"],
        "images": runs[0]["cost"]["images"],
        "tests": joined(100 * each for each in shares),
        "intervals": ", ".join(row["top1"] for row in rows),
        "last_loads": ", ".join(row["loads"].split(", ")[-1] for row in rows),
        "cpu_s": joined((row["cpu_s"] for row in rows), ",.0f"),
        "seconds": joined((run.get("command_cpu_s", 0) for run in runs), ".0f"),
        "seeds": f"seed{'s' * (len(runs) > 1)} {joined((run['seed'] for run in runs), 'd')}",
        "first": runs[0]["seed"],
        "curve": joined(100 * top1 for _, top1, _ in runs[0]["curve"]),
    }


def experts_of(run: Json) -> list[Json]:
    """What a run on pages of emoji says of each expert, line by line."""
    lines = [line.strip() for line in run["experts"]]
    return [{"line": line} for line in lines if line.startswith("expert ")]


def in_own_expert(*runs: Json) -> Json:
    """Of each layer, as `L7`, the share of the first class in expert 0 and of the second in 1, in per cent, by run."""
    shares: dict[str, list[str]] = {}
    for run in runs:
        for layer in run["layers"]:
            (first, _), (_, second) = layer["class_share"]
            text = f"{100 * first:.0f} / {100 * second:.0f}"
            shares.setdefault(f"L{layer['layer']}", []).append(text)
    return {name: ", ".join(texts) for name, texts in shares.items()}


def to_ninety(*runs: Json) -> Json:
    """After how many epochs validation first has 90 %, and the CPU minutes until then, each epoch an equal share."""
    epochs = [
        next(epoch for epoch, (_, top1, _) in enumerate(run["curve"], 1) if top1 >= 0.9)
        for run in runs
    ]
    minutes = [
        epoch / len(run["curve"]) * run["cost"]["cpu_s"] / 60
        for epoch, run in zip(epochs, runs, strict=True)
    ]
    return {"epochs": joined(epochs, "d"), "minutes": joined(minutes)}


def moe_less_dense(*runs: Json) -> Json:
    """The first three minus the rest: points with Welch's interval, and what it says in words."""
    tests = [100 * right(run) for run in runs]
    moe, dense = tests[:3], tests[3:]
    low, high = ttest_ind(moe, dense, equal_var=False).confidence_interval()
    verdict = "not told apart" if low < 0 < high else "better" if low > 0 else "worse"
    gap = statistics.fmean(moe) - statistics.fmean(dense)
    counts = {"moe": len(moe), "dense": len(dense)}
    return {"mean": gap, "low": low, "high": high, "verdict": verdict, **counts}


def more(longer: Json, *short: Json) -> Json:
    """What the longer run has beyond the mean of the short ones."""
    gap = right(longer) - statistics.fmean(map(right, short))
    times = longer["cost"]["training_flops"] / short[0]["cost"]["training_flops"]
    return {"points": 100 * gap, "times": times}


def avx2_seconds(step: Json, run: Json) -> Json:
    """Seconds of the training steps of a run's images, in float32 on one thread without AVX-512."""
    assert (step["machine"]["instructions"], step["settings"]["precision"]) == ("AVX2", "fp32")
    return {"seconds": run["cost"]["images"] / step["rows"][0]["images_per_s"]}


def outside(record: Json) -> Json:
    """What airbench94 reaches: an image alone, the mean over views; its backward pass costs twice the forward one."""
    (run,) = record["runs"]
    alone, views = (share(run[name], run["total"]) for name in ("correct", "correct_of_views"))
    pflop = 3 * run["flops_per_image"] * run["images"] / 1e15
    return {**run, "alone": alone, "views": views, "pflop": pflop}


def starts(record: Json) -> list[Json]:
    """A row for each seed: share of either data set's test images that is right with either start."""
    rows: dict[int, Json] = defaultdict(dict)
    for run in record["runs"]:
        rows[run["seed"]] |= {"seed": run["seed"], f"{run['data']}_{run['start']}": right(run)}
    return [rows[seed] for seed in sorted(rows)]


def start_gain(record: Json, data: str) -> Json:
    """The probe's start minus a random one: points with Student's t interval over seeds, and mean CPU seconds."""
    spent = defaultdict(list)
    for run in record["runs"]:
        if run["data"] == data:
            spent[run["start"]].append(run["cpu_s"])
    gaps = [100 * (row[f"{data}_probe"] - row[f"{data}_random"]) for row in starts(record)]
    return {
        **vars(Gap.of(gaps)),
        **{start: statistics.fmean(each) for start, each in spent.items()},
    }


def earlier_epochs(*runs: Json) -> list[Json]:
    """Trainings whose best validation wasn't their last, and by how many points it was ahead."""
    rows = []
    for run in runs:
        curve = [top1 for _, top1, _ in run["curve"]]
        best = curve.index(max(curve)) + 1
        if best < len(curve):
            ahead = 100 * (max(curve) - curve[-1])
            rows.append({"name": run["name"], "best": best, "epochs": len(curve), "ahead": ahead})
    return rows


def with_places(*runs: Json, name: str) -> Json:
    """A recipe with the mean, with places read, and the difference by seed."""
    by_head: dict[str, dict[int, float]] = {"mean": {}, "places": {}}
    moved = []
    for run in runs:
        if run["name"].startswith(name):
            head = "places" if "places" in run["name"] else "mean"
            by_head[head][run["seed"]] = right(run)
        if run["name"].startswith(f"{name}-places"):
            moved.append(run["shifted_4"])
    mean, places = by_head.values()
    gap = Gap.of([100 * (mean[seed] - places[seed]) for seed in mean.keys() & places.keys()])
    assert gap.mean > 0
    means = {head: 100 * statistics.fmean(own.values()) for head, own in by_head.items()}
    shifted = 100 * statistics.fmean(moved) if moved else None
    return {**vars(gap), "gap": gap.mean, **means, "shifted": shifted}


def of_card(card: Json) -> Json:
    """The accuracies of a bundled model and of its twin."""
    total = card["test_images"]
    shown = {name: share(round(top1 * total), total) for name, top1 in card["accuracy"].items()}
    return {**shown, "total": total}


def loads(record: Json) -> Json:
    """Busiest expert over the mean, and CV², in each layer: of a run's summary, or of a bundled model's atlas."""
    counts = np.array([layer.get("counts", layer.get("loads")) for layer in record["layers"]])
    mean = counts.mean(1)
    busiest, spread = counts.max(1) / mean, counts.var(1) / mean**2
    images = record["n_images"] if "n_images" in record else record["test"]["total"]
    texts = {"busiest": joined(busiest, ".2f"), "spread": joined(spread, ".4f")}
    return {**texts, "images": images, "most": max(busiest)}


def last_load(record: Json) -> Json:
    """The busiest expert's load at the end over an equal share, and the accuracy, of both trainings."""
    values = {}
    for name, arm in zip(("without", "with_loss"), record["arms"], strict=True):
        last = arm["shares"][-1]
        values |= {name: max(last) * len(last), f"{name}_right": arm["correct"] / arm["total"]}
    return values


@cache
def routed_shares() -> Json:
    """Share of the FLOPs of each shipped recipe that is in routed experts, and the extremes; counted, no record."""
    shares = {}
    for name in ("cifar10", "imagenette", "cats_vs_dogs", "quickstart"):
        subject = find_subject(name)
        shares[name] = routed_share(subject.build().eval(), subject.image_size)
    return {**shares, "least": min(shares.values()), "most": max(shares.values())}


# ---- reliability


def guard_difference(record: Json) -> Json:
    """Points of accuracy that the faults cost, with Student's interval over seeds, and if it excludes a loss of 2."""
    gap = Gap.of([100 * run["difference"] for run in record["runs"]])
    (left_out,) = {run["skipped"] + run["updates_taken_back"] for run in record["runs"]}
    shown = "**not shown**" if gap.low < -2 else "shown"
    return {**vars(gap), "left_out": left_out, "epochs": record["epochs"], "shown": shown}


def equal_cells(record: Json) -> Json:
    """Cells of the matrix, and those in which nothing differs."""
    cells = record["cells"].values()
    equal = sum(not cell["differs"] and not cell["leaked"] for cell in cells)
    return {"equal": equal, "cells": len(cells)}


def kills(*runs: Json) -> list[Json]:
    """Kills that struck, and runs, of each form; no checkpoint was damaged, and no run ended otherwise."""
    assert not any(kill["damaged"] for run in runs for kill in run["kills"])
    assert not any(run["differs"] or run["leaked"] for run in runs)
    struck = defaultdict(list)
    for run in runs:
        struck[run["form"]].append(sum(kill["killed"] for kill in run["kills"]))
    return [{"form": form, "kills": sum(each), "runs": len(each)} for form, each in struck.items()]


def mutants(record: Json, reasons: dict[str, str]) -> list[Json]:
    """A row for each area and one for all: how many were killed, survived, are equivalent; and the share killed."""
    rows = []
    for area in [*dict.fromkeys(row["area"] for row in record["mutants"]), "all"]:
        own = [row for row in record["mutants"] if area in (row["area"], "all")]
        killed = sum(row["outcome"] in ("killed", "timeout") for row in own)
        equivalent = sum(row["outcome"] == "survived" and row["key"] in reasons for row in own)
        others = len(own) - equivalent
        counts = {"mutants": len(own), "killed": killed, "survived": others - killed}
        rows.append({"area": area, **counts, "equivalent": equivalent, "share": killed / others})
    return rows
