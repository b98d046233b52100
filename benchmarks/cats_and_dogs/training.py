"""One run of the study: experts are trained in the last blocks, then asked what they are for.

Axes: B photos of a batch, I test photos, N tokens, D width, E experts, C classes.
"""

from __future__ import annotations

import time
from argparse import Namespace
from itertools import islice
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax
from torch import Tensor, nn

from benchmarks.cats_and_dogs.gates import GATES, Gate, Job
from benchmarks.harness import HERE, about
from benchmarks.knock_out import knock_out
from benchmarks.specialization.training import look, recorded_layers, rounded_all, runner
from benchmarks.specialization.trunk import PHOTO_BASE, Tail, Tokens, computed, evaluated, training_batches
from benchmarks.subject import Subject, TrainingStep
from moevision.analysis.information import Floats, Ints, Json
from moevision.analysis.questions import three_questions
from moevision.analysis.readings import Recording, Run
from moevision.data import ImageDataModule
from moevision.demo import bundled_model
from moevision.files import file_sha256, write_json_atomic
from moevision.layers import moe_layers
from moevision.models.convert import pool_patches
from moevision.models.io import SavedModel, create_from, save_model
from moevision.models.upcycle import upcycle
from moevision.train.provenance import collect_provenance

PROTOCOL = HERE / "cats_and_dogs" / "protocol.md"
SIDE, DEPTH, FIRST, LAYERS = 168, 10, 7, [7, 9]  # px; blocks; the first of the last ones; those with experts
EPOCHS, BATCH, REDRAWN = 3, 32, 0.5  # REDRAWN: share of each copied expert's hidden units (arXiv:2502.19261)
OPTIM = {"experts": {"lr": 1e-3}, "blocks": {"lr": 5e-4}}  # by what learns
CLASSES, PRECISION = 2, "bf16"


def run_job(job: Job, options: Namespace) -> dict[str, Any]:
    """Do one run; its record."""
    origin = {**about(), "command": "python -m benchmarks cats-and-dogs run", "protocol_sha256": file_sha256(PROTOCOL)}
    gate, data = GATES[job.gate], open_photos(options)
    dense = new_dense(job, options)
    train, test = (tokens_of(split, dense, job.trunk, data, options) for split in ("train", "test"))
    names, labels = list(data.class_names), test.labels.numpy()
    start = time.process_time()
    net = dense if not gate.experts else upcycle(
        dense, layers=LAYERS, num_experts=gate.experts, top_k=1, router="vmoe_top_k", route_by="image", reinit=REDRAWN,
        seed=job.seed,
    ).eval()  # fmt: skip
    before = look(net, FIRST, test.tokens) if gate.experts else None
    home = options.work / job.name
    if job.trunk == "bundled":
        save_model(SavedModel(net, names, SIDE, data.mean, data.std), home / "start")
    fit(net, train, gate, job.learn, job.seed)
    trained = time.process_time()
    if job.trunk == "bundled":  # what `python -m benchmarks bundle` reads of a run
        save_model(SavedModel(net, names, SIDE, data.mean, data.std), home / "model")
        command = origin["command"].split()
        write_json_atomic(
            home / "provenance.json", collect_provenance(command=command, seed=job.seed, data_sha256=None)
        )
        (home / "metrics.csv").write_text("step,val/top1\n")
    if before is None:
        logits, layers = logits_of(net, test.tokens), []
    else:
        after = look(net, FIRST, test.tokens)
        logits, run = after.logits, remembered(runner(net, moe_layers(net), after, np.arange(CLASSES)))
        recording = Recording(labels, recorded_layers(net, "image", before, after), names, run=run)
        answers = [layer.to_json() for layer in three_questions(recording, draws=1)]
        for place, answer in enumerate(answers):
            if answer["swap"] is not None:
                answer["swap"]["knock_out"] = knock_out(recording, place)
        layers = [
            {
                **numbers_of(answer),
                "sent": by_expert(run, place, after.choices[place], labels, gate.experts),
                "routes": "".join(map(str, after.choices[place][:, 0, 0])),
            }
            for place, answer in enumerate(answers)
        ]
    return {
        **vars(job), "experts": gate.experts, "steps": len(train.labels) // BATCH, "images": len(labels),
        "top1": float((logits.argmax(1) == labels).mean()), "own": rounded_all(by_class(logits, labels)),
        "classes": names, "labels": "".join(map(str, labels)), "predicted": "".join(map(str, logits.argmax(1))),
        "layers": rounded_all(layers),
        "cpu_s": {"training": round(trained - start, 1), "asking": round(time.process_time() - trained, 1)}, **origin,
    }  # fmt: skip


def open_photos(options: Namespace) -> ImageDataModule:
    """The photos as configs/cats_vs_dogs.yaml has them; a tenth of the training photos is left for validation."""
    data = ImageDataModule(
        path=str(options.cats), image_size=SIDE, batch_size=BATCH, crop="random_resized", min_crop_scale=0.5,
        augment="light",
    )  # fmt: skip
    data.setup("fit")
    return data


def new_dense(job: Job, options: Namespace) -> nn.Module:
    """The pretrained model's first blocks with a new classifier of the patches' mean, in eval mode.

    With the trunk `bundled` everything that doesn't learn is that of the explorer's photo model.
    """
    torch.manual_seed(job.seed)
    net = pool_patches(create_from(PHOTO_BASE, CLASSES, SIDE, weights=options.pretrained, depth=DEPTH))
    if job.trunk == "bundled":
        weights = bundled_model("cats_vs_dogs").net.state_dict()
        still = {name: weight for name, weight in weights.items() if not learns(name, job.learn)}
        net.load_state_dict(still, strict=False)
    return net.eval()


def learns(name: str, learn: str) -> bool:
    """Whether a parameter is trained, by `LEARN`; of a dense model the MLPs stand in the experts' place."""
    if learn == "experts":
        return name.startswith(("head.", *(f"blocks.{block}.mlp." for block in LAYERS)))
    return name.startswith(("head.", "norm.", "fc_norm.", *(f"blocks.{block}." for block in range(FIRST, DEPTH))))


def tokens_of(split: str, dense: nn.Module, trunk: str, data: ImageDataModule, options: Namespace) -> Tokens:
    """What the frozen blocks make of the photos, computed once: `EPOCHS` augmented copies of `train`, or a split."""
    file = options.work / f"tokens-{trunk}-{split}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            if split == "train":
                batches = islice(training_batches(data), EPOCHS * data.train_batches())
                images = ((batch["image"], batch["label"]) for batch in batches)
            else:
                images = evaluated(data, split, None)
            part = file.with_suffix(".part")
            save_file(computed(dense, FIRST, images, bf16=PRECISION == "bf16")._asdict(), part)
            part.replace(file)
    found = load_file(file)
    return Tokens(found["tokens"], found["labels"])


def fit(net: nn.Module, train: Tokens, gate: Gate, learn: str, seed: int) -> None:
    """Train what `learns`, in place: every copy once, in the order of the seed."""
    torch.manual_seed(seed)
    tail = Tail(net, FIRST)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(learns(name, learn))
    steps = len(train.labels) // BATCH
    subject = Subject("cats-and-dogs", {}, OPTIM[learn], gate.aux, batch_size=BATCH)
    step = TrainingStep(subject, precision=PRECISION, net=tail, total_steps=steps)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    for chosen in order[: steps * BATCH].split(BATCH):
        step(train.tokens[chosen].float(), train.labels[chosen])
    net.eval()


@torch.inference_mode()
def logits_of(net: nn.Module, tokens: Tensor) -> Floats:
    """Logits [I, C] of tokens [I, N, D] before block `FIRST`; `net` is in eval mode."""
    tail = Tail(net, FIRST).eval()
    return torch.cat([tail(part.float()) for part in tokens.split(64)]).numpy()


def remembered(run: Run) -> Run:
    """The same, which computes a photo once for each expert of a layer, and once without one: most changes agree."""
    known: dict[tuple[int, int, int], Floats] = {}

    def again(place: int, images: Ints, experts: Ints) -> Floats:
        keys = [(place, int(i), max(int(e), -1)) for i, e in zip(images, experts[:, 0, 0], strict=True)]
        new = {key: row for row, key in enumerate(keys) if key not in known}
        if rows := list(new.values()):
            known.update(zip(new, run(place, images[rows], experts[rows]), strict=True))
        return np.stack([known[key] for key in keys])

    return again


def by_class(logits: Floats, labels: Ints) -> Json:
    """`right` and `log_loss` [C]: mean over the photos of each class, of logits [I, C]."""
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    loss, right = -log_p[np.arange(len(labels)), labels], log_p.argmax(1) == labels
    classes = range(CLASSES)
    return {name: [float(each[labels == c].mean()) for c in classes] for name, each in
            (("right", right), ("log_loss", loss))}  # fmt: skip


def by_expert(run: Run, place: int, choices: Ints, labels: Ints, experts: int) -> list[Json]:
    """For each expert what becomes of both classes where it computes all photos in this layer, choices [I, 1, 1]."""
    images = np.arange(len(labels))
    return [by_class(run(place, images, np.full_like(choices, e)), labels) for e in range(experts)]


def numbers_of(layer: Json) -> Json:
    """Of a layer's three answers what the tables need."""

    def told(reading: Json) -> Json:
        return {"guess": reading["guess"]["value"], "bits": reading["bits"]}

    own, controls = layer["readings"][0], layer["controls"]
    return {
        "name": layer["name"], "answers": [answer["answer"] for answer in layer["answers"]],
        "share": layer["load"]["class_share"], "load": layer["load"]["share"],
        **told(own), "probe": told(layer["probe"]), "swap": layer["swap"],
        **{name: [told(each) for each in controls[name] if each["unit"] == "patch"] for name in ("before", "clusters")},
    }  # fmt: skip
