"""The README's first command keeps its promise: `moevision fit --config quickstart`, whole."""

import json

import pytest

from moevision.cli import main

pytestmark = pytest.mark.deep


@pytest.mark.filterwarnings("default")
def test_quickstart(tmp_path, own_folder):
    """At least 95 % of 2 000 test images; in each MoE layer no dead expert and max/mean load at most 1.5."""
    assert main(["fit", "--config", "quickstart"]) == 0
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["test"]["total"] == 2000
    assert summary["test"]["correct"] >= 0.95 * 2000
    assert [layer["layer"] for layer in summary["layers"]] == [1, 2]
    for layer in summary["layers"]:
        assert len(layer["counts"]) == 8
        assert sum(layer["counts"]) == 2000 * 64 * 2  # images x patches x choices
        assert layer["dead"] == 0
        assert layer["max_over_mean"] <= 1.5
