"""benchmarks/performance/README.md."""

from typing import Any

from benchmarks.records import Claim, Definition
from benchmarks.subject import find_subject

Json = dict[str, Any]
LAYER, TRAIN = (
    "benchmarks/layer/{}/benchmark-layer.json",
    "benchmarks/train/{}/benchmark-train.json",
)
INFER_AVX2 = "benchmarks/infer/cifar10-avx2/benchmark-infer.json"
INFER, DATA = (
    "benchmarks/infer/cifar10/benchmark-infer.json",
    "benchmarks/data/quickstart/benchmark-data.json",
)
DENSE, TWIN, LARGE = "dense k·H", "dense twin, same active FLOPs", "dense twin, same parameters"


def spread(ratio: Json) -> str:
    """A median with its quartiles."""
    return "{median:.2f} ({quartile_1:.2f} to {quartile_3:.2f})".format_map(ratio)


def ours(case: Json, router: str = "vmoe_top_k") -> Json:
    """The layer's time over the dense MLP's in one comparison."""
    return next(row for row in case["rows"] if row["name"] == f"moevision {router}")["ratio_to"][
        DENSE
    ]


def beside_the_dense(record: Json) -> list[Json]:
    """Rows of the first table."""
    return [
        {**case, "router": router, "ratio": spread(ours(case, router))}
        for router in ("vmoe_top_k", "noisy_top_k")
        for case in record["comparisons"]
    ]


def peers(case: Json) -> list[Json]:
    """The rows of one comparison that are neither the layer nor the dense MLP, but for those left out."""
    return [
        row
        for row in case["rows"]
        if "ratio_to" in row and not row["name"].startswith(("moevision", "dense"))
    ]


def beside_peers(*records: Json) -> list[Json]:
    """Rows of the second table: of each case's peers the fastest."""
    rows = []
    for case in (case for record in records for case in record["comparisons"]):
        peer = min(peers(case), key=lambda row: row["ratio_to"][DENSE]["median"])
        values = {
            "ours": spread(ours(case)),
            "peer": peer["name"],
            "theirs": spread(peer["ratio_to"][DENSE]),
        }
        rows.append({**case, **values})
    return rows


def overlapping(*records: Json) -> Json:
    """In how many cases the layer's quartiles reach those of a peer, and in how many a peer's median is lower."""
    cases = [case for record in records for case in record["comparisons"]]
    rivals = [[row["ratio_to"][DENSE] for row in peers(case)] for case in cases]
    pairs = [(ours(case), others) for case, others in zip(cases, rivals, strict=True)]
    return {
        "cases": len(cases),
        "lowest": sum(
            our["median"] < min(other["median"] for other in others) for our, others in pairs
        ),
        "clear": sum(
            our["quartile_3"] < min(other["quartile_1"] for other in others)
            for our, others in pairs
        ),
    }


def growth(record: Json, along: str, values: list[int], **fixed: int) -> Json:
    """One row of a table of growth, by the value of what grows."""
    found = {
        case[along]: f"{ours(case)['median']:.2f}"
        for case in record["comparisons"]
        if all(case[name] == value for name, value in fixed.items())
    }
    return {**fixed, "cells": " | ".join(found.get(value, "") for value in values)}


def more_experts(record: Json) -> list[Json]:
    """Rows of the table of 32 experts beside 8."""
    ratios = {
        (case["tokens"], case["top_k"], case["experts"]): ours(case)["median"]
        for case in record["comparisons"]
    }
    return [
        {
            "tokens": tokens,
            "top_k": top_k,
            "more": ratios[tokens, top_k, 32] / ratios[tokens, top_k, 8] - 1,
        }
        for tokens in (16_384, 65_536)
        for top_k in (1, 2)
    ]


def steps(record: Json) -> list[Json]:
    """Rows of the table of training steps."""
    names = {
        "MoE": "MoE",
        TWIN: "dense twin of equal active FLOPs",
        LARGE: "dense twin of equal parameters",
    }
    ratios = {row["name"]: spread(row["speed_to"][TWIN]) for row in record["rows"]} | {TWIN: "1"}
    return [
        {**row, "name": names[row["name"]], "ratio": ratios[row["name"]]} for row in record["rows"]
    ]


def moe(record: Json) -> Json:
    """The MoE's own row of a training record, with its speed beside the twins'; of the model that pages call so."""
    assert record["model"]["arch"] == find_subject("cifar10").arch, (
        "the recipe has another model now: measure it again"
    )
    row = record["rows"][0]
    return {**row, "twin": spread(row["speed_to"][TWIN]), "large": spread(row["speed_to"][LARGE])}


def in_lightning(record: Json) -> Json:
    """`moevision fit` beside the twin in plain timm and Lightning."""
    fit, plain = record["peers"]["lightning"]
    twin = next(row["images_per_s"] for row in record["rows"] if row["name"] == TWIN)
    speeds = {"fit": fit["images_per_s"], "plain": plain["images_per_s"], "twin": twin}
    return {
        "ratio": spread(fit["speed_to"][plain["name"]]),
        **speeds,
        "loop": twin / plain["images_per_s"],
    }


def latency(*records: Json) -> list[Json]:
    """Rows of the table of inference: all this machine has, and AVX2 alone."""
    rows = []
    for batch in (1, 8, 64):
        cells: Json = {"batch": batch}
        for record, suffix in zip(records, ("", "_avx2"), strict=True):
            for case in record["comparisons"]:
                if case["batch_size"] == batch:
                    row = case["rows"][0]
                    milliseconds = "{p50:.1f}, {p95:.1f}".format_map(row["latency_ms"])
                    cells[case["precision"] + suffix] = (
                        f"{milliseconds}; {spread(row['speed_to'][TWIN])}"
                    )
        rows.append(cells)
    return rows


def inference(record: Json, batch: int = 1) -> Json:
    """Of one batch size, by precision: ms of the MoE and of both dense models, and the MoE's speed beside its twin."""
    found: Json = {}
    for case in (case for case in record["comparisons"] if case["batch_size"] == batch):
        ms = {
            name: case["rows"][place]["time_ms"]["median"]
            for place, name in enumerate(("moe", "twin", "large"))
        }
        found |= {f"{case['precision']}_{name}": value for name, value in ms.items()}
        found[f"{case['precision']}_speed"] = spread(case["rows"][0]["speed_to"][TWIN])
        found[f"{case['precision']}_than_large"] = "slower" if ms["moe"] > ms["large"] else "faster"
    return found


def side_by_side(record: Json) -> Json:
    """A training step of the three models: images/s, and the peak of memory."""
    names = {"moe": "MoE", "twin": TWIN, "large": LARGE}
    speed = {row["name"]: row["images_per_s"] for row in record["rows"]}
    return {
        **{name: speed[model] for name, model in names.items()},
        **{
            f"{name}_mib": record["memory"]["models"][model]["peak_mib"]
            for name, model in names.items()
        },
    }


def memory(record: Json) -> list[Json]:
    """Rows of the table of memory."""
    names = {
        "MoE": "MoE",
        TWIN: "dense twin of equal active FLOPs",
        LARGE: "dense twin of equal parameters",
    }
    return [
        {
            **row,
            "name": names[name],
            "state_mib": row["weights_mib"] + row["gradients_mib"] + row["optimizer_mib"],
        }
        for name, row in record["memory"]["models"].items()
    ]


BARS = LAYER.format("bars")
ALL_BARS = (BARS, LAYER.format("bars-fp32"), LAYER.format("bars-32"))
EXPERTS, TOKENS, WIDTHS = (
    [1, 2, 4, 8, 16, 32, 64],
    [256, 1024, 4096, 16_384, 65_536],
    [96, 192, 384, 768],
)

CLAIMS = [
    Claim(BARS, "Measured on an {machine[cpu]}, {machine[usable_cores]} cores"),
    Claim(BARS, "torch {versions[torch]}"),
    Claim(
        BARS,
        "multiplies bf16 matrices at {gflops:,.0f} GFLOP/s",
        lambda record: {"gflops": record["measured_peak_flops"]["bf16"] / 1e9},
    ),
    Claim(BARS, "| {tokens:,}, {width}, {top_k} | `{router}` | {ratio} |", beside_the_dense),
    Claim(
        ALL_BARS,
        "| {tokens:,}, {width}, {top_k} | {experts}, {precision} | {ours} | {theirs} | {peer} |",
        beside_peers,
    ),
    Claim(
        ALL_BARS,
        "the layer's median is the lowest in {lowest} of {cases} cases; in {clear} the quartiles don't overlap",
        overlapping,
    ),
    Claim(
        LAYER.format("growth"),
        "| experts, K = {top_k} | {cells} |",
        lambda record: [
            growth(record, "experts", EXPERTS, tokens=16_384, width=192, top_k=k) for k in (1, 2)
        ],
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
        LAYER.format("growth-65k"), "| {tokens:,} tokens, K = {top_k} | {more:+.0%} |", more_experts
    ),
    Claim(
        TRAIN.format("cifar10"), "training step runs at {twin} times its dense twin's speed", moe
    ),
    Claim(
        TRAIN.format("cifar10"),
        "({millions:.2f} M parameters)",
        lambda record: {"millions": record["rows"][0]["parameters"] / 1e6},
    ),
    Claim(TRAIN.format("cifar10"), "| {name} | {images_per_s:.0f} | {ratio} | {mfu:.1%} |", steps),
    Claim(TRAIN.format("cifar10"), "{large} times as fast as the dense model of its own size", moe),
    Claim(
        TRAIN.format("cifar10-avx2"),
        "in float32 on one thread, it trains at {twin} times the twin's speed",
        moe,
    ),
    Claim(
        TRAIN.format("cifar10"),
        "{ratio} times the images/s of that twin in plain timm and Lightning ({fit:.0f} against {plain:.0f})",
        in_lightning,
    ),
    Claim(
        TRAIN.format("cifar10"),
        "the twin's own step has {twin:.0f} images/s, {loop:.2f} times those",
        in_lightning,
    ),
    Claim(
        INFER,
        "| batch {batch} | {fp32_moe:.1f} | {fp32_twin:.1f} | {fp32_large:.1f} | {bf16_moe:.1f} | {bf16_twin:.1f} "
        "| {bf16_large:.1f} |",
        lambda record: [{"batch": batch, **inference(record, batch)} for batch in (1, 8, 64)],
    ),
    Claim(
        INFER,
        "A single image is {fp32_than_large} than with the dense model of equal parameters",
        inference,
    ),
    Claim((INFER, INFER_AVX2), "| batch {batch} | {fp32} | {bf16} | {fp32_avx2} |", latency),
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
    Definition("a goal of 0.92", "the goal"),
    Definition("a goal of 0.77, 1.3 times the twin's time", "the goal"),
    Definition("a goal of 1.25", "the goal"),
    Definition("less than 15 % more", "the goal"),
    Definition("backward is 2 × forward", "how useful FLOPs are defined"),
    Definition("at least three times", "how often to measure energy"),
    Definition(
        "2 MiB a layer in float32 where the twin reads 0.5",
        "sizes: 8 and 2 experts of 2 · 128 · 256 weights",
    ),
    Definition("compute capability 9.0", "a generation of NVIDIA's devices"),
]
