"""Kappa, CKA, matched experts, and consistency under flip and shift: invariances and independent implementations."""

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import cohen_kappa_score
from torch import nn

from moevision import forward_routing
from moevision.analysis import open_pictures
from moevision.analysis.agreement import (
    cohen_kappa,
    consistency,
    expert_similarity,
    first_choices,
    linear_cka,
    match_experts,
    overlap,
    pair_counts,
    shifted_crop,
)
from moevision.analysis.collect import layer_inputs, network_input
from moevision.analysis.images import Remembered
from moevision.data import SyntheticPets
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.io import SavedModel


def image_patches(image, grid):
    """[P, side, side, 3]."""
    (rows, columns), side = grid, image.shape[0] // grid[0]
    return image.reshape(rows, side, columns, -1, 3).swapaxes(1, 2).reshape(rows * columns, side, -1, 3)


@pytest.fixture(scope="module")
def pictures():
    return open_pictures(SyntheticPets(24, 32, 0, "test"), 32)


@pytest.fixture(scope="module")
def model(pictures):
    torch.manual_seed(0)
    net = timm.create_model("test_vit_moe", num_classes=8)
    model = SavedModel(net.eval(), list(SyntheticPets.classes), 32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    pixels = network_input(model, np.stack([pictures.image(index) for index in range(24)]))
    for layer in moe_layers(net):
        # Blind to what all tokens share, so that patches go different ways.
        nn.init.normal_(layer.router.weight)
        common = nn.functional.normalize(layer_inputs(net, pixels)[layer.layer_index].mean((0, 1)), dim=0)
        with torch.no_grad():
            layer.router.weight -= torch.outer(layer.router.weight @ common, common)
    return model


def test_kappa_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(5, size=400)
    b = np.where(rng.random(400) < 0.6, a, rng.integers(5, size=400))
    table = pair_counts(a, b, 5)
    assert cohen_kappa(table) == pytest.approx(cohen_kappa_score(a, b))
    np.testing.assert_allclose(cohen_kappa(np.stack([table, table.T])), cohen_kappa(table))
    assert cohen_kappa(np.array([[7, 0], [0, 0]])) == 0  # both always say the same: nothing to agree beyond
    assert cohen_kappa(np.diag([3, 4])) == 1


def test_cka_is_blind_to_rotation_scale_and_shift_only() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(300, 8)), rng.normal(size=(300, 5))
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    assert linear_cka(x, x * np.array([5, 1, 1, 1, 1, 1, 1, 1])) < 0.9
    assert linear_cka(x, np.ones((300, 3))) == 0
    # against its definition by Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))
    centre = np.eye(300) - 1 / 300
    k, other = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert linear_cka(x, y) == pytest.approx((k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum()))


def test_renamed_experts_are_matched_and_independent_ones_dont_agree(make_trace) -> None:
    rng = np.random.default_rng(2)
    chosen, order = rng.integers(5, size=(60, 16)), np.array([3, 0, 4, 1, 2])

    def layer(choices):
        return make_trace(choices[..., None], labels=np.zeros(60, int), num_experts=5, grid=(4, 4)).layers[0]

    match = match_experts(layer(chosen), layer(order[chosen]))
    assert match.order == tuple(order)
    assert (match.agreement, match.kappa) == (1, 1)
    independent = match_experts(layer(chosen), layer(rng.integers(5, size=(60, 16))))
    # measured on the half that the pairing wasn't chosen on: no luck of the best of 5! pairings
    assert abs(independent.kappa) < 3 / np.sqrt(5 * independent.n_images * 16)
    with pytest.raises(UserError, match="same images"):
        match_experts(
            layer(chosen), make_trace(chosen[:9, :, None], labels=[0] * 9, num_experts=5, grid=(4, 4)).layers[0]
        )


def test_flipped_pictures_are_compared_patch_by_patch(model, pictures) -> None:
    # Images that are their own mirror image route alike after the flip, whatever the router.
    class Symmetric(Remembered):
        def image(self, index):
            half = super().image(index)[:, :16]
            return np.concatenate([half, half[:, ::-1]], axis=1)

    choices, grid, num_experts = first_choices(model, np.stack([Symmetric(pictures).image(i) for i in range(24)]))
    assert (grid, num_experts) == ((4, 4), {1: 4, 3: 4})
    # so their agreement is that of a routing map with its own mirror image
    for found in consistency(model, Symmetric(pictures), num_resamples=50):
        if found.change == "flip":
            first = choices[found.layer]
            expected = cohen_kappa_score(first.ravel(), first[:, :, ::-1].ravel())
            assert found.kappa == pytest.approx(expected)
            assert found.agreement == pytest.approx((first == first[:, :, ::-1]).mean())
            assert found.low <= found.kappa <= found.high


def test_shifted_crop_shows_the_same_patches() -> None:
    images = np.random.default_rng(3).integers(256, size=(2, 32, 32, 3)).astype(np.uint8)
    moved = shifted_crop(images, (4, 4), (1, 2))
    assert moved.shape == images.shape
    assert (moved[:, :24, :16] == images[:, 8:, 16:]).all()
    patch = np.arange(16).reshape(1, 4, 4)
    before, after = overlap(patch, patch, (1, 2))
    for old, new in zip(before[0].ravel(), after[0].ravel(), strict=True):
        assert (image_patches(images[0], (4, 4))[old] == image_patches(moved[0], (4, 4))[new]).all()
    with pytest.raises(UserError, match="1 or 2"):
        shifted_crop(images, (4, 4), (4, 0))


def test_a_router_that_follows_position_or_content(model, pictures, monkeypatch) -> None:
    def by(rule):
        monkeypatch.setattr(
            "moevision.analysis.agreement.first_choices", lambda _, images: ({1: rule(images)}, (4, 4), {1: 4})
        )
        return {found.change: found.kappa for found in consistency(model, pictures, num_resamples=20)}

    def brightness(images):
        means = np.stack([image_patches(image, (4, 4)).mean((1, 2, 3)) for image in images])
        return (np.digitize(means, [80, 120, 160])).reshape(-1, 4, 4)

    assert by(brightness) == pytest.approx({"flip": 1, "shift": 1})
    columns = by(lambda images: np.broadcast_to(np.arange(4), (len(images), 4, 4)))
    assert columns["flip"] == pytest.approx(-1 / 3)  # never the same of four: (0 - 1/4) / (1 - 1/4)
    assert columns["shift"] < 0


def test_layer_inputs_are_what_the_router_sees(model, pictures) -> None:
    images = np.stack([pictures.image(index) for index in range(3)])
    pixels = network_input(model, images)
    _, routings = forward_routing(model.net, pixels)
    received = layer_inputs(model.net, pixels)
    assert list(received) == [routing.layer for routing in routings]
    for layer, routing in zip(moe_layers(model.net), routings, strict=True):
        logits = received[routing.layer] @ layer.router.weight.detach().T
        torch.testing.assert_close(logits, routing.logits[:, routing.num_prefix_tokens :].detach())
        assert not layer._forward_pre_hooks  # nothing is left behind


def test_expert_similarity_on_common_tokens(model, pictures) -> None:
    found = expert_similarity(model, pictures, 1, num_tokens=24 * 16)
    np.testing.assert_allclose(found, found.T)
    np.testing.assert_allclose(np.diag(found), 1)
    # all tokens of all images: the same as computed whole
    tokens = layer_inputs(model.net, network_input(model, np.stack([pictures.image(i) for i in range(24)])))[1]
    with torch.inference_mode():
        output = moe_layers(model.net)[0].experts.on_all_tokens(tokens.flatten(0, 1)).numpy()
    assert found[0, 2] == pytest.approx(linear_cka(output[:, 0], output[:, 2]))
    with pytest.raises(UserError, match="no MoE layer"):
        expert_similarity(model, pictures, 0)


def test_pictures_are_read_once_as_long_as_they_fit(pictures) -> None:
    class Counting(Remembered):
        calls = 0

        def image(self, index):
            Counting.calls += 1
            return super().image(index)

    remembered = Remembered(Counting(pictures, 0), max_bytes=32 * 32 * 3 + 5)
    for _ in range(3):
        assert (remembered.image(0) == pictures.image(0)).all()
        assert (remembered.image(1) == pictures.image(1)).all()
    assert Counting.calls == 1 + 3  # the first fits, the second doesn't
    assert (len(remembered), remembered.label(3), remembered.picture_name(3)) == (24, 3, pictures.picture_name(3))
