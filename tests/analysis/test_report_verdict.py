"""The report's verdict, on traces whose truth is known."""

import numpy as np

from moevision.analysis.specialization import FOUND, NOT_FOUND, OPEN, Assignments, listed, specialization, verdict_of


def planted_trace(make_trace, rng, follows_class):
    """120 images of 2 classes, 16 patches, 2 experts: expert ≡ class with 5 % exceptions, or a coin per patch."""
    labels = np.arange(120) % 2
    coin = rng.integers(0, 2, (120, 16, 1))
    chosen = np.where(rng.random(coin.shape) < 0.05, coin, labels[:, None, None]) if follows_class else coin
    return make_trace(chosen, labels=labels, num_experts=2, grid=(4, 4), class_names=("cat", "dog"))


def baseline(trace):
    """Routing that knows nothing: position parity."""
    index = np.broadcast_to((np.arange(16) % 2)[None, :, None], (len(trace), 16, 1)).astype(np.int16)
    return {"hash_position": [Assignments(None, 0, index, np.arange(len(trace)), 2)]}


def verdict_on(trace, **options):
    found = specialization(trace, about=("class",), num_permutations=100, **options)
    return found, verdict_of(found, [(layer.layer, layer.name) for layer in trace.layers])


def test_a_planted_specialization_is_found(make_trace):
    trace = planted_trace(make_trace, np.random.default_rng(0), True)
    other = planted_trace(make_trace, np.random.default_rng(1), True)
    found, verdict = verdict_on(trace, baselines=baseline(trace), seeds=[other])
    assert verdict["answer"] == FOUND
    assert verdict["headline"] == "Learned specialization in L1: its routing depends on the class"
    (sentence,) = verdict["layers"][0]["sentences"]
    # The effect in bits stands before the p-value; H(class) is 1 bit, and 2.5 % of the patches are exceptions.
    assert sentence.index("bits") < sentence.index("p = ")
    assert found[0].estimate.value_bits > 0.7
    assert "does not say that the answer needs these experts" in verdict["explanation"]


def test_without_other_trainings_it_stays_open(make_trace):
    trace = planted_trace(make_trace, np.random.default_rng(0), True)
    _, verdict = verdict_on(trace, baselines=baseline(trace))
    assert verdict["answer"] == OPEN
    assert verdict["headline"] == "Open: L1 passes every comparison made, but was not compared with other trainings"
    assert "--seeds" in verdict["explanation"]


def test_no_specialization_is_a_result_in_plain_words(make_trace):
    trace = planted_trace(make_trace, np.random.default_rng(2), False)
    _, verdict = verdict_on(trace, baselines=baseline(trace), seeds=[trace])
    assert verdict["answer"] == NOT_FOUND
    assert verdict["headline"] == "No learned specialization found"
    assert "no more than shuffled images give by chance" in verdict["explanation"]
    assert "This is a result, not a failure" in verdict["explanation"]


def test_a_pattern_without_learning_is_not_learned(make_trace):
    trace = planted_trace(make_trace, np.random.default_rng(0), True)
    same = {"kmeans_colour": [Assignments(None, 0, trace.layers[0].expert_index, np.arange(len(trace)), 2)]}
    _, verdict = verdict_on(trace, baselines=same, seeds=[trace])
    assert verdict["answer"] == NOT_FOUND
    assert "matched by routing in which no router has learned" in verdict["explanation"]


def test_what_other_trainings_do_not_repeat_is_not_learned(make_trace):
    trace = planted_trace(make_trace, np.random.default_rng(0), True)
    other = planted_trace(make_trace, np.random.default_rng(2), False)
    _, verdict = verdict_on(trace, baselines=baseline(trace), seeds=[other])
    assert verdict["answer"] == NOT_FOUND
    assert "not repeated by other trainings" in verdict["explanation"]


def test_words_are_listed():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
