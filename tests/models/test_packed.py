"""Weights in eight bits: rounded to the nearest step, multiplied out when loaded, refused when they don't fit."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from benchmarks.demo import packed
from benchmarks.demo.packed import pack, pack_folder
from moevision import UserError
from moevision.models.io import create_from, load_model, save_model, unpack
from moevision.models.safe_files import PACKED, SCALE, weights_of
from moevision.train.start import weights_file

EXPERTS, ROUTER = "blocks.1.mlp.experts.fc1.weight", "blocks.1.mlp.router.weight"


@pytest.fixture
def folder(saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny run's model, packed down to its small matrices."""
    monkeypatch.setattr(packed, "SMALLEST", 256)
    pack_folder(saved_model)
    return saved_model


def test_each_row_is_rounded_to_whole_steps_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row [-127, 1.4, 0.6] steps of .5 each, and one of zeros, which has no step."""
    monkeypatch.setattr(packed, "SMALLEST", 1)
    stored = pack({"fc.weight": torch.tensor([[-63.5, 0.7, 0.3], [0.0, 0.0, 0.0]])})
    assert stored["fc.weight"].tolist() == [[-127, 1, 1], [0, 0, 0]]
    assert stored["fc.weight"].dtype == torch.int8
    assert stored["fc.weight.scale"][0].tolist() == [0.5]
    assert stored["fc.weight.scale"].shape == (2, 1)


@pytest.mark.parametrize("levels", [127, 31])
def test_no_weight_moves_by_more_than_half_a_step(levels: int, tmp_path: Path) -> None:
    """Stacked experts have a scale per expert and output channel; the largest of each row is met."""
    weight = torch.randn(4, 64, 96, generator=torch.Generator().manual_seed(0))
    weight[2] *= 100
    stored = pack({"experts.fc1.weight": weight}, levels)
    scale = stored["experts.fc1.weight.scale"]
    assert torch.equal(scale, weight.abs().amax(-1, keepdim=True) / levels)
    assert int(stored["experts.fc1.weight"].abs().max()) == levels
    save_file(stored, tmp_path / PACKED)
    back = unpack(tmp_path / PACKED)
    assert [*back] == ["experts.fc1.weight"]
    assert back["experts.fc1.weight"].dtype == torch.float32
    error = (back["experts.fc1.weight"] - weight).abs()
    assert bool((error <= 0.5001 * scale).all())
    assert float((error / scale).mean()) == pytest.approx(0.25, abs=0.01)  # uniform over half a step


def test_small_tensors_and_what_is_no_matrix_stay(folder: Path) -> None:
    stored = load_file(folder / PACKED)
    assert stored[EXPERTS].dtype == torch.int8
    assert stored[ROUTER].dtype == torch.bfloat16
    assert stored["patch_embed.backbone.0.bn.num_batches_tracked"].dtype == torch.int64
    whole = {name for name, value in stored.items() if value.dtype == torch.int8}
    assert {name.removesuffix(SCALE) for name in stored if name.endswith(SCALE)} == whole
    assert not [name for name, value in stored.items() if value.dtype == torch.float32 and not name.endswith(SCALE)]


def test_a_packed_model_is_loaded_as_any_other(tiny_run: Path, folder: Path) -> None:
    """In float32, whole steps exactly, with its temperature and names; nothing is kept beside the model."""
    before, after = load_model(str(tiny_run)), load_model(str(folder))
    assert (after.class_names, after.image_size, after.temperature) == (
        before.class_names, before.image_size, before.temperature,
    )  # fmt: skip
    stored, state = load_file(folder / PACKED), after.net.state_dict()
    assert torch.equal(state[EXPERTS], stored[EXPERTS].float() * stored[EXPERTS + SCALE])
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert "state_dict" not in after.net.pretrained_cfg
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (after.net(images) - before.net(images)).abs().max() < 0.05


def test_another_class_count_and_size_are_timms(folder: Path) -> None:
    net = create_from(folder, 3, 64)
    assert torch.equal(net.state_dict()[EXPERTS], unpack(folder / PACKED)[EXPERTS])
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_saved_again_it_is_in_timms_format(folder: Path, tmp_path: Path) -> None:
    """And alone timm refuses the packed file, also where it would let weights be missing."""
    for options in ({}, {"num_classes": 3}):
        with pytest.raises(RuntimeError, match="No suitable checkpoints"):
            timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    model = load_model(str(folder))
    save_model(model, tmp_path / "plain")
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.net.state_dict().items())


def test_timms_own_file_comes_first(tiny_run: Path, folder: Path) -> None:
    assert weights_of(folder) == weights_file(str(folder)) == folder / PACKED
    shutil.copyfile(tiny_run / "model" / "model.safetensors", folder / "model.safetensors")
    assert weights_of(folder) == folder / "model.safetensors"
    assert torch.equal(
        load_model(str(folder)).net.state_dict()[EXPERTS], load_model(str(tiny_run)).net.state_dict()[EXPERTS]
    )


HOSTILE = {
    "no scale": (EXPERTS + SCALE, None, "holds whole numbers"),
    "a scale without values": (EXPERTS, None, "its scale don't fit"),
    "a scale along the other axis, which would unfold to terabytes": (
        EXPERTS + SCALE, torch.ones(1, 2**20, 1, 1), "its scale don't fit"
    ),
    "a scale for every value": (EXPERTS + SCALE, torch.ones(4, 2, 3), "its scale don't fit"),
    "a scale of whole numbers": (EXPERTS + SCALE, torch.ones(4, 64, 1, dtype=torch.int8), "its scale don't fit"),
    "no numbers": (EXPERTS + SCALE, "nan", "holds NaN or infinity"),
    "another shape": (EXPERTS, "cut", "can't be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_does_not_fit_is_one_sentence(what: str, folder: Path) -> None:
    name, value, said = HOSTILE[what]
    stored = load_file(folder / PACKED)
    if value == "nan":
        value = torch.full_like(stored[name], float("nan"))
    elif value == "cut":
        stored[name + SCALE], value = stored[name + SCALE][:1].clone(), stored[name][:1].clone()
    stored.pop(name)
    save_file(stored if value is None else {**stored, name: value}, folder / PACKED)
    with pytest.raises(UserError, match=said):
        load_model(str(folder))


def test_a_damaged_file_is_one_sentence(folder: Path) -> None:
    data = (folder / PACKED).read_bytes()
    for damaged in (b"", data[:-8], data + b"x", data[:20]):
        (folder / PACKED).write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.int8 can't be loaded"):
            load_model(str(folder))
    (folder / PACKED).unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_model(str(folder))
