"""Frozen studies: what `recompute.py` says of the record beside it, page by page, and their numbers that are settings.

The code that ran a frozen study has left the tree; its README names the commit that has it. `benchmarks/test_frozen.py`
checks the scripts.
"""

import importlib.util
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from benchmarks.records import ROOT, Definition

SCRIPTS = sorted((ROOT / "benchmarks").glob("*/recompute.py"))


def statements_of(script: Path) -> dict[str, list[str]]:
    """What a script says now: page -> texts. It is loaded anew, so that a changed record is read."""
    spec = importlib.util.spec_from_file_location(f"frozen_{script.parent.name}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    statements: dict[str, list[str]] = module.statements()
    return statements


@cache
def statements_by_page() -> dict[str, list[str]]:
    """What all of them say."""
    by_page: dict[str, list[str]] = defaultdict(list)
    for script in SCRIPTS:
        for page, texts in statements_of(script).items():
            by_page[page] += texts
    return by_page


_GAPS_AT_STEP_0 = re.findall(
    r"^\| .+ \| (?:< 1e-5|[\d.]+) \| [\d.]+ % \|$",
    (ROOT / "benchmarks" / "upcycling" / "README.md").read_text(encoding="utf-8"),
    re.M,
)
DEFINITIONS = {
    "cats_and_dogs": [Definition("100 / 0 is a gate", "how a table is read")],
    "curve": [
        Definition("70 % of the training images", "the question"),
        Definition("70 % drawn at random", "the question"),
        Definition("800 of each class", "what is drawn"),
        Definition("all 8,000 images", "what is drawn"),
        Definition("the lowest 10 % of AUM go", "how ccs is run"),
        Definition("less than 1 point worse counts as as good", "the margin"),
        Definition("10,000 test images", "the data"),
        Definition("70 % weren't shown to be as good as all", "the verdict of the sentences"),
        Definition("worse from 70 % down", "the verdict of the table"),
        Definition("at 90 % `ccs` gives up", "of the method: its hardest tenth is all that goes"),
        Definition("95 % t intervals", "their level"),
    ],
    "duplicates": [
        Definition("3.3 % are published", "the cited paper"),
        Definition("1,500 training and 500 validation photos", "what is planted"),
        Definition("280 altered copies", "what is planted"),
        Definition("280, or the 140 across splits", "what is planted"),
        Definition("of the 29 first pairs of photos", "judged by eye"),
        Definition(
            "20 of the 20 pairs from rank 50 on, 17 from rank 150, 14 from 250, 13 from 350, 2 from 500 and 3 from 700",
            "judged by eye",
        ),
        Definition("about 370 down to there", "the trapezoids over the judged ranks"),
        Definition("3.3 % would be 330", "of 10,000"),
        Definition("50,000 training and 10,000 test images", "the data"),
    ],
    "fits": [
        Definition("all 2,880 of cats and dogs", "the folder"),
        Definition("2,048 to train and 832 to test", "the split"),
        Definition("at 112 px", "a setting"),
    ],
    "label_noise": [
        Definition("20,000 of CIFAR-10's training set, 2,000 of each class", "what is drawn"),
        Definition("1,000 training photos", "what is drawn"),
        Definition("2,400 drawn animals", "what is drawn"),
        Definition("10 % of the images", "what is planted"),
        Definition("(0.5: chance, 1: all first)", "the scale of the area"),
        Definition("2.9 (Apache-2.0)", "a version and its licence"),
        Definition("their share among the first 10 % (0.1: chance)", "how precision is defined"),
        Definition("95 % t intervals", "their level"),
    ],
    "layouts": [
        Definition("2,048 for training and validation, 832 for the test", "the data"),
        Definition("64 images a step", "the batch"),
        Definition(
            "one in seven lies more than two of them away",
            "simulated: a normal value, in SDs of five others",
        ),
    ],
    "modular": [
        Definition("at least 2 points", "the rule of the protocol"),
        Definition("97 %", "an aim"),
        Definition("95 %", "an aim"),
    ],
    "specialization": [
        Definition(
            "three seeds each, effects below one or two points",
            "the width of the intervals of single runs",
        ),
        Definition("in brackets 95 % intervals, over images, or over seeds", "the level of both"),
        Definition("nats per 100 choices", "a unit"),
        Definition("top-2 of 8", "the model's setting"),
    ],
    "strangers": [
        Definition("2,000 at most", "`benchmarks.strangers.IMAGES`"),
        Definition("5 % of at most 2,000 validation images", "`REFUSED` and `IMAGES`"),
        Definition("eight classes of CIFAR-10", "without cat and dog"),
        Definition("29 photos of other animals (20 for CIFAR-10", "the folder's"),
        Definition("below 80 %", "`moevision.demo.service.SURE`"),
    ],
    "upcycling": [
        *(
            Definition(row, "measured again by `tests/models/test_upcycle.py`")
            for row in _GAPS_AT_STEP_0
        ),
        Definition(
            "logits of standard deviation 1.6", "measured again by `tests/models/test_upcycle.py`"
        ),
    ],
    "waiting": [
        Definition("64 images each, 1,000 steps of each arm", "settings of the records"),
        Definition("sends 100 tokens to the first expert", "a setting"),
        Definition("forced to 100 : 1", "a setting"),
    ],
}
"""Of each study's README: numbers that nobody measured."""
