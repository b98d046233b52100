"""What the tests of statistics share: traces made of chosen experts, without a model."""

from collections.abc import Callable

import numpy as np
import pytest

from moevision.analysis import LayerTrace, RoutingTrace


def trace_of(*expert_indices, labels, num_experts, grid, class_names=None):
    """A trace whose layers (blocks 1, 3, ...) made these choices, each [I, P, K]."""
    labels = np.asarray(labels, np.int64)
    layers = []
    for place, chosen in enumerate(expert_indices):
        chosen = np.asarray(chosen, np.int16)
        layers.append(
            LayerTrace(
                layer=2 * place + 1,
                expert_index=chosen,
                kept=np.ones(chosen.shape, bool),
                combine_weight=np.full(chosen.shape, 1 / chosen.shape[2], np.float32),
                probs=np.full((*chosen.shape[:2], num_experts), 1 / num_experts, np.float16),
                margin=np.zeros(chosen.shape[:2], np.float32),
                entropy_bits=np.zeros(chosen.shape[:2], np.float32),
            )
        )
    names = class_names or tuple(f"class {label}" for label in range(labels.max() + 1))
    probabilities = np.full((len(labels), len(names)), 1 / len(names), np.float32)
    pictures = tuple(f"picture {index}" for index in range(len(labels)))
    return RoutingTrace(
        tuple(layers), labels, labels, probabilities, pictures, names, grid, "a model", "pictures"
    )


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., RoutingTrace]:
    return trace_of
