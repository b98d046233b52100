"""benchmarks/data/README.md."""

from typing import Any

from benchmarks.records import Claim, Definition

Json = dict[str, Any]
RECORDS = {name: f"benchmarks/data/{name}/benchmark-shards.json" for name in ("imagenette", "cifar10")}
TITLES = {"imagenette": "Imagenette, short side 128 px", "cifar10": "CIFAR-10, 32 px"}


def rows(*records: Json) -> list[Json]:
    """A row of the table for each dataset: images/s from shards over images/s from the folder."""
    found = []
    for title, record in zip(TITLES.values(), records, strict=True):
        ratios = {
            f"{row['kind']}_{'cold' if row['cold'] else 'warm'}": row["speed_to"]["folder"]
            for row in record["rows"]
            if row["name"] == "shards"
        }
        cells = ("reading_cold", "reading_warm", "pipeline_cold", "pipeline_warm")
        text = " | ".join("{median:.2f} ({quartile_1:.2f}–{quartile_3:.2f})".format_map(ratios[name]) for name in cells)
        found.append({"title": title, "cells": text})
    return found


def equal(*records: Json) -> Json:
    """How many images are equal of how many; and that a training leaves the same files."""
    assert all(all(record["training"]["same"].values()) for record in records)
    counts = {name: sum(record["equal"][name] for record in records) for name in ("equal", "images")}
    return {**counts, "steps": records[0]["training"]["steps"]}


CLAIMS = [
    Claim(tuple(RECORDS.values()), "{equal:,} of {images:,} images are equal", equal),
    Claim(tuple(RECORDS.values()), "{steps} training steps leave the same bytes", equal),
    Claim(tuple(RECORDS.values()), "| {title} | {cells} |", rows),
]
DEFINITIONS: list[Definition] = []
