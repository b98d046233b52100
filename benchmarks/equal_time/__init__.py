"""Do experts pay at equal time, at full length? CIFAR-10's recipe beside dense models (protocol.md).

python -m benchmarks equal-time price                                               # idle machine, before the runs
nice -n 19 python -m benchmarks equal-time run --data path/to/cifar10 --limit 0     # stop it at will; two may run
python -m benchmarks equal-time report                                              # README.md's tables
"""

from __future__ import annotations

import functools
import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model

from benchmarks.equal_time.report import FIRST_SEED, LOOKS, SHOWN, judged, parts_of, verdict
from benchmarks.harness import HERE, about, argument_parser, in_a_process
from benchmarks.memory import measure
from benchmarks.places import WIDE
from benchmarks.queue import add_study, do_runs, fill_readme, read_records, refuse_changes, write_run
from benchmarks.sparsity.arms import best_rate, rates_around, validation
from benchmarks.sparsity.training import Meter, metered
from benchmarks.subject import Subject, TrainingStep, find_subject, noise_batch
from benchmarks.timing import Candidate, interleave, ratio_of, spread
from moevision.efficiency import measure_cost
from moevision.errors import UserError
from moevision.files import file_sha256
from moevision.layers.routing import evaluating
from moevision.limits import keep_freed_memory
from moevision.models.vit_moe import _MODELS, VisionTransformerMoE, _build, _cfg

FOLDER = HERE / "equal_time"
PROTOCOL, PRICES = FOLDER / "protocol.md", FOLDER / "prices.jsonl"
STEPS, BATCH = 3_510, 128  # ten epochs of 351 batches
BASE_LR, TUNING_SEEDS = 6e-3, (100,)
RECIPE = {
    "optim.name": "muon", "optim.weight_decay": 0.05, "optim.warmup_fraction": 0.2, "label_smoothing": 0.2,
    "aux.importance": 0.05, "aux.load": 0.05,
}  # fmt: skip
"""What configs/cifar10.yaml says already, said again: the config may change, a study may not."""
IDLE = 0.5  # load average below which a machine is
ROUNDS, WARM_UP, LATENCY_BATCHES = 24, 6, (1, 64)

WIDE_TWIN, HIDDEN = "vit_moe_hybrid_wide_twin_patch4_32", 864
"""The dense model that takes as long for 64 images as the MoE, and the width of its two MLPs (the protocol)."""


default_cfgs = generate_default_cfgs({f"{WIDE_TWIN}.untrained": _cfg(32, _MODELS[WIDE][1]["stem"])})


@register_model
def vit_moe_hybrid_wide_twin_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformerMoE:
    """`vit_moe_hybrid_wide_patch4_32` with dense MLPs of HIDDEN units: the twin of all of so many narrow experts."""
    size, given = _MODELS[WIDE]
    widths = {"num_experts": 8, "expert_hidden": HIDDEN // 8, "twin": "total_params", "img_size": size}
    model: VisionTransformerMoE = _build(VisionTransformerMoE, WIDE_TWIN, pretrained, {**given, **widths, **kwargs})
    return model


@dataclass(frozen=True)
class Arm:
    """What an arm changes in `model.arch`, and the arm whose learning rate it takes."""

    arch: Mapping[str, Any] = field(default_factory=dict)
    tuned_as: str = "twin"

    def subject(self, name: str) -> Subject:
        """The model and its recipe, for measuring."""
        base = find_subject("cifar10")
        return replace(base, name=name, arch={**base.arch, "name": WIDE, **self.arch}, batch_size=BATCH)


ARMS = {
    "moe": Arm({"router": "vmoe_top_k"}, "moe"),
    "twin": Arm({"router": "vmoe_top_k", "twin": "active_flops"}),  # tuned, and timed
    "twin-time": Arm({"router": "vmoe_top_k", "twin": "active_flops"}),
    "twin-parameters": Arm({"router": "vmoe_top_k", "twin": "total_params"}),
    "twin-wide": Arm({"name": WIDE_TWIN, "router": "vmoe_top_k"}),
}
TUNED = ("moe", "twin")


@dataclass(frozen=True)
class Job:
    """One run, of so many steps."""

    arm: str
    seed: int
    lr: float
    steps: int

    @property
    def name(self) -> str:
        """What its folder and its record are called."""
        return f"{self.arm}-lr{self.lr:g}-s{self.seed}"


def queue(records: Sequence[Mapping[str, Any]], more_steps: int) -> Iterator[Job]:
    """All runs in the protocol's order, as far as these records decide their rates, and how many pairs there are.

    Args:
        records: of the runs so far.
        more_steps: of `twin-time`.
    """
    for arm in TUNED:
        for lr in rates_around(BASE_LR, validation(records, TUNING_SEEDS, arm=arm)):
            yield from (Job(arm, seed, lr, STEPS) for seed in TUNING_SEEDS)
    look = judged(records, LOOKS[0])
    pairs = LOOKS[-1] if look is not None and verdict(look) == "undecided" else LOOKS[0]
    wanted = [(name, place) for place in range(pairs) for name in ("twin-parameters", "moe", "twin-time")]
    if look is not None:
        wanted += [("twin-wide", place) for place in range(pairs)]
    for name, place in wanted:
        lr = rate_of(records, ARMS[name].tuned_as)
        if lr is not None and place < SHOWN[name]:
            yield Job(name, FIRST_SEED + place, lr, more_steps if name == "twin-time" else STEPS)


def rate_of(records: Sequence[Mapping[str, Any]], arm: str) -> float | None:
    """The best rate of a tuned arm; None as long as it isn't decided."""
    return best_rate(BASE_LR, validation(records, TUNING_SEEDS, arm=arm))


def steps_of_equal_time(prices: Sequence[Mapping[str, Any]]) -> int:
    """Steps of `twin-time`: as many more as a step of the twin is faster, by the median of the measurements."""
    return round(STEPS * statistics.median(each["moe_to_twin"]["median"] for each in prices))


# ---- one run


def arguments_of(job: Job, options: Namespace) -> list[str]:
    """The command line of `moevision fit` that this run is."""
    given: dict[str, Any] = {
        "data.path": options.data,
        "data.batch_size": BATCH,
        "model.optim.lr": job.lr,
        "trainer.max_epochs": -1,
        "trainer.max_steps": job.steps,
        "trainer.check_val_every_n_epoch": 1_000_000,  # the meter validates, and no epoch is chosen by it
        "trainer.precision": "bf16-mixed",
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "seed_everything": job.seed,
        "name": job.name,
        "runs_root": options.work,
        **{f"model.{name}": value for name, value in RECIPE.items()},
        **{f"model.arch.{name}": value for name, value in {"name": WIDE, **ARMS[job.arm].arch}.items()},
    }
    front = ["--config", "cifar10", "--data.download=false"]
    return [*front, *(f"--{name}={value}" for name, value in given.items()), "--resume=auto"]


def run_job(job: Job, options: Namespace) -> dict[str, Any]:
    """Do one run, or go on with it; its record."""
    keep_freed_memory()
    run_dir = options.work / job.name
    (run_dir / "summary.json").unlink(missing_ok=True)  # ended between the run's last file and its record
    origin = {**about(), "command": "python -m benchmarks equal-time run", "protocol_sha256": file_sha256(PROTOCOL)}
    key = {**vars(job), "failed": None, "precision": "bf16-mixed", **origin}
    return metered(key, arguments_of(job, options), Meter(job.seed), run_dir)


def told(job: Job, record: Mapping[str, Any]) -> str:
    """A line about a finished run."""
    return f"{job.name}: {record['failed'] or 100 * record['test_top1']:.2f} %, {record['cpu_s']:.0f} s CPU"


# ---- the prices


def price(options: Namespace) -> None:
    """Add one measurement of all arms, in turns on one thread: a training step, batches of 1 and of 64, memory.

    Raises:
        UserError: if the machine isn't idle.
    """
    keep_freed_memory()
    origin = {**about(), "command": "python -m benchmarks equal-time price"}
    load = origin["machine"]["load_average_before"]
    if load is not None and load > IDLE and not options.busy:
        raise UserError(f"The load average is {load}: wait until nothing else runs (below {IDLE}).")
    arms = {name: arm.subject(name) for name, arm in ARMS.items() if name != "twin-time"}
    steps = {name: TrainingStep(subject) for name, subject in arms.items()}
    images, labels = noise_batch(arms["moe"], "cpu")
    asked = [Candidate(name, functools.partial(step, images, labels)) for name, step in steps.items()]
    times = interleave(asked, repetitions=options.rounds, warm_up=WARM_UP)
    found: dict[str, dict[str, Any]] = {name: {"step_ms": spread(times.cpu[name], 1e3)} for name in arms}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for batch in LATENCY_BATCHES:
            nets = {name: step.net.eval() for name, step in steps.items()}
            asked = [Candidate(name, functools.partial(net, images[:batch])) for name, net in nets.items()]
            own = interleave(asked, repetitions=4 * options.rounds, warm_up=4 * WARM_UP)
            for name in arms:
                found[name][f"image_ms_{batch}"] = spread(own.cpu[name], 1e3 / batch)
    for name, subject in arms.items():
        with evaluating(steps[name].net):
            cost = vars(measure_cost(steps[name].net, subject.image_size))
        found[name] |= {"cost": cost, "memory": in_a_process(_memory, name)}
    ratio = ratio_of(times.cpu["moe"], times.cpu["twin"])
    measured = {"busy": options.busy, "moe_to_twin": ratio, "arms": found, **origin}
    write_run(options.prices, "price", measured)
    print(f"moe ÷ twin: {ratio}")


def _memory(name: str) -> dict[str, float]:
    """In a process of its own, which knows the model's name by importing this module."""
    return measure(ARMS[name].subject(name), "moe", "bf16", "cpu", 1)


def main() -> None:
    """Measure, run or report."""
    parser = argument_parser("equal-time", __doc__)
    parser.add_argument("verb", choices=("price", "run", "report"))
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)")
    parser.add_argument("--prices", type=Path, default=PRICES, help="the measurements (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="price: measured rounds (%(default)s)")
    parser.add_argument("--busy", action="store_true", help="price: although something else runs")
    add_study(parser, FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.verb == "price":
        price(options)
    elif options.verb == "report":
        fill_readme(options.readme, parts_of(read_records(options.out), read_records(options.prices)))
    else:
        refuse_changes(PROTOCOL, allowed=options.allow_dirty)
        prices = read_records(options.prices)
        if not prices:
            raise UserError("Measure first, on an idle machine: python -m benchmarks equal-time price.")
        more_steps = steps_of_equal_time(prices)
        do_runs(functools.partial(queue, more_steps=more_steps), run_job, told, options)
