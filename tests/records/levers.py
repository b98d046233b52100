"""benchmarks/levers/README.md."""

from typing import Any

from tests.records import Claim, Definition
from tests.records.studies import report, shown

STUDY = "benchmarks/saving/record.json"


def _levers(record: dict[str, Any]) -> dict[str, Any]:
    """What the opening says."""
    own = report("saving")
    half, moe = "patch drop 50 %", own.MOE
    memory = {arm: own.memory(record, arm) / own.memory(record, moe) for arm in own.LEVERS}
    gaps = {}
    for name, rows in (("time", own.equal_time(record, (moe, half))), ("steps", own.same_steps(record))):
        by_arm = {row.name: row.mean for row in rows}
        gaps[name] = 100 * (by_arm[half] - by_arm[moe])
    return {
        "saved": 1 - memory["checkpointing"],
        "slower": 1 - own.speed_ratio(record, "train", "checkpointing"),
        "speed": own.speed_ratio(record, "train", half),
        "memory": memory[half],
        "better": gaps["time"],
        "behind": -gaps["steps"],
        "budget_s": record["budget"]["budget_s"],
    }


CLAIMS = [
    Claim(STUDY, "saves {saved:.0%} of the peak memory and costs {slower:.0%} of the speed", _levers),
    Claim(STUDY, "gives {speed:.2f} times the images/s and {memory:.2f} times the memory", _levers),
    Claim(STUDY, "After the same time the model is {better:.1f} points better", _levers),
    Claim(STUDY, "After the same steps it is {behind:.1f} points behind", _levers),
    Claim(STUDY, "{text}", lambda record: {"text": report("saving").levers_table(record)}),
    Claim(STUDY, "{text}", lambda record: shown(report("saving").lever_differences(record))),
    Claim(STUDY, "that fit into the same {budget_s:.0f} s", _levers),
]

DEFINITIONS = [Definition("within the first two epochs", "the most steps, 800 of 64 images, of the 45 000 that train")]
