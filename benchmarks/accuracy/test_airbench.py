"""The reference from outside: what the paper says of its net, its augmentation and its schedule."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.accuracy import airbench


@pytest.fixture
def images():
    return torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_net_has_the_papers_convolutions(images):
    """3x3 convolutions 24-64-64-256-256-256-256, biases of six norms and of the whitening, classifier 256 x 10."""
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    net = airbench.Airbench(images)
    trained = sum(value.numel() for value in net.parameters() if value.requires_grad)
    assert trained == convolutions + 2 * (64 + 256 + 256) + 24 + 2560
    assert net(images).shape == (64, 10)
    batch = torch.rand(2, 64, 8, 8)
    first = net.groups[1][0]
    assert torch.allclose(
        first(batch)[:, :64], batch, atol=1e-6
    )  # its first filters hand the channels on


def test_whitened_patches_are_uncorrelated_and_of_unit_size(images):
    responses = (
        F.conv2d(images, airbench.whitening(images)[:12])
        .permute(0, 2, 3, 1)
        .reshape(-1, 12)
        .double()
    )
    second_moments = responses.T @ responses / len(responses)
    assert torch.allclose(
        second_moments, torch.eye(12, dtype=torch.float64), atol=0.02
    )  # ε takes up to 2 %


def test_an_image_is_shifted_and_mirrored_in_every_other_epoch(images):
    mirrored = torch.arange(64) % 2 == 0
    for epoch in (0, 1):
        found = airbench.augment(images, epoch, mirrored, torch.Generator().manual_seed(1))
        for index in range(64):
            image = images[index : index + 1]
            given = image.flip(-1) if (index + epoch) % 2 == 0 else image
            border = F.pad(given, [2] * 4, mode="reflect")[0]
            shifts = [
                border[:, row : row + 32, column : column + 32]
                for row in range(5)
                for column in range(5)
            ]
            assert sum(torch.equal(found[index], shift) for shift in shifts) == 1


def test_the_learning_rate_is_a_triangle():
    """Of 426 steps (9.9 epochs of 43 batches of 1,024), the 97th is at the peak."""
    paces = [airbench.pace(step, 426) for step in range(426)]
    assert max(paces) == paces[97] == 1
    assert paces[0] == pytest.approx(0.2)
    assert paces[-1] == pytest.approx(0.07 + 0.93 / 329)


def test_lookahead_ends_at_its_average():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    average = airbench.Lookahead(net)
    net.weight.data.fill_(1.0)
    average.update(net, 0.75)
    assert net.weight.item() == 0.25
    net.weight.data.fill_(9.0)
    average.update(net, 1.0)
    assert net.weight.item() == 0.25


def test_it_learns_what_two_colours_tell(monkeypatch):
    """Red and blue images, a narrow net, five epochs of six steps: only a training that works tells them apart."""
    monkeypatch.setattr(airbench, "BATCH", 64)
    monkeypatch.setattr(airbench, "WIDTHS", (24, 24, 24))
    labels = torch.arange(384) % 2
    colours = torch.zeros(384, 3, 32, 32)
    colours[labels == 0, 0] = colours[labels == 1, 2] = 1.0
    colours += 0.1 * torch.randn(colours.shape, generator=torch.Generator().manual_seed(0))
    net = airbench.train(colours, labels, 0, epochs=5, precision=torch.float32)
    assert airbench.evaluate(net, colours[:256], labels[:256]) == {
        "total": 256,
        "correct": 256,
        "correct_of_views": 256,
    }
