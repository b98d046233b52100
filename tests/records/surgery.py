"""docs/surgery.md."""

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
Found = dict[str, dict[str, Any]]


def paths(model: str) -> tuple[str, ...]:
    """The records of one model, in the order of OPERATIONS."""
    return tuple(f"benchmarks/surgery/{model}/{operation}.json" for operation in OPERATIONS)


BOTH = (*paths("pets"), *paths("cifar10"))


def by_operation(records: tuple[dict[str, Any], ...]) -> tuple[Found, Found]:
    """Those of pets and of CIFAR-10, by operation."""
    half = len(OPERATIONS)
    return tuple(dict(zip(OPERATIONS, part, strict=True)) for part in (records[:half], records[half:]))  # type: ignore[return-value]


def size(cost: dict[str, int]) -> str:
    """The last three cells of a row."""
    flops = cost["flops_per_image"] + cost["router_flops_per_image"]
    return f"{cost['total_parameters'] / 1e6:.2f} M | {cost['active_parameters'] / 1e6:.2f} M | {flops / 1e6:.0f}"


def rows(*records: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of one model."""
    accuracy, costs = records[0]["accuracy"], records[0]["costs"]
    table = [f"| as trained | | {accuracy['before']['top1']:.2%} | | {size(costs['before'])} |"]
    for (name, option), record in zip(OPERATIONS.values(), records, strict=True):
        change = {key: 100 * record["accuracy"]["difference"][key] for key in ("difference", "low", "high")}
        table.append(
            f"| {name} | `{option}` | {record['accuracy']['after']['top1']:.2%} | {change['difference']:+.2f} "
            f"({change['low']:+.2f} to {change['high']:+.2f}) | {size(record['costs']['after'])} |"
        )
    table.append(f"| control: MoE layers left out | | {accuracy['without']['top1']:.2%} | | | | |")
    return [{"text": row} for row in table]


def effects(*records: dict[str, Any]) -> dict[str, float]:
    """What the sentences say, in points."""
    found = {}
    for name, operations in zip(("pets", "cifar10"), by_operation(records), strict=True):
        top1 = {key: 100 * record["accuracy"]["after"]["top1"] for key, record in operations.items()}
        before, control = (100 * operations["average"]["accuracy"][key]["top1"] for key in ("before", "without"))
        assert (max(top1["merge_4"], top1["prune_4"]) < control) == (name == "pets")
        found |= {
            f"{name}_average": top1["average"] - control,
            f"{name}_merge": top1["merge_4"] - top1["merge_4_no_align"],
            f"{name}_align": top1["average"] - top1["average_no_align"],
            f"{name}_most_used": (before - top1["most_used"]) / (before - control),
        }
    gates = [layer["gates_per_token"] for record in records for layer in record["use"]["layers"].values()]
    return {**found, "least_gates": min(gates), "most_gates": max(gates)}


CLAIMS = [
    Claim(paths("pets"), "{text}", rows),
    Claim(paths("cifar10"), "{text}", rows),
    Claim(paths("pets"), "4 blocks), {n:,} test images", lambda *records: records[0]["accuracy"]),
    Claim(paths("cifar10"), "6 blocks), {n:,} test images", lambda *records: records[0]["accuracy"]),
    Claim(BOTH, "a token's two sum to {least_gates:.2f} to {most_gates:.2f} in the models", effects),
    Claim(BOTH, "is {pets_average:.1f} points (pets) and {cifar10_average:.1f} (CIFAR-10) above", effects),
    Claim(BOTH, "helped merging by {pets_merge:.1f} and {cifar10_merge:.1f} points", effects),
    Claim(BOTH, "it gave {cifar10_align:.1f} points on CIFAR-10", effects),
    Claim(BOTH, "costs {pets_most_used:.1f} and {cifar10_most_used:.1f} times what", effects),
]

DEFINITIONS = [
    Definition("2 MoE layers of 4 blocks", "the bundled model"),
    Definition("3 MoE layers of 6 blocks", "the bundled model"),
    Definition("Intervals are 95 %", "the level of `moevision/train/intervals.py`"),
]
