"""benchmarks/infer/README.md."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.records import Claim, Definition

Json = dict[str, Any]
BEFORE, ROOFLINE = "benchmarks/infer/before.jsonl", "benchmarks/infer/roofline.json"
BATCHES = (1, 2, 4, 8, 64)


def by_model(rows: Sequence[Json], precision: str) -> list[Json]:
    """Rows of the table of a precision: time ÷ the twin's, before and after, with the quartiles after."""
    found: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        if row["precision"] == precision and row["threads"] == 1:
            before, after = row["before"]["ratio"], row["after"]["ratio"]
            spread = f"({after['quartile_1']:.2f} to {after['quartile_3']:.2f})"
            found.setdefault(row["model"], []).append(
                f"{before['median']:.2f}, **{after['median']:.2f}** {spread}"
            )
    return [{"model": name, "cells": " | ".join(cells)} for name, cells in found.items()]


def extremes(*lines: Json) -> Json:
    """The largest ratios after, by precision and batch, and how many of the rows keep to 1.3."""
    rows = [row for row in lines if row["threads"] == 1 and row["batch"] <= 8]
    found: Json = {}
    for precision in ("fp32", "bf16"):
        own = [row for row in rows if row["precision"] == precision]
        found[precision] = max(row["after"]["ratio"]["median"] for row in own)
        found[f"{precision}_met"] = sum(
            round(row["after"]["ratio"]["median"], 2) <= 1.3 for row in own
        )
        found[f"{precision}_met_before"] = sum(
            round(row["before"]["ratio"]["median"], 2) <= 1.3 for row in own
        )
        found[f"{precision}_rows"] = len(own)
    return found


def speed(*ratios: float) -> str:
    """How a model that takes so many times another's time compares; a tenth isn't counted."""
    if min(ratios) > 1.1:
        return "slower"
    return "faster" if max(ratios) < 1 / 1.1 else "about as fast"


def parts(record: Json) -> list[Json]:
    """Rows of the roofline's table."""
    fp32, bf16 = record["rows"]
    rows = [
        {"part": name, "fp32": f"{value:.0f}", "bf16": f"{bf16['microseconds'][name]:.0f}"}
        for name, value in fp32["microseconds"].items()
    ]
    more: dict[str, Callable[[Json], str]] = {
        "calls of torch in the layer, in the Mlp": lambda row: "{layer}, {Mlp}".format_map(
            row["calls"]
        ),
        "more for bytes, in a layer": lambda row: f"{row['more_for_bytes']:.0f}",
        "more for calls, in a layer": lambda row: f"{row['more_for_calls']:.0f}",
        "the whole twin": lambda row: f"{row['twin_microseconds']:,.0f}",
        "bound: 1 + two layers' more ÷ the twin": lambda row: f"{row['bound_of_two_layers']:.2f}",
    }
    return [
        *rows,
        *({"part": part, "fp32": text(fp32), "bf16": text(bf16)} for part, text in more.items()),
    ]


CLAIMS = [
    Claim(
        BEFORE,
        "Up to batch 8 {fp32_met} of {fp32_rows} rows keep to 1.3 in float32 (before: {fp32_met_before}), the worst is "
        "{fp32:.2f}; in bf16 {bf16_met} of {bf16_rows} (before: {bf16_met_before}), the worst is {bf16:.2f}.",
        extremes,
    ),
    Claim(BEFORE, "| {model}, float32 | {cells} |", lambda *rows: by_model(rows, "fp32")),
    Claim(BEFORE, "| {model}, bf16 | {cells} |", lambda *rows: by_model(rows, "bf16")),
    Claim(ROOFLINE, "| {part} | {fp32} | {bf16} |", parts),
]

DEFINITIONS = [Definition("at most 1.3 times the twin's time", "a goal")]
