"""What several pages' claims share: texts that a report writes as a whole, GPUs, and the shares of routed FLOPs."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from benchmarks.flops import routed_share
from benchmarks.records import parts_of
from benchmarks.subject import find_subject


def shown(texts: Iterable[str]) -> list[dict[str, str]]:
    """What fills `Claim(record, "{text}", ...)`."""
    return [{"text": text} for text in texts]


def on_gpus(*records: Any) -> bool:
    """Whether one of these was measured on a machine with a GPU."""
    return any(part.get("gpus") for record in records for part in parts_of(record))


@cache
def shares() -> dict[str, float]:
    """Share of the FLOPs of each shipped recipe that is in routed experts, and the extremes; counted, no record."""
    own = {}
    for name in ("cifar10", "imagenette", "cats_vs_dogs", "quickstart"):
        subject = find_subject(name)
        own[name] = routed_share(subject.build().eval(), subject.image_size)
    return {**own, "least_percent": 100 * min(own.values()), "most": max(own.values())}
