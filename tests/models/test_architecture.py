"""A file of weights is recognised by its metadata."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from moevision.models.config import MoEConfig, build_model
from moevision.models.io import architecture_of


def write(
    tmp_path: Path, name: str, metadata: dict[str, str] | None = None, **options: object
) -> Path:
    torch.manual_seed(0)
    net = timm.create_model(name, **options)
    state = {key: tensor.half() for key, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors", metadata)
    return tmp_path / "w.safetensors"


def test_what_the_file_says_counts(tmp_path: Path) -> None:
    assert (
        architecture_of(write(tmp_path, "test_vit", {"architecture": "test_vit3"})) == "test_vit3"
    )


def test_a_model_starts_from_such_a_file(tmp_path: Path) -> None:
    """float16 at 160 px: the weights arrive in float32, with the positions of 96 px."""
    file = write(tmp_path, "test_vit", {"architecture": "test_vit"}, num_classes=0)
    config = MoEConfig(
        pretrained=str(file), num_experts=2, top_k=1, moe_layers="last2", global_pool="avg"
    )
    net = build_model(config, 2, 96)
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", num_classes=0)
    ours, theirs = net.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert net.pos_embed.shape[1] == 37
    assert net(torch.zeros(1, 3, 96, 96)).shape == (1, 2)
