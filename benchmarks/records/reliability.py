"""benchmarks/reliability/README.md."""

from typing import Any

import numpy as np
from scipy.stats import sem, t

from benchmarks.records import Claim, Definition

Json = dict[str, Any]
GUARD, COST, SOAK = (
    "benchmarks/guard/accuracy.json",
    "benchmarks/guard/cost.json",
    "benchmarks/reliability/soak.json",
)
RESUME, KILLS = "benchmarks/reliability/resume.json", "benchmarks/reliability/kills.jsonl"


def mean_difference(record: Json) -> Json:
    """Points of accuracy that the faults cost, with Student's interval over seeds, and if it excludes a loss of 2."""
    points = 100 * np.array([run["difference"] for run in record["runs"]])
    low, high = t.interval(0.95, len(points) - 1, points.mean(), sem(points))
    (left_out,) = {run["skipped"] + run["updates_taken_back"] for run in record["runs"]}
    return {
        "difference": points.mean(),
        "low": low,
        "high": high,
        "seeds": len(points),
        "left_out": left_out,
        "epochs": record["epochs"],
        "shown": "**not shown**" if low < -2 else "shown",
    }


def equal_cells(record: Json) -> Json:
    """Cells of the matrix, and those in which nothing differs."""
    cells = record["cells"].values()
    return {
        "equal": sum(not cell["differs"] and not cell["leaked"] for cell in cells),
        "cells": len(cells),
    }


def kills(*runs: Json) -> list[Json]:
    """Kills that struck, and runs, of each form; no checkpoint was damaged, and no run ended otherwise."""
    assert not any(kill["damaged"] for run in runs for kill in run["kills"])
    assert not any(run["differs"] or run["leaked"] for run in runs)
    struck: dict[str, list[int]] = {}
    for run in runs:
        struck.setdefault(run["form"], []).append(sum(kill["killed"] for kill in run["kills"]))
    return [{"form": form, "kills": sum(each), "runs": len(each)} for form, each in struck.items()]


MUTANTS = ("benchmarks/mutation.json", "benchmarks/mutation_equivalent.json")


def mutants(record: dict[str, Any], reasons: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each area and one for all: how many were killed, survived, are equivalent; and the share killed."""
    rows = []
    for area in [*dict.fromkeys(row["area"] for row in record["mutants"]), "all"]:
        of_area = [row for row in record["mutants"] if area in (row["area"], "all")]
        killed = sum(row["outcome"] in ("killed", "timeout") for row in of_area)
        equivalent = sum(row["outcome"] == "survived" and row["key"] in reasons for row in of_area)
        others = len(of_area) - equivalent
        rows.append(
            {"area": area, "mutants": len(of_area), "killed": killed, "survived": others - killed}
            | {"equivalent": equivalent, "share": killed / others}
        )
    return rows


CLAIMS = [
    Claim(GUARD, "cost less than 2 points of accuracy (the margin): {shown}", mean_difference),
    Claim(
        GUARD,
        "{epochs} epochs, {left_out} updates skipped or taken back in each run: {difference:+.1f} points (95 % "
        "interval of the mean over {seeds} seeds: {low:+.1f} to {high:+.1f})",
        mean_difference,
    ),
    Claim(
        COST,
        "{cost_percent:.2f} % of the CPU time of a step, router health included; steps with and without it, taken in "
        "turns, don't show it: their ratio of {pair_ratio_median:.3f} (quartiles {pair_ratio_quartiles[0]:.3f} to "
        "{pair_ratio_quartiles[1]:.3f}) has other causes",
    ),
    Claim(
        "benchmarks/avx2_tests.json",
        "{parts[0][passed]:,} and {parts[1][passed]:,} tests in two runs",
    ),
    Claim(
        MUTANTS,
        "| {area} | {mutants} | {killed} | {survived} | {equivalent} | {share:.0%} |",
        mutants,
    ),
    Claim("benchmarks/mutation.json", "{number} are drawn by seed from {of:,} possible changes"),
    Claim("benchmarks/mutation.json", "`pytest` alone kills {killed_by_pytest}"),
    Claim(RESUME, "{equal} of {cells} cells identical", equal_cells),
    Claim(KILLS, "{form}: {kills} kills in {runs} runs", kills),
    Claim(
        SOAK,
        "| {training[steps]:,} training steps, with validation and checkpoints | {training[rss_mb]:.0f} MB at the end, "
        "{training[rss_growth_mb]:+.1f} MB since the second quarter; {training[files]} open files, unchanged |",
    ),
    Claim(
        SOAK,
        "| {predictions[calls]} predictions, each with a freshly opened model | {predictions[rss_mb]:.0f} MB at the "
        "end, {predictions[rss_growth_mb]:+.1f} MB since the second quarter; {predictions[files]} open "
        "files, unchanged |",
    ),
]

DEFINITIONS = [
    Definition("with one sentence within 30 s", "a bound that the tests hold, SILENT_S"),
    Definition("says so within 30 s", "the same"),
    Definition("It costs at most 2 % of a step", "the promise"),
    Definition(
        "more memory than 1.25 × the numbers in its weights and 64 MB", "the limit in the code"
    ),
    Definition("a file of 0.3 MB, under a limit of 700 MB", "what the test sets up"),
    Definition("under 900 MB", "the bound that the test asserts"),
    Definition("unfold to 200 MB: under 100 MB", "the bound that the test asserts"),
    Definition("refused within 2 s of CPU time", "the bound that the test asserts"),
    Definition("The goal of 92 % is reached", "the goal"),
    Definition("200 MB asked for, 100 MB left", "what the test sets up"),
]
