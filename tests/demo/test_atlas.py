"""The atlas: its numbers against brute-force counts, its size, and its way through a file."""

import json

import numpy as np
import pytest
import timm
import torch

from moevision.analysis.collect import collect_routing
from moevision.analysis.describe import class_expert_map, fractions_of_parts
from moevision.analysis.images import View, open_pictures
from moevision.data import SyntheticPets
from moevision.demo.atlas import SCHEMA, build_atlas, counted_name, load_atlas, save_atlas
from moevision.errors import UserError
from moevision.layers.moe import moe_layers


@pytest.fixture(scope="module")
def pictures():
    return open_pictures(SyntheticPets(48, 32, 0, "test"), 32)


@pytest.fixture(scope="module")
def trace(pictures):
    torch.manual_seed(0)
    net = timm.create_model("test_vit_moe", num_classes=8, img_size=32, patch_size=8).eval()
    with torch.no_grad():  # an untrained model sends all patches the same way
        net.pos_embed.normal_()
        for layer in moe_layers(net):
            layer.router.weight.normal_()
    return collect_routing(net, pictures, progress=False)


@pytest.fixture(scope="module")
def atlas(trace, pictures):
    maps = {
        layer.layer: class_expert_map(trace, layer.layer, num_permutations=50)
        for layer in trace.layers
    }
    return build_atlas(trace, pictures, maps)


def test_it_says_what_it_is_about(atlas, trace):
    assert atlas["schema"] == SCHEMA == "moevision.atlas/1"
    assert atlas["n_images"] == 48
    assert atlas["class_names"] == list(SyntheticPets.classes)
    assert [layer["layer"] for layer in atlas["layers"]] == [layer.layer for layer in trace.layers]


def test_loads_are_counts_of_kept_choices_and_patches_are_routed_to_their_expert(atlas, trace):
    for found, layer in zip(atlas["layers"], trace.layers, strict=True):
        assert (
            found["loads"]
            == np.bincount(layer.expert_index[layer.kept], minlength=layer.num_experts).tolist()
        )
        for entry in found["experts"]:
            for name, image, patch, weight in entry["top"] + entry["random"]:
                assert trace.picture_names[image] == name
                choices = layer.expert_index[image, patch].tolist()
                assert entry["expert"] in choices
                place = choices.index(entry["expert"])
                assert weight == pytest.approx(
                    float(layer.combine_weight[image, patch, place]), abs=6e-5
                )


def test_classes_are_the_rows_of_the_map(atlas):
    for layer in atlas["layers"]:
        for entry in layer["experts"]:
            assert [row["above"] for row in entry["classes"]] == sorted(
                (excess[entry["expert"]] for excess in layer["map"]["excess"]), reverse=True
            )[:5]
            for row in entry["classes"]:
                place = atlas["class_names"].index(row["class"])
                assert row["share"] == layer["map"]["share"][place][entry["expert"]]
                assert row["significant"] == layer["map"]["significant"][place][entry["expert"]]


def test_parts_are_shares_of_area(atlas, trace, pictures):
    """For each part: pixels that went to the expert, over all pixels of it, counted pixel by pixel."""
    layer, side = trace.layers[0], 32 // trace.grid[0]
    area = np.zeros((len(SyntheticPets.parts), layer.num_experts))
    for image in range(len(trace)):
        mask = pictures.part_mask(image)
        for row, column in np.ndindex(32, 32):
            patch = row // side * trace.grid[1] + column // side
            area[mask[row, column], layer.expert_index[image, patch]] += 1
    overall = area.sum(0) / area.sum()
    for entry in atlas["layers"][0]["experts"]:
        for row in entry["parts"]:
            part = area[SyntheticPets.parts.index(row["part"])]
            share = part[entry["expert"]] / part.sum()
            assert row["share"] == pytest.approx(share, abs=1e-4)
            assert row["above"] == pytest.approx(share - overall[entry["expert"]], abs=1e-4)
        assert [row["above"] for row in entry["parts"]] == sorted(
            (r["above"] for r in entry["parts"]), reverse=True
        )
        assert {type(row["significant"]) for row in entry["parts"]} == {bool}


def row(name, share, above, significant):
    return {"part": name, "class": name, "share": share, "above": above, "significant": significant}


def test_a_name_is_what_stands_out_most_with_its_counts():
    parts = [
        row("nose", 0.6, 0.46, False),
        row("whisker", 0.45, 0.31, True),
        row("ear", 0.1, -0.04, True),
    ]
    classes = [row("cat", 0.38, 0.25, True), row("dog", 0.2, 0.07, True)]
    whisker = {"kind": "part", "name": "whisker", "share": 0.45, "overall": 0.14}
    assert counted_name({"parts": parts, "classes": classes}) == whisker
    cat = {"kind": "class", "name": "cat", "share": 0.38, "overall": 0.13}
    assert counted_name({"parts": None, "classes": classes}) == cat  # photos have no part labels
    assert counted_name({"parts": parts[2:], "classes": [row("cat", 0.38, 0.25, False)]}) is None


def test_the_effect_of_taking_an_expert_away_is_kept(trace, pictures):
    maps = {
        layer.layer: class_expert_map(trace, layer.layer, num_permutations=5)
        for layer in trace.layers
    }
    told = {
        "delta_logit": -0.5,
        "control_delta_logit": -0.1,
        "strongest_class": "cat",
        "strongest_delta_logit": -1.25,
    }
    effects = {
        "pictures_per_class": 7,
        "experts": [{"layer": 3, "expert": 2, "name": "L3·E2", **told}],
    }
    made = build_atlas(trace, pictures, maps, effects=effects)
    found = [expert.get("without") for layer in made["layers"] for expert in layer["experts"]]
    assert found == [*[None] * 6, {"images_per_class": 7, **told}, None]  # two layers of four


def test_the_file_is_small_and_comes_back(atlas, tmp_path):
    save_atlas(atlas, tmp_path / "atlas.json")
    assert load_atlas(tmp_path / "atlas.json") == atlas
    assert (tmp_path / "atlas.json").stat().st_size < 300_000


def test_a_class_without_pictures_is_null(trace, pictures):
    some = trace.select(trace.labels != 3)
    maps = {
        layer.layer: class_expert_map(some, layer.layer, num_permutations=50)
        for layer in some.layers
    }
    built = build_atlas(some, None, maps)
    assert built["layers"][0]["map"]["share"][3] == [None] * some.layers[0].num_experts
    assert built["layers"][0]["experts"][0]["parts"] is None
    for entry in built["layers"][0]["experts"]:
        assert SyntheticPets.classes[3] not in [row["class"] for row in entry["classes"]]
    two = trace.select(trace.labels < 2)
    maps = {
        layer.layer: class_expert_map(two, layer.layer, num_permutations=50) for layer in two.layers
    }
    for entry in build_atlas(two, None, maps)["layers"][0]["experts"]:
        assert {row["class"] for row in entry["classes"]} == set(SyntheticPets.classes[:2])
    json.dumps(built, allow_nan=False)


def test_files_that_are_no_atlas(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_atlas(tmp_path / "bad.json")
    (tmp_path / "old.json").write_text('{"schema": "moevision.atlas/0"}')
    with pytest.raises(UserError, match=r"moevision\.atlas/0"):
        load_atlas(tmp_path / "old.json")


class NoMasks(View):
    """Images that name parts and have no mask."""

    def part_mask(self, index):
        return None


def test_parts_need_masks(pictures):
    odd = NoMasks(pictures, range(3), pictures.class_names, range(8), "odd")
    with pytest.raises(UserError, match="has no mask"):
        fractions_of_parts(odd, (4, 4))
