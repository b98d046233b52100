"""Energy from counters that the tests make: a powercap tree, a module like pynvml. No real counter is needed."""

import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.energy import EnergyMeter, NotMeasured, RaplCounter, joules_per_image

RANGE_UJ = 262_143_328_850  # a real Xeon's


def zone(root, folder, name, energy_uj, range_uj=RANGE_UJ):
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path


def spend(path, joules):
    file, limit = path / "energy_uj", int((path / "max_energy_range_uj").read_text())
    # Renamed into place: a reader in another thread never sees half a file, as it never does in sysfs.
    (path / "new").write_text(f"{(int(file.read_text()) + round(joules * 1e6)) % (limit + 1)}\n")
    os.replace(path / "new", file)


class Machine:
    """A clock that stands still, and packages that idle at a constant power while somebody sleeps."""

    def __init__(self):
        self.now, self.idling, self.idle = 100.0, [], lambda seconds: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.idle(seconds)
        for path, watts in self.idling:
            spend(path, watts * seconds)


@pytest.fixture
def machine(monkeypatch):
    """What the meter takes for the time."""
    monkeypatch.setattr("benchmarks.energy.time", machine := Machine())
    return machine


def meter_of(root, idle_s=5.0):
    return EnergyMeter("cpu", idle_s=idle_s, powercap=root)


def test_idle_power_is_subtracted(tmp_path, machine):
    """40 W idle for 5 s, then 10 s in which 700 J are used: 300 J more than idling."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 123_456_789)
    machine.idling.append((package, 40))
    with meter_of(tmp_path) as meter:
        machine.now += 10
        spend(package, 700)
    reading = meter.reading
    assert reading.energy_j == pytest.approx(300)
    assert reading.idle_power_w == pytest.approx(40)
    assert (reading.seconds, reading.source, reading.reason) == (10, "rapl", "")
    assert reading.domain == "CPU package-0, without memory"
    assert joules_per_image(reading, 200) == pytest.approx(1.5)


def test_the_counter_wraps(tmp_path, machine):
    """It turns in the idle time, 100 J before its end at 40 W for 5 s, and again in the work."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 100_000_000)
    machine.idling.append((package, 40))
    with meter_of(tmp_path) as meter:
        assert int((package / "energy_uj").read_text()) < 100_000_000
        spend(package, 262_100)
        machine.now += 50
        assert int((package / "energy_uj").read_text()) < 100_000_000
    assert meter.reading.idle_power_w == pytest.approx(40)
    assert meter.reading.energy_j == pytest.approx(262_100 - 40 * 50)


def test_a_turn_has_one_value_more_than_the_largest(tmp_path):
    """It counts 0 to 99: from 90, 25 more is 15."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 90, range_uj=99)
    counter = RaplCounter(tmp_path)
    (package / "energy_uj").write_text("15")
    assert counter.joules() == pytest.approx(25e-6, abs=1e-12)
    (package / "energy_uj").write_text("14")
    assert counter.joules() == pytest.approx(124e-6, abs=1e-12)


def test_polling_sees_every_wrap(tmp_path, monkeypatch, machine):
    """Two turns between start and end: seen, since a thread reads in between."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=999_999)
    monkeypatch.setattr(RaplCounter, "poll_s", 0.001)
    seen, joules = threading.Event(), RaplCounter.joules

    def read(self):
        total = joules(self)
        if threading.current_thread().name == "energy counter":
            seen.set()
        return total

    monkeypatch.setattr(RaplCounter, "joules", read)
    with meter_of(tmp_path) as meter:
        for _ in range(4):  # 4 x 0.6 J on a counter that holds 1 J
            spend(package, 0.6)
            seen.clear()
            assert seen.wait(10)
    assert meter.reading.energy_j == pytest.approx(2.4)
    thread = [thread for thread in threading.enumerate() if thread.name == "energy counter"]
    for one in thread:
        one.join(10)
        assert not one.is_alive()


def test_two_packages_count_once_each(tmp_path, machine):
    """Parts of a package, dram, the platform and the second view of a package are not added."""
    first = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:0:1", "dram", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    (tmp_path / "intel-rapl").mkdir()  # the control type's own folder, which is no zone
    with meter_of(tmp_path) as meter:
        spend(first, 30)
        spend(second, 12)
        for path in others:
            spend(path, 1000)
    assert meter.reading.energy_j == pytest.approx(42)
    assert meter.reading.domain == "CPU package-0 + package-1, without memory"


def not_measured(reading, *words):
    assert (reading.energy_j, reading.idle_power_w) == (None, None)
    assert (reading.source, reading.domain) == ("not measured", "")
    assert joules_per_image(reading, 10) is None
    for word in words:
        assert word in reading.reason


@pytest.mark.parametrize("exists", [True, False])
def test_a_machine_without_rapl(tmp_path, exists, machine):
    root = tmp_path / "powercap"
    if exists:
        zone(root, "intel-rapl:0", "psys", 7)
    with meter_of(root) as meter:
        machine.now += 3
    not_measured(meter.reading, str(root), "no CPU package", "; measure on the machine itself")
    assert meter.reading.seconds == 3


def test_a_counter_for_root_only(tmp_path, monkeypatch, machine):
    """Patched, since tests may run as root, whom no mode bit stops."""
    zone(tmp_path, "intel-rapl:0", "package-0", 7)
    read_text = Path.read_text

    def forbidding(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", forbidding)
    with meter_of(tmp_path) as meter:
        pass
    not_measured(meter.reading, "root only", "chmod")


def test_a_counter_that_falls_silent(tmp_path, machine):
    """Half a figure is none."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 7)
    with meter_of(tmp_path) as meter:
        spend(package, 10)
        (package / "energy_uj").write_text("garbage")
    not_measured(meter.reading, "energy_uj")


def test_a_failure_between_readings_is_remembered(tmp_path, monkeypatch, machine):
    """The thread that watches for wraps could not read once: the counter may have turned unseen."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 7)
    monkeypatch.setattr(RaplCounter, "poll_s", 0.001)
    with meter_of(tmp_path) as meter:
        (package / "energy_uj").rename(package / "away")
        deadline = time.monotonic() + 60
        while any(thread.name == "energy counter" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        (package / "away").rename(package / "energy_uj")
    not_measured(meter.reading, "energy_uj")


def test_idling_is_needed():
    with pytest.raises(ValueError, match="idle"):
        EnergyMeter("cpu", idle_s=0)


class FakeNvml:
    """As pynvml: energy in mJ, cards by UUID, NVMLError for everything that goes wrong."""

    class NVMLError(Exception):
        pass

    supported, millijoules = True, 5_000_000

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid != "GPU-1234":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if not self.supported:
            raise self.NVMLError("Not Supported")
        return self.millijoules


@pytest.fixture
def card(monkeypatch):
    """A card that torch would show, without one."""
    properties = SimpleNamespace(uuid="1234", name="Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return properties


@pytest.fixture
def nvml(monkeypatch, machine):
    """Its card idles at 60 W."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    machine.idle = lambda seconds: setattr(
        fake, "millijoules", fake.millijoules + round(60_000 * seconds)
    )
    return fake


@pytest.mark.usefixtures("card")
def test_a_card_counts_in_millijoules(nvml, machine):
    with EnergyMeter("cuda:0", idle_s=2) as meter:
        machine.now += 5
        nvml.millijoules += 1_200_000
    reading = meter.reading
    assert reading.energy_j == pytest.approx(1200 - 60 * 5)
    assert (reading.source, reading.domain) == ("nvml", "GPU board Card, without the host")


@pytest.mark.parametrize(
    ("supported", "uuid", "words"), [(False, "1234", "Volta"), (True, "other", "driver")]
)
def test_a_card_without_a_counter(card, nvml, supported, uuid, words):
    card.uuid, nvml.supported = uuid, supported
    with EnergyMeter("cuda:0", idle_s=2) as meter:
        pass
    not_measured(meter.reading, words)


@pytest.mark.usefixtures("card")
def test_without_nvidias_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes its import fail
    with EnergyMeter("cuda:0", idle_s=0.01) as meter:
        pass
    not_measured(meter.reading, "nvidia-ml-py")


def test_other_devices_have_no_counter():
    with EnergyMeter("mps", idle_s=0.01) as meter:
        pass
    not_measured(meter.reading, "mps")


def test_the_real_machine_measures_or_says_why():
    """Whatever this machine has: a figure with its domain, or none with a reason."""
    with EnergyMeter("cpu", idle_s=0.05) as meter:
        torch.ones(64, 64) @ torch.ones(64, 64)
    reading = meter.reading
    assert (reading.energy_j is None) == (reading.source == "not measured") == bool(reading.reason)
    try:
        RaplCounter()
    except NotMeasured:
        assert reading.energy_j is None
    else:
        assert reading.domain.startswith("CPU package")
