"""How a model is packed into eight bits: rounded to whole steps, so that its layers answer as they did."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.demo import packed
from benchmarks.demo.packed import compensated, input_products, nearest, pack, pack_folder
from moevision.analysis.collect import network_input
from moevision.analysis.images import open_pictures, read_images
from moevision.models.io import load_model, unpack
from moevision.models.safe_files import PACKED, SCALE
from tests.models.test_packed import two_that_share

EXPERTS, ROUTER = "blocks.1.mlp.experts.fc1.weight", "blocks.1.mlp.router.weight"


@pytest.fixture
def folder(saved_model: Path, drawn_pets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny run's model, packed down to its small matrices."""
    monkeypatch.setattr(packed, "SMALLEST", 256)
    monkeypatch.setattr(packed.pack, "__kwdefaults__", {"group": 8, "levels": 127})
    pack_folder(saved_model, str(drawn_pets))
    return saved_model


def test_parts_of_a_row_are_rounded_to_whole_steps_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of .5 and 1 in the first row; zeros have no step."""
    monkeypatch.setattr(packed, "SMALLEST", 1)
    stored = pack(
        {"fc.weight": torch.tensor([[-63.5, 0.7, 127.0, 0.7], [0.0, 0.0, 0.0, 0.0]])}, group=2
    )
    assert stored["fc.weight"].tolist() == [[-127, 1, 127, 1], [0, 0, 0, 0]]
    assert stored["fc.weight"].dtype == torch.int8
    assert stored["fc.weight.scale"][0].tolist() == [0.5, 1.0]
    assert stored["fc.weight.scale"].dtype == torch.bfloat16


@pytest.mark.parametrize("group", [None, 32])
def test_no_weight_moves_by_more_than_half_a_step(group: int | None, tmp_path: Path) -> None:
    """q = round(w / s), and |w - q s| <= s / 2 but for the largest, whose step bfloat16 may have made 1/256 smaller."""
    weight = torch.randn(4, 64, 96, generator=torch.Generator().manual_seed(0))
    weight[2] *= 100
    stored = pack({"experts.fc1.weight": weight}, group=group)
    scale = stored["experts.fc1.weight.scale"]
    parts = weight.reshape(4, 64, -1, group or 96).abs().amax(-1)
    assert torch.equal(scale, (parts / 127).bfloat16())
    save_file(stored, tmp_path / PACKED)
    back = unpack(tmp_path / PACKED)
    assert [*back] == ["experts.fc1.weight"]
    assert back["experts.fc1.weight"].dtype == torch.float32
    steps = scale.float().repeat_interleave(group or 96, -1)
    assert torch.equal(stored["experts.fc1.weight"].float() * steps, back["experts.fc1.weight"])
    error = (back["experts.fc1.weight"] - weight).abs() / steps
    assert float(error[weight.abs() < 126 * steps].max()) <= 0.5001
    assert float(error.max()) < 1
    assert float(error.mean()) == pytest.approx(0.25, abs=0.01)  # uniform over half a step


def test_an_error_is_made_up_for_by_inputs_that_go_along() -> None:
    """Two inputs that are always equal, weights 0.4 and 0.4 in steps of 1: the sum .8 is nearer to 1 than to 0."""
    weight, steps = torch.tensor([[0.4, 0.4]]), torch.ones(1, 2)
    assert nearest(weight, steps).tolist() == [[0, 0]]
    assert compensated(weight, steps, torch.ones(2, 2)).tolist() == [[0, 1]]
    assert compensated(weight, steps, torch.eye(2)).tolist() == [[0, 0]]  # independent inputs


def test_products_are_those_of_the_inputs(tiny_run: Path) -> None:
    """Of the classifier, which reads the mean of the normed tokens."""
    model = load_model(str(tiny_run))
    pictures = open_pictures("synthetic_pets", 32, limit=40)
    with torch.no_grad():
        images = network_input(model, read_images(pictures, range(40)))
        features = model.net.forward_head(model.net.forward_features(images), pre_logits=True)
    found = input_products(model, pictures)
    assert torch.allclose(found["head.weight"], features.T @ features, rtol=1e-4, atol=1e-4)
    assert EXPERTS not in found


def test_small_tensors_and_what_is_no_matrix_stay(folder: Path) -> None:
    stored = load_file(folder / PACKED)
    assert stored[EXPERTS].dtype == torch.int8
    assert stored[ROUTER].dtype == torch.bfloat16
    assert stored["patch_embed.backbone.0.bn.num_batches_tracked"].dtype == torch.int64
    whole = {name for name, value in stored.items() if value.dtype == torch.int8}
    assert {name.removesuffix(SCALE) for name in stored if name.endswith(SCALE)} == whole
    assert not [
        name
        for name, value in stored.items()
        if value.dtype == torch.float32 and not name.endswith(SCALE)
    ]


def test_what_two_models_share_is_packed_once(folder, drawn_pets: Path, tmp_path: Path) -> None:
    two_that_share(folder, tmp_path, lambda two, rest: pack_folder(two, str(drawn_pets), rest=rest))
