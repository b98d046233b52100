"""What the stability guard found and did: where a number that isn't finite came from, counters, guard.csv, advice.

Axes: E experts.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from moevision.files import write_text_atomic
from moevision.names import csv_name
from moevision.train.processes import gather, tell

GUARD_CSV = "guard.csv"
_COLUMNS = ("step", "epoch", "kind", "source", "samples")
_MAX_EVENTS = 1000  # kept one by one; all are counted
_MAX_SAMPLES = 256
_MAX_NAMED = 3
_MAX_SAID = 10  # on the terminal
_SAID = {
    "skip": "warning: step {step}: update left out, since a number is not finite (first seen in: {source})",
    "rollback": "warning: step {step}: back to an earlier state of this training, because of: {source}",
    "validation": "warning: step {step}: the {source} is not finite; the weights are, so training goes on",
}
# What to look at, by the first word of a source.
_ADVICE = {
    "cross-entropy": "Look at the images that guard.csv names; lower --model.optim.lr or lengthen the warm-up.",
    "router": "Give --model.aux.z a small weight (0.001): it keeps router logits small.",
    "gradient": "Lower --model.optim.lr, or clip more (--trainer.gradient_clip_val 0.5).",
    "weight": "Weights turned bad without a bad update: suspect the memory or the accelerator if it happens again.",
    "buffer": "A saved statistic turned bad by itself: suspect the memory or the accelerator if it happens again.",
    "loss": "Lower --model.optim.lr, lengthen the warm-up (--model.optim.warmup_fraction) or train in 32-true.",
    "ema.weight": "Only the moving average was bad: suspect the memory or the accelerator if it happens again.",
}


@dataclass(frozen=True)
class Event:
    """One thing that the guard did at a step, counted from 1: `kind` is skip, rollback, or validation (only noted)."""

    step: int
    epoch: int
    kind: str
    source: str
    samples: tuple[str, ...] = ()


@dataclass
class GuardRecord:
    """Counters and events of one training; they survive a resume and are never turned back by a rollback."""

    skipped: int = 0
    rollbacks: int = 0
    overflows: int = 0
    """Updates that fp16 loss scaling left out while it looked for its scale: no fault."""
    validations: int = 0
    """Validations whose loss was not finite: noted, nothing is done about them."""
    not_applied: int = 0
    """Optimizer steps without an update, for whichever reason."""
    lost: int = 0
    """Updates that rollbacks took back."""
    events: list[Event] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)

    def add(self, event: Event) -> None:
        """Count it and keep it."""
        name = {"skip": "skipped", "rollback": "rollbacks", "validation": "validations"}[event.kind]
        setattr(self, name, getattr(self, name) + 1)
        self.sources[event.source] += 1
        if len(self.events) < _MAX_EVENTS:
            self.events.append(event)

    def sentences(self) -> list[str]:
        """What summary.md says about it; nothing if nothing happened."""
        found = []
        if self.skipped:
            found.append(f"{_times(self.skipped, 'update')} left out because a number was not finite.")
        if self.rollbacks:
            found.append(
                f"{_times(self.rollbacks, 'return')} to an earlier state of this training, which took back "
                f"{self.lost:,} updates."
            )
        if self.validations:
            found.append(f"{_times(self.validations, 'validation')} had a loss that is not finite.")
        if found:
            often = ", ".join(f"{source} ({count})" for source, count in self.sources.most_common(_MAX_NAMED))
            found.append(f"Where it came from: {often}. {GUARD_CSV} has every case with its images.")
        return found

    def write(self, folder: Path) -> None:
        """Write guard.csv whole; a resumed run writes it again from what the checkpoint remembers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for event in self.events:
            writer.writerow([event.step, event.epoch, event.kind, event.source, csv_name(" ".join(event.samples))])
        write_text_atomic(folder / GUARD_CSV, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """Primitives only, so that a checkpoint loads under `weights_only=True`."""
        state = asdict(self)
        return {**state, "events": [list(event.values()) for event in state["events"]], "sources": dict(self.sources)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GuardRecord:
        """What `state_dict` gave."""
        events = [Event(step, epoch, kind, source, tuple(ids)) for step, epoch, kind, source, ids in state["events"]]
        return cls(**{**state, "events": events, "sources": Counter(state["sources"])})

    def diagnosis(self, step: int, checkpoint: str) -> str:
        """The page that is written when a training is given up."""
        words = {source.split()[0] for source, _ in self.sources.most_common(_MAX_NAMED)}
        advice = [text for word, text in _ADVICE.items() if word in words]
        cases = [f"- {event.kind} at step {event.step}: {event.source}" for event in self.events[-20:]]
        return "\n".join(
            [
                "# This training diverged\n",
                f"It was given up at step {step:,}, after {self.rollbacks:,} returns to an earlier state. The last "
                f"good state is {checkpoint}; its weights are finite.\n",
                *(f"- {sentence}" for sentence in self.sentences()),
                "\n## What to try\n",
                *(f"- {text}" for text in advice),
                "\n## The last cases\n",
                *cases,
                "",
            ]
        )


def note(record: GuardRecord, trainer: L.Trainer, kind: str, source: str | None, pictures: Sequence[int]) -> None:
    """Count an event on every process, with the pictures of all of them; write guard.csv and say so.

    Args:
        record: what is counted in.
        trainer: the trainer, at the step of the event.
        kind: of the `Event`.
        source: where it came from, as far as this process knows.
        pictures: indices of this process's training pictures in the window.
    """
    data = cast(Any, trainer).datamodule
    own = [data.sample_id("train", index) if hasattr(data, "sample_id") else str(index) for index in pictures]
    found = gather((source, own))
    # The process with the fault itself knows the loss that was bad; the others see at most its gradients.
    sources = sorted(filter(None, (source for source, _ in found)), key=lambda name: name.startswith("gradient"))
    source = sources[0] if sources else "gradient norm (too large for its number format)"
    step = trainer.global_step + (kind == "skip")  # from 1; Lightning hasn't counted a refused step yet
    names = tuple(name for _, names in found for name in names)
    record.add(Event(step, trainer.current_epoch, kind, source, names[:_MAX_SAMPLES]))
    if trainer.is_global_zero:
        record.write(Path(trainer.default_root_dir))
        if sum(record.sources.values()) <= _MAX_SAID:
            tell(_SAID[kind].format(step=step, source=source))


def source_of(evidence: Sequence[Mapping[str, Tensor]], gradients: Iterable[tuple[str, Tensor]]) -> str | None:
    """Where a number that is not finite first appeared: router, balance loss, cross-entropy, loss, or a gradient.

    None if not on this process, or if only the norm of all gradients was too large for its number format.
    """
    for micro_batch in evidence:  # each in the order of computation
        for name, values in micro_batch.items():
            if not bool(values.isfinite().all()):
                return name
    bad = [(name, gradient) for name, gradient in gradients if not bool(gradient.isfinite().all())]
    return name_tensors("gradient", bad) if bad else None


def nonfinite_states(named: Mapping[str, Tensor], buffers: frozenset[str]) -> str | None:
    """The weights or buffers among these that are not finite, in words; None if all are well."""
    bad = [(name, tensor) for name, tensor in named.items() if not bool(tensor.isfinite().all())]
    if not bad:
        return None
    first = bad[0][0]
    average = "ema." if first.startswith("ema.") else ""
    return name_tensors(average + ("buffer" if first.removeprefix("ema.") in buffers else "weight"), bad)


def name_tensors(kind: str, bad: Sequence[tuple[str, Tensor]]) -> str:
    """For example `gradient of blocks.1.mlp.experts.fc1.weight (expert 3) and 2 more`."""
    name, tensor = bad[0]
    experts = ""
    if ".experts." in name:
        found = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        experts = f" (expert{'s' if len(found) > 1 else ''} {', '.join(map(str, found))})"
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{kind} of {name.removeprefix('net.').removeprefix('ema.')}{experts}{more}"


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of these tensors are finite, in one pass and with one synchronisation."""
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(list(tensors))))


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"
