"""docs/routers.md."""

from typing import Any

from tests.records import Claim, Definition
from tests.records.studies import report

STUDY = "benchmarks/routers.json"
LEARNED = ("noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "bias_balanced", "cosine")
DATA = "cifar10"


def _rows(record: dict[str, Any]) -> dict[str, Any]:
    return {row.name: row for row in report("_router_report").rows_of(record, DATA)}


def _above(record: dict[str, Any]) -> dict[str, Any]:
    """Points above the dense twin, by row; the verdicts behind the words are asserted here."""
    own = report("_router_report")
    found = own.against(list(_rows(record).values()), own.TWIN)
    return {name: 100 * contrast.mean for name, contrast in found.items()}


def _loads(record: dict[str, Any]) -> dict[str, float]:
    """The largest load of any layer, mean over seeds, of the routers that learn their balance."""
    loads = {name: max(row.layers("max_over_mean")) for name, row in _rows(record).items() if name in LEARNED}
    return {"most": max(loads.values()), **loads}


def _weaker(record: dict[str, Any]) -> dict[str, float]:
    loads = [layer["max_over_mean"] for run in record["runs"] for layer in run["layers"] if run["lr"] == 2e-3]
    return {"least": min(loads), "most": max(loads)}


CLAIMS = [
    Claim(STUDY, "{text}", lambda record: {"text": report("_router_report").accuracy_table(list(_rows(record).values()))}),
    Claim(STUDY, "{text}", lambda record: {"text": report("_router_report").load_table(list(_rows(record).values()))}),
    Claim(STUDY, "{text}", lambda record: {"text": report("_router_report").cost_table(record)}),
    Claim("benchmarks/routers_loss_001.json", "had {least:.1f} to {most:.1f}", _weaker),
]

DEFINITIONS = [
    Definition("(.2 to .4 where data are few: arXiv:2202.08906)", "the cited paper"),
]
