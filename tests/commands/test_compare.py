"""`moevision compare`: by hand, by scipy and by enumeration; what can't be compared is refused in a sentence."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moevision.files import csv_text
from moevision.models.safe_files import read_yaml
from moevision.stats import Gap, detectable_on, mcnemar_p_value
from moevision.train.report import ComparedModel, choose
from tests.shared import assert_names, refused, succeeded

FINISHED = Path(__file__).parents[1] / "fixtures" / "formats" / "0.1" / "runs" / "finished"


COLUMNS = ("image", "label", "prediction", "probability", "correct")


def make(name, correct, seed=0, *, dogs=0, summary=None, **options):
    """A finished run with these answers; the last `dogs` images are of dogs, the others of cats."""
    folder = Path("runs") / name
    shutil.copytree(FINISHED, folder)
    kinds = ["cat"] * (len(correct) - dogs) + ["dog"] * dogs
    rows = [
        (f"{kind}/{number}.png", kind, kind if right else "owl", "0.9", int(right))
        for number, (kind, right) in enumerate(zip(kinds, correct, strict=True))
    ]
    (folder / "predictions_test.csv").write_text(csv_text(COLUMNS, rows))
    facts = json.loads((folder / "summary.json").read_text())
    facts |= {"seed": seed, **(summary or {})}
    facts["test"] |= {"correct": sum(correct), "total": len(correct)}
    (folder / "summary.json").write_text(json.dumps(facts))
    text = (folder / "config.yaml").read_text()
    for option, value in {"seed_everything": seed, **options}.items():
        text, count = re.subn(rf"(?m)^( *{option}): .*", rf"\1: {value}", text)
        assert count, option
    (folder / "config.yaml").write_text(text)
    return str(folder)


def compared(cli, *runs):
    """What is printed, and what is written."""
    outcome = succeeded(cli("compare", *runs, "--json", "out.json"))
    assert outcome.err == ""
    return outcome.out, json.loads(Path("out.json").read_text())


def cells(both, only_a, only_b, neither):
    a = [1] * (both + only_a) + [0] * (only_b + neither)
    return a, [1] * both + [0] * only_a + [1] * only_b + [0] * neither


def test_two_runs_by_hand(cli):
    """Airway hyper-responsiveness, 21 children (1, 1, 7, 12), with Tango's interval as printed by Fagerland et al.

    Statistics in Medicine 33 (2014) 2850-2875. McNemar's exact p by hand: 2 (1 + 8) / 2^8 = .0703.
    """
    a, b = cells(1, 1, 7, 12)
    out, facts = compared(cli, make("one", a), make("two", b, router="hash"))
    assert_names(out, "A − B: −28.6", "interval −51.7 to −2.6", "21 test images.")
    assert_names(out, "right on 1", "only B on 7", "p = 0.070.", "No difference found")
    assert "Use " not in out, "neither has no experts"
    assert_names(out, "exclude ±51.7 points", "model.arch.router (null, hash).")
    low, high = stats.binomtest(2, 21).proportion_ci(method="wilson")
    assert f"9.5 % ({100 * low:.1f} % to {100 * high:.1f} %)" in out
    assert facts["p_value"] == 18 / 256
    assert facts["interval"] == pytest.approx([-0.517, -0.026], abs=5e-4)
    assert facts["verdict"] == "no difference found"
    assert facts["differ_in"] == {"model.arch.router": ["null", "hash"]}
    cost = json.loads((FINISHED / "summary.json").read_text())["cost"]
    assert facts["a"][0]["flops_per_image"] == cost["flops_per_image"]
    assert compared(cli, "runs/one", "runs/two") == (out, facts)
    assert "A is better" in compared(cli, make("right", [1] * 30), make("wrong", [0] * 30))[0]


def test_a_run_and_its_twin_are_compared_as_fit_does(cli, tiny_run):
    _, facts = compared(cli, tiny_run, tiny_run / "twin")
    (pair,) = facts["by_seed"]
    assert pair.pop("seeds") == [0, 0]
    assert pair == json.loads((tiny_run / "summary.json").read_text())["twin"]["difference"]
    assert list(facts["differ_in"]) == ["model.arch.twin"]


@pytest.mark.parametrize(
    ("only_moe", "only_dense", "both", "recommended"),
    [
        (6, 10, 329, "dense"),  # of 372 photos of clothes: 335 against 339
        (30, 19, 300, "dense"),  # 3 points, which 372 images don't show
        (35, 11, 300, "MoE"),  # p = .0005
        (11, 35, 300, "dense"),
    ],
)
def test_fit_and_compare_recommend_the_same(cli, only_moe, only_dense, both, recommended):
    """summary.md's recommendation beside what compare says of the same two runs."""
    moe, dense = cells(both, only_moe, only_dense, 372 - both - only_moe - only_dense)
    out, facts = compared(cli, make("moe", moe), make("dense", dense, summary={"layers": []}))
    of_compare = "MoE" if facts["verdict"] == "A is better" else "dense"
    assert ("Use B:" in out) == (facts["verdict"] == "no difference found")
    models = [
        ComparedModel(name, np.array(correct, dtype=bool), None, 1.0, 1.0)
        for name, correct in (("dense fine-tune", dense), ("Mixture of Experts", moe))
    ]
    choice = choose(models, np.zeros(372, dtype=int), unbalanced=False)
    of_fit = "MoE" if choice.recommended.name == "Mixture of Experts" else "dense"
    assert of_compare == of_fit == recommended
    model = {"dense": "dense", "MoE": "the Mixture of Experts"}[recommended]
    assert choice.sentence.startswith(f"Use {model}: ")


RIGHT = {"moe": {0: 15, 1: 16, 2: 18, 7: 20}, "dense": {0: 14, 1: 14, 2: 13, 5: 1}}
"""Of 20 images, by seed; seeds 7 and 5 have no partner."""


def test_several_seeds_are_scipys_paired_t_test(cli):
    routers = {"moe": "null", "dense": "hash"}
    runs = [
        make(f"{name}-{seed}", [1] * right + [0] * (20 - right), seed, router=routers[name])
        for name, by_seed in RIGHT.items()
        for seed, right in by_seed.items()
    ]
    out, facts = compared(cli, *reversed(runs[4:]), *runs[:4])  # dense first; any order of seeds
    moe, dense = ([RIGHT[name][seed] / 20 for seed in (0, 1, 2)] for name in ("moe", "dense"))
    expected = stats.ttest_rel(dense, moe)
    assert facts["p_value"] == pytest.approx(expected.pvalue)
    assert facts["interval"] == pytest.approx(expected.confidence_interval())
    assert facts["difference"] == pytest.approx(-8 / 60)
    assert [pair["seeds"] for pair in facts["by_seed"]] == [[0, 0], [1, 1], [2, 2]]
    assert [round(20 * pair["difference"]) for pair in facts["by_seed"]] == [-1, -2, -5]
    assert "seed 2: dense-2 − moe-2 = −25.0 (−" in out
    widest = 100 * max(abs(end) for end in expected.confidence_interval())
    assert_names(out, "Left out", "dense-5, moe-7.", f"exclude ±{widest:.1f} points.")


def test_equal_differences_have_no_interval(cli):
    runs = [
        make(f"{depth}-{seed}", [1] * (depth + seed) + [0] * (10 - depth - seed), seed, depth=depth)
        for depth in (4, 3)
        for seed in (0, 1)
    ]
    out, facts = compared(cli, *runs)
    assert_names(out, "A − B: +10.0", "10 test images.", "no interval")
    assert facts["p_value"] is None


BALANCED = {"monitor": "val/balanced_acc"}


def test_unbalanced_classes_are_compared_by_balanced_accuracy(cli):
    """Of 90 cats A has 9 more right, of 10 dogs 7 fewer: +2 points of accuracy, (.1 - .7) / 2 of balanced accuracy.

    The interval by hand, with one image more in each class that adds half to the sum of squares: mean 9 / 91 and
    variance (9 + .5 - 9^2 / 91) / 91^2 for cats, -7 / 11 and (7 + .5 - 7^2 / 11) / 11^2 for dogs.
    """
    a = [1] * 90 + [0] * 7 + [1] * 3
    b = [0] * 9 + [1] * 81 + [1] * 10
    out, facts = compared(cli, make("one", a, dogs=10, summary=BALANCED), make("two", b, dogs=10))
    assert facts["difference"] == pytest.approx(-0.3)
    centre = (9 / 91 - 7 / 11) / 2
    error = math.sqrt((9.5 - 81 / 91) / 91**2 + (7.5 - 49 / 11) / 11**2) / 2
    ends = [centre - 1.959964 * error, centre + 1.959964 * error]
    assert facts["interval"] == pytest.approx(ends)
    assert facts["detectable"] == pytest.approx((1.959964 + 0.841621) * error)
    assert_names(out, "B is better.", "balanced accuracy")


def test_one_image_of_a_class_tells_no_models_apart(cli):
    """All cats alike, and the one dog right in A only: half of the balanced accuracy, by one image."""
    a, b = [1] * 99 + [1], [1] * 99 + [0]
    out, _ = compared(cli, make("one", a, dogs=1, summary=BALANCED), make("two", b, dogs=1))
    assert_names(out, "+50.0 points", "balanced accuracy", "No difference found")


def test_the_detectable_difference_has_its_power_by_enumeration():
    """All outcomes of 40 images, ten of them right in one model only: the test is significant with 80 %."""
    n, discordant = 40, 10
    difference = detectable_on(n, discordant)
    share = max(discordant / n, difference)
    p_a, p_b = (share + difference) / 2, (share - difference) / 2
    found = sum(
        stats.multinomial.pmf([a, b, n - a - b], n, [p_a, p_b, 1 - p_a - p_b])
        for a, b in itertools.product(range(n + 1), repeat=2)
        if b < a and a + b <= n and mcnemar_p_value(a, b) <= 0.05
    )
    assert found == pytest.approx(0.8, abs=1e-6)


def test_many_images_detect_what_the_normal_approximation_says():
    """Miettinen, Biometrics 24 (1968) 339-352: n d^2 = (z_a sqrt(s) + z_b sqrt(s - d^2))^2 for a share s of discord."""
    difference, share = detectable_on(100_000, 8_000), 0.08
    reach = 1.959964 * math.sqrt(share) + 0.841621 * math.sqrt(share - difference**2)
    assert 100_000 * difference**2 == pytest.approx(reach**2, rel=0.02)


def test_too_few_images_detect_nothing(cli):
    """Five discordant images of five, all one way, have p = 2 / 2^5 > .05; six have 2 / 2^6."""
    assert math.isnan(detectable_on(5, 5))
    assert 0.9 < detectable_on(6, 0) <= 1
    outcome = cli("compare", make("one", [1] * 5), make("two", [0] * 5))
    assert_names(outcome.out, "No difference would", "80 % power", "test on more.")


def test_a_gap_is_ttest_rel():
    first, second = np.array([87.2, 86.9, 87.7, 87.1]), np.array([86.8, 87.0, 87.1, 86.2])
    expected = stats.ttest_rel(first, second)
    gap = Gap.of(list(first - second))
    assert (gap.mean, gap.p_value) == pytest.approx((0.45, expected.pvalue))
    assert (gap.low, gap.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert gap.error == pytest.approx(np.std(first - second, ddof=1) / 2)
    assert all(
        math.isnan(value) for value in (Gap.of([1.0, 1.0]).p_value, Gap.of([1.0]).detectable)
    )


def changed(file, old, new):
    path = Path(file)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


PREDICTIONS = "runs/b/predictions_test.csv"


def write(name, text):
    return lambda: Path("runs/b", name).write_text(text)


def drawn_anew():
    for name, seed in (("a", 0), ("b", 1)):
        changed(f"runs/{name}/config.yaml", "path: ./pets", "path: synthetic_pets")
        changed(f"runs/{name}/config.yaml", "\n  seed: 0", f"\n  seed: {seed}")


NO_CONFIG = "runs/b/config.yaml is no configuration: it must have keys"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: Path("runs/b/summary.json").unlink(), "fit --resume runs/b`, then compare."),
        (lambda: Path(PREDICTIONS).unlink(), f"{PREDICTIONS} can't be read"),
        (write("predictions_test.csv", "name\n1\n"), f"{PREDICTIONS} can't be read ('image')"),
        # As a full disk leaves a copy.
        (write("predictions_test.csv", csv_text(COLUMNS, [])), f"{PREDICTIONS} can't be read"),
        (
            lambda: changed(PREDICTIONS, "cat/0.png", "cat/99.png"),
            "a and b were not tested on the same images: 2 of 5 are in one of them only, such as 'cat/0.png'",
        ),
        (
            lambda: changed(PREDICTIONS, "cat/0.png,cat", "cat/0.png,dog"),
            "2 of 5 are in one of them only, such as 'cat/0.png' with the label 'cat'",
        ),
        (write("config.yaml", ""), NO_CONFIG),
        (write("config.yaml", "- data"), NO_CONFIG),
        (drawn_anew, "drawn images depend on --data.seed"),
    ],
)
def test_runs_that_cannot_be_compared(cli, change, words):
    make("a", [1, 0, 0, 0])
    make("b", [1, 1, 0, 0])
    change()
    assert refused(cli("compare", "runs/a", "runs/b"), words).out == ""


def test_runs_that_are_not_two_sides(cli):
    a, b = make("a", [1, 0]), make("b", [1, 0], 1)
    many = [
        make(f"{router}{seed}", [1, 0], seed, router=router)
        for router in ("hash", "soft")
        for seed in (1, 2)
    ]
    for runs, words in (
        ([a], "give two, or several seeds"),
        ([a, a], "runs/a is given twice"),
        ([a, "runs"], "runs is no run folder"),
        ([a, b, make("c", [1, 0], 2)], "These runs are of one recipe"),
        (
            [a, *many],
            "of 3 recipes, by everything in config.yaml but the seed (a; hash1, hash2; soft1, soft2). They "
            "differ in model.arch.router.",
        ),
        ([a, b, *many[1:2]], "0 seeds in common and need two: seeds 0, 1 and seed 2"),
        ([*many[:3], make("soft", [1, 0], None, router="soft")], "1 seed in common and need two"),
        (
            [*many, make("again", [1, 0], 1, router="hash")],
            "again has the seed of hash1, 1, so that both began",
        ),
    ):
        assert refused(cli("compare", *runs), words).out == ""
    Path("mine.json").write_text("{}")
    for place, words in (
        ("mine.json", "--json another"),
        ("mine.json/out.json", "give another place"),
    ):
        refused(cli("compare", a, b, "--json", place), "mine.json", words)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"summary": {"batch_size": 16}},
            "images per step (8, 16)",
        ),  # as of two devices instead of one
        ({"max_time": "00:00:10:00"}, "trainer.max_time (null, 00:00:10:00)"),
        (
            {"callbacks": "[{class_path: EarlyStopping}]"},
            "trainer.callbacks (null, [{'class_path': 'EarlyStopping'}])",
        ),
    ],
)
def test_what_changes_the_training_makes_another_recipe(cli, change, said):
    outcome = succeeded(cli("compare", make("a", [1, 0]), make("b", [1, 0], 1, **change)))
    assert f"A and B differ in {said}." in outcome.out


def test_options_that_only_watch_make_no_recipe(cli):
    """Names, logging and how often to save differ; what the guard does makes another recipe."""
    free = [{"log_every_n_steps": 10 + seed, "every_minutes": 5.0 + seed} for seed in (0, 1)]
    runs = [
        make(f"{kind}-{seed}", [1, seed], seed, max_skips=skips, **free[seed])
        for kind, skips in (("a", 10), ("b", 2))
        for seed in (0, 1)
    ]
    outcome = succeeded(cli("compare", *runs))
    assert_names(outcome.out, "differ in guard.max_skips (10, 2).")
    assert read_yaml("runs/a-1/config.yaml")["checkpoint"]["every_minutes"] == 6
