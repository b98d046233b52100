"""Rows taken and summed by index, against index_select and a weighted sum left to autograd.

The layout is drawn: each token's K rows lie anywhere among R rows, and the rows between them are padding.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moevision.layers import cpu
from moevision.layers.cpu import sum_rows, take_rows

pytestmark = pytest.mark.deep

WIDTH = 5
# Relative rounding error, times a handful of roundings.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_shape = pytest.mark.parametrize(
    ("tokens", "top_k", "padding"),
    [(9, 1, 0), (9, 2, 0), (9, 1, 7), (9, 2, 7), (1, 2, 3), (0, 1, 0), (0, 2, 0)],
)
every_path = pytest.mark.parametrize("path", ["cpu", "other devices", "compiled"])


@pytest.fixture
def take_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the functions take the path of another device, or of compiled code, on this CPU."""
    cpu_sum = cpu._gather_and_sum

    def other_sum(*arguments: Tensor | None) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            patch.setattr(cpu.F, "embedding_bag", None)  # nothing may call it
            return cpu_sum(*arguments)

    def take(path: str) -> None:
        if path == "other devices":
            monkeypatch.setattr(cpu, "_gather_and_sum", other_sum)
        elif path == "compiled":
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    return take


def layout(tokens: int, top_k: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token [R], position [T, K], and which rows are padding [R]."""
    place = torch.randperm(tokens * top_k + padding, generator=torch.Generator().manual_seed(1))
    position = place[: tokens * top_k].view(tokens, top_k)
    token = torch.zeros(len(place), dtype=torch.int64)
    token[position] = torch.arange(tokens).unsqueeze(1)
    is_padding = torch.ones(len(place), dtype=torch.bool)
    is_padding[position] = False
    assert int(is_padding.sum()) == padding
    return token, position, is_padding


def draw(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@every_path
@every_shape
@every_dtype
def test_take_rows(dtype, tokens, top_k, padding, path, take_path):
    """Copies, and the sum of the copies' gradients; a padding row's gradient may be anything (compiled code: zero)."""
    token, position, is_padding = layout(tokens, top_k, padding)
    x = draw(dtype, tokens, WIDTH, seed=2).requires_grad_()
    given = draw(dtype, len(token), WIDTH, seed=3)
    expected = exact(x)
    expected[token].backward(given.double().masked_fill(is_padding.unsqueeze(1), 0))
    take_path(path)
    rows = take_rows(x, token, position)
    assert torch.equal(rows, x[token])
    rows.backward(
        given.masked_fill(is_padding.unsqueeze(1), 0 if path == "compiled" else float("nan"))
    )
    close(x.grad, expected.grad, dtype)


@every_path
@every_shape
@every_dtype
def test_sum_rows(dtype, tokens, top_k, padding, path, take_path):
    """Value and both gradients; padding may be NaN, and its gradient is exactly 0. Every third weight is 0."""
    token, position, is_padding = layout(tokens, top_k, padding)
    rows = (
        draw(dtype, len(token), WIDTH, seed=4)
        .masked_fill(is_padding.unsqueeze(1), float("nan"))
        .requires_grad_()
    )
    weight = draw(dtype, tokens, top_k, seed=5)
    weight.view(-1)[::3] = 0
    weight.requires_grad_()
    given = draw(dtype, tokens, WIDTH, seed=6)
    exact_rows, exact_weight = exact(rows), exact(weight)
    expected = (exact_rows[position] * exact_weight.unsqueeze(-1)).sum(1)
    expected.backward(given.double())
    take_path(path)
    actual = sum_rows(rows, weight, token, position)
    close(actual.detach(), expected.detach(), dtype)
    actual.backward(given)
    assert not rows.grad[is_padding].any()
    assert not rows.grad[position[weight == 0]].any()
    close(rows.grad, exact_rows.grad, dtype)
    close(weight.grad, exact_weight.grad, dtype)


def test_float32_weights_of_bfloat16_rows_get_float32_gradients():
    """0.3 is 0.30078125 in bfloat16: 77/256."""
    token, position, _ = layout(2, 1, 0)
    weight = torch.full((2, 1), 0.3, requires_grad=True)
    out = sum_rows(torch.ones(2, WIDTH, dtype=torch.bfloat16), weight, token, position)
    assert torch.equal(out, torch.full((2, WIDTH), 77 / 256, dtype=torch.bfloat16))
    out.sum().backward()
    assert torch.equal(weight.grad, torch.full((2, 1), float(WIDTH)))


def test_bfloat16_rows_are_added_up_in_float32():
    """256 + 1 + 1 = 258; in bfloat16, whose neighbour of 256 is 258, 256 + 1 would be 256 twice."""
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    ones, position = torch.ones(1, 3), torch.tensor([[0, 1, 2]])
    assert float(sum_rows(rows, ones, torch.zeros(3, dtype=torch.int64), position)) == 258


def test_a_frozen_gate_costs_no_gradient():
    token, position, _ = layout(9, 2, 7)
    rows, weight = (
        draw(torch.float64, 25, WIDTH, seed=4).requires_grad_(),
        draw(torch.float64, 9, 2, seed=5),
    )
    sum_rows(rows, weight, token, position).sum().backward()
    assert weight.grad is None
    assert torch.equal(rows.grad[position], weight.unsqueeze(-1).expand(-1, -1, WIDTH))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_of_token_0_that_is_not_finite_reaches_its_copies_only(bad):
    """Padding copies token 0, and 0 · NaN is NaN: a step that is lost anyway is lost for more experts."""
    token, position, is_padding = layout(9, 2, 7)
    rows = draw(torch.float64, 25, WIDTH, seed=4).requires_grad_()
    given = torch.ones(9, WIDTH, dtype=torch.float64)
    given[0] = bad
    sum_rows(rows, torch.ones(9, 2, dtype=torch.float64), token, position).backward(given)
    assert not rows.grad[position[0]].isfinite().any()
    assert rows.grad[is_padding].isnan().all()
    assert torch.equal(rows.grad[position[1:]], torch.ones(8, 2, WIDTH, dtype=torch.float64))
