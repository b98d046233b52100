"""The experts' loop with a backward pass of its own, against the same products left to autograd."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moevision.layers.cpu import grouped_mlps

pytestmark = pytest.mark.deep

Function = Callable[..., Tensor]
WIDTH, HIDDEN, OUT = 5, 7, 4
COUNTS = {
    "unequal": [3, 7, 1],
    "with empty groups": [0, 4, 0, 2, 0],
    "equal": [4, 4, 4],
    "all empty": [0, 0],
    "one expert": [6],
    "hundreds": [1025, 1, 512],
}
every_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
PATHS = (COUNTS["unequal"], COUNTS["equal"])
both_paths = pytest.mark.parametrize("counts", PATHS, ids=["looped", "batched"])
ACTIVATIONS = (nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid())
every_activation = pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
WITHOUT = ((False, False), (True, False), (False, True))  # biases of the first and second product


def plain(
    rows: Tensor, counts: Sequence[int], act: nn.Module, *parameters: Tensor | None
) -> Tensor:
    """The definition, with autograd's gradients."""
    weight1, bias1, weight2, bias2 = (len(counts) * [None] if x is None else x for x in parameters)
    return torch.cat(
        [
            F.linear(act(F.linear(group, weight1[e], bias1[e])), weight2[e], bias2[e])
            for e, group in enumerate(rows.split(counts))
        ]
    )


def leaves(
    counts: Sequence[int],
    biases: tuple[bool, bool] = (True, True),
    sizes: tuple[int, int, int] = (WIDTH, HIDDEN, OUT),
) -> list[Tensor | None]:
    """Rows, weight1, bias1, weight2, bias2."""
    experts, generator = len(counts), torch.Generator().manual_seed(3)
    width, hidden, out = sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows, weight1 = draw(sum(counts), width), draw(experts, hidden, width)
    bias1, weight2, bias2 = draw(experts, hidden), draw(experts, out, hidden), draw(experts, out)
    return [rows, weight1, bias1 if biases[0] else None, weight2, bias2 if biases[1] else None]


def results(
    function: Function, counts: Sequence[int], act: nn.Module, inputs: list[Tensor | None]
) -> list[Tensor | None]:
    """The value and the five gradients, of a sum in which every element has another weight."""
    rows, *parameters = [
        None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs
    ]
    out = function(rows, counts, act, *parameters)
    factor = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    out.backward(factor)
    return [out.detach(), *(None if x is None else x.grad for x in (rows, *parameters))]


def check(
    counts: Sequence[int],
    act: nn.Module,
    inputs: list[Tensor | None],
    function: Function = grouped_mlps,
) -> None:
    pairs = zip(
        results(function, counts, act, inputs), results(plain, counts, act, inputs), strict=True
    )
    for actual, expected in pairs:
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("counts", "act", "biases"),
    [
        *((counts, nn.GELU(), (True, True)) for counts in COUNTS.values()),
        *((counts, act, (True, True)) for counts in PATHS for act in ACTIVATIONS),
        *((counts, nn.GELU(), biases) for counts in PATHS for biases in WITHOUT),
    ],
    ids=str,
)
def test_values_and_all_five_gradients_are_autograds(counts, act, biases):
    check(counts, act, leaves(counts, biases))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("width", "hidden", "out"), [(8, 16, 24), (8, 12, 8), (5, 16, 8), (16, 8, 3), (5, 7, 4)]
)
@every_counts
def test_grouped_mm_or_not_every_width_is_right(counts, width, hidden, out, dtype, monkeypatch):
    """`grouped_mm` wants rows of whole 16 bytes, no float64: widths that fit, those that don't, against float64."""
    used: list[torch.Size] = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(
        F,
        "grouped_mm",
        lambda rows, *rest, **named: used.append(rows.shape) or grouped_mm(rows, *rest, **named),
    )
    inputs = [
        x.detach().to(dtype).requires_grad_() for x in leaves(counts, sizes=(width, hidden, out))
    ]
    actual = results(grouped_mlps, counts, nn.GELU(), inputs)
    expected = results(
        plain, counts, nn.GELU(), [x.detach().double().requires_grad_() for x in inputs]
    )
    tolerance = (
        16 * torch.finfo(dtype).eps
    )  # five roundings follow one another, and sums of 1 025 numbers
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    fits = all(size * dtype.itemsize % 16 == 0 for size in (width, hidden, out))
    if len(set(counts)) == 1:
        assert used == []  # batched
    elif fits:
        assert (
            len(used) == 4
        )  # rows' and hidden gradient, both weights'; the first two products add a bias
    else:
        assert len(used) < 4


@pytest.mark.parametrize("learned", [[0], [1], [2], [3], [4], [0, 4], [1, 2], [3, 4]])
@both_paths
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(counts, learned):
    inputs = leaves(counts)
    for index, x in enumerate(inputs):
        x.requires_grad_(index in learned)
    gradients = results(grouped_mlps, counts, nn.GELU(), inputs)[1:]
    assert [index for index, gradient in enumerate(gradients) if gradient is not None] == learned
    check(counts, nn.GELU(), inputs)


@both_paths
def test_nothing_is_kept_where_nothing_is_learned(counts):
    inputs, kept = leaves(counts), []
    frozen = [x.detach() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.no_grad():
            without = grouped_mlps(inputs[0], counts, nn.GELU(), *inputs[1:])
        still = grouped_mlps(frozen[0], counts, nn.GELU(), *frozen[1:])
        assert kept == []
        learning = grouped_mlps(inputs[0], counts, nn.GELU(), *inputs[1:])
    assert len(kept) == 5  # rows, hidden values before and after the activation, both weights
    assert without.grad_fn is None
    assert still.grad_fn is None
    assert torch.equal(without, learning)
    assert torch.equal(still, learning)


class Watched(nn.Module):
    """An activation that knows whether what it was given is still in memory."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.given = weakref.ref(hidden)
        return F.gelu(hidden)


class EveryOperation(TorchDispatchMode):
    """Asks that after every operation of torch."""

    def __init__(self, act: Watched) -> None:
        super().__init__()
        self.act, self.alive = act, False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **kwargs or {})
        self.alive = hasattr(self.act, "given") and self.act.given() is not None
        return out


@both_paths
def test_where_nothing_is_learned_the_second_product_needs_no_memory_for_the_first(counts):
    """The hidden values before the activation are gone when the last operation is done."""
    rows, *parameters = leaves(counts)
    frozen_rows, *frozen = [x.detach() for x in (rows, *parameters)]

    def alive_at_the_end(rows: Tensor, parameters: list[Tensor]) -> bool:
        with EveryOperation(act := Watched()) as seen:
            grouped_mlps(rows, counts, act, *parameters)
        return seen.alive

    assert alive_at_the_end(rows, parameters)
    assert not alive_at_the_end(frozen_rows, frozen)
    with torch.no_grad():
        assert not alive_at_the_end(rows, parameters)


@pytest.mark.parametrize(
    "finish", [Tensor.sum, lambda out: (out.t() @ out).sum()], ids=["expanded", "transposed"]
)
@both_paths
def test_any_layout_of_the_incoming_gradient(counts, finish):
    """The sum's gradient is one number expanded to [R, out]."""
    actual, expected = leaves(counts), leaves(counts)
    finish(grouped_mlps(actual[0], counts, nn.GELU(), *actual[1:])).backward()
    finish(plain(expected[0], counts, nn.GELU(), *expected[1:])).backward()
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-11)


@every_activation
@both_paths
def test_a_backward_pass_leaves_everything_as_it_was(counts, act):
    """Nothing is written over a tensor that somebody else holds."""
    inputs = leaves(counts)
    out = grouped_mlps(inputs[0], counts, act, *inputs[1:])
    given = torch.randn(out.shape, dtype=torch.float64)
    before = [x.detach().clone() for x in (*inputs, out, given)]
    first = torch.autograd.grad(out, inputs, given, retain_graph=True)
    second = torch.autograd.grad(out, inputs, given)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip((*inputs, out, given), before, strict=True))


@both_paths
def test_float32_weights_of_bfloat16_rows_get_float32_gradients(counts):
    """As under autocast; bfloat16 keeps 8 bits, and about five roundings follow one another."""
    rows, *parameters = [
        x.detach().float().bfloat16().float().requires_grad_() for x in leaves(counts)
    ]
    expected = results(plain, counts, nn.GELU(), [rows, *parameters])
    actual = results(
        grouped_mlps, counts, nn.GELU(), [rows.detach().bfloat16().requires_grad_(), *parameters]
    )
    assert [x.dtype for x in actual] == 2 * [torch.bfloat16] + 4 * [torch.float32]
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.float() - theirs).norm() < 5 * 2**-8 * theirs.norm()
