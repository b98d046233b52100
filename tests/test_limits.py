"""Memory that a control group grants, from files as Linux writes them."""

from moevision.limits import available_memory_bytes, memory_limit_bytes, physical_memory_bytes

GIB = 2**30


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_a_control_group_and_its_ancestors(tmp_path):
    """cgroup v2: the tightest of all levels holds, 6 GiB at the leaf."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slice/job/step\n",
            "proc/meminfo": "MemTotal: 33554432 kB\nMemFree: 1024 kB\nMemAvailable:   16777216 kB\n",
            "sys/fs/cgroup/slice/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/slice/memory.current": f"{7 * GIB}\n",
            "sys/fs/cgroup/slice/memory.stat": f"anon 1\ninactive_file {GIB // 2}\nactive_file {GIB}\n",
            "sys/fs/cgroup/slice/job/step/memory.max": f"{6 * GIB}\n",
            "sys/fs/cgroup/slice/job/step/memory.current": f"{2 * GIB}\n",
        },
    )
    assert memory_limit_bytes(root) == min(physical_memory_bytes(), 6 * GIB)
    assert (
        available_memory_bytes(root) == 1.5 * GIB
    )  # what the slice has left, and files that nobody read lately


def test_a_system_without_any_of_it(tmp_path):
    assert memory_limit_bytes(tmp_path) == physical_memory_bytes()
    assert available_memory_bytes(tmp_path) is None
