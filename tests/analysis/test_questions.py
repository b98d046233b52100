"""The three questions: planted routers whose answers are known, numbers by hand, a foreign model, and one of ours."""

import copy
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from moevision.analysis import collect_routing, open_pictures
from moevision.analysis.collect import network_input
from moevision.analysis.images import read_images
from moevision.analysis.information import halves_by_class, paired_interval, ratio_interval
from moevision.analysis.questions import (
    A_LITTLE_WORD,
    NOT_MEASURED,
    NOT_SHOWN,
    NOTHING,
    YES,
    experts_answer,
    summary_lines,
    three_questions,
)
from moevision.analysis.readings import (
    Assignments,
    Load,
    RecordedLayer,
    Recording,
    guess_from_experts,
    measure_baselines,
    measure_layer,
    probe_groups,
    recording_of,
    run_forced,
)
from moevision.data import SyntheticPets
from moevision.demo import bundled_model
from moevision.layers import forward_routing
from moevision.models.io import load_model, save_model
from moevision.models.upcycle import start_routers
from tests.scopes import swap

IMAGES, PATCHES = 80, 9
LABELS = np.arange(IMAGES) % 2
OPTIONS = {"permutations": 60, "cluster_seeds": 2}


class Foreign(nn.Module):
    """A model that isn't ours: a router by one direction of the tokens, two experts, the mean of their answers.

    Tokens [B, P, 4]: the class (±1) in the first, a nuisance of the patch (±6) in the second. `routes_by` says which of
    them the router reads. An expert says its bias, whatever it sees: for class 1 and against class 0. Equal biases make
    copies.
    """

    def __init__(self, routes_by, biases):
        super().__init__()
        self.direction = nn.Parameter(torch.eye(4)[routes_by], requires_grad=False)
        self.biases = nn.Parameter(torch.tensor(biases), requires_grad=False)

    def forward(self, tokens, forced=None):
        chosen = (tokens @ self.direction > 0).long() if forced is None else forced
        difference = self.biases[chosen].mean(1)
        return torch.stack([-difference, difference], -1), chosen


def tokens_of(seed, images=IMAGES):
    """[I, P, 4]: class, nuisance, and two dimensions of noise."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(0, 0.1, (images, PATCHES, 4))
    tokens[..., 0] += 2 * (np.arange(images) % 2)[:, None] - 1
    tokens[..., 1] += rng.choice([-6, 6], (images, PATCHES))
    return tokens.astype(np.float32)


def recorded(model, tokens, **options):
    """The adapter: what anyone writes for a model of their own."""
    tensor = torch.from_numpy(tokens)
    _, chosen = model(tensor)

    def run(place, images, experts):
        chosen = torch.from_numpy(experts[..., 0]).long()
        difference = torch.where(chosen >= 0, model.biases[chosen.clamp(min=0)], 0.0).mean(1)
        return torch.stack([-difference, difference], -1).numpy()

    before = np.random.default_rng(9).integers(2, size=(len(tokens), PATCHES, 1))
    layer = RecordedLayer(
        "L1",
        chosen.numpy()[..., None],
        2,
        inputs=tokens,
        before=[Assignments(None, 0, before.astype(np.int16), np.arange(len(tokens)), 2)],
        **options,
    )
    return Recording(np.arange(len(tokens)) % 2, [layer], ["cat", "dog"], run=run)


def answers(layer):
    return [answer.answer for answer in layer.answers]


def test_a_foreign_model_whose_router_follows_the_class_against_the_clusters():
    """Clusters follow the larger nuisance; the router found the class; and each expert is right about its class."""
    recording = recorded(Foreign(routes_by=0, biases=[-1.0, 1.0]), tokens_of(0))
    (found,) = three_questions(recording, **OPTIONS)
    assert answers(found) == [YES, YES, YES]
    for fragment in ("different experts: yes", "100.0 % right", "chance 50.0 %"):
        assert fragment in found.answers[0].sentence
    # All right before, all wrong behind the other class's expert, a coin (argmax: cat) without the layer.
    assert found.swap.whole.points.value == 100
    assert found.swap.whole.moved == 1
    assert found.swap.without.points.value == 50
    assert found.swap.favourites == [("cat", 0, 0), ("dog", 1, 1)]
    for fragment in ("no two other", "leaving the layer out costs 50.0)."):
        assert fragment in found.answers[2].sentence
    assert found.readings[0].bits.value == pytest.approx(1, abs=0.03)
    assert found.probe.bits.value == pytest.approx(1, abs=0.03)
    assert {reading.unit for reading in found.controls["clusters"]} == {"patch", "image"}
    assert max(reading.bits.value for reading in found.controls["clusters"]) < 0.1
    assert summary_lines([found]) == list(found.answers)


def test_a_probe_that_tells_nothing_is_no_measure():
    """Of twenty images it told −0.005 bits, and 0.001 bits were called 0.1 % of them."""
    readings = measure_layer(recorded(Foreign(0, [-1.0, 1.0]), tokens_of(0)), 0, seed=0, **OPTIONS)
    assert "2 balanced groups" in experts_answer(readings).numbers[0]
    nothing = readings.probe.bits._replace(value=-0.005)
    without = replace(readings, probe=replace(readings.probe, bits=nothing))
    assert "probe" not in experts_answer(without).numbers[0]


def test_controls_of_one_half_are_guessed_from_within_it():
    """Clusters that are the classes, measured on the half they were not fitted on: all right, 1 bit, by both units."""
    measured = np.flatnonzero(halves_by_class(LABELS, 0))
    chosen = np.broadcast_to(LABELS[measured, None, None], (len(measured), PATCHES, 1)).astype(
        np.int16
    )
    clusters = [Assignments(None, 0, chosen, measured, 2)]
    (found,) = three_questions(
        recorded(Foreign(routes_by=0, biases=[-1.0, 1.0]), tokens_of(0), clusters=clusters),
        **OPTIONS,
    )
    patch, image = found.controls["clusters"]
    assert (patch.guess.value, image.guess.value) == (1, 1)
    assert (patch.bits.value, image.bits.value) == (
        pytest.approx(1, abs=0.05),
        pytest.approx(1, abs=0.1),
    )
    assert [reading.guess.value for reading in found.same["clusters"]] == [
        1,
        1,
    ]  # the router, on the same images


def test_a_router_that_equals_its_clusters_added_nothing():
    tokens = tokens_of(1)
    tokens[..., 1] /= 100  # the class is the largest difference now
    (found,) = three_questions(recorded(Foreign(0, [-1.0, 1.0]), tokens), **OPTIONS)
    assert answers(found) == [YES, NOT_SHOWN, YES]
    assert "clusters of the" in found.answers[1].detail
    assert found.trainings[0] == pytest.approx(0, abs=0.01)


def test_a_router_that_knows_no_class_and_experts_that_are_copies():
    (found,) = three_questions(recorded(Foreign(1, [0.5, 0.5]), tokens_of(2)), **OPTIONS)
    assert answers(found)[:2] == [NOT_SHOWN, NOT_SHOWN]
    assert "chance 50.0 %" in found.answers[0].sentence
    copies = recorded(Foreign(0, [0.5, 0.5]), tokens_of(2))
    (found,) = three_questions(copies, **OPTIONS)
    assert answers(found) == [
        YES,
        YES,
        NOTHING,
    ]  # both say dog of everything: half is right with them and without
    assert found.swap.whole.points.value == 0
    # No image changed, which is no proof that none does: Agresti and Min's ± 1.96 / (n + 2).
    assert found.swap.whole.points.high == pytest.approx(100 * 1.96 / (IMAGES + 2), abs=0.01)


def test_every_training_stands_against_its_own_controls():
    model, found_class = Foreign(0, [-1.0, 1.0]), tokens_of(3)
    similar = tokens_of(4)
    similar[..., 1] /= 100
    main, as_good, not_again = (
        recorded(model, tokens) for tokens in (found_class, tokens_of(5), similar)
    )
    (both,) = three_questions(main, seeds=[as_good], **OPTIONS)
    assert both.answers[1].answer == YES
    assert "2 of 2 trainings" in both.answers[1].sentence
    (one,) = three_questions(main, seeds=[not_again], **OPTIONS)
    assert one.answers[1].answer == NOT_SHOWN
    assert "1 of 2 trainings" in one.answers[1].sentence
    assert len(one.trainings) == 2


def test_a_start_from_clusters_is_no_evidence_that_training_added():
    (found,) = three_questions(
        recorded(Foreign(0, [-1.0, 1.0]), tokens_of(0), cluster_start=True), **OPTIONS
    )
    assert answers(found) == [YES, NOT_SHOWN, YES]
    assert "started from clusters" in found.answers[1].sentence
    other = recorded(Foreign(0, [-1.0, 1.0]), tokens_of(1), cluster_start=True)
    (found,) = three_questions(
        recorded(Foreign(0, [-1.0, 1.0]), tokens_of(0)), seeds=[other], **OPTIONS
    )
    assert "1 of 2 trainings" in found.answers[1].sentence


def test_what_is_missing_is_not_measured():
    bare = Recording(
        LABELS, [RecordedLayer("L1", np.tile(LABELS[:, None, None], (1, 4, 1)), 2)], ["cat", "dog"]
    )
    (found,) = three_questions(bare, **OPTIONS)
    assert answers(found) == [YES, NOT_MEASURED, NOT_MEASURED]
    assert "not forced" in found.answers[2].sentence
    (unknown,) = three_questions(replace(bare, labels=np.full(IMAGES, -1)), **OPTIONS)
    assert answers(unknown) == [NOT_MEASURED] * 3
    assert unknown.load.share.tolist() == [0.5, 0.5]
    unread = recorded(Foreign(0, [-1.0, 1.0]), tokens_of(0), read=False)
    (found,) = three_questions(unread, **OPTIONS)
    assert "no logit reads" in found.answers[2].sentence


def test_what_guesses_no_better_than_chance_is_at_most_a_little():
    """Of 100 images 50 are cats; from the expert 50.9 are guessed: 0.9 of the 50 that the majority gets wrong."""
    layer = RecordedLayer("L1", np.tile(LABELS[:, None, None], (1, PATCHES, 1)), 2)
    found = measure_layer(Recording(LABELS, [layer], ["cat", "dog"]), 0, seed=0, **OPTIONS)
    assert experts_answer(found).answer == YES
    for value, word in ((0.509, A_LITTLE_WORD), (0.5, A_LITTLE_WORD), (0.511, YES)):
        reading = replace(found.readings[0], guess=found.readings[0].guess._replace(value=value))
        answer = experts_answer(replace(found, readings=(reading, *found.readings[1:])))
        assert answer.answer == word, value
        assert f"guesses {100 * value:.1f} % right, chance 50.0 %" in answer.detail


def test_a_negative_number_of_bits_has_a_minus_sign_and_zero_has_none():
    rng = np.random.default_rng(0)
    layer = RecordedLayer("L1", rng.integers(2, size=(IMAGES, PATCHES, 1)), 2, inputs=tokens_of(0))
    (found,) = three_questions(Recording(LABELS, [layer], ["cat", "dog"]), **OPTIONS)
    told = json.dumps([answer.to_json() for answer in found.answers], ensure_ascii=False)
    assert not re.search(r"(?<![\w−])-\d", told)
    assert "−0.000" not in told


def test_a_little_is_a_small_share_of_what_the_input_tells():
    rng = np.random.default_rng(6)
    follows = rng.random((IMAGES * 4, PATCHES)) < 0.15
    labels = np.arange(IMAGES * 4) % 2
    chosen = np.where(follows, labels[:, None], rng.integers(2, size=follows.shape))[..., None]
    layer = RecordedLayer("L1", chosen, 2, inputs=tokens_of(6, IMAGES * 4))
    (found,) = three_questions(Recording(labels, [layer], ["cat", "dog"]), **OPTIONS)
    assert found.answers[0].answer == A_LITTLE_WORD
    assert found.readings[0].bits.low > 0
    assert found.readings[0].bits.value / found.probe.bits.value < 0.1
    # Nine such patches together tell more of the image than one does.
    image = next(reading for reading in found.readings if reading.unit == "image")
    assert image.guess.value > found.readings[0].guess.value


def test_load_by_hand():
    load = Load(np.array([0.5, 0.25, 0.25, 0.0]), np.full((2, 4), 0.25))
    assert load.max_over_mean == 2  # 0.5 over 1/4
    assert load.effective == pytest.approx(2**1.5)  # exp of the entropy, 1.5 bits
    assert "load 2.00," in load.words
    assert "2.8 of 4" in load.words


def test_guess_by_hand():
    """Both halves: expert 0 is mostly of class 0, expert 1 of class 1. Three of four patches of an image are so."""
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    chosen = np.where(np.arange(4) < 3, labels[:, None], 1 - labels[:, None])
    counts = (chosen[..., None] == np.arange(2)).astype(np.float32)
    halves = np.array([True, False] * 4)
    guess, chance = guess_from_experts(counts, np.broadcast_to(labels[:, None], (8, 4)), halves)
    assert (guess.value, chance) == (0.75, 0.5)
    assert guess.low == guess.high == 0.75  # every image alike
    masked = counts.copy()
    masked[:4, 3] = 0  # four images without their odd patch: 24 of 28 right
    assert (
        guess_from_experts(masked, np.broadcast_to(labels[:, None], (8, 4)), halves)[0].value
        == 24 / 28
    )


def test_a_guess_is_made_on_images_that_it_was_not_fitted_on():
    """An expert of its own for every image tells all about those images and nothing about others."""
    labels = np.arange(40) % 2
    counts = np.eye(40, dtype=np.float32)[:, None]
    halves = np.arange(40) // 2 % 2 == 0
    guess, chance = guess_from_experts(counts, labels[:, None], halves)
    assert guess.value == chance == 0.5


def test_intervals_by_hand_and_over_images():
    part, whole = np.array([1.0, 0.0, 1.0, 1.0]), np.ones(4)
    found = ratio_interval(part, whole)
    spread = math.sqrt(0.75 * 0.25 / 3)  # of a mean of four
    z = 1.959964
    assert found.high - found.value == pytest.approx(
        3.182446 * spread
    )  # Student's, 3 degrees of freedom
    # As many patches again that repeat the first ones say nothing new: the same interval.
    rng = np.random.default_rng(0)
    chosen = np.where(
        rng.random((40, 6)) < 0.6, (np.arange(40) % 2)[:, None], rng.integers(2, size=(40, 6))
    )[..., None]
    once, often = (
        three_questions(
            Recording(np.arange(40) % 2, [RecordedLayer("L1", each, 2)], ["a", "b"]), **OPTIONS
        )[0]
        for each in (chosen, np.repeat(chosen, 16, axis=1))
    )
    assert often.readings[0].guess == pytest.approx(once.readings[0].guess)
    assert often.readings[0].bits == pytest.approx(once.readings[0].bits, abs=1e-6)
    # Agresti and Min: 3 images lost, 1 won, 96 unchanged.
    loss = np.array([1.0] * 3 + [-1.0] + [0.0] * 96)
    found = paired_interval(loss)
    assert found.value == 0.02
    assert found.high == pytest.approx(2 / 102 + z * math.sqrt(5 - 4 / 102) / 102)


def test_the_probe_deals_balanced_groups():
    tokens, labels = tokens_of(7), np.broadcast_to(LABELS[:, None], (IMAGES, PATCHES))
    halves = np.arange(IMAGES) // 2 % 2 == 0
    groups = probe_groups(tokens, labels, 4, halves, seed=0)
    assert groups.sum((0, 1)).tolist() == [IMAGES * PATCHES / 4] * 4
    assert groups.sum(-1).min() == groups.sum(-1).max() == 1
    # Two groups of each class.
    tables = np.einsum("ip,ipe->e", labels, groups)
    assert sorted(tables.tolist()) == [0, 0, IMAGES * PATCHES / 4, IMAGES * PATCHES / 4]


def test_object_background_parts_and_all_choices_are_named_apart():
    """The object's patches follow the class, the background's don't; the second choice knows nothing."""
    rng = np.random.default_rng(10)
    objects = np.broadcast_to(np.arange(PATCHES) < 4, (IMAGES, PATCHES))
    first = np.where(objects, LABELS[:, None], rng.integers(2, size=objects.shape))
    second = 2 + rng.integers(2, size=objects.shape)
    parts = np.where(objects, 1, 0)
    layer = RecordedLayer("L1", np.stack([first, second], -1), 4)
    (found,) = three_questions(
        Recording(LABELS, [layer], ["a", "b"], objects=objects, parts=parts), permutations=40
    )
    by = {(r.of, r.unit, r.choices, r.where): r for r in found.readings}
    assert by["class", "patch", "first", "object"].guess.value == 1
    assert by["class", "patch", "first", "background"].guess.value == pytest.approx(0.5, abs=0.1)
    assert by["class", "patch", "all", "object"].guess.value == pytest.approx(0.75, abs=0.06)
    assert by["class", "patch", "first", "everywhere"].guess.value == pytest.approx(
        (4 + 5 / 2) / 9, abs=0.05
    )
    assert ("part", "patch", "first", "everywhere") in by
    assert by["class", "image", "first", "object"].guess.value == 1
    text = " ".join(found.answers[0].numbers)
    for named in (
        "First choices, object only",
        "background only",
        "All choices",
        "as a histogram of the image",
    ):
        assert named in text
    assert "max/mean load" in text


def test_routing_by_image_stands_beside_a_linear_probe():
    tokens = tokens_of(11).mean(1, keepdims=True)
    layer = RecordedLayer("L1", LABELS[:, None, None], 2, inputs=tokens, by_image=True)
    (found,) = three_questions(Recording(LABELS, [layer], ["a", "b"]), **OPTIONS)
    assert "in 2 groups 100.0 %" in found.answers[0].sentence
    assert "clusters" in found.controls


def test_fewer_images_than_experts_are_not_compared_with_clusters():
    layer = RecordedLayer(
        "L1", LABELS[:6, None, None], 8, inputs=tokens_of(11)[:6, :1], by_image=True
    )
    (found,) = three_questions(Recording(LABELS[:6], [layer], ["a", "b"]), **OPTIONS)
    assert "clusters" not in found.controls
    assert "not compared" in found.answers[1].sentence


@pytest.fixture(scope="module")
def ours():
    model = bundled_model("pets")
    pictures = open_pictures(SyntheticPets(48, model.image_size, 0, "test"), model.image_size)
    return model, pictures, collect_routing(model, pictures, progress=False)


def test_forced_routes_are_those_of_the_model_and_of_a_swap(ours):
    model, pictures, trace = ours
    blocks, images = [layer.layer for layer in trace.layers], np.arange(6)
    own = np.asarray(trace.layers[1].expert_index)[images]
    logits = run_forced(model, pictures, blocks, 1, images, own)
    assert torch.from_numpy(logits).softmax(-1).numpy() == pytest.approx(
        trace.probabilities[images], abs=1e-5
    )
    pixels = network_input(model, read_images(pictures, images))
    with torch.inference_mode(), swap(model.net, blocks[1], 0, 3):
        expected, routings = forward_routing(model.net, pixels)
    prefix = routings[1].num_prefix_tokens
    exchanged = np.where(own == 0, 3, np.where(own == 3, 0, own))
    assert (routings[1].expert_index[:, prefix:].numpy() == exchanged).all()
    forced = run_forced(model, pictures, blocks, 1, images, exchanged)
    if prefix == 0:  # else the class token's route is swapped there and stays here
        assert forced == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.abs(forced - logits).max() > 1e-3


def test_a_model_of_ours_is_asked_everything(ours):
    model, pictures, trace = ours
    baselines = measure_baselines(model, pictures, trace, seeds=1)
    parts = np.random.default_rng(0).integers(3, size=(len(trace), trace.grid[0] * trace.grid[1]))
    recording = recording_of(
        model,
        pictures,
        trace,
        baselines=baselines,
        parts=parts,
        part_names=("background", "ear", "eye"),
    )
    found = three_questions(recording, seeds=[recording], permutations=20, draws=1)
    assert [layer.name for layer in found] == [layer.name for layer in trace.layers]
    for layer in found:
        assert NOT_MEASURED not in answers(layer)
        assert set(layer.controls) == {"untrained", "clusters"}
        assert layer.probe is not None
        assert len(layer.trainings) == 2
        written = json.loads(json.dumps(layer.to_json(), allow_nan=False))
        assert [answer["answer"] for answer in written["answers"]] == answers(layer)
        assert written["load"]["effective_experts"] == layer.load.effective
    old = recording_of(model, pictures, trace, before=trace, swap=False)
    (first, *_) = three_questions(old, permutations=20)
    assert set(first.controls) == {"before", "clusters"}
    assert first.answers[1].answer == NOT_SHOWN  # it tells exactly what it did before
    assert first.answers[2].answer == NOT_MEASURED


def test_a_model_that_says_it_began_as_clusters_is_credited_with_no_training(ours, tmp_path):
    """Wherever it was copied to, without its run's folder."""
    model, pictures, trace = ours
    started = copy.deepcopy(model.net)
    start_routers(started, [network_input(model, read_images(pictures, np.arange(24)))])
    save_model(replace(model, net=started), tmp_path)
    loaded = load_model(str(tmp_path))
    for net, expected in ((loaded.net, True), (model.net, False)):
        (first, *_) = recording_of(replace(model, net=net), pictures, trace, swap=False).layers
        assert first.cluster_start is expected


def test_an_interval_that_touches_zero_shows_nothing():
    layer = RecordedLayer("L1", np.tile(LABELS[:, None, None], (1, PATCHES, 1)), 2)
    found = measure_layer(Recording(LABELS, [layer], ["cat", "dog"]), 0, seed=0, **OPTIONS)
    reading = replace(found.readings[0], bits=found.readings[0].bits._replace(low=0.0))
    assert experts_answer(replace(found, readings=(reading,))).answer == NOT_SHOWN
