"""What a user's mistake with images, effects and reports is answered by: each row names what the sentence must say."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset

from moevision.analysis import Intervention, class_effect, effect, open_pictures
from moevision.analysis.good_data import examine
from moevision.analysis.images import aligned_pictures
from moevision.analysis.report import claim_folder
from moevision.errors import UserError
from tests.analysis.test_effects import PICTURES, make, picture
from tests.analysis.test_good_data import images_in, scores_of
from tests.analysis.test_images import Tagged

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


MISTAKES = {
    "no such split": (lambda: open_pictures("synthetic_pets", 16, split="testing"), "testing", "test, all"),
    "no folder": (lambda: open_pictures("no_such_folder", 8), "no_such_folder", "no folder"),
    "items are tensors": (lambda: open_pictures(Tensors([0]), 8, class_names=["a"]), "Tensors", "its transform"),
    "no length": (lambda: open_pictures(Endless(), 8), "Endless", "with a length"),
    "label without a name": (
        lambda: open_pictures(Tagged([0, 3], classes=["a", "b"]), 8),
        "Image 1", "label 3", "2 class names", "`classes`",
    ),
    "trace of other images": (
        lambda: aligned_pictures(PICTURES, SimpleNamespace(picture_names=("other 0",))),
        "other 0", "not among blocks",
    ),
    "no such class": (lambda: one_image(target="owl"), "'owl'", "cat, dog, fox"),
    "no such layer": (lambda: one_image(Intervention("ablate", layer=2, expert=0)), "Block 2", "1, 3"),
    "class of the images alone": (lambda: of_class("owl"), "'owl'", "cat, dog, fox"),
    "class of the model alone": (lambda: of_class("fox"), "blocks", "'fox'", "dog, cat, owl"),
    "scores of other images": (scores_of_other_images, "scores.csv", "of other images"),
    "report into a file": (lambda: claim_folder(__file__), __file__, "File exists", "--out"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    call, *fragments = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        call()
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, str(caught.value)
