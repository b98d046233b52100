"""Time the training step of a model beside its dense twins of equal active FLOPs and of equal parameters.

Forward under autocast, losses, backward, clipping and the config's optimizer on a batch of noise. WHAT is a config, a
run folder, or a timm name (a dense one is converted).

Tells images/s, MFU against the measured matmul peak, the phases of a step (router, dispatch, experts, attention, ...),
balance and padding of the experts, peak memory (each model in processes of its own), and joules per image where the
machine has a counter.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.energy import energy_of, energy_text
from benchmarks.flops import training_flops
from benchmarks.harness import DTYPES, Json, count, positive
from benchmarks.memory import beside_twin, memory_of
from benchmarks.phases import PhaseClock, breakdown, measure_load
from benchmarks.subject import NAMES, Subject, TrainingStep, find_subject, noise_batch
from benchmarks.timing import Candidate, interleave, rounded, rows_of
from moevision.train.recipe import default_precision

QUICK = {"batch_size": 4, "repetitions": 3, "warm_up": 1, "breakdown_steps": 2, "memory_runs": 1}
EXAMPLES = """\
  python -m benchmarks train cifar10 --out benchmarks/train/cifar10
  python -m benchmarks train cifar10 --arch vit_moe_hybrid_patch8_32
"""
MEMORY_PARTS = ("peak", "weights", "gradients", "optimizer", "activations", "other", "tensors")


def parser() -> ArgumentParser:
    """The command line."""
    parser = harness.argument_parser("train", __doc__, EXAMPLES)
    add = parser.add_argument
    add("model", metavar="WHAT", help="a config, a run folder, or a timm name")
    add("--arch", metavar="NAME", help="timm name in the place of the config's")
    add("--batch-size", type=positive, metavar="N", help="images per step (the config's)")
    add("--image-size", type=positive, metavar="PX", help="side of the images (the config's)")
    usual = "bf16" if default_precision() == "bf16-mixed" else "fp32"
    add("--precision", choices=tuple(DTYPES), default=usual, help="(here %(default)s, as fit)")
    add("--num-classes", type=positive, metavar="N", help="classes, where the config has none (10)")
    add("--memory-runs", type=count, default=3, help="processes per model for its peak memory (3)")
    add(
        "--breakdown-steps", type=positive, default=10, help="steps for the breakdown (%(default)s)"
    )
    harness.add_measuring(parser, repetitions=30)
    return parser


def main() -> None:
    """Measure, print tables and write the record."""
    options = harness.parse(parser(), QUICK)
    device = harness.set_up(options)
    given = ("arch", "batch_size", "image_size", "num_classes")
    subject = find_subject(options.model, **{name: getattr(options, name) for name in given})
    peak = harness.measure_peaks(options, device, [options.precision])
    record = {**harness.new_record("train", options, device), "model": asdict(subject)}
    record["measured_peak_flops"] = peak
    steps = {
        name: TrainingStep(subject, which, options.precision, device)
        for which, name in NAMES.items()
    }
    record["rows"] = _measure_steps(steps, subject, options, peak, device)
    batch, moe = noise_batch(subject, device), steps[NAMES["moe"]]
    with torch.no_grad(), moe.autocast():
        record["load"] = measure_load(moe.net, partial(moe.net, batch[0]))
    record["breakdown"] = {
        name: _breakdown(step, batch, options.breakdown_steps) for name, step in steps.items()
    }
    record["energy"] = {
        name: energy_of(partial(step, *batch), subject.batch_size, device)
        for name, step in steps.items()
    }
    del steps, moe
    record["memory"] = _memories(subject, options, device)
    show(record)
    harness.write_record(options.out, record)


def _measure_steps(
    steps: Mapping[str, TrainingStep],
    subject: Subject,
    options: Namespace,
    peaks: Json,
    device: torch.device,
) -> list[dict[str, Any]]:
    """A row for each model, with images per second, FLOPs and MFU."""
    batch = noise_batch(subject, device)
    candidates = [Candidate(name, partial(step, *batch)) for name, step in steps.items()]
    rounds = {"repetitions": options.repetitions, "warm_up": options.warm_up}
    timings = interleave(candidates, **rounds, device=device, title="training steps")
    facts, some = {}, batch[0][:4]
    for name, step in steps.items():
        flops = training_flops(step.net, some) / len(some)
        size = sum(parameter.numel() for parameter in step.net.parameters())
        facts[name] = {"parameters": size, "training_flops_per_image": flops}
    rows, peak = rows_of(timings, list(steps), facts), peaks.get(options.precision)
    for row in rows:
        row["images_per_s"] = rounded(subject.batch_size / (row["time_ms"]["median"] / 1e3))
        rate = row["images_per_s"] * row["training_flops_per_image"]
        row |= {"flops_per_s": rounded(rate), "mfu": None if peak is None else rounded(rate / peak)}
    return rows


def _breakdown(
    step: TrainingStep, batch: tuple[torch.Tensor, torch.Tensor], steps: int
) -> dict[str, Any]:
    """Phases over some further steps."""
    clock = PhaseClock(step.device)
    with clock.watching(step.net):
        for _ in range(steps):
            step(*batch, clock)
    return breakdown(clock.seconds, steps)


def _memories(subject: Subject, options: Namespace, device: torch.device) -> dict[str, Any]:
    """Peak memory by model, and the MoE model's beside each twin's."""
    if not options.memory_runs:
        return {"error": "not asked for"}
    how = {"precision": options.precision, "device": device, "runs": options.memory_runs}
    found = {name: memory_of(subject, which, **how) for which, name in NAMES.items()}
    moe, *twins = NAMES.values()
    measured = [twin for twin in twins if "error" not in {**found[moe], **found[twin]}]
    ratios = {twin: beside_twin(found[moe], found[twin]) for twin in measured}
    return {"models": found, "moe_beside": ratios}


def show(record: Json) -> None:
    """Speed, phases, load, memory, energy."""
    model, twin = record["model"], NAMES["active_flops"]
    harness.print_machine(record)
    sizes = f"batches of {model['batch_size']} of noise, {model['image_size']} px, {record['settings']['precision']}"
    harness.print_rows(f"{model['name']}: training step, {sizes}", record["rows"], twin)
    for name, part in record["breakdown"].items():
        phases = ", ".join(f"{phase} {own['ms']:.1f}" for phase, own in part["phases"].items())
        harness.print_line(f"ms of {name}: {phases}")
    for layer in record["load"]:
        load = f"busiest expert {layer['slowest_over_mean']:.2f} × the mean load"
        harness.print_line(f"block {layer['block']}: {load}, padding {layer['padding_waste']}")
    for name, use in record["memory"].get("models", {}).items():
        parts = ", ".join(f"{part} {use.get(f'{part}_mib', 0):.0f}" for part in MEMORY_PARTS)
        harness.print_line(f"peak memory, {name}: {use.get('error', parts)} MiB")
    for name, energy in record["energy"].items():
        harness.print_line(f"energy, {name}: {energy_text(energy)}")
