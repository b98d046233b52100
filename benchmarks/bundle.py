"""Make one of the explorer's bundled models from finished runs, with every number on its card measured here.

    python -m benchmarks bundle pets --run runs/pets_moe --dense runs/pets_twin \
        --unbalanced runs/pets_unbalanced --seeds runs/pets_seed1 runs/pets_seed2
    python -m benchmarks bundle cifar10 --run runs/cifar_moe --dense runs/cifar_twin --data path/to/cifar10

Writes `moevision/demo/models/NAME/`: weights rounded to bfloat16, `card.json` (accuracy measured with the rounded
weights on the whole test set) and `atlas*.json` (galleries, class x expert maps, specialization beside its three
comparisons). The commands that trained the runs stand in the runs' provenance and go to the card.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.harness import HERE, argument_parser
from moevision.analysis.collect import collect_routing, network_input
from moevision.analysis.describe import class_expert_map, fractions_of_parts, majority_part
from moevision.analysis.images import PictureSet, open_pictures, read_images
from moevision.analysis.questions import headline, recording_of, three_questions
from moevision.analysis.specialization import measure_baselines, specialization
from moevision.demo.atlas import build_atlas, save_atlas
from moevision.demo.typical import typical_of
from moevision.files import write_json_atomic
from moevision.models.io import SavedModel, load_model, save_model

MODELS = HERE.parent / "moevision" / "demo" / "models"


ABOUT = {  # what a card says in words
    "pets": {
        "title": "Drawn pets",
        "subtitle": "eight animal faces drawn by code, 64 px: as many images as one likes, with their true parts",
        "data": "SyntheticPets: 16 000 drawn images to learn from, 2 000 others to test on",
        "data_kind": "synthetic_pets",
        "licence": "Apache-2.0; trained on images drawn by this package",
    },
    "cifar10": {
        "title": "CIFAR-10 photos",
        "subtitle": "ten classes of photos, 32 px",
        "data": "CIFAR-10 (Krizhevsky 2009), JPEG copy of quality 75: 45 000 photos to learn from, "
        "10 000 others to test",
        "data_kind": "cifar10",
        "licence": "Apache-2.0 (weights); the photos of CIFAR-10 are not part of this package",
    },
}


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("bundle", __doc__)
    parser.add_argument("name", choices=tuple(ABOUT))
    parser.add_argument("--run", type=Path, required=True, help="run folder of the MoE model")
    parser.add_argument("--dense", type=Path, required=True, help="run folder of its dense twin")
    parser.add_argument("--unbalanced", type=Path, help="run folder of the same model without balance losses")
    parser.add_argument("--seeds", type=Path, nargs="*", default=[], help="the same recipe with other seeds")
    parser.add_argument("--curve", type=Path, nargs="*", help="runs whose epochs make the training, if it was resumed")
    parser.add_argument("--note", default="", help="what the recorded commands don't say about the training")
    parser.add_argument("--data", help="where the images are, if not where the name says")
    parser.add_argument("--images", type=int, default=1000, help="images of the atlas (%(default)s)")
    options = parser.parse_args()
    about, folder = ABOUT[options.name], MODELS / options.name
    runs = {"trained": options.run, "dense": options.dense, "unbalanced": options.unbalanced}
    runs = {variant: run for variant, run in runs.items() if run is not None}
    models = {variant: _rounded(run, folder / variant) for variant, run in runs.items()}
    data, size = options.data or about["data_kind"], models["trained"].image_size
    names = models["trained"].class_names
    test = open_pictures(data, size, class_names=names)
    card: dict[str, Any] = {
        "id": options.name,
        **about,
        "recipe": _command(options.run),
        "note": options.note,
        "validation_top1": [top1 for run in options.curve or [options.run] for top1 in _validation(run)],
        "seed": _provenance(options.run)["seed"],
        "accuracy": {"dense" if name == "dense" else _key(name): _accuracy(models[name], test) for name in models},
        "recipes": {name: _command(run) for name, run in runs.items()},
        "test_images": len(test),
    }
    train = open_pictures(data, size, split="train", limit=2000, class_names=names)
    typical = typical_of((train.image(index) for index in range(len(train))), size)
    write_json_atomic(folder / "card.json", {**card, "typical": typical.to_json()})
    pictures = open_pictures(data, size, limit=options.images, class_names=names)
    for variant in ("trained", "unbalanced"):
        if variant in models:
            name = "atlas.json" if variant == "trained" else f"atlas_{variant}.json"
            seeds = [load_model(str(run)) for run in options.seeds] if variant == "trained" else []
            save_atlas(_atlas(models[variant], pictures, seeds, about["title"]), folder / name)
    print(json.dumps(card, indent=2, ensure_ascii=False))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size / 1e6:8.3f} MB  {file.relative_to(folder)}")


def _rounded(run: Path, folder: Path) -> SavedModel:
    """The run's model with its weights rounded to bfloat16, as it will be loaded from the package."""
    model = load_model(str(run))
    model.net.to(torch.bfloat16)
    save_model(model, folder)
    return load_model(str(folder))


def _key(variant: str) -> str:
    return "moe" if variant == "trained" else variant


def _provenance(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    return found


def _command(run: Path) -> str:
    """The command that trained a run, without the places of its data and of a checkpoint that it went on from."""
    words = _provenance(run)["command"]
    places = {"--data.path", "--ckpt_path"}
    return " ".join(word for word, before in zip(words, ["", *words], strict=False) if not places & {word, before})


def _validation(run: Path) -> list[float]:
    """Validation top-1 after each epoch of a run."""
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        return [round(float(row["val/top1"]), 4) for row in csv.DictReader(file) if row.get("val/top1")]


@torch.inference_mode()
def _accuracy(model: SavedModel, pictures: PictureSet, batch_size: int = 128) -> float:
    """Share of the images that are classified correctly."""
    right = 0
    starts = range(0, len(pictures), batch_size)
    for start in track(starts, f"testing on {len(pictures):,} images"):
        rows = range(start, min(start + batch_size, len(pictures)))
        answers = model.net(network_input(model, read_images(pictures, rows))).argmax(-1)
        right += int((answers == torch.tensor([pictures.label(row) for row in rows])).sum())
    return right / len(pictures)


def _atlas(model: SavedModel, pictures: PictureSet, seeds: list[SavedModel], title: str) -> dict[str, Any]:
    trace = collect_routing(model, pictures, name=title)
    others = [collect_routing(other, pictures) for other in seeds]
    fractions = fractions_of_parts(pictures, trace.grid)
    parts = None if fractions is None else majority_part(fractions)
    baselines = measure_baselines(model, pictures, trace)
    information = specialization(trace, baselines=baselines, seeds=others, parts=parts)
    own = recording_of(model, pictures, trace, baselines=baselines, parts=parts, part_names=pictures.part_names)
    again = [
        recording_of(other, pictures, routed, baselines=measure_baselines(other, pictures, routed), swap=False)
        for other, routed in zip(seeds, others, strict=True)
    ]
    questions = three_questions(own, seeds=again)
    for answer in headline(questions):
        print(answer.sentence)
    maps = {layer.layer: class_expert_map(trace, layer.layer) for layer in trace.layers}
    return build_atlas(trace, pictures, information, maps, questions=questions)
