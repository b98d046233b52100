"""The runs that the protocol lists: tuning, then eight seeds of the arms that it chooses; and what each records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.experts_pay.arms import ARMS, BATCH, DENSE, Pages, build, train
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
RATES = (0.008, 0.016, 0.032, 0.064)
TUNING_SEED = 100
SEEDS = range(8)
SIZED_MOE = ("moe-8", "moe-16", "moe-32")
PAGES = {"val": 3_600, "test": 7_200, "unseen": 3_600}
NAMING_SEED = 1  # of the pages of "val" that name experts


@dataclass(frozen=True)
class Run:
    """One training: an arm, its learning rate and a seed."""

    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.arm} {self.lr:g} {self.seed}"


def next_runs(records: list[dict[str, Any]]) -> Iterator[Run]:
    """All runs in order, as far as these records decide them."""
    arms = [arm for arm in ARMS if arm != "moe-head"]
    for arm in arms:
        for lr in RATES:
            yield Run(arm, lr, TUNING_SEED)
        if (lr := rate_beyond(tuned(records, arm))) is not None:
            yield Run(arm, lr, TUNING_SEED)
    if not all(is_tuned(records, arm) for arm in arms):
        return
    for seed in SEEDS:
        for arm in (strongest_dense(records), *SIZED_MOE):
            yield Run(arm, best_rate(records, arm), seed)


def tuned(records: list[dict[str, Any]], arm: str) -> dict[float, float]:
    """Learning rate -> accuracy on the tuning pages."""
    return {
        record["lr"]: record["val_top1"]
        for record in records
        if record["arm"] == arm and record["seed"] == TUNING_SEED
    }


def is_tuned(records: list[dict[str, Any]], arm: str) -> bool:
    """Whether all rates were tried, and the best isn't at an edge."""
    rates = tuned(records, arm)
    return set(RATES) <= rates.keys() and rate_beyond(rates) is None


def best_rate(records: list[dict[str, Any]], arm: str) -> float:
    """The rate with the best accuracy on the tuning pages; the lowest of those that tie."""
    rates = tuned(records, arm)
    return max(sorted(rates), key=lambda lr: rates[lr])


def strongest_dense(records: list[dict[str, Any]]) -> str:
    """The dense arm that is best on the tuning pages at its own rate."""
    return max(DENSE, key=lambda arm: max(tuned(records, arm).values()))


@lru_cache(maxsize=1)
def training_pages(seed: int) -> Pages:
    """The pages that a run's seed trains on; those of one seed are kept for all arms."""
    return Pages("train", 1 + seed)


@lru_cache(maxsize=4)
def fixed_pages(split: str, seed: int = 0) -> Pages:
    """Pages that are the same for all runs."""
    return Pages(split, seed)


def record_of(run: Run, step_ms: dict[str, float]) -> dict[str, Any]:
    """Train, test, and for the experts of a seed: names, clusters and what is missed without them."""
    steps = round(1000 * T_S / step_ms[run.arm])
    net, cpu_s = train(run.arm, run.lr, run.seed, steps, training_pages(run.seed))
    predicted = {split: predict(net, fixed_pages(split), count) for split, count in PAGES.items()}
    record: dict[str, Any] = {
        "arm": run.arm,
        "lr": run.lr,
        "seed": run.seed,
        "steps": steps,
        "cpu_s": round(cpu_s, 2),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        **{f"{split}_top1": accuracy(classes) for split, classes in predicted.items()},
    }
    if run.seed != TUNING_SEED:
        record["predicted"] = "".join(map(str, predicted["test"].tolist()))
        if moe_layers(net):
            record |= experts_record(run, net)
    return record


@torch.inference_mode()
def predict(net: nn.Module, pages: Pages, count: int) -> Tensor:
    """The classes of the first pages, int64 [count]."""
    batches = range(-(-count // BATCH))
    return torch.cat([net(pages.batch(number)[0]).argmax(-1) for number in batches])[:count]


def accuracy(classes: Tensor) -> float:
    """Share of pages that are right; page i is of group i mod 9."""
    return round(float((classes == torch.arange(len(classes)) % 9).float().mean()), 6)


def experts_record(run: Run, net: nn.Module) -> dict[str, Any]:
    """What each expert takes on the naming pages, what controls take, and what is missed on the test pages."""
    naming = fixed_pages("val", NAMING_SEED)
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

    tested = outputs_of(net, fixed_pages("test"), PAGES["test"])
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
