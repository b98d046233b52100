"""Which operations reach torch's kernels."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = "view t transpose unbind split split_with_sizes expand select slice detach unsqueeze squeeze alias as_strided"
VIEWS += " _unsafe_view permute"


class Operations(TorchDispatchMode):
    """Counts them, without views, and the numbers written by each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS.split():
            self.calls[name] += 1
            outputs = out if isinstance(out, tuple) else (out,)
            self.written[name] += sum(x.numel() for x in outputs if torch.is_tensor(x))
        return out
