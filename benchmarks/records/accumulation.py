"""benchmarks/accumulation/README.md."""

from typing import Any

from benchmarks.records import Claim

Json = dict[str, Any]
ACCUMULATION = "benchmarks/accumulation/record.json"


def table(record: Json) -> list[Json]:
    """A row for each loss and kind of images: projection (least to most over draws) and cosine, by micro-batches."""
    rows = []
    for images, kind in ((256, "pets"), (32, "pets"), (32, "noise")):
        for loss in ("load_balancing", "importance", "load"):
            cells = [
                "{projection:.2f} ({least:.2f} to {most:.2f}), {cosine:.3f}".format_map(row)
                for parts in (2, 4, 8, 16)
                for row in record["rows"]
                if [row[name] for name in ("images", "kind", "loss", "processes", "parts")]
                == [images, kind, loss, 1, parts]
            ]
            rows.append({"images": images, "kind": kind, "loss": loss, "cells": " | ".join(cells)})
    return rows


def extremes(images: int, least: str, most: str) -> Any:
    """The smallest and the largest value of all rows with so many images."""

    def values(record: Json) -> Json:
        rows = [row for row in record["rows"] if row["images"] == images]
        return {"least": min(row[least] for row in rows), "most": max(row[most] for row in rows)}

    return values


CLAIMS = [
    Claim(ACCUMULATION, "| {images} {kind} | {loss} | 1 | {cells} |", table),
    Claim(
        ACCUMULATION, "With 256 images every draw is between {least:.2f} and {most:.2f}", extremes(256, "least", "most")
    ),
    Claim(ACCUMULATION, "the mean is between {least:.2f} and {most:.2f}", extremes(32, "projection", "projection")),
    Claim(ACCUMULATION, "single draws lie between {least:.2f} and {most:.2f}", extremes(32, "least", "most")),
]
