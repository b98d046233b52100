"""The models that the explorer offers: those that come with the package, or the one that the user names.

A bundled model is a folder with `card.json` (what it is, what it was trained on, how good it is, under which licence),
`trained/` and, where there is one, `dense/` (the dense twin), each written by `moevision.models.io.save_model`;
`atlas.json` sums up what the trained one does with its test images. Weights are stored in bfloat16, of a large model in
eight bits (`moevision.models.io.unpack`), and computed with in float32. The variant "untrained" is the same
architecture with fresh weights. The card of a user's own model comes from its run folder.

It may also have

- `history.safetensors`: routing of the examples while it was trained (`moevision.models.history`);

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

import numpy as np

from moevision.analysis.images import (
    ImageSource,
    PictureSet,
    find_images,
    open_pictures,
    run_folder,
)
from moevision.analysis.readings import fresh_copy
from moevision.data.folder import DATASET_NAMES
from moevision.data.named import DRAWN
from moevision.data.scores import FILE as SCORES
from moevision.demo.examples import Examples, ScoredRun
from moevision.demo.facts import ModelFacts, describe, title_of
from moevision.errors import DataWarning, UserError, escape_controls
from moevision.models.history import FILE
from moevision.models.io import SavedModel, best_device, load_model
from moevision.models.safe_files import read_json
from moevision.types import Floats, Json
from moevision.words import percent, shell_word

SOURCES = Path("examples/SOURCES.json")
HISTORY = "history.safetensors"
OWN = "own"  # the id of a user's model
# Of bundled models: for one version the old name answers, too.
FORMER_NAMES = {"cats_vs_dogs": "photos"}


@dataclass(frozen=True)
class Card:
    """What people should know about a model before they believe it; empty or missing where unknown or not measured."""

    id: str  # its name in addresses
    title: str  # its name in words
    subtitle: str = ""  # one line under the title
    data: str = ""  # the training data, in words
    recipe: str = ""  # the command or config that trained it
    seed: int | None = None  # of that training
    # On test images, of `moe` and `dense`; then the 95 % interval [low, high] of each.
    accuracy: dict[str, float] = field(default_factory=dict)
    accuracy_interval: dict[str, list[float]] = field(default_factory=dict)
    # Mean of the classes' accuracies, [share, low, high].
    balanced_accuracy: dict[str, list[float]] = field(default_factory=dict)
    test_images: int | None = None  # on which these were measured
    # The commands that trained each variant, and the dense twin.
    recipes: dict[str, str] = field(default_factory=dict)
    note: str = ""  # what the commands don't say about the training
    validation_top1: list[float] = field(default_factory=list)  # after each epoch
    licence: str = ""  # of the weights
    data_kind: str = ""  # name of the dataset as `--data` takes it
    recognized: float | None = None  # share of strangers, images of other things, that it calls so
    # The image and the expert without which its answer changes most: `picture`, `away`, `before` and `after`. `chosen`
    # says from how many images, how many of them are named right, and how many of these answers `change` so.
    matters: Json | None = None
    # By id of an example: the fewest experts `away` without which its answer changes, `before` and `after`; where few
    # don't do it `away` is None, and `all` the answer without all of them.
    falls: dict[str, Json] = field(default_factory=dict)
    # Experts that take mostly one part of the images: `layer`, `expert`, `name` (the part), `share` of its patches.
    names: list[Json] = field(default_factory=list)
    # By name what new images cost without these `experts`: accuracy [before, after] of the name's `own` class and of
    # all `others`, and points that the own one loses with as many patches at random.
    without: dict[str, Json] = field(default_factory=dict)
    # Of a router of whole images: how many test images of each class each expert got.
    sorting: Json | None = None

    def accuracy_text(self, variant: str) -> str:
        """As in "97.5 % of 832 test images right (dense twin: 97.1 %)"."""
        if variant == "untrained":
            return "not trained: its weights are random, so its predictions mean nothing"
        text = "accuracy not known"
        accuracy = self.accuracy.get("moe")
        if accuracy is not None:
            images = "" if self.test_images is None else f"{self.test_images:,} "
            text = f"{percent(accuracy)} of {images}test images right"
        if "dense" in self.accuracy:
            return f"{text} (dense twin: {percent(self.accuracy['dense'])})"
        return text


def read_card(file: Path) -> Card:
    """Read a card.json; a UserError if it isn't one."""
    try:
        return Card(**read_json(file))
    except TypeError as error:
        raise UserError(
            f"{file} is no model card ({error}): put back the file that the package came with."
        ) from error


def card_of_run(address: str) -> Card:
    """What a model's run folder tells about it; any other address is its own title."""
    run = run_folder(address)
    file = None if run is None else run / "summary.json"
    if file is None or not file.is_file():
        title = title_of(address) or escape_controls(address)
        return Card(id=OWN, title=title, subtitle="your model")
    try:
        return _card_of_summary(read_json(file), file.parent / "config.yaml")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{file} can't be read ({type(error).__name__}: {error}): mend it or move it away."
        ) from error


def _card_of_summary(summary: Json, config: Path) -> Card:
    test = summary["test"]
    accuracy = {"moe": test["correct"] / test["total"]}
    if summary["twin"] is not None:
        accuracy["dense"] = summary["twin"]["correct"] / test["total"]
    data = str(summary["data"])
    num_images = sum(summary["class_counts"]["train"].values())
    seed = summary["seed"]
    return Card(
        id=OWN,
        title=escape_controls(str(summary["name"])),
        subtitle=str(summary["model"]),
        data=f"{escape_controls(data)}: {num_images:,} training images",
        recipe=f"moevision fit --config {shell_word(escape_controls(str(config)))}",
        seed=seed if type(seed) is int else None,
        accuracy=accuracy,
        test_images=test["total"],
        data_kind=data,
    )


@dataclass(frozen=True, eq=False)
class Variant:
    """One version of a model: `trained` or `untrained`."""

    saved: SavedModel
    facts: ModelFacts
    atlas: Path | None = None  # the file; None if it has to be computed


@dataclass(frozen=True, eq=False)
class Entry:
    """A model with everything that belongs to it."""

    card: Card
    variants: dict[str, Variant]  # by name; `trained` comes first and is always there
    dense: SavedModel | None  # its dense twin
    examples: Examples
    # [C] what the dense twin says about examples, by their ids, where the twin itself isn't here
    dense_answers: Mapping[str, Floats] = field(default_factory=dict)
    history: Path | None = None  # routing of examples while it was trained
    address: str = "MODEL"  # what commands call it
    shown: str = ""  # which images these are, in words, where the user named them (`--data`)

    @property
    def facts(self) -> ModelFacts:
        """What views say about the trained model."""
        return self.variants["trained"].facts


def bundled_folders(home: Path | None = None) -> list[Path]:
    """Folders of the models that the package carries, or of those in `home`."""
    root = home or Path(str(files("moevision"))) / "demo" / "models"
    return sorted(file.parent for file in root.glob("*/card.json"))


def bundled_folder(name: str) -> Path:
    """The folder of one of the models that come with the package; a UserError if there is no such model."""
    folders = {folder.name: folder for folder in bundled_folders()}
    if name in FORMER_NAMES:
        warnings.warn(
            f"The bundled model {name!r} is {FORMER_NAMES[name]!r} now, with other classes and weights.",
            FutureWarning,
            stacklevel=3,
        )
        name = FORMER_NAMES[name]
    if name not in folders:
        raise UserError(f"There is no bundled model {name!r}: choose one of {', '.join(folders)}.")
    return folders[name]


def stored_models(folder: Path) -> list[str]:
    """Those of `trained` and `dense` that a bundled model has."""
    return [name for name in ("trained", "dense") if (folder / name).is_dir()]


def bundled_model(name: str, variant: str = "trained") -> SavedModel:
    """One of the models that come with the package, such as `pets`; a UserError if there is no such model or variant.

    `variant` is `trained`, `untrained`, or `dense` (the dense twin).
    """
    folder = bundled_folder(name)
    stored = stored_models(folder)
    if variant in stored:
        return load_model(str(folder / variant))
    if variant != "untrained":
        variants = ", ".join([*stored, "untrained"])
        raise UserError(
            f"The bundled model {name!r} has no variant {variant!r}: choose one of {variants}."
        )
    return untrained(load_model(str(folder / "trained")))


def bundled_photos(name: str) -> PictureSet:
    """The photos that come with a bundled model such as `photos`, as it sees them, labelled with its classes.

    Its NOTICE says where they come from. A UserError if there is no such model, or it comes without photos.
    """
    folder = bundled_folder(name)
    if not (folder / SOURCES).is_file():
        card = read_card(folder / "card.json")
        raise UserError(
            f"The bundled model {name!r} comes without photos: open {card.data_kind!r}, which are drawn."
        )
    return _photos(folder, bundled_model(folder.name))


def _photos(folder: Path, model: SavedModel) -> PictureSet:
    return open_pictures(
        folder / SOURCES.parent,
        model.image_size,
        framing=model.framing,
        split="all",
        class_names=model.class_names,
    )


def open_entries(
    model: str | None, data: str | None = None, root: str | None = None, *, home: Path | None = None
) -> list[Entry]:
    """The model of that address, or all bundled ones: photos before drawn ones, and then those whose `card.matters`.

    `data` and `root` are what the user said about images; None for the model's own, and for the folder `data`.
    """
    if model is not None:
        return [open_own(model, data, root)]
    folders = bundled_folders(home)
    if not folders:
        raise UserError(
            "This installation carries no model: give one, as in moevision demo runs/NAME/model."
        )
    cards = {folder: read_card(folder / "card.json") for folder in folders}
    data_kinds = {card.data_kind for card in cards.values()}
    entries = []
    for folder, card in cards.items():
        model_data = data
        if card.data_kind in DRAWN:  # drawn images are for the model of their kind alone
            model_data = card.data_kind
        elif data in data_kinds and data != card.data_kind:
            # Another model's; a folder of photos is for all that know photos.
            model_data = None
        entries.append(_open_bundled(folder, card, model_data, root))

    first_is_drawn = data in DRAWN

    def order(entry: Entry) -> tuple[bool, bool, bool]:
        is_drawn = entry.card.data_kind in DRAWN
        has_none = entry.card.matters is None
        return not entry.examples.has_pictures, is_drawn != first_is_drawn, has_none

    return sorted(entries, key=order)


def _open_bundled(folder: Path, card: Card, data: str | None, root: str | None) -> Entry:
    models = {name: load_model(str(folder / name)) for name in stored_models(folder)}
    trained = models["trained"]
    dense = models.pop("dense", None)
    models["untrained"] = untrained(trained)
    variants = _variants(card, models, folder)

    pictures = None
    credits: dict[str, str] = {}
    if data is not None:
        pictures = ImageSource(data, None, {}).open(trained, split=_split_of(data), root=root)
    elif (folder / SOURCES).is_file():
        pictures = _photos(folder, trained)
        credits = credits_of(folder / SOURCES)
    # Other images are not those of the card and of the history, whatever their names.
    are_known = bool(credits) or card.data_kind in DRAWN
    examples = Examples(
        pictures,
        trained.image_size,
        credits,
        framing=trained.framing,
        opening=card.matters["picture"] if are_known and card.matters else None,
    )

    history = folder / HISTORY
    dense_answers = {}
    if credits and (folder / "dense.json").is_file():
        for name, row in read_json(folder / "dense.json")["probabilities"].items():
            dense_answers[examples.id_of_name(name)] = np.array(row, np.float32)
    if dense is not None:
        dense.net.to(best_device())
    return Entry(
        card,
        variants,
        dense,
        examples,
        dense_answers=dense_answers,
        history=history if are_known and history.is_file() else None,
        shown=_name_images(data, pictures),
    )


def _split_of(data: str) -> str:
    """The images to show of a dataset known by name; all of a folder, from which the model learned nothing."""
    return "test" if data in DATASET_NAMES else "all"


def credits_of(file: Path) -> dict[str, str]:
    """Whose an example is and under which licence, by its name, from SOURCES.json."""
    credits = {}
    for name, row in read_json(file).items():
        texts = [row.get(key) for key in ("author", "licence", "source", "changes")]
        credits[name] = ", ".join(filter(None, texts))
    return credits


def open_own(address: str, data: str | None, root: str | None, number: int = 0) -> Entry:
    """A user's model; `number` tells apart those that are opened beside one another."""
    trained = load_model(address)
    card = card_of_run(address)
    if number:
        card = replace(card, id=f"{OWN}-{number}")
    variants = _variants(card, {"trained": trained, "untrained": untrained(trained)})
    run = run_folder(address)
    dense = None
    if run is not None and (run / "twin" / "model" / "config.json").is_file():
        dense = load_model(str(run / "twin"))
        dense.net.to(best_device())

    images = None
    pictures = None
    try:
        images = find_images(address, data)
        if images is not None:
            split = "test" if images.run is not None else _split_of(images.path)
            pictures = images.open(trained, split=split, root=root)
    except UserError as error:  # routing one's own images works all the same
        if data is not None:
            raise
        warnings.warn(f"no images of the model's own: {error}", DataWarning, stacklevel=2)

    # Whoever names other images keeps those of the run to themselves (SECURITY.md).
    of_run = images is None or images.run is not None
    scored = None
    if run is not None and of_run and (run / SCORES).is_file():
        scored = ScoredRun(run, trained)
    history = None
    shows_run = images is not None and images.run is not None
    if run is not None and shows_run and (run / FILE).is_file():
        history = run / FILE
    return Entry(
        card,
        variants,
        dense,
        Examples(pictures, trained.image_size, scored=scored, framing=trained.framing),
        history=history,
        address=shell_word(escape_controls(address)),
        shown=_name_images(data, pictures, held_out=of_run),
    )


def _variants(
    card: Card, models: dict[str, SavedModel], folder: Path | None = None
) -> dict[str, Variant]:
    """The versions of a model, `trained` first, with their atlases in `folder`."""
    variants: dict[str, Variant] = {}
    for name, model in models.items():
        model.net.to(best_device())
        text = card.accuracy_text(name)
        if name == "untrained":  # which has the trained one's architecture
            facts = replace(variants["trained"].facts, variant=name, accuracy_text=text)
        else:
            facts = describe(
                model,
                id=card.id,
                title=card.title,
                variant=name,
                accuracy_text=text,
                data_text=card.data,
            )
        atlas = None
        if folder is not None and name == "trained" and (folder / "atlas.json").is_file():
            atlas = folder / "atlas.json"
        variants[name] = Variant(model, facts, atlas)
    return variants


def _name_images(data: str | None, pictures: PictureSet | None, *, held_out: bool = False) -> str:
    """As in "All 40 images of holiday"; "The 832 test images of cats_vs_dogs" of a dataset known by name."""
    if data is None or data in DRAWN or pictures is None:
        return ""
    count = len(pictures)
    name = escape_controls(Path(data).expanduser().resolve().name)
    if data in DATASET_NAMES:
        return f"The {count:,} test images of {name}"
    if held_out:
        return f"The {count:,} images of {name} that the run held out"
    if count == 1:
        return f"The one image of {name}"
    return f"All {count:,} images of {name}"


def untrained(model: SavedModel) -> SavedModel:
    """The same architecture with fresh weights, a random router among them."""
    return replace(model, net=fresh_copy(model.net, 0), strangers=None)
