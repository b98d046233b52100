"""How many answers change when one expert is taken away, beside as much taken away at random.

    python -m benchmarks flips --cifar path/to/cifar10 --out benchmarks/demo/flips.json

The page opens with a photo whose answer changes: the strongest case that `falls.py` found among all bundled photos
and experts. This counts such cases among test images of CIFAR-10, 200 of each class. Each of the model's experts is
taken away as a click takes it away (its patches go to their next-best expert), and for each of them as many assignments
are taken away at random, so that both searches are as wide. Answers are kept as digits, one for each image.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import about, argument_parser, count, write_result
from moevision.analysis.collect import network_input
from moevision.analysis.effects import run_compared, run_under
from moevision.analysis.images import PictureSet, open_pictures
from moevision.analysis.intervention import Intervention, numbered_layers
from moevision.demo import bundled_model
from moevision.layers import routing_lock
from moevision.models.io import SavedModel

MODEL = "cifar10"
_BATCH = 50


@torch.inference_mode()
def answers(model: SavedModel, pictures: PictureSet) -> dict[str, Any]:
    """Likeliest class of each image, as digits: with all experts, and by expert without it and with as much at random.

    `sure` are the probabilities of the answers with all experts.
    """
    layers = numbered_layers(model.net)
    experts = [
        (layer, expert) for layer, moe in layers.items() for expert in range(moe.router.num_experts)
    ]
    names = [f"L{layer}·E{expert}" for layer, expert in experts]
    found: dict[str, Any] = {
        "labels": "",
        "all": "",
        "sure": [],
        "without": dict.fromkeys(names, ""),
    }
    found["at_random"] = dict.fromkeys(names, "")
    for start in range(0, len(pictures), _BATCH):
        numbers = range(start, min(start + _BATCH, len(pictures)))
        x = network_input(model, np.stack([pictures.image(number) for number in numbers]))
        with routing_lock(model.net):
            before = model.net(x)
            found["labels"] += digits([pictures.label(number) for number in numbers])
            found["all"] += digits(before.argmax(-1).tolist())
            found["sure"] += [round(p, 4) for p in before.softmax(-1).amax(-1).tolist()]
            for place, (name, (layer, expert)) in enumerate(zip(names, experts, strict=True)):
                away = Intervention("ablate", layer=layer, expert=expert)
                after, taken, _ = run_under(model.net, x, away)
                drawn = run_compared(
                    model.net, x, away, taken, [(place, number) for number in numbers]
                )
                found["without"][name] += digits(after.argmax(-1).tolist())
                found["at_random"][name] += digits(drawn.argmax(-1).tolist())
    return found


def digits(classes: Sequence[int]) -> str:
    """`309` for the classes 3, 0 and 9."""
    return "".join(map(str, classes))


def flipped(record: dict[str, Any], kind: str) -> np.ndarray:
    """[N] whether an image's answer is another one without some expert (`without`), or `at_random`."""
    own = np.array(list(record["all"]))
    return np.any([np.array(list(other)) != own for other in record[kind].values()], axis=0)


def record_of(options: Namespace) -> dict[str, Any]:
    """The bundled model's answers."""
    model = bundled_model(MODEL)
    pictures = open_pictures(
        options.cifar, model.image_size, limit=options.images, class_names=model.class_names
    )
    return {
        **about(),
        "model": MODEL,
        "classes": list(model.class_names),
        **answers(model, pictures),
    }


def main() -> None:
    """Measure."""
    parser = argument_parser("flips", __doc__)
    add = parser.add_argument
    add(
        "--cifar",
        metavar="DIR",
        required=True,
        help="CIFAR-10 as a folder; its test images are asked",
    )
    add(
        "--images",
        type=count,
        default=2000,
        help="test images, as many of each class (%(default)s)",
    )
    add("--out", type=Path, help="write the record there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_result(options.out, record_of(options))
