"""benchmarks/surgery/README.md."""

from typing import Any

from tests.records import Claim, Definition

OPERATIONS = {
    "prune_2": ("without its 2 least used of 8 experts", "--prune 2"),
    "prune_4": ("without its 4 least used", "--prune 4"),
    "merge_4": ("merged to 4", "--merge 4"),
    "merge_4_no_align": ("merged to 4, not aligned", "--merge 4 --no-align"),
    "average": ("dense, average", "--collapse average"),
    "average_no_align": ("dense, average, not aligned", "--collapse average --no-align"),
    "most_used": ("dense, most used expert", "--collapse most_used"),
}
Records = tuple[dict[str, Any], ...]


def paths(model: str) -> tuple[str, ...]:
    """The records of one model, in the order of its table."""
    return tuple(f"benchmarks/surgery/{model}/{operation}.json" for operation in OPERATIONS)


def top1(records: Records) -> dict[str, float]:
    """Accuracies in per cent: after each operation, `before` and of the control, `without`."""
    found = {name: 100 * records[0]["accuracy"][name]["top1"] for name in ("before", "without")}
    after = (100 * record["accuracy"]["after"]["top1"] for record in records)
    return found | dict(zip(OPERATIONS, after, strict=True))


def size(cost: dict[str, int]) -> str:
    """The last three cells of a row."""
    flops = cost["flops_per_image"] + cost["router_flops_per_image"]
    return f"{cost['total_parameters'] / 1e6:.2f} M | {cost['active_parameters'] / 1e6:.2f} M | {flops / 1e6:.0f}"


def rows(*records: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of one model."""
    accuracy, costs = records[0]["accuracy"], records[0]["costs"]
    lines = [f"| as trained | | {accuracy['before']['top1']:.2%} | | {size(costs['before'])} |"]
    for (name, option), record in zip(OPERATIONS.values(), records, strict=True):
        change = {key: 100 * record["accuracy"]["difference"][key] for key in ("difference", "low", "high")}
        lines.append(
            f"| {name} | `{option}` | {record['accuracy']['after']['top1']:.2%} | {change['difference']:+.2f} "
            f"({change['low']:+.2f} to {change['high']:+.2f}) | {size(record['costs']['after'])} |"
        )
    lines.append(f"| control: MoE layers left out | | {accuracy['without']['top1']:.2%} | | | | |")
    return [{"text": line} for line in lines]


def effects(*records: dict[str, Any]) -> dict[str, float]:
    """What the sentences say, in points."""
    found = {}
    for name, part in zip(("pets", "cifar"), (records[: len(OPERATIONS)], records[len(OPERATIONS) :]), strict=True):
        own = top1(part)
        assert (max(own["merge_4"], own["prune_4"]) < own["without"]) == (name == "pets")
        found |= {
            f"{name}_average": own["average"] - own["without"],
            f"{name}_merge": own["merge_4"] - own["merge_4_no_align"],
            f"{name}_align": own["average"] - own["average_no_align"],
            f"{name}_most_used": (own["before"] - own["most_used"]) / (own["before"] - own["without"]),
        }
    gates = [layer["gates_per_token"] for record in records for layer in record["use"]["layers"].values()]
    return {**found, "least_gates": min(gates), "most_gates": max(gates)}


def least_and_most(*records: dict[str, Any]) -> dict[str, float]:
    """The smallest and the largest cost of an operation, in points."""
    costs = {
        (model, name): -100 * record["accuracy"]["difference"]["difference"]
        for model, part in (("pets", records[:7]), ("cifar10", records[7:]))
        for name, record in zip(OPERATIONS, part, strict=True)
    }
    least, most = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
    assert (least, most) == (("cifar10", "prune_2"), ("pets", "most_used"))
    return {"least": costs[least], "most": costs[most]}


BOTH = (*paths("pets"), *paths("cifar10"))
CLAIMS = [
    Claim(paths("pets"), "{text}", rows),
    Claim(paths("cifar10"), "{text}", rows),
    Claim(paths("pets"), "4 blocks), {n:,} test images", lambda *records: records[0]["accuracy"]),
    Claim(paths("cifar10"), "6 blocks), {n:,} test images", lambda *records: records[0]["accuracy"]),
    Claim(BOTH, "a token's two sum to {least_gates:.2f} to {most_gates:.2f} in the models", effects),
    Claim(BOTH, "is {pets_average:.1f} points (pets) and {cifar_average:.1f} (CIFAR-10) above", effects),
    Claim(BOTH, "helped merging by {pets_merge:.1f} and {cifar_merge:.1f} points", effects),
    Claim(BOTH, "It gave the dense average {cifar_align:.1f} points on CIFAR-10 and nothing", effects),
    Claim(BOTH, "costs {pets_most_used:.1f} and {cifar_most_used:.1f} times what", effects),
]

DEFINITIONS = [
    Definition("2 MoE layers of", "the bundled model"),
    Definition("3 MoE layers of", "the bundled model"),
    Definition("2 least used of 8 experts", "what the option does"),
    Definition("Intervals are 95 %", "the level of `moevision/train/report.py`"),
]
