"""`doctor`: what it reads of a system, when it says what, and that it never fails for what it finds."""

import json
import os
from dataclasses import replace

import pytest
import torch

from moevision.commands.doctor import Gpu, Machine, findings, look
from moevision.limits import (
    cpu_quota,
    memory_available_bytes,
    memory_limit_bytes,
    total_memory_bytes,
    usable_memory_bytes,
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
            "sys/fs/cgroup/slice/memory.stat": f"anon 1\ninactive_file {GIB // 2}\nactive_file {GIB}\n",
            "sys/fs/cgroup/slice/job/step/memory.max": f"{6 * GIB}\n",
            "sys/fs/cgroup/slice/job/step/memory.current": f"{2 * GIB}\n",
        },
    )
    assert cpu_quota(root) == 1.5
    assert memory_limit_bytes(root) == 6 * GIB
    assert usable_memory_bytes(root) == min(total_memory_bytes(), 6 * GIB)
    assert memory_available_bytes(root) == 1.5 * GIB  # what the slice has left, and files that nobody read lately


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


HEALTHY = Machine(
    cpu="CPU",
    cores=4,
    usable_cores=4,
    quota_cores=None,
    threads=4,
    omp_num_threads=None,
    memory_bytes=16 * GIB,
    memory_limit_bytes=None,
    memory_available_bytes=12 * GIB,
    shm_bytes=8 * GIB,
    disk_free_bytes=100 * GIB,
    gpus=[],
    nvidia_card=False,
    torch={"version": "2.13.0", "cuda": None, "hip": None},
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
        ({"memory_available_bytes": GIB // 2}, "512 MiB of memory are free.", "--data.batch_size"),
        (
            {"memory_available_bytes": GIB, "memory_limit_bytes": 2 * GIB},
            "1.0 GiB of memory are free (the control group grants 2.0 GiB)",
            "--data.batch_size",
        ),
        ({"shm_bytes": 64 * 2**20}, "/dev/shm holds 64 MiB", "--shm-size"),
        ({"disk_free_bytes": GIB}, "has 1.0 GiB left", "--runs_root"),
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
        assert machine.memory_available_bytes <= machine.memory_bytes


def test_everything_as_json(cli):
    """Nothing else is printed."""
    outcome = cli("doctor", "--format", "json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert set(record) == {"machine", "findings"}
    assert record["machine"]["device"] in ("cpu", "cuda")
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
