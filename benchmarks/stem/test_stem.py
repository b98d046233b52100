"""The study of the stem: a difference is the mean over the combinations of the other factors, seed by seed."""

import pytest

from benchmarks.stem import arms, effect_table, subject_of
from moevision.models.vit_moe import num_patches


def runs_of(gains: dict[str, float], seeds: int = 3) -> list[dict]:
    """Accuracies of one half and the gains of the second values, and what each seed adds to the stem's."""
    seconds = {"stem": "wide_stages", "embed_dim": 128, "depth": 4}
    return [
        {
            **arm,
            "seed": seed,
            "test_top1": 0.5
            + sum(gain for name, gain in gains.items() if arm[name] == seconds[name])
            + (0.01 * seed if arm["stem"] == "wide_stages" else 0),
            **{"flops_per_image": 1e6, "router_flops_per_image": 0},
            **{"active_parameters": 1_000_000, "total_parameters": 2_000_000},
        }
        for seed in range(seeds)
        for arm in arms()
    ]


def test_each_factor_is_averaged_over_the_others():
    """Stem: 20, 21, 22 points by seed, so 21 ± 4.303 · 1 / √3 = 2.5; width 2 and depth −1 in every seed."""
    text = effect_table(runs_of({"stem": 0.2, "embed_dim": 0.02, "depth": -0.01}))
    stem, width, depth = (line.split(" | ") for line in text.splitlines()[2:])
    assert stem[:2] == ["| `stem wide_stages` − `stem patch`", "+21.0 (+18.5 to +23.5)"]
    assert width[1] == "+2.0 (+2.0 to +2.0)"
    assert depth[1] == "−1.0 (−1.0 to −1.0)"
    assert stem[3] == "above |"


def test_a_seed_that_is_not_complete_counts_in_the_models_alone():
    runs = runs_of({"stem": 0.2})
    assert effect_table([*runs, {**runs[0], "seed": 7, "test_top1": 0.9}]) == effect_table(runs)


@pytest.mark.parametrize("arm", arms())
def test_every_model_is_the_recipe_but_for_its_arguments(arm):
    """64 tokens, two or four MoE blocks of the width, the recipe's router and optimizer."""
    subject = subject_of(arm)
    net = subject.build()
    assert (num_patches(net), net.embed_dim, len(net.blocks)) == (64, arm["embed_dim"], arm["depth"])
    assert (subject.arch["router"], subject.optim["name"]) == ("vmoe_top_k", "muon")
