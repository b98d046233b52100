"""`info --machine`: what is read of a system, which findings it makes, and that they are no errors."""

import json
import os

import pytest
import torch

from moevision.commands import info
from moevision.commands.info import findings, look
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


def test_a_system_without_any_of_it(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert memory_limit_bytes(tmp_path) is None
    assert memory_available_bytes(tmp_path) is None


HEALTHY = dict(
    cpu="CPU",
    cores=4,
    threads=4,
    gpus=[],
    nvidia_card=False,
    torch="2.13.0",
    cuda=None,
    precision="bf16-mixed",
    memory_gib=12,
    shm_gib=8,
    disk_gib=100,
)
CUDA = {"cuda": "12.8", "nvidia_card": True}


def test_a_healthy_machine_has_no_findings():
    assert list(findings(HEALTHY)) == []
    assert list(findings({**HEALTHY, **dict(gpus=["Card"], **CUDA)})) == []
    assert list(findings({**HEALTHY, **dict(memory_gib=None, shm_gib=None)})) == [], "not known is no finding"


@pytest.mark.parametrize(
    ("change", "what", "advice"),
    [
        ({"threads": 1}, "1 threads, and this process may use 4 cores", "OMP_NUM_THREADS=4"),
        ({"cores": 2}, "4 threads, and this process may use 2 cores", "OMP_NUM_THREADS=2"),
        ({"memory_gib": 0.5}, "Only 0.5 GiB of memory are free.", "--data.batch_size"),
        ({"shm_gib": 0.06}, "Only 0.06 GiB has /dev/shm", "--shm-size"),
        ({"disk_gib": 1}, "Only 1 GiB are left on the disk", "--runs_root"),
        ({"nvidia_card": True}, "torch 2.13.0 (CUDA: None) can't use it", "https://pytorch.org"),
        ({**CUDA}, "(CUDA: 12.8) can't use it", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_each_limit_is_said_once_with_what_to_change(change, what, advice):
    (finding,) = findings({**HEALTHY, **dict(**change)})
    assert what in finding[0]
    assert advice in finding[1]


def test_threads_of_the_cpu_don_t_limit_a_gpu():
    assert list(findings({**HEALTHY, **dict(threads=1, gpus=["Card"], **CUDA)})) == []


def test_the_machine_is_this_one():
    found = look()
    assert 1 <= found["cores"] <= os.cpu_count()
    assert (found["threads"], found["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert found["disk_gib"] > 0
    if os.path.exists("/proc/cpuinfo"):
        assert found["memory_gib"] <= total_memory_bytes() / GIB


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (1.5, 2), (9.0, 4)])
def test_cores_are_those_that_the_control_group_grants(quota, cores, monkeypatch):
    monkeypatch.setattr(info, "usable_cores", lambda: 4)
    monkeypatch.setattr(info, "cpu_quota", lambda: quota)
    assert look()["cores"] == cores


def test_everything_as_json(cli):
    """Nothing else is printed."""
    outcome = cli("info", "--machine", "--format", "json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert set(record) == {"machine", "findings"}
    assert record["machine"]["precision"] == default_precision()
    assert all(set(finding) == {"what", "advice"} for finding in record["findings"])


def test_facts_and_findings_are_printed(cli, monkeypatch):
    """A machine that torch would overload, whatever else it is."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    outcome = cli("info", "--machine")
    assert outcome.code == 0
    for words in ("cpu", "memory", torch.__version__, "precision"):
        assert words in outcome.out
    assert "torch uses 10000 threads" in outcome.out
    assert "-> Set OMP_NUM_THREADS=" in outcome.out
