"""What a dataset looks like in numbers: images per class, class weights, and the lines that are printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moevision.data.sources import Sample
from moevision.errors import UserError
from moevision.names import shown

ClassCounts = dict[str, dict[str, int]]
_MAX_RATIO = 3  # between the largest and the smallest class, before it is worth a warning
_MAX_ROWS = 20


def count_classes(samples: Mapping[str, Sequence[Sample]], class_names: Sequence[str]) -> ClassCounts:
    """Images per split and class name, unreadable ones included."""
    counts: ClassCounts = {}
    for split, members in samples.items():
        labels = Counter(sample.label for sample in members)
        counts[split] = {name: labels[label] for label, name in enumerate(class_names)}
    return counts


def balance_warnings(train: Mapping[str, int], weighted: bool, balanced_sampling: bool) -> list[str]:
    """Sentences about classes of very different size that nothing makes up for, or that two things do."""
    if weighted and balanced_sampling:
        return ["class_weights and balanced_sampling both favour rare classes: use one of them"]
    largest, smallest = max(train, key=lambda name: train[name]), min(train, key=lambda name: train[name])
    if weighted or balanced_sampling or train[largest] <= _MAX_RATIO * train[smallest]:
        return []
    return [
        f"class {largest!r} has {train[largest]} training images and {smallest!r} only {train[smallest]}: "
        "consider --data.class_weights auto or --data.balanced_sampling true"
    ]


def class_weight_tensor(weights: str | dict[str, float], train: Mapping[str, int]) -> Tensor | None:
    """Weights of the loss per class, float32 [C].

    Args:
        weights: "none"; "auto", which gives class c the weight N / (C n_c), so that the mean over the N
            training images is 1; or a weight per class name, 1 for names left out.
        train: training images per class, in the order of the labels.

    Raises:
        UserError: if a name is unknown or a weight is negative.
    """
    if weights == "none":
        return None
    counts = torch.tensor(list(train.values()))
    if not isinstance(weights, dict):
        return counts.sum() / (len(train) * counts)
    weights = {shown(name): weight for name, weight in weights.items()}
    for name, weight in weights.items():
        if name not in train:
            raise UserError(f"--data.class_weights names {name!r}: the classes are {', '.join(train)}")
        if weight < 0:
            raise UserError(f"--data.class_weights gives {name!r} the weight {weight:g}: use 0 or more")
    return torch.tensor([float(weights.get(name, 1.0)) for name in train])


def count_table(counts: ClassCounts) -> list[str]:
    """Lines of a table with a row per class and a column per split; many classes are summed up."""
    names = list(next(iter(counts.values())))
    rows = {name: [split[name] for split in counts.values()] for name in names}
    if len(names) > _MAX_ROWS:
        rows = {
            f"{what} of the {len(names)} classes": [choose(split.values()) for split in counts.values()]
            for what, choose in (("smallest", min), ("largest", max))
        }
    rows = {**rows, "all": [sum(split.values()) for split in counts.values()]}
    width = max(len("class"), *map(len, rows))
    lines = [f"{'class':<{width}}" + "".join(f"{split:>9}" for split in counts)]
    lines += [f"{name:<{width}}" + "".join(f"{count:>9,}" for count in row) for name, row in rows.items()]
    return lines
