"""Do classes go to different experts, did training the router add to that, and do the experts do different things?

    python benchmarks/specialization/recompute.py

prints every measured number of README.md, from runs.jsonl, scratch.jsonl and same_patches.jsonl, and what other pages
quote of them. The code that ran the study is benchmarks/specialization: of the commits 0d3d82af and 7dc0151e for drawn
pets, b14f3c85 for CIFAR-10 and d7a303aa for photos; of c6283482 and, for cats and dogs and drawn pets, 29a2f0a1 for the
trained experts of scratch.jsonl; of 959bae10 for same_patches.jsonl. It has left the tree.

runs.jsonl has a record for each data set, arm and seed; a *setting* is one MoE layer of one arm, over its three seeds.
Numbers are means over seeds. The rule by which a setting was looked for is in protocol.md. scratch.jsonl has a record
for each bundled model and for each of six seeds of a small model.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from scipy.stats import ttest_1samp

FOLDER = Path(__file__).parent
UNITS = ("token", "image")
ARMS = (
    *(
        f"{router}-{unit}"
        for router in ("vmoe_top_k", "noisy_top_k", "switch", "bias_balanced")
        for unit in UNITS
    ),
    *(f"{router}-{unit}-every2" for router in ("vmoe_top_k", "bias_balanced") for unit in UNITS),
    *(f"unbalanced-{unit}" for unit in UNITS),
)
PLANNED_ARMS = 40  # 14 for pets and for CIFAR-10, 12 on photos
DATA_SETS = ("pets", "cifar10", "cats_vs_dogs")
TITLES = {"cifar10": "CIFAR-10", "pets": "drawn pets", "cats_vs_dogs": "cats and dogs"}
WEAKEST_FIRST = ("not measured", "not shown", "a little", "yes")


def read(name: str) -> list[dict]:
    """The records of a file, a line each."""
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def span(values: Iterable[float], digits: int) -> str:
    """The least and the most of them; one number where both look alike."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (ordered[0], ordered[-1])))


# ---- what a record says of a layer


def guess(layer: dict) -> float:
    """Share of the patches (images) whose class is guessed right from their expert."""
    return layer["readings"][0]["guess"]["value"]


def bits(layer: dict) -> float:
    """What the expert tells about the class, beyond labels that were shuffled."""
    return layer["readings"][0]["bits"]["value"]


def of_patches(readings: list[dict]) -> list[dict]:
    """The bits of readings of single patches, without those of whole images."""
    return [reading["bits"] for reading in readings if reading["unit"] == "patch"]


def bits_of_control(layer: dict, name: str) -> float:
    """The same of the router before training, or of the best clustering of its input."""
    return max(each["value"] for each in of_patches(layer["controls"][name]))


def bits_of_clusters(layer: dict) -> float:
    """The best clustering's."""
    return bits_of_control(layer, "clusters")


def tells_more_than_before(layer: dict) -> bool:
    """Whether the interval of the bits lies above that of the same router before training."""
    own, before = (of_patches(layer[name]["before"])[0] for name in ("same", "controls"))
    return own["low"] > before["high"]


def first_answer(layer: dict) -> str:
    """Do classes go to different experts? A little: less than a tenth of what a probe tells in as many groups."""
    reading, probe = layer["readings"][0], layer["probe"]["bits"]["value"]
    if reading["bits"]["low"] <= 0 or reading["p_value"] > 0.05:
        return "not shown"
    return "yes" if probe > 0 and bits(layer) / probe >= 0.1 else "a little"


def second_answer(layer: dict) -> str:
    """Did training add to that? The run's own answer: it took intervals between images, which no record has."""
    return layer["answers"][1]["answer"]


def third_answer(layer: dict) -> str:
    """Do the experts do different things? Shown where two classes' experts can't change places without loss."""
    if layer["swap"] is None:
        return "not measured"
    return "yes" if layer["swap"]["points"]["low"] > 0 else "not shown"


# ---- settings


class Setting(NamedTuple):
    """One MoE layer of one arm: its runs by seed, and what each says of the layer."""

    arm: str
    runs: list[dict]
    layers: list[dict]

    @property
    def layer(self) -> str:
        """Its name."""
        return self.layers[0]["name"]

    def mean(self, value: Callable[[dict], float]) -> float:
        """Over seeds."""
        return statistics.fmean(map(value, self.layers))

    @property
    def lost_by_swap(self) -> float:
        """Points lost where two classes' experts change places, mean over the seeds in which they can."""
        swaps = [layer["swap"] for layer in self.layers if layer["swap"] is not None]
        return statistics.fmean(swap["points"]["value"] for swap in swaps)


def settings_of(runs: list[dict], data: str) -> list[Setting]:
    """All settings of a data set."""
    settings = []
    for arm in ARMS:
        own = [run for run in runs if (run["data"], run["arm"]) == (data, arm)]
        own.sort(key=lambda run: run["seed"])
        for layers in zip(*(run["answers"]["class"] for run in own), strict=True):
            settings.append(Setting(arm, own, list(layers)))
    return settings


def yes_of(question: Callable[[dict], str], settings: list[Setting]) -> int:
    """How many settings answer a question with yes: in every seed."""
    weakest = [min(map(question, s.layers), key=WEAKEST_FIRST.index) for s in settings]
    return weakest.count("yes")


# ---- the one setting on photos


CONDITIONS: dict[str, Callable[[dict], bool]] = {
    "max/mean at most 1.5": lambda layer: layer["load"]["max_over_mean"] <= 1.5,
    "no expert below 0.25 of the mean": lambda layer: (
        min(layer["load"]["share"]) * len(layer["load"]["share"]) >= 0.25
    ),
    "class guessed right from the expert: at least 75 %": lambda layer: guess(layer) >= 0.75,
    "more bits than before training": tells_more_than_before,
    "the swap costs accuracy": lambda layer: third_answer(layer) == "yes",
}
"""The rule: all of these in every seed."""


def rule_on_photos(settings: list[Setting]) -> list[str]:
    """How many settings keep the rule and each of its conditions; which miss that condition alone."""
    missed = {
        f"`{setting.arm}, {setting.layer}`": [
            name for name, keeps in CONDITIONS.items() if not all(map(keeps, setting.layers))
        ]
        for setting in settings
    }
    kept = sum(not conditions for conditions in missed.values())
    rule = kept or "No setting keeps the rule: none"
    lines = [
        f"{rule} of {len(settings)} separates cats from dogs evenly, by training and with effect."
    ]
    for condition in CONDITIONS:
        keeping = sum(condition not in conditions for conditions in missed.values())
        alone = [name for name, conditions in missed.items() if conditions == [condition]]
        lines.append(f"| {condition} | {keeping} of {len(settings)} | {', '.join(alone)} |")
    return lines


# ---- what README.md says of all settings


def of_all_settings(settings: list[Setting]) -> str:
    """How many settings tell more than before training, and more than clusters of the router's input."""
    more = [setting for setting in settings if all(map(tells_more_than_before, setting.layers))]
    from_zero = sum(
        all(bits_of_control(layer, "before") < 5e-4 for layer in setting.layers) for setting in more
    )
    beyond_clusters = sum(
        all(bits(layer) > bits_of_clusters(layer) for layer in setting.layers)
        for setting in settings
    )
    most = max(setting.mean(bits_of_clusters) for setting in settings)
    return (
        f"In {len(more)} of {len(settings)} settings the router tells more than before training, but {from_zero} "
        f"of the {len(more)} compare with a router that starts at zero; and {beyond_clusters or 'none'} of "
        f"{len(settings)} tells more than clusters of its input, which tell up to {most:.2f} of 3 bits."
    )


def facts_of(settings: list[Setting]) -> dict[str, str]:
    """Of a data set's settings: how often classes are guessed right by the expert, and without; the costliest swap."""
    return {
        "guesses": span([100 * setting.mean(guess) for setting in settings], 0),
        "chance": f"{100 * settings[0].layers[0]['readings'][0]['chance']:.1f}",
        "swap": f"{max(setting.lost_by_swap for setting in settings):.1f}",
    }


def of_drawn_and_small_images(pets: list[Setting], cifar10: list[Setting]) -> list[str]:
    """README.md's sentences on drawn pets and on CIFAR-10."""
    yes, facts, same = yes_of(first_answer, pets), facts_of(pets), facts_of(cifar10)
    in_settings = f"in {'all' if yes == len(pets) else f'{yes} of'} {len(pets)} settings"
    shares = {(setting.arm, setting.layer): setting.mean(guess) for setting in pets}
    images_separate_more = all(
        shares[arm.replace("token", "image"), layer] > share
        for (arm, layer), share in shares.items()
        if "token" in arm
    )
    more = "more" if images_separate_more else "no more"
    clusters_tell_more = all(
        setting.mean(bits_of_clusters) > setting.mean(bits) for setting in pets
    )
    return [
        f"{in_settings} (a setting is one layer of one of {len({setting.arm for setting in pets})} arms, with "
        f"{len(pets[0].runs)} seeds each): from the expert alone {facts['guesses']} % of the classes are guessed "
        f"right, chance {facts['chance']} %; routing by image separates them {more} "
        f"than routing by token, in every arm and layer. But {'' if clusters_tell_more else 'not '}everywhere clusters "
        "of the layer's input tell more about the class than its router, and to let two classes' experts change places "
        f"costs {facts['swap']} points of accuracy in the mean of the setting where it costs most.",
        f"CIFAR-10 says the same in its {len(cifar10)} settings: {same['guesses']} % are guessed right, chance "
        f"{same['chance']} %, and the costliest swap takes {same['swap']} points.",
    ]


def of_photos(settings: list[Setting]) -> str:
    """README.md's sentence on the arms of photos with MoE layers in every second block."""
    right = {
        setting.arm: statistics.fmean(run["top1"] for run in setting.runs) for setting in settings
    }
    token, image = (100 * right[f"vmoe_top_k-{unit}-every2"] for unit in UNITS)
    before = span([100 * run["top1_before"] for run in settings[0].runs], 1)
    return f"lost accuracy in training ({token:.1f} and {image:.1f} % right, the trunk {before} %)"


# ---- trained experts: scratch.jsonl


class Trained(NamedTuple):
    """One MoE layer of a bundled model, or of the small model's six seeds: what a change of its routes costs."""

    name: str
    swaps: list[dict]

    @property
    def place(self) -> str:
        """Its name in the model."""
        return self.name.split(", ")[-1]

    def cost(self, change: str, unit: str) -> tuple[float, float, float]:
        """Mean cost of a change (`exchange`: the favourite's) in `points` or `log_loss`, and the ends of its 95 %.

        The interval is over images, as recorded, or Student's over seeds.
        """
        costs = [(swap if change == "exchange" else swap[change])[unit] for swap in self.swaps]
        if len(costs) == 1:
            return costs[0]["value"], costs[0]["low"], costs[0]["high"]
        values = [each["value"] for each in costs]
        return statistics.fmean(values), *ttest_1samp(values, 0).confidence_interval(0.95)

    def points(self, change: str) -> str:
        """Mean cost in points."""
        return f"{self.cost(change, 'points')[0]:.1f}"

    def change(self, change: str) -> str:
        """The same as a change of accuracy."""
        return f"{-self.cost(change, 'points')[0]:+.1f}"

    def interval(self, change: str) -> str:
        """Its ends."""
        _, low, high = self.cost(change, "points")
        return f"{low:.1f} to {high:.1f}"

    def nats(self, change: str) -> str:
        """Mean cost in log-loss."""
        return f"{self.cost(change, 'log_loss')[0]:.3f}"

    def nats_and_interval(self, change: str) -> str:
        """The same with its ends."""
        _, low, high = self.cost(change, "log_loss")
        return f"{self.nats(change)} ({low:.3f} to {high:.3f})"

    def shown(self, change: str) -> int:
        """In how many seeds a change is shown to cost log-loss; `more`: the favourite, more than any two others."""
        return sum(swap[change]["log_loss"]["low"] > 0 for swap in self.swaps)

    @property
    def answers(self) -> list[str]:
        """The third question's, for each seed."""
        return list(map(trained_answer, self.swaps))

    @property
    def own_costs_more(self) -> bool:
        """Whether taking a class's favourite away costs its own images more than others, in every seed."""
        knock_outs = [swap["knock_out"] for swap in self.swaps]
        return all(knock_out["own"] > knock_out["others"] for knock_out in knock_outs)


def trained_answer(swap: dict) -> str:
    """Do the experts do different things, by class? The rule of the runs' commits."""

    def is_shown(cost: dict, unit: str) -> bool:
        return cost[unit]["low"] > 0

    if not is_shown(swap["without"], "log_loss") and not is_shown(swap["without"], "points"):
        return "the layer contributes nothing"
    if is_shown(swap["more"], "log_loss") and is_shown(swap["without"], "points"):
        return "yes"
    parts = (swap["more"], swap, swap["any_two"])
    return "a little" if any(is_shown(part, "log_loss") for part in parts) else "not shown"


def trained_layers(records: list[dict]) -> tuple[dict[str, list[Trained]], list[Trained]]:
    """Bundled model -> its MoE layers; and the small model's, each with six seeds."""
    by_name = {record["name"]: record["layers"] for record in records}
    bundled = {
        name: [Trained(f"{title}, {each['name']}", [each["swap"]]) for each in by_name[name]]
        for name, title in TITLES.items()
        if name in by_name
    }
    seeds = sorted((r for r in records if "seed" in r), key=lambda record: record["seed"])
    small = [
        Trained(f"small, {layers[0]['name']}", [layer["swap"] for layer in layers])
        for layers in zip(*(record["layers"] for record in seeds), strict=True)
    ]
    return bundled, small


def trained_row(layer: Trained) -> str:
    """A line of the table of trained experts."""
    moved = 100 * statistics.fmean(swap["moved"] for swap in layer.swaps)
    equal = 100 * statistics.fmean(swap["favourite"]["moved"] for swap in layer.swaps)
    own, others = (
        100 * statistics.fmean(swap["knock_out"][name] for swap in layer.swaps)
        for name in ("own", "others")
    )
    answers = Counter(sorted(layer.answers, reverse=True))
    cells = [
        layer.name,
        str(len(layer.swaps)),
        f"{layer.points('without')} ({layer.interval('without')})",
        layer.nats("without"),
        layer.points("routes"),
        f"{layer.points('exchange')} ({moved:.0f} %)",
        f"{equal:.0f} %",
        layer.nats("favourite"),
        layer.nats("any_two"),
        layer.nats_and_interval("more"),
        f"{own:z.3f} / {others:z.3f}",
        ", ".join(f"{answer}: {seeds}" for answer, seeds in answers.items())
        if len(layer.swaps) > 1
        else layer.answers[0],
    ]
    return f"| {' | '.join(cells)} |"


def of_trained_models(cifar10: list[Trained], small: list[Trained]) -> list[str]:
    """README.md's sentences on the bundled model of CIFAR-10 and on the small model."""
    first, second = cifar10
    equal = 100 * first.swaps[0]["favourite"]["moved"]
    something = "something" if second.cost("without", "points")[1] > 0 else "nothing"
    seeds, more = len(small[0].swaps), sum(layer.shown("more") for layer in small)
    return [
        "in the first MoE layer of the bundled CIFAR-10 model (one seed) exchanging a class's favourite expert with "
        f"any other costs {first.points('exchange')} points of accuracy, leaving the layer out "
        f"{first.points('without')}; at the same share of moved choices ({equal:.0f} %) the favourite costs "
        f"{first.points('favourite')} points, any two other experts {first.points('any_two')} (difference "
        f"{first.points('more')}, {first.interval('more')}). Its second layer contributes {something} that is shown to "
        f"the accuracy ({second.points('without')} points, {second.interval('without')}), only to the log-loss "
        f"({second.nats('without')} nats).",
        f"In a small model the favourite costs more log-loss than any two others in {more} of {2 * seeds} layers of "
        f"{seeds} seeds; the difference is {small[0].points('more')} points in its first layer "
        f"({small[0].interval('more')} over seeds), {small[1].points('more')} in its second "
        f"({small[1].interval('more')}).",
    ]


def of_knock_out(bundled: dict[str, list[Trained]], small: list[Trained]) -> str:
    """README.md's sentence on what taking a class's favourite away costs its own images, and others."""
    asked = [*bundled["cifar10"], *bundled["pets"], *small]
    p = max(swap["knock_out"]["p_value"] for layer in asked for swap in layer.swaps)
    where = "in every layer" if all(each.own_costs_more for each in asked) else "not in every layer"
    others = [layer.place for layer in bundled["cats_vs_dogs"] if not layer.own_costs_more]
    return (
        f"own is larger {where} on CIFAR-10 and drawn pets (p at most {p:.3f}, images permuted between classes), and "
        f"not in {' and '.join(others)} of cats and dogs."
    )


def of_same_patches(bundled: dict[str, list[Trained]], small: list[Trained]) -> str:
    """README.md on patches that chose a class's favourite and one other expert, in same_patches.jsonl."""
    first, second = bundled["cifar10"]
    pets, seeds = bundled["pets"], len(small[0].swaps)
    beyond = [layer.nats_and_interval("beyond_patches") for layer in (first, second, *pets, *small)]
    above = sum(layer.shown("beyond_patches") for layer in small)
    return (
        f"in the favourite's place costs {first.nats_and_interval('same_patches')} nats in CIFAR-10's {first.place}, "
        f"in the other's place {first.nats_and_interval('their_other')}: a difference of {beyond[0]}. It is "
        f"{beyond[1]} in CIFAR-10's {second.place}, {beyond[2]} and {beyond[3]} in drawn pets' {pets[0].place} and "
        f"{pets[1].place}, and above 0 in {above} of {2 * seeds} layers of the small model, {beyond[4]} in "
        f"{small[0].place} and {beyond[5]} in {small[1].place} over {seeds} seeds."
    )


def costs_of(records: list[dict]) -> dict[str, float]:
    """Record, layer, change, unit and end -> what a change costs."""
    return {
        f"{record['name']} {layer['name']} {change} {unit} {end}": layer["swap"][change][unit][end]
        for record in records
        for layer in record["layers"]
        for change in ("without", "routes", "favourite", "any_two", "more")
        for unit in ("points", "log_loss")
        for end in ("value", "low", "high")
    }


def of_records(runs: list[dict], records: list[dict]) -> list[str]:
    """How many runs there are and what they took, and how the trained models were asked."""
    arms = len({(run["data"], run["arm"]) for run in runs})
    hours = sum(sum(run["cpu_s"].values()) for run in runs) / 3600
    processors = ", ".join(sorted({run["machine"]["cpu"] for run in runs}))
    small = [record for record in records if "seed" in record]
    images = {record["name"]: record["images"] for record in records}
    right = span([100 * record["top1"] for record in small], 1)
    return [
        f"- {len(runs)} records of {arms} of {PLANNED_ARMS} arms, {hours:.1f} CPU hours, from {processors}.",
        f"{small[0]['steps']} steps on CIFAR-10), six seeds, {right} % right",
        f"{images['cifar10']:,} test images each (cats and dogs: all {images['cats_vs_dogs']})",
    ]


def count(layers: list[Trained]) -> dict[str, int]:
    """Of trained layers, each seed for itself: how many say yes, and lose more log-loss by the favourite."""
    answers = [answer for layer in layers for answer in layer.answers]
    by_log_loss = sum(layer.shown("more") for layer in layers)
    return {"yes": answers.count("yes"), "of": len(answers), "by_log_loss": by_log_loss}


def headline(first: Trained, bundled: dict[str, int]) -> str:
    """README.md of the repository."""
    return (
        f"Yes in {bundled['yes']} of {bundled['of']} layers of three models with eight experts, by log-loss alone in "
        f"{bundled['by_log_loss']}. In the first of CIFAR-10's, exchanging a class's favourite expert changes its "
        f"accuracy by {first.change('favourite')} points, any two others at as many patches by "
        f"{first.change('any_two')} (difference {first.points('more')}, {first.interval('more')})"
    )


def row_of_results(
    settings: dict[str, list[Setting]], bundled: dict[str, int], small: dict[str, int]
) -> str:
    """The row of docs/results.md: a question counts if most settings, or most trained layers of both kinds, say yes."""
    everything = [setting for of_data in settings.values() for setting in of_data]
    asked = len(everything)
    first, second, third = (
        yes_of(question, everything) for question in (first_answer, second_answer, third_answer)
    )
    third_holds = bundled["yes"] > bundled["of"] / 2 and small["yes"] > small["of"] / 2
    holds = (first > asked / 2) + (second > asked / 2) + third_holds
    part = ", another in part" if not third_holds and bundled["yes"] + small["yes"] else ""
    by_data = ", ".join(
        f"{yes_of(first_answer, of_data)} of {len(of_data)}{' settings' * (data == 'pets')} on {data}"
        for data, of_data in settings.items()
    )
    return (
        f"| Experts specialize | {holds} of 3 questions{part} | Do classes go to different experts? In upcycled models "
        f"yes in {by_data}. Did training the router add to that? In {second} of {asked}. Do experts do different "
        f"things, by class? In {third} of {asked}; in trained models yes in {bundled['yes']} of {bundled['of']} layers "
        f"of bundled ones (by log-loss alone {bundled['by_log_loss']}), {small['yes']} of {small['of']} of small ones "
        f"({small['by_log_loss']}) ([specialization](../benchmarks/specialization/README.md)). |"
    )


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the records."""
    runs, records, again = read("runs.jsonl"), read("scratch.jsonl"), read("same_patches.jsonl")
    settings = {data: settings_of(runs, data) for data in DATA_SETS}
    bundled, small = trained_layers(records)
    every_bundled = [layer for layers in bundled.values() for layer in layers]
    in_bundled = count(every_bundled)
    earlier = costs_of(records)
    same = all(abs(earlier[name] - cost) < 1e-6 for name, cost in costs_of(again).items())
    return {
        "benchmarks/specialization/README.md": [
            *of_trained_models(bundled["cifar10"], small),
            f"a class's favourite with any other costs {bundled['pets'][1].points('exchange')} points)",
            of_all_settings([setting for of_data in settings.values() for setting in of_data]),
            *of_drawn_and_small_images(settings["pets"], settings["cifar10"]),
            *rule_on_photos(settings["cats_vs_dogs"]),
            of_photos(settings["cats_vs_dogs"]),
            *of_records(runs, records),
            *map(trained_row, [*every_bundled, *small]),
            of_knock_out(bundled, small),
            of_same_patches(*trained_layers(again)),
            f"all other costs are {'the same' if same else 'not the same'} again",
        ],
        "README.md": [headline(bundled["cifar10"][0], in_bundled)],
        "docs/results.md": [row_of_results(settings, in_bundled, count(small))],
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
