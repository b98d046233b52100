"""Two processes train like one: parameters, balance losses and router biases, over ranks and micro-batches."""

import os

import pytest
import torch
from torch import Tensor

from tests.forks import Forked
from tests.shared import free_port
from tests.train import two_processes
from tests.train.two_processes import CASES, IMAGES, STEPS, evaluated_loss, train

pytestmark = pytest.mark.deep


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """What each of two processes had at the end of every case."""
    folder = tmp_path_factory.mktemp("two")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = Forked([two_processes.__file__, str(folder)], folder, {**os.environ, **shared})
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said[-6000:]
    return {
        case: [torch.load(folder / f"{case}-{rank}.pt") for rank in range(2)]
        for case in (*CASES, "loss")
    }


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, two, tmp_path):
    """16 images per step: in one process at once, in two with one or two micro-batches each; float64, no noise.

    What is logged too, although the processes have different images: a mean over 8 here and 8 there is one over 16.
    """
    one, first, second = train(case, tmp_path), *two[case]
    assert one.pop("reduced").tolist() == []
    assert {"train/loss", "train/cross_entropy", "train/top1", "train/grad_norm"} <= one.keys()
    for name in one:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
        if (
            CASES[case][2] == 1 or name == "train/grad_norm" or not name.startswith("train/")
        ):  # else of a micro-batch
            torch.testing.assert_close(
                first[name], one[name], rtol=1e-6, atol=1e-8, check_dtype=False, msg=name
            )


def test_the_loss_of_two_processes_is_a_mean_over_images(two, tmp_path):
    """11 images, six in one process and five in the other, in batches of 3, 3, 3 and 2; in one, of 4, 4 and 3."""
    states = [*two["loss"], evaluated_loss(tmp_path)]
    assert [state["sizes"].tolist() for state in states] == [[3, 3], [3, 2], [4, 4, 3]]
    for state in states:
        assert float(state["loss"]) == pytest.approx(sum(state["each"].tolist()) / 11, rel=1e-5)


# Numbers of each all-reduce of a step, in order. Two layers of four experts; means are those of loss, cross-entropy
# and top-1; the last one is of the load that is logged.
MEANS, LOADS = 3, 2 * 4
REDUCED = {
    "bias": [MEANS, MEANS, LOADS, LOADS],  # a mean for each micro-batch; the bias's own loads
    # Importance is a function of E sums, load balancing of 2 E: one for both and all layers, and one backward.
    "losses": [2 * 3 * 4, MEANS, 2 * 3 * 4, LOADS],
    "z over micro-batches": [
        2 * 2,
        MEANS,
        2 * 2,
        2 * 2,
        MEANS,
        2 * 2,
        LOADS,
    ],  # a sum and a number of tokens
    "label over micro-batches": [2 * 2, MEANS, 2 * 2, 2 * 2, MEANS, 2 * 2, LOADS],
    "soft": [MEANS, MEANS, LOADS],
}


@pytest.mark.parametrize("case", REDUCED)
def test_reductions_are_bundled(case, two):
    assert [state["reduced"].tolist() for state in two[case]] == [STEPS * REDUCED[case]] * 2


def test_the_bias_counts_all_ranks_and_micro_batches_of_a_step(two):
    """16 images of 16 patches with K = 2 are 512 choices in each layer, and three steps of the bias were made of them.

    One process's share, or the last micro-batch's, would be 256.
    """
    for state in two["bias"]:
        assert state["counts"].sum(-1).tolist() == [IMAGES * 16 * 2] * 2
        for name in ("blocks.1.mlp.router.bias", "blocks.3.mlp.router.bias"):
            assert state[name].abs().max() > 0.01
            assert float(state[name].sum()) == pytest.approx(0, abs=1e-6)


def test_one_process_accumulates_the_bias_counts(tmp_path):
    """Four micro-batches of four images move the bias as 16 images at once do."""
    whole, parts = train("bias", tmp_path), train("bias", tmp_path, micro_batches=4)
    assert torch.equal(parts["counts"], whole["counts"])
    for name in ("blocks.1.mlp.router.bias", "blocks.3.mlp.router.bias"):
        assert torch.equal(parts[name], whole[name])
