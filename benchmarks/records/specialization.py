"""benchmarks/specialization/README.md: everything between its marks is the report of the committed runs."""

from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.records import Claim, Definition
from benchmarks.records.studies import report, shown
from benchmarks.specialization.rule import above_before
from benchmarks.study import Contrast

FILES = ("benchmarks/specialization/runs.jsonl",)
SCRATCH = "benchmarks/specialization/scratch.jsonl"
SAME = "benchmarks/specialization/same_patches.jsonl"
BUNDLED = tuple(f"{SCRATCH}#{name}" for name in ("cifar10", "pets", "cats_vs_dogs"))
RERUN = tuple(f"{SCRATCH}#{name}" for name in ("cifar10", "pets", *(f"small-s{seed}" for seed in range(6))))
SEEDS = tuple(f"{SCRATCH}#small-s{seed}" for seed in range(6))
TITLES = {"cifar10": "CIFAR-10", "pets": "drawn pets", "cats_vs_dogs": "cats and dogs"}
COSTS = ("without", "routes", "favourite", "any_two", "more")


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in report("specialization").parts_of(runs) if not part.startswith("#"))


def _numbers(swap: Any) -> dict[str, Any]:
    """The numbers of one layer of one run: points and nats of each cost, knock-outs per 100 choices."""
    costs = {"whole": {name: swap[name] for name in ("points", "log_loss", "moved")}, **{n: swap[n] for n in COSTS}}
    found = {f"{name}_{unit}": cost[unit]["value"] for name, cost in costs.items() for unit in ("points", "log_loss")}
    away = swap["knock_out"]
    return {**found, "share": 100 * swap["moved"], "equal": 100 * swap["favourite"]["moved"], "p": away["p_value"],
            **{name: round(100 * away[name], 3) or 0.0 for name in ("own", "others")}}  # fmt: skip


def of_bundled(*runs: Any) -> list[dict[str, Any]]:
    """Each layer of the bundled models, with intervals over images."""
    rows = []
    for run in runs:
        for layer in run["layers"]:
            swap = layer["swap"]
            ends = {
                f"{name}_{unit}_{end}": swap[name][unit][end]
                for name in COSTS for unit in ("points", "log_loss") for end in ("low", "high")
            }  # fmt: skip
            rows.append({"model": TITLES[run["name"]], "layer": layer["name"], "answer": layer["answer"],
                         "images": run["images"], **_numbers(swap), **ends})  # fmt: skip
    return rows


def of_seeds(*runs: Any) -> list[dict[str, Any]]:
    """Each layer of the small model: means over seeds, with Student's intervals over them."""
    rows = []
    for layers in zip(*(run["layers"] for run in runs), strict=True):
        each = [_numbers(layer["swap"]) for layer in layers]
        row: dict[str, Any] = {name: fmean(numbers[name] for numbers in each) for name in each[0]}
        for name in ("without_points", "without_log_loss", "more_log_loss", "more_points"):
            found = Contrast(name, "", [numbers[name] for numbers in each])
            row |= {f"{name}_low": found.mean - found.half, f"{name}_high": found.mean + found.half}
        answers = [layer["answer"] for layer in layers]
        told = ", ".join(f"{word}: {answers.count(word)}" for word in dict.fromkeys(sorted(answers, reverse=True)))
        rows.append({**row, "layer": layers[0]["name"], "seeds": len(runs), "answer": told,
                     "p": max(numbers["p"] for numbers in each),
                     "above": sum(layer["swap"]["more"]["log_loss"]["low"] > 0 for layer in layers)})  # fmt: skip
    return rows


def first_of(model: str) -> Callable[..., dict[str, Any]]:
    """The values of a bundled model's two layers, as first_... and second_..."""

    def values(*runs: Any) -> dict[str, Any]:
        first, second = [row for row in of_bundled(*runs) if row["model"] == TITLES[model]]
        return {
            f"{place}_{name}": x for place, row in (("first", first), ("second", second)) for name, x in row.items()
        }

    return values


def headline_of_bundled(*runs: Any) -> dict[str, Any]:
    """In how many layers the answer is yes, in how many a class's favourite costs more log-loss; CIFAR-10's numbers."""
    rows = of_bundled(*runs)
    counts = {"yes": [row["answer"] == "yes" for row in rows], "above": [row["more_log_loss_low"] > 0 for row in rows]}
    return {name: sum(each) for name, each in counts.items()} | {"of": len(rows), **first_of("cifar10")(*runs)}


def over_seeds(*runs: Any) -> dict[str, Any]:
    """What the six seeds say together."""
    rows = of_seeds(*runs)
    top1 = [100 * run["top1"] for run in runs]
    return {
        "steps": runs[0]["steps"], "above": sum(row["above"] for row in rows), "asked": len(rows) * len(runs),
        "seeds": len(runs), "least": min(top1), "most": max(top1),
        **{f"first_{name}": x for name, x in rows[0].items()}, **{f"second_{name}": x for name, x in rows[1].items()},
    }  # fmt: skip


def on_same_patches(*runs: Any) -> dict[str, Any]:
    """A third expert in the place of a favourite, and of the same patches' other choice; all else is as before.

    Nats of each layer of the bundled models; of the small model the mean of the differences, and how many lie above 0.
    """
    told: dict[str, Any] = {}
    for run in runs:
        for layer in run["layers"]:
            swap = layer["swap"]
            told[f"{run['name']}_{layer['name']}"] = {
                name: f"{swap[name]['log_loss']['value']:.3f} ({swap[name]['log_loss']['low']:.3f} to "
                f"{swap[name]['log_loss']['high']:.3f})" for name in ("same_patches", "their_other", "beyond_patches")
            }  # fmt: skip
    seeds = [[layer["swap"]["beyond_patches"]["log_loss"] for layer in run["layers"]] for run in runs if "seed" in run]
    for place, layers in zip(("first", "second"), zip(*seeds, strict=True), strict=True):
        found = Contrast("", "", [layer["value"] for layer in layers])
        told[place] = f"{found.mean:.3f} ({found.mean - found.half:.3f} to {found.mean + found.half:.3f})"
    each = [layer for layers in seeds for layer in layers]
    return {**told, "above": sum(layer["low"] > 0 for layer in each), "of": len(each), "seeds": len(seeds)}


def unchanged(*runs: Any) -> dict[str, Any]:
    """That all other costs were measured again and are the same, but for rounding."""
    before, again = runs[: len(runs) // 2], runs[len(runs) // 2 :]
    for one, other in zip(before, again, strict=True):
        assert one["name"] == other["name"]
        for layer, same in zip(one["layers"], other["layers"], strict=True):
            numbers = [list(_numbers(each["swap"]).values()) for each in (layer, same)]
            assert np.allclose(*numbers, rtol=0, atol=1e-6)
    return {}


def dissociated(*runs: Any) -> dict[str, Any]:
    """In every layer a class's favourite costs its own images more, per choice that is taken away."""
    away = [layer["swap"]["knock_out"] for run in runs for layer in run["layers"]]
    assert all(each["own"] > each["others"] for each in away)
    return {"p": max(each["p_value"] for each in away)}


def headline(*runs: Any) -> dict[str, Any]:
    """How much the counts of the upcycled settings can say at all."""
    study = report("specialization")
    settings = [each for data in ("pets", "cifar10", "cats_vs_dogs") for each in study.settings_of(runs, data, "class")]
    zero = [each for each in settings if each.arm.startswith("noisy_top_k")]
    for each in zero:  # a router whose weights start at zero
        for layer in each.layers:
            assert next(r for r in layer["controls"]["before"] if r["unit"] == "patch")["bits"]["value"] < 5e-4
    image = [each for each in study.settings_of(runs, "pets", "class") if "image" in each.arm]
    return {
        "trained": sum(all(map(above_before, each.layers)) for each in settings), "asked": len(settings),
        "zero": sum(all(map(above_before, each.layers)) for each in zero),
        "clusters": max(study._mean(each, lambda layer: study._control(layer, "clusters")) for each in image),
    }  # fmt: skip


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


FIRST = (
    "in the first MoE layer of the bundled CIFAR-10 model (one seed) exchanging a class's favourite expert with any "
    "other costs {first_whole_points:.1f} points of accuracy, leaving the layer out {first_without_points:.1f}; at the "
    "same share of moved choices ({first_equal:.0f} %) the favourite costs {first_favourite_points:.1f} points, any "
    "two other experts {first_any_two_points:.1f} (difference {first_more_points:.1f}, {first_more_points_low:.1f} to "
    "{first_more_points_high:.1f}). Its second layer contributes nothing that is shown to the accuracy "
    "({second_without_points:.1f} points, {second_without_points_low:.1f} to {second_without_points_high:.1f}), only "
    "to the log-loss ({second_without_log_loss:.3f} nats)."
)
SMALL = (
    "In a small model the favourite costs more log-loss than any two others in {above} of {asked} layers of {seeds} "
    "seeds; the difference is {first_more_points:.1f} points in its first layer ({first_more_points_low:.1f} to "
    "{first_more_points_high:.1f} over seeds), {second_more_points:.1f} in its second ({second_more_points_low:.1f} to "
    "{second_more_points_high:.1f})."
)
HEADLINE = (
    "In {trained} of {asked} settings the router tells more than before training, but {zero} of the {trained} compare "
    "with a router that starts at zero; and none of {asked} tells more than clusters of its input, which tell up to "
    "{clusters:.2f} of 3 bits."
)

CLAIMS = [
    Claim(BUNDLED, FIRST, first_of("cifar10")),
    Claim(BUNDLED, "a class's favourite with any other costs {second_whole_points:.1f} points)", first_of("pets")),
    Claim(SEEDS, "{steps} steps on CIFAR-10), six seeds, {least:.1f} to {most:.1f} % right", over_seeds),
    Claim(
        BUNDLED,
        "{most:,} test images each (cats and dogs: all {least})",
        lambda *runs: {"least": runs[-1]["images"], "most": runs[0]["images"]},
    ),
    Claim(
        BUNDLED[:2] + SEEDS, "own is larger in every layer on CIFAR-10 and drawn pets (p at most {p:.3f}", dissociated
    ),
    Claim(SEEDS, SMALL, over_seeds),
    Claim(
        SAME,
        "in the favourite's place costs {cifar10_L0[same_patches]} nats in CIFAR-10's L0, in the other's place "
        "{cifar10_L0[their_other]}: a difference of {cifar10_L0[beyond_patches]}. It is {cifar10_L1[beyond_patches]} "
        "in CIFAR-10's L1, {pets_L1[beyond_patches]} and {pets_L2[beyond_patches]} in drawn pets' L1 and L2, and above "
        "0 in {above} of {of} layers of the small model, {first} in L1 and {second} in L3 over {seeds} seeds",
        on_same_patches,
    ),
    Claim((*RERUN, *(place.replace(SCRATCH, SAME) for place in RERUN)), "all other costs are the same", unchanged),
    Claim(FILES, HEADLINE, headline),
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
        BUNDLED,
        "| {model}, {layer} | 1 | {without_points:.1f} ({without_points_low:.1f} to {without_points_high:.1f}) "
        "| {without_log_loss:.3f} | {routes_points:.1f} | {whole_points:.1f} ({share:.0f} %) | {equal:.0f} % "
        "| {favourite_log_loss:.3f} | {any_two_log_loss:.3f} "
        "| {more_log_loss:.3f} ({more_log_loss_low:.3f} to {more_log_loss_high:.3f}) "
        "| {own:.3f} / {others:.3f} | {answer} |",
        of_bundled,
    ),
    Claim(
        SEEDS,
        "| small, {layer} | {seeds} | {without_points:.1f} ({without_points_low:.1f} to {without_points_high:.1f}) "
        "| {without_log_loss:.3f} | {routes_points:.1f} | {whole_points:.1f} ({share:.0f} %) | {equal:.0f} % "
        "| {favourite_log_loss:.3f} | {any_two_log_loss:.3f} "
        "| {more_log_loss:.3f} ({more_log_loss_low:.3f} to {more_log_loss_high:.3f}) "
        "| {own:.3f} / {others:.3f} | {answer} |",
        of_seeds,
    ),
]
DEFINITIONS = [
    Definition("three seeds each, effects below one or two points", "the width of the intervals of single runs"),
    Definition("in brackets 95 % intervals, over images, or over seeds", "the level of both"),
    Definition("nats per 100 choices", "a unit"),
    Definition("top-2 of 8", "the model's setting"),
]
