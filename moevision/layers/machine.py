"""What the machine's processor can do, as far as the layers' measured rules depend on it."""

from __future__ import annotations

import os
from functools import cache

import torch


@cache
def has_matrix_unit() -> bool:
    """Whether this CPU multiplies bfloat16 tiles in a unit of its own (Intel's AMX), and oneDNN may use it.

    The environment variable `ONEDNN_MAX_CPU_ISA` can take it away, as it does for oneDNN.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if allowed not in ("DEFAULT", "ALL") and "AMX" not in allowed:
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every torch that we allow
    return capabilities is not None and bool(capabilities().get("amx_bf16", False))
