"""benchmarks/saving/README.md."""

import statistics
from collections.abc import Mapping
from typing import Any

from tests.records import Claim, Definition
from tests.records.studies import report, shown

NAMES = ("moe", "small", "large")
STUDY, STEP = "benchmarks/saving/record.json", "benchmarks/train/micro/benchmark-train.json"
SAVING = ("MoE", "dense, equal FLOPs", "dense, equal parameters")
MODELS = ("MoE", "dense twin, same active FLOPs", "dense twin, same parameters")


def _ratios(record: dict[str, Any]) -> dict[str, Any]:
    """What the opening and the reservations say: the MoE beside its twins."""
    own = report("saving")
    moe, small, large = SAVING
    cost, rows = record["cost"], {row.name: row for row in own.equal_time(record, SAVING)}
    flops = {arm: cost[arm]["flops_per_image"] + cost[arm]["router_flops_per_image"] for arm in SAVING}
    memory = {arm: own.memory(record, arm) for arm in SAVING}
    spent = {arm: statistics.fmean(run["cpu_s"] for run in rows[arm].runs) for arm in SAVING}
    return {
        "flops_saved": 1 - flops[moe] / flops[large],
        **{f"large_{phase}": 1 / own.speed_ratio(record, phase, large) for phase in ("train", "infer")},
        **{f"small_{phase}": own.speed_ratio(record, phase, small) for phase in ("train", "infer")},
        "small_memory": memory[small] / memory[moe],
        "more_memory": memory[moe] / memory[large] - 1,
        "above_large": 100 * (rows[moe].mean - rows[large].mean),
        "above_small": 100 * (rows[moe].mean - rows[small].mean),
        "small_above_large": 100 * (rows[small].mean - rows[large].mean),
        "longer_than_small": spent[moe] / spent[small] - 1,
        "shorter_than_large": 1 - spent[moe] / spent[large],
        "budget_s": record["budget"]["budget_s"],
    }


def _stored(record: dict[str, Any]) -> Mapping[str, float]:
    models = record["memory"]["models"]
    return {
        name: sum(models[model][f"{part}_mib"] for part in ("weights", "gradients", "optimizer"))
        for name, model in zip(NAMES, MODELS, strict=True)
    }


CLAIMS = [
    Claim(STUDY, "saves work**: {flops_saved:.0%} of the FLOPs", _ratios),
    Claim(STUDY, "trains at {large_train:.2f} times and classifies at {large_infer:.2f} times", _ratios),
    Claim(STUDY, "After the same training time it is {above_large:.1f} points better", _ratios),
    Claim(STUDY, "trains at {small_train:.2f} times and classifies at {small_infer:.2f} times", _ratios),
    Claim(STUDY, "with {small_memory:.2f} times the memory", _ratios),
    Claim(STUDY, "further parameters is accuracy: {above_small:.1f} points", _ratios),
    Claim(STUDY, "Most of the {above_large:.1f} points are no merit", _ratios),
    Claim(STUDY, "The small dense model has {small_above_large:.1f} of them", _ratios),
    Claim(STUDY, "{text}", lambda record: {"text": report("saving").saving_table(record)}),
    Claim(
        STUDY,
        "{text}",
        lambda record: shown(report("saving").differences(report("saving").equal_time(record, SAVING))),
    ),
    Claim(
        STUDY,
        "| the whole process, MiB | {moe:.0f} | {small:.0f} | {large:.0f} |",
        lambda record: {name: report("saving").memory(record, arm) for name, arm in zip(NAMES, SAVING, strict=True)},
    ),
    Claim(
        STEP,
        "| tensors alone, MiB | {moe:.0f} | {small:.0f} | {large:.0f} |",
        lambda record: {
            name: record["memory"]["models"][model]["tensors_mib"] for name, model in zip(NAMES, MODELS, strict=True)
        },
    ),
    Claim(STUDY, "The MoE saves none: {more_memory:.0%} more than the twin of equal parameters", _ratios),
    Claim(
        STEP,
        "Here the MoE takes {saved:.0%} less than the twin",
        lambda record: {
            "saved": 1
            - record["memory"]["models"][MODELS[0]]["tensors_mib"]
            / record["memory"]["models"][MODELS[2]]["tensors_mib"]
        },
    ),
    Claim(STEP, "whoever computes: {moe:.0f} MiB in the MoE and", _stored),
    Claim(STEP, "whoever computes: {large:.0f} MiB in the MoE and", _stored),
    Claim(STEP, "{small:.0f} MiB in the small one", _stored),
    Claim(STUDY, "steps that fit into {budget_s:.0f} s at its own rate", _ratios),
    Claim(STUDY, "All took less than {budget_s:.0f} s", _ratios),
    Claim(STUDY, "{budget_s:.0f} s of one thread is less than an epoch", _ratios),
    Claim(STUDY, "{text}", lambda record: {"text": report("saving").time_table(record)}),
    Claim(STUDY, "took {longer_than_small:.0%} more than the small twin", _ratios),
    Claim(STUDY, "it took {longer_than_small:.0%} more time than its twin", _ratios),
    Claim(STUDY, "and {shorter_than_large:.0%} less than the large one", _ratios),
]

DEFINITIONS = [
    Definition("Student's, at 95 %, each for itself", "the level of `benchmarks/study.py`"),
    Definition('"below" needs p < 0.05', "the level of `benchmarks/study.py`"),
    Definition("with three minutes of one thread", "the budget, rounded"),
    Definition("told from luck with three seeds", "the record's seeds"),
    Definition("torch 2.13", "the version that the record names"),
]
