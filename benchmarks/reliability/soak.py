"""Do memory and open files stay flat over a long training and over many predictions?

    python -m benchmarks soak --out benchmarks/reliability/soak.json

- training: one `moevision fit` of 4 000 steps on drawn pets (tiny model, batch 16, 100 epochs with validation and
  checkpoints), observed from outside through /proc, from its first checkpoint to its last;
- predictions: 500 calls of `moevision predict` in one process, each of which opens the model's files and one of three
  images anew, a damaged one among them.

Growth is the median resident memory of the last tenth of the samples minus that of the tenth that begins after the
first quarter, so that caches are warm. It counts as flat within `LIMIT_MB`. Linux only.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import about, argument_parser, in_a_process, write_result

LIMIT_MB = 8.0
INTERVAL_S = 0.25
FIT = (
    "--name=soak",
    "--model.arch.name=test_vit_moe",
    "--model.arch.patch_size=8",
    "--data.image_size=32",
    "--data.batch_size=16",
    "--data.val_size=64",
    "--data.test_size=64",
    "--trainer.enable_progress_bar=false",
)
BATCH, STEPS_PER_EPOCH = 16, 40


class Sample(NamedTuple):
    """What a process holds at one moment."""

    time_s: float
    rss_mb: float
    files: int


def sample(pid: int | str = "self") -> Sample:
    """Resident memory and open file descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Sample(
        time.time(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))
    )


def verdict(samples: Sequence[Sample]) -> dict[str, Any]:
    """Growth from the second quarter's start to the end, and whether it is flat."""
    table = np.array(samples)  # [samples, 3]
    tenth = max(1, len(table) // 10)
    early = np.median(table[len(table) // 4 :][:tenth], axis=0)
    late = np.median(table[-tenth:], axis=0)
    _, growth_mb, more_files = (late - early).tolist()
    return {
        "samples": len(samples),
        "rss_mb": round(late[1], 1),
        "rss_max_mb": round(table[:, 1].max(), 1),
        "rss_growth_mb": round(growth_mb, 2),
        "files": int(late[2]),
        "files_growth": more_files,
        "limit_mb": LIMIT_MB,
        "flat": growth_mb <= LIMIT_MB and more_files <= 0,
    }


def train(folder: Path, steps: int) -> dict[str, Any]:
    """Train in a process of its own and watch it."""
    epochs = max(2, steps // STEPS_PER_EPOCH)
    size = f"--data.train_size={BATCH * STEPS_PER_EPOCH}"
    options = [*FIT, size, f"--trainer.max_epochs={epochs}"]
    fit = [sys.executable, "-m", "moevision", "fit", "synthetic_pets"]
    command = [*fit, *options, f"--runs_root={folder}"]
    samples: list[Sample] = []
    with (
        (folder / "fit.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None:
            try:
                samples.append(sample(process.pid))
            except (FileNotFoundError, IndexError):  # it has just ended
                break
            time.sleep(INTERVAL_S)
        if process.wait() != 0:
            raise RuntimeError((folder / "fit.log").read_text()[-2000:])
    run = folder / "soak"
    first, last = (
        (run / name).stat().st_mtime for name in ("config.yaml", "checkpoints/last.ckpt")
    )
    seen = [one for one in samples if first <= one.time_s <= last]
    return {"steps": epochs * STEPS_PER_EPOCH, "seconds": round(last - first, 1), **verdict(seen)}


def predict(folder: Path, calls: int) -> dict[str, Any]:
    """Predict in a process of its own."""
    samples = in_a_process(predict_here, folder / "soak", calls)
    seconds = round(samples[-1].time_s - samples[0].time_s, 1)
    return {"calls": calls, "seconds": seconds, **verdict(samples)}


def predict_here(run: Path, calls: int) -> list[Sample]:
    """Call the command line so many times in this process."""
    from PIL import Image

    from moevision.cli import main
    from moevision.data import SyntheticPets

    pets = SyntheticPets(8, 64, split="test")
    pictures = [run / f"{number}.png" for number in range(3)]
    for number, picture in enumerate(pictures):
        Image.fromarray(pets.image(number)).save(picture)
    whole = pictures[2].read_bytes()
    pictures[2].write_bytes(whole[: len(whole) // 2])
    samples = []
    for call in range(calls):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            if main(["predict", str(run), str(pictures[call % 3])]) != 0:
                raise RuntimeError(f"call {call} failed")
        samples.append(sample())
    return samples


def main() -> None:
    """Run both and write the result."""
    parser = argument_parser("soak", __doc__)
    add = parser.add_argument
    add("--out", type=Path, help="JSON file for the result")
    add("--steps", type=int, default=4000)
    add("--predictions", type=int, default=500)
    options = parser.parse_args()
    origin = about()
    with tempfile.TemporaryDirectory() as home:
        training = train(Path(home), options.steps)
        predictions = predict(Path(home), options.predictions)
    write_result(options.out, {**origin, "training": training, "predictions": predictions})
