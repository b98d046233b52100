"""Many visitors of the explorer at once, each answer compared with the truth that was computed beforehand.

    python -m benchmarks demo-load --out benchmarks/demo/load.json

Starts `moevision demo` in a process of its own on loopback. Every visitor asks without a pause, waiting only for the
answer: an image (upload or example) in some variant, with some k, capacity and ablation, or what such an ablation
changes. The visitors run on the same cores as the server, so the latencies are those of a busy
computer; the load average before the start is in the result.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks.demo import running_demo
from benchmarks.harness import about, argument_parser, write_result
from moevision.data import SyntheticPets
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from moevision.demo.wire import data_uri

WHAT_IF_SHARE = 0.1


@dataclass(frozen=True)
class Task:
    """One question with its right answer, and the group that its latency is counted in."""

    group: str
    name: str
    request: dict[str, Any]
    truth: Any


@dataclass
class Outcome:
    """What the visitors met: latencies in ms by group, and how many answers were busy, failed or not the truth."""

    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: Counter[str] = field(default_factory=Counter)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Counts and quantiles."""
        groups = {}
        for group, values in sorted(self.latencies.items()):
            quantiles = np.percentile(values, (50, 95, 100)).round(1).tolist()
            times = dict(zip(("p50_ms", "p95_ms", "max_ms"), quantiles, strict=True))
            groups[group] = {"answers": len(values), **times}
        count = sum(map(len, self.latencies.values()))
        wrong = {kind: self.wrong[kind] for kind in ("mixed_up", "busy", "error")}
        rate = round(count / seconds, 1)
        return {"answers": count, "answers_per_s": rate, **wrong, "latency": groups}


def make_tasks(explorer: Explorer, count: int, seed: int = 0) -> list[Task]:
    """Questions about the first model, no two alike, answered by `explorer` in this process."""
    rng = random.Random(seed)
    entry = next(iter(explorer.entries.values()))
    facts = entry.facts
    pets = SyntheticPets(10 * count, facts.image_size, seed=1, split="test")
    tasks = []
    for index in range(count):
        upload = {"kind": "upload", "data": data_uri(pets.image(index))}
        example = {"kind": "example", "id": rng.choice(entry.examples.on_first_screen()).id}
        change = {
            "kind": "ablate",
            "layer": rng.choice(facts.layers),
            "expert": rng.randrange(facts.num_experts),
        }
        what_if = rng.random() < WHAT_IF_SHARE
        picture = rng.choice([upload, upload, example])
        request = {
            "model": facts.id,
            "variant": rng.choice(list(entry.variants)),
            "picture": picture,
            "top_k": rng.choice([None, None, 1, facts.num_experts]),
            "capacity": rng.choice([None, None, None, 1.0]),
            "intervention": change if what_if or rng.random() < 0.4 else None,
        }
        name = "what_if" if what_if else "route"
        truth = comparable(explorer.answer(name, request))
        group = "what_if" if what_if else "new picture" if picture is upload else "example"
        tasks.append(Task(group, name, request, truth))
    return tasks


def comparable(answer: dict[str, Any]) -> Any:
    """An answer as JSON gives it back, without the sentence, in which rounding may show as another last digit."""
    return json.loads(json.dumps({**answer, "sentence": None}))


def alike(one: Any, other: Any) -> bool:
    """Whether two answers differ by rounding only: a probability is told to four digits, and threads sum otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() == other.keys() == {"unit", "shape", "data"}:
            tolerance = 2e-4 + 2 * max(one["unit"], other["unit"])  # a unit or two
            arrays = [_unpacked(packed) for packed in (one, other)]
            return one["shape"] == other["shape"] and np.allclose(*arrays, 1e-3, tolerance)
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=2e-4)
    return bool(one == other)


def _unpacked(packed: dict[str, Any]) -> Any:
    """An array of `moevision.demo.wire.encode_float32`."""
    return packed["unit"] * np.frombuffer(base64.b64decode(packed["data"]), "<i2")


async def visit(url: str, tasks: list[Task], end: float, outcome: Outcome, seed: int) -> None:
    """One visitor, who asks until the time is over."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < end:
            task = rng.choice(tasks)
            start = time.perf_counter()
            answer = await http.post(f"api/{task.name}", json=task.request)
            outcome.latencies[task.group].append(1e3 * (time.perf_counter() - start))
            is_answered = answer.status_code == 200
            found = answer.json() if is_answered else {"error": answer.text}
            if "error" in found:
                outcome.wrong["busy" if found.get("code") == "busy" else "error"] += 1
            elif not alike(comparable(found), task.truth):
                outcome.wrong["mixed_up"] += 1


def load(url: str, tasks: list[Task], visitors: int, seconds: float) -> Outcome:
    """Let some visitors ask at once for some time."""
    outcome = Outcome()

    async def everyone() -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(visit(url, tasks, end, outcome, seed) for seed in range(visitors)))

    asyncio.run(everyone())
    return outcome


def rss_mb(pid: int) -> float:
    """Memory of a process that is in use, in MB (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1)


def ask(url: str, name: str, request: dict[str, Any]) -> Any:
    """One question."""
    return httpx.post(f"{url}api/{name}", json=request, timeout=60).json()


def wait_until_ready(url: str) -> None:
    """Until the explorer has looked through its images."""
    model = ask(url, "boot", {})["models"][0]
    for variant in model["variants"]:
        page = {"model": model["id"], "variant": variant}
        while ask(url, "classes", page).get("status") == "computing":
            time.sleep(1)


def main() -> None:
    """Measure and print."""
    parser = argument_parser("demo-load", __doc__)
    add = parser.add_argument
    add("model", nargs="?", help="a run folder (the bundled models)")
    add("--visitors", type=int, default=32)
    add("--seconds", type=float, default=60)
    add("--tasks", type=int, default=200, help="different questions")
    add("--out", type=Path)
    options = parser.parse_args()
    origin = about()
    torch.set_num_threads(1)
    tasks = make_tasks(Explorer(open_entries(options.model)), options.tasks)
    with running_demo(*([options.model] if options.model else [])) as (pid, url):
        wait_until_ready(url)
        # Caches are full then and every thread has run.
        load(url, tasks, options.visitors, options.seconds / 6)
        before = rss_mb(pid)
        outcome = load(url, tasks, options.visitors, options.seconds)
        after = rss_mb(pid)
    settings = {"visitors": options.visitors, "seconds": options.seconds}
    settings["different_questions"] = len(tasks)
    memory = {"server_rss": {"start_mb": before, "end_mb": after}}
    summary = outcome.summary(options.seconds)
    write_result(options.out, {**origin, **settings, **summary, **memory})
