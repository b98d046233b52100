"""Shares of patches in logits: by hand, sums in float64, every kind of classifier, and those that have none."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close

import moevision.models  # noqa: F401 -- registers the names
from moevision.models.shares import PatchShares, patch_shares


def net_of(**options: object) -> nn.Module:
    """A tiny ViT in float64 of 4 patches, 3 classes, whose norms and biases aren't those that they start with."""
    torch.manual_seed(0)
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    net = VisionTransformer(**{**arguments, "num_classes": 3, "global_pool": "avg", **options})
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net.double().eval()


IMAGES = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens_of(vectors: list[list[float]]) -> torch.Tensor:
    return torch.tensor([vectors], dtype=torch.float64)


def by_hand(norm: nn.Module, **options: object) -> nn.Module:
    """Two channels, two classes: class 0 reads the first channel, class 1 the second doubled; biases 10 and 20."""
    net = net_of(embed_dim=2, num_heads=1, num_classes=2, **options)
    net.fc_norm = norm.double()
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        net.head.bias.copy_(torch.tensor([10.0, 20.0]))
    return net


def test_by_hand_with_the_norm_before_the_mean() -> None:
    """A quarter of what each class reads of each of four patches; the class token isn't in the mean."""
    tokens = tokens_of([[99, 99], [4, 0], [0, 8], [8, 8], [0, 0]])
    shares = patch_shares(by_hand(nn.Identity(), class_token=True), tokens)
    assert shares.patches.tolist() == [[[1, 0], [0, 4], [2, 4], [0, 0]]]
    assert shares.prefix.tolist() == [[0, 0]]
    assert shares.bias.tolist() == [10, 20]
    # Logits 13 and 28: class 1 is the likeliest.
    assert shares.margins().tolist() == [[-1, 4, 2, 0]]


def test_by_hand_with_the_class_token_in_the_mean() -> None:
    """A fifth of each; the class token's share is told apart."""
    tokens = tokens_of([[5, 10], [5, 0], [0, 5], [10, 10], [0, 0]])
    shares = patch_shares(by_hand(nn.Identity(), pool_include_prefix=True), tokens)
    assert_close(shares.patches[0], torch.tensor([[1, 0], [0, 2], [2, 4], [0, 0]]).double())
    assert_close(shares.prefix[0], torch.tensor([1.0, 4.0]).double())


def test_by_hand_with_the_norm_behind_the_mean() -> None:
    """The mean (4, 2) is 3 on average with variance 1; with eps 3 all is divided by the root of 4."""
    norm = nn.LayerNorm(2, eps=3.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.25]))
    tokens = tokens_of([[99, 99], [8, 0], [0, 8], [8, 0], [0, 0]])
    shares = patch_shares(by_hand(norm, class_token=True), tokens)
    # The patch (8, 0) minus its mean is (4, -4), a quarter (1, -1), halved (.5, -.5), by the norm's weights (1.5, -.5).
    of_first = [1.5, -1]
    expected = torch.tensor([of_first, [-1.5, 1], of_first, [0, 0]])
    assert_close(shares.patches[0], expected.double())
    assert shares.bias.tolist() == [10.5, 20.5]


HEADS = {
    "norm before": {"fc_norm": False},
    "norm behind": {"fc_norm": True},
    "class token in the mean": {"pool_include_prefix": True},
    "class token in the mean, norm behind": {"pool_include_prefix": True, "fc_norm": True},
    "registers in the mean": {"reg_tokens": 3, "pool_include_prefix": True},
    "no class token": {"class_token": False},
    "both norms": {"fc_norm": True, "final_norm": True},
    "no norm": {"fc_norm": False, "final_norm": False},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_shares_sum_to_the_logits(options) -> None:
    """In float64 to 1e-9, with logits of the model's own forward pass; each image as if it were alone."""
    net = net_of(**options)
    with torch.no_grad():
        tokens = net.forward_features(IMAGES)
        logits = net(IMAGES)
        shares = patch_shares(net, tokens)
        alone = patch_shares(net, tokens[2:3])
    assert shares.patches.shape == (5, 4, 3)
    assert_close(shares.patches.sum(1) + shares.prefix + shares.bias, logits, rtol=0, atol=1e-9)
    assert bool(shares.prefix.any()) == bool(options.get("pool_include_prefix"))
    assert_close(alone.patches[0], shares.patches[2], rtol=0, atol=1e-12)

    best, second = logits.topk(2).indices.T
    rows = torch.arange(5)
    expected = shares.patches[rows, :, best] - shares.patches[rows, :, second]
    assert_close(shares.margins(), expected)


def test_a_head_without_a_bias_and_a_norm_without_weights() -> None:
    net = net_of(fc_norm=True)
    net.head = nn.Linear(12, 3, bias=False).double()
    net.fc_norm = nn.LayerNorm(12, elementwise_affine=False).double()
    with torch.no_grad():
        shares = patch_shares(net, net.forward_features(IMAGES))
        assert_close(shares.patches.sum(1) + shares.bias, net(IMAGES), rtol=0, atol=1e-9)
    assert not shares.bias.any()


def test_one_class_has_its_own_logit() -> None:
    shares = PatchShares(torch.ones(2, 4, 1), torch.zeros(2, 1), torch.zeros(1))
    assert_close(shares.margins(), torch.ones(2, 4))


@pytest.mark.parametrize("name", ["test_vit_moe", "vit_moe_tiny_patch16_224"])
def test_a_model_with_experts(name) -> None:
    net = timm.create_model(name, num_classes=4, global_pool="avg").double().eval()
    side = net.patch_embed.img_size[0]
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        shares = patch_shares(net, net.forward_features(x))
        total = shares.patches.sum(1) + shares.prefix + shares.bias
        assert_close(total, net(x), rtol=0, atol=1e-9)
