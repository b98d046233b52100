"""A lesson of 45 minutes as one HTML file that needs neither server nor network.

    python docs/lesson/build.py docs/lesson.html
    python docs/lesson/build.py docs/lesson.html --measure    # its numbers anew first: 2 minutes on one core

Text, toy and style lie beside this file; the page's base and a few helpers are the explorer's. `measure` makes all
numbers: routing of three bundled photos as `route_image` exports it, recorded routing before the training, counts over
all test photos (atlas.json), what happens to drawn pets when an expert is taken away, and the accuracies of
benchmarks/sparsity. Which expert is taken away was chosen on validation images; what is reported was counted on test
images.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from moevision.analysis import Intervention, effect
from moevision.analysis.collect import network_input
from moevision.analysis.intervention import intervene, numbered_layers
from moevision.data import SyntheticPets
from moevision.demo.facts import model_input
from moevision.demo.html import (
    CORE_STYLES,
    document,
    read_asset,
    read_css,
    script_of,
    without_comments,
)
from moevision.demo.models import SOURCES, bundled_folder, bundled_model, credits_of, read_card
from moevision.demo.view import route_image
from moevision.efficiency import measure_cost
from moevision.errors import json_text
from moevision.files import write_text_atomic
from moevision.layers import forward_routing
from moevision.models.history import RoutingHistory
from moevision.models.io import SavedModel
from moevision.models.safe_files import read_json

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
NUMBERS: Final = "lesson_numbers.json"
PHOTOS: Final = ("cat/chelsea.jpg", "cat/gcompris_kitten.jpg", "dog/gcompris_shepherd.jpg")
BLOCK: Final = "moe-block.svg"  # of docs/img/
GATE_PATCH: Final = 66  # of the first photo, in the layer below: on the cat's nose
LAYER: Final = 9
PETS: Final = 400  # drawn images of each split
GAME: Final = "dog/gcompris_shepherd.jpg"  # its pieces are given to experts by hand
SIDE: Final = 4  # pieces in a row
_BATCH = 100
Pixels = npt.NDArray[np.uint8]


def read_module(name: str) -> str:
    """The text of a module: the lesson's own, or one that it takes from the explorer."""
    own = HERE / name
    return own.read_text(encoding="utf-8") if own.exists() else read_asset(name)


def lesson_html() -> str:
    """The page."""
    home = bundled_folder("cats_vs_dogs") / "examples"
    photos = {
        name: f"data:image/jpeg;base64,{_base64((home / name).read_bytes())}" for name in PHOTOS
    }
    block = f"data:image/svg+xml;base64,{_base64((ROOT / 'docs' / 'img' / BLOCK).read_bytes())}"
    script = script_of(
        "lesson.js",
        "startLesson(document.querySelector('[data-lesson]'), LESSON, PICTURES);",
        read=read_module,
        LESSON=json.loads(read_module(NUMBERS)),
        PICTURES={**photos, BLOCK: block},
    )
    style = f"{read_css(CORE_STYLES[:1])}\n{without_comments(read_module('lesson.css'))}"
    body = (
        '<main class="mv lesson" data-lesson><noscript>This lesson is computed in the page: allow its script.'
        "</noscript></main>"
    )
    return document("Mixture of Experts in 45 minutes", style, body, script)


def measure() -> dict[str, Any]:
    """Every number of the lesson, as JSON."""
    saved, folder = bundled_model("cats_vs_dogs"), bundled_folder("cats_vs_dogs")
    card, atlas = read_card(folder / "card.json"), read_json(folder / "atlas.json")
    history, credits = (
        RoutingHistory.load(folder / "history.safetensors"),
        credits_of(folder / SOURCES),
    )
    shares = next(layer for layer in atlas["layers"] if layer["layer"] == LAYER)["map"]
    cost = measure_cost(saved.net, saved.image_size)
    before, after = (
        history.first_choice(LAYER)[moment].reshape(-1, *history.grid) for moment in (0, -1)
    )
    facts = route_image(saved, folder / "examples" / PHOTOS[0]).model
    _, hidden, width = numbered_layers(saved.net)[LAYER].experts.fc1.weight.shape
    return {
        "schema": "moevision.lesson/1",
        "model": {
            "title": card.title,
            "data": card.data,
            "grid": list(facts.grid),
            "depth": len(saved.net.blocks),
            "layers": list(numbered_layers(saved.net)),
            "layer": LAYER,
            "experts": facts.router(LAYER).num_experts,
            "top_k": facts.router(LAYER).top_k,
            "width": width,
            "hidden": hidden,
            "parameters": cost.total_parameters,
            "active_parameters": cost.active_parameters,
        },
        "photos": [_photo(saved, folder, name, history, credits[name]) for name in PHOTOS],
        "gate": _gate(saved, folder / "examples" / PHOTOS[0]),
        "game": _game(saved, folder / "examples" / GAME),
        "classes": {
            "images": atlas["n_images"],
            "names": shares["class_names"],
            "share": np.round(shares["share"], 4).tolist(),
        },
        "neighbours": {
            "photos": len(after),
            "before": _neighbours(before),
            "after": _neighbours(after),
            "shuffled_before": _alike(before),
            "shuffled_after": _alike(after),
        },
        "without": _without(),
        "photos_without": _photos_without(saved, folder / "examples"),
        "sparsity": sparsity(),
    }


def _photo(
    saved: SavedModel, folder: Path, name: str, history: RoutingHistory, credit: str
) -> dict[str, Any]:
    """Where the patches of a photo go: first choices as one digit per patch, by layer; and before the training."""
    view = route_image(saved, folder / "examples" / name).to_json()
    best = view["prediction"]["moe"][0]
    before = history.first_choice(LAYER)[0][history.image_names.index(name)]
    return {
        "name": name,
        "label": name.partition("/")[0],
        "credit": credit,
        "answer": best["class"],
        "probability": round(best["p"], 4),
        "first": {
            str(layer["layer"]): _digits([experts[0] for experts in layer["experts"]])
            for layer in view["layers"]
        },
        "before": _digits(before),
    }


def _gate(saved: SavedModel, photo: Path) -> dict[str, Any]:
    """Scores, softmax shares, kept experts and their weights of one patch."""
    layer = route_image(saved, photo).layer(LAYER)
    assert layer.computation is not None
    return {
        "patch": GATE_PATCH,
        "scores": np.round(layer.computation.scores[GATE_PATCH].astype(float), 3).tolist(),
        "shares": np.round(layer.probs[GATE_PATCH].astype(float), 4).tolist(),
        "experts": layer.expert_index[GATE_PATCH].tolist(),
        "weights": np.round(layer.combine_weight[GATE_PATCH].astype(float), 4).tolist(),
    }


def _game(saved: SavedModel, photo: Path) -> dict[str, Any]:
    """What each of 16 pieces of a photo adds to the score of its label, by the expert that gets the piece first.

    The layer is the last and the classifier reads the mean over patches, so that the score is a sum over patches, and a
    patch's part in it depends on its own experts alone. The four experts are those that get most of the photo.
    """
    net, label = saved.net, saved.class_names.index(photo.parent.name)
    images = network_input(saved, np.stack([model_input(photo, saved.image_size)]))
    weight, bias = (
        (way[label] - way[1 - label]).detach() for way in (net.head.weight, net.head.bias)
    )
    rows, columns = net.patch_embed.grid_size

    def by_piece(patches: torch.Tensor) -> npt.NDArray[np.float64]:
        grid = patches.double().numpy().reshape(SIDE, rows // SIDE, SIDE, columns // SIDE, -1)
        return grid.sum((1, 3)).reshape(SIDE * SIDE, -1)

    def parts(
        *changes: Intervention,
    ) -> torch.Tensor:  # [patches] whose mean and the bias are the score
        with torch.inference_mode(), intervene(net, *changes):
            return net.forward_features(images)[0, net.num_prefix_tokens :] @ weight

    with torch.inference_mode():
        routing = forward_routing(net, images)[1][-1]
    first = routing.expert_index[0, net.num_prefix_tokens :, 0]
    experts = (
        torch.bincount(first, minlength=routing.num_experts)
        .argsort(descending=True, stable=True)[:4]
        .tolist()
    )
    forced = torch.stack(
        [parts(Intervention("force", layer=LAYER, expert=expert)) for expert in experts], -1
    )
    scores = by_piece(routing.logits[0, net.num_prefix_tokens :])[:, experts]
    return {
        "photo": GAME,
        "label": photo.parent.name,
        "side": SIDE,
        "experts": experts,
        "parts": np.round(by_piece(forced) / len(first), 5).tolist(),
        "bias": round(float(bias), 5),
        "own": {
            "choice": scores.argmax(1).tolist(),
            "answer": round(float(torch.sigmoid(parts().mean() + bias)), 4),
        },
    }


def sparsity() -> dict[str, Any]:
    """Test accuracy with experts and of the dense twin after equal steps, and the difference at equal time."""
    sys.path[:0] = [str(ROOT)]  # benchmarks/ is outside the package
    from benchmarks.sparsity.recompute import judged, read_runs, runs_of

    records = read_runs()
    runs = {arm: runs_of(records, arm) for arm in ("moe", "twin")}
    at_equal_time = judged(records)["H2"]
    low, high = at_equal_time.difference.interval
    points = {"mean": at_equal_time.difference.mean, "low": low, "high": high}
    words = {"positive": "better than", "negative": "worse than", "tie": "not told apart from"}
    return {
        "seeds": {arm: len(of_arm) for arm, of_arm in runs.items()},
        "right": {
            arm: round(statistics.fmean(run["test_top1"] for run in of_arm.values()), 4)
            for arm, of_arm in runs.items()
        },
        "equal_time": {name: round(100 * value, 2) for name, value in points.items()},
        "verdict": words[at_equal_time.verdict],
    }


def _neighbours(maps: npt.NDArray[np.int64]) -> float:
    """Share of pairs of neighbours in [I, rows, columns] with the same expert: mean over images."""
    pairs = [(maps[:, :, 1:] == maps[:, :, :-1]), (maps[:, 1:] == maps[:, :-1])]
    return round(
        float(np.concatenate([pair.reshape(len(maps), -1) for pair in pairs], 1).mean()), 4
    )


def _alike(maps: npt.NDArray[np.int64]) -> float:
    """The same if the patches of every image were shuffled: chance that two of its patches have the same expert."""
    counts = np.array([np.bincount(image.ravel(), minlength=maps.max() + 1) for image in maps])
    total = counts.sum(1)
    return round(float(((counts * (counts - 1)).sum(1) / (total * (total - 1))).mean()), 4)


def _without() -> dict[str, Any]:
    """Answers that change when an expert is taken away: the choice on validation images, the result on test images."""
    saved = bundled_model("pets")
    places = _experts(saved)
    splits = {
        split: SyntheticPets(PETS, saved.image_size, split=split) for split in ("val", "test")
    }
    images = {
        split: np.stack([pets.image(index) for index in range(PETS)])
        for split, pets in splits.items()
    }
    plain = {split: _answers(saved, pixels) for split, pixels in images.items()}
    after = {
        (split, *place): _answers(saved, pixels, *place)
        for split, pixels in images.items()
        for place in places
    }
    changed = {key: int((answers != plain[key[0]]).sum()) for key, answers in after.items()}
    work = _work(saved, images["val"])
    telling = max(places, key=lambda place: changed["val", *place])
    quiet = max((place for place in places if changed["val", *place] == 0), key=work.__getitem__)
    labels = np.array([splits["test"].label(index) for index in range(PETS)])
    flipped = (after["test", *telling] != plain["test"]) & (plain["test"] == labels)
    shown = int(np.flatnonzero(flipped)[0])
    return {
        "title": read_card(bundled_folder("pets") / "card.json").title,
        "images": PETS,
        "experts": [
            {
                "name": f"L{layer}·E{expert}",
                "work": round(work[layer, expert], 4),
                "changed_validation": changed["val", layer, expert],
                "changed_test": changed["test", layer, expert],
            }
            for layer, expert in places
        ],
        "right_test": int((plain["test"] == labels).sum()),
        "shown": {
            "index": shown,
            "label": saved.class_names[labels[shown]],
            "src": _png(images["test"][shown]),
        },
        "telling": _one(saved, images["test"][shown], *telling),
        "quiet": _one(saved, images["test"][shown], *quiet),
    }


def _one(saved: SavedModel, image: Pixels, layer: int, expert: int) -> dict[str, Any]:
    """What taking an expert away does to one image, beside as many choices taken away at random."""
    found = effect(saved, image, Intervention("ablate", layer=layer, expert=expert))
    best = int(np.argmax(found.after))
    assert found.control is not None  # the lesson's model routes patches
    return {
        "name": f"L{layer}·E{expert}",
        "patches": found.moved,
        "before": round(found.before[found.target], 4),
        "after": round(found.after[found.target], 4),
        "answer": saved.class_names[best],
        "answer_probability": round(found.after[best], 4),
        "random_mean": round(float(np.mean(found.control.delta_ps)), 4),
        "random_sd": round(float(np.std(found.control.delta_ps, ddof=1)), 4),
        "draws": len(found.control.delta_ps),
    }


def _photos_without(saved: SavedModel, home: Path) -> dict[str, int]:
    """How often one of the bundled photos gets another answer when one expert is taken away."""
    photos = sorted(home.glob("*/*.jpg"))
    images = np.stack([model_input(photo, saved.image_size) for photo in photos])
    plain, places = _answers(saved, images), _experts(saved)
    changed = sum(int((_answers(saved, images, *place) != plain).sum()) for place in places)
    return {"photos": len(photos), "removals": len(photos) * len(places), "changed": changed}


def _experts(saved: SavedModel) -> list[tuple[int, int]]:
    """Every (layer, expert) of a model."""
    layers = numbered_layers(saved.net).items()
    return [
        (number, expert) for number, layer in layers for expert in range(layer.router.num_experts)
    ]


def _answers(saved: SavedModel, images: Pixels, *place: int) -> npt.NDArray[np.int64]:
    """Predicted class of each image [I], without the expert of `place` (layer, expert) if one is given."""
    return _changed(
        saved, images, *([Intervention("ablate", layer=place[0], expert=place[1])] if place else [])
    )


@torch.inference_mode()
def _changed(saved: SavedModel, images: Pixels, *changes: Intervention) -> npt.NDArray[np.int64]:
    """Predicted class of each image [I] under changes of the routing."""
    with intervene(saved.net, *changes):
        batches = [
            saved.net(batch).argmax(1) for batch in network_input(saved, images).split(_BATCH)
        ]
    return torch.cat(batches).numpy()


def _work(saved: SavedModel, images: Pixels) -> dict[tuple[int, int], float]:
    """Share of a layer's choices that each (layer, expert) gets."""
    with torch.inference_mode():
        passes = [
            forward_routing(saved.net, batch)[1]
            for batch in network_input(saved, images).split(_BATCH)
        ]
    found: dict[tuple[int, int], float] = {}
    for place, number in enumerate(numbered_layers(saved.net)):
        counts = torch.stack([routings[place].counts() for routings in passes]).sum(0).double()
        found |= {
            (number, expert): float(share) for expert, share in enumerate(counts / counts.sum())
        }
    return found


def _digits(experts: Sequence[int] | npt.NDArray[np.int64]) -> str:
    return "".join(str(int(expert)) for expert in experts)


def _png(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{_base64(buffer.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, and its numbers if asked to."""
    about = "Write the lesson as one HTML file."
    parser = argparse.ArgumentParser(prog="python docs/lesson/build.py", description=about)
    parser.add_argument("out", type=Path)
    parser.add_argument("--measure", action="store_true", help="measure the numbers anew first")
    given = parser.parse_args(arguments)
    if given.measure:
        write_text_atomic(HERE / NUMBERS, json_text(measure(), indent=1) + "\n")
    write_text_atomic(given.out, lesson_html())


if __name__ == "__main__":
    main()
