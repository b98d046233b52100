"""`route_image`: the view says what the model computed, and nothing else."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from moevision.analysis.intervention import Intervention
from moevision.demo import route_image
from moevision.demo.facts import LayerFacts, describe, model_input
from moevision.demo.view import LayerView, Settings
from moevision.errors import UserError
from moevision.models.io import SavedModel, save_model
from tests.demo.conftest import forward
from tests.shared import says


@pytest.fixture(scope="module")
def model(make):
    return make()


def layer_view(probs, expert_index=((0,),), kept=((True,),)):
    index = np.array(expert_index)
    facts = LayerFacts(1, "vmoe_top_k", "token_choice", True, len(probs[0]), index.shape[1])
    return LayerView(
        facts, index, np.ones(index.shape, np.float32), np.array(kept), np.array(probs, np.float32)
    )


def test_the_view_is_what_the_model_computed(model, pixels):
    view = route_image(model, pixels).to_json()
    logits, routings = forward(model, pixels)
    assert [layer["layer"] for layer in view["layers"]] == [1, 3]
    for layer, routing in zip(view["layers"], routings, strict=True):
        assert layer["experts"] == routing.expert_index[0].tolist()
        assert layer["slowest"] == pytest.approx(max(layer["counts"]) / (16 * 2 / 4), abs=5.1e-5)
        # torch.special.entr is in nats
        entropy = torch.special.entr(routing.probs[0]).sum(-1) / math.log(2)
        assert layer["entropy"] == pytest.approx(entropy.numpy(), abs=5.1e-5)
        best = routing.probs[0].sort(-1, descending=True).values
        assert layer["margin"] == pytest.approx((best[:, 0] - best[:, 1]).numpy(), abs=5.1e-5)
        assert layer["kept"] == [[True, True]] * 16
    top = logits.softmax(-1)[0].topk(8)  # all of them; ten of more
    names, shares = zip(*(one.values() for one in view["prediction"]["moe"]), strict=True)
    assert list(names) == [model.class_names[i] for i in top.indices]
    assert shares == pytest.approx(top.values.tolist(), abs=5.1e-5)
    assert view["prediction"]["dense"] is None
    off = {"top_k": 2, "capacity": None, "intervention": None, "noise": None, "away": []}
    off |= {"off_distribution": False, "off_reason": None}
    assert view["settings"] == off


def test_a_layer_that_the_classifier_does_not_read_is_called_so():
    """Behind a class token, what the last block computes for patches reaches no logit."""
    net = timm.create_model(
        "test_vit_moe", class_token=True, global_pool="token", num_classes=2
    ).eval()
    saved = SavedModel(net, ["a", "b"], 32, (0.5,) * 3, (0.5,) * 3)
    first, last = [router["words"] for router in describe(saved).to_json()["routers"]]
    assert "not read" not in first
    assert says(last, "top-2", "not read")


def test_margin_and_entropy_by_hand():
    layer = layer_view(
        [[0.5, 0.25, 0.125, 0.125], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]],
        [[0], [0], [3]],
        [[True]] * 3,
    )
    assert layer.margin.tolist() == [0.25, 1, 0]
    assert layer.entropy_bits.tolist() == [1.75, 0, 2]
    assert layer.counts.tolist() == [2, 0, 0, 1]
    assert layer_view([[1.0]]).margin.tolist() == [1]  # one expert alone


def test_a_dropped_choice_is_requested_but_not_counted():
    layer = layer_view([[0.5, 0.5], [0.5, 0.5]], [[0, 1], [1, 0]], [[True, False], [True, True]])
    assert layer.requested.tolist() == [2, 2]
    assert layer.counts.tolist() == [2, 1]
    assert layer.to_json()["slowest"] == pytest.approx(2 / 1.5, abs=1e-4)


def test_prefix_tokens_are_left_out(make, pixels):
    model = make(class_token=True, global_pool="token")
    view = route_image(model, pixels)
    _, routings = forward(model, pixels)
    assert routings[0].num_prefix_tokens == 1
    for layer, routing in zip(view.layers, routings, strict=True):
        assert layer.expert_index.tolist() == routing.expert_index[0, 1:].tolist()
        assert layer.requested.sum() == 16 * 2


def test_the_schema_is_complete_and_plain_json(model, pixels):
    assert "<iframe" in route_image(model, pixels)._repr_html_()  # in a notebook
    view = route_image(model, pixels).to_json()
    assert json.loads(json.dumps(view, allow_nan=False)) == view
    assert view["schema"] == "moevision.view/2"
    assert set(view) == {
        *("schema", "model", "picture", "layers", "prediction", "settings", "lens", "shares")
    }
    facts = {
        "id",
        "title",
        "image_size",
        "grid",
        "num_experts",
        "top_k",
        "max_top_k",
        "layers",
        "class_names",
    }
    assert set(view["model"]) == facts | {
        "routers",
        "variant",
        "accuracy_text",
        "data_text",
        "parameters",
    }
    assert set(view["picture"]) == {"id", "name", "label", "src", "unlike", "credit"}
    numbers = {
        "experts",
        "weights",
        "kept",
        "probs",
        "margin",
        "entropy",
        "counts",
        "requested",
        "slowest",
    }
    numbers |= {"computation", "steps", "expert_parameters", "noise"}
    routing = {
        "layer",
        "name",
        "words",
        "router",
        "kind",
        "learned",
        "num_experts",
        "top_k",
        "num_shared_experts",
    }
    limits = {"capacity", "train_capacity", "slots", "reads", "read_by_classifier", "route_by"}
    assert all(set(layer) == numbers | routing | limits for layer in view["layers"])
    assert view["model"]["grid"] == [4, 4]


def test_the_picture_in_the_view_is_what_the_model_saw(model, pixels):
    from moevision.demo.wire import open_data_uri

    large = np.repeat(np.repeat(pixels, 3, 0), 3, 1)
    view = route_image(model, np.pad(large, ((0, 0), (10, 10), (0, 0)))).to_json()
    seen = np.asarray(open_data_uri(view["picture"]["src"]))
    assert seen.shape == (32, 32, 3)
    assert route_image(model, seen).to_json()["layers"] == view["layers"]
    assert np.array_equal(
        np.asarray(open_data_uri(route_image(model, pixels).to_json()["picture"]["src"])), pixels
    )


def test_every_kind_of_picture_gives_the_same_view(model, pixels, tmp_path):
    file = tmp_path / "bear.png"
    Image.fromarray(pixels).save(file)
    views = [
        route_image(model, source).to_json()
        for source in (pixels, Image.fromarray(pixels), file, str(file))
    ]
    assert all(view["layers"] == views[0]["layers"] for view in views)
    # Without the folders that lead to it: a view is made to be shown to others.
    assert [view["picture"]["name"] for view in views] == [
        "one image",
        "one image",
        "bear.png",
        "bear.png",
    ]


def odd_images():
    """Files that a bare conversion to RGB gets wrong: on its side, with hidden colours, with 16 bits."""
    half = np.zeros((48, 64, 3), np.uint8)
    half[:, :32] = 250
    exif = Image.Exif()
    exif[0x0112] = 6
    hidden = np.dstack([half, np.zeros((48, 64), np.uint8)])
    yield "side.jpg", Image.fromarray(half), {"exif": exif}
    yield "hidden.png", Image.fromarray(hidden), {}
    yield "deep.png", Image.fromarray(np.full((48, 64), 30_000, np.uint16)), {}


def test_an_open_image_is_seen_as_its_file_is(tmp_path):
    for name, image, options in odd_images():
        image.save(tmp_path / name, **options)
        assert np.array_equal(
            model_input(Image.open(tmp_path / name), 32), model_input(tmp_path / name, 32)
        ), name
    with pytest.raises(UserError, match="pixel format F"):
        model_input(Image.new("F", (32, 32)), 32)


def test_a_panorama_is_refused_with_the_size_of_its_file(tmp_path):
    Image.new("RGB", (4800, 160)).save(tmp_path / "pano.jpg")
    with pytest.raises(UserError, match="it has 4800 × 160 px"):
        model_input(tmp_path / "pano.jpg", 32)


def test_a_model_by_its_folder(model, pixels, tmp_path):
    save_model(model, tmp_path / "run" / "model")
    view = route_image(str(tmp_path / "run"), pixels)
    assert view.model.title == "run"
    assert view.to_json()["layers"] == route_image(model, pixels).to_json()["layers"]


@pytest.mark.parametrize("expert", range(4))
def test_an_ablated_expert_computes_nothing(model, pixels, expert):
    settings = Settings(intervention=Intervention("ablate", layer=3, expert=expert))
    view = route_image(model, pixels, settings=settings).to_json()
    before, after = route_image(model, pixels).to_json()["layers"], view["layers"]
    assert after[0] == before[0]  # a layer above the change doesn't notice it
    assert after[1]["counts"][expert] == 0
    assert after[1]["probs"] == before[1]["probs"]
    assert view["settings"]["off_distribution"]
    given = {"kind": "ablate", "layer": 3, "expert": expert, "fill": "next_best", "seed": 0}
    assert view["settings"]["intervention"] == given
    assert route_image(model, pixels).to_json()["layers"] == before  # and the model is as it was


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_another_top_k(model, pixels, top_k):
    view = route_image(model, pixels, settings=Settings(top_k=top_k)).to_json()
    assert all(len(choices) == top_k for layer in view["layers"] for choices in layer["experts"])
    assert view["model"]["top_k"] == 2
    assert view["settings"]["top_k"] == top_k
    assert view["settings"]["off_distribution"]


def test_capacity_limits_every_expert(model, pixels):
    view = route_image(model, pixels, settings=Settings(capacity=0.75)).to_json()
    for layer in view["layers"]:
        assert max(layer["counts"]) <= math.ceil(0.75 * 16 * 2 / 4)
        dropped = sum(not kept for choices in layer["kept"] for kept in choices)
        assert dropped == sum(layer["requested"]) - sum(layer["counts"]) > 0
    assert view["settings"]["capacity"] == 0.75


def test_the_dense_twin_stands_beside(make, model, pixels):
    twin = make(2, twin="active_flops")
    view = route_image(model, pixels, dense=twin).to_json()
    p, index = forward(twin, pixels)[0].softmax(-1)[0].max(0)
    best = {"class": twin.class_names[index], "p": pytest.approx(float(p), abs=5.1e-5)}
    assert view["prediction"]["dense"][0] == best


def test_what_can_not_be_routed(make, model, pixels, tmp_path):
    with pytest.raises(UserError, match=r"no MoE layer.*moevision upcycle.*--with-twin"):
        route_image(make(0, twin="active_flops"), pixels)
    for bad in (pixels[..., 0], pixels.astype(float), pixels[:0]):
        with pytest.raises(UserError, match=r"uint8 \[H, W, 3\]"):
            route_image(model, bad)
    with pytest.raises(UserError, match="no such file"):
        route_image(model, tmp_path / "none.png")
    with pytest.raises(UserError, match="no run or model"):
        route_image(str(tmp_path / "nowhere"), pixels)
    dropping = make(patch_drop_rate=0.5)
    dropping.net.train()
    with pytest.raises(UserError, match="patch dropping"):
        describe(SavedModel(dropping.net, *list(vars(dropping).values())[1:]))


def test_an_answer_that_is_no_number_is_a_sentence(make, pixels):
    """A page would show a share of 0 % for it."""
    model = make()
    with torch.no_grad():
        model.net.get_classifier().weight.fill_(3e38)  # finite; its sums aren't
    with pytest.raises(UserError, match="is no number"):
        route_image(model, pixels)
