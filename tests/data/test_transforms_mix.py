"""Mixtures are functions of (seed, epoch, index of the first image); their targets say what is in them."""

import torch

from moevision.data.transforms import BatchMixer, hash_u64, seeded_torch


def batch(size: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % classes


def test_mixup_by_hand():
    image, label = batch()
    mixed, target = BatchMixer(0.8, 0.0, 4)(image, label, 3, 2, 17)
    # The share is drawn from Beta(0.8, 0.8) with the generator that the key seeds (stream 2 is mixing).
    with seeded_torch(hash_u64(3, 2, 2, 17)):
        share = torch.distributions.Beta(torch.tensor([0.8]), torch.tensor([0.8])).sample().item()
    neighbour = image.roll(1, 0)
    torch.testing.assert_close(mixed, share * image + (1 - share) * neighbour)
    one_hot = torch.nn.functional.one_hot(label, 4).float()
    torch.testing.assert_close(target, share * one_hot + (1 - share) * one_hot.roll(1, 0))


def test_cutmix_target_is_the_pasted_area():
    image, label = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone(), torch.arange(4)
    mixed, target = BatchMixer(0.0, 1.0, 4)(image, label, 0, 0, 1)
    for row in range(4):
        kept = (mixed[row, 0] == row).float().mean()
        torch.testing.assert_close(target[row, row], kept)
    assert 0 < kept < 1


def test_with_both_each_batch_gets_one_of_the_two():
    image, label = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone(), torch.arange(4)
    mixer = BatchMixer(1.0, 1.0, 4)
    # CutMix copies pixels, so only whole numbers remain; Mixup blends them.
    pasted = [
        bool((out == out.round()).all())
        for out, _ in (mixer(image, label, 0, 0, i) for i in range(60))
    ]
    assert 15 < sum(pasted) < 45
