"""The models that the explorer offers: those that come with the package, or the one that the user names.

A bundled model is a folder with `card.json` (what it is, what it was trained on, how good it is, under which licence),
`trained/` and, where there are, `unbalanced/` (trained without the balance loss) and `dense/` (the dense twin), each
written by `moevision.models.io.save_model`; `atlas.json` and `atlas_unbalanced.json` sum up what they do with their
test images. Weights are stored in bfloat16, of a large model in eight bits (`moevision.models.io.unpack`), and computed
with in float32. The variant "untrained" is the same architecture with fresh weights. The card of a user's own model
comes from its run folder.

It may also have

- `history.safetensors`: routing of the examples while it was trained (`moevision.models.history`), and beside it
  `history_unbalanced.safetensors`;

and a model of photos

- `examples/CLASS/*.jpg` and `examples/SOURCES.json`: photos to show; per name `author`, `licence`, `source`, `changes`;
- `dense.json`: `class_names` and `probabilities` by name of the example, what the dense twin says, without its weights;
- `NOTICE`: where weights and photos come from.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moevision.analysis.images import (
    ImageSource,
    PictureSet,
    find_images,
    open_pictures,
    run_folder,
)
from moevision.analysis.readings import fresh_copy
from moevision.data.named import DATASET_NAMES, SYNTHETIC
from moevision.demo.examples import Examples, ScoredRun
from moevision.demo.facts import ModelFacts, describe, title_of
from moevision.errors import DataWarning, UserError, escape_controls
from moevision.models.history import FILE
from moevision.models.io import SavedModel, best_device, load_model
from moevision.models.safe_files import read_json
from moevision.words import percent, shell_word

Floats = npt.NDArray[np.float32]
SOURCES: Final = Path("examples/SOURCES.json")
HISTORIES: Final = {
    "trained": "history.safetensors",
    "unbalanced": "history_unbalanced.safetensors",
}
OWN: Final = "own"  # the id of a user's model


@dataclass(frozen=True)
class Card:
    """What people should know about a model before they believe it; empty or missing where unknown or not measured."""

    id: str  # its name in addresses
    title: str  # its name in words
    subtitle: str = ""  # one line under the title
    data: str = ""  # the training data, in words
    recipe: str = ""  # the command or config that trained it
    seed: int | None = None  # of that training
    accuracy: dict[str, float] = field(
        default_factory=dict
    )  # on test images, of `moe`, `dense` and `unbalanced`
    accuracy_interval: dict[str, list[float]] = field(
        default_factory=dict
    )  # 95 % interval [low, high] of each
    balanced_accuracy: dict[str, list[float]] = field(
        default_factory=dict
    )  # mean of the classes', [share, low, high]
    test_images: int | None = None  # on which these were measured
    recipes: dict[str, str] = field(
        default_factory=dict
    )  # the commands that trained each variant, and the dense twin
    note: str = ""  # what the commands don't say about the training
    validation_top1: list[float] = field(
        default_factory=list
    )  # of the trained model after each epoch
    licence: str = ""  # of the weights
    data_kind: str = ""  # name of the dataset as `--data` takes it
    recognized: float | None = None  # share of strangers, images of other things, that it calls so
    matters: dict[str, Any] | None = (
        None  # the image and the expert without which its answer changes most
    )

    def accuracy_text(self, variant: str) -> str:
        """As in "97.5 % of 832 test images right (dense twin: 97.1 %)"."""
        if variant == "untrained":
            return "not trained: its weights are random, so its predictions mean nothing"
        images = "" if self.test_images is None else f"{self.test_images:,} "
        known = self.accuracy.get("moe" if variant == "trained" else variant)
        right = (
            "accuracy not known"
            if known is None
            else f"{percent(known)} of {images}test images right"
        )
        if variant == "unbalanced":
            return f"{right}, trained without the balance loss"
        twin = (
            f" (dense twin: {percent(self.accuracy['dense'])})" if "dense" in self.accuracy else ""
        )
        return right + twin


def read_card(file: Path) -> Card:
    """Read a card.json; a UserError if it isn't one."""
    try:
        card = Card(**read_json(file))
        if card.recognized is not None and not 0 <= card.recognized <= 1:
            raise ValueError("recognized is no share")
        return card
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} is no model card ({error}): put back the file that the package came with."
        ) from error


def card_of_run(address: str) -> Card:
    """What a model's run folder tells about it; any other address is its own title."""
    run = run_folder(address)
    if run is None or not (run / "summary.json").is_file():
        return Card(
            id=OWN, title=title_of(address) or escape_controls(address), subtitle="your model"
        )
    file = run / "summary.json"
    try:
        summary = read_json(file)
        test, twin = summary["test"], summary["twin"]
        accuracy = {"moe": test["correct"] / test["total"]}
        if twin is not None:
            accuracy["dense"] = twin["correct"] / test["total"]
        seed = summary["seed"]
        return Card(
            id=OWN,
            title=escape_controls(str(summary["name"])),
            subtitle=str(summary["model"]),
            data=(
                f"{escape_controls(str(summary['data']))}: "
                f"{sum(summary['class_counts']['train'].values()):,} training images"
            ),
            recipe=f"moevision fit --config {shell_word(escape_controls(str(run / 'config.yaml')))}",
            seed=seed if type(seed) is int else None,
            accuracy=accuracy,
            test_images=test["total"],
            data_kind=str(summary["data"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{file} can't be read ({type(error).__name__}: {error}): mend it or move it away."
        ) from error


@dataclass(frozen=True)
class Variant:
    """One version of a model: `trained`, `unbalanced` or `untrained`."""

    saved: SavedModel
    facts: ModelFacts
    atlas: Path | None = None  # the file; None if it has to be computed


@dataclass(frozen=True)
class Entry:
    """A model with everything that belongs to it."""

    card: Card
    variants: dict[str, Variant]  # by name; `trained` comes first and is always there
    dense: SavedModel | None  # its dense twin
    examples: Examples
    # [C] what the dense twin says about examples, by their ids, where the twin itself isn't here
    dense_answers: Mapping[str, Floats] = field(default_factory=dict)
    histories: Mapping[str, Path] = field(
        default_factory=dict
    )  # by variant: routing of examples while it was trained
    address: str = "MODEL"  # what commands call it
    shown: str = ""  # which images these are, in words, where the user named them (`--data`)

    @property
    def facts(self) -> ModelFacts:
        """What views say about the trained model."""
        return self.variants["trained"].facts


def bundled_folders(home: Path | None = None) -> list[Path]:
    """Folders of the models that the package carries, or of those in `home`."""
    root = Path(str(files("moevision"))) / "demo" / "models" if home is None else home
    return sorted(file.parent for file in root.glob("*/card.json"))


def bundled_folder(name: str) -> Path:
    """The folder of one of the models that come with the package; a UserError if there is no such model."""
    folders = {folder.name: folder for folder in bundled_folders()}
    if name not in folders:
        raise UserError(f"There is no bundled model {name!r}: choose one of {', '.join(folders)}.")
    return folders[name]


def bundled_model(name: str, variant: str = "trained") -> SavedModel:
    """One of the models that come with the package, such as `pets`; a UserError if there is no such model or variant.

    `variant` is `trained`, `unbalanced` (trained without the balance loss), `untrained`, or `dense` (the dense twin).
    """
    folder = bundled_folder(name)
    variants = [kind for kind in ("trained", "unbalanced", "dense") if (folder / kind).is_dir()] + [
        "untrained"
    ]
    if variant not in variants:
        raise UserError(
            f"The bundled model {name!r} has no variant {variant!r}: choose one of {', '.join(variants)}."
        )
    if variant == "untrained":
        return untrained(load_model(str(folder / "trained")))
    return load_model(str(folder / variant))


def bundled_photos(name: str) -> PictureSet:
    """The photos that come with a bundled model such as `cats_vs_dogs`, as it sees them, labelled with its classes.

    Its NOTICE says where they come from. A UserError if there is no such model, or it comes without photos.
    """
    folder = bundled_folder(name)
    if not (folder / SOURCES).is_file():
        raise UserError(
            f"The bundled model {name!r} comes without photos: open {SYNTHETIC!r}, which are drawn."
        )
    return _photos(folder, bundled_model(name))


def _photos(folder: Path, model: SavedModel) -> PictureSet:
    home = folder / SOURCES.parent
    return open_pictures(
        home, model.image_size, framing=model.framing, split="all", class_names=model.class_names
    )


def open_entries(
    model: str | None, data: str | None = None, root: str | None = None, *, home: Path | None = None
) -> list[Entry]:
    """The model of that address, or all bundled ones: first those with images to show, photos before drawn ones.

    `data` and `root` are what the user said about images; None for the model's own, and for the folder `data`.
    """
    if model is not None:
        return [_open_own(model, data, root)]
    folders = bundled_folders(home)
    if not folders:
        raise UserError(
            "This installation carries no model: give one, as in moevision demo runs/NAME/model."
        )
    cards = [read_card(folder / "card.json") for folder in folders]
    kinds, entries = {card.data_kind for card in cards}, []
    for folder, card in zip(folders, cards, strict=True):
        own = data
        if card.data_kind == SYNTHETIC:  # the drawn images are for the model of their kind alone
            own = SYNTHETIC
        elif data in kinds - {
            card.data_kind
        }:  # another model's; a folder of photos is for all that know photos
            own = None
        entries.append(_open_bundled(folder, card, own, root))
    drawn_first = data == SYNTHETIC
    return sorted(
        entries,
        key=lambda entry: (
            not entry.examples.has_pictures,
            (entry.card.data_kind == SYNTHETIC) != drawn_first,
        ),
    )


def _open_bundled(folder: Path, card: Card, data: str | None, root: str | None) -> Entry:
    trained = load_model(str(folder / "trained"))
    nets: dict[str, tuple[SavedModel, str]] = {"trained": (trained, "atlas.json")}
    if (folder / "unbalanced").is_dir():
        nets["unbalanced"] = (load_model(str(folder / "unbalanced")), "atlas_unbalanced.json")
    nets["untrained"] = (untrained(trained), "atlas_untrained.json")
    dense = load_model(str(folder / "dense")) if (folder / "dense").is_dir() else None
    pictures, credits = None, None
    if data is not None:  # of a folder, from which the model learned nothing, all
        split = "test" if data in DATASET_NAMES else "all"
        pictures = ImageSource(data, None, {}).open(trained, split=split, root=root)
    elif (folder / SOURCES).is_file():
        pictures = _photos(folder, trained)
        credits = credits_of(folder / SOURCES)
    entry = _entry(card, nets, dense, pictures, folder, credits)
    histories = {variant: folder / name for variant, name in HISTORIES.items()}
    own = (
        credits is not None or card.data_kind == SYNTHETIC
    )  # else the images are others than those of the history
    file = folder / "dense.json"
    said = read_json(file)["probabilities"] if credits is not None and file.is_file() else {}
    return replace(
        entry,
        shown=_named(data, entry.examples.pictures),
        dense_answers={
            entry.examples.id_of_name(name): np.array(row, np.float32) for name, row in said.items()
        },
        histories={
            variant: file
            for variant, file in histories.items()
            if own and variant in nets and file.is_file()
        },
    )


def credits_of(file: Path) -> dict[str, str]:
    """Whose an example is and under which licence, by its name, from SOURCES.json."""
    return {
        name: ", ".join(
            escape_controls(str(row[key]))
            for key in ("author", "licence", "source", "changes")
            if row.get(key)
        )
        for name, row in read_json(file).items()
    }


def _open_own(address: str, data: str | None, root: str | None) -> Entry:
    trained = load_model(address)
    card = card_of_run(address)
    nets = {"trained": (trained, ""), "untrained": (untrained(trained), "")}
    run = run_folder(address)
    twin = None if run is None else run / "twin"
    dense = (
        load_model(str(twin))
        if twin is not None and (twin / "model" / "config.json").is_file()
        else None
    )
    images, pictures = None, None
    try:
        images = find_images(address, data)
        if images is not None:  # of a folder from which the model learned nothing, all
            split = "test" if images.run is not None or data in DATASET_NAMES else "all"
            pictures = images.open(trained, split=split, root=root)
    except UserError as error:  # routing one's own images works all the same
        if data is not None:
            raise
        warnings.warn(f"no images of the model's own: {error}", DataWarning, stacklevel=2)
    own = images is None or images.run is not None
    # Whoever names other images keeps those of the run to themselves (SECURITY.md).
    entry = _entry(
        card, nets, dense, pictures, None, scored=ScoredRun.of(address, trained) if own else None
    )
    history = None if run is None or images is None or images.run is None else run / FILE
    histories = {"trained": history} if history is not None and history.is_file() else {}
    named = _named(data, pictures, held_out=own)
    return replace(
        entry, address=shell_word(escape_controls(address)), shown=named, histories=histories
    )


def _entry(
    card: Card,
    nets: dict[str, tuple[SavedModel, str]],
    dense: SavedModel | None,
    pictures: PictureSet | None,
    folder: Path | None,
    credits: Mapping[str, str] | None = None,
    scored: ScoredRun | None = None,
) -> Entry:
    variants: dict[str, Variant] = {}
    for name, (saved, file) in nets.items():
        saved.net.to(best_device())
        text = card.accuracy_text(name)
        if name == "untrained":  # which has the trained one's architecture
            facts = replace(variants["trained"].facts, variant=name, accuracy_text=text)
        else:
            facts = describe(
                saved,
                id=card.id,
                title=card.title,
                variant=name,
                accuracy_text=text,
                data_text=card.data,
            )
        atlas = None if folder is None or not (folder / file).is_file() else folder / file
        variants[name] = Variant(saved, facts, atlas)
    if dense is not None:
        dense.net.to(best_device())
    trained = nets["trained"][0]
    examples = Examples(pictures, trained.image_size, credits, scored, trained.framing)
    return Entry(card, variants, dense, examples)


def _named(data: str | None, pictures: PictureSet | None, *, held_out: bool = False) -> str:
    """As in "All 40 images of holiday"; "The 832 test images of cats_vs_dogs" of a dataset known by name."""
    if data is None or data == SYNTHETIC or pictures is None:
        return ""
    name = escape_controls(Path(data).expanduser().resolve().name)
    if data in DATASET_NAMES:
        return f"The {len(pictures):,} test images of {name}"
    if held_out:
        return f"The {len(pictures):,} images of {name} that the run held out"
    return (
        f"All {len(pictures):,} images of {name}"
        if len(pictures) > 1
        else f"The one image of {name}"
    )


def untrained(like: SavedModel) -> SavedModel:
    """The same architecture with fresh weights, a random router among them."""
    return replace(like, net=fresh_copy(like.net, 0), strangers=None)
