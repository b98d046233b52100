"""The gate's index into every expert's output equals an intervention; names and moved emoji follow their rules."""

from typing import Any, cast

import numpy as np
import pytest
import torch

from benchmarks.experts_pay import arms, knockout, report, runs
from benchmarks.experts_pay.arms import Pages, build
from benchmarks.experts_pay.knockout import MIXED, names_of, outputs_of, without
from moevision.analysis.intervention import Intervention, intervene
from moevision.data.emoji import GROUPS, EmojiPages, read_sheet


@pytest.fixture(scope="module")
def outputs() -> knockout.Outputs:
    net = build("patch-moe-8", seed=3).eval()
    with torch.no_grad():  # routes that differ: a new router sends all tokens nearly alike
        cast(Any, net).blocks[0].mlp.router.weight.normal_(std=2.0)
    return outputs_of(net, Pages("test", 0), 64)


def test_pages_without_experts_are_what_an_intervention_says(outputs: knockout.Outputs) -> None:
    images = Pages("test", 0).batch(0)[0][:64]
    with torch.inference_mode():
        plain = outputs.net(images).argmax(-1)
        ablate = [Intervention("ablate", layer=0, expert=expert) for expert in (1, 4, 6)]
        with intervene(outputs.net, *ablate):
            ablated = outputs.net(images).argmax(-1)
    labels = outputs.labels
    assert torch.equal(outputs.is_right(outputs.first_choice), plain == labels)
    assert torch.equal(without(outputs, np.array([1, 4, 6])), ablated == labels)
    moved = outputs.next_best(torch.eye(8, dtype=torch.bool)[[1, 4, 6]].any(0))
    assert (moved != outputs.first_choice).any()
    assert not torch.isin(moved, torch.tensor([1, 4, 6])).any()


def test_losses_of_a_group_are_of_its_own_pages(outputs: knockout.Outputs) -> None:
    """`away` is before minus after; all tokens moved at random is every token past its own expert."""
    every = np.arange(7)
    losses = knockout.losses_of_group(outputs, every, group=2)
    own = outputs.labels == 2
    before = outputs.is_right(outputs.first_choice)[own].float().mean()
    after = without(outputs, every)[own].float().mean()
    assert losses["away"] == pytest.approx(float(before - after))


def test_an_expert_is_named_above_half() -> None:
    table = np.zeros((3, len(GROUPS)), np.int64)
    table[0, 4], table[0, 1] = 51, 49
    table[1, 4], table[1, 1] = 50, 50
    assert names_of(table).tolist() == [4, MIXED, MIXED]  # 51 %, exactly half, no emoji at all


def test_bits_of_a_table() -> None:
    assert knockout.bits(np.eye(4, dtype=np.int64) * 5) == pytest.approx(2.0)  # log2 4
    assert knockout.bits(np.ones((4, 2), np.int64)) == pytest.approx(0.0)


def test_groups_are_those_of_the_emoji_on_the_page() -> None:
    pages = EmojiPages(3, split="test")
    groups = knockout.groups_of_cells(pages, 3)
    emoji = read_sheet().emoji
    assert [GROUPS[group] for group in groups[1]] == [emoji[n].group for n in pages.emoji(1)]


def test_clusters_see_the_cells_in_the_order_of_the_groups() -> None:
    pages = Pages("val", 1)
    pages.batch(0)
    cells = knockout.cell_pixels(pages, 2)
    assert cells.shape == (32, 768)
    page = pages.batches[0][1] / 255
    assert np.allclose(cells[16 + 6].reshape(16, 16, 3), page[16:32, 32:48])  # row 1, column 2


def tuning(arm: str, best: float) -> list[dict[str, Any]]:
    return [
        {
            "task": "groups",
            "arm": arm,
            "seed": runs.TUNING_SEED,
            "lr": lr,
            "val_top1": 0.8 - abs(np.log2(lr / best)) / 10,
        }
        for lr in runs.RATES
    ]


def test_rates_are_searched_past_an_edge_before_a_seed_runs() -> None:
    inner = [record for arm in arms.ARMS for record in tuning(arm, best=0.016)]
    first = next(run for run in runs.next_runs(inner) if run.seed != runs.TUNING_SEED)
    assert first == runs.Run("groups", "patch-dense-2", 0.016, 0)
    edge = [
        record
        for arm in arms.ARMS
        for record in tuning(arm, 0.032 if arm == "conv-moe-8" else 0.016)
    ]
    known = {(record["arm"], record["lr"]) for record in edge}
    new = [
        run
        for run in runs.next_runs(edge)
        if run.task == "groups" and (run.arm, run.lr) not in known
    ]
    assert [(run.arm, run.lr) for run in new] == [("conv-moe-8", 0.064)]


def test_no_rate_is_beyond_an_edge_while_rates_are_left() -> None:
    assert runs.next_rate(tuning("patch-moe-8", best=0.032)[1:], "patch-moe-8") is None
    assert runs.next_rate([], "patch-moe-8") is None


def test_the_fewest_experts_that_hold_ship() -> None:
    """Differences of +2 ± .1, +1 ± .1 and losses that are always 10 points larger: all hold; 16 are mostly named."""
    half = [[9, 1] + [0] * 7] * 4
    mixed = [[5, 5] + [0] * 7] * 4
    loss = {"away": 0.2, "random": 0.1, "named": 0.2, "others": 0.1}
    records: list[dict[str, Any]] = [
        {"arm": "patch-dense-4", "seed": s, "test_top1": 0.8 + s / 1000} for s in runs.SEEDS
    ]
    experts = {arm: mixed if arm.endswith("-8") else half for arm in arms.MOE}
    for arm in arms.MOE:
        for s in runs.SEEDS:
            group = loss | {"away": 0.2 + (s % 2) / 100, "named": 0.2 + (s % 3) / 100}
            records.append(
                {
                    "arm": arm,
                    "seed": s,
                    "test_top1": 0.82 + s / 500,
                    "experts": experts[arm],
                    "knock_out": {"without": {"flags": group}},
                }
            )
    assert report.holds(records, "patch-moe-8", "patch-dense-4")
    assert report.ships(records, "patch-dense-4") == "patch-moe-16"
    records[-1]["knock_out"]["without"] = {}  # the last seed of 32 experts has no name to take away
    assert not report.holds(records, "conv-moe-32", "patch-dense-4")


def test_the_interval_is_students() -> None:
    mean, low, high = report.interval([0.01, 0.02, 0.03])
    assert (mean, low) == pytest.approx((0.02, 0.02 - 4.302653 * 0.01 / 3**0.5))
    assert high == pytest.approx(2 * mean - low)
