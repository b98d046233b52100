"""The quickstart's first 20 steps have the stored losses: to 1e-6 where they were recorded, to 1e-2 elsewhere."""

import json

import pytest

from tests.golden.first_steps import FILE, OPTIONS, STEPS, first_losses, machine


@pytest.mark.parametrize("name", [pytest.param("shipped", marks=pytest.mark.deep), "fewer images"])
def test_the_first_losses_are_the_stored_ones(name, tmp_path):
    """Any change of data, model, losses, optimizer, schedule or seed shows here.

    `python -m tests.golden.first_steps` writes them anew.
    """
    record = json.loads(FILE.read_text())
    stored = record.pop("losses")[name]
    assert len(stored) == STEPS
    assert max(stored) - min(stored) > 0.1, "they say more than how a training begins"

    tolerance = 1e-6 if machine() == record else 1e-2
    assert first_losses(OPTIONS[name], tmp_path) == pytest.approx(stored, rel=tolerance)
