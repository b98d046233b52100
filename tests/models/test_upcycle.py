"""An upcycled model starts as the dense model that it came from, saves and loads, and says what can't be upcycled."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

import moevision
from moevision import dense_twin, forward_routing
from moevision.data import SyntheticPets
from moevision.data.transforms import normalize
from moevision.efficiency import measure_cost
from moevision.layers import ROUTERS, moe_layers
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import create_from, describe, first_blocks, load_model, save_model
from moevision.models.upcycle import initial_output_difference, load_dense, upcycle
from tests.shared import SMALL_VIT, noise_images, small_vit

# Gates of these sum to 1 for every token, so that a mixture of equal experts is the expert.
SUM_TO_ONE = [name for name in ROUTERS if name not in ("expert_choice", "soft")]


def dense_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """Weights far from their small initial values, so that an expert left out or scaled would show."""
    torch.manual_seed(0)
    net = timm.create_model(name, **{"num_classes": 5, **options}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return dense_vit(**SMALL_VIT | {"num_classes": 5})


@pytest.mark.parametrize("router", SUM_TO_ONE)
@pytest.mark.parametrize("top_k", [1, 2])
def test_step_zero_is_the_dense_model(vit, router, top_k):
    if router == "switch" and top_k == 2:
        pytest.skip("it has one choice")
    moe = upcycle(vit, router=router, top_k=top_k, num_experts=4, layers="all")
    assert len(moe_layers(moe)) == 4
    gap = initial_output_difference(vit, moe, noise_images(8))
    assert gap.logit_scale > 0.3, "the logits are no constants"
    assert gap.max_logit < 1e-5
    assert (gap.agreement, gap.images) == (1.0, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"router": "expert_choice"},
        {"router": "soft"},
        {"eval_capacity_factor": 0.5},
        {"normalize_gates": False},
        {"reinit": 0.5},
    ],
)
def test_what_changes_the_output_reports_its_gap(vit, options):
    """The gap is that of the two models' logits, taken here by hand."""
    moe = upcycle(vit, layers="all", num_experts=4, **options).eval()
    gap = initial_output_difference(vit, moe, noise_images(8))
    difference = (moe(noise_images(8)) - vit(noise_images(8))).abs().max()
    assert gap.max_logit == pytest.approx(float(difference.detach()), rel=1e-4)
    assert gap.max_logit > 1e-3
    agreement = (moe(noise_images(8)).argmax(-1) == vit(noise_images(8)).argmax(-1)).float().mean()
    assert gap.agreement == float(agreement)


DOCS = Path(__file__).parents[2] / "docs" / "reference" / "conversions.md"
NOTES = Path(__file__).parents[2] / "benchmarks" / "upcycling" / "README.md"
GAPS = re.findall(
    r"^\| `(.+)` \| (\S+|< 1e-5) \| (\S+) % \|$", NOTES.read_text(encoding="utf-8"), re.M
)


@pytest.fixture(scope="module")
def pets() -> tuple[nn.Module, torch.Tensor]:
    """The bundled dense model and 128 drawn test images."""
    saved = load_model(str(Path(moevision.__file__).parent / "demo" / "models" / "pets" / "dense"))
    drawn = SyntheticPets(128, 64, 0, "test")
    pixels = torch.from_numpy(
        np.stack([drawn.image(index) for index in range(len(drawn))])
    ).permute(0, 3, 1, 2)
    return saved.net, normalize(pixels, saved.mean, saved.std)


@pytest.mark.parametrize(("options", "delta", "same"), GAPS, ids=[row[0] for row in GAPS])
def test_the_table_in_the_docs(pets, options, delta, same):
    """Two digits of the gap; one image may be a near tie that another machine rounds the other way."""
    dense, x = pets
    gap = initial_output_difference(dense, upcycle(dense, **eval(f"dict({options})")), x)
    assert gap.logit_scale == pytest.approx(1.6, abs=0.05)
    if delta == "< 1e-5":
        assert gap.max_logit < 1e-5
    else:
        assert gap.max_logit == pytest.approx(float(delta), rel=0.06)
    assert 100 * gap.agreement == pytest.approx(float(same), abs=100 / 128 + 0.05)


COSTS = re.findall(
    r"^\| (.+) \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) \| ([\d.]+) \|$",
    DOCS.read_text(encoding="utf-8"),
    re.M,
)


assert len(GAPS) >= 15
assert len(COSTS) == 7


@pytest.fixture(scope="module")
def deit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224").eval()


@pytest.mark.parametrize("row", COSTS, ids=[row[0] for row in COSTS])
def test_the_costs_in_the_docs(deit, row):
    options: dict[str, Any] = {
        name.replace("-", "_"): int(value) if value.isdigit() else value
        for name, value in re.findall(r"--([\w-]+) (\w+)", row[0])
    }
    cost = measure_cost(upcycle(deit, **options) if row[0] != "the dense model" else deit, 224)
    parameters = [
        round(count / 1e6, 2) for count in (cost.total_parameters, cost.active_parameters)
    ]
    flops = [round(cost.flops_per_image / 1e9, 2), round(cost.router_flops_per_image / 1e6, 1)]
    assert [float(cell) for cell in row[1:]] == [*parameters, *flops]


# name, size, options, prefix tokens (class, distillation and register tokens)
ARCHITECTURES = [
    ("deit_tiny_patch16_224", 64, {}, 1),
    ("deit_tiny_distilled_patch16_224", 64, {}, 2),
    ("deit3_small_patch16_224", 64, {"depth": 4}, 1),
    ("vit_tiny_patch16_224.augreg_in21k", 64, {}, 1),
    ("vit_small_patch14_reg4_dinov2", 56, {"depth": 4, "embed_dim": 192, "num_heads": 3}, 5),
    ("vit_small_patch16_rope_224", 64, {"depth": 4}, 1),  # timm's Eva class
    (
        "vit_betwixt_patch16_rope_reg4_gap_256",
        64,
        {"depth": 2, "embed_dim": 160, "num_heads": 5},
        4,
    ),
    ("vit_tiny_patch16_dinov3_qkvb", 64, {"depth": 4}, 5),
    ("beitv2_base_patch16_224", 64, {"depth": 2, "embed_dim": 192, "num_heads": 3}, 1),
]


@pytest.mark.parametrize(
    ("name", "size", "options", "prefix"), ARCHITECTURES, ids=[row[0] for row in ARCHITECTURES]
)
def test_families_of_vits(name, size, options, prefix, tmp_path):
    """Equal at step 0, bit-equal after saving and loading, and routed over the patch grid."""
    dense = dense_vit(name, img_size=size, **options)
    moe = upcycle(dense, num_experts=4, top_k=2).eval()
    assert initial_output_difference(dense, moe, noise_images(8, size)).max_logit < 1e-5
    save_model(describe(moe), tmp_path)
    loaded = load_model(str(tmp_path)).net
    assert torch.equal(loaded(noise_images(8, size)), moe(noise_images(8, size)))
    assert (loaded.moe_config, loaded.num_classes) == (moe.moe_config, 5)
    assert loaded.pretrained_cfg["architecture"] == "vit_moe"
    _, (routing, *_) = forward_routing(loaded, noise_images(8, size))
    side = size // dense.patch_embed.patch_size[0]
    assert (routing.grid, routing.num_prefix_tokens) == ((side, side), prefix)
    assert routing.expert_weights().shape == (8, side * side + prefix, 4)


def test_each_layer_can_have_its_own(vit):
    options = {"num_experts": [4, 2], "top_k": [2, 1], "router": ["vmoe_top_k", "sigmoid"]}
    moe = upcycle(vit, layers=[0, 2], backend="dense", **options).eval()
    assert initial_output_difference(vit, moe, noise_images(8)).max_logit < 1e-5
    assert [layer.router.num_experts for layer in moe_layers(moe)] == [4, 2]


@pytest.mark.parametrize("match", ["active_flops", "total_params"])
def test_a_dense_twin_of_ours_is_upcycled_under_its_own_name(match, tmp_path):
    """It was built under a registered name, with a convolutional stem, and keeps both."""
    moe = timm.create_model(
        "test_vit_moe", num_classes=3
    )  # E = 4, K = 2, hidden 64: twins of 128 and 256
    save_model(describe(dense_twin(moe, match)), tmp_path / "twin")
    up = upcycle(tmp_path / "twin", layers="every2").eval()
    assert [layer.experts.fc1.out_features for layer in moe_layers(up)] == [
        {"active_flops": 128, "total_params": 256}[match]
    ] * 2
    assert (
        initial_output_difference(
            load_model(str(tmp_path / "twin")).net, up, noise_images(8)
        ).max_logit
        < 1e-5
    )
    save_model(describe(up), tmp_path / "up")
    loaded = load_model(str(tmp_path / "up")).net
    assert loaded.pretrained_cfg["architecture"] == "test_vit_moe"
    assert torch.equal(loaded(noise_images(8)), up(noise_images(8)))


def test_the_source_is_left_as_it_was(vit):
    before = copy.deepcopy(vit.state_dict())
    upcycle(vit, reinit=1.0, num_classes=9)
    assert vit.num_classes == 5
    assert not moe_layers(vit)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_another_class_count_and_size_as_timm_does_it(vit, tmp_path):
    moe = upcycle(vit, num_classes=9, image_size=64).eval()
    assert moe(noise_images(8, 64)).shape == (8, 9)
    resampled = resample_abs_pos_embed(vit.pos_embed, [8, 8], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(moe.pos_embed, resampled)
    save_model(describe(moe), tmp_path)
    assert torch.equal(load_model(str(tmp_path)).net(noise_images(8, 64)), moe(noise_images(8, 64)))


def test_reinit_draws_whole_hidden_units_anew(vit):
    """A quarter of 128 units: their rows of fc1, biases and columns of fc2, with mean and spread of what was there."""
    (layer, *_) = moe_layers(upcycle(vit, reinit=0.25))
    dense, experts = vit.blocks[layer.layer_index].mlp, layer.experts
    rows = (experts.fc1.weight != dense.fc1.weight).any(-1)
    columns = (experts.fc2.weight != dense.fc2.weight).any(-2)
    assert rows.sum(-1).tolist() == [32] * 8
    assert torch.equal(rows, columns)
    assert torch.equal(rows, experts.fc1.bias != dense.fc1.bias)
    assert not torch.equal(rows[0], rows[1]), "each expert has a choice of its own"
    for expert in range(8):
        drawn = experts.fc1.weight[expert][rows[expert]].detach()
        replaced = dense.fc1.weight[rows[expert]].detach()
        assert float(drawn.std() / replaced.std()) == pytest.approx(1, abs=0.1)
        assert (
            float((drawn.mean() - replaced.mean()).abs() / replaced.std()) < 0.12
        )  # 1024 numbers: 3.8 standard errors
    torch.testing.assert_close(experts.fc2.bias, dense.fc2.bias.expand_as(experts.fc2.bias))


def test_the_seed_decides_and_nothing_else_is_drawn(vit):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = upcycle(vit, reinit=0.1, num_classes=7, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected), (
        "the global generator goes on as if nothing had been drawn"
    )
    again, other = (
        upcycle(vit, reinit=0.1, num_classes=7, seed=seed).state_dict() for seed in (1, 2)
    )
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    for name in ("blocks.1.mlp.router.weight", "blocks.1.mlp.experts.fc1.weight", "head.weight"):
        assert not torch.equal(one[name], other[name])
    drawn = [upcycle(vit, seed=None).state_dict()["blocks.1.mlp.router.weight"] for _ in range(2)]
    assert not torch.equal(*drawn), "None goes on with the global generator"


@pytest.fixture
def weight_file(vit: nn.Module, tmp_path: Path) -> Path:
    safetensors.torch.save_file(
        vit.state_dict(), tmp_path / "vit.safetensors", {"architecture": "vit_tiny_patch16_224"}
    )
    return tmp_path / "vit.safetensors"


@pytest.fixture
def small_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """`vit_tiny_patch16_224` of the size of the tests, since a file says no size."""
    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: real(name, **{**SMALL_VIT, **options})
    )
    return "vit_tiny_patch16_224"


def test_weights_from_a_file(vit, weight_file, small_name):
    moe = upcycle(small_name, weights=weight_file, image_size=32)
    assert moe.num_classes == 5, "as many as the file has"
    assert initial_output_difference(vit, moe, noise_images(8)).max_logit < 1e-5
    other = upcycle(small_name, weights=weight_file, image_size=32, num_classes=3)
    assert other.num_classes == 3
    assert torch.equal(other.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)
    first = load_dense(small_name, weight_file, image_size=32, num_classes=3)
    assert torch.equal(first.head.weight, other.head.weight), (
        "upcycling a loaded model is upcycling its name"
    )


def test_a_file_without_a_classifier(vit, small_name, tmp_path):
    body = {name: value for name, value in vit.state_dict().items() if not name.startswith("head")}
    safetensors.torch.save_file(body, tmp_path / "body.safetensors")
    moe = upcycle(small_name, weights=tmp_path / "body.safetensors", image_size=32, num_classes=3)
    assert moe.num_classes == 3
    assert torch.equal(moe.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)


def test_folders(vit, tmp_path):
    """A model's folder, the run folder above it, and either with timm's prefix."""
    save_model(describe(vit), tmp_path / "run" / "model")
    for source in (
        tmp_path / "run",
        tmp_path / "run" / "model",
        f"local-dir:{tmp_path / 'run' / 'model'}",
    ):
        assert initial_output_difference(vit, upcycle(source), noise_images(8)).max_logit < 1e-5
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    assert create_from(tmp_path / "run", load_weights=False).num_classes == 5


def test_fit_uses_the_same_code(vit, tmp_path):
    """`--pretrained` normalises V-MoE's gates too, takes the options of upcycling, and rebuilds without weights."""
    save_model(describe(vit), tmp_path)
    config = MoEConfig(
        pretrained=str(tmp_path),
        router="vmoe_top_k",
        top_k=1,
        moe_layers=[1, 2],
        drop_path_rate=0.1,
    )
    moe = build_model(config, num_classes=5, image_size=32)
    assert initial_output_difference(vit, moe, noise_images(8)).max_logit < 1e-5
    assert moe.blocks[3].drop_path1.drop_prob == pytest.approx(0.1)
    config.upcycle_reinit, config.noise = 0.5, "none"
    layer = moe_layers(build_model(config, num_classes=5, image_size=32))[0]
    assert not torch.equal(layer.experts.fc1.weight[0], layer.experts.fc1.weight[1])
    assert layer.router.noise == "none"
    (tmp_path / "model.safetensors").unlink()
    rebuilt = build_model(config, num_classes=5, image_size=32, load_pretrained=False)
    rebuilt.load_state_dict(moe.state_dict())


def test_fit_takes_a_file_with_its_architecture(weight_file, small_name, vit):
    config = MoEConfig(pretrained=str(weight_file), base=small_name)
    moe = build_model(config, num_classes=5, image_size=32)
    assert initial_output_difference(vit, moe, noise_images(8)).max_logit < 1e-5
    found = build_model(
        MoEConfig(pretrained=str(weight_file)), num_classes=5, image_size=32
    )  # by its metadata
    assert initial_output_difference(vit, found, noise_images(8)).max_logit < 1e-5
    weight_file.unlink()
    assert build_model(config, num_classes=5, image_size=32, load_pretrained=False).num_classes == 5


def test_a_file_of_halves_at_another_size(tmp_path):
    """float16 at 160 px: the weights arrive in float32, with the positions of 96 px."""
    dense = timm.create_model("test_vit", num_classes=0)
    halves = {name: values.half() for name, values in dense.state_dict().items()}
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file(halves, file, {"architecture": "test_vit"})
    config = MoEConfig(pretrained=str(file), num_experts=2, top_k=1, global_pool="avg")
    net = build_model(config, 2, 96)
    ours, theirs = net.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert net.pos_embed.shape[1] == 37
    assert net(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


# ---- the first blocks of a model


def test_the_first_blocks_compute_what_they_computed(vit):
    """Norm and classifier then read the third block's output."""
    vit, x = copy.deepcopy(vit).double(), noise_images(8).double()
    moe = upcycle(vit, depth=3, layers=[2], num_experts=4, top_k=1).eval()
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(x))
        for block in list(vit.blocks)[:3]:
            tokens = block(tokens)
        assert float((moe(x) - vit.forward_head(vit.norm(tokens))).abs().max()) < 1e-12
    assert len(vit.blocks) == 4, "the source is left as it was"


def test_the_first_blocks_save_and_load(tmp_path):
    net = first_blocks(small_vit(num_classes=5).eval(), 3)
    assert len(net.feature_info) == 3
    save_model(describe(net), tmp_path / "dense")
    x = noise_images(8)
    assert torch.equal(load_model(str(tmp_path / "dense")).net(x), net(x))
    for load_weights in (True, False):
        assert len(create_from(tmp_path / "dense", depth=2, load_weights=load_weights).blocks) == 2
    moe = upcycle(tmp_path / "dense", num_experts=4).eval()
    assert moe.moe_config["moe_layers"] == [1]
    save_model(describe(moe), tmp_path / "moe")
    assert torch.equal(load_model(str(tmp_path / "moe")).net(x), moe(x))


def test_stochastic_depth_is_spaced_over_the_blocks_that_stay():
    def rates(net: nn.Module) -> list[float]:
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]

    cut = first_blocks(small_vit(drop_path_rate=0.3), 3)
    built = small_vit(depth=3, drop_path_rate=0.3)
    assert rates(cut) == pytest.approx(rates(built))
    assert rates(cut)[-1] == pytest.approx(0.3)


@pytest.mark.parametrize("twin", [None, "active_flops"])
def test_a_config_says_all_of_it(twin, tmp_path):
    """Depth, placement, width, pooling; the dense fine-tune keeps the depth; a checkpoint rebuilds the same tensors."""
    source = small_vit(depth=12)
    save_model(describe(source), tmp_path)
    config = MoEConfig(
        pretrained=str(tmp_path),
        depth=10,
        num_experts=8,
        top_k=2,
        router="vmoe_top_k",
        moe_layers="last2",
        expert_hidden=128,
        global_pool="avg",
        twin=twin,
    )
    net = build_model(config, 2, 32)
    assert len(net.blocks) == 10
    assert torch.equal(net.blocks[9].attn.qkv.weight, source.blocks[9].attn.qkv.weight)
    hidden = [(layer.layer_index, layer.experts.fc1.out_features) for layer in moe_layers(net)]
    assert hidden == ([] if twin else [(7, 128), (9, 128)])
    if twin:
        assert torch.equal(net.blocks[9].mlp.fc1.weight, source.blocks[9].mlp.fc1.weight)
    again = build_model(config, 2, 32, load_pretrained=False).state_dict()
    shapes = {name: values.shape for name, values in net.state_dict().items()}
    assert {name: values.shape for name, values in again.items()} == shapes
