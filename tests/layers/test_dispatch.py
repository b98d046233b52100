"""The way of tokens to experts' rows and back, for any choices, with every kind of padding."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moevision.layers import LocalDispatcher, Routing, cpu
from moevision.layers.moe import Dispatched


def routing_of(expert_index: Tensor, num_experts: int) -> Routing:
    """The decision with these choices [B, N, K]; nothing else of it counts here."""
    scores = torch.zeros(*expert_index.shape[:2], num_experts)
    weight = torch.rand(expert_index.shape, generator=torch.Generator().manual_seed(2))
    return Routing(scores, scores, scores, None, expert_index, weight, weight > 0.1)


class Case(NamedTuple):
    """What to dispatch, and how."""

    num_experts: int
    top_k: int
    tokens: int
    skew: float
    pad: bool
    matrix_unit: bool
    dtype: torch.dtype
    grad: bool
    seed: int

    def expert_index(self) -> Tensor:
        """[1, T, K]; the larger `skew`, the more choices fall on the first experts."""
        generator = torch.Generator().manual_seed(self.seed)
        share = torch.rand(1, self.tokens, self.top_k, generator=generator)
        return (share**self.skew * self.num_experts).long().clamp(max=self.num_experts - 1)

    def x(self) -> Tensor:
        """[T, 2]: every token is its own number, below 256 and so exact in bfloat16."""
        number = torch.arange(self.tokens, dtype=self.dtype)
        return torch.stack([number, -number], -1)

    def dispatch(self) -> Dispatched:
        """As on a machine with or without a matrix unit."""
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(self.grad):
            patch.setattr(cpu, "has_matrix_unit", lambda: self.matrix_unit)
            dispatcher = LocalDispatcher(pad=self.pad)
            return dispatcher.dispatch(self.x(), routing_of(self.expert_index(), self.num_experts))


cases = st.builds(
    Case,
    num_experts=st.integers(1, 7),
    top_k=st.integers(1, 3),
    tokens=st.integers(0, 255),
    skew=st.sampled_from([1.0, 1.2, 3.0]),
    pad=st.booleans(),
    matrix_unit=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    grad=st.booleans(),
    seed=st.integers(0, 10_000),
)
EVEN = Case(
    4, 2, 200, 1.0, True, True, torch.bfloat16, True, 0
)  # 85 to 115 choices for each expert


@settings(deadline=None, max_examples=500)
@given(cases)
@example(EVEN)
@example(EVEN._replace(tokens=0))
@example(EVEN._replace(matrix_unit=False))
@example(EVEN._replace(grad=False))
def test_every_choice_is_computed_once_by_its_expert(case):
    dispatched, expert_index, x = case.dispatch(), case.expert_index()[0], case.x()
    counts, token, position = dispatched.counts, dispatched.token, dispatched.position
    assert token is not None
    assert position is not None
    assert position.shape == expert_index.shape
    assert len(position.unique()) == position.numel()  # no row is two choices'
    assert int(counts.sum()) == len(dispatched.rows) == len(token)
    assert torch.equal(dispatched.rows, x[token])
    assert torch.equal(token[position], torch.arange(case.tokens).unsqueeze(1).expand_as(position))
    computed_by = torch.arange(case.num_experts).repeat_interleave(counts)
    assert torch.equal(computed_by[position], expert_index)
    for expert in range(case.num_experts):  # stable: in the order of the tokens
        assert (position.flatten()[expert_index.flatten() == expert].diff() > 0).all()
    is_padding = torch.ones(len(token), dtype=torch.bool)
    is_padding[position] = False
    assert not token[is_padding].any()
    if not case.pad:
        assert not is_padding.any()
    elif case.dtype is torch.bfloat16 and not case.grad:
        assert len(set(counts.tolist())) == 1  # two numbers a token: padding is nearly free


def lengths_of(wanted: list[int]) -> list[int]:
    """Lengths of the groups where so many tokens choose each expert, in bfloat16 with a matrix unit."""
    index = torch.arange(len(wanted)).repeat_interleave(torch.tensor(wanted)).view(1, -1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "has_matrix_unit", lambda: True)
        dispatched = LocalDispatcher().dispatch(
            torch.zeros(index.shape[1], 1).bfloat16(), routing_of(index, len(wanted))
        )
    return dispatched.counts.tolist()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([1000, 300], [1024, 320]),  # 512 and 256 below them: steps of 32
        ([1025, 300], [1088, 320]),  # 1024 / 16 = 64
        ([9000, 1], [9216, 32]),  # 8192 / 16 = 512
        ([600, 400], [608, 608]),  # 1 216 for 1 000 rows, less than 1.4
        ([720, 280], [736, 288]),  # 1 472
        (
            [2600, 1600],
            [2688, 1600],
        ),  # 5 376 for 4 200 would be 1.28, and so many rows may become 1.25 times as many
        ([2500, 1700], [2560, 2560]),  # 1.22
    ],
)
def test_lengths_computed_by_hand(wanted, expected):
    """Sixteen sizes from one power of two to the next, and no fewer than 32 rows apart."""
    assert lengths_of(wanted) == expected


@settings(deadline=None, max_examples=300)
@given(cases)
@example(EVEN)
@example(EVEN._replace(matrix_unit=False))
@example(EVEN._replace(dtype=torch.float32))
@example(EVEN._replace(skew=3.0))
def test_groups_are_as_long_as_the_rule_says(case):
    """The rule in Python's integers."""
    case = case._replace(grad=True)
    choices = case.tokens * case.top_k
    lengths = [case.expert_index().flatten().tolist().count(e) for e in range(case.num_experts)]
    if case.pad and case.dtype is torch.bfloat16:
        step = 32 if choices >= 8 * 32 * case.num_experts else 16
        steps = [max(step, 2 ** (n.bit_length() - 1) // 16) if n else step for n in lengths]
        lengths = [-(-count // one) * one for count, one in zip(lengths, steps, strict=True)]
        limit = 1.4 if choices < 1024 * case.num_experts else 1.25
        if case.matrix_unit and max(lengths) * case.num_experts <= limit * choices:
            lengths = [max(lengths)] * case.num_experts
    assert case.dispatch().counts.tolist() == lengths


@pytest.mark.parametrize(
    ("wanted", "dtype", "threads", "expected"),
    [
        # Width 128, so experts of 2 · 128² = 32 768 multiply-adds a row: a call is worth 2.5e6 / 32 768 = 76 rows.
        (
            [60, 20, 20, 0],
            torch.bfloat16,
            1,
            [64, 64, 64, 64],
        ),  # 156 rows more; three calls are worth 229
        ([90, 5, 5, 0], torch.bfloat16, 1, [96, 16, 16, 0]),  # 284 more would be too many
        ([90, 5, 5, 0], torch.bfloat16, 2, [96, 96, 96, 96]),  # 458 on two threads
        (
            [64, 0, 0, 0],
            torch.bfloat16,
            1,
            [64, 0, 0, 0],
        ),  # an image routed as a whole: one call, which is worth 76
        ([30, 20, 20, 10], torch.float32, 1, [30, 20, 20, 10]),
        ([30, 20, 20, 10], torch.float32, 2, [30, 30, 30, 30]),  # 40 more; 4 · .6e6 / 32 768 = 73
        ([60, 10, 5, 5], torch.float32, 2, [60, 10, 5, 5]),  # 160 more
    ],
)
def test_without_gradients_groups_are_equal_where_that_costs_less_than_calls(
    wanted,
    dtype,
    threads,
    expected,
    monkeypatch,
):
    index = torch.arange(len(wanted)).repeat_interleave(torch.tensor(wanted)).view(1, -1, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "has_matrix_unit", lambda: False)
    x = torch.randn(index.shape[1], 128, dtype=dtype)
    with torch.no_grad():
        assert (
            LocalDispatcher().dispatch(x, routing_of(index, len(wanted))).counts.tolist()
            == expected
        )
    trained = LocalDispatcher().dispatch(x, routing_of(index, len(wanted))).counts.tolist()
    assert trained == (
        wanted if dtype is torch.float32 else [-(-size // 16) * 16 for size in wanted]
    )


def test_the_examples_take_every_path():
    """400 choices on 4 experts; the skewed ones aren't even enough for two fifths more."""
    changes = {
        "equal": {},
        "rounded": {"matrix_unit": False},
        "float32": {"dtype": torch.float32},
        "uneven": {"skew": 3.0},
        "unpadded": {"pad": False},
    }
    lengths = {
        name: EVEN._replace(**change).dispatch().counts.tolist() for name, change in changes.items()
    }
    assert len(set(lengths["equal"])) == 1 < len(set(lengths["uneven"]))
    assert lengths["float32"] == lengths["unpadded"]
    assert sum(lengths["unpadded"]) == 400 < sum(lengths["rounded"]) < sum(lengths["equal"]) <= 500


@settings(deadline=None)
@given(cases)
def test_experts_that_change_nothing_give_the_weighted_token(case):
    """There and back: Σ_k weight_k · token over kept choices."""
    case = case._replace(dtype=torch.float32)
    routing = routing_of(case.expert_index(), case.num_experts)
    dispatched = case.dispatch()
    mixed = LocalDispatcher().combine(dispatched.rows, dispatched, routing)
    factor = (routing.combine_weight * routing.kept).sum(-1)[0].unsqueeze(1)
    torch.testing.assert_close(mixed, case.x() * factor)


@pytest.mark.parametrize("size", [cpu.FEW_CHOICES, 5000])
@pytest.mark.parametrize("num_experts", [1, 2, 255, 256, 257, 1000])
def test_the_order_is_that_of_a_stable_sort(num_experts, size):
    """A byte holds 256 experts; above that torch sorts. 300 was 44 in a byte."""
    expert = torch.randint(num_experts, (size,), generator=torch.Generator().manual_seed(0))
    expert[:2] = num_experts - 1
    order, row, counts = cpu.sort_choices(expert, num_experts)
    assert {x.dtype for x in (order, row, counts)} == {torch.int64}
    assert order.tolist() == sorted(
        range(size), key=expert.tolist().__getitem__
    )  # Python's sort is stable
    assert row[order].tolist() == list(range(size))
    assert counts.tolist() == [expert.tolist().count(each) for each in range(num_experts)]
    assert torch.equal(order, cpu.sort_choices(expert, num_experts)[0])


def test_compiled_code_sorts_and_pads_nothing(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cpu, "np", None)  # nothing may call it
    compiled = EVEN.dispatch()
    monkeypatch.undo()
    unpadded = EVEN._replace(pad=False).dispatch()
    for name in ("rows", "counts", "token", "position"):
        assert torch.equal(getattr(compiled, name), getattr(unpadded, name))
