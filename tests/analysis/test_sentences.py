"""What a user did wrong with images, traces, interventions, recordings or statistics, and what the sentence names."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from moevision.analysis import (
    Intervention,
    RecordedLayer,
    Recording,
    RoutingTrace,
    class_effect,
    collect_routing,
    effect,
    intervene,
    measure_baselines,
    open_pictures,
    recording_of,
    three_questions,
)
from moevision.analysis.describe import class_expert_map
from moevision.analysis.good_data import examine
from moevision.analysis.images import PictureSet, aligned_pictures
from moevision.analysis.information import class_information, part_information
from moevision.analysis.report import claim_folder
from moevision.data import SyntheticPets
from moevision.errors import UserError
from moevision.models.io import SavedModel
from tests.analysis.models import saved, small_net, traced
from tests.analysis.test_effects import PICTURES, make, picture
from tests.analysis.test_good_data import images_in, scores_of
from tests.analysis.test_images import Tagged
from tests.shared import says


class Ours(NamedTuple):
    """A model with experts 0 to 3 in blocks 1 and 3, eight images and their routing; an empty folder."""

    model: SavedModel
    pictures: PictureSet
    trace: RoutingTrace
    folder: Path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Ours:
    model = saved(small_net())
    return Ours(model, *traced(model, 8), tmp_path_factory.mktemp("ours"))


def scope(kind: str, net: nn.Module | None = None, **numbers: object) -> object:
    return intervene(net or small_net(), Intervention(kind, **numbers)).__enter__()


def recording(experts: int = 1, patches: int = 4, **layer: object) -> Recording:
    """Eight images of two classes, all patches of which go to one expert of two."""
    choices = np.full((8, 4, 1), experts)
    recorded = RecordedLayer("L1", choices, 2, **layer)
    return Recording(np.arange(8) % 2, [recorded], ["cat", "dog"])


ABLATION = Intervention("ablate", layer=1, expert=0)


class Tensors(Tagged):
    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), 0


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def one_image(change=ABLATION, **options):
    return effect(make(), picture(0), change, **options)


def of_class(name):
    return class_effect(make(), PICTURES, name, ABLATION)


def scores_of_other_images():
    images = images_in(Path(), ["a"], train=[("a/1.png", 0)])
    return examine(images_in(Path(), ["a"], train=[("a/2.png", 0)]), scores_of(images), None)


PARTS = np.full((8, 4), -1)
MISTAKES = {
    "no such split": (lambda _: open_pictures("synthetic_pets", 16, split="testing"), "testing", "test, all"),
    "no folder": (lambda _: open_pictures("no_such_folder", 8), "no_such_folder", "no folder"),
    "items are tensors": (lambda _: open_pictures(Tensors([0]), 8, class_names=["a"]), "Tensors", "its transform"),
    "no length": (lambda _: open_pictures(Endless(), 8), "Endless", "with a length"),
    "label without a name": (
        lambda _: open_pictures(Tagged([0, 3], classes=["a", "b"]), 8),
        "Image 1", "label 3", "2 class names", "`classes`",
    ),
    "trace of other images": (
        lambda _: aligned_pictures(PICTURES, SimpleNamespace(picture_names=("other 0",))),
        "other 0", "not among blocks",
    ),
    "no such class": (lambda _: one_image(target="owl"), "'owl'", "cat, dog, fox"),
    "no such layer": (lambda _: one_image(Intervention("ablate", layer=2, expert=0)), "Block 2", "1, 3"),
    "class of the images alone": (lambda _: of_class("owl"), "'owl'", "cat, dog, fox"),
    "class of the model alone": (lambda _: of_class("fox"), "blocks", "'fox'", "dog, cat, owl"),
    "scores of other images": (lambda _: scores_of_other_images(), "scores.csv", "of other images"),
    "report into a file": (lambda _: claim_folder(__file__), __file__, "File exists", "--out"),
    "no such block": (lambda o: o.trace.layer(2), "Block 2", "1, 3"),
    "no such file": (lambda o: RoutingTrace.load(o.folder / "no"), "no file", "no:", "path"),
    "labels missing": (lambda o: replace(o.trace, labels=o.trace.labels[:3]), "8 images", "again"),
    "another grid": (lambda o: replace(o.trace, grid=(2, 4)), "8 patches", "again"),
    "no layer": (lambda o: replace(o.trace, layers=()), "collect it again"),
    "other names": (lambda o: replace(o.trace, picture_names=("a",)), "1 images", "again"),
    "a dense model": (lambda o: collect_routing(small_net(moe_layers=[]), o.pictures), "no MoE", "convert_to_moe"),
    "no ViT": (lambda o: collect_routing(nn.Linear(3, 3), o.pictures), "Linear", "square images", "image_size"),
    "no such kind": (lambda o: Intervention("remove"), "'remove'", "ablate, force"),
    "ablate without an expert": (lambda o: Intervention("ablate", layer=1), "'ablate'", "needs expert"),
    "force without a layer": (lambda o: Intervention("force", expert=1), "'force'", "needs layer"),
    "a negative expert": (lambda o: Intervention("ablate", layer=1, expert=-1), "expert=-1", "whole number"),
    "no such fill": (lambda o: Intervention("ablate", layer=1, expert=1, fill="mean"), "'mean'", "next_best or zero"),
    "no capacity": (lambda o: Intervention("capacity", factor=0.0), "factor=0.0", "positive number"),
    "not a number": (lambda o: Intervention("capacity", factor=float("nan")), "factor=nan", "positive number"),
    "a dense block": (lambda o: scope("ablate", layer=2, expert=0), "Block 2", "1, 3"),
    "no such expert": (lambda o: scope("ablate", layer=1, expert=6), "L1", "expert 6", "0 to 3"),
    "no such other": (lambda o: scope("swap", layer=1, expert=0, other=4), "expert 4", "0 to 3"),
    "too large a k": (lambda o: scope("top_k", top_k=7), "k=7", "4 experts", "1 and 4"),
    "no k": (lambda o: scope("top_k", top_k=0), "k=0", "1 and 4"),
    "no MoE layer": (lambda o: scope("random", nn.Linear(2, 2)), "Linear", "not a dense"),
    "no first choice": (lambda o: scope("force", small_net("soft"), layer=1, expert=0), "'force'", "L1", "all slots"),
    "one layer can't": (
        lambda o: scope("top_k", small_net(["soft", "noisy_top_k"]), top_k=1),
        "no meaning", "L1", "choose another",
    ),
    "an expert too many": (lambda o: recording(experts=2), "L1", "[8, 4, 1]", "0 to 1"),
    "an empty recording": (lambda o: Recording(np.arange(8), [], ["cat"]), "without a layer", "choices"),
    "another recipe": (
        lambda o: three_questions(recording(), seeds=[replace(recording(), layers=2 * [*recording().layers])]),
        "same recipe", "other MoE layers",
    ),
    "another set before": (
        lambda o: recording_of(o.model, o.pictures, o.trace, before=o.trace.select(slice(0, 4))),
        "before training", "same images",
    ),
    "baselines of one image": (
        lambda o: measure_baselines(o.model, o.pictures, o.trace.select([0])),
        "two images", "give more",
    ),
    "baselines of others": (
        lambda o: measure_baselines(o.model, open_pictures(SyntheticPets(8, 32, 1, "test"), 32, limit=4), o.trace),
        "other images",
    ),
    "one labelled image": (
        lambda o: class_information(np.zeros((2, 4, 2)), np.array([0, -1])),
        "two images", "known class",
    ),
    "no part": (lambda o: part_information(np.zeros((8, 4, 2)), PARTS), "part masks", "synthetic_pets"),
    "a map of one image": (lambda o: class_expert_map(o.trace.select([0]), 1), "two images", "give more"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_the_way_on(ours, mistake):
    call, *fragments = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        call(ours)
    assert says(str(caught.value), *fragments)
