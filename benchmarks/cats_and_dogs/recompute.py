"""Recompute every measured number of README.md from runs.jsonl, with NumPy and SciPy alone.

Question: "expert 1 focuses on cats, expert 2 on dogs". Each photo is sent to one of two experts: what does a gate find
by itself, what does a balance loss add, and what only supervision by the class? The rule is in protocol.md.

Code: commit 38cceb3e ran it. Accuracies, shares and guesses are computed from the class, the answer and the expert of
each test photo. Losses without an expert, their intervals, and the answers to the questions of the last two columns of
the second table are as they were measured: the record has no outputs for them.

    python benchmarks/cats_and_dogs/recompute.py
"""

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import t as student

HERE = Path(__file__).parent
LEARN = {"experts": "experts alone", "blocks": "last blocks"}
GATES = {
    "dense": "dense, no gate",
    "alone": "learned alone",
    "balanced": "learned with balance",
    "class": "supervised by the class",
    "balanced-4": "learned with balance, 4 experts",
}
SEPARATE = 0.9  # the protocol's rule: so many of each class's photos in its own experts
CATS, DOGS = 0, 1
Record = dict[str, Any]
Seeds = list[Record]
"""A run, or a layer of it, in every seed."""


def accuracy(run: Record) -> float:
    """Share of the test photos whose class is found."""
    return fmean(a == b for a, b in zip(run["labels"], run["predicted"], strict=True))


def photos_by_expert(run: Record, layer: Record) -> np.ndarray:
    """[2, experts] how many photos of each class a layer sends to each expert."""
    photos = np.zeros((2, len(layer["load"])))
    for label, expert in zip(run["labels"], layer["routes"], strict=True):
        photos[int(label), int(expert)] += 1
    return photos


def shares(layer: Record) -> np.ndarray:
    """[2, experts] share of each class's photos in each expert."""
    return layer["photos"] / layer["photos"].sum(axis=1, keepdims=True)


def in_own(layer: Record) -> tuple[float, float]:
    """Share of the cats in the experts that see more of the cats than of the dogs, and of the dogs in the others."""
    cats, dogs = shares(layer)
    return cats[cats >= dogs].sum(), dogs[cats < dogs].sum()


def own_experts(layer: Record) -> tuple[int, int]:
    """The expert that leans most to cats, and the one that leans most to dogs: always two."""
    order = np.argsort(shares(layer)[DOGS] - shares(layer)[CATS], kind="stable")
    return order[0], order[-1]


def busiest(layer: Record) -> float:
    """Share of all photos that the busiest expert has."""
    return layer["photos"].sum(axis=0).max() / layer["photos"].sum()


def guess(layer: Record) -> float:
    """How often the class is guessed correctly from the expert: each expert says its more frequent class."""
    return layer["photos"].max(axis=0).sum() / layer["photos"].sum()


def best_guess(layers: Seeds, control: str) -> float:
    """The same of the best of a control's tries: the mean over seeds."""
    return fmean(max(each["guess"] for each in layer[control]) for layer in layers)


def lost_without(layer: Record, unit: str, label: int, owner: int) -> float:
    """What all photos of a class lose in the mean where the own expert of cats, or of dogs, computes nothing."""
    expert = own_experts(layer)[owner]
    loss_of_its_photos = layer["swap"]["knock_out"][unit][label][expert] or 0.0  # None where it has no photos
    return loss_of_its_photos * shares(layer)[label][expert]


def mean_costs(layers: Seeds) -> dict[str, list[float]]:
    """Unit -> what is lost without the layer, without each expert for each class, and where experts are exchanged."""
    costs = {}
    for unit in ("log_loss", "points"):
        columns = [[layer["swap"]["without"][unit]["value"] for layer in layers]]
        for label in (CATS, DOGS):
            for owner in (CATS, DOGS):
                columns.append([lost_without(layer, unit, label, owner) for layer in layers])
        columns.append([layer["swap"][unit]["value"] for layer in layers])
        costs[unit] = list(map(fmean, columns))
    return costs


def is_separate(layer: Record) -> bool:
    """The protocol's rule for where photos go."""
    return min(in_own(layer)) >= SEPARATE


def is_different(layer: Record) -> bool:
    """The protocol's rule for what experts do: leaving the layer out and exchanging its experts both cost log-loss."""
    swap = layer["swap"]
    return min(swap["without"]["log_loss"]["low"], swap["log_loss"]["low"]) > 0


def paired_test(differences: list[float]) -> tuple[float, float, float]:
    """Student's t of one difference for each seed: mean, half the 95 % interval, two-sided p."""
    seeds, mean = len(differences), fmean(differences)
    error = stdev(differences) / math.sqrt(seeds)
    return mean, student.ppf(0.975, seeds - 1) * error, 2 * student.sf(abs(mean) / error, seeds - 1)


def less_dense(runs: dict[tuple[str, str], Seeds], learn: str, gate: str) -> list[float]:
    """A gate's accuracy minus the dense model's in each seed that it has."""
    dense = {run["seed"]: accuracy(run) for run in runs[learn, "dense"]}
    return [accuracy(run) - dense[run["seed"]] for run in runs[learn, gate]]


def number(value: float, digits: int) -> str:
    """With a true minus sign, and none in front of 0."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def points(share: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def verdicts(differences: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], str]:
    """Of each gate with several seeds, by Holm's adjustment over all of them."""
    tests = {key: paired_test(each) for key, each in differences.items() if len(each) > 1}
    words, largest = {}, 0.0
    for rank, key in enumerate(sorted(tests, key=lambda key: tests[key][2])):
        largest = max(largest, (len(tests) - rank) * tests[key][2])
        words[key] = "not told apart" if largest >= 0.05 else "above" if tests[key][0] > 0 else "below"
    return words


def accuracy_rows(runs: dict[tuple[str, str], Seeds]) -> list[str]:
    """Test accuracy of each gate, beside the dense model in which the same learns."""
    differences = {key: less_dense(runs, *key) for key in runs if key[1] != "dense"}
    words, rows = verdicts(differences), []
    for (learn, gate), own in runs.items():
        percents = [100 * accuracy(run) for run in own]
        mean = f"{fmean(percents):.1f}" if own else ""
        mean += f" ± {stdev(percents):.1f}" if len(own) > 1 else ""
        interval = verdict = ""
        if gate != "dense" and own:
            interval, verdict = points(fmean(differences[learn, gate])), words.get((learn, gate), "not told apart")
            if len(own) > 1:
                middle, half, _ = paired_test(differences[learn, gate])
                interval += f" ({points(middle - half)} to {points(middle + half)})"
        by_seed = ", ".join(f"{percent:.1f}" for percent in percents)
        cells = [LEARN[learn], GATES[gate], str(len(own)), mean, by_seed, interval, verdict]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def where_cells(layers: Seeds) -> list[str]:
    """Which class goes where, and what the expert tells about the class beside two controls."""
    by_seed = [" / ".join(f"{100 * share:.0f}" for share in in_own(layer)) for layer in layers]
    guesses = [fmean(map(guess, layers)), best_guess(layers, "before"), best_guess(layers, "clusters")]
    cells = [", ".join(by_seed), f"{100 * fmean(map(busiest, layers)):.0f}"]
    cells += [f"{100 * share:.1f}" for share in guesses]
    cells.append(f"{sum(map(is_separate, layers))} of {len(layers)}")
    for question in (0, 1):
        answers = [layer["answers"][question] for layer in layers]
        cells.append(", ".join(f"{answer} {answers.count(answer)}" for answer in dict.fromkeys(answers)))
    return cells


def lost_cells(layers: Seeds) -> list[str]:
    """What is lost, in nats (points); double dissociation; and where experts are different."""
    costs = mean_costs(layers)
    cells = []
    for nats, lost_points in zip(costs["log_loss"], costs["points"], strict=True):
        cells.append(f"{number(nats, 3)} ({number(lost_points, 1)})")
    p_values = [layer["swap"]["knock_out"]["p_value"] for layer in layers]
    cells.append(f"{sum(p is not None and p <= 0.05 for p in p_values)} of {len(layers)}")
    cells.append(f"{sum(map(is_different, layers))} of {len(layers)}")
    return cells


def sent_cells(runs: Seeds, layers: Seeds) -> list[str]:
    """Cats and dogs that are right by their own routes, and where one expert computes all photos."""
    columns = [[run["own"]["right"] for run in runs]]
    for owner in (CATS, DOGS):
        columns.append([layer["sent"][own_experts(layer)[owner]]["right"] for layer in layers])
    return [" / ".join(f"{100 * share:.0f}" for share in np.mean(column, axis=0)) for column in columns]


def answer(layers: dict[tuple[str, str], list[Seeds]]) -> tuple[str, str]:
    """Whether the sentence holds by the protocol's rule; and how many layers are separate, and different, too."""
    separate, both, holds = [], [], {}
    for gate in ("alone", "balanced", "class"):
        own = layers["experts", gate] + layers["blocks", gate]
        every = [layer for seeds in own for layer in seeds]
        separate.append(f"{GATES[gate]} {sum(map(is_separate, every))} of {len(every)}")
        both.append(str(sum(is_separate(layer) and is_different(layer) for layer in every)))
        holds[gate] = any(all(is_separate(layer) and is_different(layer) for layer in seeds) for seeds in own)
    verdict = "yes" if holds["alone"] or holds["balanced"] else "only if told" if holds["class"] else "not shown"
    return verdict, (
        f"Cats and dogs get experts of their own in so many layers: {', '.join(separate)}; of these, experts are also "
        f"shown to do different things in {listed(both)}"
    )


def read_runs() -> dict[tuple[str, str], Seeds]:
    """What learns and gate -> its runs by seed; each of their layers knows its photos."""
    records = [json.loads(line) for line in (HERE / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    runs: dict[tuple[str, str], Seeds] = {(learn, gate): [] for learn in LEARN for gate in GATES}
    for record in sorted(records, key=lambda record: record["seed"]):
        for layer in record["layers"]:
            layer["photos"] = photos_by_expert(record, layer)
        runs[record["learn"], record["gate"]].append(record)
    return runs


def table_rows(runs: dict[tuple[str, str], Seeds], layers: dict[tuple[str, str], list[Seeds]]) -> list[str]:
    """Every row of the four tables."""
    rows = accuracy_rows(runs)
    for (learn, gate), own in layers.items():
        for seeds in own:
            for cells in (where_cells(seeds), lost_cells(seeds), sent_cells(runs[learn, gate], seeds)):
                rows.append(f"| {LEARN[learn]} | {GATES[gate]} | {seeds[0]['name']} | {' | '.join(cells)} |")
    return rows


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    runs = read_runs()
    layers = {}  # each of the layers in every seed
    for key, own in runs.items():
        layers[key] = [list(seeds) for seeds in zip(*(run["layers"] for run in own), strict=True)]
    verdict, counts = answer(layers)
    records = [run for own in runs.values() for run in own]
    minutes = sum(sum(record["cpu_s"].values()) for record in records) / 60
    machine = records[0]["machine"]["cpu"]
    block_7, block_9 = ({key: own[place] for key, own in layers.items() if own} for place in (0, 1))
    of_class = block_7["experts", "class"]
    _, cats_cats, cats_dogs, dogs_cats, dogs_dogs, exchanged = mean_costs(of_class)["points"]
    with_blocks = {unit: costs[-1] for unit, costs in mean_costs(block_7["blocks", "class"]).items()}
    cats, dogs = (
        listed([f"{lost_without(layer, 'points', label, label):.0f}" for layer in of_class]) for label in (CATS, DOGS)
    )
    right = {gate: f"{100 * fmean(map(accuracy, runs['experts', gate])):.1f} %" for gate in ("class", "dense")}
    mean, half, _ = paired_test(less_dense(runs, "experts", "class"))
    cost, low, high = (number(100 * end, 1) for end in (mean, mean - half, mean + half))
    guesses = {key: f"{100 * fmean(map(guess, seeds)):.0f} %" for key, seeds in block_7.items()}
    alone, balanced = guesses["experts", "alone"], guesses["experts", "balanced"]
    alone_blocks, balanced_blocks = guesses["blocks", "alone"], guesses["blocks", "balanced"]
    own_finding = "finds" if verdict == "yes" else "doesn't find"
    collapses = all(busiest(layer) == 1 for layer in block_9["experts", "alone"])
    readme = [
        f"**{verdict.replace('if told', 'if it is told').capitalize()}.** Taught the class, the gate sends at least "
        f"{100 * min(min(in_own(layer)) for layer in of_class):.0f} % of the cats, and of the dogs, to an expert of "
        "their own, and one can switch it off: without the cats' expert of block 7 "
        f"{cats_cats:.0f} points of the cats are lost in the mean ({cats} in the three trainings) and {dogs_cats:.0f} "
        f"of the dogs, without the dogs' expert {dogs_dogs:.0f} of the dogs ({dogs}) and {cats_dogs:.0f} of the cats. "
        "They divide the photos more than the skill: each does the other's nearly as well (exchanged they cost "
        f"{number(exchanged, 1)} points). Supervision costs accuracy: {right['class']} of the test photos are right, "
        f"of the dense model {right['dense']} ({cost}, {low} to {high} points).",
        f"By itself the gate {own_finding} it. From the expert of block 7 the class is guessed in {alone} (half is "
        f"chance), with balance losses in {balanced}; in block 9 the gate alone sends every photo to "
        f"{'one expert' if collapses else 'several experts'}. Where the last blocks learn with it, the guess is right "
        f"in {alone_blocks} and {balanced_blocks}, and clusters of the same input tell "
        f"{100 * best_guess(block_7['blocks', 'balanced'], 'clusters'):.0f} %.",
        f"exchanged they cost {with_blocks['log_loss']:.3f} nats and no photo "
        f"({number(with_blocks['points'], 1)} points)",
        f"**{counts}.**",
        *table_rows(runs, layers),
        f"- {len(records)} records, {minutes:.0f} CPU minutes beside those of the tokens, on {machine}.",
    ]
    front_page = (
        f"costs accuracy: {cost} points ({low} to {high}). In three trainings the cats lost {cats} points without "
        f"their expert of block 7, the dogs {dogs} without theirs"
    )
    guide = (
        f"it changed accuracy by {cost} points ({low} to {high}) where only experts learned; from the expert that an "
        f"untold router chose in block 7, the class is guessed in {alone} to {alone_blocks} (chance 50), with balance "
        f"losses in {balanced} to {balanced_blocks}"
    )
    results = (
        f"| Expert 1 focuses on cats, expert 2 on dogs | {verdict} | {counts} "
        "([cats_and_dogs](../benchmarks/cats_and_dogs/README.md)). |"
    )
    return {
        "benchmarks/cats_and_dogs/README.md": readme,
        "README.md": [front_page],
        "docs/guides/when-experts.md": [guide],
        "docs/results.md": [results],
    }


if __name__ == "__main__":
    for page, texts in statements().items():
        print(f"{page}\n", *texts, sep="\n")
