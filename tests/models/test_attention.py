"""Fused and plain attention: the same numbers, and each where it is the faster."""

import lightning as L
import pytest
import timm
import torch
from torch import Tensor, nn

from moevision.data import ImageDataModule
from moevision.models.config import MoEConfig
from moevision.models.vit_moe import SHORT, num_patches, set_fused_attention, trains_unfused
from moevision.train.task import ClassificationTask
from tests.operations import Operations
from tests.shared import noise_images
from tests.shared import small_vit as vit


def fused_calls(operations: Operations) -> tuple[int, int]:
    """Calls of torch's fused attention, forward and backward."""
    names = [name for name in operations.calls.elements() if "_scaled_dot_product" in name]
    backward = sum("backward" in name for name in names)
    return len(names) - backward, backward


def step(model: nn.Module, fused: bool) -> tuple[tuple[int, int], list[Tensor]]:
    """Fused calls, logits and every gradient of one step."""
    set_fused_attention(model, fused)
    model.zero_grad()
    x = noise_images(seed=1).requires_grad_()
    with Operations() as operations:
        logits = model(x)
        logits.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return fused_calls(operations), [logits.detach(), x.grad, *gradients]


def test_both_compute_the_same():
    """float32: rounding differs, nothing else does."""
    model = vit()
    calls, fused = step(model, True)
    no_calls, plain = step(model, False)
    assert (calls, no_calls) == ((4, 4), (0, 0))  # one each in four blocks
    for actual, expected in zip(plain, fused, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    again, back = step(model, True)
    assert again == calls
    assert torch.equal(back[0], fused[0])


def test_what_the_environment_forbids_stays_plain(monkeypatch):
    """As TIMM_FUSED_ATTN=0 does."""
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)
    model = vit()
    set_fused_attention(model, True)
    assert not any(block.attn.fused_attn for block in model.blocks)


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "unfused"),
    [
        ("cpu", torch.bfloat16, 64, True),
        ("cpu", torch.bfloat16, SHORT, True),
        ("cpu", torch.bfloat16, SHORT + 1, False),
        ("cpu", torch.float32, 64, False),
        ("cpu", torch.float16, 64, False),
        ("cuda", torch.bfloat16, 64, False),
        ("cuda:1", torch.bfloat16, 64, False),
        ("mps", torch.bfloat16, 64, False),
    ],
)
def test_the_rule(device, dtype, tokens, unfused):
    assert trains_unfused(device, dtype, tokens) == unfused
    assert trains_unfused(torch.device(device), dtype, tokens) == unfused


def test_patches_are_counted_where_there_are_any():
    """(32 / 8)² patches, whatever share of them training drops."""
    assert num_patches(vit()) == 16
    dropping = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, patch_drop_rate=0.5)
    assert num_patches(dropping) == 16
    assert num_patches(nn.Linear(3, 3)) is None


@pytest.mark.parametrize(("precision", "trains_fused"), [("bf16-mixed", False), ("32-true", True)])
def test_a_training_uses_each_where_it_is_the_faster(precision, trains_fused, tmp_path):
    """Two epochs, so that training follows validation, which always uses the fused kernel."""
    L.seed_everything(0, verbose=False)
    task = ClassificationTask(arch=MoEConfig(name="test_vit_moe"), num_classes=8, image_size=32)
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=2,
        limit_train_batches=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    data = ImageDataModule(
        "synthetic_pets", image_size=32, batch_size=16, train_size=16, val_size=16, test_size=16
    )
    with Operations() as operations:
        trainer.fit(task, data)
    blocks = len(task.net.blocks)
    in_training = 2 * blocks if trains_fused else 0
    assert fused_calls(operations) == (in_training + 2 * blocks, in_training)
