"""The swap test: planted experts whose answers are known, brute force over loops, and models of ours."""

import json
from functools import partial

import numpy as np
import pytest
import timm
import torch

from moevision.analysis import (
    RecordedLayer,
    Recording,
    recording_of,
    three_questions,
)
from moevision.analysis.collect import network_input
from moevision.analysis.images import read_images
from moevision.analysis.information import halves_by_class
from moevision.analysis.questions import (
    A_LITTLE_WORD,
    NOT_MEASURED,
    NOT_SHOWN,
    NOTHING,
    YES,
    plain_answer,
    summary_lines,
    swap_test,
)
from moevision.analysis.readings import run_forced
from moevision.errors import UserError
from moevision.layers import Router, moe_layers
from tests.analysis.models import saved, small_net, traced
from tests.scopes import ablate

PATCHES = 12
GATES = np.array([0.7, 0.3])
SPEAKING = [*(6 * np.eye(4)), np.zeros(4), np.zeros(4)]  # expert c says class c; two say nothing


def planted(experts, labels, choices, evidence=0.0, scale=1.0, bias=0.0, ran=None):
    """A layer whose experts [E, C] add what they say to the logits, whatever the patch: the mean over its patches.

    The residual says `evidence` for each image's class and `bias` [C] of every image; `scale` is the layer's.
    """
    experts, num_classes = np.asarray(experts, float), len(experts[0])

    def run(place, images, routes):
        if ran is not None:
            ran.append((images, routes))
        said = np.where(
            (routes >= 0)[..., None], experts[np.where(routes >= 0, routes, 0)], 0
        )  # [R, P, K, C]
        gates = GATES[: routes.shape[-1]]
        residual = evidence * np.eye(num_classes)[labels[images]] + bias
        return residual + scale * (said * gates[:, None]).sum(2).mean(1)

    layer = RecordedLayer("L1", choices, len(experts))
    return Recording(labels, [layer], [f"class {c}" for c in range(num_classes)], run=run)


def routed(rng, num_classes=4, num_experts=6, images=160, top_k=2, favourite=0.5):
    """Labels [I] and choices [I, P, K]: class c sends a patch to expert c first with this probability."""
    labels = np.arange(images) % num_classes
    order = rng.random((images, PATCHES, num_experts))
    liked = (rng.random((images, PATCHES)) < favourite)[..., None] & (
        np.arange(num_experts) == labels[:, None, None]
    )
    return labels, np.where(liked, 2, order).argsort(-1)[..., ::-1][..., :top_k]


def answered(recording, **options):
    (found,) = three_questions(recording, permutations=100, **options)
    return found, found.answers[2]


def test_experts_that_are_copies_cost_nothing_when_exchanged():
    """They all take back what the residual says too much of class 1, so that the layer contributes."""
    labels, choices = routed(np.random.default_rng(0), num_classes=2)
    found, answer = answered(
        planted([[3.0, 0.0]] * 6, labels, choices, evidence=1.0, bias=np.array([0, 3.0]))
    )
    assert found.swap.without.points.value == 50
    assert answer.answer == NOT_SHOWN
    swap = found.swap
    for name in [
        "whole",
        "favourite",
        "any_two",
        "more",
        "routes",
        "same_patches",
        "beyond_patches",
    ]:
        cost = getattr(swap, name)
        assert cost.log_loss == (0, 0, 0)
        assert cost.points.value == 0


def test_experts_of_classes_are_found():
    """Expert c says class c; two say nothing. Any two others have little to say about a class."""
    labels, choices = routed(np.random.default_rng(1))
    found, answer = answered(planted(SPEAKING, labels, choices))
    assert answer.answer == YES
    assert "different things: yes (exchanging" in answer.sentence
    assert found.swap.favourite.moved == found.swap.any_two.moved > 0.1
    assert found.swap.more.log_loss.low > 0
    assert [row[1:] for row in found.swap.favourites] == [(c, c) for c in range(4)]
    written = json.loads(json.dumps(found.to_json()["swap"], allow_nan=False))
    assert written["favourite"]["moved"] > 0.1
    # On the patches that chose it and another expert it alone says the class.
    assert found.swap.same_patches.moved == found.swap.their_other.moved > 0
    assert found.swap.beyond_patches.log_loss.low > 0
    assert "their other choice" in answer.detail


def test_a_layer_that_is_scaled_to_zero_contributes_nothing_and_claims_nothing():
    labels, choices = routed(np.random.default_rng(3))
    found, answer = answered(planted(SPEAKING, labels, choices, 1.0, scale=0.0))
    assert answer.answer == NOTHING
    for fragment in ("contributes nothing", "what its experts", "(without it 0.0"):
        assert fragment in answer.sentence
    assert "exchanging" not in answer.sentence
    assert summary_lines([found])[2].sentence == answer.sentence
    assert plain_answer([answer]) == f"{answer.sentence.split(' (')[0]}."


def test_a_favourite_that_only_has_more_tokens_is_no_expert_of_its_class():
    """What experts say has nothing to do with classes, and half of all tokens go to the favourite.

    All tokens of the favourite cost more than those of others, and choices scattered over experts average out; as many
    tokens of any two others cost the same.
    """
    rng = np.random.default_rng(4)
    labels, choices = routed(rng, num_experts=8, images=1200, top_k=1, favourite=0.7)
    found, answer = answered(
        planted(rng.normal(0, 4, (8, 4)), labels, choices, evidence=2.0, scale=1 / 0.7)
    )
    assert found.swap.whole.significant
    assert found.swap.more.log_loss.low < 0 < found.swap.more.log_loss.high
    assert answer.answer == A_LITTLE_WORD
    assert "no more than" in answer.detail


def test_two_experts_have_no_others_to_compare_with():
    labels, choices = routed(np.random.default_rng(5), num_classes=2, num_experts=2, top_k=1)
    found, answer = answered(planted([[3.0, 0], [0, 3.0]], labels, choices))
    assert (answer.answer, found.swap.more, found.swap.same_patches) == (YES, None, None)
    assert "no two other" in answer.detail
    both = np.tile([0, 1], (160, PATCHES, 1))
    assert swap_test(planted([[3.0, 0], [0, 3.0]], labels, both), 0) is None


def test_a_loss_of_log_loss_alone_is_a_little():
    """The residual is right anyway; the experts only make it surer."""
    labels, choices = routed(np.random.default_rng(6))
    found, answer = answered(planted(SPEAKING, labels, choices, evidence=9.0))
    assert found.swap.without.points.value == 0
    assert answer.answer == A_LITTLE_WORD
    assert answer.detail.startswith("in log-loss alone:")


def test_every_cost_by_brute_force():
    rng = np.random.default_rng(7)
    labels, choices = routed(rng, images=80)
    experts, ran = rng.normal(0, 3, (6, 4)), []
    recording = planted(experts, labels, choices, evidence=1.0, ran=ran)
    found = swap_test(recording, 0, draws=3, limit=60, seed=5)
    ((images, routes),) = ran

    def loss(image, of):
        """Log-loss of one image, by loops."""
        logits = np.eye(4)[labels[image]].copy()
        for patch in of:
            for gate, expert in zip(GATES, patch, strict=True):
                logits += gate * experts[expert] / PATCHES if expert >= 0 else 0
        return np.log(np.exp(logits).sum()) - logits[labels[image]], float(
            logits.argmax() == labels[image]
        )

    halves, seen = halves_by_class(labels, 5), np.unique(images)
    assert found.n_images == len(seen) == 60
    assert np.bincount(labels[seen]).tolist() == [15] * 4
    favourite = {}  # of a class, on the images of the other half
    for half in (False, True):
        for c in range(4):
            first = choices[(halves != half) & (labels == c)][..., 0].ravel()
            favourite[half, c] = np.bincount(first).argmax()
    lost, replaced = (
        [],
        [],
    )  # without the layer; by a third expert: log-loss lost for the favourite, and for the other
    exchanged = []  # [image's favourite exchanged, changed patches, the experts in it, log-loss lost]
    for image in seen:
        own, plain = choices[image], loss(image, choices[image])
        mine = [of for number, of in zip(images, routes, strict=True) if number == image]
        assert (mine[0] == own).all()
        if (
            (mine[-1] != own) == (mine[-2] != own)[:, ::-1]
        ).all():  # the same patches, each with its other choice
            *mine, instead, beside = mine
            where = (instead != own).any(-1)
            liked, other = ({*own[of != own]} for of in (instead, beside))
            assert (liked, len(other)) == ({favourite[halves[image], labels[image]]}, 1)
            assert {*instead[instead != own]} == {
                *beside[beside != own]
            }  # one third expert for both
            assert (
                (own[where, 0] == [*liked]).sum()
                == (own[where, 0] == [*other]).sum()
                == where.sum() / 2
            )
            replaced.append([loss(image, of)[0] - plain[0] for of in (instead, beside)])
        for of in mine[1:]:
            more = loss(image, of)[0] - plain[0]
            away = of < 0
            if away.all():
                lost.append((more, plain[1] - loss(image, of)[1]))
            elif (of != own).any() and not any((of == other).all() for other in choices):
                changed = (of != own).any(-1)
                pair = set(own[of != own]) | set(of[of != own])
                assert len(pair) == 2
                assert ((of != own).sum(-1)[changed] == 1).all()  # tokens that chose both stay
                exchanged.append(
                    (favourite[halves[image], labels[image]] in pair, changed.sum(), labels[image])
                )
    nats, points = np.array(lost).T
    assert found.without.log_loss.value == pytest.approx(nats.mean())
    assert found.without.points.value == pytest.approx(100 * points.mean())
    half_width = 2.000995 * nats.std(ddof=1) / np.sqrt(60)  # Student's, 59 degrees of freedom
    assert found.without.log_loss.high == pytest.approx(nats.mean() + half_width)
    # Of 3 draws: the whole exchange of the favourite, and twice as many tokens in the thinned ones, class by class.
    tokens = {
        kind: sum(count for own, count, _ in exchanged if own is kind) for kind in (True, False)
    }
    assert tokens[False] / 60 / PATCHES / 2 / 3 == pytest.approx(found.any_two.moved)
    assert tokens[True] / 60 / PATCHES / 2 / 3 == pytest.approx(
        found.whole.moved + found.favourite.moved
    )
    assert found.favourite.moved == found.any_two.moved > 0
    assert found.more.log_loss.value == pytest.approx(
        found.favourite.log_loss.value - found.any_two.log_loss.value
    )
    assert 20 < len(replaced) < 60
    of_favourite, of_other = np.sum(replaced, 0) / 60
    assert found.same_patches.log_loss.value == pytest.approx(of_favourite)
    assert found.their_other.log_loss.value == pytest.approx(of_other)
    assert found.beyond_patches.log_loss.value == pytest.approx(of_favourite - of_other)
    assert found.beyond_patches.points.value == pytest.approx(
        found.same_patches.points.value - found.their_other.points.value
    )


def test_routes_of_another_image_keep_their_place():
    """Every image has routes of its own, and goes by those of exactly one other."""
    labels, ran = np.arange(40) % 2, []
    choices = np.random.default_rng(8).random((40, PATCHES, 13)).argsort(-1)[..., :2]
    swap_test(planted(np.zeros((13, 2)), labels, choices, ran=ran), 0)
    ((images, routes),) = ran
    taken = {}
    for image, of in zip(images, routes, strict=True):
        others = [other for other in range(40) if other != image and (of == choices[other]).all()]
        if others:
            taken[int(image)] = others[0]
    assert sorted(taken) == sorted(taken.values()) == list(range(40))


def test_a_limit_holds_whatever_the_number_of_classes():
    labels, ran = np.arange(150) % 50, []
    choices = np.tile(labels[:, None, None] % 8, (1, 4, 1))
    found = swap_test(planted(np.zeros((8, 50)), labels, choices, ran=ran), 0, limit=10)
    assert found.n_images == len(np.unique(ran[0][0])) == len(found.favourites) == 10


def test_what_can_not_be_asked_says_why():
    """Of one expert there is no other; of one image of each class there is none to find the favourite on."""
    labels, choices = routed(np.random.default_rng(7))
    _, alone = answered(planted([[1.0] * 4], labels, np.zeros_like(choices[..., :1])))
    assert (alone.answer, "one expert" in alone.detail) == (NOT_MEASURED, True)
    labels = np.arange(40)
    _, answer = answered(
        planted(np.zeros((6, 40)), labels, routed(np.random.default_rng(8), images=40)[1])
    )
    assert answer.answer == NOT_MEASURED
    for fragment in ("two images", "give more", "--limit"):
        assert fragment in answer.detail


@pytest.mark.parametrize("prefix", [{}, {"class_token": True, "global_pool": "token"}])
def test_without_the_layer_and_without_an_expert_are_what_other_means_say(prefix):
    """A hook that zeroes the layer's output, and `ablate`; every image twice, so that blocks before are shared."""
    model = saved(small_net(**prefix))
    pictures, trace = traced(model, 8)
    images = np.repeat(np.arange(6), 2)
    own = trace.layers[1].expert_index[images].astype(np.int64)
    forced = partial(run_forced, model, pictures, [1, 3], 1, images)
    pixels = network_input(model, read_images(pictures, images))
    with torch.inference_mode():
        plain = model.net(pixels).numpy()
        with ablate(model.net, 3, 2, fill="zero"):
            away = model.net(pixels).numpy()
        model.net.blocks[3].mlp.register_forward_hook(lambda _layer, _inputs, output: 0 * output)
        without = model.net(pixels).numpy()
    model.net.blocks[3].mlp._forward_hooks.clear()
    assert forced(~own) == pytest.approx(without, abs=1e-5)
    assert forced(own) == pytest.approx(plain, abs=1e-5)
    if not prefix:  # which `ablate` takes the expert from, too
        assert forced(np.where(own == 2, ~own, own)) == pytest.approx(away, abs=1e-5)
    assert np.abs(without - plain).max() > 1e-2


@pytest.mark.parametrize(
    "options", [{"router": "colour"}, {"router": "vmoe_top_k", "capacity": "batch"}]
)
def test_rows_that_are_run_together_do_not_change_one_another(options):
    """A router that looks at the images again, and a capacity that a batch shares: beside rows without the layer."""
    if options.pop("capacity", None):
        options |= {"eval_capacity_factor": 0.7, "capacity_group": "batch"}
    model = saved(timm.create_model("test_vit_moe", num_classes=8, stem="patch", **options).eval())
    pictures, trace = traced(model, 8)
    forced = partial(run_forced, model, pictures, [layer.layer for layer in trace.layers], 1)
    images = np.repeat(np.arange(4), 2)
    own = np.asarray(trace.layers[1].expert_index)[images].astype(np.int64)
    alone = np.concatenate([forced(images[[row]], own[[row]]) for row in range(len(images))])
    assert forced(images, own) == pytest.approx(alone, abs=1e-5)
    own[1::2] = ~own[1::2]
    assert forced(images, own)[::2] == pytest.approx(alone[::2], abs=1e-5)


class Mine(Router):
    """It chooses and computes; what other choices would weigh isn't known."""

    num_experts, top_k = 4, 2

    def __init__(self, router):
        super().__init__()
        self.forward = router.forward


def test_a_router_of_ones_own_without_gates_is_not_changed():
    net = timm.create_model("test_vit_moe", num_classes=8, stem="patch").eval()
    for layer in moe_layers(net):
        layer.router = Mine(layer.router)
    recording = recording_of(saved(net), *traced(saved(net), 16))
    answers = three_questions(recording, permutations=20)[0].answers
    assert answers[2].answer == NOT_MEASURED
    assert "not forced" in answers[2].detail
    why = r"'ablate' .* in L1: Mine .* \(gate_logits, gates"
    with pytest.raises(UserError, match=why), ablate(net, 1, 0):
        pass
