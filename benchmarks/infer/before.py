"""Few images through a model with each router, beside its dense twin, in this checkout and in an earlier one.

    git worktree add --detach ../before COMMIT
    python -m benchmarks infer-before --before ../before --out benchmarks/infer/before.jsonl

Two processes, one with each checkout's package, hold the same models: that of `configs/cifar10.yaml` untrained with
each router, and the bundled one of CIFAR-10, whose loads are as uneven as training made them. They take turns: in every
round each times some pairs of MoE and twin. Ratios are of a pair, or of the CPU seconds of a round. Rounds in which
other programs left too few cores are done again, a few times at most; what they took in the best one is in the row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import about, argument_parser
from benchmarks.subject import find_subject, inference
from benchmarks.timing import rounded, spread
from moevision.layers import moe_layers
from moevision.limits import usable_cores
from moevision.models.convert import dense_twin
from moevision.models.io import load_model

MODELS: Mapping[str, Mapping[str, Any]] = {
    "trained": {},
    "vmoe_top_k": {},
    "noisy_top_k": {"router": "noisy_top_k"},
    "switch": {"router": "switch"},
    "sigmoid": {"router": "sigmoid"},
    "cosine": {"router": "cosine"},
    "expert_choice": {"router": "expert_choice"},
    "soft": {"router": "soft"},
    "hash": {"router": "hash"},
    "position": {"router": "position"},
    "vmoe_top_k by image": {"route_by": "image"},
    "switch by image": {"router": "switch", "route_by": "image"},
}
BUNDLED = "moevision/demo/models/cifar10/trained"
BATCHES = (1, 2, 4, 8, 64)
SIZE = 32
CASE = ("model", "batch", "precision", "threads")
QUIET, ATTEMPTS = 0.05, 4


# ---- in the process of a checkout


def models_of(name: str) -> tuple[nn.Module, nn.Module]:
    """A MoE model and its twin of equal active FLOPs, in eval mode."""
    if name == "trained":
        net = load_model(BUNDLED).net
    else:
        subject = find_subject("cifar10")
        torch.manual_seed(0)
        net = type(subject)(subject.name, {**subject.arch, **MODELS[name]}).build()
        for layer in moe_layers(net):
            if (
                name == "noisy_top_k"
            ):  # it starts with zeros, which send all tokens to the same experts
                nn.init.normal_(layer.router.weight, std=layer.router.dim**-0.5)
    return net.eval(), dense_twin(net, "active_flops").eval()


def images_of(batch: int) -> Tensor:
    """[B, 3, 32, 32]: smooth noise of unit variance, so that neighbouring patches resemble one another."""
    coarse = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, size=SIZE, mode="bicubic")
    fine = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return smooth + 0.3 * fine


def serve() -> None:
    """Answer requests, a line of JSON each: seconds of MoE and twin in turn, or the MoE's logits in a file."""
    torch.set_float32_matmul_precision("high")
    models: dict[str, tuple[nn.Module, nn.Module]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        name = asked["model"]
        if name not in models:
            models[name] = models_of(name)
        moe, twin = (
            inference(net, images_of(asked["batch"]), asked["precision"]) for net in models[name]
        )
        if "save" in asked:
            torch.save(moe().float(), asked["save"])
            print("{}", flush=True)
            continue
        for _ in range(asked["warm_up"]):
            moe()
            twin()
        times: dict[str, list[float]] = {"moe": [], "twin": [], "moe_cpu": [], "twin_cpu": []}
        for _ in range(asked["calls"]):
            for which, run in (("moe", moe), ("twin", twin)):
                cpu, wall = time.process_time(), time.perf_counter()
                run()
                times[which].append(time.perf_counter() - wall)
                times[f"{which}_cpu"].append(time.process_time() - cpu)
        print(json.dumps(times), flush=True)


# ---- the parent


class Checkout:
    """A process with the package of a checkout."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
        code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='serve')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env=environment,
        )

    def ask(self, **request: Any) -> dict[str, list[float]]:
        """The answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer: dict[str, list[float]] = json.loads(self.process.stdout.readline())
        return answer

    def seconds(self) -> float:
        """CPU seconds that it has taken."""
        fields = (
            Path(f"/proc/{self.process.pid}/stat")
            .read_text(encoding="utf-8")
            .rsplit(")", 1)[1]
            .split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """CPU seconds that all programs have taken since the machine started, and what others took from it."""
    fields = [
        int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:]
    ]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def quiet_answer(checkout: Checkout, request: Mapping[str, Any], attempts: int) -> dict[str, Any]:
    """An answer during which others left enough cores; the quietest of so many attempts."""
    best: dict[str, Any] = {"others": float("inf")}
    allowed = usable_cores() - request["threads"] + QUIET
    for _ in range(attempts):
        wall, busy, own = time.perf_counter(), busy_seconds(), checkout.seconds()
        answer: dict[str, Any] = dict(checkout.ask(**request))
        others = (busy_seconds() - busy) - (checkout.seconds() - own)
        answer["others"] = max(0.0, others / (time.perf_counter() - wall))
        if answer["others"] < best["others"]:
            best = answer
        if best["others"] <= allowed:
            break
    return best


def compare(
    before: Path,
    names: Sequence[str],
    batches: Sequence[int],
    precisions: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    attempts: int = ATTEMPTS,
    out: Path | None = None,
) -> None:
    """One line for each model, batch size, precision and number of threads that the file doesn't have."""
    done = (
        [json.loads(line) for line in out.read_text().splitlines()]
        if out is not None and out.exists()
        else []
    )
    known = {tuple(row[name] for name in CASE) for row in done}
    checkouts = {"before": Checkout(before), "after": Checkout(Path(__file__).parents[2])}
    cases = [(n, b, p, t) for t in threads for p in precisions for b in batches for n in names]
    where = about()
    for name, batch, precision, thread in (case for case in cases if case not in known):
        calls = max(3, min(20, 160 // batch))
        request = {
            "model": name,
            "batch": batch,
            "precision": precision,
            "threads": thread,
            "calls": calls,
        }
        found: dict[str, list[dict[str, Any]]] = {which: [] for which in checkouts}
        for number in range(rounds):
            for which in ("before", "after") if number % 2 else ("after", "before"):
                warm_up = 12 if number == 0 else 2
                found[which].append(
                    quiet_answer(checkouts[which], {**request, "warm_up": warm_up}, attempts)
                )
        row: dict[str, Any] = {
            "model": name,
            "batch": batch,
            "precision": precision,
            "threads": thread,
        }
        # The twin is the same code in both: its mean of a round is what both are divided by.
        twins = [
            (sum(a["twin_cpu"]) + sum(b["twin_cpu"])) / 2
            for a, b in zip(*found.values(), strict=True)
        ]
        for which, answers in found.items():
            pairs = [
                pair
                for answer in answers
                for pair in zip(answer["moe"], answer["twin"], strict=True)
            ]
            row[which] = {
                "moe_ms": spread([moe for moe, _ in pairs], 1e3),
                "twin_ms": spread([twin for _, twin in pairs], 1e3),
                "ratio": spread([moe / twin for moe, twin in pairs]),
                "cpu_ratio": spread(
                    [sum(a["moe_cpu"]) / twin for a, twin in zip(answers, twins, strict=True)]
                ),
                "others": rounded(max(answer["others"] for answer in answers), 2),
            }
        medians = [
            [sorted(answer["moe"])[len(answer["moe"]) // 2] for answer in found[which]]
            for which in ("after", "before")
        ]
        row["after_over_before"] = spread([a / b for a, b in zip(*medians, strict=True)])
        row["code"], row["cpu"], row["torch"] = (
            where["code"],
            where["machine"]["cpu"],
            where["versions"]["torch"],
        )
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        show(row)


def show(row: Mapping[str, Any]) -> None:
    """A line of the table."""
    text = "  ".join(
        f"{row[which]['ratio']['median']:.2f} ({row[which]['ratio']['quartile_1']:.2f}–"
        f"{row[which]['ratio']['quartile_3']:.2f}) {row[which]['moe_ms']['median']:6.2f}/"
        f"{row[which]['twin_ms']['median']:.2f} ms cpu {row[which]['cpu_ratio']['median']:.2f} o{row[which]['others']}"
        for which in ("before", "after")
    )
    print(
        f"{row['threads']}t {row['precision']} b{row['batch']:<3d} {row['model']:20s} {text}  "
        f"{row['after_over_before']['median']:.3f}",
        flush=True,
    )


def main() -> None:
    """Compare two checkouts."""
    parser = argument_parser("infer-before", __doc__)
    parser.add_argument(
        "--before", type=Path, required=True, metavar="DIR", help="the earlier checkout"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch-size", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16")
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--attempts", type=int, default=ATTEMPTS)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="lines are added; what it has is not measured again",
    )
    options = parser.parse_args()
    compare(
        options.before,
        options.models,
        options.batch_size,
        options.precision,
        options.threads,
        options.rounds,
        options.attempts,
        options.out,
    )


if __name__ == "serve":  # by `Checkout`, in a process with that checkout's package
    serve()
