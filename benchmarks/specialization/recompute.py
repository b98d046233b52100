"""Do classes go to different experts, did training the router add to that, and do the experts do different things?

    python benchmarks/specialization/recompute.py

prints every measured number of README.md, from runs.jsonl, scratch.jsonl and same_patches.jsonl, and what other pages
quote of them. The
code that ran the study is benchmarks/specialization: of the commits 0d3d82af and 7dc0151e for drawn pets, b14f3c85 for
CIFAR-10 and d7a303aa for photos; of c6283482 and, for cats and dogs and drawn pets, 29a2f0a1 for the trained experts
of scratch.jsonl; of 959bae10 for same_patches.jsonl. It has left the tree.

runs.jsonl has a record for each data set, arm and seed; a *setting* is one MoE layer of one arm, over its three seeds.
Numbers are means over seeds. The rule by which a setting was looked for is in protocol.md. scratch.jsonl has a record
for each bundled model and for each of six seeds of a small model.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

FOLDER = Path(__file__).parent
README, RESULTS = "benchmarks/specialization/README.md", "docs/results.md"
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
WEAKEST_FIRST = ("not measured", "not shown", "a little", "yes")


def read(name: str) -> list[dict]:
    """The records of a file, a line each."""
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def signed(value: float, digits: int = 3) -> str:
    """With a true minus sign, and none in front of 0."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def span(values: list[float], digits: int) -> str:
    """The least and the most of them; one number where both look alike."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


# ---- what a record says of a layer


def guess(layer: dict) -> float:
    """Share of the patches (images) whose class is guessed right from their expert."""
    return layer["readings"][0]["guess"]["value"]


def bits(layer: dict) -> float:
    """What the expert tells about the class, beyond labels that were shuffled."""
    return layer["readings"][0]["bits"]["value"]


def of_patches(readings: list[dict]) -> list[dict]:
    """The readings of single patches, without those of whole images."""
    return [reading for reading in readings if reading["unit"] == "patch"]


def bits_of_control(layer: dict, name: str) -> float:
    """The same of the router before training, or of the best clustering of its input."""
    return max(reading["bits"]["value"] for reading in of_patches(layer["controls"][name]))


def share_of_probe(layer: dict) -> float:
    """Bits over those that a linear probe tells in as many balanced groups."""
    probe = layer["probe"]["bits"]["value"]
    return bits(layer) / probe if probe > 0 else 0.0


def tells_more_than_before(layer: dict) -> bool:
    """Whether the interval of the bits lies above that of the same router before training."""
    own, before = (of_patches(layer[name]["before"])[0]["bits"] for name in ("same", "controls"))
    return own["low"] > before["high"]


def first_answer(layer: dict) -> str:
    """Do classes go to different experts? A little: less than a tenth of what the probe tells."""
    reading = layer["readings"][0]
    if reading["bits"]["low"] <= 0 or reading["p_value"] > 0.05:
        return "not shown"
    return "a little" if share_of_probe(layer) < 0.1 else "yes"


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

    def answer(self, question: Callable[[dict], str]) -> str:
        """The weakest answer of any seed."""
        return min(map(question, self.layers), key=WEAKEST_FIRST.index)


def settings_of(runs: list[dict], data: str) -> list[Setting]:
    """All settings of a data set."""
    settings = []
    for arm in ARMS:
        own = [run for run in runs if (run["data"], run["arm"]) == (data, arm)]
        own.sort(key=lambda run: run["seed"])
        for place in range(len(own[0]["answers"]["class"]) if own else 0):
            settings.append(Setting(arm, own, [run["answers"]["class"][place] for run in own]))
    return settings


def lost_by_swap(setting: Setting) -> float:
    """Points lost where two classes' experts change places, mean over the seeds in which they can."""
    swaps = [layer["swap"] for layer in setting.layers if layer["swap"] is not None]
    return statistics.fmean(swap["points"]["value"] for swap in swaps)


def costliest_swap(settings: list[Setting]) -> str:
    """Of the setting where it costs most, in points."""
    return f"{max(map(lost_by_swap, settings)):.1f}"


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


def missed_conditions(setting: Setting) -> list[str]:
    """Those that some seed doesn't keep."""
    return [name for name, keeps in CONDITIONS.items() if not all(map(keeps, setting.layers))]


def rule_on_photos(settings: list[Setting]) -> list[str]:
    """How many settings keep the rule and each of its conditions; which miss that condition alone."""
    missed = [missed_conditions(setting) for setting in settings]
    rule = "No setting keeps the rule: none" if all(missed) else f"{missed.count([])}"
    lines = [
        f"{rule} of {len(settings)} separates cats from dogs evenly, by training and with effect."
    ]
    for condition in CONDITIONS:
        keeping = sum(condition not in conditions for conditions in missed)
        pairs = zip(settings, missed, strict=True)
        alone = [
            f"`{setting.arm}, {setting.layer}`"
            for setting, conditions in pairs
            if conditions == [condition]
        ]
        lines.append(f"| {condition} | {keeping} of {len(settings)} | {', '.join(alone)} |")
    return lines


# ---- what README.md says of all settings


def of_all_settings(settings: list[Setting]) -> str:
    """How many settings tell more than before training, and more than clusters of the router's input."""
    more = [setting for setting in settings if all(map(tells_more_than_before, setting.layers))]
    from_zero = [
        setting
        for setting in more
        if all(bits_of_control(layer, "before") < 5e-4 for layer in setting.layers)
    ]
    beyond_clusters = sum(
        all(bits(layer) > bits_of_control(layer, "clusters") for layer in setting.layers)
        for setting in settings
    )
    most = max(
        setting.mean(lambda layer: bits_of_control(layer, "clusters")) for setting in settings
    )
    return (
        f"In {len(more)} of {len(settings)} settings the router tells more than before training, but {len(from_zero)} "
        f"of the {len(more)} compare with a router that starts at zero; and {beyond_clusters or 'none'} of "
        f"{len(settings)} tells more than clusters of its input, which tell up to {most:.2f} of 3 bits."
    )


def guesses(settings: list[Setting]) -> str:
    """How often classes are guessed right from the expert, from the least to the most."""
    return span([100 * setting.mean(guess) for setting in settings], 0)


def chance(settings: list[Setting]) -> str:
    """How often they would be guessed right without."""
    return f"{100 * settings[0].layers[0]['readings'][0]['chance']:.1f}"


def images_separate_more(settings: list[Setting]) -> bool:
    """Whether routing by image separates the classes more than routing by token, in every arm and layer."""
    shares = {(setting.arm, setting.layer): setting.mean(guess) for setting in settings}
    return all(
        shares[arm.replace("token", "image"), layer] > share
        for (arm, layer), share in shares.items()
        if "token" in arm
    )


def clusters_tell_more(settings: list[Setting]) -> bool:
    """Whether clusters of the input tell more than the router, in every setting."""
    return all(
        setting.mean(lambda layer: bits_of_control(layer, "clusters")) > setting.mean(bits)
        for setting in settings
    )


def of_pets(settings: list[Setting]) -> str:
    """README.md's sentences on drawn pets."""
    yes = yes_of(first_answer, settings)
    in_settings = f"in {'all' if yes == len(settings) else f'{yes} of'} {len(settings)} settings"
    arms, seeds = len({setting.arm for setting in settings}), len(settings[0].runs)
    more = "more" if images_separate_more(settings) else "no more"
    where = "everywhere" if clusters_tell_more(settings) else "not everywhere"
    return (
        f"{in_settings} (a setting is one layer of one of {arms} arms, with {seeds} seeds each): from the expert alone "
        f"{guesses(settings)} % of the classes are guessed right, chance {chance(settings)} %; routing by image "
        f"separates them {more} than routing by token, in every arm and layer. But {where} clusters of the layer's "
        "input tell more about the class than its router, and to let two classes' experts change places costs "
        f"{costliest_swap(settings)} points of accuracy in the mean of the setting where it costs most."
    )


def of_cifar10(settings: list[Setting]) -> str:
    """README.md's sentence on CIFAR-10."""
    return (
        f"CIFAR-10 says the same in its {len(settings)} settings: {guesses(settings)} % are guessed right, chance "
        f"{chance(settings)} %, and the costliest swap takes {costliest_swap(settings)} points."
    )


def of_photos(settings: list[Setting]) -> str:
    """README.md's sentence on the arms of photos with MoE layers in every second block."""
    right = {
        setting.arm: statistics.fmean(run["top1"] for run in setting.runs) for setting in settings
    }
    token, image = (100 * right[f"vmoe_top_k-{unit}-every2"] for unit in UNITS)
    before = span([100 * run["top1_before"] for run in settings[0].runs], 1)
    return f"lost accuracy in training ({token:.1f} and {image:.1f} % right, the trunk {before} %)"


def where_runs_come_from(runs: list[dict]) -> str:
    """How many there are, and what they took."""
    arms = len({(run["data"], run["arm"]) for run in runs})
    hours = sum(sum(run["cpu_s"].values()) for run in runs) / 3600
    processors = ", ".join(sorted({run["machine"]["cpu"] for run in runs}))
    return f"- {len(runs)} records of {arms} of {PLANNED_ARMS} arms, {hours:.1f} CPU hours, from {processors}."


# ---- trained experts: scratch.jsonl


class Trained(NamedTuple):
    """One MoE layer of a bundled model, or of the small model's six seeds."""

    name: str
    layers: list[dict]

    @property
    def place(self) -> str:
        """Its name in the model."""
        return self.layers[0]["name"]

    def values(self, change: str, unit: str) -> list[float]:
        """What a change of the routes costs in `points` or `log_loss`, for each seed; `exchange`: the favourite's."""
        swaps = [layer["swap"] for layer in self.layers]
        return [(swap if change == "exchange" else swap[change])[unit]["value"] for swap in swaps]

    def mean(self, change: str, unit: str) -> float:
        """The same, mean over seeds."""
        return statistics.fmean(self.values(change, unit))

    def interval(self, change: str, unit: str) -> tuple[float, float]:
        """95 %: over images, as recorded, or Student's over seeds."""
        if len(self.layers) == 1:
            cost = self.layers[0]["swap"][change][unit]
            return cost["low"], cost["high"]
        values, mean = self.values(change, unit), self.mean(change, unit)
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = float(student.ppf(0.975, len(values) - 1)) * error
        return mean - half, mean + half

    def points(self, change: str) -> str:
        """Mean cost in points."""
        return f"{self.mean(change, 'points'):.1f}"

    def nats(self, change: str) -> str:
        """Mean cost in log-loss."""
        return f"{self.mean(change, 'log_loss'):.3f}"

    def interval_in_points(self, change: str) -> str:
        """Its ends."""
        low, high = self.interval(change, "points")
        return f"{low:.1f} to {high:.1f}"

    @property
    def costs_more_log_loss(self) -> int:
        """In how many seeds the favourite is shown to cost more log-loss than any two others."""
        return sum(layer["swap"]["more"]["log_loss"]["low"] > 0 for layer in self.layers)

    @property
    def answers(self) -> list[str]:
        """The third question's, for each seed."""
        return [trained_answer(layer["swap"]) for layer in self.layers]


def trained_answer(swap: dict) -> str:
    """Do the experts do different things, by class? The rule of the runs' commits."""

    def is_shown(cost: dict, unit: str) -> bool:
        return cost[unit]["low"] > 0

    if not is_shown(swap["without"], "log_loss") and not is_shown(swap["without"], "points"):
        return "the layer contributes nothing"
    if is_shown(swap["more"], "log_loss"):
        return "yes" if is_shown(swap["without"], "points") else "a little"
    return (
        "a little"
        if is_shown(swap, "log_loss") or is_shown(swap["any_two"], "log_loss")
        else "not shown"
    )


def bundled_layers(records: list[dict]) -> dict[str, list[Trained]]:
    """Bundled model -> its MoE layers."""
    titles = {"cifar10": "CIFAR-10", "pets": "drawn pets", "cats_vs_dogs": "cats and dogs"}
    by_name = {record["name"]: record for record in records}
    titles = {name: title for name, title in titles.items() if name in by_name}
    return {
        name: [Trained(f"{title}, {layer['name']}", [layer]) for layer in by_name[name]["layers"]]
        for name, title in titles.items()
    }


def small_layers(records: list[dict]) -> list[Trained]:
    """The small model's MoE layers, each with six seeds."""
    seeds = sorted(
        (record for record in records if "seed" in record), key=lambda record: record["seed"]
    )
    return [
        Trained(f"small, {layers[0]['name']}", list(layers))
        for layers in zip(*(record["layers"] for record in seeds), strict=True)
    ]


def trained_row(layer: Trained) -> str:
    """A line of the table of trained experts."""
    swaps = [each["swap"] for each in layer.layers]
    moved = 100 * statistics.fmean(swap["moved"] for swap in swaps)
    equal = 100 * statistics.fmean(swap["favourite"]["moved"] for swap in swaps)
    own, others = (
        100 * statistics.fmean(swap["knock_out"][name] for swap in swaps)
        for name in ("own", "others")
    )
    without_low, without_high = layer.interval("without", "points")
    low, high = layer.interval("more", "log_loss")
    cells = [
        layer.name,
        str(len(swaps)),
        f"{layer.points('without')} ({without_low:.1f} to {without_high:.1f})",
        layer.nats("without"),
        layer.points("routes"),
        f"{layer.points('exchange')} ({moved:.0f} %)",
        f"{equal:.0f} %",
        layer.nats("favourite"),
        layer.nats("any_two"),
        f"{layer.nats('more')} ({low:.3f} to {high:.3f})",
        f"{signed(own)} / {signed(others)}",
        answers_of(layer),
    ]
    return f"| {' | '.join(cells)} |"


def answers_of(layer: Trained) -> str:
    """The answer, or how many seeds have each."""
    if len(layer.answers) == 1:
        return layer.answers[0]
    return ", ".join(
        f"{answer}: {layer.answers.count(answer)}"
        for answer in sorted(set(layer.answers), reverse=True)
    )


def of_cifar10_model(first: Trained, second: Trained) -> str:
    """README.md's sentences on the bundled model of CIFAR-10."""
    equal = 100 * first.layers[0]["swap"]["favourite"]["moved"]
    more = first.interval_in_points("more")
    without = second.interval_in_points("without")
    something = "something" if second.interval("without", "points")[0] > 0 else "nothing"
    return (
        "in the first MoE layer of the bundled CIFAR-10 model (one seed) exchanging a class's favourite expert with "
        f"any other costs {first.points('exchange')} points of accuracy, leaving the layer out "
        f"{first.points('without')}; at the same share of moved choices ({equal:.0f} %) the favourite costs "
        f"{first.points('favourite')} points, any two other experts {first.points('any_two')} (difference "
        f"{first.points('more')}, {more}). Its second layer contributes {something} that is shown to the accuracy "
        f"({second.points('without')} points, {without}), only to the log-loss ({second.nats('without')} nats)."
    )


def of_small_model(first: Trained, second: Trained) -> str:
    """README.md's sentence on the small model."""
    seeds, more = len(first.layers), first.costs_more_log_loss + second.costs_more_log_loss
    return (
        f"In a small model the favourite costs more log-loss than any two others in {more} of {2 * seeds} layers of "
        f"{seeds} seeds; the difference is {first.points('more')} points in its first layer "
        f"({first.interval_in_points('more')} over seeds), {second.points('more')} in its second "
        f"({second.interval_in_points('more')})."
    )


def own_costs_more(layer: Trained) -> bool:
    """Whether taking a class's favourite away costs its own images more than others, in every seed."""
    return all(
        each["swap"]["knock_out"]["own"] > each["swap"]["knock_out"]["others"]
        for each in layer.layers
    )


def of_knock_out(bundled: dict[str, list[Trained]], small: list[Trained]) -> str:
    """README.md's sentence on it."""
    asked = [*bundled["cifar10"], *bundled["pets"], *small]
    p = max(each["swap"]["knock_out"]["p_value"] for layer in asked for each in layer.layers)
    where = "in every layer" if all(map(own_costs_more, asked)) else "not in every layer"
    others = " and ".join(
        layer.layers[0]["name"] for layer in bundled["cats_vs_dogs"] if not own_costs_more(layer)
    )
    return (
        f"own is larger {where} on CIFAR-10 and drawn pets (p at most {p:.3f}, images permuted between classes), and "
        f"not in {others} of cats and dogs."
    )


def of_same_patches(bundled: dict[str, list[Trained]], small: list[Trained]) -> list[str]:
    """README.md on patches that chose a class's favourite and one other expert, in same_patches.jsonl."""

    def nats(layer: Trained, change: str, end: str = "") -> str:
        low, high = layer.interval(change, "log_loss")
        return f"{layer.nats(change)} ({low:.3f} to {high:.3f}{end})"

    first, second = bundled["cifar10"]
    of_pets = [nats(layer, "beyond_patches") for layer in bundled["pets"]]
    of_small = [nats(layer, "beyond_patches") for layer in small]
    seeds = [each for layer in small for each in layer.layers]
    above = sum(each["swap"]["beyond_patches"]["log_loss"]["low"] > 0 for each in seeds)
    return [
        f"in the favourite's place costs {nats(first, 'same_patches')} nats in CIFAR-10's {first.place}, in the "
        f"other's place {nats(first, 'their_other')}: a difference of {nats(first, 'beyond_patches')}. It is "
        f"{nats(second, 'beyond_patches')} in CIFAR-10's {second.place}, {of_pets[0]} and {of_pets[1]} in drawn pets' "
        f"{bundled['pets'][0].place} and {bundled['pets'][1].place}, and above 0 in {above} of {len(seeds)} layers of "
        f"the small model, {of_small[0]} in {small[0].place} and {of_small[1]} in {small[1].place} over "
        f"{len(small[0].layers)} seeds."
    ]


def of_other_costs(records: list[dict], again: list[dict]) -> str:
    """Whether all costs that both files have are the same, but for rounding."""
    earlier = {record["name"]: record for record in records}
    same = all(
        math.isclose(
            before["swap"][cost][unit][end], after["swap"][cost][unit][end], rel_tol=0, abs_tol=1e-6
        )
        for record in again
        for before, after in zip(earlier[record["name"]]["layers"], record["layers"], strict=True)
        for cost in ("without", "routes", "favourite", "any_two", "more")
        for unit in ("points", "log_loss")
        for end in ("value", "low", "high")
    )
    return f"all other costs are {'the same' if same else 'not the same'} again"


def of_records(records: list[dict]) -> list[str]:
    """How the trained models were asked."""
    small = [record for record in records if "seed" in record]
    images = {record["name"]: record["images"] for record in records}
    right = span([100 * record["top1"] for record in small], 1)
    return [
        f"{small[0]['steps']} steps on CIFAR-10), six seeds, {right} % right",
        f"{images['cifar10']:,} test images each (cats and dogs: all {images['cats_vs_dogs']})",
    ]


def headline(bundled: dict[str, list[Trained]]) -> str:
    """README.md of the repository."""
    layers = [layer for of_model in bundled.values() for layer in of_model]
    yes = sum(layer.answers == ["yes"] for layer in layers)
    by_log_loss = sum(layer.costs_more_log_loss for layer in layers)
    first = bundled["cifar10"][0]
    return (
        f"Yes in {yes} of {len(layers)} layers of bundled models with eight experts, by log-loss alone in "
        f"{by_log_loss}. In the first of CIFAR-10's, exchanging a class's favourite expert costs "
        f"{first.points('favourite')} points, any two others at as many patches {first.points('any_two')} "
        f"(difference {first.points('more')}, "
        f"{first.interval_in_points('more')})"
    )


def yes_of(question: Callable[[dict], str], settings: list[Setting]) -> int:
    """How many settings answer a question with yes."""
    return sum(setting.answer(question) == "yes" for setting in settings)


class Count(NamedTuple):
    """Of trained layers: how many say yes, of how many, and how many lose more log-loss by the favourite."""

    yes: int
    of: int
    by_log_loss: int


def count(layers: list[Trained]) -> Count:
    """Each seed of a layer counts."""
    answers = [answer for layer in layers for answer in layer.answers]
    return Count(
        answers.count("yes"), len(answers), sum(layer.costs_more_log_loss for layer in layers)
    )


def row_of_results(settings: dict[str, list[Setting]], bundled: Count, small: Count) -> str:
    """The row of docs/results.md: a question counts if most settings, or most trained layers of both kinds, say yes."""
    everything = [setting for of_data in settings.values() for setting in of_data]
    asked = len(everything)
    first, second, third = (
        yes_of(question, everything) for question in (first_answer, second_answer, third_answer)
    )
    third_holds = bundled.yes > bundled.of / 2 and small.yes > small.of / 2
    holds = (first > asked / 2) + (second > asked / 2) + third_holds
    part = ", another in part" if not third_holds and bundled.yes + small.yes else ""
    by_data = {
        data: f"{yes_of(first_answer, of_data)} of {len(of_data)}"
        for data, of_data in settings.items()
    }
    return (
        f"| Experts specialize | {holds} of 3 questions{part} | Do classes go to different experts? In upcycled models "
        f"yes in {by_data['pets']} settings on pets, {by_data['cifar10']} on cifar10, {by_data['cats_vs_dogs']} on "
        f"cats_vs_dogs. Did training the router add to that? In {second} of {asked}. Do experts do different things, "
        f"by class? In {third} of {asked}; in trained models yes in {bundled.yes} of {bundled.of} layers of bundled "
        f"ones (by log-loss alone {bundled.by_log_loss}), {small.yes} of {small.of} of small ones "
        f"({small.by_log_loss}) ([specialization](../benchmarks/specialization/README.md)). |"
    )


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the records."""
    runs, records = read("runs.jsonl"), read("scratch.jsonl")
    settings = {data: settings_of(runs, data) for data in DATA_SETS}
    bundled, small = bundled_layers(records), small_layers(records)
    again = read("same_patches.jsonl")
    every_bundled = [layer for layers in bundled.values() for layer in layers]
    return {
        README: [
            of_cifar10_model(*bundled["cifar10"]),
            of_small_model(*small),
            f"a class's favourite with any other costs {bundled['pets'][1].points('exchange')} points)",
            of_all_settings([setting for of_data in settings.values() for setting in of_data]),
            of_pets(settings["pets"]),
            of_cifar10(settings["cifar10"]),
            *rule_on_photos(settings["cats_vs_dogs"]),
            of_photos(settings["cats_vs_dogs"]),
            where_runs_come_from(runs),
            *of_records(records),
            *map(trained_row, [*every_bundled, *small]),
            of_knock_out(bundled, small),
            *of_same_patches(bundled_layers(again), small_layers(again)),
            of_other_costs(records, again),
        ],
        "README.md": [headline(bundled)],
        RESULTS: [row_of_results(settings, count(every_bundled), count(small))],
    }


if __name__ == "__main__":
    for page, texts in statements().items():
        print(page, *texts, sep="\n  ")
