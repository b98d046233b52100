"""`collect_routing` and its file: what is recorded, against the model itself, NumPy, SciPy and safetensors."""

import csv
import json
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
import scipy.stats
import timm
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset

from moevision import convert_to_moe, forward_routing
from moevision.analysis import LayerTrace, RoutingTrace, Table, collect_routing, open_pictures
from moevision.analysis.collect import layer_inputs, network_input
from moevision.analysis.describe import (
    class_expert_map,
    image_shares,
    layer_gallery,
    part_expert_table,
    random_patches,
    top_patches,
)
from moevision.analysis.information import choice_counts
from moevision.analysis.trace import LAYER_ARRAYS, SCHEMA
from moevision.commands.predict import predict_batch
from moevision.data import BadImageError, SyntheticPets
from moevision.data.transforms import normalize
from moevision.errors import DataWarning, UserError
from moevision.layers import ROUTERS, moe_layers
from moevision.models.io import SavedModel, load_model
from tests.analysis.models import MEAN, STD, saved, small_net, with_random_routers

PETS = SyntheticPets(24, 32, 0, "test")
ARRAYS = LAYER_ARRAYS


def with_class_and_register_tokens():
    """timm's ViT with a class token and two registers in front of 8 x 8 patches."""
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=8, reg_tokens=2
    )
    return with_random_routers(convert_to_moe(vit, [0, 2], 5, 3, "vmoe_top_k"))


class Broken(Dataset):
    """Drawn pets, of which some can't be read."""

    classes = SyntheticPets.classes

    def __init__(self, bad, pets=PETS):
        self.bad, self.pets = bad, pets
        self.targets = [pets.label(index) for index in range(len(pets))]

    def __len__(self):
        return len(self.pets)

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImageError(f"{index:06d}", "it is torn")
        return self.pets[index]


def arrays_equal(one, other):
    assert one.arrays().keys() == other.arrays().keys()
    for name, array in one.arrays().items():
        assert array.dtype == other.arrays()[name].dtype
        assert np.array_equal(array, other.arrays()[name]), name
    for name in ("picture_names", "class_names", "prediction_names", "grid", "model", "data"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize(
    ("make", "grid", "prefix", "blocks"),
    [
        (small_net, (4, 4), 0, [1, 3]),
        (partial(small_net, eval_capacity_factor=0.5), (4, 4), 0, [1, 3]),  # half is dropped
        (with_class_and_register_tokens, (8, 8), 3, [0, 2]),
    ],
)
def test_a_trace_is_what_the_model_decided(make, grid, prefix, blocks):
    net = make()
    trace = collect_routing(saved(net), PETS, batch_size=10)
    assert (trace.grid, [layer.layer for layer in trace.layers]) == (grid, blocks)
    for start in range(0, 24, 10):
        part = slice(start, min(start + 10, 24))
        pixels = np.stack([PETS.image(index).transpose(2, 0, 1) for index in range(24)[part]])
        with torch.inference_mode():
            output, routings = forward_routing(
                net, normalize(torch.from_numpy(np.ascontiguousarray(pixels)), MEAN, STD)
            )
        assert np.array_equal(trace.probabilities[part], output.softmax(-1))
        assert np.array_equal(trace.predictions[part], output.argmax(-1))
        for layer, routing in zip(trace.layers, routings, strict=True):
            patches = routing.logits.shape[1] - prefix
            assert patches == grid[0] * grid[1]
            assert np.array_equal(layer.expert_index[part], routing.expert_index[:, prefix:])
            assert np.array_equal(layer.combine_weight[part], routing.combine_weight[:, prefix:])
            assert np.array_equal(layer.kept[part], routing.kept[:, prefix:])
            if not prefix:
                assert np.array_equal(layer.counts()[part].sum(0), routing.counts())
            exact = torch.softmax(routing.logits[:, prefix:].double(), -1).numpy()
            assert np.abs(layer.probs[part] / exact - 1)[exact > 6.2e-5].max() < 2**-11 + 1e-6
            ranked = np.sort(exact, -1)
            assert layer.margin[part] == pytest.approx(ranked[..., -1] - ranked[..., -2], abs=1e-6)
            assert layer.entropy_bits[part] == pytest.approx(
                scipy.stats.entropy(exact, base=2, axis=-1), abs=1e-5
            )
            assert np.array_equal(layer.expert_index[part][..., 0], exact.argmax(-1))
    assert trace.labels.tolist() == [index % 8 for index in range(24)]
    assert trace.accuracy == np.mean(trace.predictions == np.arange(24) % 8)
    assert (
        len({tuple(row) for layer in trace.layers for row in layer.expert_index[..., 0]}) > 2
    )  # not all alike


def test_types_and_names():
    trace = collect_routing(saved(small_net()), PETS)
    layer = trace.layer(3)
    types = {name: getattr(layer, name).dtype.name for name in ARRAYS}
    assert list(types.values()) == ["int16", "bool", "float32", "float16", "float32", "float32"]
    assert (layer.name, layer.num_experts, layer.top_k) == ("L3", 4, 2)
    assert (trace.labels.dtype, trace.predictions.dtype, trace.probabilities.dtype) == (
        np.int64,
        np.int64,
        np.float32,
    )
    assert trace.picture_names[:2] == ("test/000000", "test/000001")
    assert trace.model == "test_vit_moe"
    assert trace.data.startswith("synthetic_pets,")
    assert trace.class_names == trace.prediction_names == SyntheticPets.classes


def test_predictions_are_those_of_predict(tiny_run, drawn_pets):
    trace = collect_routing(str(tiny_run), drawn_pets, split="all", batch_size=64)
    assert trace.model == tiny_run.name
    model = replace(
        load_model(str(tiny_run)), temperature=None
    )  # a trace has probabilities as they come
    rows = predict_batch(model, [drawn_pets / name for name in trace.picture_names])
    assert len(rows) == len(trace) == 40
    for index, row in enumerate(rows):
        assert row.classes[0] == trace.class_names[trace.predictions[index]]
        assert row.probabilities[0] == float(trace.probabilities[index].max())
        assert trace.class_names[trace.labels[index]] == trace.picture_names[index].split("/")[0]


def test_of_a_runs_own_images_those_are_taken_that_it_held_out(tiny_run, tmp_path):
    """Not those that a cut of their own would hold out: the run was trained on some of them."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    pets = yaml.safe_load((run / "config.yaml").read_text())["data"]["path"]
    with (run / "splits.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["split"] = {"train": "val", "val": "test", "test": "train"}[row["split"]]
    held_out = {row["path"] for row in rows if row["split"] == "test"}
    with (run / "splits.csv").open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert len(held_out) > 2
    assert set(collect_routing(run, pets, progress=False).picture_names) == held_out
    assert set(collect_routing(run / "model", pets, progress=False).picture_names) == held_out
    assert (
        set(collect_routing(load_model(str(run)), pets, progress=False).picture_names) != held_out
    )


@pytest.mark.parametrize("at_once", [False, True])
def test_the_file(tmp_path, at_once):
    trace = collect_routing(saved(small_net()), PETS, batch_size=10)
    file = tmp_path / "new" / "trace.safetensors"
    if at_once:
        arrays_equal(collect_routing(saved(small_net()), PETS, batch_size=10, path=file), trace)
    else:
        trace.save(file)
    loaded = RoutingTrace.load(file)
    arrays_equal(loaded, trace)
    assert {**loaded.provenance, "created_utc": ""} == {**trace.provenance, "created_utc": ""}
    tensors = safetensors.numpy.load_file(file)
    assert tensors.keys() == trace.arrays().keys()
    for name, array in trace.arrays().items():
        assert np.array_equal(tensors[name], array)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata()["schema"] == SCHEMA == "moevision.trace/1"
        assert json.loads(opened.metadata()["picture_names"]) == list(trace.picture_names)
    assert os.listdir(file.parent) == [file.name]


def test_a_part_of_a_trace(tmp_path):
    trace = collect_routing(saved(small_net()), PETS)
    mask = trace.labels == 3
    for chosen in ([3, 11, 19], mask, slice(3, None, 8), np.array([3, 11, -5])):
        part = trace.select(chosen)
        assert part.picture_names == ("test/000003", "test/000011", "test/000019")
        for name, array in part.arrays().items():
            assert np.array_equal(array, trace.arrays()[name][mask])
    part.save(tmp_path / "part")
    arrays_equal(RoutingTrace.load(tmp_path / "part"), part)
    empty = trace.select([])
    empty.save(tmp_path / "empty")
    assert len(RoutingTrace.load(tmp_path / "empty")) == 0
    assert empty.accuracy is None
    assert empty.layers[0].counts().shape == (0, 4)


def test_names_of_files_that_are_no_unicode(tmp_path):
    trace = collect_routing(saved(small_net()), PETS, limit=2)
    trace = replace(trace, picture_names=("Käfer/\udcff.png", "雪/1.png"))
    trace.save(tmp_path / "trace")
    assert RoutingTrace.load(tmp_path / "trace").picture_names == trace.picture_names


@pytest.mark.parametrize("bad", [{0, 1, 2, 3, 4, 5, 6, 7}, {3, 9, 23}, set(range(1, 24))])
@pytest.mark.parametrize("with_file", [False, True])
def test_pictures_that_can_not_be_read_are_left_out(tmp_path, bad, with_file):
    net = small_net()
    good = [index for index in range(24) if index not in bad]
    path = tmp_path / "trace" if with_file else None
    first = min(bad)
    with pytest.warns(DataWarning, match=rf"{len(bad)} of 24 .* {first:06d}: it is torn"):
        trace = collect_routing(saved(net), Broken(bad), batch_size=4, path=path)
    whole = collect_routing(saved(net), Broken(set()), batch_size=4).select(good)
    assert trace.picture_names == whole.picture_names
    assert trace.provenance["unreadable"] == len(bad)
    for name, array in trace.arrays().items():
        # Other batch-mates: sums are rounded otherwise in the last bit.
        np.testing.assert_allclose(
            array.astype(float), whole.arrays()[name].astype(float), atol=2e-3, err_msg=name
        )
    assert trace.labels.tolist() == [index % 8 for index in good]
    if with_file:
        assert safetensors.numpy.load_file(path)["labels"].tolist() == trace.labels.tolist()
        assert os.listdir(tmp_path) == ["trace"]


def test_no_picture_can_be_read(tmp_path):
    with pytest.raises(UserError, match="None of the 24"):
        collect_routing(saved(small_net()), Broken(set(range(24))), path=tmp_path / "trace")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def trace_file(tmp_path):
    collect_routing(saved(small_net()), PETS, path=tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


@pytest.mark.parametrize("left", [0, 5, 100, 0.5, -1])
def test_a_file_that_was_cut_off(trace_file, left):
    data = trace_file.read_bytes()
    trace_file.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
    with pytest.raises(UserError, match=rf"{trace_file.name}.* is damaged"):
        RoutingTrace.load(trace_file)


def test_a_run_that_is_interrupted_leaves_the_old_file(trace_file):
    class Interrupted(Broken):
        def __getitem__(self, index):
            if index == 20:
                self.seen = os.listdir(trace_file.parent)
                raise KeyboardInterrupt
            return super().__getitem__(index)

    before = trace_file.read_bytes()
    data = Interrupted(set())
    with pytest.raises(KeyboardInterrupt):
        collect_routing(saved(small_net()), data, batch_size=4, path=trace_file)
    assert trace_file.read_bytes() == before
    assert os.listdir(trace_file.parent) == [trace_file.name]
    assert data.seen == [trace_file.name]  # so a killed process leaves nothing else either


def rewritten(file, **changes):
    """The same tensors with other metadata; None takes a key away."""
    with safetensors.safe_open(file, "np") as opened:
        metadata = {**opened.metadata(), **changes}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, metadata)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"schema": "moevision.trace/2"},
            "'moevision.trace/2'",
        ),
        ({"schema": None}, "is no routing trace"),
        ({"layers": "[1, 2]"}, "L2.expert_index"),
        ({"grid": "[4, 5]"}, "20 patches"),
        ({"picture_names": "[]"}, "0 images"),
        ({"grid": "4 x 4"}, "is damaged"),
        ({"class_names": None}, "class_names"),
    ],
)
def test_files_of_another_kind(trace_file, changes, words):
    rewritten(trace_file)
    arrays_equal(
        RoutingTrace.load(trace_file), collect_routing(saved(small_net()), PETS)
    )  # what the library wrote, too
    rewritten(trace_file, **changes)
    with pytest.raises(UserError) as caught:
        RoutingTrace.load(trace_file)
    assert words in str(caught.value)


def test_places_that_can_not_be(tmp_path):
    (tmp_path / "file").touch()
    trace = collect_routing(saved(small_net()), PETS, limit=8)
    for path in (tmp_path / "file" / "trace", tmp_path):
        with pytest.raises(UserError, match="can't be written"):
            trace.save(path)
        with pytest.raises(UserError, match="can't be written"):
            collect_routing(saved(small_net()), PETS, path=path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_bare_module():
    net = small_net().train()
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    trace = collect_routing(net, PETS)
    assert [module.training for module in net.modules()] == modes
    # timm's configuration of the model says how pixels are normalised: ImageNet's mean and deviation.
    imagenet = SavedModel(
        net.eval(), list(SyntheticPets.classes), 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    arrays_equal(trace, collect_routing(imagenet, PETS))
    other = collect_routing(small_net(num_classes=5), PETS)
    assert other.prediction_names == tuple(f"class {index}" for index in range(5))
    assert (other.class_names, other.accuracy) == (SyntheticPets.classes, None)
    headless = collect_routing(small_net(num_classes=0), PETS)
    assert headless.probabilities.shape == (24, 0)
    assert set(headless.predictions.tolist()) == {-1}
    told = {
        "crop_mode": "squash",
        "label_names": ["n01", "n02"],
        "label_descriptions": {"n01": "cat"},
    }
    net = small_net(num_classes=2)
    net.pretrained_cfg = {**net.pretrained_cfg, **told}
    wide = [(Image.effect_noise((64, 32), 90), 0)]
    trace = collect_routing(net, wide)
    assert trace.prediction_names == ("cat", "n02")
    arrays_equal(
        trace,
        collect_routing(replace(imagenet, net=net, class_names=["cat", "n02"], fit="squash"), wide),
    )


def test_one_expert():
    layer = collect_routing(saved(small_net(num_experts=1, top_k=1)), PETS).layer(1)
    assert np.array_equal(layer.margin, np.ones((24, 16)))
    assert np.array_equal(layer.entropy_bits, np.zeros((24, 16)))


def test_a_picture_set_and_a_subset():
    pictures = open_pictures("synthetic_pets", 32, limit=16)
    trace = collect_routing(saved(small_net()), pictures)
    arrays_equal(trace, collect_routing(saved(small_net()), "synthetic_pets", limit=16))
    assert np.bincount(trace.labels).tolist() == [2] * 8


def test_the_hash_follows_the_weights():
    one, same, other = small_net(), small_net(), small_net()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    hashes = [
        collect_routing(saved(net), PETS, limit=1).provenance["weights_sha256"]
        for net in (one, same, other)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_progress_bar_only_where_it_takes_long(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as rich sees it
    for options, seen in (
        ({"batch_size": 8}, False),
        ({"batch_size": 2}, True),
        ({"progress": False}, False),
    ):
        collect_routing(saved(small_net()), PETS, **{"batch_size": 2, **options})
        captured = capfd.readouterr()
        assert captured.out == ""
        assert ("routing" in captured.err) is seen


def test_layer_inputs_are_what_the_router_sees():
    model = saved(small_net())
    pets = SyntheticPets(3, 32, 0, "test")
    images = np.stack([pets.image(index) for index in range(3)])
    pixels = network_input(model, images)
    _, routings = forward_routing(model.net, pixels)
    received = layer_inputs(model.net, pixels)
    assert list(received) == [routing.layer for routing in routings]
    for layer, routing in zip(moe_layers(model.net), routings, strict=True):
        logits = received[routing.layer] @ layer.router.weight.detach().T
        torch.testing.assert_close(logits, routing.logits[:, routing.num_prefix_tokens :].detach())
        assert not layer._forward_pre_hooks  # nothing is left behind


def test_a_table_is_text_and_html():
    table = Table(["expert", "share"], [["E0", "9 %"], ["<b>", 16]])
    assert str(table) == "expert  share\nE0        9 %\n<b>        16"
    html = table._repr_html_()
    assert html.count("<tr>") == 3
    assert "&lt;b&gt;</td>" in html


# ---- every router: what an expert reads and a patch takes

# One image of 3 patches, 2 experts. Expert choice: both take patch 0, expert 1 takes patch 2, nobody takes patch 1.
TAKEN = LayerTrace(
    layer=1,
    expert_index=np.array([[[1, 0], [0, 1], [1, 0]]], np.int16),
    kept=np.array([[[True, True], [False, False], [True, False]]]),
    combine_weight=np.array([[[0.7, 0.3], [0.0, 0.0], [0.6, 0.0]]], np.float32),
    probs=np.full((1, 3, 2), 0.5, np.float16),
    margin=np.zeros((1, 3), np.float32),
    entropy_bits=np.ones((1, 3), np.float32),
    kind="expert_choice",
)
# Soft MoE: what patches take sums to 1 over experts; what experts read sums to 1 over patches (one slot each).
MIXED = replace(
    TAKEN,
    kept=np.ones((1, 3, 2), bool),
    combine_weight=np.array([[[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]], np.float32),
    kind="soft",
    read_weight=np.array(
        [[[0.5, 0.2], [0.7, 0.1], [0.4, 0.1]]], np.float32
    ),  # of the experts in the same order
)


def test_expert_choice_counts_what_was_taken():
    assert TAKEN.counts().tolist() == [[1, 2]]
    np.testing.assert_allclose(TAKEN.image_takes(), [[0.3, 1.3]], rtol=1e-6)
    first = np.where(TAKEN.kept[..., 0], TAKEN.expert_index[..., 0], -1)
    assert first.tolist() == [[1, -1, 1]]
    assert TAKEN.experts_per_patch == 1.0
    assert [len(gallery.random) for gallery in layer_gallery(TAKEN)] == [1, 2]
    fractions = np.array([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    table = part_expert_table(TAKEN.expert_index, fractions, 2, TAKEN.requested_share)
    np.testing.assert_allclose(table, [[1, 1.5], [0, 0.5]])


def test_soft_moe_reads_and_takes():
    np.testing.assert_allclose(MIXED.counts(), [[0.3 + 0.6 + 0.1, 0.7 + 0.4 + 0.9]], rtol=1e-6)
    np.testing.assert_allclose(MIXED.image_takes(), MIXED.counts())
    np.testing.assert_allclose(image_shares(MIXED.image_takes()), [[1 / 3, 2 / 3]], rtol=1e-6)
    assert MIXED.expert_index[..., 0].tolist() == [[1, 0, 1]]
    assert [patch.patch for patch in top_patches(MIXED, 1, count=1)] == [
        0
    ]  # read most, though patch 2 takes more


def test_random_patches_of_soft_moe_are_drawn_as_they_are_read():
    """3000 draws of one patch of expert 0: shares 0.2, 0.7, 0.1; standard deviation below 0.0084."""
    drawn = [random_patches(MIXED, 0, count=1, seed=seed)[0].patch for seed in range(3000)]
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=3) / 3000, [0.2, 0.7, 0.1], atol=4 * 0.0084
    )


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_trace_says_what_the_model_did(router, tmp_path):
    """Every router, with a class token; saved and loaded again."""
    model = saved(small_net(router, class_token=True, global_pool="token"))
    pictures = open_pictures(SyntheticPets(16, 32, 0, "test"), 32)
    trace = collect_routing(
        model, pictures, progress=False, path=tmp_path / "trace.safetensors", batch_size=5
    )
    images = np.stack([pictures.image(index) for index in range(16)])
    pixels = normalize(torch.from_numpy(images).permute(0, 3, 1, 2), MEAN, STD)
    again = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert [layer.kind for layer in again.layers] == [layer.kind for layer in trace.layers]
    with torch.inference_mode():
        _, routings = forward_routing(model.net, pixels)
    for layer, routing in zip(again.layers, routings, strict=True):
        weights = routing.expert_weights()[:, 1:]
        reads = choice_counts(layer.expert_index, 4, layer.dispatch_share).sum(0)  # [P, E]
        assert layer.kind == routing.kind
        if layer.kind == "token_choice":
            np.testing.assert_array_equal(
                layer.counts().sum(0), routing.expert_index[:, 1:].flatten().bincount(minlength=4)
            )
        else:
            np.testing.assert_allclose(layer.image_takes(), weights.sum(1), rtol=1e-5)
        if layer.kind == "expert_choice":
            by_token = torch.zeros(16, 4, 17).scatter(-1, routing.token_index, 1.0)[..., 1:]
            np.testing.assert_array_equal(layer.counts(), by_token.sum(-1))
            np.testing.assert_array_equal(reads, by_token.sum(0).T)
        if layer.kind == "soft":
            np.testing.assert_allclose(reads, routing.dispatch_weight[:, 1:].sum((0, 3)), rtol=1e-5)
    assert all((layer.expert_index >= 0).all() for layer in again.layers)
    assert sum(not layer.kept[..., 0].all() for layer in again.layers) <= 2 * (
        router == "expert_choice"
    )


def test_only_traces_of_other_kinds_say_so(make_trace):
    """Files of token choice are as they always were, and a file without kinds is one."""
    plain = make_trace(np.zeros((2, 4, 1)), labels=[0, 1], num_experts=2, grid=(2, 2))
    assert "kinds" not in plain.metadata()
    assert (
        RoutingTrace.from_arrays(plain.arrays(), plain.metadata()).layers[0].kind == "token_choice"
    )
    soft = replace(plain.layers[0], kind="soft", read_weight=np.ones((2, 4, 1), np.float32))
    other = replace(plain, layers=(soft,))
    assert json.loads(other.metadata()["kinds"]) == ["soft"]
    chosen = other.select([1])
    assert chosen.layers[0].kind == "soft"
    assert chosen.layers[0].read_weight.shape == (1, 4, 1)


def test_a_class_map_of_expert_choice_is_about_weights(make_trace):
    """Both experts take one patch of every image; class 1 gives expert 1 nine times the weight of expert 0."""
    labels = np.arange(40) % 2
    trace = make_trace(np.zeros((40, 2, 2)), labels=labels, num_experts=2, grid=(1, 2))
    heavy = np.where(labels == 1, 0.9, 0.1)
    layer = replace(
        trace.layers[0],
        kind="expert_choice",
        expert_index=np.broadcast_to(np.array([[1, 0], [0, 1]], np.int16), (40, 2, 2)),
        kept=np.broadcast_to(np.array([[True, False], [True, False]]), (40, 2, 2)),
        combine_weight=np.stack(
            [np.stack([heavy, 0 * heavy], -1), np.stack([1 - heavy, 0 * heavy], -1)], 1
        ),
    )
    assert (layer.counts() == 1).all()
    weighted = replace(trace, layers=(layer,))
    found = class_expert_map(weighted, 1, num_permutations=99)
    np.testing.assert_allclose(found.share, [[0.9, 0.1], [0.1, 0.9]])
    assert found.significant.all()
