"""`gpu.sh` in a dry run: every step leaves a record, is done once, and is tried again where it failed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import torch

SCRIPT = Path(__file__).with_name("gpu.sh")


def gpu(out, *arguments, **environment):
    """Exit code, printed text and the lines of steps.tsv by now: step, state, seconds, result, record."""
    known = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(out),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        ["bash", SCRIPT, *arguments], env=known, capture_output=True, text=True, timeout=600
    )
    file = out / "steps.tsv"
    return done, [
        line.split("\t")[2:] for line in file.read_text().splitlines()
    ] if file.is_file() else []


def python(path, line):
    """An interpreter in the place of this one."""
    path.write_text(f'#!/bin/sh\n{line} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_every_step_leaves_a_record_and_is_done_once(tmp_path):
    """At first with an interpreter that fails pytest, and without images; those two steps are left; then nothing is."""
    out = tmp_path / "gpu"
    broken = python(
        tmp_path / "python", f'case "$*" in *"-m pytest"*) exit 3 ;; esac; exec {sys.executable}'
    )
    done, lines = gpu(out, "--dry-run", PYTHON=broken, IMAGENETTE=str(tmp_path / "nowhere"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line[:2] for line in lines] == [
        ["tests", "failed"],
        ["layer", "ok"],
        ["train", "ok"],
        ["epoch", "skipped"],
    ]
    assert "nowhere') must name a folder of images" in lines[-1][3]

    # Of the tests those of networks: the tier that they belong to runs all of them.
    done, lines = gpu(out, "--dry-run", PYTEST_ADDOPTS="-k test_a_network_computes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:2] for line in lines[4:]] == [["tests", "ok"], ["epoch", "ok"]]
    suite = ElementTree.parse(out / "tests.xml").getroot()[0]
    assert (suite.get("name"), suite.get("failures"), suite.get("errors")) == ("dry-run", "0", "0")
    assert int(suite.get("tests", 0)) > 10
    records = [
        json.loads((out / name).read_text())
        for name in ("benchmark-layer.json", "benchmark-train.json")
    ]
    assert all(record["dry_run"] and record["machine"]["device"] == "cpu" for record in records)
    assert [row["name"] for row in records[0]["comparisons"][0]["rows"]][:2] == [
        "dense k·H",
        "moevision vmoe_top_k",
    ]
    assert all(row["mfu"] > 0 for row in records[1]["rows"])
    assert all(model["peak_mib"] > 0 for model in records[1]["memory"]["models"].values())
    (epoch,) = map(json.loads, (out / "epoch.jsonl").read_text().splitlines())
    assert (epoch["dry_run"], epoch["data"], epoch["test"]["total"]) == (True, "synthetic_pets", 16)
    assert (len(epoch["curve"]), epoch["cost"]["images"]) == (1, 64)
    assert epoch["cost"]["images_per_s"] > 0
    assert epoch["cost"]["gpu_peak_bytes"] is None, "a CPU's is not measured"
    names = ("benchmark-layer.json", "benchmark-train.json", "tests.xml", "epoch.jsonl")
    assert [line[4] for line in lines if line[1] == "ok"] == [str(out / name) for name in names]
    assert all(line[3] != "-" for line in lines if line[1] == "ok"), "each has a result in words"

    done, again = gpu(out, "--dry-run")
    assert (done.returncode, again) == (0, lines)
    assert "==" not in done.stdout, "nothing was begun"


def test_what_it_cannot_run_with_is_one_sentence(tmp_path):
    bare = python(tmp_path / "bare", f"exec {sys.executable} -S")
    mistakes = [
        (("--dry-run", "layers"), {}, "no step layers"),
        (("--dry-run",), {"PYTHON": str(tmp_path / "none")}, "none does not run"),
        (("--dry-run",), {"PYTHON": bare}, "lacks torch"),
        *([] if torch.cuda.is_available() else [((), {}, "no CUDA device")]),
    ]
    for arguments, environment, words in mistakes:
        done, lines = gpu(tmp_path, *arguments, **environment)
        assert (done.returncode, lines) == (2, [])
        assert words in done.stderr.splitlines()[-1]
