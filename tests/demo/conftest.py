"""A tiny explorer: bundled models with random weights, made in a second; enough for everything but accuracy."""

import csv
import io
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import moevision.models  # noqa: F401  (registers the names)
from moevision.analysis.collect import network_input
from moevision.analysis.images import open_pictures, read_images
from moevision.data import SyntheticPets
from moevision.data.transforms import normalize
from moevision.demo.galleries import Galleries
from moevision.demo.models import HISTORY, open_entries
from moevision.demo.service import Explorer
from moevision.layers import forward_routing
from moevision.models.history import RoutingHistory, moment_of
from moevision.models.io import SavedModel, load_model, save_model
from moevision.models.ood import fit_ood, pooled
from tests.demo import hostile, serving
from tests.demo.serving import running

SIZE = 32
CLASSES = list(SyntheticPets.classes)
STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def make_model(seed=0, *, num_classes=8, **arguments):
    """An untrained model of 16 patches with MoE layers in blocks 1 and 3, E = 4, k = 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.create_model(
            "test_vit_moe", num_classes=num_classes, **{"router": "vmoe_top_k", **arguments}
        )
    return SavedModel(net.eval(), CLASSES[:num_classes], SIZE, *STATS)


def forward(model, pixels):
    """Logits and routings of an image, without anything of the demo."""
    x = normalize(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), model.mean, model.std)
    with torch.no_grad():
        return forward_routing(model.net, x)


def png(pixels):
    """An image as a visitor sends it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return hostile.uri(buffer.getvalue())


@cache
def usual_pets():
    """120 drawn pets, uint8 [120, S, S, 3], and their labels."""
    pets = SyntheticPets(120, SIZE, split="val")
    return np.stack([pets.image(index) for index in range(120)]), np.array(
        [pets.label(i) for i in range(120)]
    )


def measured(model):
    """The model with distances from drawn pets; the last 40 set the threshold."""
    images, labels = usual_pets()
    with torch.inference_mode():
        features = pooled(model.net, network_input(model, images)).double().numpy()
    return replace(model, strangers=fit_ood(features[:80], labels[:80], features[80:]))


def write_bundle(
    home: Path, id="pets", data_kind="synthetic_pets", seed=0, twins=True, **arguments
) -> Path:
    """A bundled model in bfloat16, as the package carries them, with its dense twin."""
    folder = home / id
    models = {"trained": {}, "dense": {"twin": "active_flops"}}
    for offset, (name, own) in enumerate(list(models.items())[: None if twins else 1]):
        model = make_model(seed + offset, **arguments, **own)
        if name == "trained":
            model.net.to(torch.bfloat16).float()  # as it will be loaded
            model = measured(model)
        model.net.to(torch.bfloat16)
        save_model(model, folder / name)
    card = {
        "id": id,
        "title": f"The {id}",
        "subtitle": "for tests",
        "data": "drawn pets",
        "recipe": "none",
        "seed": seed,
        "accuracy": {"moe": 0.125, "dense": 0.13},
        "licence": "Apache-2.0",
        "data_kind": data_kind,
        "recognized": 0.9,
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def write_game(home: Path, id, facts=None, *, data_kind="synthetic_pets", **arguments) -> Path:
    """A bundled model whose random weights are so large that its answers differ, with further `facts` on its card."""
    folder = write_bundle(home, id, data_kind, twins=False, **arguments)
    model = make_model(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.net.parameters():
            if value.ndim > 1:
                value += 0.2 * torch.randn(value.shape, generator=generator)
    save_model(model, folder / "trained")
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **(facts or {})}))
    return folder


# Found by trying all sets of at most three experts of a layer: these answers fall without one, without two, never.
FALLS = {
    "pets/test/11": {"away": [[1, 0]]},
    "pets/test/2": {"away": [[1, 2], [1, 3]]},
    "pets/test/5": {"away": None},
}
# Made up: 37 of 40 cats go to expert 0, and so do 4 of 42 dogs.
SORTING = {
    "layer": 3,
    "classes": ["cat", "dog"],
    "routes": [[37, 3], [4, 38]],
    "agree": 82,
    "images": 82,
    "photos": [
        {"id": f"data/{name}/{index}.png", "expert": expert, "answer": CLASSES[expert]}
        for name, index, expert in (("cat", 0, 0), ("dog", 1, 1), ("cat", 8, 0), ("dog", 9, 0))
    ],
}


@pytest.fixture(scope="session")
def games_home(tmp_path_factory):
    """ "game", whose answers fall without few experts; "many" with 32 experts; "two", a router of whole images."""
    home = tmp_path_factory.mktemp("games")
    write_game(
        home, "game", {"falls": FALLS, "matters": {"picture": "pets/test/11", "away": [[1, 0]]}}
    )
    write_game(home, "many", num_experts=32)
    image = {"num_classes": 2, "num_experts": 2, "top_k": 1, "route_by": "image"}
    folder = write_game(home, "two", {"sorting": SORTING}, data_kind="cats_vs_dogs", **image)
    write_examples(folder, (0, 1, 8, 9))
    return home


def write_examples(folder: Path, indices) -> None:
    """Drawn images in the place of a model's photos."""
    pets = SyntheticPets(max(indices) + 1, PHOTO_PX, split="val")
    sources = {}
    for index in indices:
        name = f"{CLASSES[pets.label(index)]}/{index}.png"
        (folder / "examples" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pets.image(index)).save(folder / "examples" / name)
        sources[name] = {"author": "Ann", "licence": "CC0", "source": "drawn", "changes": ""}
    (folder / "examples" / "SOURCES.json").write_text(json.dumps(sources))


STEPS, TOTAL_STEPS = (0, 10, 40), 100
PHOTOS, PHOTO_PX = 3, 96


def write_photos(home: Path, id="snaps") -> Path:
    """A bundled model with drawn images in the place of photos, larger than its input, and a recorded training.

    At the moments before the last one stand models of other seeds.
    """
    folder = write_bundle(home, id, "cats_vs_dogs", seed=20, twins=False)
    write_examples(folder, range(PHOTOS))
    pictures = open_pictures(folder / "examples", SIZE, split="all", class_names=CLASSES)
    names = tuple(map(pictures.picture_name, range(PHOTOS)))
    model = load_model(str(folder / "trained"))
    images = network_input(model, read_images(pictures, range(PHOTOS)))
    history = RoutingHistory(names, tuple(model.class_names), total_steps=TOTAL_STEPS)
    for step, other in zip(STEPS, (make_model(31), make_model(32), model), strict=True):
        history = history.plus(step, moment_of(other.net, images))
    history.save(folder / HISTORY)
    return folder


@pytest.fixture(scope="session")
def photos_home(tmp_path_factory):
    """A model with photos and a history; not to be changed."""
    home = tmp_path_factory.mktemp("snaps")
    write_photos(home)
    return home


@pytest.fixture(scope="session")
def recorded(photos_home):
    return RoutingHistory.load(photos_home / "snaps" / "history.safetensors")


HOSTILE = "cat/<img src=x onerror=alert(1)>'&quot;.png"


@pytest.fixture(scope="session")
def scored_run(tiny_run, tmp_path_factory):
    """A copy of the tiny run with its images, the most doubtful of which has the name `HOSTILE`; not to be changed."""
    home = tmp_path_factory.mktemp("scored")
    run = Path(
        shutil.copytree(
            tiny_run, home / "run", ignore=shutil.ignore_patterns("checkpoints", "twin")
        )
    )
    shutil.copytree(tiny_run.parents[1] / "pets", home / "pets")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace(f"path: {tiny_run.parents[1] / 'pets'}", f"path: {home / 'pets'}")
    )
    with (run / "scores.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    row = next(row for row in rows if row[1] == "cat")
    first, row[0], row[head.index("aum")] = row[0], HOSTILE, "-9"
    with (run / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    (run / "splits.csv").write_text((run / "splits.csv").read_text().replace(first, f'"{HOSTILE}"'))
    (home / "pets" / first).rename(home / "pets" / HOSTILE)
    return run


@pytest.fixture(scope="session")
def make():
    return make_model


@pytest.fixture(scope="session")
def bundle():
    return write_bundle


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Two bundled models, "pets" with images and "photos" without; not to be changed."""
    home = tmp_path_factory.mktemp("models")
    write_bundle(home)
    write_bundle(home, "photos", "cifar10", seed=10)
    return home


@pytest.fixture(scope="session")
def explorer(home):
    """An explorer that has looked through 160 images of each variant."""
    entries = open_entries(None, home=home)
    explorer = Explorer(entries, Galleries(entries, limit=serving.GALLERY))
    explorer.galleries.start(explorer.pages.prepare)
    explorer.galleries.thread.join(serving.START_S)
    yield explorer
    explorer.close()


@pytest.fixture(scope="session")
def routers_home(tmp_path_factory):
    """A model of expert choice whose experts leave patches out, and one of Soft MoE."""
    home = tmp_path_factory.mktemp("routers")
    write_bundle(home, "choice", twins=False, router="expert_choice", top_k=1)
    write_bundle(
        home, "soft", twins=False, router=["vmoe_top_k", "soft"], num_experts=[4, 6], top_k=[2, 1]
    )
    return home


@pytest.fixture(scope="session")
def server(home, routers_home, photos_home, tmp_path_factory):
    """The same explorer behind its web page, in a process of its own.

    `server.url` is where; `server.doors` has further addresses, "other" that of the models in `routers_home`, "photos"
    that of `photos_home`. `server.files` is where it would keep files.
    """
    files = tmp_path_factory.mktemp("server")
    env = {"TMPDIR": str(files)}
    with running(
        serving.__file__, str(home), str(routers_home), str(photos_home), env=env
    ) as server:
        server.files = files
        yield server


@pytest.fixture(scope="session")
def pixels():
    """Test image number 3, a bear, uint8 [32, 32, 3]."""
    return SyntheticPets(2000, SIZE, split="test").image(3)
