"""What loggers besides metrics.csv are told about the routers: a few numbers, whatever the depth of the model.

A tracker draws a chart for every key, and a model of L layers has 5 L of them: per layer they come on request only, and
at most `MAX_KEYS` of them (asked for in NeMo-Automodel#1232). metrics.csv has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any, Final, cast

from lightning.pytorch.loggers import Logger

MAX_KEYS: Final = 100
"""Numbers of single layers that a logger gets at once."""
# Over all layers: the slowest expert, how decided a token is on average, experts without work.
_BRIEF: Final[dict[str, Callable[[Iterable[float]], float]]] = {
    "load_max": max,
    "max_violation": max,
    "entropy": fmean,
    "dead": sum,
}


def log_routers(logger: Logger, *, per_layer: bool) -> Logger:
    """Let this logger get router health in brief, or per layer too; the same logger."""
    whole = logger.log_metrics

    def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
        whole(metrics=condensed(metrics, per_layer=per_layer), step=step)

    cast(Any, logger).log_metrics = log_metrics
    return logger


def condensed(metrics: Mapping[str, float], *, per_layer: bool) -> dict[str, float]:
    """`moe/<layer>/<what>` as `moe/<what>` over all layers; per layer also as they are, of evenly chosen layers."""
    layers: dict[str, dict[str, float]] = {}  # layer -> what -> value
    kept: dict[str, float] = {}
    for name, value in metrics.items():
        kind, _, rest = name.partition("/")
        layer, _, what = rest.partition("/")
        if kind == "moe" and what:
            layers.setdefault(layer, {})[what] = float(value)
        else:
            kept[name] = value
    for what, over in _BRIEF.items():
        values = [found[what] for found in layers.values() if what in found]
        if values:
            kept[f"moe/{what}"] = float(over(values))
    if per_layer:
        most = max(1, MAX_KEYS // max(map(len, layers.values()), default=1))
        for place, (layer, found) in enumerate(layers.items()):
            if place * most // len(layers) != (place - 1) * most // len(layers):  # `most` of them, evenly spread
                kept |= {f"moe/{layer}/{what}": value for what, value in found.items()}
    return kept
