"""Every router in a view: the numbers are the model's, the words are true of each layer, and what can't be is said."""

import json

import numpy as np
import pytest

from moevision.analysis.intervention import Intervention
from moevision.demo import requests as read
from moevision.demo import route_image
from moevision.demo.facts import describe
from moevision.demo.models import open_entries
from moevision.demo.requests import RequestError
from moevision.demo.service import Explorer
from moevision.demo.view import Settings
from moevision.errors import UserError
from moevision.layers import ROUTERS
from tests.demo.conftest import forward
from tests.demo.test_sentences import MIXED
from tests.shared import says


def routings_of(model, pixels):
    return forward(model, pixels)[1]


def weights_of(layer):
    """[patches, experts] the weight of every expert, from the JSON of a layer."""
    weights = np.zeros((len(layer["experts"]), layer["num_experts"]))
    for patch, choices in enumerate(
        zip(layer["experts"], layer["weights"], layer["kept"], strict=True)
    ):
        for expert, weight, kept in zip(*choices, strict=True):
            weights[patch, expert] = weight * kept
    return weights


@pytest.mark.parametrize("router", [*ROUTERS, "mixed"])
def test_a_view_of_every_router_has_the_weights_and_loads_of_the_model(make, pixels, router):
    model = make(**(MIXED if router == "mixed" else {"router": router}))
    view = route_image(model, pixels).to_json()
    assert json.loads(json.dumps(view, allow_nan=False)) == view
    routings, names = (
        routings_of(model, pixels),
        MIXED["router"] if router == "mixed" else [router] * 2,
    )
    for layer, routing, name in zip(view["layers"], routings, names, strict=True):
        assert (layer["router"], layer["kind"], layer["num_experts"]) == (
            name,
            routing.kind,
            routing.num_experts,
        )
        assert weights_of(layer) == pytest.approx(routing.expert_weights()[0].numpy(), abs=5.1e-5)
        assert layer["counts"] == routing.counts().tolist()
        assert layer["requested"] == routing.requested_counts().tolist()
        assert np.array(layer["probs"]) == pytest.approx(routing.probs[0].numpy(), abs=5.1e-5)
        for weights in layer["weights"]:
            assert weights == sorted(weights, reverse=True)
    assert view["settings"]["off_distribution"] is False


def test_layers_of_one_model_may_differ(make, pixels):
    model = make(**MIXED)
    facts = describe(model)
    assert (facts.num_experts, facts.top_k) == (None, None)
    # 16 patches at k = 1 are 16 slots, 3 for each of 6 experts when rounded up
    assert [(router.num_experts, router.slots) for router in facts.routers] == [(4, None), (6, 3)]
    assert facts.max_top_k == 4  # another k has a meaning in L1 only
    for layer, last in ((1, 3), (3, 5)):
        change = {"kind": "ablate", "layer": layer, "expert": last}
        assert read.intervention(change, facts).expert == last
        with pytest.raises(RequestError, match=f"from 0 to {last}"):
            read.intervention({**change, "expert": last + 1}, facts)
    view = route_image(model, pixels, settings=Settings(top_k=3)).to_json()
    assert [len(choices) for choices in view["layers"][0]["experts"]] == [3] * 16
    assert [layer["top_k"] for layer in view["layers"]] == [3, 1]
    assert says(view["settings"]["off_reason"], "top-2", "k = 3")


def test_patches_that_no_expert_took_are_empty_and_not_dropped(make, pixels):
    model = make(router="expert_choice", top_k=1)
    routing = routings_of(model, pixels)[0]
    layer = route_image(model, pixels).to_json()["layers"][0]
    taken = [set() for _ in range(16)]
    for expert, tokens in enumerate(routing.token_index[0].tolist()):
        for token in tokens:
            taken[token].add(expert)
    assert [set(experts) for experts in layer["experts"]] == taken
    assert set() in taken
    assert all(
        kept == [True] * len(experts) for kept, experts in zip(layer["kept"], taken, strict=True)
    )
    assert layer["counts"] == [4] * 4  # 16 patches · 1 / 4 experts


def test_k_of_expert_choice_is_a_mean(make, pixels):
    model = make(router="expert_choice")
    view = route_image(model, pixels, settings=Settings(top_k=1)).to_json()
    assert view["layers"][0]["counts"] == [4] * 4
    assert view["layers"][0]["top_k"] == 1
    assert says(view["settings"]["off_reason"], "2 experts", "on average", "k = 1")


def test_slots_of_a_soft_layer(make, pixels):
    model = make(router="soft", slots_per_expert=3, class_token=True, global_pool="token")
    view = route_image(model, pixels)
    routing = routings_of(model, pixels)[1]
    dispatch = routing.dispatch_weight[0, 1:].numpy()
    layer = view.to_json()["layers"][1]
    assert layer["slots"] == 3
    assert layer["counts"] == [3] * 4
    assert np.array(layer["reads"]) == pytest.approx(dispatch.mean(2).T, abs=5.1e-6)


def test_requested_and_kept_under_a_capacity_of_the_models_own(make, pixels):
    model = make(capacity_factor=1.25, eval_capacity_factor=0.5)
    view = route_image(model, pixels).to_json()
    for layer, routing in zip(view["layers"], routings_of(model, pixels), strict=True):
        assert layer["kept"] == routing.kept[0].tolist()
        assert max(layer["counts"]) <= 4  # 0.5 · 16 patches · 2 choices / 4 experts
        assert sum(layer["requested"]) == 32 > sum(layer["counts"])
        assert (layer["capacity"], layer["train_capacity"]) == (0.5, 1.25)
    assert not view["settings"]["off_distribution"]
    other = route_image(model, pixels, settings=Settings(capacity=0.75)).to_json()
    assert (
        4 < max(max(layer["counts"]) for layer in other["layers"]) <= 6
    )  # in the place of the model's own
    assert says(other["settings"]["off_reason"], "capacity factor 1.25", "factor 0.75")
    as_trained = route_image(model, pixels, settings=Settings(capacity=1.25)).to_json()
    assert not as_trained["settings"]["off_distribution"]


def test_what_has_no_meaning_is_refused_in_words(make, pixels):
    soft, chooser = make(router="soft"), make(router="expert_choice")
    assert [set(router.refused) for router in describe(soft).routers] == [
        {"top_k", "capacity", "force"}
    ] * 2
    assert [set(router.refused) for router in describe(chooser).routers] == [{"force"}] * 2
    assert [set(router.refused) for router in describe(make()).routers] == [set()] * 2
    force = Settings(intervention=Intervention("force", layer=1, expert=0))
    for model, settings in (
        (soft, Settings(top_k=1)),
        (soft, Settings(capacity=1.0)),
        (soft, force),
        (chooser, force),
    ):
        with pytest.raises(UserError, match="no meaning in L1"):
            route_image(model, pixels, settings=settings)


@pytest.mark.parametrize("router", ["soft", "expert_choice"])
def test_an_absent_expert_has_no_weight(make, pixels, router):
    change = Settings(intervention=Intervention("ablate", layer=3, expert=2, fill="zero"))
    model = make(router=router)
    before = weights_of(route_image(model, pixels).to_json()["layers"][1])
    after = weights_of(route_image(model, pixels, settings=change).to_json()["layers"][1])
    assert before[:, 2].any()
    before[:, 2] = 0
    assert after == pytest.approx(before, abs=1.1e-4)


def test_route_by_image_answers_and_says_why_capacity_is_off(bundle, tmp_path):
    bundle(tmp_path, twins=False, route_by="image")
    entries = open_entries(None, home=tmp_path)
    explorer, picture = Explorer(entries), {"kind": "example", "id": "pets/test/3"}
    answer = explorer.answer("route", {"picture": picture})
    pixels = entries[0].examples.find("pets/test/3").pixels
    for layer, routing in zip(
        answer["layers"], routings_of(entries[0].variants["trained"].saved, pixels), strict=True
    ):
        assert layer["route_by"] == "image"
        assert says(layer["words"], "top-2", "whole image")
        assert layer["experts"] == [routing.expert_index[0, 0].tolist()] * 16
        assert sorted(layer["counts"]) == [0, 0, 16, 16]
    ablated = answer["layers"][0]["experts"][0][0]
    change = {"kind": "ablate", "layer": 1, "expert": ablated, "fill": "next_best", "seed": 0}
    after = explorer.answer("route", {"picture": picture, "intervention": change})["layers"][0][
        "experts"
    ]
    assert after == [after[0]] * 16
    assert ablated not in after[0]
    refused = explorer.answer("route", {"picture": picture, "capacity": 1.0})
    assert says(refused["error"], "'capacity'", "as a whole")
