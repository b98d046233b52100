"""A linear probe: logistic regression on the frozen features of pretrained weights, from one pass over the images.

It says what the features alone are worth, before anything is fine-tuned, and its weights are the classifier that the
fine-tuning starts with: head first, then all (Kumar et al. 2022, arXiv:2202.10054, who found that a random head spoils
features on the way). The strength of its penalty is chosen on the validation images; the test images are only reported.

Axes: n images, D width of a feature, C classes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.files import write_json_atomic
from moevision.layers import moe_layers
from moevision.layers.routing import evaluating
from moevision.models.safe_files import read_json
from moevision.train.health import cpu_s
from moevision.train.processes import tell

FILE = "probe.json"
# Of each split. Nearly all of the time is that of the forward passes.
_MOST_IMAGES = {"train": 2_000, "val": 500, "test": 2_000}
_TIMED = 4  # batches, by which the time of all is told
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse penalties, for features of unit variance
_ABSENT = -20.0  # logit of a class without a training image
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Probe:
    """A linear classifier on frozen features.

    Attributes:
        train_images: that it was fitted to.
        val_correct: validation images that it classifies correctly.
        val_images: all of them.
        head_val_correct: validation images that the model's own classifier, as it came, classifies correctly.
        test_correct: for each of its test images, by their stable ids, whether it is classified correctly.
        seconds: features and regression together, without what the process was stopped for.
        cpu_s: CPU seconds of the same.
        of_experts: whether the weights came with experts, so that no dense model has these features.
        mbytes: of the model that it is the classifier of, in float32.
        head: its weights [C, D] and biases [C]; None if it was read from a file.
    """

    train_images: int
    val_correct: int
    val_images: int
    head_val_correct: int
    test_correct: dict[str, bool]
    seconds: float
    mbytes: float
    cpu_s: float = 0.0  # which earlier versions didn't keep
    of_experts: bool = False
    head: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def beats_the_head(self) -> bool:
        """Whether it is the better classifier to start with; one that was trained for these classes may be better."""
        return self.val_correct > self.head_val_correct

    def sentence(self) -> str:
        """What it found, for the terminal."""
        correct, total = sum(self.test_correct.values()), len(self.test_correct)
        start = "the classifier starts with it" if self.beats_the_head else "the weights' own classifier is kept"
        return (
            f"linear probe: {self.val_correct / max(1, self.val_images):.1%} of {self.val_images:,} validation and "
            f"{correct / max(1, total):.1%} of {total:,} test images by logistic regression on the frozen features, in "
            f"{self.seconds:.0f} s; {start}"
        )

    def write(self, run_dir: Path) -> None:
        """Leave everything but the head in a run folder."""
        facts = {name: value for name, value in vars(self).items() if name != "head"}
        write_json_atomic(run_dir / FILE, facts)


def read_probe(run_dir: Path) -> Probe | None:
    """The probe of a run; None if it had none.

    Raises:
        UserError: if its file is damaged.
    """
    try:
        return Probe(**read_json(run_dir / FILE))
    except FileNotFoundError:
        return None
    except TypeError as error:
        raise UserError(f"{run_dir / FILE} can't be read ({error}): remove it.") from error


def fit_probe(
    net: nn.Module,
    data: ImageDataModule,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    now: Callable[[], float] = time.perf_counter,
) -> Probe | None:
    """Fit a probe to the features of `net`; None for a model whose features and classifier can't be told apart.

    Says what it does and, by the first batches, how long that takes. Of each split it takes `_MOST_IMAGES` at most, of
    every class the same share.

    Args:
        net: a timm model with the classes of the data; left as it was, but for the device.
        data: after `setup("fit")`.
        device: where features are computed.
        context: around each forward pass, such as autocast.
        now: a clock, in seconds.
    """
    head = linear_head(net)
    if head is None:
        return None
    began, began_cpu_s = now(), cpu_s()
    net.to(device)
    taken = {split: _some(data, split, most) for split, most in _MOST_IMAGES.items()}
    images = {split: len(indices) for split, indices in taken.items()}
    batches = sum(-(-count // data.batch_size) for count in images.values())
    ends: list[float] = []

    def say_how_long() -> None:
        ends.append(now())
        if len(ends) == _TIMED:
            tell(
                f"linear probe: logistic regression on the frozen features of {images['train']:,} training, "
                f"{images['val']:,} validation and {images['test']:,} test images, about "
                f"{batches * (ends[-1] - ends[0]) / (_TIMED - 1):.0f} s"
            )

    with evaluating(net):
        found = {
            split: _features(net, data, split, indices, device, context, say_how_long)
            for split, indices in taken.items()
        }
    (x, y, _), (val_x, val_y, _), (test_x, test_y, test_index) = (found[split] for split in ("train", "val", "test"))
    weight, bias = _best_regression(x, y, val_x, val_y, data.num_classes)
    own_weight, own_bias = head.weight.detach().double().cpu().numpy(), _bias_of(head)
    correct = _classify(test_x, weight, bias) == test_y
    return Probe(
        train_images=len(y),
        val_correct=int((_classify(val_x, weight, bias) == val_y).sum()),
        val_images=len(val_y),
        head_val_correct=int((_classify(val_x, own_weight, own_bias) == val_y).sum()),
        test_correct={
            data.sample_id("test", int(index)): bool(right) for index, right in zip(test_index, correct, strict=True)
        },
        seconds=now() - began,
        mbytes=4 * sum(parameter.numel() for parameter in net.parameters()) / 1e6,
        cpu_s=cpu_s() - began_cpu_s,
        of_experts=bool(moe_layers(net)),
        head=(torch.from_numpy(weight), torch.from_numpy(bias)),
    )


def linear_head(net: nn.Module) -> nn.Linear | None:
    """The classifier of a timm model, if it is one linear map of features that the model tells."""
    state = cast(Any, net)
    if not (hasattr(state, "forward_head") and hasattr(state, "get_classifier")):
        return None
    head = state.get_classifier()
    return head if isinstance(head, nn.Linear) else None


@torch.no_grad()
def start_with(net: nn.Module, probe: Probe) -> None:
    """Give the classifier the probe's weights, in place."""
    head = linear_head(net)
    if head is None or probe.head is None:
        raise ValueError("the probe has no head, or the model has none that takes it")
    head.weight.copy_(probe.head[0])
    if head.bias is not None:
        head.bias.copy_(probe.head[1])


@torch.no_grad()
def _features(
    net: nn.Module,
    data: ImageDataModule,
    split: str,
    indices: list[int],
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
    after_batch: Callable[[], None],
) -> tuple[Floats, Integers, Integers]:
    """Features [n, D], labels [n] and indices [n] of images without augmentation."""
    state = cast(Any, net)
    features, labels, places = [], [], []
    for batch in data.plain_loader(split, indices):
        with context():
            tokens = state.forward_features(batch["image"].to(device))
            features.append(state.forward_head(tokens, pre_logits=True).double().cpu())
        labels.append(batch["label"].cpu())
        places.append(batch["index"].cpu())
        after_batch()
    return torch.cat(features).numpy(), torch.cat(labels).numpy(), torch.cat(places).numpy()


def _some(data: ImageDataModule, split: str, most: int) -> list[int]:
    """At most `most` images of a split at random, of every class the same share."""
    labels = np.array([sample.label for sample in data.contents.datasets[split].samples])
    order = np.random.default_rng(data.seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, each in random order
    return sorted(
        int(index) for index in order[np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)]
    )


def _best_regression(x: Floats, y: Integers, val_x: Floats, val_y: Integers, classes: int) -> tuple[Floats, Floats]:
    """Weights [C, D] and biases [C] for raw features; the penalty is the best on validation, the strongest at a tie."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, spread = x.mean(0), x.std(0) + 1e-6
    best: tuple[int, Floats, Floats] | None = None
    for strength in _STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near its optimum is near enough
            model = LogisticRegression(C=strength, max_iter=300).fit((x - mean) / spread, y)
        weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, _ABSENT)
        present, coefficients, intercept = model.classes_, model.coef_, model.intercept_
        if len(present) == 2:  # one row, for the second class against the first
            coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
            intercept = np.concatenate([-intercept / 2, intercept / 2])
        weight[present] = coefficients / spread
        bias[present] = intercept - weight[present] @ mean
        correct = int((_classify(val_x, weight, bias) == val_y).sum())
        if best is None or correct > best[0]:
            best = correct, weight, bias
    assert best is not None
    return best[1], best[2]


def _classify(x: Floats, weight: Floats, bias: Floats) -> Integers:
    return cast(Integers, (x @ weight.T + bias).argmax(1))


def _bias_of(head: nn.Linear) -> Floats:
    zeros = np.zeros(head.out_features)
    return zeros if head.bias is None else head.bias.detach().double().cpu().numpy()
