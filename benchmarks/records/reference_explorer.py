"""docs/reference/explorer.md."""

from typing import Any

from benchmarks.records import Claim, Definition
from benchmarks.records.analysis import ATLAS, CARD

Json = dict[str, Any]
UNBALANCED = "moevision/demo/models/pets/atlas_unbalanced.json"


def busiest(unbalanced: Json, balanced: Json) -> Json:
    """Load of the busiest expert over the mean, in both layers of both models."""
    without, loss = ([layer["slowest"] for layer in record["layers"]] for record in (unbalanced, balanced))
    return {"without": without, "loss": loss, "n_images": balanced["n_images"]}


def called(atlas: Json) -> Json:
    """The part that exceeds an expert's share of everything most: both shares."""
    cards = [card for layer in atlas["layers"] for card in layer["experts"]]
    part = max((part for card in cards for part in card["parts"]), key=lambda part: part["above"])
    return {**part, "overall": part["share"] - part["above"]}


CLAIMS = [
    Claim(ATLAS, '"{part}: {share:.0%}, its share of everything: {overall:.0%}" says', called),
    Claim(ATLAS, "gets {share:.0%} of the area of all {part}s, and {overall:.0%} of everything", called),
    Claim(
        (UNBALANCED, ATLAS),
        "the busiest expert does {without[0]:.2f} and {without[1]:.2f} times the mean work (blocks 1 and 2, "
        "{n_images:,} test images), with the loss {loss[0]:.2f} and {loss[1]:.2f}",
        busiest,
    ),
    Claim(CARD, "({accuracy[unbalanced]:.1%} and {accuracy[moe]:.1%}, one training each)"),
]

DEFINITIONS = [
    Definition("An image may have 8 MB and 16 megapixels (a JPEG 50", "limits in the code"),
    Definition("Up to 64 requests wait", "a limit in the code"),
    Definition("more than 20 times as long as wide", "a limit in the code"),
    Definition("is dropped after 10 minutes", "a limit in the code"),
    Definition("a lesson of 45 minutes", "a plan"),
]
