"""`doctor`: what it reads of a system, when it says what, and that it never fails for what it finds."""

import json
import os
from dataclasses import replace

import pytest
import torch

from moevision.commands.doctor import (
    Gpu,
    Machine,
    busy_cores,
    cpu_quota,
    findings,
    look,
    memory_available_bytes,
    memory_limit_bytes,
)
from moevision.train.recipe import default_precision

GIB = 2**30


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_a_control_group_and_its_ancestors(tmp_path):
    """cgroup v2: the tightest of all levels holds; 1.5 cores at the middle, 6 GiB at the leaf."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slice/job/step\n",
            "proc/meminfo": "MemTotal: 33554432 kB\nMemFree: 1024 kB\nMemAvailable:   16777216 kB\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slice/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/slice/job/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/slice/job/step/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slice/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/slice/memory.current": f"{7 * GIB}\n",
            "sys/fs/cgroup/slice/job/step/memory.max": f"{6 * GIB}\n",
            "sys/fs/cgroup/slice/job/step/memory.current": f"{2 * GIB}\n",
        },
    )
    assert cpu_quota(root) == 1.5
    assert memory_limit_bytes(root) == 6 * GIB
    assert memory_available_bytes(root) == 1 * GIB  # the slice's last one


def test_limits_in_a_container_of_version_1(tmp_path):
    """The path is one of the host's, and isn't mounted; "no limit" is a number near 2^63."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "11:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
            "proc/meminfo": "MemAvailable: 2097152 kB\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
        },
    )
    assert cpu_quota(root) == 2.5
    assert memory_limit_bytes(root) is None
    assert memory_available_bytes(root) == 2 * GIB
    write(root, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"})
    assert cpu_quota(root) is None


def test_a_system_without_any_of_it(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert memory_limit_bytes(tmp_path) is None
    assert memory_available_bytes(tmp_path) is None
    assert busy_cores(tmp_path, seconds=0) is None


def test_load_is_what_others_use_of_the_cores_that_are_ours(tmp_path, monkeypatch):
    """Core 0's 100 ticks: 30 user, 10 nice, 5 system, 40 idle, 5 iowait, 10 stolen. Core 1 idles, core 2 isn't ours."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    # user nice system idle iowait irq softirq steal guest guest_nice
    whole = "cpu  9 9 9 9 9 9 9 9 9 9"
    zeros = "0 0 0 0 0 0 0 0 0 0"
    before = "\n".join([whole, "cpu0 1 1 1 1 1 1 1 1 0 0", f"cpu1 {zeros}", f"cpu2 {zeros}"])
    after = "\n".join(
        [whole, "cpu0 31 11 6 41 6 1 1 11 30 0", "cpu1 0 0 0 99 1 0 0 0 0 0", "cpu2 99 0 0 0 0 0 0 0 0 0"]
    )
    root = write(tmp_path, {"proc/stat": before})
    assert busy_cores(root, sleep=lambda _: write(root, {"proc/stat": after})) == pytest.approx(0.45)


HEALTHY = Machine(
    cpu="CPU",
    cores=4,
    usable_cores=4,
    quota_cores=None,
    threads=4,
    omp_num_threads=None,
    others_busy_cores=0.1,
    memory_bytes=16 * GIB,
    memory_limit_bytes=None,
    memory_available_bytes=12 * GIB,
    shm_bytes=8 * GIB,
    disk_free_bytes=100 * GIB,
    gpus=[],
    nvidia_card=False,
    torch={"version": "2.13.0", "cuda": None, "hip": None},
    libraries={},
    compiler="/usr/bin/g++",
    device="cpu",
    precision="bf16-mixed",
)
CARD = Gpu("Card", "9.0", 80 * GIB, 79 * GIB)
CUDA = {"torch": {"version": "2.13.0", "cuda": "12.8", "hip": None}, "nvidia_card": True}


def test_a_healthy_machine_has_no_findings():
    assert findings(HEALTHY) == []
    assert findings(replace(HEALTHY, gpus=[CARD], **CUDA)) == []


@pytest.mark.parametrize(
    ("change", "what", "advice"),
    [
        ({"threads": 1, "omp_num_threads": "1"}, "1 of 4 usable cores because OMP_NUM_THREADS is 1", "Unset OMP_"),
        ({"threads": 2}, "2 of 4 usable cores.", "OMP_NUM_THREADS=4"),
        ({"threads": 4, "usable_cores": 2}, "4 threads, but this process may use 2 of 4 cores", "OMP_NUM_THREADS=2"),
        ({"quota_cores": 1.5}, "4 threads, but its control group grants 1.5 cores", "OMP_NUM_THREADS=2"),
        ({"others_busy_cores": 1.3}, "Other programs keep 1.3 of 4 cores busy", "can't be compared"),
        ({"memory_available_bytes": GIB // 2}, "512 MiB of memory are free.", "--data.batch_size"),
        (
            {"memory_available_bytes": GIB, "memory_limit_bytes": 2 * GIB},
            "1.0 GiB of memory are free (the control group grants 2.0 GiB)",
            "--data.batch_size",
        ),
        ({"shm_bytes": 64 * 2**20}, "/dev/shm holds 64 MiB", "--shm-size"),
        ({"disk_free_bytes": GIB}, "has 1.0 GiB left", "--runs_root"),
        ({"compiler": None}, "no C++ compiler", "g++"),
        ({"nvidia_card": True}, "torch 2.13.0 was built without CUDA", "https://pytorch.org"),
        ({**CUDA}, "(CUDA 12.8) can't use it", "CUDA_VISIBLE_DEVICES"),
        ({**CUDA, "gpus": [replace(CARD, free_bytes=20 * GIB)]}, "Of the 80.0 GiB of Card only 20.0 GiB", "nvidia-smi"),
    ],
)
def test_each_limit_is_said_once_with_what_to_change(change, what, advice):
    (finding,) = findings(replace(HEALTHY, **change))
    assert what in finding.what
    assert advice in finding.advice


def test_threads_of_the_cpu_don_t_limit_a_gpu():
    assert findings(replace(HEALTHY, threads=1, gpus=[CARD], device="cuda", **CUDA)) == []


def test_the_machine_is_this_one():
    machine = look()
    assert 1 <= machine.usable_cores <= machine.cores
    assert machine.threads == torch.get_num_threads()
    assert machine.torch["version"] == torch.__version__
    assert machine.disk_free_bytes > 0
    if os.path.exists("/proc/cpuinfo"):
        assert 0 <= machine.others_busy_cores <= machine.usable_cores
        assert machine.memory_available_bytes <= machine.memory_bytes


def test_everything_as_json(cli, tmp_path):
    """Standard output and the file hold the same; nothing else is printed."""
    outcome = cli("doctor", "--format", "json", "--json", tmp_path / "doctor.json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert json.loads((tmp_path / "doctor.json").read_text()).keys() == record.keys()
    assert set(record) == {"machine", "findings"}
    assert record["machine"]["device"] in ("cpu", "cuda", "mps")
    assert record["machine"]["precision"] == default_precision()
    assert all(set(finding) == {"what", "advice"} for finding in record["findings"])


def test_the_report_says_facts_and_findings(cli, monkeypatch):
    """A machine that torch would overload, whatever else it is."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    outcome = cli("doctor")
    assert outcome.code == 0
    for words in ("CPU", "memory", torch.__version__, "precision"):
        assert words in outcome.out
    assert "torch uses 10000 threads" in outcome.out
    assert "-> Set OMP_NUM_THREADS=" in outcome.out


def test_a_file_that_cannot_be_written(cli, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = cli("doctor", "--json", tmp_path / "file" / "doctor.json")
    assert outcome.code == 2
    assert "--json" in outcome.err
