"""benchmarks/specialization/README.md: everything between its marks is the report of the committed runs."""

from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.specialization.rule import above_before
from benchmarks.study import Contrast
from tests.records import ROOT, Claim, Definition
from tests.records.studies import report, shown

FOLDER = ROOT / "benchmarks" / "specialization"
FILES = tuple(str(path.relative_to(ROOT)) for path in sorted(FOLDER.glob("runs/*.json")))
SCRATCH = tuple(str(path.relative_to(ROOT)) for path in sorted(FOLDER.glob("scratch/*.json")))
RECIPE = tuple(file for file in SCRATCH if file.endswith("/cifar-moe.json"))  # the bundled model
EPOCH = tuple(file for file in SCRATCH if "/cpu-moe-" in file)  # the study of sparsity's, of one epoch


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in report("specialization").parts_of(runs) if not part.startswith("#"))


def of_scratch(*runs: Any) -> list[dict[str, Any]]:
    """Each MoE layer of models trained from scratch: means over runs; the swap minus random swaps, 95 % by Student."""
    rows = []
    for layers in zip(*(run["layers"] for run in runs), strict=True):
        swaps = [layer["swap"] for layer in layers]
        more = Contrast("swap", "random", [swap["more"]["value"] for swap in swaps])
        clusters = [max(each["bits"]["value"] for each in layer["controls"]["clusters"] if each["unit"] == "patch")
                    for layer in layers]  # fmt: skip
        one = swaps[0]["points"]
        rows.append({
            "layer": layers[0]["name"], "runs": len(runs), "bits_of_clusters": fmean(clusters),
            "guess": fmean(layer["readings"][0]["guess"]["value"] for layer in layers),
            "bits": fmean(layer["readings"][0]["bits"]["value"] for layer in layers),
            "busiest": fmean(layer["load"]["max_over_mean"] for layer in layers),
            "effective": fmean(layer["load"]["effective_experts"] for layer in layers),
            "points": fmean(swap["points"]["value"] for swap in swaps), "low": one["low"], "high": one["high"],
            "random": fmean(swap["random"]["value"] for swap in swaps), "more": more.mean,
            "more_low": more.mean - more.half, "more_high": more.mean + more.half,
            "yes": sum(layer["answers"][2]["answer"] == "yes" for layer in layers),
            "added": sum(layer["answers"][1]["answer"] == "yes" for layer in layers),
        })  # fmt: skip
    return rows


def as_a_whole(*runs: Any) -> dict[str, Any]:
    """What models trained from scratch say together: answers of yes, and accuracy."""
    rows = of_scratch(*runs)
    return {
        "yes": sum(row["yes"] for row in rows), "added": sum(row["added"] for row in rows),
        "asked": len(rows) * len(runs),
        "least": 100 * min(run["test"]["correct"] / run["test"]["total"] for run in runs),
        "most": 100 * max(run["test"]["correct"] / run["test"]["total"] for run in runs),
    }  # fmt: skip


def of_recipe(run: Any) -> dict[str, Any]:
    """Both layers of the bundled CIFAR-10 model."""
    first, second = of_scratch(run)
    return {
        **{f"first_{name}": value for name, value in first.items()},
        **{f"second_{n}": v for n, v in second.items()},
    }


def _whole(data: str, *runs: Any) -> dict[str, Any]:
    """What the table of a data set's classes says as a whole."""
    study = report("specialization")
    settings = study.settings_of(runs, data, "class")
    assert {len(setting.runs) for setting in settings} == {3}
    assert [{setting.answer(question) for setting in settings} for question in range(3)] == [
        {"yes"}, {"not shown"}, {"not shown"}
    ]  # fmt: skip
    for setting in settings:
        bits = study._mean(setting, lambda layer: layer["readings"][0]["bits"]["value"])
        assert bits < study._mean(setting, lambda layer: study._control(layer, "clusters"))
    by_name = {setting.name: study._mean(setting, study.guess) for setting in settings}
    assert all(by_name[name.replace("token", "image")] > guess for name, guess in by_name.items() if "token" in name)
    guesses = [100 * guess for guess in by_name.values()]
    swaps = [float(study._swap(setting)[0].replace("−", "-")) for setting in settings]
    return {
        "settings": len(settings),
        "arms": len({setting.arm for setting in settings}),
        "least": min(guesses),
        "most": max(guesses),
        "chance": 100 * settings[0].layers[0]["readings"][0]["chance"],
        "swap": max(swaps),
    }


def yes(*runs: Any) -> dict[str, Any]:
    """How many settings of each data set answer each question with yes."""
    study = report("specialization")
    settings = {data: study.settings_of(runs, data, "class") for data in ("pets", "cifar10", "cats_vs_dogs")}
    asked = [each for of in settings.values() for each in of]
    trained = sum(all(above_before(layer) for layer in each.layers) for each in asked)
    return {
        "asked": len(asked),
        "trained": trained,
        **{data: f"{sum(each.answer(0) == 'yes' for each in of)} of {len(of)}" for data, of in settings.items()},
        **{
            name: sum(each.answer(question) == "yes" for of in settings.values() for each in of)
            for question, name in ((1, "added"), (2, "different"))
        },
    }


CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim(
        FILES,
        "in all {settings} settings (a setting is one layer of one of {arms} arms, with 3 seeds each): "
        "from the expert alone {least:.0f} to {most:.0f} % of the classes are guessed right, chance {chance:.1f} %",
        partial(_whole, "pets"),
    ),
    Claim(
        FILES, "change places costs {swap:.1f} points of accuracy in the mean of the setting", partial(_whole, "pets")
    ),
    Claim(
        FILES,
        "CIFAR-10 says the same in its {settings} settings: {least:.0f} to {most:.0f} % are guessed right, chance "
        "{chance:.1f} %, and the costliest swap takes {swap:.1f} points.",
        partial(_whole, "cifar10"),
    ),
    Claim(
        RECIPE,
        "| recipe, {layer} | 1 | {busiest:.2f} | {effective:.1f} | {guess:.1%} | {bits:.3f} | {bits_of_clusters:.3f} "
        "| {points:.1f} ({low:.1f} to {high:.1f}) | {random:.1f} |  | {yes} of 1 |",
        of_scratch,
    ),
    Claim(
        EPOCH,
        "| one epoch, {layer} | {runs} | {busiest:.2f} | {effective:.1f} | {guess:.1%} | {bits:.3f} "
        "| {bits_of_clusters:.3f} | {points:.1f} | {random:.1f} | {more:.1f} ({more_low:.1f} to {more_high:.1f}) "
        "| {yes} of {runs} |",
        of_scratch,
    ),
    Claim(
        EPOCH,
        "{least:.1f} to {most:.1f} % right after one epoch. Of their {asked} layers {yes} answer the third question "
        "with yes, and {added} the second",
        as_a_whole,
    ),
    Claim(
        RECIPE,
        "costs {first_points:.1f} points ({first_low:.1f} to {first_high:.1f}; random swaps {first_random:.1f}) in its "
        "first MoE layer, {second_points:.1f} ({second_low:.1f} to {second_high:.1f}; {second_random:.1f}) in the "
        "second",
        of_recipe,
    ),
]
DEFINITIONS = [
    Definition("three seeds each, effects below one or two points", "the width of the intervals of single runs"),
    Definition("the 95 % interval over images", "the level of `three_questions`"),
    Definition("in two of four the 95 % interval lies above 0", "Student's, over seeds, as the table's head says"),
    Definition("Chance of a right guess is 10 %", "one of ten classes, equally many images of each"),
]
