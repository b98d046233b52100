"""Recompute every measured number of README.md from runs.jsonl, with NumPy and SciPy alone.

Question: experts are trained apart, one for each folder of images, and joined by a router of images. What do they bring
over the cheap form, a head for each folder on the same frozen trunk? The rule that decides is in protocol.md.

Code: commit 3abe4574 ran the experts and the dense models, commit 486aa0e6 the tuned heads. The one run of commit
d21137b4 is from before the first amendment and enters no number.

    python benchmarks/modular/recompute.py
"""

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import t as student

SETS = ("sources", "far", "imagenette")
CONTROL = "heads only, tuned"  # what `joined` has to beat, by GAIN (of accuracy) on SETS_NEEDED of the sets
GAIN, SETS_NEEDED = 0.02, 2
LESS_JOINED = (
    CONTROL,
    "heads only",
    "one head, tuned",
    "no training",
    "dense joint",
    "dense joint, masked",
    "dense with replay, masked",
)
DIFFERENCES = (
    *(("joined", arm) for arm in LESS_JOINED),
    (CONTROL, "no training"),
    ("joined, domain given", "heads only, tuned, domain given"),
)
TIMED = ("router", "heads", "tuned head", "expert", "dense joint", "dense with replay")
Run = dict[str, Any]


def by_domain(hits: np.ndarray, images: list[int]) -> list[np.ndarray]:
    """Values of test images, which come domain after domain, for each domain."""
    return np.split(hits.astype(float), np.cumsum(images)[:-1])


def runs_by_seed(records: list[Run], name: str) -> list[Run]:
    """One run for each seed of a set: the answers and times of its experts, heads and dense models together.

    `correct` has for each arm, and for each domain, which of the test images it classifies correctly (0 or 1). A run
    from before the first amendment doesn't say what it trains, and is left out.
    """
    runs = []
    for seed in range(3):
        own = [record for record in records if "trains" in record]
        parts = [record for record in own if (record["set"], record["seed"]) == (name, seed)]
        run = dict(next(part for part in parts if part["trains"] == "experts"))
        # A later part's time replaces an earlier part's.
        for field in ("predicted", "earlier", "cpu_s"):
            run[field] = {key: value for part in parts for key, value in part[field].items()}
        labels = np.array(list(run["labels"]))
        run["correct"] = {
            arm: by_domain(labels == np.array(list(classes)), run["test_images"])
            for arm, classes in run["predicted"].items()
        }
        runs.append(run)
    return runs


def by_domain_mean(runs: list[Run], arm: str) -> np.ndarray:
    """[domains] accuracy, mean over seeds."""
    return np.mean([[part.mean() for part in run["correct"][arm]] for run in runs], axis=0)


def accuracy(run: Run, arm: str) -> float:
    """Mean over domains."""
    return fmean(images.mean() for images in run["correct"][arm])


def difference(runs: list[Run], first: str, second: str) -> tuple[list[float], float, float]:
    """One arm minus another: the gap in each seed that has both, and half the 95 % interval over images and over seeds.

    Over test images an image's difference is averaged over seeds, and the domains' variances add up. Over seeds it is
    Student's t; infinite with one seed.
    """
    both = [run for run in runs if first in run["predicted"] and second in run["predicted"]]
    gaps = [accuracy(run, first) - accuracy(run, second) for run in both]
    correct = [zip(run["correct"][first], run["correct"][second], strict=True) for run in both]
    by_image = [
        np.mean([own - other for own, other in seeds], axis=0)
        for seeds in zip(*correct, strict=True)
    ]
    variance = sum(images.var(ddof=1) / len(images) for images in by_image)
    half_of_seeds = math.inf
    if len(gaps) > 1:
        half_of_seeds = student.ppf(0.975, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
    return gaps, 1.96 * math.sqrt(variance) / len(by_image), half_of_seeds


def over_images(runs: list[Run], first: str, second: str) -> str:
    """The mean difference with its interval over test images, in points."""
    gaps, half, _ = difference(runs, first, second)
    return with_ends(fmean(gaps), half, 2)


def over_seeds(runs: list[Run], first: str, second: str) -> str:
    """The mean difference with its interval over seeds, where there are several."""
    gaps, _, half = difference(runs, first, second)
    return with_ends(fmean(gaps), half) if len(gaps) > 1 else points(gaps[0])


def is_enough(runs: list[Run]) -> bool:
    """The protocol's rule: joined is at least two points above the control, and both intervals lie above 0."""
    gaps, half_of_images, half_of_seeds = difference(runs, "joined", CONTROL)
    return fmean(gaps) >= GAIN and fmean(gaps) > max(half_of_images, half_of_seeds)


def before_and_after(run: Run, arm: str) -> tuple[float, float]:
    """Accuracy on all domains but the last one, before that one is added and afterwards."""
    images = run["test_images"][:-1]
    hits = np.array(list(run["labels"][: sum(images)])) == np.array(list(run["earlier"][arm]))
    before, after = by_domain(hits, images), run["correct"][arm][:-1]
    return fmean(part.mean() for part in before), fmean(part.mean() for part in after)


def cpu_seconds(runs: list[Run], name: str) -> float:
    """CPU seconds of the parts whose names begin so: the mean over the seeds that have them."""
    times = [[t for part, t in run["cpu_s"].items() if part.startswith(name)] for run in runs]
    return fmean(sum(own) for own in times if own)


def mebibytes(run: Run) -> list[float]:
    """Of the trunk, all experts, all heads, and the router's class means and covariance: float32."""
    size, features = run["parameters"], run["parameters"]["features"]
    heads = sum(run["classes"]) * (features + 1)
    numbers = (size["trunk"], len(run["classes"]) * size["expert"], heads, features**2 + heads)
    return [4 * count / 2**20 for count in numbers]


def points(share: float, digits: int = 1) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * share:+.{digits}f}".replace("-", "−")


def with_ends(mean: float, half: float, digits: int = 1) -> str:
    """A mean with its interval, in points."""
    ends = f"{points(mean - half, digits)} to {points(mean + half, digits)}"
    return f"{points(mean, digits)} ({ends})"


def percent(share: float) -> str:
    """In per cent, without the sign."""
    return f"{100 * share:.1f}"


def table_rows(name: str, runs: list[Run]) -> list[list[str]]:
    """The cells of every row about a set of domains."""
    rows, first = [], runs[0]
    for arm in dict.fromkeys(arm for run in runs for arm in run["predicted"]):
        own = [run for run in runs if arm in run["predicted"]]
        seeds = [accuracy(run, arm) for run in own]
        domains = by_domain_mean(own, arm)
        mean = percent(fmean(seeds)) + (f" ± {percent(stdev(seeds))}" if len(seeds) > 1 else "")
        rows.append([arm, mean, ", ".join(map(percent, seeds)), " / ".join(map(percent, domains))])
    for pair in DIFFERENCES:
        by_seed = ", ".join(map(points, difference(runs, *pair)[0]))
        verdict = "" if pair != ("joined", CONTROL) else "yes" if is_enough(runs) else "no"
        intervals = [over_images(runs, *pair), over_seeds(runs, *pair)]
        rows.append([" − ".join(pair), *intervals, by_seed, verdict])
    # The router is in closed form: the same in all seeds.
    router, validation = first["router"], percent(first["routers_on_validation"][first["router"]])
    for place, sent in enumerate(first["sent"]):
        shares = [percent(count / sum(sent)) for count in sent]
        counts = [first["domains"][place], f"{sum(sent):,}", shares[place], " / ".join(shares)]
        rows.append([router, validation, *counts])
    for arm in dict.fromkeys(arm for run in runs for arm in run["earlier"]):
        pairs = [before_and_after(run, arm) for run in runs if arm in run["earlier"]]
        before, after = np.mean(pairs, axis=0)
        changes = ", ".join(points(after - before) for before, after in pairs)
        added = first["domains"][-1]
        rows.append([added, arm, percent(before), percent(after), points(after - before), changes])
    costs = [*(cpu_seconds(runs, part) for part in TIMED), *mebibytes(first)]
    rows.append([f"{sum(first['training_images']):,}", *(f"{cost:.1f}" for cost in costs)])
    return [[name, *cells] for cells in rows]


def is_above_the_rule(records: list[Run]) -> bool:
    """Whether joined experts are more accurate than the linear rule, which needs no training, on every set."""
    for name in SETS:
        gaps, half, _ = difference(runs_by_seed(records, name), "joined", "no training")
        if fmean(gaps) <= half:
            return False
    return True


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    records = [record for record in map(json.loads, text.splitlines()) if "trains" in record]
    sets = {name: runs_by_seed(records, name) for name in SETS}
    sources, imagenette = sets["sources"], sets["imagenette"]

    def over(arm: str) -> list[str]:
        return [over_images(runs, "joined", arm) for runs in sets.values()]

    def is_a_tie(arm: str) -> bool:
        gaps, half, _ = difference(imagenette, "joined", arm)
        return abs(fmean(gaps)) <= half

    enough = sum(map(is_enough, sets.values()))
    is_built = enough >= SETS_NEEDED
    verdict = "Build modular experts" if is_built else "Don't build modular experts"
    gains, heads, joint, replay = map(
        over, (CONTROL, "heads only", "dense joint", "dense with replay, masked")
    )
    ties = "neither from" if is_a_tie("one head, tuned") and is_a_tie("no training") else "from"
    exact = 100 * fmean(difference(sources, "joined", CONTROL)[0])
    lost = [
        points(np.diff([before_and_after(run, "joined") for run in runs]).mean())
        for runs in sets.values()
    ]
    apart = by_domain_mean(sources, "joined, domain given")
    cheap = cpu_seconds(sources, "tuned head") + cpu_seconds(sources, "router")
    experts = cpu_seconds(sources, "expert")
    _, experts_mib, heads_mib, statistics_mib = mebibytes(sources[0])
    machine = sources[0]["machine"]["cpu"]
    minutes = sum(sum(record["cpu_s"].values()) for record in records) / 60
    readme = [
        f"**By the rule they are {'' if is_built else 'not '}built",
        f"They bring {gains[0]} points on `sources`, {gains[1]} on `far`, {gains[2]} on `imagenette` (three seeds",
        f"That is {('no', 'one', 'two', 'three')[enough]} set: on `sources` the mean is {exact:.3f} points",
        f"joined is ahead by {heads[0]}, {heads[1]} and {heads[2]} points",
        f"told apart {ties} a head of all classes ({over('one head, tuned')[2]} points) nor from LDA "
        f"({over('no training')[2]})",
        f"dense training on all the data at once by {joint[0]}, {joint[1]} and {joint[2]} points",
        f"masked by the router, by {replay[0]}, {replay[1]} and {replay[2]}",
        f"that is {cheap:.0f} CPU seconds and {heads_mib + statistics_mib:.1f} MiB beside the trunk; experts take "
        f"{experts:.0f} CPU seconds in all and {experts_mib / 3:.1f} MiB each",
        f"answers of joined {lost[0]} points on `sources`, {lost[1]} on `far` and {lost[2]} on `imagenette`, by",
        f"cats and dogs {percent(apart[0])} %, Imagenette {percent(apart[1])} %, eight classes of CIFAR-10 "
        f"{percent(apart[2])} % of test images",
        f"**{verdict}: joined minus tuned heads only is at least 2 points, with its intervals above 0, on {enough} of "
        f"3 sets of domains (sources {gains[0]}; far {gains[1]}; imagenette {gains[2]}).**",
        f"- {len(records)} records, {minutes:.0f} CPU minutes beside those of the tokens, on {machine}.",
    ]
    readme += [
        f"| {' | '.join(cells)} |"
        for name, runs in sets.items()
        for cells in table_rows(name, runs)
    ]
    rule = over("no training")
    heads_beside = [over_images(runs, CONTROL, "no training") for runs in sets.values()]
    guide = [
        f"beside the rule, experts trained apart and joined bring {rule[0]}, {rule[1]} and {rule[2]} points on three "
        f"sets, tuned heads for each folder {heads_beside[0]}, {heads_beside[1]} and {heads_beside[2]}",
        f"Rule and heads took {cheap:.0f} CPU seconds, experts {experts:.0f}",
    ]
    return {"benchmarks/modular/README.md": readme, "docs/guides/when-experts.md": guide}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
