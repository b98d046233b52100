"""README.md's tables and figure, from the records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.markdown import table
from benchmarks.queue import fill_readme, is_dirty
from benchmarks.sparsity.arms import ARMS, BALANCE, EPOCHS, STAGES, TUNING_SEEDS, Record, progress, rate_of
from benchmarks.sparsity.verdict import Result, finished, judge, runs_of
from moevision.train.plots import BLUE, GRID, INK, SOFT, calm, save, title
from moevision.words import flops

DEVICES = {name: f"{name.upper()}, {epochs} epoch{'' if epochs == 1 else 's'}" for name, epochs in EPOCHS.items()}
NOT_RUN = "not run"
Measurements = Sequence[Mapping[str, Any]]


def write_report(records: Sequence[Record], speed: Measurements, readme: Path) -> None:
    """Put the tables between the README's marks, and the figure beside it.

    Raises:
        UserError: if the README has no marks.
    """
    fill_readme(readme, parts_of(records, speed))
    judged = {device: judge(records, device) for device in DEVICES}
    drawn = {device: results for device, results in judged.items() if any(result.contrast for result in results)}
    if drawn:
        draw(drawn, readme.with_name("sparsity.png"))


def tables(records: Sequence[Record], speed: Measurements) -> str:
    """All of it as Markdown."""
    return "\n\n".join(parts_of(records, speed))


def parts_of(records: Sequence[Record], speed: Measurements) -> list[str]:
    """For each device its heading, the verdicts, the arms, the balance losses; then what was left out."""
    parts = []
    for device, name in DEVICES.items():
        if not any(run["device"] == device for run in records):
            parts += [f"### {name}", "Not run."]
            continue
        results, measured = judge(records, device), medians(speed, device)
        parts += [
            f"### {name}",
            "\n".join(_verdict(result) for result in results),
            hypothesis_table(results),
            arm_table(records, device, measured),
            *shift_table(records, device),
            balance_table(records, device),
            "{} runs of the queue are done, {} are missing.".format(*progress(records, device)),
        ]
    return [*parts, *left_out(records)]


def idle(speed: Measurements, device: str) -> Measurements:
    """The measurements of a device that count: those with `--busy` try things out."""
    return [each for each in speed if each["device"] == device and not each["busy"]]


def medians(speed: Measurements, device: str) -> dict[str, dict[str, Any]]:
    """By arm ρ, and the medians of its measurements on an idle machine: ms of a step, MiB of its training."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for each in idle(speed, device):
        for arm, values in each["arms"].items():
            found.setdefault(arm, []).append(values)
    return {
        arm: {
            "routed_share": all_of[0]["routed_share"],
            "ms": statistics.median(values["ms"]["median"] for values in all_of),
            "mib": statistics.median(values["memory"].get("peak_mib", math.nan) for values in all_of),
        }
        for arm, all_of in found.items()
    }


def _verdict(result: Result) -> str:
    name = result.hypothesis.name
    sentence = result.sentence.removeprefix(f"{name}: ")  # where there is no verdict
    return f"- **{name}.** {sentence[0].upper()}{sentence[1:]}"


def hypothesis_table(results: Sequence[Result]) -> str:
    """Every contrast with its interval, its adjusted p, and what could have been found."""
    lines = []
    for result in results:
        contrast, hypothesis = result.contrast, result.hypothesis
        second = contrast.second if contrast else " or ".join(hypothesis.seconds)
        lines.append([
            hypothesis.name,
            f"`{hypothesis.first}` − `{second}`",
            *(("", "", "", "") if contrast is None else (
                str(len(contrast.gaps)),
                contrast.interval,
                contrast.shown_p if result.verdict in ("positive", "negative", "tie") else "",
                "" if math.isnan(result.detectable) else f"{100 * result.detectable:.1f}",
            )),
            result.verdict,
        ])  # fmt: skip
    heads = ["", "contrast", "seeds", "points (95 %)", "p, adjusted", "detectable, points", "verdict"]
    return table(heads, lines, "llrrrrl")


def arm_table(records: Sequence[Record], device: str, measured: Mapping[str, Any]) -> str:
    """Accuracy of every arm that ran, and what it costs: FLOPs, memory and milliseconds side by side; then the rest."""
    planned = {arm: 0 for arm in ARMS}
    for _, arms, seeds in STAGES:
        for arm in arms:
            planned[arm] += len(seeds)
    lines, missing = [], []
    for arm, count in planned.items():
        runs, lr = list(finished(runs_of(records, device, arm)).values()), rate_of(records, device, arm)
        if not runs:
            failed = len(runs_of(records, device, arm))
            tuned = sum((run["device"], run["arm"]) == (device, arm) for run in records if run["seed"] in TUNING_SEEDS)
            why = [f"{failed} failed"] * bool(failed) + [f"{tuned} tuning run{'s' * (tuned > 1)} done"] * bool(tuned)
            missing.append(f"`{arm}`" + (f" ({', '.join(why)})" if why else ""))
            continue
        cost = measured.get(arm, {})
        tested = [run["test_top1"] for run in runs]
        spread = f" ± {100 * statistics.stdev(tested):.1f}" if len(runs) > 1 else ""
        lines.append([
            f"`{arm}`",
            f"{len(runs)} of {count}",
            "" if lr is None else f"{lr:g}",
            f"{100 * statistics.fmean(tested):.1f}{spread}",
            flops(runs[0]["cost"]["flops_per_image"] + runs[0]["cost"]["router_flops_per_image"]),
            f"{cost['routed_share']:.2f}" if cost else "",
            f"{runs[0]['cost']['total_parameters'] / 1e6:.2f} M",
            f"{cost['ms']:.0f}" if cost else "",
            f"{cost['mib']:.0f}" if cost and math.isfinite(cost["mib"]) else "",
            f"{statistics.fmean(run['cpu_s'] for run in runs):.0f}",
            f"{statistics.fmean(run['peak_mib'] for run in runs):.0f}",
        ])  # fmt: skip
    heads = ["arm", "seeds", "lr", "test top-1, % ± SD", "FLOPs/image", "ρ", "parameters", "ms per step, idle",
             "training, MiB", "CPU s of training, busy", "its process, MiB"]  # fmt: skip
    rest = f"\n\nNo seed finished: {', '.join(missing)}." if missing else ""
    return table(heads, lines) + rest


def shift_table(records: Sequence[Record], device: str) -> list[str]:
    """Accuracy on test images as they are and moved, of the arms that were tested so; nothing without any."""
    names, lines = ("test_top1", "shifted_4", "shifted_8"), []
    for arm in ARMS:
        runs = [run for run in finished(runs_of(records, device, arm)).values() if "shifted_4" in run]
        if runs:
            means = [f"{100 * statistics.fmean(run[name] for run in runs):.1f}" for name in names]
            lines.append([f"`{arm}`", str(len(runs)), *means])
    heads = ["test top-1, %", "seeds", "as they are", "moved by 4 px", "by 8 px"]
    return [table(heads, lines)] if lines else []


def balance_table(records: Sequence[Record], device: str) -> str:
    """Shazeer's Table 6 on images; the worst MoE layer, mean over seeds."""
    lines = []
    for arm in BALANCE:
        runs = list(finished(runs_of(records, device, arm)).values())
        if not runs:
            lines.append([f"`{arm}`", NOT_RUN, *[""] * 4])
            continue
        loads = [max(math.sqrt(layer["cv_squared"]) for layer in run["layers"]) for run in runs]
        ratios = [max(layer["max_over_mean"] for layer in run["layers"]) for run in runs]
        importance = [max(run["cv_importance"]) for run in runs]
        accuracy = statistics.fmean(run["test_top1"] for run in runs)
        means = [f"{statistics.fmean(values):.2f}" for values in (importance, loads, ratios)]
        lines.append([f"`{arm}`", str(len(runs)), *means, f"{100 * accuracy:.1f}"])
    heads = ["balance (`moe`: both)", "seeds", "CV importance", "CV load", "max/mean", "test top-1, %"]
    return table(heads, lines)


def left_out(records: Sequence[Record]) -> list[str]:
    """What failed or can't be trusted, where records come from, and whether they follow one protocol."""
    if not records:
        return []
    notes = [f"- Failed: `{run['arm']}`, lr {run['lr']:g}, seed {run['seed']}: {run['failed']}" for run in records
             if run["failed"]]  # fmt: skip
    notes += [
        f"- Left out, from a changed tree: `{run['arm']}`, seed {run['seed']}." for run in records if is_dirty(run)
    ]
    if len({run["protocol_sha256"] for run in records}) > 1:
        notes.append("- The protocol changed between records: see its amendments.")
    places = sorted({", ".join(run["machine"]["gpus"]) or str(run["machine"]["cpu"]) for run in records})
    tuning = sum(run["seed"] in TUNING_SEEDS for run in records)
    commits = len({run["code"]["git_commit"] for run in records})
    notes.append(
        f"- {len(records)} records, {tuning} of them of tuning, of {commits} commits, from {'; '.join(places)}."
    )
    return ["\n".join(notes)]


def draw(drawn: Mapping[str, Sequence[Result]], out: Path) -> None:
    """A row per hypothesis: a dot per seed, mean and 95 % interval."""
    rows = max(sum(result.contrast is not None for result in results) for results in drawn.values())
    figure = Figure(figsize=(6.4 * len(drawn), 1.2 + 0.4 * rows), dpi=150, layout="constrained")
    for axes, (device, results) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        calm(axes)
        axes.grid(visible=False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        shown = [(result, contrast) for result in results if (contrast := result.contrast) is not None]
        for y, (result, contrast) in enumerate(shown):
            color = SOFT if result.verdict not in ("positive", "negative") else BLUE
            if margin := result.hypothesis.margin:
                axes.plot([-100 * margin] * 2, [y - 0.4, y + 0.4], color=INK, linewidth=1, linestyle=":")
            axes.scatter([100 * gap for gap in contrast.gaps], [y] * len(contrast.gaps), s=14, color=color, alpha=0.5,
                         linewidths=0)  # fmt: skip
            if math.isfinite(contrast.half):
                axes.errorbar(100 * contrast.mean, y, xerr=100 * contrast.half, color=color, fmt="o", capsize=3)
        names = [f"{result.hypothesis.name}  {contrast.first} − {contrast.second}" for result, contrast in shown]
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("points of test top-1", fontsize=9, color=INK)
        margin = any(result.hypothesis.margin for result, _ in shown) * "; dotted: margin"
        title(axes, DEVICES[device], f"dots: seeds; bar: mean, 95 %; blue: decided{margin}")
    save(figure, out)
