"""How planned step times grow to 1,024 GPUs, and what unequal experts cost: nothing is measured, all is assumed.

    python -m benchmarks planner

`--measure` does something else: `measured.py`, planned and measured step times of a few processes of this machine.

Two models of 224 px with 32 experts of which 1 is active, in every other block, 64 images on each GPU; the functions of
`benchmarks.planner.formulas` with its data sheet of an H100. README.md says what to read off the figure. Beside it the
trainings of ImageNet, as `python -m benchmarks plan` recommends them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import about, argument_parser
from benchmarks.lines import write_lines
from benchmarks.planner.footprint import shape_of
from benchmarks.planner.formulas import Job, Layout, ModelShape, layouts, plan, recommend
from benchmarks.planner.machine import Machine, sheet_machine
from benchmarks.planner.measured import measure
from moevision.models.config import MoEConfig, build_model

FOLDER = Path(__file__).parent
RECORD, FIGURE = FOLDER / "record.json", FOLDER / "planner.png"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
IMAGES_PER_GPU = 64
LAYOUTS = (Layout("ddp"), Layout("fsdp"), Layout("ddp", 8), Layout("fsdp", 8), Layout("fsdp", 32))
CVS = (0.0, 0.1, 0.3, 1.0)
IMAGENET, IMAGENET_EPOCHS = 1_281_167, 300
TRAININGS = [  # model, GPUs, images a step
    (f"vit_moe_{size}_patch16_224", gpus, batch)
    for size in ("small", "base")
    for gpus, batch in ((8, 1024), (64, 4096))
]
MODELS = {"ViT-S": "vit_small_patch16_224", "ViT-L": "vit_large_patch16_224"}


def shape(base: str) -> ModelShape:
    """E = 32, K = 1 in every other block, counted without weights."""
    config = MoEConfig(name="vit_moe", base=base, num_experts=32, top_k=1, router="switch")
    with torch.device("meta"):
        net = build_model(config, num_classes=1000, image_size=224)
    return shape_of(net, 224, name=base)


def simulate(model: ModelShape, machine: Machine) -> list[dict[str, Any]]:
    """One row for each layout, number of GPUs and CV; unequal loads change nothing without expert parallelism."""
    rows = []
    for layout in LAYOUTS:
        for gpus in GPUS:
            if gpus % layout.expert:
                continue
            for cv in CVS if layout.expert > 1 else CVS[:1]:
                found = plan(model, layout, Job(gpus, IMAGES_PER_GPU * gpus, cv=cv), machine)
                rows.append(
                    {
                        "layout": layout.name,
                        "gpus": gpus,
                        "cv": cv,
                        "step_ms": round(found.step_ms, 2),
                        "wait_ms": round(found.wait_ms, 2),
                        "mfu": round(found.mfu, 3),
                        "memory_gb": round(found.memory.total / 1e9, 2),
                        "fits": found.fits,
                        "accumulate": found.job.accumulate,
                    }
                )
    return rows


def trainings(machine: Machine) -> list[dict[str, Any]]:
    """One row for each training of ImageNet, under the layout that is recommended."""
    rows = []
    for name, gpus, batch in TRAININGS:
        with torch.device("meta"):
            net = build_model(MoEConfig(name=name), num_classes=1000, image_size=224)
        model = shape_of(net, 224, name=name)
        best = recommend([plan(model, layout, Job(gpus, batch), machine) for layout in layouts(model, gpus)])
        assert best is not None, "80 GB are enough for these"
        rows.append(
            {
                "model": name,
                "gpus": gpus,
                "batch": batch,
                "layout": best.layout.name,
                "memory_gb": round(best.memory.total / 1e9, 1),
                "step_ms": round(best.step_ms, 1),
                "images_per_s": round(best.images_per_s),
                "hours": round(IMAGENET * IMAGENET_EPOCHS / best.images_per_s / 3600, 1),
            }
        )
    return rows


def draw(rows: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Above step times by GPUs at CV 0.1, below the share of a step that is spent waiting at 64 GPUs, by CV."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, (name, found) in enumerate(rows.items()):
        above, below = axes[0][column], axes[1][column]
        for place, layout in enumerate(LAYOUTS):
            of_it = [row for row in found if row["layout"] == layout.name]
            cv = 0.1 if layout.expert > 1 else 0.0
            line = [row for row in of_it if row["cv"] == cv]
            fits = all(row["fits"] for row in line)
            label = layout.name if fits else f"{layout.name} (does not fit in 80 GB)"
            style = "-" if fits else ":"
            above.plot(
                [row["gpus"] for row in line], [row["step_ms"] for row in line], style, color=f"C{place}", label=label
            )
            waits = [row for row in of_it if row["gpus"] == 64 and layout.expert > 1]
            if waits:
                shares = [100 * row["wait_ms"] / row["step_ms"] for row in waits]
                below.plot([row["cv"] for row in waits], shares, "o-", color=f"C{place}", label=layout.name)
        above.set(title=f"{name}, 32 experts, 64 images per GPU, CV 0.1", xlabel="GPUs", ylabel="ms per step (planned)")
        above.set_xscale("log", base=2)
        above.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        above.set_ylim(bottom=0)
        below.set(title="waiting for the busiest GPU, 64 GPUs", xlabel="CV of the experts' loads", ylabel="% of a step")
        below.set_ylim(bottom=0)
        above.legend(fontsize=8)
        below.legend(fontsize=8)
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("planner", __doc__)
    parser.add_argument("--measure", action="store_true", help="time steps of this machine beside their plan instead")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="with --measure (%(default)s)")
    parser.add_argument("--images", type=int, default=64, help="with --measure: of a process in a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="with --measure: of each layout (%(default)s)")
    parser.add_argument("--out", type=Path, help="with --measure: write the record as JSON")
    options = parser.parse_args()
    if options.measure:
        measure(options.processes, options.images, options.steps, options.out)
    else:
        compute()


def compute() -> None:
    """Write the record and the figure."""
    machine = sheet_machine("h100")
    rows = {name: simulate(shape(base), machine) for name, base in MODELS.items()}
    assumed = {name: [getattr(machine, name), source] for name, source in machine.assumed.items()}
    imagenet = {"images": IMAGENET, "epochs": IMAGENET_EPOCHS, "trainings": trainings(machine)}
    known = {"gpu": machine.name, "assumed": assumed, "images_per_gpu": IMAGES_PER_GPU, "imagenet": imagenet}
    write_lines(RECORD, {**known, "rows": rows, "code": about()["code"]})
    draw(rows, FIGURE)
    print(f"{RECORD} and {FIGURE}: computed, not measured")
