"""The run folder's images and its summary: right numbers, nothing invented, odd runs drawn too."""

import json
import math
import threading
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from moevision.efficiency import ModelCost
from moevision.files import csv_text
from moevision.layers import LayerLoad
from moevision.stats import (
    PairedDifference,
    accuracy_interval,
    paired_difference,
    paired_macro_difference,
)
from moevision.train import plots
from moevision.train.finish import RunResult
from moevision.train.plots import (
    moving_average,
    plot_confusion,
    plot_curves,
    plot_examples,
    read_metrics,
)
from moevision.train.report import (
    ClassScores,
    ComparedModel,
    RunSummary,
    TestScores,
    TwinComparison,
    choose,
    read_summary,
    write_summary,
)
from tests.shared import missing

Row = dict[str, float | int]


def _write_csv(path: Path, rows: Iterable[Row]) -> Path:
    rows = list(rows)
    names = sorted({name for row in rows for name in row})
    path.write_text(csv_text(names, [[row.get(name, "") for name in names] for row in rows]))
    return path


def _rows(epochs: int, layers: tuple[str, ...], steps: int = 4) -> Iterable[Row]:
    """Rows as Lightning's CSVLogger writes them: each logging call fills only its own cells."""
    for step in range(epochs * steps):
        yield {"epoch": step // steps, "step": step, "lr": 1e-3 * step}
        yield {"epoch": step // steps, "step": step, "train/loss": 2.0 / (1 + step)}
        if step % steps == steps - 1:
            loads = {f"moe/{layer}/load_max": 1.2 for layer in layers}
            yield {"epoch": step // steps, "step": step, "val/loss": 1.0, "val/top1": 0.5, **loads}
    yield {"epoch": epochs, "step": epochs * steps, "test/top1": 0.5}


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that is saved, not rendered."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, out: kept.append(figure))
    return kept


def test_read_metrics_skips_empty_cells_and_sorts(tmp_path):
    """Loads of the test are no point of the validation, though they are logged under one name."""
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,train/loss,val/top1,test/top1,moe/0/load_max\n2,0.5,,,\n1,0.7,,,\n2,,0.25,,1.5\n,,,,\n8,,,0.4,1.9\n"
    )
    curves = read_metrics(path)
    assert set(curves) == {"train/loss", "val/top1", "test/top1", "moe/0/load_max"}
    np.testing.assert_array_equal(curves["train/loss"], [[1, 2], [0.7, 0.5]])
    np.testing.assert_array_equal(curves["val/top1"], [[2], [0.25]])
    np.testing.assert_array_equal(curves["moe/0/load_max"], [[2], [1.5]])
    np.testing.assert_array_equal(curves["test/top1"], [[8], [0.4]])


def test_smooth_by_hand_and_over_gaps():
    """span 3: weight 1/2. Weighted means: 1; (.5*.5*1 + .5*3)/.75; NaN is passed over."""
    smoothed = moving_average(np.array([1.0, 3.0, np.nan, 5.0]), span=3)
    np.testing.assert_allclose(
        smoothed, [1.0, 7 / 3, np.nan, (0.125 * 1 + 0.25 * 3 + 0.5 * 5) / 0.875]
    )
    np.testing.assert_array_equal(moving_average(np.array([4.0, 2.0]), span=1), [4.0, 2.0])


@pytest.mark.parametrize(
    ("epochs", "layers", "size"),
    [
        (3, ("blocks.1.mlp", "blocks.3.mlp"), (1620, 1020)),  # two by two panels
        (1, ("blocks.1.mlp",), (1620, 1020)),
        (3, (), (2430, 510)),  # no MoE layer: three panels in one row
        (2, tuple(f"blocks.{i}.mlp" for i in range(12)), (1620, 1020)),
    ],
)
def test_curves_of_usual_and_odd_runs(tmp_path, epochs, layers, size):
    out = tmp_path / "curves.png"
    plot_curves(_write_csv(tmp_path / "metrics.csv", _rows(epochs, layers)), out)
    with Image.open(out) as picture:
        assert picture.size == size


@pytest.mark.parametrize("count", [1, 2])
def test_curves_draw_every_layer(count, tmp_path, figures):
    layers = tuple(f"blocks.{i}.mlp" for i in range(count))
    plot_curves(_write_csv(tmp_path / "m.csv", _rows(3, layers)), tmp_path / "curves.png")
    (loads,) = [axes for axes in figures[0].axes if "load" in axes.get_title("left")]
    assert len({line.get_color() for line in loads.lines if len(line.get_xdata()) == 3}) == count


def test_curves_survive_a_diverged_run_and_there_are_none_where_nothing_was_logged(tmp_path):
    plot_curves(_write_csv(tmp_path / "m.csv", [{"epoch": 0, "step": 1}]), tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    rows: list[Row] = [{"step": 0, "train/loss": 1.0}, {"step": 1, "train/loss": float("nan")}]
    rows += [{"step": 2, "train/loss": float("inf")}, {"step": 2, "val/top1": float("nan")}]
    plot_curves(_write_csv(tmp_path / "m.csv", rows), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("values", "ends"), [((1.0, 1.0), (0.9, 1.0)), ((0.12, 0.87), (0.1, 0.9)), ((0.5,), (0.5, 0.6))]
)
def test_accuracy_is_drawn_in_its_own_range(values, ends, tmp_path, figures):
    """From the tenth below the lowest to the one above the highest, and never beyond 100 %."""
    rows: list[Row] = [{"step": step, "val/top1": value} for step, value in enumerate(values)]
    plot_curves(_write_csv(tmp_path / "m.csv", rows), tmp_path / "curves.png")
    assert figures[0].axes[0].get_ylim() == pytest.approx(ends)


def test_pictures_from_several_threads_equal_those_from_one(tmp_path):
    metrics = _write_csv(tmp_path / "m.csv", _rows(3, ("blocks.1.mlp",)))
    plot_curves(metrics, tmp_path / "alone.png")
    threads = [
        threading.Thread(target=plot_curves, args=(metrics, tmp_path / f"{i}.png"))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(tmp_path / f"{i}.png").read_bytes() for i in range(2)} == {
        (tmp_path / "alone.png").read_bytes()
    }


def test_confusion_equals_sklearn_and_marks_empty_classes(figures):
    labels, predictions = np.array([0, 0, 0, 1, 3]), np.array([0, 1, 1, 1, 0])
    plot_confusion(labels, predictions, list("abcd"), Path())
    axes = figures[0].axes[0]
    share = axes.images[0].get_array()
    expected = confusion_matrix(labels, predictions, labels=range(4), normalize="true")
    np.testing.assert_allclose(share[[0, 1, 3]], expected[[0, 1, 3]])
    assert share.mask[2].all()
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "a (3)",
        "b (1)",
        "c (0)",
        "d (1)",
    ]
    assert [text.get_text() for text in axes.texts] == [
        "1\n33 %",
        "2\n67 %",
        "1\n100 %",
        "1\n100 %",
    ]


def test_examples_of_mistakes(tmp_path):
    """Rows of unequal length, an image that can't be read any more, a name that would be a formula."""
    image = np.zeros((3, 32, 32), np.uint8)
    rows = {"$\\frac, taken for $x$": [image, image, "gone"], "cat, taken for dog": [image]}
    plot_examples(rows, tmp_path / "mistakes.png")
    with Image.open(tmp_path / "mistakes.png") as picture:
        assert picture.size == (3 * 225, 2 * 270)
    plot_examples({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_of_an_image_that_can_not_be_read_the_reason_is_drawn(tmp_path, figures):
    """On lines of 20 characters; its dollar signs start no formula."""
    image = np.zeros((3, 32, 32), np.uint8)
    plot_examples({"one": [image, "it can't be read ($x$)"], "two": [image]}, tmp_path / "x.png")
    texts = [[text.get_text() for text in axes.texts] for axes in figures[0].axes]
    assert texts == [[], ["it can't be read\n(\\$x\\$)"], [], []]
    assert [len(axes.images) for axes in figures[0].axes] == [1, 0, 1, 0]


@pytest.mark.parametrize("classes", [2, 20, 37, 102])
def test_confusion_of_few_and_many_classes(tmp_path, classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 500)
    predictions = np.where(rng.random(500) < 0.7, labels, rng.integers(0, classes, 500))
    names = [f"$ flower {i} with quite a long name" for i in range(classes)]  # $ isn't mathematics
    plot_confusion(labels, predictions, names, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) <= 2200
        assert min(picture.size) >= 600


@pytest.fixture
def summary() -> RunSummary:
    names = ("cat", "dog")
    return RunSummary(
        name="pets",
        model="vit_moe_micro (8 experts, 2 per token)",
        data="photos",
        image_size=32,
        split_note="Train: 80 % of photos. Test: 20 % of photos, never used for a choice.",
        class_counts={"train": dict.fromkeys(names, 400), "test": {"cat": 120, "dog": 80}},
        test=TestScores(
            correct=150,
            total=200,
            majority_class="cat",
            majority_correct=120,
            loss=0.5,
            balanced_accuracy=0.71,
            ece=0.034,
            per_class=[
                ClassScores("cat", 100, 120, 100 / 130, 0.8, 0.75),
                ClassScores("dog", 50, 80),
            ],
        ),
        cost=ModelCost(5_310_000, 2_650_000, 345_000_000, 1_200_000),
        epochs=5,
        steps=1234,
        batch_size=64,
        duration_s=3732.4,
        images_per_s=165.3,
        device="CPU",
        precision="fp32",
        seed=7,
        layers=[one_dead_expert()],
    )


def one_dead_expert() -> LayerLoad:
    """8 experts over 17 500 tokens of 100 images with 2 choices each: seven get 5 000 choices, one gets none.

    In half of the images these seven get 49 choices each, in the others 51.
    """
    counts = torch.tensor([0, *[5_000] * 7])
    return LayerLoad.from_sums(
        1, counts, counts, torch.tensor(1.7 * 17_500), torch.tensor(17_500), torch.tensor(0),
        count_squares=torch.tensor([0, *[50 * 49**2 + 50 * 51**2] * 7]), images=torch.tensor(100),
    )  # fmt: skip


def _lines(summary: RunSummary, folder: Path) -> list[str]:
    write_summary(summary, folder / "summary.md")
    return (folder / "summary.md").read_text(encoding="utf-8").splitlines()


def test_summary_says_what_was_measured_and_what_was_not(summary, tmp_path):
    (tmp_path / "curves.png").write_bytes(b"")
    text = "\n".join(_lines(summary, tmp_path))
    assert not missing(text, "| waiting for data | not measured |", "- `curves.png`:")
    absent = ("Strangers:", "- `confusion.png`:")
    assert missing(text, *absent) == [*absent]
    text = "\n".join(_lines(replace(summary, data_wait=0.0123, strangers=(13, 260)), tmp_path))
    assert not missing(
        text, "| 1.2 % of", "Strangers: 13 of 260 test images, 5.0 %", "false alarms"
    )


def test_summary_states_result_interval_and_baseline(summary, tmp_path):
    text = "\n".join(_lines(summary, tmp_path / "my run"))
    assert f" predict '{tmp_path}/my run/model' " in text  # quoted: the path has a space
    low, high = accuracy_interval(150, 200)
    assert f"(150 of 200; 95 % interval {100 * low:.1f} % to {100 * high:.1f} %)" in text
    assert not missing(text, "**75.0 % of", "“cat”, the most", "gets 60.0 %")
    assert summary.split_note in text
    assert "800 train, 200 test; 2 classes" in text
    assert "1 h 2 min" in text
    assert "top-5" not in text  # two classes
    assert "| cat | 83.3 % | 76.9 % | 80.0 % | 0.750 | 100 of 120 |" in text
    assert "| dog | 62.5 % | – | – | – | 50 of 80 |" in text


def test_summary_sets_loads_beside_their_chance_floor(summary, tmp_path):
    """Mean 4 375, so max/mean is 8/7 and CV² (1 + 7/49) / 8 = 1/7; log2 of 8 is 3.

    Chance: variance 100/99 of the counts of an image for 7 of 8 experts, 100 · 7/8 · 100/99 ÷ 4 375² = 0.0000046.
    """
    assert "| block 1 | 8 | 1.14 | 0.14 | 5e-06 | 1 | 1.70 of 3.00 |" in _lines(summary, tmp_path)
    assert "no Mixture-of-Experts layer" in "\n".join(_lines(replace(summary, layers=()), tmp_path))


def test_summary_of_a_twin_never_ranks_on_one_seed(summary, tmp_path):
    assert missing("\n".join(_lines(summary, tmp_path)), "its dense twin")
    pair = PairedDifference(-0.013, -0.034, 0.008, 200, 6, 9, 0.61)
    twin = TwinComparison(
        pair, "active FLOPs", 153, ModelCost(2_650_000, 2_650_000, 344_000_000), 600, 180
    )
    text = "\n".join(_lines(replace(summary, twin=twin), tmp_path))
    assert not missing(
        text, "**−1.3 percentage points**", "interval −3.4 to +0.8", "right: 6", "right: 9"
    )
    assert not missing(text, "its dense twin", "One seed:", "no ranking")
    assert "| test accuracy | 75.0 % | 76.5 % |" in text
    assert not {"better", "worse", "beats", "wins", "outperforms"} & set(text.lower().split())


def test_summary_lists_what_was_left_out(summary, tmp_path):
    assert "- Bad images: none." in _lines(summary, tmp_path)
    bad = [(f"a/{i}.jpg", "truncated", "train") for i in range(12)]
    lines = _lines(replace(summary, bad_images=bad, notes=["a note"]), tmp_path)
    assert "- a note" in lines
    assert any(line.startswith("- 12 files could") for line in lines)
    assert sum("truncated" in line for line in lines) == 10


def test_summary_says_how_it_gets_better(summary, tmp_path):
    """Of 400 images at 91.5 % one standard error is 1.4 points: 5.5 more in the last epoch of five are a rise."""
    (tmp_path / "scores.csv").write_bytes(b"")
    (tmp_path / "mistakes.png").write_bytes(b"")
    mistakes = [("cat|[x](y)", "d<b>og", 20, 120)]
    counts = summary.class_counts | {"val": {"cat": 200, "dog": 200}}
    summary = replace(summary, class_counts=counts)
    rising = replace(summary, validations=[0.2, 0.86, 0.915], mistakes=mistakes)
    text = "\n".join(_lines(rising, tmp_path))
    assert not missing(text, "from 86.0 % to 91.5 %", "`--epochs 10`", "moevision data score ")
    assert not missing(text, "20 of 120 test images of “cat\\|[x]\\(y)”", "“d&lt;b>og”")
    assert not missing(text, "](mistakes.png)")
    for validations in ([], [0.9], [0.903, 0.915], [0.9, 0.8]):
        flat = "\n".join(_lines(replace(summary, validations=validations), tmp_path / "other"))
        assert missing(flat, "still rose") == ["still rose"]
        assert missing(flat, "data score", "mistakes.png") == ["data score", "mistakes.png"]


def test_many_classes_show_the_weakest_and_names_cannot_break_tables(summary, tmp_path):
    names = [f"a|b\n<i>{i}" for i in range(30)]
    per_class = [ClassScores(name, i, 30) for i, name in enumerate(names)]
    many = replace(
        summary,
        class_counts={"train": dict.fromkeys(names, 5)},
        test=replace(summary.test, per_class=per_class, top5=0.9),
    )
    lines = _lines(many, tmp_path)
    recalls = [line for line in lines if " of 30 |" in line]
    assert len(recalls) == 10
    assert recalls[0] == r"| a\|b &lt;i>0 | 0.0 % | – | – | – | 0 of 30 |"
    assert any(line.startswith("| top-5 accuracy | 90.0 % |") for line in lines)


def entry(name: str, correct: list[int], *, ms: float | None = 1.0) -> ComparedModel:
    return ComparedModel(name, np.array(correct, dtype=bool), ms, 10.0, 60.0)


LABELS = np.array([0] * 90 + [1] * 10)


NAMES = ("linear probe", "dense fine-tune", "Mixture of Experts")


def test_the_simplest_that_is_not_shown_to_be_worse_is_recommended():
    """McNemar's p by SciPy's binomial test of the images that one model alone gets right."""
    # Against the best, 10 : 1 and 6 : 1 of 100 images.
    best = [1] * 99 + [0]
    worse, near = ([0] * count + [1] * (99 - count) + [1] for count in (10, 6))
    assert [binomtest(1, count + 1).pvalue < 0.05 for count in (10, 6)] == [True, False]
    entries = [entry(name, right) for name, right in zip(NAMES, (near, near, best), strict=True)]
    close = choose(entries, LABELS, unbalanced=False)
    assert close.recommended.name == "dense fine-tune"
    assert not missing(close.sentence, "Use dense: its", "lower", "of Experts (−5.0 points, ")
    assert [each.behind for each in close.contenders] == [
        paired_difference(entries[2].correct, each.correct) for each in entries
    ]
    far = choose(
        [entry(NAMES[0], near), entry(NAMES[1], worse), entries[2]], LABELS, unbalanced=False
    )
    assert far.recommended.name == "Mixture of Experts"  # a probe is as dear to predict with
    probe_is_best = choose([entry(NAMES[0], best), *entries[:0:-1]], LABELS, unbalanced=False)
    assert not missing(probe_is_best.sentence, "Use the linear", "higher accuracy")
    shown = choose([entry(NAMES[1], worse), entry(NAMES[2], best)], LABELS, unbalanced=False)
    assert not missing(shown.sentence, "Mixture of Experts: ", "higher accuracy", "One seed;")
    equal = choose([entry(NAMES[1], near), entry(NAMES[2], near[::-1])], LABELS, unbalanced=False)
    assert not missing(equal.sentence, "Use dense: ", "higher accuracy", "One seed;")
    best_is_dense = choose(
        [entry(NAMES[1], best), entry(NAMES[2], worse)], LABELS, unbalanced=False
    )
    assert best_is_dense.sentence == equal.sentence


@pytest.mark.parametrize("errors", [1, 10])
def test_without_a_dense_model_experts_are_not_recommended(errors):
    """Beside a linear probe alone: whether experts pay is what only a dense fine-tune can say."""
    models = [entry(NAMES[0], [0] * errors + [1] * (100 - errors)), entry(NAMES[2], [1] * 100)]
    said = choose(models, LABELS, unbalanced=False).sentence
    assert not missing(said, "dense model wasn't trained", "add --with-twin")
    assert "Use" not in said
    assert not missing(said, "The linear probe", "lower accuracy", f"(−{errors}.0 points")
    given = choose(models, LABELS, unbalanced=False, experts_given=True).sentence
    assert "with-twin" not in given  # which fit refuses where training began with experts
    assert "Use" not in given


def test_where_classes_are_unbalanced_their_mean_decides():
    """Nine tenths of one class: the model that always answers it has the higher accuracy, and is not recommended."""
    always = entry("dense fine-tune", [1] * 90 + [0] * 10)
    fair = entry("Mixture of Experts", [1] * 78 + [0] * 12 + [1] * 10)
    assert choose([always, fair], LABELS, unbalanced=False).recommended.name == "dense fine-tune"
    choice = choose([always, fair], LABELS, unbalanced=True)
    assert [each.balanced_accuracy for each in choice.contenders] == pytest.approx(
        [0.5, (78 / 90 + 1) / 2]
    )
    assert choice.recommended.name == "Mixture of Experts"
    behind = choice.contenders[0].behind
    assert behind.difference == pytest.approx((78 / 90 + 1) / 2 - 0.5)
    # With an image more in each class: 12 of 90 differences are -1, 10 of 10 are 1.
    spread = math.sqrt((12.5 - 12**2 / 91) / 91**2 + (10.5 - 10**2 / 11) / 11**2) / 2
    assert behind.high - behind.low == pytest.approx(2 * 1.959964 * spread, rel=1e-5)


def test_an_interval_over_many_classes_is_about_its_estimate():
    """100 classes of 10 images, in each 4 right in A alone and 1 in B alone: .3, and by hand .260 to .339."""
    a, b = (
        np.tile([1, 1, 1, 1, 0, 1, 1, 1, 1, 1], 100) > 0,
        np.tile([0, 0, 0, 0, 1, 1, 1, 1, 1, 1], 100) > 0,
    )
    found = paired_macro_difference(a, b, np.repeat(np.arange(100), 10))
    assert (found.difference, found.low, found.high) == pytest.approx((0.3, 0.260, 0.339), abs=6e-4)


def test_the_table_of_models_in_the_summary(tmp_path, summary):
    entries = [
        entry("linear probe", [1] * 90 + [0] * 10, ms=12.34),
        entry("Mixture of Experts", [1] * 99 + [0], ms=None),
    ]
    for unbalanced in (False, True):
        chosen = replace(summary, choice=choose(entries, LABELS, unbalanced=unbalanced))
        write_summary(chosen, tmp_path / "summary.md")
        text = (tmp_path / "summary.md").read_text()
        lines = text.splitlines()
        (head,) = (place for place, line in enumerate(lines) if "ms per image | MB" in line)
        table = lines[head : head + 4]  # head, rule, two models
        assert len({line.count("|") for line in table}) == 1, table
        assert [line.split(" |")[0] for line in table[2:]] == [
            "| linear probe",
            "| Mixture of Experts",
        ]
        assert table[2].endswith("| 12.3 | 10 | 1 min 0 s |")
        assert [cell.strip() for cell in table[3].split("|")[-5:-1]] == [
            "best",
            "not measured",
            "10",
            "1 min 0 s",
        ]
        (tmp_path / "summary.json").write_text(json.dumps(asdict(chosen), default=list))
        assert read_summary(tmp_path / "summary.json").choice == chosen.choice
    advice = "`--dense --model.optim.freeze all_but_head --trainer.max_epochs 1`"
    assert f"add\n{advice} to the command." in text
    given = replace(summary, choice=choose(entries, LABELS, unbalanced=False, experts_given=True))
    beside_no_dense = "\n".join(
        _lines(given, tmp_path)
    )  # which fit refuses where training began with experts
    assert advice.replace("--dense ", "") in beside_no_dense
    assert "--dense" not in beside_no_dense
    twin = TwinComparison(
        PairedDifference(0, 0, 0, 200, 6, 9, 1), "active FLOPs", 153, ModelCost(1, 1, 1), 600, 180
    )
    beside_twin = "\n".join(
        _lines(replace(chosen, twin=twin), tmp_path)
    )  # fit refuses --dense beside --with-twin
    assert f"give\n{advice} in place of `--with-twin`" in beside_twin


def test_the_headline_ends_with_the_advice(summary, tmp_path):
    models = [entry(name, [1] * 100) for name in NAMES]
    chosen = replace(summary, choice=choose(models, LABELS, unbalanced=False))
    plain, advised = (RunResult(each, tmp_path, {}, {}).headline for each in (summary, chosen))
    assert advised == f"{plain}\n{chosen.choice.sentence}"
