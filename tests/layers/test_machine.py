"""What is said of the processor: torch's word, unless oneDNN may not use it."""

from collections.abc import Callable, Iterator

import pytest
import torch

from moevision.layers.cpu import has_matrix_unit

Machine = Callable[..., bool]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Answers for a machine with these capabilities and this limit of oneDNN."""

    def answer(capabilities: dict[str, bool] | None, allowed: str | None = None) -> bool:
        if capabilities is None:
            monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        else:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        if allowed is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
        has_matrix_unit.cache_clear()
        return has_matrix_unit()

    yield answer
    has_matrix_unit.cache_clear()


def test_torch_is_asked(machine):
    assert machine({"amx_bf16": True})
    for without in ({"amx_bf16": False, "avx512_bf16": True}, {"sve": True}, None):
        assert not machine(without)  # an ARM processor has no such key, an old torch doesn't say


@pytest.mark.parametrize("allowed", ["AVX2", "avx512_core_bf16", "AVX10_1_512"])
def test_onednn_may_not_use_it(machine, allowed):
    assert not machine({"amx_bf16": True}, allowed)


@pytest.mark.parametrize("allowed", ["DEFAULT", "all", "AVX512_CORE_AMX", "avx512_core_amx_fp16"])
def test_onednn_may_use_it_where_it_is(machine, allowed):
    assert machine({"amx_bf16": True}, allowed)
    assert not machine({"amx_bf16": False}, allowed)


def test_the_answer_is_kept(machine, monkeypatch):
    """One answer per process, as oneDNN reads the variable once."""
    assert machine({"amx_bf16": True})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert has_matrix_unit()
    has_matrix_unit.cache_clear()
    assert not has_matrix_unit()
