"""A file of weights is recognised: by its metadata, else by names and shapes among timm's ViTs."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from moevision import UserError
from moevision.models.architecture import architecture_of, architectures_of
from moevision.models.config import MoEConfig, build_model


def write(tmp_path: Path, name: str, metadata: dict[str, str] | None = None, **options: object) -> Path:
    torch.manual_seed(0)
    net = timm.create_model(name, **options)
    state = {key: tensor.half() for key, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors", metadata)
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"num_classes": 3}),
        ("test_vit2", {}),
        ("test_vit", {"num_classes": 0, "img_size": 96}),  # another grid of positions, no classifier
        ("vit_small_patch14_reg4_dinov2", {"img_size": 98}),
    ],
)
def test_by_shapes(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    assert architecture_of(write(tmp_path, name, **options)) == name


def test_several_fit_and_the_files_own_grid_comes_first(tmp_path: Path) -> None:
    found = architectures_of(write(tmp_path, "vit_tiny_patch16_384"))
    assert found[0] == "vit_tiny_patch16_384"
    assert {"vit_tiny_patch16_224", "deit_tiny_patch16_224"} < set(found)


def test_what_the_file_says_counts(tmp_path: Path) -> None:
    assert architectures_of(write(tmp_path, "test_vit", {"architecture": "test_vit3"})) == ["test_vit3"]
    assert architecture_of(write(tmp_path, "test_vit", {"architecture": "nothing of timm's"})) == "test_vit"


def test_nothing_fits(tmp_path: Path) -> None:
    save_file({"blocks.0.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"name its architecture, such as --model\.arch\.base"):
        architecture_of(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="There is no file"):
        architecture_of(tmp_path / "none.safetensors")


def test_a_model_starts_from_such_a_file(tmp_path: Path) -> None:
    """float16 at 160 px: the weights arrive in float32, with the positions of 96 px."""
    file = write(tmp_path, "test_vit", num_classes=0)
    config = MoEConfig(pretrained=str(file), num_experts=2, top_k=1, moe_layers="last2", global_pool="avg")
    net = build_model(config, 2, 96)
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", num_classes=0)
    ours, theirs = net.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert net.pos_embed.shape[1] == 37
    assert net(torch.zeros(1, 3, 96, 96)).shape == (1, 2)
