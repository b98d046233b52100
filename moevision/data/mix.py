"""Mixup and CutMix: pictures of a batch blended or pasted into each other, with soft targets.

Sources: Mixup arXiv:1710.09412, CutMix arXiv:1905.04899; torchvision's ``v2.MixUp`` and ``v2.CutMix`` do the work.

Axis legend: B batch, C classes, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from moevision.data.keyed import seeded_torch

_STREAM = 2  # other than those of augment.py


class BatchMixer:
    """Mixup and/or CutMix of a whole batch, with soft targets; decided by (seed, epoch, first index)."""

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        """Choose the mixers.

        Args:
            mixup: alpha of Mixup's Beta distribution; 0 turns Mixup off.
            cutmix: alpha of CutMix's Beta distribution; 0 turns CutMix off.
            num_classes: number of classes, C.
        """
        self.mixers: list[v2.Transform] = []
        if mixup > 0:
            self.mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            self.mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, image: Tensor, label: Tensor, seed: int, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Mix every picture with its neighbour in the batch.

        Args:
            image: float32 [B, 3, H, W].
            label: int64 [B], hard.
            seed: seed of the run.
            epoch: epoch number.
            index: index of the batch's first picture.

        Returns:
            Mixed image float32 [B, 3, H, W] and soft target float32 [B, C], whose rows sum to 1.
        """
        with seeded_torch(seed, _STREAM, epoch, index):
            choice = int(torch.randint(len(self.mixers), ())) if len(self.mixers) > 1 else 0
            image, target = self.mixers[choice](image, label)
        return image, target
