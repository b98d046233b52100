"""docs/performance.md."""

from typing import Any

from tests.records import Claim, Definition

Json = dict[str, Any]
LAYER, TRAIN = "benchmarks/layer/{}/benchmark-layer.json", "benchmarks/train/{}/benchmark-train.json"
INFER, DATA = "benchmarks/infer/cifar10/benchmark-infer.json", "benchmarks/data/quickstart/benchmark-data.json"
MACHINE = "{machine[cpu]}, {machine[usable_cores]} cores"
DENSE, TWIN, LARGE = "dense k·H", "dense twin, same active FLOPs", "dense twin, same parameters"


def spread(ratio: Json) -> str:
    """A median with its quartiles."""
    return "{median:.2f} ({quartile_1:.2f} to {quartile_3:.2f})".format_map(ratio)


def ours(case: Json, router: str = "vmoe_top_k") -> Json:
    """The layer's time over the dense MLP's in one comparison."""
    return next(row for row in case["rows"] if row["name"] == f"moevision {router}")["ratio_to"][DENSE]


def beside_the_dense(with_unit: Json, without: Json) -> list[Json]:
    """Rows of the first table."""
    pairs = list(zip(with_unit["comparisons"], without["comparisons"], strict=True))
    return [
        {**case, "router": router, "with": spread(ours(case, router)), "without": spread(ours(plain, router))}
        for router in ("vmoe_top_k", "noisy_top_k")
        for case, plain in pairs
    ]


def peers(case: Json) -> list[Json]:
    """The rows of one comparison that are neither the layer nor the dense MLP, but for those left out."""
    return [row for row in case["rows"] if "ratio_to" in row and not row["name"].startswith(("moevision", "dense"))]


def beside_peers(*records: Json) -> list[Json]:
    """Rows of the second table: of each case's peers the fastest."""
    rows = []
    for case in (case for record in records for case in record["comparisons"]):
        peer = min(peers(case), key=lambda row: row["ratio_to"][DENSE]["median"])
        values = {"ours": spread(ours(case)), "peer": peer["name"], "theirs": spread(peer["ratio_to"][DENSE])}
        rows.append({**case, **values})
    return rows


def overlapping(*records: Json) -> Json:
    """The one case in which the layer's quartiles reach those of a peer."""
    (only,) = (
        case
        for case in (case for record in records for case in record["comparisons"])
        if any(ours(case)["quartile_3"] >= row["ratio_to"][DENSE]["quartile_1"] for row in peers(case))
    )
    return only


def growth(record: Json, along: str, values: list[int], **fixed: int) -> Json:
    """One row of a table of growth, by the value of what grows."""
    found = {
        case[along]: f"{ours(case)['median']:.2f}"
        for case in record["comparisons"]
        if all(case[name] == value for name, value in fixed.items())
    }
    return {**fixed, "cells": " | ".join(found.get(value, "") for value in values)}


def more_experts(*records: Json) -> list[Json]:
    """Rows of the table of 32 experts beside 8."""
    rows = []
    for tokens in (16_384, 65_536):
        for top_k in (1, 2):
            row: Json = {"tokens": tokens, "top_k": top_k}
            for name, record in zip(("with", "without"), records, strict=True):
                few, many = (
                    ours(case)["median"]
                    for experts in (8, 32)
                    for case in record["comparisons"]
                    if (case["tokens"], case["top_k"], case["experts"]) == (tokens, top_k, experts)
                )
                row[name] = many / few - 1
            rows.append(row)
    return rows


def steps(record: Json) -> list[Json]:
    """Rows of the table of training steps."""
    names = {"MoE": "MoE", TWIN: "dense twin of equal active FLOPs", LARGE: "dense twin of equal parameters"}
    ratios = {row["name"]: spread(row["speed_to"][TWIN]) for row in record["rows"]} | {TWIN: "1"}
    return [{**row, "name": names[row["name"]], "ratio": ratios[row["name"]]} for row in record["rows"]]


def moe(record: Json) -> Json:
    """The MoE's own row of a training record, with its speed beside the twins'."""
    row = record["rows"][0]
    return {**row, "twin": spread(row["speed_to"][TWIN]), "large": spread(row["speed_to"][LARGE])}


def in_lightning(record: Json) -> Json:
    """`moevision fit` beside the twin in plain timm and Lightning."""
    fit, plain = record["peers"]["lightning"]
    return {"ratio": spread(fit["speed_to"][plain["name"]]), "fit": fit["images_per_s"], "plain": plain["images_per_s"]}


def latency(record: Json) -> list[Json]:
    """Rows of the table of inference."""
    rows = []
    for batch in (1, 8, 64):
        cells: Json = {"batch": batch}
        for case in record["comparisons"]:
            if case["batch_size"] == batch:
                row = case["rows"][0]
                milliseconds = "{p50:.1f}, {p95:.1f}".format_map(row["latency_ms"])
                cells[case["precision"]] = f"{milliseconds}; {spread(row['speed_to'][TWIN])}"
        rows.append(cells)
    return rows


def memory(record: Json) -> list[Json]:
    """Rows of the table of memory."""
    names = {"MoE": "MoE", TWIN: "dense twin of equal active FLOPs", LARGE: "dense twin of equal parameters"}
    return [
        {
            **row,
            "name": names[name],
            "state_mib": row["weights_mib"] + row["gradients_mib"] + row["optimizer_mib"],
        }
        for name, row in record["memory"]["models"].items()
    ]


BARS, PLAIN = LAYER.format("bars"), LAYER.format("bars-without-matrix-unit")
ALL_BARS = (BARS, LAYER.format("bars-fp32"), LAYER.format("bars-32"))
EXPERTS, TOKENS, WIDTHS = [1, 2, 4, 8, 16, 32, 64], [256, 1024, 4096, 16_384, 65_536], [96, 192, 384, 768]

CLAIMS = [
    Claim(BARS, f"the layer and the training step were measured on an {MACHINE}, torch {{versions[torch]}}"),
    Claim(
        (BARS, PLAIN),
        "multiplies bf16 matrices at {with:,.0f} GFLOP/s with its matrix unit and at {without:,.0f} without",
        lambda *records: dict(
            zip(("with", "without"), (each["measured_peak_flops"]["bf16"] / 1e9 for each in records), strict=True)
        ),
    ),
    Claim((BARS, PLAIN), "| {tokens:,}, {width}, {top_k} | `{router}` | {with} | {without} |", beside_the_dense),
    Claim(
        ALL_BARS, "| {tokens:,}, {width}, {top_k} | {experts}, {precision} | {ours} | {theirs} | {peer} |", beside_peers
    ),
    Claim(
        ALL_BARS,
        "quartiles overlap in one case: {tokens:,} tokens, width {width}, K = {top_k}, {experts} experts, {precision}",
        overlapping,
    ),
    Claim(
        LAYER.format("growth"),
        "| experts, K = {top_k} | {cells} |",
        lambda record: [growth(record, "experts", EXPERTS, tokens=16_384, width=192, top_k=k) for k in (1, 2)],
    ),
    Claim(
        LAYER.format("growth"),
        "| tokens | {cells} |",
        lambda record: growth(record, "tokens", TOKENS, width=192, experts=8, top_k=2),
    ),
    Claim(
        LAYER.format("growth"),
        "| width | {cells} |",
        lambda record: growth(record, "width", WIDTHS, tokens=16_384, experts=8, top_k=2),
    ),
    Claim(
        (LAYER.format("growth-65k"), LAYER.format("growth-without-matrix-unit")),
        "| {tokens:,} tokens, K = {top_k} | {with:+.0%} | {without:+.0%} |",
        more_experts,
    ),
    Claim(TRAIN.format("cifar10"), "training step runs at {twin} times its dense twin's speed", moe),
    Claim(
        TRAIN.format("cifar10"),
        "({millions:.2f} M parameters)",
        lambda record: {"millions": record["rows"][0]["parameters"] / 1e6},
    ),
    Claim(TRAIN.format("cifar10"), "| {name} | {images_per_s:.0f} | {ratio} | {mfu:.1%} |", steps),
    Claim(TRAIN.format("cifar10-without-matrix-unit"), "Without the matrix unit the ratio is {twin}", moe),
    Claim(TRAIN.format("cifar10"), "{large} times as fast as the dense model of its own size", moe),
    Claim(
        TRAIN.format("cifar10"),
        "{ratio} times the images/s of that twin in plain timm and Lightning ({fit:.0f} against {plain:.0f})",
        in_lightning,
    ),
    Claim(INFER, f"`benchmarks/infer/cifar10/`, {MACHINE}"),
    Claim(INFER, "| batch {batch} | {fp32} | {bf16} |", latency),
    Claim(DATA, f"`benchmarks/data/quickstart/`, {MACHINE}"),
    Claim(
        DATA,
        "{main[images_per_s][median]:,.0f} augmented images/s from memory in the main process and "
        "{worker[images_per_s][median]:,.0f} with one worker",
        lambda record: {"main": record["rows"][0], "worker": record["rows"][1]},
    ),
    Claim(DATA, "waits for data {share:.1%} of a step", lambda record: record["data_wait"][0]),
    Claim(
        TRAIN.format("cifar10"),
        "| {name} | {peak_mib:.0f} MiB | {state_mib:.0f} | {activations_mib:.0f} | {other_mib:.0f} "
        "| {tensors_mib:.0f} |",
        memory,
    ),
    Claim(
        TRAIN.format("cifar10"),
        "the MoE's process takes {beyond_extra_weights_and_optimizer:.2f} times the twin's peak, its tensors "
        "{tensors_beyond_extra_weights_and_optimizer:.2f} times",
        lambda record: record["memory"]["moe_beside"][TWIN],
    ),
]

DEFINITIONS = [
    Definition("1.05 at width 192 and 0.98 at width 384", "the goal"),
    Definition("a goal of 0.95", "the goal"),
    Definition("a goal of 1.25", "the goal"),
    Definition("less than 15 % more", "the goal"),
    Definition("backward is 2 × forward", "how useful FLOPs are defined"),
    Definition("at least three times", "how often to measure energy"),
    Definition("compute capability 9.0", "a generation of NVIDIA's devices"),
]
