"""The guide "In your own training loop": its code runs as it stands there, and does what its table says."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moevision import MoEMlp
from tests.docs.test_docs import DOCS, python_blocks, run
from tests.forks import Forked

GUIDE = DOCS / "guides" / "own-loop.md"
LOOP, PRETRAINED, OWN_MODEL, LIGHTNING, TRANSFORMERS, SAVE = python_blocks(GUIDE)

# The guide's loop on half of each batch, in each of two processes; or on all of it, in one.
PROCESSES = """
import sys

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
trained = {}
for router in ("switch", "bias_balanced"):
    torch.manual_seed(0)
    model = timm.create_model("test_vit_moe", stem="patch", num_classes=4, router=router).double()
    batches = [(torch.randn(8, 3, 32, 32).double(), torch.randint(4, (8,))) for _ in range(3)]
    mine = [tuple(part.chunk(world)[rank] for part in batch) for batch in batches]
    train(DistributedDataParallel(model) if world > 1 else model, mine)
    trained |= {f"{router} {name}": value for name, value in model.state_dict().items()}
torch.save(trained, f"{sys.argv[1]}/{world}-{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide writes to runs/."""
    monkeypatch.chdir(tmp_path)


def scope_of(*blocks: str) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    run(GUIDE, list(blocks), scope)
    return scope


def biases(model: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("router.bias")]


def moved(model: torch.nn.Module, updates: int) -> bool:
    """Each update moves a bias by 0.001 · (±1 or 0 - their mean): all differences are whole multiples of 0.001."""
    found = torch.stack([bias - bias[0] for bias in biases(model)]) / 0.001
    assert len(found) == 3
    return (
        torch.allclose(found, found.round(), atol=1e-3)
        and 0 < found.abs().max() <= 2 * updates + 1e-3
    )


def test_a_plain_loop_logs_its_losses_and_the_model_is_saved():
    scope = scope_of(LOOP, OWN_MODEL, SAVE)
    assert scope["net"][1].experts.fc1.weight.grad.abs().sum() > 0
    from moevision.models.io import load_model

    saved = load_model("runs/own/model")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(saved.net(x), scope["model"].eval()(x))
    assert scope["train"](scope["model"], scope["loader"]).keys() == {"importance", "load"}


def test_experts_from_a_pretrained_model_start_as_copies_of_its_mlps():
    vit = scope_of(LOOP, PRETRAINED)["vit"]
    fresh = [module for module in vit.modules() if isinstance(module, MoEMlp)]
    assert len(fresh) == 2
    for layer in fresh:
        first, *others = layer.experts.fc1.weight
        assert all(torch.equal(first, other) for other in others)


def test_a_lightning_module_moves_the_biases_once_per_update():
    """Four batches, each a step of ± 0.001, re-centred; with two batches per update there are two."""
    scope = scope_of(LOOP, PRETRAINED, OWN_MODEL, LIGHTNING)
    assert moved(scope["classifier"], 4)
    again = scope["Classifier"]()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = scope["L"].Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, **quiet
    )
    trainer.fit(again, scope["loader"])
    assert moved(again, 2)


@pytest.mark.needs("transformers", "accelerate")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_transformers_trains_it_and_moves_the_biases_once_per_update():
    scope = scope_of(LOOP, OWN_MODEL, TRANSFORMERS)
    assert moved(scope["wrapped"], 4)  # 32 images in batches of 8
    again = scope["WithLoss"](
        scope["timm"].create_model("vit_moe_micro_patch4_32", router="bias_balanced")
    )
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    arguments = scope["TrainingArguments"]("runs/again", report_to="none", **options)
    callbacks = [scope["AfterUpdate"]()]
    scope["Trainer"](again, arguments, train_dataset=scope["rows"], callbacks=callbacks).train()
    assert moved(again, 2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_and_checkpointed_blocks_compute_the_same():
    """`aot_eager` traces and cuts as the default compiler does, and needs no C++ compiler; one dense block, one MoE."""
    scope = scope_of(LOOP, OWN_MODEL)
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(2)]

    def trained(change: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        options = {"depth": 2, "num_classes": 10, "router": "bias_balanced"}
        model = scope["timm"].create_model("test_vit_moe", **options)
        change(model)
        scope["train"](model, batches)
        return list(model.state_dict().values())

    def compiled(model: Any) -> None:
        for block in model.blocks:
            block.compile(backend="aot_eager")

    plain = trained(lambda model: None)
    for change in (compiled, lambda model: model.set_grad_checkpointing()):
        for found, expected in zip(trained(change), plain, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_two_processes_are_one_with_the_whole_batch(tmp_path, monkeypatch):
    """Weights to 1e-9 in float64, biases exactly: losses and loads are those of all tokens."""
    script = tmp_path / "train.py"
    script.write_text("import os\n" + LOOP.partition("\n\n\nmodel = ")[0] + "\n" + PROCESSES)
    alone = [str(script), str(tmp_path)]
    monkeypatch.setattr(sys, "argv", alone)
    runpy.run_path(alone[0])
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *alone]
    process = Forked(together, tmp_path, os.environ, others=2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one, *both = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    for name, expected in one.items():
        for found in (half[name] for half in both):
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=name)
    assert any(value.abs().sum() > 0 for name, value in one.items() if name.endswith("router.bias"))


def test_a_left_out_update_moves_no_bias():
    from moevision import MoEMlp, record_routing
    from moevision.losses import Balance

    layer = MoEMlp(8, 8, num_experts=4, router="bias_balanced")
    balance = Balance(layer)
    for applied, expected in ((False, 0), (True, 4)):
        with record_routing(layer) as routings:
            layer(torch.randn(1, 3, 8))  # 6 choices among 4 experts: none has the mean load
        balance.loss(routings)
        balance.step(applied)
        assert int(biases(layer)[0].count_nonzero()) == expected
