"""Which group of emoji each expert takes, and what a page loses without it; models of one block with k = 1.

The block's MLP adds gate · expert(x) to a token. What a page's logits would be if any of its tokens went to any expert
is therefore known once every expert has seen every token: `Outputs` keeps that, and each question is an index into it.

Axes: I pages, N = 16 tokens (cells) of a page, E experts, D width, C = 9 groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor, nn

from benchmarks.experts_pay.arms import BATCH, SIDE, Pages
from moevision.data.emoji import CELL, CELLS, GROUPS, EmojiPages, read_sheet
from moevision.layers import MoEMlp, forward_routing

NAMED_ABOVE = 0.5  # share of an expert's emoji that are of one group
DRAWS = 100
MIXED = -1
Table = NDArray[np.int64]  # [E, C], how many emoji of each group an expert takes


def groups_of_cells(pages: EmojiPages, count: int) -> Tensor:
    """The group of every cell of the first pages, int64 [I, N]."""
    groups = read_sheet().groups
    return torch.from_numpy(np.stack([groups[pages.emoji(index)] for index in range(count)]))


@dataclass
class Outputs:
    """What every expert would add, for the first pages of a set.

    Attributes:
        net: the model, in eval mode.
        tokens: [I, N, E, D], each token after the block if it went to that expert.
        skipped: [I, N, D], each token after the block if it went to none.
        scores: [I, N, E], the router's logits.
        inputs: [I, N, D], what the layer reads.
        labels: [I], classes of the pages.
        groups: [I, N], the group of each cell.
    """

    net: nn.Module
    tokens: Tensor
    skipped: Tensor
    scores: Tensor
    inputs: Tensor
    labels: Tensor
    groups: Tensor

    @property
    def first_choice(self) -> Tensor:
        """The expert that each token goes to, int64 [I, N]."""
        return self.scores.argmax(-1)

    def next_best(self, experts: Tensor) -> Tensor:
        """The best expert of each token without these, bool [E] or [I, N, E]; int64 [I, N]."""
        return self.scores.masked_fill(experts, -torch.inf).argmax(-1)

    def past_own(self) -> Tensor:
        """The expert of each token if its own were taken away, int64 [I, N]."""
        return self.next_best(F.one_hot(self.first_choice, self.scores.shape[-1]).bool())

    @torch.inference_mode()
    def is_right(self, experts: Tensor, pages: Tensor | None = None) -> Tensor:
        """Whether these pages are classified correctly if their tokens go to `experts` [I', N]; bool [I']."""
        tokens = self.tokens if pages is None else self.tokens[pages]
        labels = self.labels if pages is None else self.labels[pages]
        index = experts[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
        chosen = tokens.gather(2, index).squeeze(2)  # [I', N, D]
        return self.classes_of(chosen) == labels

    @torch.inference_mode()
    def is_right_without_layer(self) -> Tensor:
        """Whether the pages are classified correctly if no token goes to any expert; bool [I]."""
        return self.classes_of(self.skipped) == self.labels

    def classes_of(self, tokens: Tensor) -> Tensor:
        """The class that the model says, [I'], for tokens [I', N, D] after the block."""
        net: Any = self.net
        logits: Tensor = net.forward_head(net.norm(tokens))
        return logits.argmax(-1)


@torch.inference_mode()
def outputs_of(net: nn.Module, pages: Pages, count: int) -> Outputs:
    """Every expert's output for every token of the first `count` pages."""
    (layer,) = (module for module in net.modules() if isinstance(module, MoEMlp))
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen["inputs"], seen["added"] = arguments[0], output

    def keep_block(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen["after"] = output

    hooks = [
        layer.register_forward_hook(keep),
        cast(Any, net).blocks[0].register_forward_hook(keep_block),
    ]
    parts: list[tuple[Tensor, ...]] = []
    for number in range(-(-count // BATCH)):
        images, labels = pages.batch(number)
        _, (routing,) = forward_routing(net, images)
        residual = seen["after"] - seen["added"]
        experts = every_expert(layer, seen["inputs"])
        probs = cast(Tensor, routing.probs)
        tokens = residual[:, :, None] + probs[..., None] * experts
        parts.append((tokens, residual, cast(Tensor, routing.logits), seen["inputs"], labels))
    for hook in hooks:
        hook.remove()

    columns = (torch.cat(part)[:count] for part in zip(*parts, strict=True))
    return Outputs(net, *columns, groups_of_cells(pages.pages, count))


def every_expert(layer: MoEMlp, x: Tensor) -> Tensor:
    """Every expert's output for every token: x [I, N, D] -> [I, N, E, D]."""
    fc1, fc2 = cast(Any, layer.experts.fc1), cast(Any, layer.experts.fc2)
    hidden = F.gelu(torch.einsum("ind,ehd->ineh", x, fc1.weight) + fc1.bias)
    return torch.einsum("ineh,edh->ined", hidden, fc2.weight) + cast(Tensor, fc2.bias)


# ---- names


def count_groups(choices: NDArray[np.int64], groups: NDArray[np.int64], num_experts: int) -> Table:
    """How many emoji of each group go to each expert, int64 [E, C]."""
    table = np.zeros((num_experts, len(GROUPS)), np.int64)
    np.add.at(table, (choices.ravel(), groups.ravel()), 1)
    return table


def names_of(table: Table) -> NDArray[np.int64]:
    """The group that each expert is named after, int64 [E]; `MIXED` where no group has more than half."""
    total = table.sum(1)
    share = table.max(1) / np.maximum(total, 1)
    return np.where(share > NAMED_ABOVE, table.argmax(1), MIXED)


def cluster_table(features: NDArray[np.float32], groups: NDArray[np.int64], k: int) -> Table:
    """The same table for k-means clusters of these features [n, F]; half of them fit the clusters."""
    half = len(features) // 2
    clusters = KMeans(k, n_init=1, random_state=0).fit(features[:half]).predict(features[half:])
    return count_groups(clusters.astype(np.int64), groups.ravel()[half:], k)


def cell_pixels(pages: Pages, count: int) -> NDArray[np.float32]:
    """The pixels of every cell of the first pages, [I · N, 16 · 16 · 3] in [0, 1]."""
    images = np.concatenate([pages.batches[number] for number in range(-(-count // BATCH))])[:count]
    cells = images.reshape(count, CELLS, CELL, CELLS, CELL, 3).swapaxes(2, 3)
    assert SIDE == CELLS * CELL
    return cells.reshape(count * CELLS**2, -1).astype(np.float32) / 255


def bits(table: Table) -> float:
    """Mutual information of expert and group in bits; with tens of thousands of emoji its bias is below .005."""
    joint = table / table.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    filled = joint > 0
    return float((joint[filled] * np.log2(joint[filled] / independent[filled])).sum())


# ---- what is missed


def without(outputs: Outputs, experts: NDArray[np.int64]) -> Tensor:
    """Which pages are right without these experts, bool [I]."""
    removed = torch.zeros(outputs.scores.shape[-1], dtype=torch.bool)
    removed[torch.from_numpy(experts)] = True
    return outputs.is_right(outputs.next_best(removed))


def losses_of_group(outputs: Outputs, named: NDArray[np.int64], group: int) -> dict[str, float]:
    """What the pages of a group lose, as the protocol defines it: away, random, named, others; shares of pages."""
    removed = torch.zeros(outputs.scores.shape[-1], dtype=torch.bool)
    removed[torch.from_numpy(named)] = True
    own_pages = torch.nonzero(outputs.labels == group).flatten()
    choice = outputs.first_choice[own_pages]  # [I', N]
    is_removed = removed[choice]
    without_named = outputs.next_best(removed)[own_pages]
    past_own = outputs.past_own()[own_pages]
    before = outputs.is_right(choice, own_pages).float().mean()

    def lost(experts: Tensor) -> float:
        return float(before - outputs.is_right(experts, own_pages).float().mean())

    is_of_group = outputs.groups[own_pages] == group
    at_named, at_others = is_of_group & is_removed, is_of_group & ~is_removed
    equal_count = torch.minimum(at_named.sum(1), at_others.sum(1))

    generator = torch.Generator().manual_seed(group)

    def mean_lost(among: Tensor, count: Tensor, moved_to: Tensor) -> float:
        """Move `count` [I'] random tokens of each page, among those allowed [I', N]; the mean of all draws."""
        draws = []
        for _ in range(DRAWS):
            order = torch.rand(among.shape, generator=generator).masked_fill(~among, 2.0)
            rank = order.argsort(1).argsort(1)
            is_moved = rank < count[:, None]
            draws.append(lost(torch.where(is_moved, moved_to, choice)))
        return float(np.mean(draws))

    everywhere = torch.ones_like(is_removed)
    return {
        "away": lost(without_named),
        "random": mean_lost(everywhere, is_removed.sum(1), past_own),
        "named": mean_lost(at_named, equal_count, without_named),
        "others": mean_lost(at_others, equal_count, past_own),
    }


def knock_out(outputs: Outputs, names: NDArray[np.int64]) -> dict[str, Any]:
    """For each group with a named expert its losses, and the accuracy of own and other pages with and without it."""
    before = outputs.is_right(outputs.first_choice)
    found: dict[str, Any] = {}
    for group, name in enumerate(GROUPS):
        named = np.flatnonzero(names == group)
        if not len(named):
            continue
        after = without(outputs, named)
        accuracy_by_class = [
            round(float(after[outputs.labels == label].float().mean()), 4)
            for label in range(len(GROUPS))
        ]
        losses = losses_of_group(outputs, named, group)
        found[name] = {
            "experts": named.tolist(),
            "accuracy_by_class": accuracy_by_class,
            **{key: round(value, 4) for key, value in losses.items()},
        }
    accuracy = [
        round(float(before[outputs.labels == label].float().mean()), 4)
        for label in range(len(GROUPS))
    ]
    skipped = outputs.is_right_without_layer()
    return {
        "with_all": accuracy,
        "without": found,
        "without_layer": round(float(skipped.float().mean()), 4),
    }
