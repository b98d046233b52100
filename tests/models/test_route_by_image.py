"""Models routed by image: built, saved, twinned, operated on, traced, changed and shown as those by token are."""

import json

import numpy as np
import pytest
import timm
import torch

from moevision import UserError, convert_to_moe, forward_routing
from moevision.analysis import RoutingTrace, collect_routing, open_pictures
from moevision.analysis.intervention import Intervention, intervene
from moevision.analysis.readings import measure_baselines
from moevision.data import SyntheticPets
from moevision.demo import route_image
from moevision.demo.facts import describe
from moevision.layers import describe_moe, moe_layers
from moevision.models.io import SavedModel, load_model, save_model
from tests.scopes import ablate, force, limit_capacity, random_route, swap, use_top_k
from tests.shared import SMALL_VIT, noise_images

TINY = {**SMALL_VIT, "num_classes": 8}
STATS = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
COUNT = 12


@torch.no_grad()
def with_character(net):
    """Routers and experts that all differ, so that images differ in their experts."""
    torch.manual_seed(1)
    for layer in moe_layers(net):
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=3.0 if name.startswith("router") else 0.3)
    return net.eval()


def model(**options):
    """A ViT with a class token, E = 4, k = 2 in blocks 1 and 3, routed by image."""
    torch.manual_seed(0)
    given = {"num_experts": 4, "top_k": 2, "router": "vmoe_top_k", "route_by": "image", **options}
    return with_character(
        convert_to_moe(timm.create_model("vit_tiny_patch16_224", **TINY), "every2", **given)
    )


def saved(net=None):
    return SavedModel(net or model(), list(SyntheticPets.classes), 32, *STATS)


@torch.no_grad()
def routes(net):
    return [
        routing.expert_index[:, 0].tolist()
        for routing in forward_routing(net, noise_images(COUNT, seed=4))[1]
    ]


def is_by_image(net):
    return {layer.router.options.route_by for layer in moe_layers(net)} == {"image"}


def test_every_token_of_an_image_has_its_experts_and_images_differ():
    for routing in forward_routing(model(), noise_images(COUNT, seed=4))[1]:
        assert routing.expert_index.shape == (COUNT, 17, 2)
        assert (routing.grid, routing.num_prefix_tokens) == ((4, 4), 1)
        assert torch.equal(routing.expert_index, routing.expert_index[:, :1].expand(-1, 17, -1))
        assert len(routing.expert_index[:, 0].unique(dim=0)) > 2


def test_it_is_saved_and_an_older_file_without_the_word_is_by_token(tmp_path):
    net = model()
    assert net.moe_config["route_by"] == "image"
    save_model(saved(net), tmp_path)
    again = load_model(str(tmp_path)).net
    assert is_by_image(again)
    assert torch.equal(again(noise_images(COUNT, seed=4)), net(noise_images(COUNT, seed=4)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"].pop("route_by") == "image"
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = load_model(str(tmp_path)).net
    assert [
        routing.route_by for routing in forward_routing(older, noise_images(COUNT, seed=4))[1]
    ] == ["token"] * 2
    assert not torch.equal(older(noise_images(COUNT, seed=4)), net(noise_images(COUNT, seed=4)))


def test_words():
    layers = moe_layers(model())
    assert describe_moe(layers) == "4 experts, 2 per image by vmoe_top_k, in blocks 1, 3"
    assert describe_moe([layers[0], *moe_layers(model(route_by=None))]).startswith(
        "4 experts, 2 per image, token and"
    )
    facts = describe(saved())
    assert [router.summary for router in facts.routers] == [
        "top-2 of 4 experts, chosen once for the whole image"
    ] * 2
    assert [router.route_by for router in facts.routers] == ["image"] * 2
    assert list(facts.routers[0].refused) == ["capacity"]


# ---- traces


@pytest.fixture(scope="module")
def pictures():
    return open_pictures(SyntheticPets(24, 32, 0, "test"), 32)


def test_a_trace_says_that_images_were_routed(pictures, tmp_path):
    net = saved(model(num_shared_experts=1))
    trace = collect_routing(net, pictures, progress=False, path=tmp_path / "trace")
    for each in (trace, RoutingTrace.load(tmp_path / "trace"), trace.select([3, 4])):
        assert [layer.route_by for layer in each.layers] == ["image"] * 2
    for layer in trace.layers:
        index = np.asarray(layer.expert_index)
        assert (index == index[:, :1]).all()
        assert (layer.counts() % 16 == 0).all()  # 16 patches go together
    by_token = collect_routing(saved(model(route_by=None)), pictures, progress=False)
    assert "route_by" not in by_token.metadata()
    assert [layer.route_by for layer in by_token.layers] == ["token"] * 2


def test_clusters_of_the_same_input_are_clusters_of_images(pictures):
    net = saved()
    trace = collect_routing(net, pictures, progress=False)
    found = measure_baselines(net, pictures, trace, seeds=2)
    for assignment in (*found["kmeans_input"], *found["untrained"]):
        assert (assignment.expert_index == assignment.expert_index[:, :1]).all()
    assert len(np.unique(found["kmeans_input"][0].expert_index[..., 0])) > 1


# ---- interventions


def changed(net, *scopes):
    with torch.no_grad(), intervene(net, *scopes):
        return forward_routing(net, noise_images(COUNT, seed=4))


def test_interventions_move_whole_images():
    net = model()
    (_, before), (_, after) = (
        forward_routing(net, noise_images(COUNT, seed=4)),
        changed(net, Intervention("ablate", layer=1, expert=0)),
    )
    had = (before[0].expert_index[:, 0] == 0).any(-1)
    assert 0 < had.sum() < COUNT
    assert not (after[0].expert_index == 0).any()
    assert torch.equal(after[0].expert_index[~had], before[0].expert_index[~had])
    for scope in (
        force(net, 1, 2),
        swap(net, 1, 0, 1),
        use_top_k(net, 3),
        ablate(net, 3, 1),
        random_route(net, 1, 5),
    ):
        with scope:
            for routing in forward_routing(net, noise_images(COUNT, seed=4))[1]:
                assert torch.equal(
                    routing.expert_index,
                    routing.expert_index[:, :1].expand_as(routing.expert_index),
                )


def test_a_capacity_of_one_image_is_refused():
    net = model()
    with (
        pytest.raises(UserError, match="meaning in L1"),
        limit_capacity(net, 1.0),
    ):
        pass


@pytest.mark.parametrize("priority", [False, True])
def test_a_capacity_of_the_batch_counts_images_under_interventions_too(priority):
    """Two exchanges change nothing: the decision is then found again by the intervention's own code."""
    net = model(top_k=1, eval_capacity_factor=0.8, capacity_group="batch", batch_priority=priority)
    out, routings = forward_routing(net, noise_images(COUNT, seed=4))
    assert sum(int((~routing.kept).sum()) for routing in routings) > 0
    twice = [Intervention("swap", layer=layer, expert=0, other=1) for layer in (1, 3)] * 2
    again, others = changed(net, *twice)
    assert torch.equal(out, again)
    for routing, other in zip(routings, others, strict=True):
        assert torch.equal(routing.kept, other.kept)
        assert torch.equal(routing.kept, routing.kept[:, :1].expand_as(routing.kept))


# ---- the explorer


def test_the_explorer_says_it_once_per_layer():
    view = route_image(saved(), np.asarray(SyntheticPets(1, 32, 0, "test").image(0))).to_json()
    for layer in view["layers"]:
        assert layer["route_by"] == "image"
        assert layer["words"] == "top-2 of 4 experts, chosen once for the whole image"
        assert len(layer["experts"]) == 16
        assert all(experts == layer["experts"][0] for experts in layer["experts"])
        assert sorted(layer["counts"]) == [0, 0, 16, 16]
