"""The control that reads every place, shifted images, and the queue of runs."""

from argparse import Namespace
from dataclasses import dataclass

import pytest
import timm
import torch

from benchmarks import queue
from benchmarks.places import MICRO, PLACES, shifted

TINY = {
    "num_classes": 3,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 8,
    "num_experts": 4,
}


@pytest.mark.parametrize(("pooling", "reading"), PLACES.items())
def test_only_the_classifier_differs(pooling, reading) -> None:
    nets = []
    for name in (pooling, reading):
        torch.manual_seed(0)
        nets.append(timm.create_model(name, num_classes=10))
    one, other = (net.state_dict() for net in nets)
    shared = one.keys() & other.keys() - {"head.weight"}
    assert all(one[name].equal(other[name]) for name in shared)
    assert one.keys() - shared == {"fc_norm.weight", "fc_norm.bias", "head.weight"}
    assert other.keys() - shared == {"norm.weight", "norm.bias", "head.weight"}
    places, width = nets[1].patch_embed.num_patches, nets[1].embed_dim
    assert other["head.weight"].shape == (10, places * width)


def test_the_classifier_is_a_sum_over_places() -> None:
    net = timm.create_model(PLACES[MICRO], **TINY).eval()
    tokens = net.forward_features(torch.randn(2, 3, 32, 32))  # [2, 16, D], normalized
    weight = net.head.weight.unflatten(1, (16, 16))  # [C, N, D]
    expected = torch.einsum("bnd,cnd->bc", tokens, weight) + net.head.bias
    torch.testing.assert_close(net.forward_head(tokens), expected)
    assert not torch.allclose(
        net.forward_head(tokens.flip(1)), expected
    )  # it knows the place, as a mean doesn't
    mean = timm.create_model(MICRO, class_token=False, **TINY).eval()
    torch.testing.assert_close(mean.forward_head(tokens.flip(1)), mean.forward_head(tokens))


def test_images_are_moved_left_right_up_and_down() -> None:
    image = torch.arange(1.0, 10).view(1, 1, 3, 3).expand(4, 1, 3, 3)
    left, right, up, down = shifted(image, 1, torch.arange(4))[:, 0].tolist()
    assert left == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    assert right == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]
    assert up == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert down == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert shifted(image, 0, torch.arange(4)).equal(image)


@dataclass(frozen=True)
class Job:
    """A run by its name."""

    name: str


def test_a_run_is_a_line_and_is_not_repeated(tmp_path, capsys) -> None:
    """The second call does the run that the first one's limit left, the third finds nothing."""
    jobs = [Job("first"), Job("second")]
    for limit, printed in ((1, "first: 1\n"), (0, "second: 1\n"), (0, "")):
        options = Namespace(limit=limit, out=tmp_path / "runs.jsonl", work=tmp_path)
        queue.do_runs(
            lambda _: jobs, lambda *_: {"steps": 1}, lambda j, r: f"{j.name}: {r['steps']}", options
        )
        assert capsys.readouterr().out == printed
    assert queue.read_records(options.out) == [{"name": job.name, "steps": 1} for job in jobs]
