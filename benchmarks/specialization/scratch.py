"""Do the experts of trained models do different things? The third question, of models whose experts never were copies.

    nice -n 10 python -m benchmarks scratch --cifar DIR --cats DIR     # the runs that have no record yet
    python -m benchmarks scratch --only small-s0 --cifar DIR

The study beside it asks models that were upcycled and trained briefly, whose experts began as copies of one MLP. Here
are the three bundled models with eight experts, on their test images (cats and dogs: upcycled too, but trained to the
end), and six seeds of the routers' small model, trained for 500 steps on CIFAR-10. One record for each: accuracy and,
for each MoE layer, the answer and all costs of `moevision.analysis.questions`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.bundle import recorded, third_answers
from benchmarks.harness import HERE, about, argument_parser
from benchmarks.knock_out import knock_out
from benchmarks.queue import is_recorded, write_run
from benchmarks.specialization.training import rounded_all
from benchmarks.study import CIFAR_PIXELS, IMAGE_SIZE, make_task, open_data, small, train
from moevision.analysis.collect import collect_routing
from moevision.analysis.images import PictureSet, open_pictures
from moevision.data import SyntheticPets
from moevision.demo import bundled_model
from moevision.models.io import SavedModel

SEEDS, STEPS, LR, PERMUTATIONS = range(6), 500, 2e-3, 1000
BUNDLED = ("cifar10", "pets", "cats_vs_dogs")
RUNS = (BUNDLED[0], *(f"small-s{seed}" for seed in SEEDS), *BUNDLED[1:])


def small_model(seed: int, cifar: str, steps: int = STEPS) -> SavedModel:
    """The routers' small model with a V-MoE router, trained on CIFAR-10 from one seed."""
    data = open_data("cifar10", cifar)
    subject = small("vmoe_top_k", lr=LR, num_classes=data.num_classes, router="vmoe_top_k")
    task = make_task(subject, seed)
    train(task, data, steps, seed)
    return SavedModel(task.net.eval(), list(data.class_names), IMAGE_SIZE, **CIFAR_PIXELS)


def asked(model: SavedModel, pictures: PictureSet, permutations: int = PERMUTATIONS) -> dict[str, Any]:
    """Accuracy on the images, and the answer and the costs of each MoE layer."""
    trace = collect_routing(model, pictures, progress=False)
    recording, layers = recorded(model, trace, pictures), []
    for place, (answer, swap) in enumerate(third_answers(recording)):
        told = {"name": trace.layers[place].name, "answer": answer.answer, "sentence": answer.sentence, "swap": None}
        if swap is not None:
            away = knock_out(recording, place, limit=len(pictures), permutations=permutations)
            told["swap"] = rounded_all(swap.to_json() | {"knock_out": away})
        layers.append(told)
    return {"images": len(pictures), "top1": trace.accuracy, "layers": layers}


def record_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    origin, start = {**about(), "command": "python -m benchmarks scratch"}, time.process_time()
    seed = None if name in BUNDLED else int(name.removeprefix("small-s"))
    model = bundled_model(name) if seed is None else small_model(seed, options.cifar)
    size, limit = model.image_size, options.images
    if name == "pets":
        pictures = open_pictures(SyntheticPets(limit, size, 0, "test"), size)
    else:
        folder = options.cats if name == "cats_vs_dogs" else options.cifar
        pictures = open_pictures(folder, size, limit=limit, class_names=model.class_names)
    training = {} if seed is None else {"seed": seed, "steps": STEPS, "lr": LR}
    found = asked(model, pictures)
    return {**training, **found, "cpu_s": round(time.process_time() - start, 1), **origin}


def main() -> None:
    """Write the records that aren't there."""
    parser = argument_parser("scratch", __doc__)
    parser.add_argument("--cifar", metavar="DIR", help="CIFAR-10 as a folder")
    parser.add_argument("--cats", metavar="DIR", help="cats_vs_dogs as a folder")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS, metavar="RUN", help="(all)")
    parser.add_argument("--images", type=int, default=2000, help="test images at most, as many of each class")
    parser.add_argument("--out", type=Path, default=HERE / "specialization" / "scratch.jsonl", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        if is_recorded(options.out, name):
            continue
        record = record_of(name, options)
        write_run(options.out, name, record)
        for layer in record["layers"]:
            print(f"{name}, {layer['name']}: {layer['sentence']}", flush=True)
