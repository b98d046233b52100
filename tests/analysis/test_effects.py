"""Effects against runs of one change at a time, the control's promises, and the sentences word for word."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from moevision import forward_routing
from moevision.analysis.collect import network_input
from moevision.analysis.effects import (
    Control,
    Effect,
    class_effect,
    control_in_words,
    effect,
    effect_in_words,
    remove_random_experts,
    run_under,
)
from moevision.analysis.intervention import Intervention, Ranking, apply_edits, intervene
from moevision.data.images import BadImageError
from moevision.layers import Routing, build_router, moe_layers
from moevision.models.io import SavedModel
from tests.analysis.pictures import MadePictures
from tests.scopes import ablate, use_top_k

CLASSES = ["cat", "dog", "fox"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make(dtype: torch.dtype = torch.float64, **options: object) -> SavedModel:
    """Two MoE layers (blocks 1 and 3) of 6 experts on a 4 x 4 grid; routers and head are no longer the initial ones."""
    torch.manual_seed(0)
    net = timm.create_model("test_vit_moe", **{"num_classes": 3, "num_experts": 6, **options})
    with torch.no_grad():
        net.head.weight.normal_()
        for layer in moe_layers(net):
            layer.router.weight.normal_()
            layer.experts.fc2.weight.normal_(std=0.3)
    return SavedModel(net.to(dtype).eval(), CLASSES, 32, MEAN, STD)


def picture(seed: int) -> np.ndarray:
    """Coloured blocks, so that patches differ."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)


def run(model: SavedModel, image: np.ndarray) -> tuple[torch.Tensor, list[Routing]]:
    with torch.inference_mode():
        logits, routings = forward_routing(model.net, network_input(model, image[None]))
    return logits[0], routings


def busiest(model: SavedModel, image: np.ndarray) -> int:
    """Of block 1."""
    return int(run(model, image)[1][0].counts().argmax())


def image_of(index: int) -> np.ndarray:
    if index == 4:
        raise BadImageError("4", "it is broken")
    return picture(index)


# Ten images of each class in turn; image 4 (a cat) can't be read.
PICTURES = MadePictures(30, image_of, ("dog", "cat", "owl"), "blocks")
INTERVENTIONS = [
    Intervention("ablate", layer=1, expert=2),
    Intervention("ablate", layer=3, expert=2, fill="zero"),
    Intervention("force", layer=1, expert=4),
    Intervention("swap", layer=3, expert=0, other=1),
    Intervention("random", seed=3),
    Intervention("top_k", top_k=1),
    Intervention("capacity", layer=1, factor=0.5),
]


@pytest.mark.parametrize(
    "intervention", INTERVENTIONS, ids=lambda value: f"{value.kind}-{value.fill}"
)
def test_before_and_after_are_two_forward_passes(intervention):
    model, image = make(), picture(0)
    found = effect(model, image, intervention)
    before, _ = run(model, image)
    with intervene(model.net, intervention):
        after, _ = run(model, image)
    assert found.target == int(before.argmax())
    torch.testing.assert_close(torch.tensor(found.before_logits).double(), before)
    torch.testing.assert_close(torch.tensor(found.after_logits).double(), after)
    torch.testing.assert_close(torch.tensor(found.before).double(), before.softmax(-1))
    assert found.delta_logit == pytest.approx(float(after[found.target] - before[found.target]))
    assert found.delta_p == pytest.approx(
        float((after.softmax(-1) - before.softmax(-1))[found.target])
    )


@pytest.mark.parametrize("fill", ["next_best", "zero"])
def test_moved_counts_the_patches_of_the_expert(fill):
    """With a class token, whose choices are counted apart."""
    model, image = make(class_token=True, global_pool="token"), picture(1)
    routing = run(model, image)[1][0]
    for expert in range(6):
        found = effect(
            model, image, Intervention("ablate", layer=1, expert=expert, fill=fill), num_controls=2
        )
        uses = (routing.expert_index[0] == expert).any(-1)
        assert (found.moved_prefix, found.moved) == (int(uses[:1].sum()), int(uses[1:].sum()))


def test_moved_by_other_kinds():
    """16 patches, 2 choices, 2 layers: k = 1 drops 32; force moves one choice of each patch without the expert."""
    model, image = make(), picture(1)
    routing = run(model, image)[1][0]
    assert effect(model, image, Intervention("top_k", top_k=1)).moved == 32
    assert effect(model, image, Intervention("top_k", top_k=3)).moved == 0
    without = ~(routing.expert_index[0] == 4).any(-1)
    assert effect(model, image, Intervention("force", layer=1, expert=4)).moved == int(
        without.sum()
    )
    both = ((routing.expert_index[0] == 0).any(-1)).int() + (routing.expert_index[0] == 1).any(
        -1
    ).int()
    swapped = effect(model, image, Intervention("swap", layer=1, expert=0, other=1))
    assert swapped.moved == int((both == 1).sum())  # a patch with both keeps both


@pytest.mark.parametrize("layer", [1, None])
def test_the_control_is_a_draw_one_at_a_time(layer):
    """Each row of the batch equals a forward pass of its own with the same draw."""
    model, image = make(), picture(2)
    intervention = Intervention("random", layer=layer, seed=1)
    found = effect(model, image, intervention, num_controls=3, seed=5)
    before, routings = run(model, image)
    with torch.inference_mode():
        _, taken, _ = run_under(model.net, network_input(model, image[None]), intervention)
    for draw, delta in enumerate(found.control.delta_logits):
        edits = {
            moe: lambda ranking, place=place, moe=moe, draw=draw: remove_random_experts(
                ranking, taken[moe].tolist(), [(5, draw, place)], 0, "next_best"
            )
            for place, moe in enumerate(taken)
        }
        with apply_edits(model.net, edits):
            after, _ = run(model, image)
        assert delta == pytest.approx(float((after - before)[found.target]), abs=1e-12)
    assert len(routings) == 2
    assert len(set(found.control.delta_logits)) == 3
    assert effect(model, image, intervention, num_controls=3, seed=5) == found
    assert effect(model, image, intervention, num_controls=3, seed=6).control != found.control


@pytest.mark.parametrize("fill", ["next_best", "zero"])
def test_taking_away_at_random_takes_exactly_so_many(fill):
    """From kept choices of prefix tokens and patches apart, evenly over 300 draws, and nothing else changes."""
    torch.manual_seed(0)
    router = build_router("noisy_top_k", 8, 5, 2, dtype=torch.float64).eval()
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(1, 7, 8, dtype=torch.float64))
    routing = replace(
        routing, kept=routing.kept.clone().index_fill_(1, torch.tensor([6]), False)
    )  # dropped before
    ranking = Ranking.of(router, routing)
    times = torch.zeros(7, 2)
    for seed in range(300):
        after = remove_random_experts(ranking, [[1, 4]], [(seed,)], 2, fill).to_routing()
        pairs = [
            {
                (token, int(r.expert_index[0, token, choice]))
                for token in range(7)
                for choice in range(2)
                if r.kept[0, token, choice]
            }
            for r in (routing, after)
        ]
        lost, won = pairs[0] - pairs[1], pairs[1] - pairs[0]
        assert sum(token < 2 for token, _ in lost) == 1
        assert sum(token >= 2 for token, _ in lost) == 4
        assert len(won) == (5 if fill == "next_best" else 0)
        for token, expert in lost:
            times[token, routing.expert_index[0, token].tolist().index(expert)] += 1
    assert not times[6].any()
    # 300 draws: each of 4 prefix choices 75 times (sd 7.5), each of 8 patch choices 150 times (sd 8.7)
    assert (times[:2] - 75).abs().max() < 4 * 7.5
    assert (times[2:6] - 150).abs().max() < 4 * 8.7


@pytest.mark.parametrize("fill", ["next_best", "zero"])
def test_the_control_of_layers_that_route_images_takes_whole_experts(fill):
    model, image = (
        make(route_by="image", top_k=2, class_token=True, global_pool="token"),
        picture(1),
    )
    routing = run(model, image)[1][0]
    own = routing.expert_index[0, 0].tolist()
    change = Intervention("ablate", layer=1, expert=own[0], fill=fill)
    found = effect(model, image, change, num_controls=8)
    assert (found.moved_prefix, found.moved) == (1, 16)
    of_experts = []
    for expert in own:
        with intervene(model.net, replace(change, expert=expert)):
            of_experts.append(
                float(run(model, image)[0][found.target]) - found.before_logits[found.target]
            )
    assert found.delta_logit == pytest.approx(of_experts[0])
    drawn = np.array(found.control.delta_logits)
    nearest = np.abs(drawn[:, None] - of_experts).argmin(1)
    np.testing.assert_allclose(drawn, np.array(of_experts)[nearest], atol=1e-9)
    assert set(nearest) == {0, 1}  # either expert of the image


def test_an_image_with_one_expert_has_no_control_of_its_absence():
    """As many random choices are those of that expert: the control would be the ablation itself."""
    model, image = make(route_by="image", top_k=1), picture(1)
    change = Intervention("ablate", layer=1, expert=busiest(model, image))
    found = effect(model, image, change)
    assert found.control is None
    assert found.delta_logit != 0
    assert "; no control: " in found.sentence
    assert found.to_json()["control"] is None
    of_class = class_effect(model, PICTURES, "cat", change, limit=3)
    assert of_class.control_delta_logits is None
    assert of_class.to_json()["control_delta_logit"] is None
    assert of_class.to_json()["control_sd_logit"] is None
    assert effect(model, image, Intervention("force", layer=1, expert=0)).control is not None
    two = make(route_by="image", top_k=2)
    assert effect(two, image, change).control is not None
    with use_top_k(two.net, 1):
        assert effect(two, image, change).control is None
    only = make(route_by="image", top_k=1, num_experts=1)
    assert (
        effect(only, image, Intervention("ablate", layer=1, expert=0, fill="zero")).control is None
    )


def test_an_unused_expert_changes_nothing():
    model, image = make(num_experts=48, dtype=torch.float32), picture(3)
    routing = run(model, image)[1][1]
    unused = int((routing.requested_counts() == 0).nonzero()[0])
    found = effect(model, image, Intervention("ablate", layer=3, expert=unused))
    assert found.before_logits == found.after_logits
    assert found.moved == 0
    assert found.control.mean == pytest.approx(0, abs=1e-4)
    name, p = CLASSES[found.target], found.before[found.target]
    assert found.sentence == (
        f"For this image: without L3·E{unused} (0 patches go to their next-best expert) "
        f"{name} stays at {p:.2f} (logit 0.00)."
    )


def test_effects_are_measured_inside_open_interventions():
    model, image = make(), picture(4)
    away = busiest(model, image)
    with use_top_k(model.net, 1):
        found = effect(model, image, Intervention("ablate", layer=1, expert=away))
        before, _ = run(model, image)
        with ablate(model.net, 1, away):
            after, _ = run(model, image)
    torch.testing.assert_close(torch.tensor(found.before_logits).double(), before)
    torch.testing.assert_close(torch.tensor(found.after_logits).double(), after)
    assert not torch.allclose(before, run(model, image)[0])


def test_class_effect_is_the_mean_of_single_effects():
    """Cats are 1, 4, 7, ... here, class 0 of the model; image 4 can't be read. Batches of 4, 4 and 2."""
    model, pictures = make(), PICTURES
    change = Intervention("ablate", layer=1, expert=busiest(model, picture(1)))
    found = class_effect(model, pictures, "cat", change, batch_size=4)
    numbers = [1, 7, 10, 13, 16, 19, 22, 25, 28]
    singles = [effect(model, picture(number), change, target="cat") for number in numbers]
    assert found.unreadable == 1
    np.testing.assert_allclose(
        found.delta_logits, [single.delta_logit for single in singles], atol=1e-12
    )
    np.testing.assert_allclose(found.delta_ps, [single.delta_p for single in singles], atol=1e-12)
    assert found.moved == pytest.approx(np.mean([single.moved for single in singles]))
    assert len(found.control_delta_logits) == 9
    assert np.std(found.control_delta_logits) > 0
    written = found.to_json()
    assert written["n"] == 9
    assert written["delta_logit"] == pytest.approx(np.mean(found.delta_logits))
    assert written["sd_logit"] == pytest.approx(np.std(found.delta_logits, ddof=1))
    assert class_effect(model, pictures, 0, change, batch_size=4) == found
    assert singles[0].to_json()["target"] == "cat"


def test_class_effect_of_some_pictures():
    model, change = make(), Intervention("force", layer=3, expert=0)
    found = class_effect(model, PICTURES, "dog", change, limit=4, seed=1)
    every = class_effect(model, PICTURES, "dog", change, limit=None)
    assert len(found.delta_logits) == 4
    assert len(every.delta_logits) == 10
    for delta in found.delta_logits:
        assert np.abs(np.array(every.delta_logits) - delta).min() < 1e-12


def test_a_batch_of_one_picture():
    """The batch that is left over may have one image, which must not be taken for rows of the same image."""
    model, change = make(), Intervention("ablate", layer=1, expert=0)
    one_by_one = class_effect(model, PICTURES, "dog", change, batch_size=1)
    together = class_effect(model, PICTURES, "dog", change, batch_size=10)
    np.testing.assert_allclose(one_by_one.delta_logits, together.delta_logits, atol=1e-12)
    np.testing.assert_allclose(
        one_by_one.control_delta_logits, together.control_delta_logits, atol=1e-12
    )


def test_models_without_numbered_blocks():
    """Where the block of a layer isn't known the image is repeated from the start."""
    model, image = make(), picture(2)
    expected = effect(model, image, Intervention("ablate", layer=3, expert=2))
    for place, layer in enumerate(moe_layers(model.net)):
        assert layer.layer_index == (1, 3)[place]
        layer.layer_index = None
    found = effect(
        model, image, Intervention("ablate", layer=1, expert=2)
    )  # the second MoE layer, by position
    np.testing.assert_allclose(
        found.control.delta_logits, expected.control.delta_logits, atol=1e-12
    )
    assert found.delta_logit == pytest.approx(expected.delta_logit, abs=1e-12)


def test_plain_forward_passes_of_other_threads_are_left_alone():
    model = make()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model.net(x)
    with ThreadPoolExecutor(1) as thread:
        passes = thread.map(lambda _: torch.equal(model.net(x), expected), range(100))
        for seed in range(5):
            effect(model, picture(seed), Intervention("force", layer=1, expert=0))
    assert all(passes)


def a_result(**changes: object) -> Effect:
    """Logits (ln 81, ln 19) are 0.81 and 0.19; (ln 62, ln 38) are 0.62 and 0.38."""
    result = Effect(
        intervention=Intervention("ablate", layer=4, expert=3),
        class_names=("cat", "dog"),
        target=0,
        before_logits=(float(np.log(81)), float(np.log(19))),
        after_logits=(float(np.log(62)), float(np.log(38))),
        moved=37,
        moved_prefix=0,
        control=Control(
            "moving 37 random patch assignments of L4 to the next-best expert",
            (-0.05, 0.01),
            (0.0, 0.0),
        ),
    )
    return replace(result, **changes)


def test_the_sentence_word_for_word():
    """ln 62 - ln 81 = -0.27; mean of -0.05 and 0.01 is -0.02, their standard deviation 0.06/√2 = 0.04."""
    assert a_result().sentence == (
        "For this image: without L4·E3 (37 patches go to their next-best expert) cat falls from 0.81 to 0.62 "
        "(logit −0.27); moving 37 random patch assignments of L4 to the next-best expert changes the logit by "
        "−0.02 ± 0.04 (2 draws)."
    )
    assert "dog rises from 0.19 to 0.38 (logit +0.69);" in a_result(target=1).sentence


def change(kind: str, *numbers: int, layer: int | None = 1, **options: object) -> Intervention:
    return Intervention(kind, layer, *numbers, **options)


NAMED = {
    "without L1·E0 (1 patch goes to its next-best expert)": (change("ablate", 0), 1),
    "without L1·E0 (its output set to zero for 2 patches)": (change("ablate", 0, fill="zero"), 2),
    "with every token of L1 sent first to E0 (1 patch assignment moved)": (change("force", 0), 1),
    "with E0 and E2 of L1 swapped (9 patch assignments moved)": (change("swap", 0, 2), 9),
    "with random routing in every MoE layer (seed 3, 9 patch assignments moved)": (
        change("random", layer=None, seed=3), 9
    ),
    "with k = 1 in L1 (9 patch assignments dropped)": (change("top_k", top_k=1), 9),
    "with capacity factor 1.25 in every MoE layer (9 patch assignments dropped)": (
        change("capacity", layer=None, factor=1.25), 9
    ),
    "without L1·E0 (3 patches lose it, and no expert takes its place)": (change("ablate", 0), 3, "expert_choice"),
    "without L1·E0 (its weight in 3 patches shared out among the other experts)": (change("ablate", 0), 3, "soft"),
    "with the slots of E0 and E1 of L1 swapped": (change("swap", 0, 1), 0, "soft"),
    "with the slots of L1 dealt out to its experts at random (seed 0)": (change("random"), 0, "soft"),
}  # fmt: skip


@pytest.mark.parametrize("words", NAMED)
def test_every_kind_is_named(words):
    assert effect_in_words(*NAMED[words]) == words


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        ("expert_choice", "taking 3 random patch assignments of L1 away"),
        ("soft", "taking 3 random patch assignments of L1 away and sharing out their weight among the other experts"),
    ],
)  # fmt: skip
def test_the_control_is_named(routing, words):
    assert control_in_words(change("ablate", 0), 3, routing) == words


@pytest.mark.parametrize(
    "intervention", INTERVENTIONS, ids=lambda value: f"{value.kind}-{value.fill}"
)
def test_json_says_everything(intervention):
    model = make()
    found = effect(model, picture(1), intervention)
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["schema"] == "moevision.effect/1"
    assert Intervention(**written["intervention"]) == intervention
    assert written["before"][0]["class"] == CLASSES[found.target]
    assert written["before"][0]["p"] == max(found.before)
    assert len(written["control"]["deltas"]) == written["control"]["n"] == 20
    assert written["control"]["mean"] == pytest.approx(np.mean(found.control.delta_logits))
    assert written["control"]["sd"] == pytest.approx(np.std(found.control.delta_logits, ddof=1))
    drops = intervention.fill == "zero" or intervention.kind in ("top_k", "capacity")
    assert ("to zero" in written["control"]["what"]) == drops
    assert ("next-best" in written["control"]["what"]) == (not drops)
    assert written["sentence"] == found.sentence
