"""How many strangers the bundled models recognize: images of other things than their classes.

    python -m benchmarks strangers run photos --data DATA --photos PHOTOS
    python benchmarks/strangers/recompute.py                                # README.md's rows

DATA holds cats_vs_dogs/, cifar10/, imagenette128/, tiny_imagenet32/ and photos11/ (by `photo-model photos` of
commit 1a1f32d2), a folder per class; PHOTOS cat/, dog/ and other/. The measure was chosen by the sets of `CHOSEN_BY`
alone, from some that commit 404600b4 has. `--carry` puts what was measured beside the weights of the bundled model, and
the share of strangers on its card.

Axes: n images, D width of a feature, C classes.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from benchmarks.harness import HERE, about, argument_parser
from benchmarks.lines import put_run
from benchmarks.strangers.recompute import CHOSEN_BY, recognized
from benchmarks.timing import rounded
from moevision.analysis.collect import network_input
from moevision.analysis.images import PictureSet, open_pictures, read_images
from moevision.demo.models import bundled_folder, bundled_model
from moevision.errors import DataWarning
from moevision.files import write_json_atomic
from moevision.models.convert import pooled
from moevision.models.io import SavedModel
from moevision.models.ood import FILE, MahalanobisOOD, fit_ood
from moevision.models.safe_files import CONFIG, read_json

Floats = np.ndarray[Any, np.dtype[np.float64]]
FOLDER = HERE / "strangers"
RUNS = FOLDER / "runs.jsonl"
OWN = {
    "photos": "photos11/all",
    "cats_vs_dogs_two": "cats_vs_dogs",
    "cifar10": "cifar10",
    "pets": "synthetic_pets",
    "emoji": "emoji",
}
DRAWN = ("pets", "emoji")
HALVES = (  # of Imagenette
    ("tench", "cassette player", "chain saw", "church"),
    ("French horn", "gas pump", "golf ball", "parachute"),
)
CIFAR = ("airplane", "automobile", "bird", "deer", "frog", "horse", "ship", "truck")
# Photos of its classes.
KINDS_OF_CIFAR = "eagle duck kingfisher owl macaw chicken moose horse".split()  # noqa: SIM905
OWN_OF_CIFAR = ("cat", "dog", "truck")  # beside garbage trucks
OWN_OF_TINY = (
    "Chihuahua",
    "Yorkshire terrier",
    "golden retriever",
    "Labrador retriever",
    "German shepherd",
    "standard poodle",
    "tabby",
    "Persian cat",
    "Egyptian cat",
)
IMAGES = 2_000  # of training and of validation that a model is fitted to; `fit` takes half of it
MOST, FEW = 300, 100  # images of a set: of photos of other things, of others
DRAWS = 1_000


def images_of(
    source: str | Path,
    size: int,
    classes: Sequence[str] = (),
    *,
    without: Sequence[str] = (),
    split: str = "test",
    most: int = MOST,
) -> np.ndarray:
    """Images of these classes (all unless said), uint8 [n, S, S, 3], but for those whose name has such a word."""
    pictures = open_pictures(source, size, split=split)
    rows = []
    for row in range(len(pictures)):
        is_of_class = not classes or pictures.class_names[pictures.label(row)] in classes
        if is_of_class and not any(word in pictures.picture_name(row) for word in without):
            rows.append(row)
    chosen = np.random.default_rng(0).permutation(rows)[:most]
    return read_images(pictures, sorted(chosen.tolist()))


def sets_of(name: str, model: SavedModel, options: Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """Each set of strangers by its name, and of the model's own kind from elsewhere, uint8 [n, S, S, 3]."""
    size, data, photos = model.image_size, options.data, options.photos
    imagenette = data / "imagenette128"
    if name == "photos":
        yield from sets_of_photos(size, data, photos)
        return
    for which, half in zip(("first", "second"), HALVES, strict=True):
        yield f"Imagenette, {which} half", images_of(imagenette, size, half)
    if name not in DRAWN:
        other = KINDS_OF_CIFAR if name == "cifar10" else ()
        animals = images_of(photos, size, ["other"], without=other, split="all")
        yield "photos of other animals", animals
    if OWN[name] == "cats_vs_dogs":
        yield CHOSEN_BY[1], images_of(data / "cifar10", size, CIFAR)
    if name in DRAWN:
        yield "cats and dogs", images_of(data / "cats_vs_dogs", size)
        yield "CIFAR-10", images_of(data / "cifar10", size)
    else:
        yield "drawn pets", images_of("synthetic_pets", size, most=FEW)
        springers = images_of(imagenette, size, ["English springer"], most=FEW)
        yield "own: English springers of Imagenette", springers
        yield "own: photos of cats and dogs", images_of(photos, size, ["cat", "dog"], split="all")
    yield from drawn_sets(size)


def sets_of_photos(size: int, data: Path, photos: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Those of the model of eleven classes, which knows Imagenette."""
    yield "photos of other animals", images_of(photos, size, ["other"], split="all")
    tiny = data / "tiny_imagenet32" / "val"
    names = open_pictures(tiny, size, split="all").class_names
    others = [name for name in names if name not in OWN_OF_TINY]
    yield "Tiny-ImageNet, other classes", images_of(tiny, size, others, split="all")
    others = [name for name in CIFAR if name not in OWN_OF_CIFAR]
    yield CHOSEN_BY[1], images_of(data / "cifar10", size, others)
    yield "drawn pets", images_of("synthetic_pets", size, most=FEW)
    yield "own: photos of cats and dogs", images_of(photos, size, ["cat", "dog"], split="all")
    yield from drawn_sets(size)


def drawn_sets(size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Images that are no photos."""
    rng = np.random.default_rng(0)
    yield "uniform noise", rng.integers(0, 256, (FEW, size, size, 3), dtype=np.uint8)
    colours = rng.integers(0, 256, (FEW, 1, 1, 3), np.uint8)
    yield "one flat colour", np.broadcast_to(colours, (FEW, size, size, 3)).copy()


@torch.inference_mode()
def features_of(model: SavedModel, images: PictureSet | np.ndarray) -> Floats:
    """What the classifier reads [n, D]."""
    features = []
    for start in range(0, len(images), 64):
        rows = range(start, min(start + 64, len(images)))
        drawn = isinstance(images, np.ndarray)
        pixels = images[rows.start : rows.stop] if drawn else read_images(images, rows)
        features.append(pooled(model.net, network_input(model, pixels)))
    return torch.cat(features).double().numpy()


def known_of(model: SavedModel, data: str | Path, **held_out: Any) -> tuple[Floats, Floats, Floats]:
    """Training features and labels, validation features, as many as `fit` takes; see `open_pictures`."""
    names, size = model.class_names, model.image_size
    most = {"train": max(IMAGES, 10 * len(names)), "val": IMAGES}
    train, val = (
        open_pictures(data, size, split=split, limit=limit, class_names=names, **held_out)
        for split, limit in most.items()
    )
    labels = np.array([train.label(row) for row in range(len(train))])
    return features_of(model, train), labels, features_of(model, val)


def detector_of(model: SavedModel, data: str | Path, **held_out: Any) -> MahalanobisOOD:
    """What `fit` would have measured at the end of the training of a bundled model."""
    found = fit_ood(*known_of(model, data, **held_out))
    assert found is not None
    return found


def put_beside(folder: Path, strangers: MahalanobisOOD, share: float | None = None) -> None:
    """Put the numbers beside the trained weights of a bundled model, and the share of strangers on its card."""
    home, card = folder / "trained", folder / "card.json"
    save_file(strangers.state_dict(), home / FILE)
    write_json_atomic(home / CONFIG, {**read_json(home / CONFIG), "strangers": True})
    write_json_atomic(card, {**read_json(card), "recognized": share})


def distances(strangers: MahalanobisOOD, features: Floats) -> Floats:
    """[n] of features [n, D]."""
    found: Floats = strangers(torch.from_numpy(features)).double().numpy()
    return found


# ---- the table


def area(own: Floats, others: Floats) -> float:
    """Area under the ROC curve: how often one of `others` has the larger value than one of `own`; ties half."""
    is_other = np.repeat([0, 1], [len(own), len(others)])
    return float(roc_auc_score(is_other, np.concatenate([own, others])))


def area_with_interval(own: Floats, others: Floats) -> tuple[float, float, float]:
    """(area, low, high): 95 % of bootstrap draws over images of both."""
    rng = np.random.default_rng(0)
    draws = [area(rng.choice(own, len(own)), rng.choice(others, len(others))) for _ in range(DRAWS)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return area(own, others), float(low), float(high)


def run(options: Namespace) -> None:
    """Measure one bundled model, and put its line into the record."""
    name, model = options.model, bundled_model(options.model)
    data = OWN[name] if name in DRAWN else options.data / OWN[name]
    features, classes, validation = known_of(model, data)
    chosen = fit_ood(features, classes, validation)
    assert chosen is not None
    test = open_pictures(data, model.image_size, class_names=model.class_names)
    own = distances(chosen, features_of(model, test))
    labels = np.array([test.label(row) for row in range(len(test))])
    of_class = {
        kind: {"images": int((labels == row).sum()), "beyond": int((own[labels == row] > 1).sum())}
        for row, kind in enumerate(model.class_names)
    }
    sets: dict[str, Any] = {}
    for kind, images in sets_of(name, model, options):
        far = distances(chosen, features_of(model, images))
        area, low, high = (rounded(value, 4) for value in area_with_interval(own, far))
        counts = {"images": len(far), "beyond": int((far > 1).sum())}
        sets[kind] = {**counts, "auroc": area, "interval": [low, high]}
        print(f"{kind:40} {len(far):5} {area:.3f} {(far > 1).mean():.1%}", flush=True)
    record = {
        "name": name,
        **about(),
        "training_images": len(classes),
        "validation_images": len(validation),
        "test": {"images": len(own), "beyond": int((own > 1).sum()), "of_class": of_class},
        "sets": sets,
        "recognized": rounded(recognized({"sets": sets}), 4),
    }
    if options.carry:
        put_beside(bundled_folder(name), chosen, record["recognized"])
    put_run(options.out, record)


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("strangers", __doc__)
    add = parser.add_argument
    add("verb", choices=("run",))
    add("model", choices=tuple(OWN), help="a bundled model")
    add("--data", type=Path, required=True, help="folder of the data sets")
    add("--photos", type=Path, required=True, help="folder of photos")
    add("--carry", action="store_true", help="put it beside the weights that the package carries")
    add("--out", type=Path, default=RUNS, help="records (%(default)s)")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # other classes than the model's are the point
        run(options)
