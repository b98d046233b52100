"""What is known about one finished run, as plain data; `report.py` turns it into summary.md.

All shares are fractions in [0, 1], all times seconds, all counts whole numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moevision.efficiency import ModelCost
from moevision.errors import UserError
from moevision.metrics import LayerLoad
from moevision.models.safe_files import read_json
from moevision.train.intervals import PairedDifference


@dataclass(frozen=True)
class TestScores:
    """Results on the test images, each seen once by the finished model."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    correct: int
    total: int
    majority_class: str
    """The class with the most training images."""
    majority_correct: int
    """Test images of that class: what always answering it would get right."""
    loss: float
    balanced_accuracy: float
    """Mean over classes of the share recognised, in [0, 1]."""
    ece: float
    """Expected calibration error in [0, 1]."""
    top5: float | None = None
    """Share with the right class among the five likeliest; None with five classes or fewer."""
    per_class: Sequence[tuple[str, int, int]] = ()
    """(class in words, recognised test images, test images) in class order."""
    weights: str = "the weights of the best validation epoch"
    """Which weights were tested and exported, e.g. the moving average (EMA) of the weights."""


@dataclass(frozen=True)
class TwinComparison:
    """The dense twin trained by the same recipe, tested on the same images."""

    difference: PairedDifference
    """Accuracy of the MoE model (a) minus that of the twin (b)."""
    match: str
    """What the twin has in common, e.g. "active FLOPs"."""
    correct: int
    """Test images that the twin classified correctly."""
    cost: ModelCost
    duration_s: float
    images_per_s: float


@dataclass(frozen=True)
class RunSummary:
    """Everything that summary.md says about one finished run."""

    name: str
    model: str
    """Name and essential arguments, e.g. "vit_moe_micro_patch4_32 (8 experts, 2 per token)"."""
    data: str
    """What was trained on: the folder's or dataset's name."""
    image_size: int
    split_note: str
    """Which images were train, validation and test, and where they come from; one sentence each."""
    class_counts: Mapping[str, Mapping[str, int]]
    """Images per split and class in words."""
    test: TestScores
    cost: ModelCost
    epochs: int
    steps: int
    """Optimizer steps that were applied."""
    batch_size: int
    """Images per optimizer step, over all devices and accumulation."""
    duration_s: float
    images_per_s: float
    """Training images per second, validation left out."""
    device: str
    precision: str
    seed: int | None
    data_wait: float | None = None
    """Share of the training time in which the process waited for data; None where it wasn't measured."""
    layers: Sequence[LayerLoad] = ()
    bad_images: Sequence[tuple[str, str, str]] = ()
    """(path, reason, split) of files that could not be read."""
    notes: Sequence[str] = ()
    """Whatever was skipped, stopped early or otherwise not as asked, a sentence each."""
    twin: TwinComparison | None = None
    next_commands: Sequence[tuple[str, str]] = ()
    """(what it does, the exact command); empty = `default_next_commands` for the folder of the summary."""


def read_summary(file: Path) -> RunSummary:
    """Read the summary.json of a run folder.

    Raises:
        UserError: if it isn't there, is damaged, or was written by a version with other fields.
    """
    try:
        given: dict[str, Any] = read_json(file)
        return RunSummary(
            **{
                **given,
                "test": TestScores(**given["test"]),
                "cost": ModelCost(**given["cost"]),
                "layers": [LayerLoad(**layer) for layer in given["layers"]],
                "twin": None if given.get("twin") is None else _read_twin(given["twin"]),
            }
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} can't be read as the summary of a run ({type(error).__name__}: {error}): "
            "give a run folder that this version of moevision has finished."
        ) from error


def _read_twin(given: dict[str, Any]) -> TwinComparison:
    difference, cost = PairedDifference(**given["difference"]), ModelCost(**given["cost"])
    return TwinComparison(**{**given, "difference": difference, "cost": cost})
