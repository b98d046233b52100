"""README.md's tables, from the records alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.markdown import table
from benchmarks.queue import is_dirty
from benchmarks.specialization.arms import CLASS, DATA_SETS, Record
from benchmarks.specialization.rule import (
    CHOOSING,
    CONDITIONS,
    Layer,
    Setting,
    chosen,
    confirmation,
    decided,
    failures,
    guess,
    max_over_mean,
    settings_of,
)
from moevision.analysis.readings import listed
from moevision.words import percent, signed

OUTCOMES = {
    "open": "Not decided: not all runs on photos are done.",
    "none": "No setting keeps the rule: none of {count} separates cats from dogs evenly, by training and with effect.",
    "chosen": "Chosen on validation photos, not confirmed yet: {name}.",
    "confirmed": "{name}: chosen on validation photos, confirmed by new trainings on photos that no choice has seen.",
    "refuted": "{name}: chosen on validation photos, and not confirmed by new trainings on other photos ({failed}).",
}
"""The sentences of protocol.md."""
HEADS = [
    "arm, layer", "seeds", "max/mean", "experts in effect", "1: guess, %", "bits", "of the probe, %", "answer",
    "2: bits before", "of clusters", "answer", "3: swap, points", "random", "answer", "κ of seeds", "top-1, %",
]  # fmt: skip


def parts_of(records: Sequence[Record]) -> list[str]:
    """The one setting on photos; for each data set and question a table; then what was left out."""
    if not records:
        return ["Not run."]
    parts = ["### One setting on real photos", *wanted(records)]
    for name, spec in DATA_SETS.items():
        for unit in spec.units:
            settings = settings_of(records, name, unit)
            if settings:
                parts += [f"### {name}: {unit}", about(settings), setting_table(settings)]
            else:
                parts += [f"### {name}: {unit}", "Not run."]
    return [*parts, left_out(records)]


def wanted(records: Sequence[Record]) -> list[str]:
    """What the rule says: a sentence, and the numbers behind it."""
    if not decided(records):
        return [OUTCOMES["open"]]
    settings, setting = settings_of(records, CHOOSING, CLASS), chosen(records)
    if setting is None:
        return [OUTCOMES["none"].format(count=len(settings)), condition_table(settings)]
    again = confirmation(records, setting)
    if again is None:
        return [OUTCOMES["chosen"].format(name=setting.name), share_table(setting)]
    failed = failures(again)
    outcome = OUTCOMES["refuted" if failed else "confirmed"].format(name=setting.name, failed=listed(failed))
    return [outcome, setting_table([again]), share_table(again), condition_table(settings)]


def about(settings: Sequence[Setting]) -> str:
    """What is the same for a whole table."""
    setting = settings[0]
    run, reading = setting.runs[0], setting.layers[0]["readings"][0]
    before = [100 * run["top1_before"] for run in setting.runs]
    return (
        f"{run['images']:,} images of `{run['split']}`, {run['experts']} experts; chance {percent(reading['chance'])}; "
        f"trunks {_span(before, 1)} % right. Means over seeds; answers are the weakest of any seed."
    )


def setting_table(settings: Sequence[Setting]) -> str:
    """The three answers with their numbers."""
    lines = []
    for setting in settings:
        bits = _mean(setting, lambda layer: layer["readings"][0]["bits"]["value"])
        lines.append([
            f"`{setting.arm}`, {setting.layer}",
            str(len(setting.runs)),
            f"{_mean(setting, max_over_mean):.2f}",
            f"{_mean(setting, lambda layer: layer['load']['effective_experts']):.1f}",
            f"{100 * _mean(setting, guess):.1f}",
            signed(bits),
            f"{100 * _mean(setting, _share_of_probe):.0f}",
            setting.answer(0),
            signed(_mean(setting, lambda layer: _control(layer, "before"))),
            signed(_mean(setting, lambda layer: _control(layer, "clusters"))),
            setting.answer(1),
            *_swap(setting),
            setting.answer(2),
            "" if setting.kappa is None else f"{setting.kappa:.2f}".replace("-", "−"),
            f"{100 * statistics.fmean(run['top1'] for run in setting.runs):.1f}",
        ])  # fmt: skip
    return table(HEADS, lines, "lrrrrrrlrrlrrlrr")


def share_table(setting: Setting) -> str:
    """Class x expert of every seed, with the load, in per cent of a class's choices."""
    experts = range(len(setting.layers[0]["load"]["share"]))
    lines = []
    for run, layer in zip(setting.runs, setting.layers, strict=True):
        load, names = layer["load"], run["classes"][setting.unit]
        rows = {**dict(zip(names, load["class_share"], strict=True)), "load": load["share"]}
        for name, shares in rows.items():
            lines.append([f"{run['seed']}: {name}", *(f"{100 * share:.0f}" for share in shares)])
    return table(["seed", *(f"expert {expert}, %" for expert in experts)], lines)


def condition_table(settings: Sequence[Setting]) -> str:
    """How many settings keep each condition of the rule in every seed, and the settings that miss one alone."""
    missed = {setting.name: failures(setting) for setting in settings}
    lines = []
    for name in CONDITIONS:
        kept = sum(name not in failed for failed in missed.values())
        alone = [f"`{setting}`" for setting, failed in missed.items() if failed == [name]]
        lines.append([name, f"{kept} of {len(settings)}", listed(alone)])
    return table(["condition, in every seed", "settings that keep it", "miss this one alone"], lines, "lrl")


def left_out(records: Sequence[Record]) -> str:
    """Where records come from, what can't be trusted, and whether they follow one protocol."""
    notes = [f"- Left out, from a changed tree: `{run['arm']}` on {run['data']}, seed {run['seed']}."
             for run in records if is_dirty(run)]  # fmt: skip
    if len({run["protocol_sha256"] for run in records}) > 1:
        notes.append("- The protocol changed between records: see its amendments.")
    trunks = {run["trunk"]["sha256"] for run in records if run["data"] == CHOOSING}
    if len(trunks) > 1:
        notes.append("- Runs on photos start from different trunks: they don't belong together.")
    planned = sum(len(spec.arms) for spec in DATA_SETS.values())
    done = len({(run["data"], run["arm"]) for run in records})
    places = sorted({str(run["machine"]["cpu"]) for run in records})
    hours = sum(sum(run["cpu_s"].values()) for run in records) / 3600
    notes.append(f"- {len(records)} records of {done} of {planned} arms, {hours:.1f} CPU hours, from {listed(places)}.")
    return "\n".join(notes)


def _mean(setting: Setting, value: Callable[[Layer], float]) -> float:
    return statistics.fmean(setting.each(value))


def _share_of_probe(layer: Layer) -> float:
    """Bits over those of a linear probe in as many balanced groups."""
    probe = layer["probe"]["bits"]["value"]
    return float(layer["readings"][0]["bits"]["value"] / probe) if probe > 0 else 0.0


def _control(layer: Layer, name: str) -> float:
    """Bits of the best seed of a control."""
    return max(float(each["bits"]["value"]) for each in layer["controls"][name] if each["unit"] == "patch")


def _swap(setting: Setting) -> tuple[str, str]:
    swaps = [layer["swap"] for layer in setting.layers if layer["swap"] is not None]
    if not swaps:
        return "", ""
    random = [swap["random"]["value"] for swap in swaps if swap.get("random") is not None]  # of the committed runs
    points = statistics.fmean(swap["points"]["value"] for swap in swaps)
    return signed(points, 1), signed(statistics.fmean(random), 1) if random else ""


def _span(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"
