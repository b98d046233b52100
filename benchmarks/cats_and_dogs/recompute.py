"""Recompute every measured number of README.md from runs.jsonl, with NumPy and SciPy alone.

Question: "expert 1 focuses on cats, expert 2 on dogs". Each photo is sent to one of two experts: what does a gate find
by itself, what does a balance loss add, and what only supervision by the class? The rule is in protocol.md.

Code: commit 38cceb3e ran it. Accuracies, shares and guesses are computed from the class, the answer and the expert of
each test photo. Losses without an expert, their intervals, and the answers to the questions of the last two columns of
the second table are as they were measured: the record has no outputs for them.

    python benchmarks/cats_and_dogs/recompute.py
"""

import json
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

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


def add_facts(run: Record) -> None:
    """Tell each layer of a run its `photos` [2, experts] of each class in each expert, and what follows from them.

    `in_own`: the share of the cats in the experts that see more of the cats than of the dogs, and of the dogs in the
    others; `own`: the expert that leans most to cats, and the one that leans most to dogs, always two; `busiest`: the
    busiest expert's share; `guess`: how often the class is guessed correctly if each expert says its more frequent one.
    """
    for layer in run["layers"]:
        photos = np.zeros((2, len(layer["load"])))
        np.add.at(photos, (list(map(int, run["labels"])), list(map(int, layer["routes"]))), 1)
        cats, dogs = photos / photos.sum(axis=1, keepdims=True)
        order = np.argsort(dogs - cats, kind="stable")
        layer["in_own"] = cats[cats >= dogs].sum(), dogs[cats < dogs].sum()
        layer["own"] = order[0], order[-1]
        layer["busiest"] = photos.sum(axis=0).max() / photos.sum()
        layer["guess"] = photos.max(axis=0).sum() / photos.sum()


def best_guess(layers: Seeds, control: str) -> float:
    """The same of the best of a control's tries: the mean over seeds."""
    return fmean(max(each["guess"] for each in layer[control]) for layer in layers)


def lost_by_exchange(layers: Seeds, unit: str) -> float:
    """What it costs that every photo gets the other expert: the mean over seeds."""
    return fmean(layer["swap"][unit]["value"] for layer in layers)


def is_separate(layer: Record) -> bool:
    """The protocol's rule for where photos go."""
    return min(layer["in_own"]) >= SEPARATE


def is_different(layer: Record) -> bool:
    """The protocol's rule for what experts do: leaving the layer out and exchanging its experts both cost log-loss."""
    swap = layer["swap"]
    return min(swap["without"]["log_loss"]["low"], swap["log_loss"]["low"]) > 0


def less(runs: dict[tuple[str, str], Seeds], learn: str, gate: str, other: str) -> list[float]:
    """A gate's accuracy minus another's in each seed that it has."""
    of_other = {run["seed"]: accuracy(run) for run in runs[learn, other]}
    return [accuracy(run) - of_other[run["seed"]] for run in runs[learn, gate]]


def with_interval(differences: list[float]) -> str:
    """The mean difference with Student's 95 % interval over seeds, in points."""
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    return f"{100 * fmean(differences):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def verdicts(differences: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], str]:
    """Of each gate with several seeds, by Holm's adjustment over all of them."""
    p = {k: ttest_1samp(each, 0).pvalue for k, each in differences.items() if len(each) > 1}
    words, largest = {}, 0.0
    for rank, key in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, (len(p) - rank) * p[key])
        side = "above" if fmean(differences[key]) > 0 else "below"
        words[key] = "not told apart" if largest >= 0.05 else side
    return words


def accuracy_rows(runs: dict[tuple[str, str], Seeds]) -> list[str]:
    """Test accuracy of each gate, beside the dense model in which the same learns."""
    differences = {key: less(runs, *key, "dense") for key in runs if key[1] != "dense"}
    words, rows = verdicts(differences), []
    for (learn, gate), own in runs.items():
        percents = [100 * accuracy(run) for run in own]
        mean = f"{fmean(percents):.1f}" if own else ""
        mean += f" ± {stdev(percents):.1f}" if len(own) > 1 else ""
        interval = verdict = ""
        if gate != "dense" and own:
            gaps = differences[learn, gate]
            interval = with_interval(gaps) if len(own) > 1 else f"{100 * gaps[0]:+.1f}"
            verdict = words.get((learn, gate), "not told apart")
        by_seed = ", ".join(f"{percent:.1f}" for percent in percents)
        cells = [LEARN[learn], GATES[gate], str(len(own)), mean, by_seed, interval, verdict]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def where_row(learn: str, gate: str, layers: Seeds) -> str:
    """Which class goes where, and what the expert tells about the class beside two controls."""
    by_seed = [" / ".join(f"{100 * share:.0f}" for share in layer["in_own"]) for layer in layers]
    controls = (best_guess(layers, name) for name in ("before", "clusters"))
    guesses = [
        f"{100 * share:.1f}" for share in (fmean(layer["guess"] for layer in layers), *controls)
    ]
    separate = f"{sum(map(is_separate, layers))} of {len(layers)}"
    busy = f"{100 * fmean(layer['busiest'] for layer in layers):.0f}"
    cells = [learn, gate, layers[0]["name"], ", ".join(by_seed), busy, *guesses, separate]
    for question in (0, 1):
        answers = Counter(layer["answers"][question] for layer in layers)
        cells.append(", ".join(f"{answer} {seeds}" for answer, seeds in answers.items()))
    return f"| {' | '.join(cells)} |"


def answer(layers: dict[tuple[str, str], list[Seeds]]) -> tuple[str, str]:
    """Whether the sentence holds by the protocol's rule; and how many layers are separate, and different, too."""
    separate, both, holds = [], [], {}
    for gate in ("alone", "balanced", "class"):
        own = layers["experts", gate] + layers["blocks", gate]
        every = [layer for seeds in own for layer in seeds]
        separate.append(f"{GATES[gate]} {sum(map(is_separate, every))} of {len(every)}")
        both.append(str(sum(is_separate(layer) and is_different(layer) for layer in every)))
        holds[gate] = any(
            all(is_separate(layer) and is_different(layer) for layer in seeds) for seeds in own
        )
    verdict = "only if told" if holds["class"] else "not shown"
    if holds["alone"] or holds["balanced"]:
        verdict = "yes"
    return verdict, (
        f"Cats and dogs get experts of their own in so many layers: {', '.join(separate)}; of these, experts are also "
        f"shown to do different things in {listed(both)}"
    )


def read_records() -> Seeds:
    """All runs."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def runs_by_gate(records: Seeds) -> dict[tuple[str, str], Seeds]:
    """What learns and gate -> its runs by seed; each of their layers knows its facts."""
    runs: dict[tuple[str, str], Seeds] = {(learn, gate): [] for learn in LEARN for gate in GATES}
    for record in sorted(records, key=lambda record: record["seed"]):
        add_facts(record)
        runs[record["learn"], record["gate"]].append(record)
    return runs


def layers_of(runs: dict[tuple[str, str], Seeds]) -> dict[tuple[str, str], list[Seeds]]:
    """What learns and gate -> each of its layers in every seed."""
    return {
        key: list(map(list, zip(*(run["layers"] for run in own), strict=True)))
        for key, own in runs.items()
    }


def verdict_of(records: Seeds) -> str:
    """Whether the sentence holds: yes, only if told, or not shown."""
    return answer(layers_of(runs_by_gate(records)))[0]


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    runs = runs_by_gate(read_records())
    layers = layers_of(runs)
    verdict, counts = answer(layers)
    records = [run for own in runs.values() for run in own]
    minutes = sum(sum(record["cpu_s"].values()) for record in records) / 60
    machine = records[0]["machine"]["cpu"]
    block_7, block_9 = ({key: own[place] for key, own in layers.items() if own} for place in (0, 1))
    of_class = block_7["experts", "class"]
    # Points that a class's photos lose in the own expert of either class, if it computes nothing; None: it has none.
    lost = {
        (label, owner): listed(
            [
                f"{layer['swap']['knock_out']['points'][label][layer['own'][owner]] or 0:z.0f}"
                for layer in of_class
            ]
        )
        for label in (CATS, DOGS)
        for owner in (CATS, DOGS)
    }
    left_out = [
        layer["swap"]["without"]["points"]["value"]
        for gate in ("alone", "balanced", "class")
        for layer in block_7["experts", gate]
    ]
    below = {gate: less(runs, "experts", gate, "dense") for gate in ("class", "balanced", "alone")}
    told = {
        gate: with_interval(less(runs, "experts", "class", gate)) for gate in ("balanced", "alone")
    }
    least, *_, most = sorted(f"{-100 * fmean(differences):.1f}" for differences in below.values())
    of_telling = less(runs, "experts", "class", "balanced")
    p = ttest_1samp(of_telling, 0).pvalue
    costs = "shown" if p < 0.05 and fmean(of_telling) < 0 else "not shown"
    exchanged = f"{lost_by_exchange(of_class, 'points'):z.1f}"
    changed = f"{-lost_by_exchange(of_class, 'points'):+z.1f}"
    with_blocks = block_7["blocks", "class"]
    guesses = {
        key: f"{100 * fmean(layer['guess'] for layer in seeds):.0f} %"
        for key, seeds in block_7.items()
    }
    alone, balanced = guesses["experts", "alone"], guesses["experts", "balanced"]
    alone_blocks, balanced_blocks = guesses["blocks", "alone"], guesses["blocks", "balanced"]
    own_finding = "finds" if verdict == "yes" else "doesn't find"
    collapses = all(layer["busiest"] == 1 for layer in block_9["experts", "alone"])
    readme = [
        f"**{verdict.replace('if told', 'if it is told').capitalize()}.** Taught the class, the gate sends at least "
        f"{100 * min(min(layer['in_own']) for layer in of_class):.0f} % of the cats, and of the dogs, to an expert of "
        f"their own. They divide photos, hardly skills: exchanged they cost {exchanged} points.",
        f"in the three trainings cats in the cats' expert lose {lost[CATS, CATS]} points, cats in the dogs' "
        f"{lost[CATS, DOGS]}; dogs in the dogs' expert {lost[DOGS, DOGS]}, dogs in the cats' {lost[DOGS, CATS]}.",
        f"costs {min(left_out):.0f} to {max(left_out):.0f} points, whatever the gate and the training.",
        f"less than the dense model, whose MLP stays whole: {with_interval(below['class'])} points told, "
        f"{with_interval(below['balanced'])} with balance, {with_interval(below['alone'])} alone. "
        f"Telling by itself is {costs} to cost anything: {told['balanced']} beside balance, {told['alone']} beside "
        "alone. Where the last blocks learn too, told minus dense is "
        f"{with_interval(less(runs, 'blocks', 'class', 'dense'))}.",
        f"By itself the gate {own_finding} it. From the expert of block 7 the class is guessed in {alone} (half is "
        f"chance), with balance losses in {balanced}; in block 9 the gate alone sends every photo to "
        f"{'one expert' if collapses else 'several experts'}. Where the last blocks learn with it, the guess is right "
        f"in {alone_blocks} and {balanced_blocks}, and clusters of the same input tell "
        f"{100 * best_guess(block_7['blocks', 'balanced'], 'clusters'):.0f} %.",
        f"exchanged they cost {lost_by_exchange(with_blocks, 'log_loss'):.3f} nats and no photo "
        f"({lost_by_exchange(with_blocks, 'points'):z.1f} points)",
        f"**{counts}.**",
        *accuracy_rows(runs),
        *(
            where_row(LEARN[learn], GATES[gate], own)
            for (learn, gate), many in layers.items()
            for own in many
        ),
        f"- {len(records)} records, {minutes:.0f} CPU minutes beside those of the tokens, on {machine}.",
    ]
    front_page = (
        f"Two experts (copies of the MLP, half of their units drawn anew) were {least} to {most} points below dense, "
        f"told or not (told − balanced {told['balanced']}). Exchanging them changes accuracy by {changed} points: "
        "they divide photos, hardly skills"
    )
    guide = (
        f"told or not, two experts were {least} to {most} points below dense where only experts learned (told − "
        f"balanced {told['balanced']}); from the expert that an untold router chose in block 7, the class is guessed "
        f"in {alone} to {alone_blocks} (chance 50), with balance losses in {balanced} to {balanced_blocks}"
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
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
