"""What `moevision cut` keeps and costs: three subsets of the bundled CIFAR-10 model's classes, written down beforehand.

python -m benchmarks cut --data path/to/cifar10 --out benchmarks/cut/subsets.json
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import about, argument_parser, count, write_result
from moevision.commands.cut import Images, class_indices, compare, fewest, first, most_used
from moevision.demo.models import bundled_folder
from moevision.models.cut import cut
from moevision.train.checkpoint import load_trained

SUBSETS = (
    ("cat", "dog"),
    ("bird", "cat", "deer", "dog", "frog", "horse"),
    ("automobile", "truck"),
)


def measure(subset: tuple[str, ...], options: Namespace) -> dict[str, Any]:
    """The verb's own numbers for some classes, with the fewest experts and with one."""
    address = str(bundled_folder("cifar10") / "trained")
    model = load_trained(address)
    classes = class_indices(model, subset)
    where = Namespace(model=address, data=options.data, root=None, limit=options.limit)
    images = Images.of(model, classes, where)
    own, others = most_used(model, images.train), most_used(model, images.others)
    number = fewest(model, classes, own, images.val)
    small = cut(model, classes, first(own, number))
    return {
        "classes": list(subset),
        "test_images": sum(len(labels) for _, labels in images.test),
        "fewest": number,
        "experts": first(own, number),
        "right": compare(model, classes, own, others, number, images.test),
        "right_with_one": compare(model, classes, own, others, 1, images.test),
        "parameters": [
            sum(value.numel() for value in one.net.parameters()) for one in (model, small)
        ],
    }


def main() -> None:
    """Measure all subsets, and write a record."""
    parser = argument_parser("cut", __doc__)
    add = parser.add_argument
    add("--data", required=True, help="CIFAR-10, as a folder with train/ and test/")
    add("--limit", type=count, default=1000, metavar="N", help="test images (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write a record")
    options = parser.parse_args()
    origin = about()
    torch.set_num_threads(1)
    subsets = {"-".join(subset): measure(subset, options) for subset in SUBSETS}
    write_result(options.out, {**origin, "subsets": subsets})
