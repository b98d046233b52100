"""Weights in eight bits: multiplied out when a model is loaded, refused when they don't fit."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from moevision import UserError
from moevision.models.io import create_from, load_model, save_model, unpack
from moevision.models.safe_files import BASE_KEY, PACKED, SCALE, WEIGHTS, weights_of
from moevision.train.start import weights_file

EXPERTS = "blocks.1.mlp.experts.fc1.weight"
GROUP = 8  # inputs that share a step


def pack_folder(folder: Path, *, levels: int = 127, rest: Path | None = None) -> None:
    """Replace a model's weights by the packed file: matrices to the nearest whole step s q, the rest in bfloat16.

    Args:
        folder: of the saved model.
        levels: whole steps on either side of 0.
        rest: a packed model beside it; weights that are equal to its own are left out.
    """
    state, metadata = load_file(folder / WEIGHTS), {}
    if rest is not None:
        known, metadata = unpack(rest / "trained" / PACKED), {BASE_KEY: rest.name}
        state = {
            name: value
            for name, value in state.items()
            if name not in known or not torch.equal(value, known[name])
        }
    stored = {}
    for name, value in state.items():
        is_matrix = name.endswith(".weight") and value.ndim in (2, 3) and value.numel() >= 256
        if is_matrix and value.shape[-1] % GROUP == 0:
            largest = value.unflatten(-1, (-1, GROUP)).abs().amax(-1)
            scale = (largest / levels).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
            steps = scale.float().repeat_interleave(GROUP, -1)
            stored[name] = (value / steps).round().clamp(-levels, levels).to(torch.int8)
            stored[name + SCALE] = scale
        else:
            stored[name] = value.bfloat16() if value.is_floating_point() else value
    save_file(stored, folder / PACKED, metadata=metadata)
    (folder / WEIGHTS).unlink()


@pytest.fixture
def folder(saved_model: Path) -> Path:
    """The tiny run's model, packed down to its small matrices."""
    pack_folder(saved_model)
    return saved_model


def test_a_packed_model_is_loaded_as_any_other(tiny_run, folder):
    """In float32, whole steps exactly, with its temperature and names; nothing is kept beside the model."""
    before, after = load_model(str(tiny_run)), load_model(str(folder))
    assert replace(after, net=before.net) == before
    stored, state = load_file(folder / PACKED), after.net.state_dict()
    assert torch.equal(
        state[EXPERTS],
        stored[EXPERTS].float() * stored[EXPERTS + SCALE].float().repeat_interleave(8, -1),
    )
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert "state_dict" not in after.net.pretrained_cfg
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (after.net(images) - before.net(images)).abs().max() < 0.05


def test_another_class_count_and_size_are_timms(folder):
    net = create_from(folder, 3, 64)
    assert torch.equal(net.state_dict()[EXPERTS], unpack(folder / PACKED)[EXPERTS])
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_saved_again_it_is_in_timms_format(folder, tmp_path):
    """And alone timm refuses the packed file, also where it would let weights be missing."""
    for options in ({}, {"num_classes": 3}):
        with pytest.raises(RuntimeError, match="No suitable checkpoints"):
            timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    model = load_model(str(folder))
    save_model(model, tmp_path / "plain")
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.net.state_dict().items())


def test_timms_own_file_comes_first(tiny_run, folder):
    assert weights_of(folder) == weights_file(str(folder)) == folder / PACKED
    shutil.copyfile(tiny_run / "model" / "model.safetensors", folder / "model.safetensors")
    assert weights_of(folder) == folder / "model.safetensors"
    assert torch.equal(
        load_model(str(folder)).net.state_dict()[EXPERTS],
        load_model(str(tiny_run)).net.state_dict()[EXPERTS],
    )


def two_that_share(folder, home, pack):
    """A packed model, and a second one with other experts and another classifier, which `pack` packs as its rest."""
    one, two = home / "one" / "trained", home / "two" / "trained"
    shutil.copytree(folder, one)
    model = load_model(str(one))
    names = [name for name, _ in model.net.named_parameters()]
    changed = {name for name in names if name.startswith(("blocks.1.mlp.", "head."))}
    for name in changed:
        model.net.get_parameter(name).data.mul_(1.1)
    save_model(model, two)
    pack(two, rest=one.parent)
    stored = load_file(two / PACKED)
    assert {name.removesuffix(SCALE) for name in stored} == changed
    assert int(stored[EXPERTS].abs().max()) == 31
    return one, two, changed


def test_what_two_models_share_is_stored_once(folder, tmp_path):
    """What differs lies alone in the second's file, in 31 steps on either side."""
    one, two, changed = two_that_share(folder, tmp_path, partial(pack_folder, levels=31))
    first, second = (load_model(str(where)).net.state_dict() for where in (one, two))
    assert torch.equal(second[EXPERTS], unpack(two / PACKED)[EXPERTS])
    assert (second[EXPERTS] - 1.1 * first[EXPERTS]).abs().max() < first[EXPERTS].abs().max() / 31
    assert all(
        torch.equal(value, first[name]) for name, value in second.items() if name not in changed
    )
    (one / PACKED).unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_model(str(two))


def scales(*shape: int, value: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> tuple:
    return EXPERTS + SCALE, torch.full(shape, value, dtype=dtype)


UNFIT = "its scale don't fit"
HOSTILE = {
    "no scale": (EXPERTS + SCALE, None, "holds whole numbers"),
    "a scale without values": (EXPERTS, None, UNFIT),
    "a scale that would unfold to terabytes": (*scales(1, 2**20, 1, 1), "don't fit"),
    "scales of other experts": (*scales(5, 64, 4), UNFIT),
    "parts that don't divide a row": (*scales(4, 64, 3), UNFIT),
    "no part": (*scales(4, 64, 0), UNFIT),
    "one number": (*scales(), UNFIT),
    "a scale of whole numbers": (*scales(4, 64, 4, dtype=torch.int8), UNFIT),
    "no numbers": (*scales(4, 64, 4, value=float("nan")), "holds NaN or infinity"),
    "another shape": (EXPERTS, "cut", "can't be loaded"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_does_not_fit_is_one_sentence(what, folder):
    name, value, said = HOSTILE[what]
    stored = load_file(folder / PACKED)
    if value == "cut":
        stored[name + SCALE], value = stored[name + SCALE][:1].clone(), stored[name][:1].clone()
    stored.pop(name)
    save_file(stored if value is None else {**stored, name: value}, folder / PACKED)
    with pytest.raises(UserError, match=said):
        load_model(str(folder))


def test_a_damaged_file_is_one_sentence(folder):
    data = (folder / PACKED).read_bytes()
    for damaged in (b"", data[:-8], data + b"x", data[:20]):
        (folder / PACKED).write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.int8 can't be loaded"):
            load_model(str(folder))
    (folder / PACKED).unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_model(str(folder))
