"""The logit lens: what the classifier's head says after every block (nostalgebraist, "interpreting GPT", 2020).

Final norm, pooling and head are applied to the output of each block as they are. They were trained for the last one
alone, so what they say of an earlier one is an untrained readout.

Axes: L blocks, N tokens, D width, C classes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moevision.layers import routing_lock


@contextmanager
def block_outputs(net: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what the blocks of `net` give, each [1, N, D] for one image; in this thread, and until the scope closes.

    Yields:
        A list that fills in order of depth while the model runs; it stays empty where a network has no blocks.
    """
    outputs: list[Tensor] = []
    thread = threading.get_ident()

    def keep(_module: nn.Module, _given: tuple[Any, ...], result: Tensor) -> None:
        if threading.get_ident() == thread:
            outputs.append(result)

    with routing_lock(net):
        hooks = [block.register_forward_hook(keep) for block in getattr(net, "blocks", ())]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


@torch.inference_mode()
def lens(net: Any, outputs: list[Tensor]) -> Tensor | None:
    """Logits [L, C] of the head after each block; the last row is the model's own. None without blocks."""
    if not outputs:
        return None
    return torch.cat([net.forward_head(net.norm(output)) for output in outputs])
