"""How the routing of a bundled model's examples formed: the recorded moments of its training, as the page reads them.

`moevision.models.history` has the file. Its last moment is the model as it is carried, which the page shows with all
numbers of a view; of the others it has weights and predictions only.

Axes: T moments, P patches, E experts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moevision.demo.bundle import Entry
from moevision.demo.view import top_classes
from moevision.demo.wire import RequestError, halves
from moevision.errors import UserError
from moevision.models.history import RoutingHistory


@dataclass(frozen=True, eq=False)
class Times:
    """The recorded moments of one model.

    Attributes:
        history: of images that are among the model's examples.
        rows: place of each image in it, by the example's id.
    """

    history: RoutingHistory
    rows: dict[str, int]

    @classmethod
    def of(cls, entry: Entry) -> Times | None:
        """Read the history of a model that has one.

        Raises:
            UserError: if the file is damaged, or of another model or other images.
        """
        if entry.history is None:
            return None
        history, facts, examples = RoutingHistory.load(entry.history), entry.facts, entry.examples
        experts = {layer: weights.shape[-1] for layer, weights in history.weights.items()}
        differs = {
            "no image of its own": not history.image_names,
            "other images": not set(history.image_names) <= examples.names,
            "other patches": history.grid != facts.grid,
            "other classes": history.class_names != facts.class_names,
            "other experts": experts != {router.layer: router.num_experts for router in facts.routers},
            "fewer than two moments": len(history) < 2,
        }
        for what, is_so in differs.items():
            if is_so:
                raise UserError(
                    f"{entry.history} doesn't fit the model beside it ({what}): put back the file that the package "
                    "came with."
                )
        return cls(history, {examples.id_of_name(name): row for row, name in enumerate(history.image_names)})

    def about(self) -> dict[str, Any]:
        """Which images were recorded, and after how many optimizer steps."""
        return {"images": list(self.rows), "steps": list(self.history.steps), "total_steps": self.history.total_steps}

    def of_image(self, id: str) -> dict[str, Any]:
        """All moments of one image.

        Returns:
            `picture`, `steps` and `total_steps`; `predictions`, for each moment the likeliest classes; and `layers`,
            each with its number `layer` and `weights` [T, P, E] as `wire.halves` packs them.

        Raises:
            RequestError: if it wasn't recorded.
        """
        if id not in self.rows:
            raise RequestError(f"The training was not recorded for {id!r}: choose one of {', '.join(self.rows)}.")
        history, row = self.history, self.rows[id]
        return {
            "picture": id,
            "steps": list(history.steps),
            "total_steps": history.total_steps,
            "predictions": [
                top_classes(history.class_names, moment[row].astype("float32")) for moment in history.probabilities
            ],
            "layers": [
                {"layer": layer, "weights": halves(weights[:, row])} for layer, weights in history.weights.items()
            ],
        }
