"""Under which terms the datasets that are known by name may be used, as far as that is certain.

A published model's card says this. Where a dataset's makers state nothing, or this table knows nothing, the card says
"unknown": a guess would be worse. Each sentence follows the page that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moevision.data.named import DATASET_NAMES, SYNTHETIC
from moevision.names import shown

UNKNOWN = "unknown: check before you publish"

_IMAGENET = "for non-commercial research and education only (terms of access on https://image-net.org/download)"


@dataclass(frozen=True)
class DataTerms:
    """What is certain about one dataset.

    Attributes:
        title: its name in words.
        terms: licence or terms of use, with the page that states them.
        hub_id: its address on huggingface.co/datasets; empty if it has none that is its makers' or widely used.
        kind: what a model card calls its type: the dataset's name, or `imagefolder`.
    """

    title: str
    terms: str = UNKNOWN
    hub_id: str = ""
    kind: str = "imagefolder"


_KNOWN = {
    SYNTHETIC: ("SyntheticPets", "drawn by moevision's own code (Apache-2.0): no photo is involved", ""),
    "cifar10": (
        "CIFAR-10",
        "unknown: https://www.cs.toronto.edu/~kriz/cifar.html states no licence and asks to cite Krizhevsky 2009",
        "uoft-cs/cifar10",
    ),
    "cifar100": (
        "CIFAR-100",
        "unknown: https://www.cs.toronto.edu/~kriz/cifar.html states no licence and asks to cite Krizhevsky 2009",
        "uoft-cs/cifar100",
    ),
    "imagenette": ("Imagenette", f"a selection of ImageNet's photos, which are {_IMAGENET}", "frgfm/imagenette"),
    "imagenet": ("ImageNet-1k", _IMAGENET, "ILSVRC/imagenet-1k"),
    "pets": ("Oxford-IIIT Pet", "CC BY-SA 4.0 (https://www.robots.ox.ac.uk/~vgg/data/pets/)", "timm/oxford-iiit-pet"),
    "pets_cat_dog": (
        "Oxford-IIIT Pet, cat or dog",
        "CC BY-SA 4.0 (https://www.robots.ox.ac.uk/~vgg/data/pets/)",
        "timm/oxford-iiit-pet",
    ),
    "food101": (
        "Food-101",
        "photos of Foodspotting's users: more than scientific fair use must be negotiated with each of them (the "
        "dataset's license_agreement.txt)",
        "ethz/food101",
    ),
}


def terms_of(path: str) -> DataTerms:
    """What is certain about the data that `--data` names.

    Args:
        path: a name of `DATASET_NAMES`, or a folder. Of a folder only its last part is told: the rest may be private.
    """
    if path in _KNOWN:
        title, terms, hub_id = _KNOWN[path]
        return DataTerms(title, terms, hub_id, path)
    if path in DATASET_NAMES:
        return DataTerms(path, kind=path)
    return DataTerms(f"own pictures (a folder called “{shown(Path(path).expanduser().resolve().name)}”)")
