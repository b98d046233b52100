"""The router's noise of training, in a model that is otherwise as in evaluation: what training sees of an image."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from moevision.layers import moe_layers, routing_lock

_GENERATOR: Final = threading.RLock()
"""Held while torch's one generator has a seed of ours: models have locks of their own."""


def noise_of(router: Any) -> str:
    """The noise that a router adds in training: `learned`, `fixed`, `jitter` or `none`."""
    return getattr(router, "noise", "none")


@contextmanager
def noise_of_training(net: nn.Module, seed: int | None) -> Iterator[None]:
    """Let the routers of `net` that have noise draw it inside the scope; other threads wait for their turn on it.

    Everything else stays as in evaluation, the capacity too. The draw depends on the seed and on the number of tokens
    alone; the process's own generator is left as it was.

    Args:
        net: a model in evaluation.
        seed: of the draw; None for no noise.
    """
    if seed is None:
        yield
        return
    with routing_lock(net), _GENERATOR:
        routers: list[Any] = [layer.router for layer in moe_layers(net) if noise_of(layer.router) != "none"]
        before = [(router.training, router.options) for router in routers]
        devices = {weight.device for weight in net.parameters() if weight.is_cuda}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            try:
                for router in routers:
                    # Not `replace`: without a limit in evaluation the options' check would refuse those of a limit.
                    router.options = copy.copy(router.options)
                    router.options.capacity_factor = router.options.eval_capacity_factor
                    router.training = True
                yield
            finally:
                for router, (training, options) in zip(routers, before, strict=True):
                    router.training, router.options = training, options
