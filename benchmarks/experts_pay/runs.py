"""The runs that the protocol lists: tuning, then eight seeds of the arms that it chooses; and what each records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.experts_pay.arms import (
    ARMS,
    BATCH,
    DENSE,
    MOE,
    STEMS,
    TASKS,
    Pages,
    build,
    stem_of,
    train,
)
from benchmarks.experts_pay.knockout import (
    bits,
    cell_pixels,
    cluster_table,
    count_groups,
    knock_out,
    names_of,
    outputs_of,
)
from benchmarks.routers.report import rate_beyond
from moevision.layers import forward_routing, moe_layers

T_S = 15.0  # CPU seconds of training
RATES = (0.008, 0.016, 0.032)
TUNING_SEED = 100
SEEDS = range(8)
MOE_OF_TASK = {
    "groups": MOE,
    "kinds": ["patch-moe-8", "patch-moe-32", "conv-moe-8", "conv_patch-moe-8"],
}
PAGES = {"val": 3_600, "test": 7_200, "unseen": 3_600}
NAMING_SEED = 1  # of the pages of "val" that name experts


@dataclass(frozen=True)
class Run:
    """One training: a task, an arm, its learning rate and a seed."""

    task: str
    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.task} {self.arm} {self.lr:g} {self.seed}"


def next_runs(records: list[dict[str, Any]]) -> Iterator[Run]:
    """All runs in order, as far as these records decide them."""
    for task in TASKS:
        yield from _runs_of_task([record for record in records if record["task"] == task], task)


def _runs_of_task(records: list[dict[str, Any]], task: str) -> Iterator[Run]:
    arms = arms_of(task)
    for arm in arms:
        for lr in RATES:
            yield Run(task, arm, lr, TUNING_SEED)
        if (lr := next_rate(records, arm)) is not None:
            yield Run(task, arm, lr, TUNING_SEED)
    if not all(is_tuned(records, arm) for arm in arms):
        return
    controls = [strongest_dense(records, stem) for stem in STEMS]
    for seed in SEEDS:
        for arm in (*controls, *MOE_OF_TASK[task]):
            yield Run(task, arm, best_rate(records, arm), seed)


def arms_of(task: str) -> list[str]:
    """The arms that a task has."""
    return [arm for arm in ARMS if arm in DENSE or arm in MOE_OF_TASK[task]]


def tuned(records: list[dict[str, Any]], arm: str) -> dict[float, float]:
    """Learning rate -> accuracy on the tuning pages."""
    return {
        record["lr"]: record["val_top1"]
        for record in records
        if record["arm"] == arm and record["seed"] == TUNING_SEED
    }


def is_tuned(records: list[dict[str, Any]], arm: str) -> bool:
    """Whether all rates were tried, and the best isn't at an edge."""
    return set(RATES) <= tuned(records, arm).keys() and next_rate(records, arm) is None


def next_rate(records: list[dict[str, Any]], arm: str) -> float | None:
    """The rate beyond an edge that is the best so far; None if the best isn't at an edge, or not all are tried."""
    rates = tuned(records, arm)
    return rate_beyond(rates) if set(RATES) <= rates.keys() else None


def best_rate(records: list[dict[str, Any]], arm: str) -> float:
    """The rate with the best accuracy on the tuning pages; the lowest of those that tie."""
    rates = tuned(records, arm)
    return max(sorted(rates), key=lambda lr: rates[lr])


def strongest_dense(records: list[dict[str, Any]], stem: str = "") -> str:
    """The dense arm that is best on the tuning pages at its own rate; of one stem, or of both."""
    arms = [arm for arm in DENSE if stem in ("", stem_of(arm)) and tuned(records, arm)]
    return max(arms, key=lambda arm: max(tuned(records, arm).values()))


@lru_cache(maxsize=1)
def training_pages(seed: int, task: str) -> Pages:
    """The pages that a run's seed trains on; those of one seed are kept for all arms."""
    return Pages("train", 1 + seed, task)


@lru_cache(maxsize=4)
def fixed_pages(split: str, task: str, seed: int = 0) -> Pages:
    """Pages that are the same for all runs."""
    return Pages(split, seed, task)


def record_of(run: Run, step_ms: dict[str, float]) -> dict[str, Any]:
    """Train, test, and for the experts of a seed on pages of groups: names, clusters, what is missed without them."""
    steps = round(1000 * T_S / step_ms[run.arm])
    pages = training_pages(run.seed, run.task)
    net, cpu_s = train(run.arm, run.lr, run.seed, steps, pages, run.task)
    predicted = {
        split: predict(net, fixed_pages(split, run.task), count) for split, count in PAGES.items()
    }
    num_classes = len(TASKS[run.task].classes)
    record: dict[str, Any] = {
        "task": run.task,
        "arm": run.arm,
        "lr": run.lr,
        "seed": run.seed,
        "steps": steps,
        "cpu_s": round(cpu_s, 2),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        **{f"{split}_top1": accuracy(found, num_classes) for split, found in predicted.items()},
    }
    if run.seed != TUNING_SEED and run.task == "groups" and moe_layers(net):
        record |= experts_record(run, net)
    return record


@torch.inference_mode()
def predict(net: nn.Module, pages: Pages, count: int) -> Tensor:
    """The classes of the first pages, int64 [count]."""
    batches = range(-(-count // BATCH))
    return torch.cat([net(pages.batch(number)[0]).argmax(-1) for number in batches])[:count]


def accuracy(classes: Tensor, num_classes: int) -> float:
    """Share of pages that are right; page i is of class i mod C."""
    labels = torch.arange(len(classes)) % num_classes
    return round(float((classes == labels).float().mean()), 6)


def experts_record(run: Run, net: nn.Module) -> dict[str, Any]:
    """What each expert takes on the naming pages, what controls take, and what is missed on the test pages."""
    naming = fixed_pages("val", "groups", NAMING_SEED)
    count = PAGES["val"]
    num_experts = ARMS[run.arm]["num_experts"]
    outputs = outputs_of(net, naming, count)
    groups = outputs.groups.numpy()
    table = count_groups(outputs.first_choice.numpy(), groups, num_experts)
    pixels, inputs = cell_pixels(naming, count), outputs.inputs.flatten(0, 1).numpy()
    controls = {
        "pixel_clusters": cluster_table(pixels, groups, num_experts),
        "input_clusters": cluster_table(inputs, groups, num_experts),
        "untrained_router": untrained_table(run, naming, count, groups),
    }
    del outputs

    tested = outputs_of(net, fixed_pages("test", "groups"), PAGES["test"])
    return {
        "experts": table.tolist(),
        "bits": round(bits(table), 4),
        "controls": {name: control.tolist() for name, control in controls.items()},
        "control_bits": {name: round(bits(control), 4) for name, control in controls.items()},
        "knock_out": knock_out(tested, names_of(table)),
    }


def untrained_table(run: Run, pages: Pages, count: int, groups: np.ndarray) -> np.ndarray:
    """What the experts of this seed would take before training."""
    net = build(run.arm, run.seed).eval()
    choices = []
    with torch.inference_mode():
        for number in range(-(-count // BATCH)):
            _, (routing,) = forward_routing(net, pages.batch(number)[0])
            choices.append(routing.logits.argmax(-1))
    return count_groups(torch.cat(choices)[:count].numpy(), groups, ARMS[run.arm]["num_experts"])
