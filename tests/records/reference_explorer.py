"""docs/reference/explorer.md."""

from typing import Any

from tests.records import Claim, Definition
from tests.records.analysis import ATLAS, CARD

Json = dict[str, Any]
UNBALANCED = "moevision/demo/models/pets/atlas_unbalanced.json"


def busiest(unbalanced: Json, balanced: Json) -> Json:
    """Load of the busiest expert over the mean, in both layers of both models."""
    without, loss = ([layer["slowest"] for layer in record["layers"]] for record in (unbalanced, balanced))
    return {"without": without, "loss": loss, "n_images": balanced["n_images"]}


CLAIMS = [
    Claim(
        (UNBALANCED, ATLAS),
        "the busiest expert does {without[0]:.2f} and {without[1]:.2f} times the mean work (blocks 1 and 3, "
        "{n_images:,} test images), with the loss {loss[0]:.2f} and {loss[1]:.2f}",
        busiest,
    ),
    Claim(CARD, "({accuracy[unbalanced]:.1%} and {accuracy[moe]:.1%}, one training each)"),
]

DEFINITIONS = [
    Definition("An image may have 8 MB and 50 megapixels", "limits in the code"),
    Definition("more than 20 times as long as wide", "a limit in the code"),
    Definition("is dropped after 10 minutes", "a limit in the code"),
    Definition("(1 s up to 15 s", "limits in the code"),
]
