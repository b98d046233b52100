"""The MoE layer: backends against a nested loop, autocast, checkpointing, compilation, batch-mates."""

import copy
import io
import pickle
from collections.abc import Callable
from math import prod
from types import SimpleNamespace

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moevision.errors import UserError
from moevision.layers import (
    ROUTERS,
    ColourRouter,
    MoEMlp,
    Routing,
    cpu,
    describe_moe,
    record_routing,
    router_kind,
)
from moevision.layers import experts as experts_module


def make(
    dtype: torch.dtype = torch.float32, width: int = 16, hidden: int = 24, **options: object
) -> MoEMlp:
    """A layer whose router is trained away from its zero start."""
    torch.manual_seed(0)
    layer = MoEMlp(width, hidden, dtype=dtype, **{"num_experts": 5, "top_k": 2, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        if layer.router_name != "soft":
            layer.router.weight.normal_()
    return layer.eval()


def dense(layer: MoEMlp, x: Tensor) -> Tensor:
    """What the layer computes without dispatch (tests/layers/test_router_oracle.py), in its own dtype."""
    twin = copy.deepcopy(layer)
    twin.experts.backend = "dense"
    out: Tensor = twin(x)
    return out


@pytest.mark.parametrize("top_k", [1, 2])
def test_padded_groups_change_nothing(top_k, monkeypatch):
    """Values and gradients of groups that are rounded up or made equal are those without padding."""
    layer = make(torch.float64, num_experts=2, top_k=top_k, backend="loop")
    x = torch.randn(4, 75, 16, dtype=torch.float64, requires_grad=True)
    lengths: dict[str, Callable[[list[int], Tensor], list[int]]] = {
        "plain": lambda sizes, x: sizes,
        "rounded": lambda sizes, x: [-(-size // 16) * 16 for size in sizes],
        "equal": lambda sizes, x: [320, 320],
    }
    results = {}
    for name, padded in lengths.items():
        monkeypatch.setattr(cpu, "_padded_lengths", padded)
        learned = [x, *(p for name, p in layer.named_parameters() if "noise" not in name)]
        out = layer(x)
        results[name] = [out.detach(), *torch.autograd.grad(out.square().sum(), learned)]
    for name in ("rounded", "equal"):
        torch.testing.assert_close(results[name], results["plain"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{}, {"router": "vmoe_top_k"}, {"router": "switch", "top_k": 1, "route_by": "image"}],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("uneven", [0.0, 3.0])
def test_without_gradients_the_output_is_the_same(options, threads, uneven, monkeypatch):
    """In float64, float32 and bf16, where groups are padded or not: against the dense backend in float64."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layer = make(torch.float64, width=64, hidden=128, num_experts=6, backend="loop", **options)
    x = torch.randn(2, 70, 64, dtype=torch.float64)
    with torch.no_grad():
        x += uneven * (layer.router.weight[0] - layer.router.weight[1])
        expected = dense(layer, x)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-10)
        single = copy.deepcopy(layer).float()
        torch.testing.assert_close(single(x.float()).double(), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            error = (single(x.float()).double() - expected).norm() / expected.norm()
        assert (
            error < 8 * torch.finfo(torch.bfloat16).eps / 2
        )  # rounded: rows, weights, hidden values, sums


def test_one_expert_is_timms_mlp():
    layer, mlp = make(num_experts=1, top_k=1), Mlp(16, 24)
    with torch.no_grad():
        for ours, theirs in ((layer.experts.fc1, mlp.fc1), (layer.experts.fc2, mlp.fc2)):
            theirs.weight.copy_(ours.weight[0])
            theirs.bias.copy_(ours.bias[0])
    x = torch.randn(3, 9, 16)
    torch.testing.assert_close(layer(x), mlp(x))


@pytest.mark.parametrize("tokens", [1, 2])
def test_one_token(tokens):
    layer = make()
    x = torch.randn(1, tokens, 16)
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["loop", "grouped", "dense"])
def test_bf16_autocast_stays_near_float32(backend):
    """bfloat16 keeps 8 bits: a relative error of 2^-8 per rounding, and a handful of roundings."""
    layer = make(backend=backend, hidden=32)
    x = torch.randn(8, 65, 16)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x)
    assert actual.dtype is torch.bfloat16
    assert (actual.float() - expected).norm() / expected.norm() < 0.01


def test_predictions_do_not_depend_on_batch_mates():
    """Exact in float64; in float32 to 1e-5, with the same experts wherever the margin is above 1e-4."""
    x = torch.randn(16, 65, 16, dtype=torch.float64)
    exact = make(torch.float64)
    torch.testing.assert_close(exact(x)[3:4], exact(x[3:4]), rtol=0, atol=1e-14)
    layer, single = make(), x.float()
    torch.testing.assert_close(layer(single)[3:4], layer(single[3:4]), rtol=0, atol=1e-5)
    together, alone = layer.router(single), layer.router(single[3:4])
    ranked = alone.logits.sort(-1, descending=True).values
    clear = (ranked[..., :2] - ranked[..., 1:3]).amin(-1) > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(together.expert_index[3:4][clear], alone.expert_index[clear])


class Block(nn.Module):
    def __init__(self, layer: MoEMlp) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.norm(x))
        return out


def run_block(
    *, compiled: bool, checkpointed: bool, bf16: bool, dtype=torch.float32, **options: object
) -> tuple[list[Routing], dict[str, Tensor]]:
    """One training step: what was recorded, the output, weights and every gradient, router loss included."""
    torch._dynamo.reset()
    block = Block(make(dtype, hidden=32, num_experts=4, **options)).to(dtype).train()
    block.mlp.router.noise = "none"  # compiled code draws other random numbers
    if compiled:
        block.compile(backend="aot_eager")
    torch.manual_seed(1)
    x = torch.randn(4, 20, 16, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), record_routing(block) as routings:
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    probs = sum(routing.probs.square().sum() for routing in routings)
    (y.to(dtype).square().mean() + probs).backward()
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    weights = routings[0].expert_weights().detach()
    return routings, {"output": y.detach(), "weights": weights, **gradients}


EXACT = {"dtype": torch.float64}
SHARED = {**EXACT, "router": "bias_balanced", "num_shared_experts": 1, "batch_priority": True}
SHARED |= {"capacity_factor": 0.8, "eval_capacity_factor": 0.8}


@pytest.mark.deep
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks at it after a graph break
@pytest.mark.parametrize(
    ("compiled", "checkpointed", "bf16", "options"),
    [
        (True, False, False, {}),
        (False, True, False, {}),
        (True, True, False, {}),
        (True, True, True, {}),
        (True, False, False, SHARED),
        (True, False, False, {**EXACT, "router": "expert_choice", "normalize_gates": True}),
        (True, False, False, {**EXACT, "router": "soft", "slots_per_expert": 2}),
    ],
)
def test_checkpointing_and_compilation_record_once_and_keep_gradients(
    compiled, checkpointed, bf16, options
):
    plain = {"compiled": False, "checkpointed": False, "bf16": bf16}
    expected_routings, expected = run_block(**plain, **options)
    chosen = {"compiled": compiled, "checkpointed": checkpointed, "bf16": bf16}
    routings, actual = run_block(**chosen, **options)
    assert len(routings) == len(expected_routings) == 1
    assert torch.equal(routings[0].expert_index, expected_routings[0].expert_index)
    assert actual.keys() == expected.keys()
    if options:  # float64, element by element
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)
    tolerance = 0.02 if bf16 else 1e-5
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-7, name


def test_shapes_of_timm_blocks():
    layer = make()
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(layer(x.view(2, 3, 4, 16)).view(2, 12, 16), layer(x))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    assert MoEMlp(16, 8, 20)(x).shape == (2, 12, 20)


def test_dropout_acts_in_training_only():
    layer = make(drop=0.5)
    layer.router.noise = "none"
    x = torch.randn(2, 9, 16)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


class Scaled(nn.GELU):
    """A GELU by its type only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def gradients_of(act_layer: Callable[[], nn.Module], backend: str) -> list[Tensor]:
    """Of x, the first layer of the experts, and the activation's parameters."""
    layer = make(torch.float64, act_layer=act_layer, backend=backend).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    learned = [x, layer.experts.fc1.weight, *layer.experts.act.parameters()]
    return list(torch.autograd.grad(layer(x).square().sum(), learned))


@pytest.mark.parametrize("act", [nn.PReLU, Scaled])
def test_an_activation_with_a_parameter_learns(act):
    """The gradient is that of the dense backend, which is autograd's."""
    actual, expected = gradients_of(act, "loop"), gradients_of(act, "dense")
    assert actual[2].any()
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_an_activation_in_place_has_the_same_gradients(act):
    actual, expected = gradients_of(lambda: act(inplace=True), "loop"), gradients_of(act, "loop")
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_dropout_inside_experts_drops_hidden_values_with_their_gradients():
    """With p = 1/2 a hidden value, here always 1, is 0 or 2; its row of fc2's gradient is the mask times 1."""
    layer = make(
        torch.float64,
        num_experts=1,
        top_k=1,
        hidden=24,
        bias=False,
        expert_drop=0.5,
        act_layer=nn.ReLU,
    )
    layer.train().router.noise = "none"
    with torch.no_grad():
        layer.experts.fc1.weight.fill_(1 / 16)
        layer.experts.fc2.weight.fill_(1.0)
    out = layer(torch.ones(1, 1, 16, dtype=torch.float64))
    out.sum().backward()
    mask = layer.experts.fc2.weight.grad[0, 0]
    assert set(mask.tolist()) == {0.0, 2.0}
    torch.testing.assert_close(out, mask.sum().expand(1, 1, 16))
    torch.testing.assert_close(
        layer.experts.fc1.weight.grad[0], 16 * mask.unsqueeze(1).expand(24, 16)
    )


def test_odd_widths_work_without_naming_a_backend():
    layer = make(width=15, hidden=7)
    x = torch.randn(2, 9, 15)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).shape == x.shape


def test_copies_and_pickles_forget_the_recorder():
    layer = make()
    with record_routing(layer) as routings:
        twin = copy.deepcopy(layer)
        pickled = pickle.load(io.BytesIO(pickle.dumps(layer)))
        twin(torch.randn(1, 3, 16))
        pickled(torch.randn(1, 3, 16))
    assert routings == []
    assert twin.recorder is None
    assert pickled.recorder is None


@pytest.mark.deep
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks at it after a graph break
def test_a_copy_of_a_compiled_layer_computes_with_its_own_weights():
    layer = make()
    x = torch.randn(1, 3, 16)
    layer.compile(backend="eager")
    layer(x)
    pickle.dumps(layer)
    twin = copy.deepcopy(layer)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin(x).any()


def test_gradients_of_biases_are_summed_in_float32():
    """6,000 rows of .3 in bfloat16, one by one, would stop growing at 128, where a step is less than half a digit."""
    from torch.utils._python_dispatch import TorchDispatchMode

    targets = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "index_add" in str(func):
                targets.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    bias = torch.zeros(2, 16, dtype=torch.bfloat16, requires_grad=True)
    weight, counts = torch.zeros(2, 16, 16, dtype=torch.bfloat16), torch.tensor([6000, 8])
    out = experts_module._grouped_linear(
        torch.zeros(6008, 16, dtype=torch.bfloat16), counts, weight, bias
    )
    with Watch():
        out.backward(torch.full_like(out, 0.3))
    assert targets == [torch.float32]
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad[0].float(), torch.full((16,), 1800.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", ["auto", "loop", "grouped", "dense"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images_and_no_tokens_give_an_empty_output(router, backend, dtype):
    """A batch that a filter left empty, in training and evaluation; parameters get gradients of 0."""
    capacity = {"capacity_factor": 1.0} if "capacity_factor" in router_kind(router).options else {}
    options = {
        "num_experts": 4,
        "router": router,
        "backend": backend,
        "num_shared_experts": 1,
        **capacity,
    }
    layer = MoEMlp(8, 16, 24, dtype=dtype, **options)
    for shape in ((0, 5, 8), (2, 0, 8), (0, 0, 8), (0, 8), (0, 2, 3, 8)):
        layer.train(not layer.training)
        images, tokens = (1, 0) if len(shape) == 2 else (shape[0], prod(shape[1:-1]))
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        if isinstance(layer.router, ColourRouter):
            layer.router._colours = torch.zeros(images, tokens, 3)
        out = layer(x)
        assert (out.shape, out.dtype) == ((*shape[:-1], 24), dtype)
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
        assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "router", ["noisy_top_k", "vmoe_top_k", "sigmoid", "expert_choice", "soft"]
)
def test_the_dense_backend_works_under_every_transform_of_torch(router):
    torch.manual_seed(0)
    layer = MoEMlp(8, 16, num_experts=4, router=router, dtype=torch.float64, backend="dense").eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    torch.testing.assert_close(torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), layer(x))
    whole = torch.func.grad(loss)(parameters, x)
    per_image = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    torch.testing.assert_close({name: g.sum(0) for name, g in per_image.items()}, whole)
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.isfinite(second).all()
    assert second.abs().sum() > 0


@pytest.mark.parametrize("router", ["vmoe_top_k", "expert_choice", "soft"])
def test_other_backends_refuse_gradients_of_gradients(router):
    layer = MoEMlp(8, 16, num_experts=4, router=router).eval()
    x = torch.randn(3, 5, 8, requires_grad=True)
    with pytest.raises(UserError, match='backend="dense"'):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_the_layers_of_a_model_in_words():
    one, two = (
        make(num_experts=4, num_shared_experts=1, router="vmoe_top_k"),
        make(num_experts=8, router="vmoe_top_k"),
    )
    one.layer_index, two.layer_index = 1, 3
    assert describe_moe([one]) == "4 experts, 2 per token plus 1 shared by vmoe_top_k, in blocks 1"
    assert describe_moe([two, two]) == "8 experts, 2 per token by vmoe_top_k, in blocks 3, 3"
    assert describe_moe([two, one]).startswith("8 and 4 experts, 2 per token plus 1 shared")


@pytest.mark.parametrize("bias", [(True, False), (False, True)])
def test_each_product_of_the_shared_experts_has_its_own_bias_or_none(bias):
    shared = MoEMlp(8, 16, num_experts=4, num_shared_experts=1, bias=bias).shared
    assert (shared.fc1.bias is not None, shared.fc2.bias is not None) == bias


@pytest.mark.parametrize(("capability", "grouped"), [((9, 0), True), ((8, 9), False)])
def test_bf16_is_one_grouped_product_from_sm90_on(capability, grouped, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows = SimpleNamespace(dtype=torch.bfloat16, element_size=lambda: 2, is_cuda=True, device="")
    assert make().experts._use_grouped(rows) is grouped
