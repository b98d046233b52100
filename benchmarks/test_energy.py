"""Energy from a counter that the tests make: a module like pynvml. No real counter is needed."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import energy


class FakeNvml:
    """As pynvml: energy in mJ, cards by UUID, NVMLError for what goes wrong; the clock is the test's, at 60 W idle."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.supported, self.millijoules, self.now = True, 5_000_000, 100.0

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

    def sleep(self, seconds, watts=60):
        self.now += seconds
        self.millijoules += round(1e3 * watts * seconds)


@pytest.fixture
def nvml(monkeypatch):
    """A card that torch would show, without one."""
    fake = FakeNvml()
    card = SimpleNamespace(uuid="1234", name="Card")
    clock = SimpleNamespace(perf_counter=lambda: fake.now, sleep=fake.sleep)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(energy, "time", clock)
    fake.card = card
    return fake


def test_idle_power_is_subtracted(nvml):
    """A pass of 2 images takes 1 s at 100 W, 40 W above idle: 20 J an image."""
    measured = energy.energy_of(lambda: nvml.sleep(1, watts=100), 2, torch.device("cuda:0"))
    assert measured["joules_per_image"] == pytest.approx([20, 20, 20])
    assert (measured["energy"], measured["source"]) == ("measured", "nvml")
    assert measured["domain"] == "GPU board Card, without the host"
    assert energy.energy_text(measured).startswith("20 J/image above idle")


@pytest.mark.parametrize(
    ("device", "change", "word"),
    [
        ("cuda:0", {"supported": False}, "Volta"),
        ("cuda:0", {"uuid": "other"}, "Not Found"),
        ("cuda:0", {"pynvml": None}, "nvidia-ml-py"),
        ("cpu", {}, "cpu"),
        ("mps", {}, "mps"),
    ],
)
def test_what_is_not_measured_has_its_reason(nvml, monkeypatch, device, change, word):
    nvml.supported = change.get("supported", True)
    nvml.card.uuid = change.get("uuid", "1234")
    if "pynvml" in change:
        monkeypatch.setitem(sys.modules, "pynvml", None)  # makes its import fail
    measured = energy.energy_of(lambda: None, 2, torch.device(device))
    assert measured == {"energy": "not measured", "reason": measured["reason"]}
    assert word in energy.energy_text(measured)
