"""Names of experts and the pages without them: what the card says, asked of the explorer; the typed pages' rule."""

import numpy as np
import torch

from benchmarks.demo.names import MODEL, Pages, answers, first_choices, right_at_random, typed_pages
from moevision.analysis.intervention import Intervention, intervene
from moevision.data.emoji import GROUPS, EmojiPages
from moevision.demo import bundled_model
from moevision.demo.models import open_entries


def pages_of(count: int) -> tuple[object, Pages]:
    model = bundled_model(MODEL)
    return model, Pages.of(model, EmojiPages(count, 64, 0, "test"), range(count))


def test_answers_without_experts_are_those_of_the_intervention() -> None:
    model, pages = pages_of(18)
    away = [Intervention("ablate", layer=0, expert=expert) for expert in (6, 7)]
    with torch.inference_mode(), intervene(model.net, *away):
        expected = model.net(pages.x).argmax(-1).numpy()
    assert np.array_equal(answers(model, pages, [6, 7]), expected)


def test_without_all_experts_a_layer_is_skipped() -> None:
    model, pages = pages_of(18)
    away = [Intervention("ablate", layer=0, expert=expert) for expert in range(8)]
    with torch.inference_mode(), intervene(model.net, *away):
        expected = model.net(pages.x).argmax(-1).numpy()
    assert np.array_equal(answers(model, pages, range(8)), expected)


def test_where_nothing_is_moved_at_random_a_page_stays() -> None:
    model, pages = pages_of(18)
    right = answers(model, pages) == pages.labels
    assert np.array_equal(right_at_random(model, pages, np.zeros(18, np.int64), 0), right)


def test_the_cards_names_hold_on_other_pages() -> None:
    """What a named expert takes is mostly of its group, of an unnamed one not: on 450 pages, give or take 8 %."""
    model, pages = pages_of(450)
    (entry,) = (one for one in open_entries(None) if one.card.id == MODEL)
    choices = first_choices(model, pages)
    named = {one["expert"]: one for one in entry.card.names}
    for expert in range(8):
        groups = np.bincount(pages.groups[choices == expert], minlength=len(GROUPS))
        share = groups.max() / groups.sum()
        if expert in named:
            assert GROUPS[int(groups.argmax())] == named[expert]["name"]
            assert abs(share - named[expert]["share"]) < 0.08
        else:
            assert share < 0.58
    assert {name for name in entry.card.without} == {one["name"] for one in entry.card.names}


def test_a_nearly_empty_page_is_a_guess_and_a_full_one_is_not() -> None:
    model = bundled_model(MODEL)
    assert typed_pages(model, 4, 180) < 0.3
    assert typed_pages(model, 16, 180) > 0.8
