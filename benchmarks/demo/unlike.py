"""How often the explorer calls an image "unlike the training data", for images that are and that aren't.

    python -m benchmarks unlike pets --photos path/to/imagenette128 path/to/cats_vs_dogs \
        --out benchmarks/demo/unlike_pets.json

The measure's own statistics and threshold come from the model's card. Beside it stands the energy score of the model's
logits (Liu et al. 2020, arXiv:2010.03759) with its threshold set so that both call the same share of the model's own
test images unlike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import about, argument_parser, write_result
from moevision.analysis.collect import network_input
from moevision.analysis.images import open_pictures
from moevision.demo.models import bundled_folders, bundled_model, read_card
from moevision.models.io import SavedModel


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("unlike", __doc__)
    parser.add_argument("model", help="a bundled model")
    parser.add_argument("--own", help="the model's own kind of images, if not where its card says")
    parser.add_argument("--photos", nargs="*", default=[], help="folders of images of another kind")
    parser.add_argument("--images", type=int, default=400, help="of each kind (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    folder = next(folder for folder in bundled_folders() if folder.name == options.model)
    card, model = read_card(folder / "card.json"), bundled_model(options.model)
    own = _pictures(options.own or card.data_kind, model, options.images)
    rng = np.random.default_rng(0)
    kinds = {
        "own test pictures": own,
        **{Path(name).name: _pictures(name, model, options.images) for name in options.photos},
        "uniform noise": rng.integers(0, 256, own.shape, dtype=np.uint8),
        "one flat colour": np.broadcast_to(rng.integers(0, 256, (len(own), 1, 1, 3), dtype=np.uint8), own.shape).copy(),
    }
    far = {
        name: np.array([card.typical.unlike(image) is not None for image in images]) for name, images in kinds.items()
    }
    false_alarms = far["own test pictures"].mean()
    limit = np.quantile(_energy(model, own), 1 - false_alarms)
    rows: dict[str, Any] = {
        name: {
            "pictures": len(images),
            "unlike": round(float(far[name].mean()), 4),
            "energy_score": round(float((_energy(model, images) > limit).mean()), 4),
        }
        for name, images in kinds.items()
    }
    write_result(options.out, {**about(), "model": options.model, "rows": rows})


def _pictures(data: str, model: SavedModel, limit: int) -> np.ndarray:
    pictures = open_pictures(data, model.image_size, limit=limit)
    return np.stack([pictures.image(index) for index in range(len(pictures))])


@torch.inference_mode()
def _energy(model: SavedModel, images: np.ndarray) -> np.ndarray:
    """Negative log-sum-exp of the logits: the larger, the less familiar."""
    logits = torch.cat(
        [model.net(network_input(model, images[start : start + 64])) for start in range(0, len(images), 64)]
    )
    return -logits.logsumexp(-1).numpy()
