"""What pages say of time and memory: layers, training steps, predictions, beside dense models."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benchmarks.subject import find_subject

Json = dict[str, Any]
DENSE, TWIN, LARGE = "dense k·H", "dense twin, same active FLOPs", "dense twin, same parameters"
MODELS = {
    "MoE": "MoE",
    TWIN: "dense twin of equal active FLOPs",
    LARGE: "dense twin of equal parameters",
}
"""Name of a row -> its words in the page."""
SHORT = {"MoE": "moe", TWIN: "twin", LARGE: "large"}


def spread(ratio: Json) -> str:
    """A median with its quartiles."""
    return "{median:.2f} ({quartile_1:.2f} to {quartile_3:.2f})".format_map(ratio)


# ---- layers


def ours(case: Json, router: str = "vmoe_top_k") -> Json:
    """The layer's time over the dense MLP's in one comparison."""
    row = next(row for row in case["rows"] if row["name"] == f"moevision {router}")
    ratio: Json = row["ratio_to"][DENSE]
    return ratio


def peers(case: Json) -> dict[str, Json]:
    """Other libraries' layers of one comparison that ran: their time over the dense MLP's."""
    rows = [row for row in case["rows"] if not row["name"].startswith(("moevision", "dense"))]
    return {row["name"]: row["ratio_to"][DENSE] for row in rows if "ratio_to" in row}


def beside_dense(record: Json) -> list[Json]:
    """Rows of the first table."""
    return [
        {**case, "router": router, "ratio": spread(ours(case, router))}
        for router in ("vmoe_top_k", "noisy_top_k")
        for case in record["comparisons"]
    ]


def beside_peers(*records: Json) -> list[Json]:
    """Rows of the second table: of each case's peers the fastest."""
    rows = []
    for case in (case for record in records for case in record["comparisons"]):
        peer, ratio = min(peers(case).items(), key=lambda item: item[1]["median"])
        rows.append({**case, "ours": spread(ours(case)), "peer": peer, "theirs": spread(ratio)})
    return rows


def overlapping(*records: Json) -> Json:
    """In how many cases the layer's median is below every peer's, and in how many its quartiles reach none."""
    cases = [case for record in records for case in record["comparisons"]]
    lowest, clear = 0, 0
    for case in cases:
        own, others = ours(case), peers(case).values()
        lowest += own["median"] < min(other["median"] for other in others)
        clear += own["quartile_3"] < min(other["quartile_1"] for other in others)
    return {"cases": len(cases), "lowest": lowest, "clear": clear}


def growth(record: Json, along: str, values: list[int], fixed: dict[str, int]) -> Json:
    """One row of a table of growth, by the value of what grows."""
    cells = {
        case[along]: f"{ours(case)['median']:.2f}"
        for case in record["comparisons"]
        if fixed.items() <= case.items()
    }
    return {**fixed, "cells": " | ".join(cells.get(value, "") for value in values)}


def more_experts(record: Json) -> list[Json]:
    """Rows of the table of 32 experts beside 8."""
    medians = {
        (case["tokens"], case["top_k"], case["experts"]): ours(case)["median"]
        for case in record["comparisons"]
    }
    rows = []
    for tokens in (16_384, 65_536):
        for top_k in (1, 2):
            more = medians[tokens, top_k, 32] / medians[tokens, top_k, 8] - 1
            rows.append({"tokens": tokens, "top_k": top_k, "more": more})
    return rows


# ---- training steps


def steps(record: Json) -> list[Json]:
    """Rows of the table of training steps."""
    return [
        {
            **row,
            "name": MODELS[row["name"]],
            "ratio": "1" if row["name"] == TWIN else spread(row["speed_to"][TWIN]),
        }
        for row in record["rows"]
    ]


def step(record: Json) -> Json:
    """A step of the three models: images/s, peak memory, the MoE's speed and time beside the dense ones'."""
    assert record["model"]["arch"] == find_subject("cifar10").arch, (
        "the recipe has another model now: measure it again"
    )
    own, *dense = record["rows"]
    values = {
        "millions": own["parameters"] / 1e6,
        "cores": {1: "one core", 2: "two cores"}[record["machine"]["torch_threads"]],
    }
    for row in record["rows"]:
        values[SHORT[row["name"]]] = row["images_per_s"]
    for name, use in record["memory"].get("models", {}).items():
        values[f"{SHORT[name]}_mib"] = use["peak_mib"]
    for row in dense:
        ratio = own["speed_to"][row["name"]]
        values[f"than_{SHORT[row['name']]}"] = spread(ratio)
        values[f"time_{SHORT[row['name']]}"] = 1 / ratio["median"]
    return values


def in_lightning(record: Json) -> Json:
    """`moevision fit` beside the twin in plain timm and Lightning."""
    fit, plain = record["peers"]["lightning"]
    return {
        "ratio": spread(fit["speed_to"][plain["name"]]),
        "fit": fit["images_per_s"],
        "plain": plain["images_per_s"],
        "twin": step(record)["twin"],
    }


def memory(record: Json) -> list[Json]:
    """Rows of the table of memory."""
    rows = []
    for name, row in record["memory"]["models"].items():
        state = row["weights_mib"] + row["gradients_mib"] + row["optimizer_mib"]
        rows.append({**row, "name": MODELS[name], "state_mib": state})
    return rows


# ---- predictions


def inference(record: Json) -> list[Json]:
    """By batch size: ms of the MoE and of both dense models, and what is slower."""
    rows: dict[int, Json] = defaultdict(dict)
    for case in record["comparisons"]:
        ms = [row["time_ms"]["median"] for row in case["rows"]]
        names = [f"{case['precision']}_{name}" for name in SHORT.values()]
        rows[case["batch_size"]] |= dict(zip(names, ms, strict=True))
    return [{"batch": batch, **rows[batch]} for batch in (1, 8, 64)]


def single_image(record: Json) -> Json:
    """Whether one image takes the MoE longer than the dense model of equal parameters."""
    one = inference(record)[0]
    return {"than_large": "slower" if one["fp32_moe"] > one["fp32_large"] else "faster"}


def latency(*records: Json) -> list[Json]:
    """Rows of the table of inference: all this machine has, and AVX2 alone."""
    rows: dict[int, Json] = defaultdict(dict)
    for record, suffix in zip(records, ("", "_avx2"), strict=True):
        for case in record["comparisons"]:
            own = case["rows"][0]
            milliseconds = "{p50:.1f}, {p95:.1f}".format_map(own["latency_ms"])
            cell = f"{milliseconds}; {spread(own['speed_to'][TWIN])}"
            rows[case["batch_size"]][case["precision"] + suffix] = cell
    return [{"batch": batch, **rows[batch]} for batch in (1, 8, 64)]


def few_images(*rows: Json, precision: str) -> list[Json]:
    """Rows of the table of a precision: time ÷ the twin's, before and after, with the quartiles after."""
    cells = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["batch"]):
        if row["precision"] == precision and row["threads"] == 1:
            after = row["after"]["ratio"]
            quartiles = f"({after['quartile_1']:.2f} to {after['quartile_3']:.2f})"
            before = row["before"]["ratio"]["median"]
            cells[row["model"]].append(f"{before:.2f}, **{after['median']:.2f}** {quartiles}")
    return [{"model": name, "cells": " | ".join(own)} for name, own in cells.items()]


def exported(record: Json) -> list[Json]:
    """Rows of the table of exported files: time ÷ the twin's by batch size, with the chosen and with all experts."""
    rows = []
    for model in record["models"]:
        values: Json = {"model": model["name"]}
        for batch in model["batches"]:
            ratios = {row["name"]: row["ratio_to"][TWIN] for row in batch["rows"]}
            everything = ratios["all experts"]["median"]
            cell = f"**{spread(ratios['chosen experts'])}**; {everything:.2f}"
            values[f"of_{batch['batch_size']}"] = cell
        rows.append(values)
    return rows


def exported_range(record: Json) -> Json:
    """The least and the largest of these ratios at 8 and 64 images, and the largest at one."""
    ratios: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for model in record["models"]:
        for batch in model["batches"]:
            for row in batch["rows"]:
                median = row["ratio_to"][TWIN]["median"]
                ratios[row["name"], batch["batch_size"] == 1].append(median)
    chosen, everything = (ratios[name, False] for name in ("chosen experts", "all experts"))
    return {
        "least": min(chosen),
        "most": max(chosen),
        "least_all": min(everything),
        "most_all": max(everything),
        "one": max(ratios["chosen experts", True]),
    }


def worst_of_few(*rows: Json) -> Json:
    """The largest ratios after, by precision, and how many of the rows keep to 1.3."""
    values: Json = {}
    for precision in ("fp32", "bf16"):
        own = [row for row in rows if row["threads"] == 1 and row["batch"] <= 8]
        own = [row for row in own if row["precision"] == precision]
        after, before = (
            [row[when]["ratio"]["median"] for row in own] for when in ("after", "before")
        )
        values[precision], values[f"{precision}_rows"] = max(after), len(own)
        values[f"{precision}_met"] = sum(round(ratio, 2) <= 1.3 for ratio in after)
        values[f"{precision}_met_before"] = sum(round(ratio, 2) <= 1.3 for ratio in before)
    return values


def trained(*rows: Json) -> Json:
    """Time ÷ the dense twin's of the trained model: one and 64 images in float32, one in bf16."""
    ratios = {
        (row["precision"], row["batch"]): row["after"]["ratio"]["median"]
        for row in rows
        if row["model"] == "trained" and row["threads"] == 1
    }
    return {"one": ratios["fp32", 1], "many": ratios["fp32", 64], "bf16": ratios["bf16", 1]}


def roofline(record: Json) -> list[Json]:
    """Rows of the roofline's table."""
    fp32, bf16 = record["rows"]
    rows = [
        {"part": part, "fp32": f"{value:.0f}", "bf16": f"{bf16['microseconds'][part]:.0f}"}
        for part, value in fp32["microseconds"].items()
    ]
    texts = {
        "calls of torch in the layer, in the Mlp": "{calls[layer]}, {calls[Mlp]}",
        "more for bytes, in a layer": "{more_for_bytes:.0f}",
        "more for calls, in a layer": "{more_for_calls:.0f}",
        "the whole twin": "{twin_microseconds:,.0f}",
        "bound: 1 + two layers' more ÷ the twin": "{bound_of_two_layers:.2f}",
    }
    for part, text in texts.items():
        rows.append({"part": part, "fp32": text.format_map(fp32), "bf16": text.format_map(bf16)})
    return rows


def folders(record: Json) -> list[Json]:
    """Of each folder of the package its tokens, and tokens a line of code, `before` and `now`."""
    rows = []
    for name, before in record["dense"]["counts"]["folders"].items():
        now = record["read"]["counts"]["folders"][name]
        rows.append(
            {
                "folder": name,
                "before": before["tokens"],
                "now": now["tokens"],
                "before_line": before["tokens"] / before["code_lines"],
                "now_line": now["tokens"] / now["code_lines"],
            }
        )
    return rows
