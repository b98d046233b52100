"""benchmarks/label_noise/README.md: everything between its marks is the report of the committed runs."""

from typing import Any

from benchmarks.label_noise import FOLDER, parts_of
from tests.records import ROOT, Claim, Definition
from tests.records.studies import shown

FILES = tuple(str(path.relative_to(ROOT)) for path in sorted(FOLDER.glob("runs/*.json")))


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(parts_of(runs))


CLAIMS = [Claim(FILES, "{text}", _parts)]
DEFINITIONS = [
    Definition("20,000 of CIFAR-10's training set, 2,000 of each class", "what is drawn"),
    Definition("1,000 training photos", "what is drawn"),
    Definition("2,400 drawn animals", "what is drawn"),
    Definition("10 % of the images", "what is planted"),
    Definition("(0.5: chance, 1: all first)", "the scale of the area"),
    Definition("2.9 (Apache-2.0)", "a version and its licence"),
    Definition("their share among the first 10 % (0.1: chance)", "how precision is defined"),
    Definition("95 % t intervals", "their level"),
]
