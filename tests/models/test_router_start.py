"""Routers that start from clusters: the clusters are found, and every unit goes to the expert of its own."""

import pytest
import timm
import torch
from torch.nn import functional as F

from moevision import convert_to_moe, forward_routing
from moevision.layers import CosineRouter, moe_layers
from moevision.models.convert import routes_read
from moevision.models.upcycle import (
    initial_output_difference,
    spherical_kmeans,
    start_routers,
    upcycle,
)
from tests.shared import SMALL_VIT

EXPERTS, IMAGES, TOKENS = 4, 24, 17
ROUTERS = ["noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "cosine"]


def images():
    generator = torch.Generator().manual_seed(2)
    colour = torch.randn(IMAGES, 3, 1, 1, generator=generator)
    return colour + 0.5 * torch.randn(IMAGES, 3, 32, 32, generator=generator)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL_VIT).eval()


def planted(seed):
    """Four groups of directions of very different sizes and lengths, in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(8, dtype=torch.float64)[:4]
    label = torch.arange(4).repeat_interleave(torch.tensor([10, 20, 40, 80]))
    label = label[torch.randperm(len(label), generator=generator)]
    noise = 0.15 * torch.randn(len(label), 8, dtype=torch.float64, generator=generator)
    length = torch.rand(len(label), 1, dtype=torch.float64, generator=generator) * 9 + 1
    return (centres[label] + noise) * length, label, generator


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed):
    x, label, generator = planted(seed)
    best = max(
        (spherical_kmeans(x, 4, generator) for _ in range(4)),
        key=lambda found: float((F.normalize(x, dim=-1) @ found[0].T).amax(-1).sum()),
    )
    found = (F.normalize(x, dim=-1) @ best[0].T).argmax(-1)
    pairs = {(int(mine), int(theirs)) for mine, theirs in zip(found, label, strict=True)}
    assert len(pairs) == 4, "each found cluster is one planted one"
    assert sorted(best[1].tolist()) == [10, 20, 40, 80]
    torch.testing.assert_close(best[0].norm(dim=-1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("unit", ["token", "image"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_unit_goes_to_its_cluster(dense, router, unit):
    """Equal experts with gates of 1 leave the second layer's input as it was: its clusters are exact too."""
    net = upcycle(
        dense, layers="last2", num_experts=EXPERTS, router=router, top_k=1, route_by=unit
    ).eval()
    before = [layer.router.state_dict() for layer in moe_layers(net)]
    shares = start_routers(net, images().split(8))
    assert list(shares) == [1, 3]
    with torch.no_grad():
        routings = forward_routing(net, images())[1]
    for routing, share in zip(routings, shares.values(), strict=True):
        counts = routing.counts()
        assert counts.tolist() == pytest.approx([each * IMAGES * TOKENS for each in share])
        assert counts.min() > 0
        assert (routing.route_by == "image") == (unit == "image")
    assert initial_output_difference(dense, net, images()).max_logit < 1e-5
    for layer, routing, old in zip(moe_layers(net), routings, before, strict=True):
        if not isinstance(layer.router, CosineRouter):
            assert float(routing.logits.std(-1, correction=0).mean()) == pytest.approx(1, rel=1e-3)
            torch.testing.assert_close(
                layer.router.weight.mean(0), torch.zeros(32), rtol=0, atol=1e-6
            )
        assert all(
            torch.equal(layer.router.state_dict()[name], old[name])
            for name in old
            if "noise" in name
        )


def test_the_seed_decides_and_nothing_else_changes(dense):
    one, two, other = (
        upcycle(dense, num_experts=EXPERTS, route_by="image").train() for _ in range(3)
    )
    kept = {name: value.clone() for name, value in one.state_dict().items()}
    state = torch.get_rng_state()
    start_routers(one, [images()], seed=1)
    torch.rand(3)
    start_routers(two, [images()], seed=1)
    start_routers(other, [images()], seed=2)
    assert one.training
    torch.set_rng_state(state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
        assert torch.equal(value, kept[name]) == ("router" not in name)
    assert not all(
        torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items()
    )


def test_no_more_batches_are_read_than_needed(dense, monkeypatch):
    from moevision.models import upcycle as module

    monkeypatch.setattr(module, "_MAX_UNITS", {"token": 100, "image": 10})
    read = []

    def batches():
        for batch in images().split(6):
            read.append(len(batch))
            yield batch

    start_routers(upcycle(dense, num_experts=EXPERTS), batches())
    assert read == [6], "6 images of 17 tokens are 102"
    start_routers(upcycle(dense, num_experts=EXPERTS, route_by="image"), batches())
    assert read == [6, 6, 6]


def converted():
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT)
    return convert_to_moe(vit, "every2", EXPERTS, router="vmoe_top_k")


def test_a_layer_in_training_mode_is_clustered_without_its_noise():
    net, twin = converted(), converted()
    twin.load_state_dict(net.state_dict())
    assert start_routers(net.train(), [images()]) == start_routers(twin.eval(), [images()])


def test_each_part_stays_in_its_own_mode():
    """A block that is held in evaluation, as a frozen one is, was in training afterwards."""
    net = converted()
    net.train().blocks[0].eval()
    modes = [module.training for module in net.modules()]
    for call in (
        lambda: start_routers(net, [images()]),
        lambda: initial_output_difference(net, net, images()),
        lambda: routes_read(net),
    ):
        call()
        assert [module.training for module in net.modules()] == modes
