"""docs/reference/explorer.md."""

from typing import Any

from benchmarks.records import Claim, Definition
from benchmarks.records.analysis import ATLAS

Json = dict[str, Any]


def called(atlas: Json) -> Json:
    """The part that exceeds an expert's share of everything most: both shares."""
    cards = [card for layer in atlas["layers"] for card in layer["experts"]]
    part = max((part for card in cards for part in card["parts"]), key=lambda part: part["above"])
    return {**part, "overall": part["share"] - part["above"]}


CLAIMS = [
    Claim(ATLAS, '"{part}: {share:.0%}, its share of everything: {overall:.0%}" says', called),
    Claim(
        ATLAS,
        "gets {share:.0%} of the area of all {part}s, and {overall:.0%} of everything",
        called,
    ),
]

DEFINITIONS = [
    Definition("An image may have 8 MB and 16 megapixels (a JPEG 50", "limits in the code"),
    Definition("Up to 64 requests wait", "a limit in the code"),
    Definition("more than 20 times as long as wide", "a limit in the code"),
]
