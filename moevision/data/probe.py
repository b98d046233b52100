"""A look at a few pictures: how they should be cropped, and whether all of them fit into memory decoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from moevision.data.augment import CropMode
from moevision.data.dataset import ImageDataset
from moevision.data.images import BadImageError
from moevision.data.sources import Collection, DrawnCollection, Sample

_NUM_PROBES = 32
_SMALL_PICTURE = 96  # px; up to here objects fill the frame and are shifted (pad) rather than cropped


def choose_crop(collection: Collection, samples: Sequence[Sample]) -> CropMode:
    """The crop that suits the pictures: "pad" for small and drawn ones, "random_resized" for photos."""
    if isinstance(collection, DrawnCollection):
        return "pad"
    short_sides = []
    for sample in samples[:: max(1, len(samples) // _NUM_PROBES)]:
        try:
            short_sides.append(min(collection.open(sample).size))
        except BadImageError:  # counted when it is decoded in its turn
            continue
    return "random_resized" if short_sides and median(short_sides) > _SMALL_PICTURE else "pad"


def estimate_bytes(datasets: Iterable[ImageDataset]) -> float:
    """Bytes of all prepared pictures; exact for square ones, else scaled up from a few."""
    total = 0.0
    for dataset in datasets:
        mean_bytes = 3.0 * dataset.image_size**2
        if not dataset.square:
            seen = []
            for index in range(0, len(dataset), max(1, len(dataset) // _NUM_PROBES)):
                try:
                    seen.append(dataset.decode(index).nbytes)
                except BadImageError:  # counted when it is decoded in its turn
                    continue
            mean_bytes = sum(seen) / len(seen) if seen else mean_bytes
        total += len(dataset) * mean_bytes
    return total
