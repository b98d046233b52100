"""What pages say of the explorer, its bundled models, and what their experts tell."""

from __future__ import annotations

import re
from statistics import median
from typing import Any, cast

import numpy as np

Json = dict[str, Any]
OPENING = "cifar10"  # the bundled model whose case opens README and the site
STEPS = {
    "forward": "the model alone, one image",
    "first_page": "first page, after the server is up",
    "layer_change": "another layer",
    "patch_click": "click on a patch",
    "new_picture": "another image, until the overlay is there",
    "expert_away": "an expert taken away",
    "away_cpu": "the same, its server's CPU",
    "own_picture": "one's own image",
}
CROWDS = {
    "png_49_megapixels": "PNG of 49 megapixels in 381 KB",
    "png_16_megapixels": "PNG of 16 megapixels in 124 KB",
    "jpeg_400": "JPEG of 400 x 400, 97 KB",
}
MODELS = {"pets": "drawn pets", "cifar10": "CIFAR-10 photos", "photos": "photos"}

ALL_MODELS = {**MODELS, "cats_vs_dogs_two": "an expert for each class", "emoji": "pages of emoji"}


def waiting(record: Json) -> list[Json]:
    """Median and 95 % of every step, by model, with the goal of the median."""
    rows = []
    for name, words in STEPS.items():
        models = [record["models"][model].get(name) for model in ("cifar10", "photos")]
        cells = [
            f"{own['median_ms']:.0f} ({own['p95_ms']:.0f}) ms" if own else "has one"
            for own in models
        ]
        limits = dict.fromkeys(own["limit_ms"] for own in models if own)
        goals = ", ".join("" if limit is None else f"{limit:.0f}" for limit in limits)
        rows.append({"what": words, "cells": " | ".join([*cells, goals and f"{goals} ms"])})
    return rows


def crowds(*records: Json) -> list[Json]:
    """What the visitor beside each crowd met, and the most memory, in each record."""
    rows = []
    for name, words in CROWDS.items():
        cells = []
        for record in records:
            attack = record["attacks"][name]
            visitor, longest = attack["visitor"], attack["visitor"]["max_ms"]
            counts = " / ".join(str(visitor.get(key, 0)) for key in ("ok", "busy", "unanswered"))
            cells.append(counts + ("" if longest is None else f", at most {longest / 1e3:.1f} s"))
            cells.append(f"{attack['server_rss']['most_mb']:,.0f} MB")
        rows.append({"what": words, "cells": " | ".join(cells)})
    return rows


def installed(record: Json) -> Json:
    """Photos right and asked for, of the installed wheel."""
    cat, dog = record["classes"]["cat"], record["classes"]["dog"]
    balanced = (cat["correct"] / cat["total"] + dog["correct"] / dog["total"]) / 2
    return {
        **record,
        "cat": cat,
        "dog": dog,
        "total": cat["total"] + dog["total"],
        "balanced": balanced,
    }


def packings(record: Json) -> list[Json]:
    """A packed model's bytes and answers beside bfloat16's."""
    rows = [
        {
            "name": "bfloat16",
            **record["bfloat16"],
            "cells": f"{record['bfloat16']['right']} | | | |",
        }
    ]
    for arm in record["packed"]:
        first, pair = (
            ", ".join(f"{layer[key]:.1%}" for layer in arm["layers"])
            for key in ("same_first", "same_set")
        )
        rows.append({**arm, "cells": f"{arm['right']} | {arm['same_class']} | {first} | {pair} |"})
    return rows


def live(record: Json) -> list[Json]:
    """Seconds to the first answer of each model in the browser, of processors and by the clock, and to the next one."""
    rows = []
    for model, name in MODELS.items():
        own = record["models"][model]
        rows.append({**own, "name": name, "cold": median(own["cold_s"])})
    return rows


def flipped(record: Json, kind: str) -> np.ndarray:
    """[N] whether an image's answer is another one without some expert (`without`), or `at_random`."""
    own = np.array(list(record["all"]))
    return np.any([np.array(list(other)) != own for other in record[kind].values()], axis=0)


def of_flips(record: Json) -> Json:
    """Of answers that are right, how many change without some expert, and how many with as much away at random."""
    right = [label == answer for label, answer in zip(record["labels"], record["all"], strict=True)]
    sure = [own and p >= 0.7 for own, p in zip(right, record["sure"], strict=True)]
    values = {"images": len(right), "right": sum(right), "sure": sum(sure)}
    for kind in ("without", "at_random"):
        changed = flipped(record, kind)
        values |= {kind: changed[right].mean(), f"sure_{kind}": changed[sure].mean()}
    return values


def opening(record: Json, card: Json) -> Json:
    """The image of README and of the site's start: what it is without the expert, and with as much away at random.

    A class with more than half of the probability is the answer.
    """
    record = record["models"][OPENING]
    case = record["case"]
    assert case == card["matters"], "the explorer leads to another case than the record's"
    before, after = case["before"]["class"], case["after"]["class"]
    stays = min(record["at_random"]) > 0.5
    return {
        "expert": case["away"][0][1],
        "before": before,
        "after": after,
        "stays": f"stays a {before}" if stays else "may change too",
        "still": f"still {before}" if stays else "not always",
    }


def bundled(record: Json) -> Json:
    """Of how many photos the opening's is the strongest, and what as much at random leaves of it."""
    record = record["models"][OPENING]
    draws = record["at_random"]
    keep = sum(each > 0.5 for each in draws)
    before = record["case"]["before"]["class"]
    return {**record, "draws": len(draws), "keep": keep, "least": min(draws), "before": before}


def fewest(record: Json) -> list[Json]:
    """Of each model's examples that are named right, by how few experts away the answer changes."""
    rows = []
    for model, name in ALL_MODELS.items():
        falls = record["models"][model]["falls"].values()
        sizes = [len(one["away"] or ()) for one in falls]  # 0: no set of few
        rows.append(
            {
                "name": name,
                "right": len(sizes),
                "cells": " | ".join(str(sizes.count(n)) for n in (1, 2, 3, 0)),
            }
        )
    return rows


def without_names(record: Json) -> list[Json]:
    """What new pages of emoji cost without the experts of one name, by group."""
    rows = []
    for group, found in record["without"].items():
        shares = [one["share"] for one in record["names"] if one["name"] == group]
        own, others = (
            " → ".join(f"{100 * each:.1f}" for each in found[which]) for which in ("own", "others")
        )
        experts = ", ".join(map(str, found["experts"]))
        cells = [experts, f"{max(shares):.0%}", own, others, f"{found['random']:.1f}"]
        rows.append({"name": group, "pages": found["pages"], "cells": " | ".join(cells)})
    return rows


def without_any(record: Json, named: str) -> Json:
    """What new pages of emoji cost without any expert, and without those of the group `named` alone."""
    alone, whole = record["without"][named], record["without_all"]
    found = {"named": named, "pages": whole["pages"]}
    shares = {"": whole["all"], "own_": alone["own"], "others_": alone["others"]}
    for name, (before, after) in shares.items():
        found |= {f"{name}before": 100 * before, f"{name}after": after}
    hardly = found["before"] / 100 - found["after"] < 0.05
    return {**found, "needed": "hardly needed" if hardly else "needed"}


def page_of_emoji(record: Json) -> Json:
    """The page that the explorer opens, of how many it was chosen, and what as much at random leaves of its answer."""
    case = record["matters"]
    keep = sum(each > 0.5 for each in record["at_random"])
    ((_, expert),) = case["away"]
    return {**case, "expert": expert, "keep": keep, "draws": len(record["at_random"])}


def typed_pages(record: Json) -> Json:
    """Right answers by how many cells of a page are full."""
    return {"cells": " | ".join(f"{share:.0%}" for share in record["typed"].values())}


def photos(record: Json) -> Json:
    """What the browser complained of over all views."""
    complaints = sum(record[kind]["complaints"] for kind in ("bundled", "unseen"))
    return {**record["bundled"], "complaints": complaints}


# ---- what experts tell: the sentences of the bundled atlas


def _found(expression: str, text: str) -> re.Match[str]:
    """Where a sentence has this expression."""
    found = re.search(expression, text)
    assert found, text
    return found


def specialization(record: Json) -> list[Json]:
    """What every layer's first choices tell about the class, beside its controls."""
    interval = r"([\d.]+) bits \(95 % CI ([\d.]+ to [\d.]+)\)"
    rows = []
    for layer in record["layers"]:
        (first, _, every, *_), (fresh, clusters, trainings, *_) = (
            answer["numbers"] for answer in layer["answers"][:2]
        )
        of_first = _found(
            r"^\w+: " + interval.replace(" bits", " bits above shuffled labels"), first
        )
        of_all = _found(rf"^All choices: .*?, {interval}", every)
        rows.append(
            {
                "name": layer["name"],
                **{"first": of_first[1], "of_first": of_first[2]},
                **{"all": of_all[1], "of_all": of_all[2]},
                "untrained": _found(r": ([\d.]+ to [\d.]+) bits \(router", fresh)[1],
                "clusters": _found(r": ([\d.]+ to [\d.]+) bits \(router", clusters)[1],
                "beyond": _found(r"by training: (.*) bits", trainings)[1],
            }
        )
    return rows


def answers(record: Json) -> Json:
    """What the last MoE layer answers to the three questions, of first choices."""
    last = record["layers"][-1]
    experts, training, function = last["answers"]
    assert (experts["answer"], function["answer"]) == ("yes", "yes")
    detail = function["detail"]
    points = _found(
        r"^exchanging .* any other costs ([\d.]+) points .* CI ([\d.]+ to [\d.]+);", detail
    )
    alike = _found(r"that costs ([−\d.]+) and exchanging any two other experts ([−\d.]+)", detail)
    same = re.search(r"same patches ([\d.]+) of log-loss more than their other choice", detail)
    clusters = _found(r"clusters of the same input tell ([\d.]+) bits", training["sentence"])
    return {
        "n_images": record["n_images"],
        "training": training["answer"],
        "bits": _found(rf"^{last['name']}: ([\d.]+) bits", experts["numbers"][0])[1],
        "clusters": clusters[1],
        **{"points": points[1], "interval": points[2]},
        **{"favourite": alike[1], "others": alike[2]},
        "beyond": same and same[1],  # None where patches have no other choice
    }


def most_above(record: Json) -> Json:
    """The part of images that exceeds an expert's share of everything most: both shares."""
    cards = [card for layer in record["layers"] for card in layer["experts"]]
    parts = [part for card in cards for part in card["parts"]]
    part = cast(Json, max(parts, key=lambda part: part["above"]))
    return {**part, "overall": part["share"] - part["above"]}


def deletions(record: Json) -> Json:
    """By replacement and model: what deleting patches costs beyond chance, with 95 % intervals, and where it fails."""

    def interval(values: list[float], sign: int = 1) -> str:
        mean, *ends = (sign * value for value in values)
        low, high = sorted(ends)
        return f"{mean:.2f} ({low:.2f} to {high:.2f})"

    found: Json = {}
    for model, by_fill in record["models"].items():
        for fill, told in by_fill.items():
            found.setdefault(fill, {})[model] = {
                "top": interval(told["random_minus_top"]),
                "lowest": interval(told["lowest_minus_random"]),
                # what the rival finds beyond the shares
                "rival": interval(told["gradient_fill_minus_top"], -1),
                "worse": 1 - told["top_below_random"],
            }
        found["images"] = told["images"]
    return found


def cuts(record: Json) -> list[Json]:
    """Of each subset of classes the fewest experts, of the first one expert, too: shares of right test images in %."""
    names = {6: "six animals"}
    rows = []
    for number, subset in enumerate(record["subsets"].values()):
        cuts_of_subset = [(subset["fewest"], subset["right"])]
        if not number:
            cuts_of_subset.insert(0, (1, subset["right_with_one"]))
        for experts, right in cuts_of_subset:
            classes = names.get(len(subset["classes"]), ", ".join(subset["classes"]))
            cells = [
                right["all"],
                right["kept"],
                right["others"],
                np.mean(right["random"]),
                right["none"],
            ]
            shown = " | ".join(f"{100 * cell:.1f}" for cell in cells)
            rows.append({"classes": classes, "kept": experts, "cells": shown})
    return rows
