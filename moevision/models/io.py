"""Where a model comes from and where it is saved: a folder, the Hugging Face hub, a timm name, or a file of weights.

A saved model is a folder in timm's own format, `config.json` and `model.safetensors`. timm alone opens it once
`moevision.models` is imported: `timm.create_model("local-dir:runs/x/model", pretrained=True)`. Files of unknown origin
are checked before anything is made of them (`safe_files`), and weights are always safetensors: timm itself would take
`pytorch_model.bin`, a pickle, from a folder or a repository that has nothing else. A large bundled model has eight bits
a weight instead (`unpack`), and `save_model` writes it in timm's format.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import Tensor, nn

from moevision.config import Fit, Framing
from moevision.errors import UserError, escape_controls
from moevision.files import model_not_found_message, sync_file, write_text_atomic
from moevision.layers import moe_layers
from moevision.models.ood import FILE as STRANGERS
from moevision.models.ood import MahalanobisOOD, read_ood
from moevision.models.safe_files import (
    CONFIG,
    PACKED,
    SCALE,
    WEIGHTS,
    check_model_folder,
    check_types,
    load_adapted_weights,
    parts_of,
    read_config,
    read_header,
    read_metadata,
    weights_of,
)
from moevision.models.vit_moe import NO_SOURCE  # registers the vit_moe names
from moevision.types import Json, Keywords, State, TimmModel
from moevision.words import shell_word

if TYPE_CHECKING:
    from moevision.stats import SetScores

ImageSize = int | tuple[int, int]
Colour = tuple[float, float, float]  # a value for red, green and blue each
LOCAL_PREFIX = "local-dir:"
HUB_PREFIXES = ("hf-hub:", "hf_hub:")
MAX_SIDE_PX = 4096  # of a model's input: one image takes 200 MB in float32
MAX_COLOUR = 1e4  # of a channel's mean and deviation, where the brightest pixel is 1
# `fit` in timm's words.
_CROP_MODES: dict[Fit, str] = {"crop": "center", "pad": "border", "squash": "squash"}


@dataclass(frozen=True)
class SavedModel:
    """A model with what is needed to use it on an image."""

    net: nn.Module  # the network, in eval mode
    class_names: list[str]  # [C] in words
    image_size: int  # side of the square input in pixels
    mean: Colour  # per channel, of pixels in [0, 1]
    std: Colour  # per channel, of pixels in [0, 1]
    # what logits are divided by for calibrated probabilities; None: not calibrated
    temperature: float | None = None
    # the out-of-distribution detector: distances from the classes that the model knows; None: not measured
    strangers: MahalanobisOOD | None = None
    fit: Fit = "crop"  # how an image that isn't square becomes so
    # [C] where images have several labels: the calibrated probability above which each is given; else empty
    thresholds: tuple[float, ...] = ()
    sets: SetScores | None = None  # for prediction sets; None: not measured
    # how `predict` answers: by the mean over an image and its mirror image; with prediction sets of this coverage
    mirror: bool = False
    coverage: float | None = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., C] of logits [..., C], not calibrated: of one class, or of each label by itself."""
        if self.thresholds:
            return logits.sigmoid()
        return logits.softmax(-1)

    @property
    def framing(self) -> Framing:
        """How images become square."""
        return Framing(self.fit, self.mean)


def load_model(address: str) -> SavedModel:
    """Load a model from a folder written by `save_model`, or any timm address (`hf-hub:...`, a timm name).

    Args:
        address: a run folder, its `model` folder, or a timm address.

    Raises:
        UserError: if there is no model, or its files are damaged or foreign.
    """
    with explain_load_errors(address):
        timm_address = address_of(address)
        folder = _local_folder(timm_address, weights=True)
        if folder is None:
            saved = describe(open_model(timm_address).eval())
        else:
            saved = describe(_open_folder(folder, timm_address).eval())
            saved = _with_measurements(saved, folder)
    if getattr(saved.net, "in_chans", 3) != 3:
        raise UserError(
            f"The model {address!r} can't be used: it takes images with other channels than red, green, blue."
        )
    check_finite_weights(saved.net, address)
    return saved


def check_finite_weights(net: nn.Module, address: str) -> None:
    """Refuse weights with which every answer is NaN; `address` is what to call the model in the error."""
    for name, value in net.state_dict().items():  # buffers too: statistics, biases of routers
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"The model {address!r} can't be used: its weight {name} holds NaN or infinity."
            )
        if name.endswith(".running_var") and bool((value < 0).any()):
            raise UserError(
                f"The model {address!r} can't be used: its variance {name} is negative."
            )


def describe(net: nn.Module) -> SavedModel:
    """A model with the class names, size and colour statistics that it carries; a UserError if those can't be used."""
    pretrained_cfg = getattr(net, "pretrained_cfg", None) or {}
    name = str(pretrained_cfg.get("architecture") or type(net).__name__)
    with explain_load_errors(name):
        data_config = timm.data.resolve_model_data_config(net)
        class_names = _class_names(pretrained_cfg, getattr(net, "num_classes", 0))
        image_size = _image_size(net, data_config)
        mean, std = colours(data_config["mean"], data_config["std"], name)
        fits = {crop_mode: fit for fit, crop_mode in _CROP_MODES.items()}
        fit = fits.get(data_config["crop_mode"], "crop")
        return SavedModel(net, class_names, image_size, mean, std, fit=fit)


def _image_size(net: nn.Module, data_config: Json) -> int:
    # The size that a ViT was built for or changed to; timm's configuration still has that of its first weights.
    built_for = getattr(getattr(net, "patch_embed", None), "img_size", None)
    height, width = (built_for or data_config["input_size"])[-2:]
    if height != width:
        raise UserError(
            f"The model takes images of {height} x {width} px: only square ones are supported."
        )
    if not isinstance(width, int) or not 1 <= width <= MAX_SIDE_PX:
        raise UserError(
            f"The model takes images of {width} px: a side is a whole number from 1 to {MAX_SIDE_PX}."
        )
    return width


def colours(mean: Any, std: Any, model: str) -> tuple[Colour, Colour]:
    """Mean and deviation of red, green and blue; a UserError if what a file says is none.

    The limits leave room for pixels in any unit, and keep what is computed with them finite in float32.
    """
    return (
        _colour("mean", mean, -MAX_COLOUR, model),
        _colour("std", std, 1 / MAX_COLOUR, model),
    )


def _colour(statistic: str, values: Any, minimum: float, model: str) -> Colour:
    match values:
        case [int() | float() as r, int() | float() as g, int() | float() as b]:
            if all(minimum <= value <= MAX_COLOUR for value in (r, g, b)):
                return float(r), float(g), float(b)
    raise UserError(
        f"The model {model!r} can't be used: its {statistic} is {str(values)[:80]} and must be three numbers "
        f"from {minimum:g} to {MAX_COLOUR:g}, for red, green and blue."
    )


def _class_names(config: Json, classes: int) -> list[str]:
    """Class names in words, [C].

    timm's `label_names` are a list, or a dict from index to name where some indices have none; they may be codes such
    as WordNet ids, for which `label_descriptions` has the words.
    """
    labels: Sequence[str] | dict[Any, str] = config.get("label_names") or []
    descriptions: dict[str, str] = config.get("label_descriptions") or {}
    if not isinstance(labels, dict):
        labels = dict(enumerate(labels)) if len(labels) == classes else {}

    names = [f"class {index}" for index in range(classes)]
    for index, label in labels.items():
        if 0 <= int(index) < classes:
            names[int(index)] = descriptions.get(label, label)
    return [escape_controls(name) for name in names]


def model_folder(path: Path) -> Path | None:
    """The folder with the files of a saved model, given it or its run folder; None if there is none."""
    return next((folder for folder in (path, path / "model") if (folder / CONFIG).is_file()), None)


def config_file(address: str) -> Path | None:
    """The config.json of a folder or of a hub's repository, fetched if need be; None for a timm name or a file."""
    if address.startswith(HUB_PREFIXES):
        name, _, revision = address.split(":", 1)[1].partition("@")
        return _fetch(name, CONFIG, revision or None)
    folder = model_folder(Path(address.removeprefix(LOCAL_PREFIX)))
    return None if folder is None else folder / CONFIG


def save_model(model: SavedModel, folder: Path) -> None:
    """Write a model that was created under a timm name (or converted by `convert_to_moe`) to `folder`.

    A weight keeps its dtype in the file; loading gives fp32, which holds a bf16 or fp16 weight's exact value.

    Raises:
        UserError: if the model doesn't know the timm name that builds it.
        OSError: if the folder can't be written or the disk is full; no half file of weights is left then.
    """
    if not getattr(model.net, "pretrained_cfg", None):
        raise UserError(
            f"This {type(model.net).__name__} can't be saved: it has no timm name, which builds it again. Make it by "
            "timm.create_model."
        )

    data_config = {
        "input_size": (3, model.image_size, model.image_size),
        "mean": model.mean,
        "std": model.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES[model.fit],
    }
    try:
        with model.net.register_state_dict_post_hook(_make_contiguous):
            timm.models.save_for_hf(
                model.net,
                str(folder),
                model_config={"label_names": model.class_names},
                data_config=data_config,
                safe_serialization=True,
            )
    except SafetensorError as error:
        (folder / WEIGHTS).unlink(missing_ok=True)
        raise OSError(errno.EIO, str(error), str(folder)) from error
    sync_file(folder / WEIGHTS)  # nobody else does; the folder is flushed with config.json

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # timm gives the number of classes a second time, among the arguments. timm takes both; transformers hands both to
    # timm.create_model, which is a TypeError.
    config.get("model_args", {}).pop("num_classes", None)
    if model.temperature is not None:
        config["calibration"] = {"temperature": model.temperature}
    if model.thresholds:
        config["thresholds"] = model.thresholds
    if model.sets is not None:
        config["prediction_sets"] = model.sets._asdict()
    if from_clusters(model.net):
        config["router_start"] = "cluster"
    if model.strangers is not None:
        save_file(model.strangers.state_dict(), folder / STRANGERS)
        config["strangers"] = True
    write_text_atomic(folder / CONFIG, json.dumps(config, indent=2))


def _make_contiguous(_net: nn.Module, state: State, _prefix: str, _metadata: Json) -> None:
    """A hook: safetensors refuses weights in another order, such as those of a `channels_last` convolution."""
    for name, tensor in state.items():
        state[name] = tensor.contiguous()


def from_clusters(net: nn.Module) -> bool:
    """Whether the routers of a model were initialised by clusters of their input (`start_routers`)."""
    return getattr(net, "router_start", None) == "cluster"


def create_from(
    source: str | Path,
    num_classes: int | None = None,
    image_size: ImageSize | None = None,
    *,
    weights: str | Path | None = None,
    load_weights: bool = True,
    depth: int | None = None,
    **rates: float | None,
) -> nn.Module:
    """A model and its weights; another class count replaces the classifier, another size resamples positions.

    `source` is a timm name, any timm address (`local-dir:`, `hf-hub:`), a saved model's folder or its run folder;
    `weights` a `.safetensors` file for the architecture that it names. `depth` keeps so many of the first blocks, and
    `rates` are timm's drop_path_rate, proj_drop_rate and patch_drop_rate, for training.
    """
    options: Keywords = {"num_classes": num_classes, "img_size": image_size, **rates}
    address = address_of(str(source))
    if weights and load_weights:
        net = _create_from_file(address, Path(weights), num_classes, options)
    else:
        with explain_load_errors(str(source)):
            net = open_model(address, weights=load_weights, **options)
    if depth is not None:
        net = first_blocks(net, depth)
    return net


@contextmanager
def explain_load_errors(source: str) -> Iterator[None]:
    """Say in one sentence that a model can't be loaded: damaged or foreign files fail in every type of error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the cause stays attached
        raise UserError(
            f"The model {source!r} can't be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
            "its files are damaged or don't fit, or it was not saved by timm or moevision."
        ) from error


def address_of(source: str) -> str:
    """The timm address of a saved model's folder or run folder, and any other address as it is."""
    path = Path(source.removeprefix(LOCAL_PREFIX))
    folder = model_folder(path)
    if folder is not None:
        return f"{LOCAL_PREFIX}{folder}"
    if is_timm_name(source):
        return source
    if path.exists() or source.startswith(LOCAL_PREFIX):
        saved = path / "checkpoints" / "last.ckpt"
        if saved.is_file():
            resume = f"moevision fit --resume {shell_word(str(path))}"
            raise UserError(
                f"{path} isn't finished: go on with `{resume}`. Until then `predict` takes {saved}."
            )
        raise UserError(
            f"{path} is no saved model: give a run's model/ folder (config.json and model.safetensors), such as "
            "runs/NAME/model; a file of weights goes with the name of its architecture."
        )
    if ":" in source:
        return source
    if "/" in source or os.sep in source:
        raise UserError(model_not_found_message(source))
    raise UserError(model_not_found_message(source) + _similar_names(source))


def is_timm_name(address: str) -> bool:
    """Whether this is a timm name, and neither a folder nor another address."""
    return ":" not in address and timm.is_model(address)


def architecture_of(file: str | Path) -> str:
    """The timm name of the architecture that a file of weights belongs to, as its own metadata say (`architecture`)."""
    try:
        name = read_metadata(file).get("architecture", "")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {file}.") from error
    if not timm.is_model(name):
        raise UserError(
            f"{file} doesn't say its architecture: give --model.arch.base, such as deit_tiny_patch16_224."
        )
    return name


def unknown_name(name: str) -> str:
    """A sentence that says there is no such model, and which ones are near."""
    return f"There is no model {name!r}.{_similar_names(name)}"


def _similar_names(name: str) -> str:
    bare = name.split(".")[0]
    names = timm.list_models("*vit*") + timm.list_models("*deit*")
    near = difflib.get_close_matches(bare, names, n=4, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else " See `timm.list_models('*vit*')`."


def _create_from_file(
    address: str, file: Path, num_classes: int | None, options: Keywords
) -> nn.Module:
    """A timm model with the weights of a safetensors file.

    It is made with the file's number of classes, so that timm checks every weight; then the classifier is replaced.
    """
    if file.suffix != ".safetensors" or not file.is_file():
        raise UserError(
            f"There is no .safetensors file {file}: only safetensors are read, never pickles."
        )
    if ":" in address:
        raise UserError(
            f"{address} has weights of its own: give {file} with the timm name of their architecture."
        )
    classifier = getattr(timm.get_pretrained_cfg(address), "classifier", None) or "head"
    if not isinstance(classifier, str):  # a distilled model has two, of as many classes
        classifier = classifier[0]
    entries = read_header(file)
    head = entries.get(f"{classifier}.weight")
    file_classes = 0 if head is None else head.shape[0]
    options = {**options, "num_classes": file_classes}
    overlay = {"file": str(file), "num_classes": file_classes}
    with explain_load_errors(f"{address} with {file}"):
        model: nn.Module = timm.create_model(
            address, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    check_types(file, model, entries)
    return reshape(model, num_classes, None)


def reshape(net: TimmModel, num_classes: int | None, image_size: ImageSize | None) -> nn.Module:
    """Change class count and image size as timm does, in place: a new classifier, resampled position embeddings."""
    if image_size is not None:
        net.set_input_size(img_size=image_size)
    if num_classes is not None and net.num_classes != num_classes:
        net.reset_classifier(num_classes)
    return cast(nn.Module, net)


def first_blocks(vit: TimmModel, depth: int) -> nn.Module:
    """Keep the first `depth` transformer blocks of a timm ViT, with everything around them, in place.

    The final norm and the classifier then read another block's output than they were trained on, so the cut model has
    to be trained on. Stochastic depth grows to its full rate at the new last block.
    """
    name = type(vit).__name__
    blocks = vit.blocks
    if not 1 <= depth <= len(blocks):
        raise UserError(
            f"depth is {depth}, and the pretrained model has {len(blocks)} blocks: use 1 to {len(blocks)}."
        )
    if depth == len(blocks):
        return cast(nn.Module, vit)
    if moe_layers(vit):
        raise UserError(
            f"{name} has experts, and only a dense model can be cut to its first blocks: leave depth out."
        )

    # From 0 at the first block to the rate at the last one, as timm spaces it.
    growth = (len(blocks) - 1) / max(1, depth - 1)
    for module in blocks.modules():
        if isinstance(module, DropPath):
            module.drop_prob *= growth

    vit.blocks = blocks[:depth]
    vit.feature_info = vit.feature_info[:depth]
    vit._model_args = {**getattr(vit, "_model_args", {}), "depth": depth}
    return cast(nn.Module, vit)


def open_model(address: str, *, weights: bool = True, **options: Any) -> nn.Module:
    """`timm.create_model`, for files of unknown origin.

    The address is `local-dir:FOLDER`, `hf-hub:USER/NAME[@REVISION]`, or a timm name; without `weights` the architecture
    alone is built. An option that is None is left to the model.
    """
    folder = _local_folder(address, weights=weights)
    if folder is not None:
        return _open_folder(folder, address, weights=weights, **options)
    if weights:
        file = str(fetch_weights(address))
        options["pretrained_cfg_overlay"] = {"file": file, "custom_load": False}
    return timm.create_model(address, pretrained=weights, **options)


def _local_folder(address: str, *, weights: bool) -> Path | None:
    """The folder of `local-dir:FOLDER`, or of a hub's repository in its cache, fetched if need be; None for a name."""
    if address.startswith(LOCAL_PREFIX):
        return Path(address.removeprefix(LOCAL_PREFIX))
    if not address.startswith(HUB_PREFIXES):
        return None
    config = cast(Path, config_file(address))
    content = read_config(config)  # before gigabytes are fetched for nothing
    if weights:
        name = address.split(":", 1)[1].partition("@")[0]
        commit = config.parent.name  # the cache names a folder after its commit
        _fetch(name, WEIGHTS, commit)
        if content.get("strangers"):
            _fetch(name, STRANGERS, commit)
    return config.parent


def _open_folder(folder: Path, address: str, *, weights: bool = True, **options: Any) -> nn.Module:
    """The model of a folder, which `address` names."""
    config = check_model_folder(folder, weights=weights)
    net: Any = timm.create_model(
        f"{LOCAL_PREFIX}{folder}", pretrained=False, pretrained_cfg_overlay=NO_SOURCE, **options
    )
    if weights:
        file = weights_of(folder)
        load_adapted_weights(net, unpack(file) if file.name == PACKED else load_file(file))
    # Without weights, too: a resumed training takes them from its checkpoint, and needs this fact.
    if config.get("router_start") == "cluster":
        net.router_start = "cluster"
    if address.startswith(HUB_PREFIXES):
        # The path in this computer's cache means nothing to a reader of the model's facts.
        repository = address.split(":", 1)[1]
        net.pretrained_cfg.update(source="hf-hub", hf_hub_id=repository, file=None)
    return cast(nn.Module, net)


def _with_measurements(saved: SavedModel, folder: Path) -> SavedModel:
    """A model with what `fit` measured for it, from its folder: temperature and out-of-distribution detector."""
    config = read_config(folder / CONFIG)
    if "calibration" in config:
        match config["calibration"]:
            case {"temperature": int() | float() as temperature} if 1e-3 <= temperature <= 1e3:
                saved = replace(saved, temperature=float(temperature))
            case _:
                raise UserError(
                    "calibration.temperature in its config.json is no number from 0.001 to 1000: mend it."
                )
    if "thresholds" in config:
        thresholds = _thresholds(config["thresholds"], len(saved.class_names))
        saved = replace(saved, thresholds=thresholds)
    if "prediction_sets" in config:
        saved = replace(saved, sets=_read_sets(config["prediction_sets"]))
    if config.get("strangers"):
        saved = replace(saved, strangers=read_ood(folder / STRANGERS, saved.net))
    return saved


def _thresholds(values: Any, classes: int) -> tuple[float, ...]:
    """Those of a config.json, one for each label; a UserError if what it says is none."""
    match values:
        case [*_] if len(values) == classes and all(
            isinstance(value, int | float) and 0 <= value <= 1 for value in values
        ):
            return tuple(map(float, values))
    raise UserError(
        f"thresholds in its config.json are no {classes} numbers from 0 to 1, one for each label: mend them."
    )


def _read_sets(content: Any) -> SetScores:
    """Those of a config.json; a UserError if what it says is none."""
    from moevision.stats import SetScores  # SciPy takes long

    match content:
        case {"temperature": float(temperature), "true_probabilities": [*values]} if all(
            isinstance(value, int | float) and 0 <= value <= 1 for value in values
        ):
            if 1e-3 <= temperature <= 1e3:
                return SetScores(temperature, values)
    raise UserError(
        "prediction_sets in its config.json must have a temperature from 0.001 to 1000 and true_probabilities from 0 "
        "to 1: mend or remove it."
    )


def unpack(file: Path) -> dict[str, Tensor]:
    """Weights by name from a packed model's `model.int8`, whose header `check_model_folder` has checked.

    A safetensors file: a large matrix is q, int8 [..., out, in], under its name and s, bfloat16 [..., out, G], under
    `NAME.scale`; its weight is q s, with one s for each of G equal parts of a row. All else is as the model has it.
    Where its header names another bundled model, what isn't stored is that model's (`parts_of`).
    The products are kept in memory alone: a cache on disk could go stale, or have no place to be written to.
    """
    tensors: dict[str, Tensor] = {}
    for part in parts_of(file):
        tensors |= load_file(part)
    for scale_name in [name for name in tensors if name.endswith(SCALE)]:
        scale = tensors.pop(scale_name).float().unsqueeze(-1)  # [..., out, G, 1]
        name = scale_name.removesuffix(SCALE)
        groups = scale.shape[-2]
        values = tensors[name].float().unflatten(-1, (groups, -1))  # [..., out, G, in / G]
        tensors[name] = (values * scale).flatten(-2)
    return tensors


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU; also in the place of Apple's GPU, which has no float64."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return accelerator


# ---- weights that are published under a timm name, and the Hugging Face hub
#
# `HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_HOME` mean what they mean to huggingface_hub.

PATIENCE_S = 3.0
"""How long an answer of the hub is waited for."""

_SAFE_NAMES = {
    "": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
# Licences, as the hub abbreviates them, that let anybody use the weights for anything, with attribution at most.
_SOFTWARE = ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib")
_CREATIVE_COMMONS = ("cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0")
FREE_LICENCES = frozenset((*_SOFTWARE, "unlicense", *_CREATIVE_COMMONS))
NOT_STATED = "not stated"
_HIDDEN = "The hub has no {} in this revision, or hides it from you: check the name, or log in by `hf auth login`."


class HubUnreachableError(UserError):
    """The hub doesn't answer, or may not be asked."""


@dataclass(frozen=True)
class Published:
    """Where the weights of a timm name are."""

    name: str  # timm's, with the tag of its weights, such as `deit_tiny_patch16_224.fb_in1k`
    repository: str  # on the hub
    revision: str | None  # of the repository; None is its newest
    file: str  # in the repository, a safetensors file
    licence: str  # as timm records it, abbreviated as on the hub; `not stated` if it doesn't


@dataclass(frozen=True)
class HubFacts:
    """What the hub says about a repository."""

    licence: str  # as the hub abbreviates it; empty if its card has none
    size_bytes: int | None  # of the file of weights; None if the hub doesn't say


def published(name: str) -> Published:
    """What timm records about the weights of a name."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(
            f"There are no pretrained weights for {name}: choose one of timm.list_pretrained()."
        )
    file = str(config.hf_hub_filename or "")
    if not file.endswith(".safetensors"):
        file = _SAFE_NAMES.get(file, "")
    if not config.hf_hub_id or not file:
        raise UserError(
            f"The weights of {name} are not published as safetensors, and pickles are never read."
        )
    repository, _, revision = str(config.hf_hub_id).partition("@")
    licence = str(config.license or NOT_STATED).lower()
    return Published(name, repository, revision or None, file, licence)


def cached(weights: Published) -> Path | None:
    """The file in the hub's cache on this computer; None if it isn't there. Asks nobody."""
    return _in_cache(weights.repository, weights.file, weights.revision)


def _in_cache(repository: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(
        repository, file, cache_dir=constants.HF_HUB_CACHE, revision=revision
    )
    return Path(path) if isinstance(path, str) else None


def ask_hub(weights: Published) -> HubFacts:
    """Licence and size of published weights, as the hub states them today; a `HubUnreachableError` if it doesn't."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:  # the hub's client tries twice, so half the time for each
        info = HfApi().model_info(
            weights.repository,
            revision=weights.revision,
            files_metadata=True,
            timeout=PATIENCE_S / 2,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(_HIDDEN.format(weights.repository)) from error
    except Exception as error:  # each version of the hub's client has its own
        reason = type(error).__name__
        if isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        raise HubUnreachableError(f"The hub can't be reached ({reason}).") from error

    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    licences = [tag for tag in info.tags or [] if tag.startswith("license:")]
    licence = "".join(licences[:1]).removeprefix("license:").lower()
    return HubFacts(licence, sizes.get(weights.file))


def fetch_weights(name: str) -> Path:
    """The published weights of a timm name, as safetensors: from the hub's cache, else from the hub."""
    weights = published(name)
    path = cached(weights) or _fetch(weights.repository, weights.file, weights.revision)
    read_header(path)  # a UserError if the file is damaged
    return path


_may_download = ContextVar("_may_download", default=True)


@contextmanager
def from_cache_only() -> Iterator[None]:
    """No downloads while the block lasts: a checkpoint from elsewhere must not be able to cause one."""
    token = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(token)


def _fetch(repository: str, file: str, revision: str | None) -> Path:
    """One file of a repository on the hub, in the hub's cache; where the connection breaks, its client goes on."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not _may_download.get():
        path = _in_cache(repository, file, revision)
        if path is not None:
            return path
        raise UserError(
            f"{file} of {repository} is not in the hub's cache on this computer, and nothing is fetched for a "
            f"checkpoint: if you trust it, fetch it by moevision info {shell_word(f'hf-hub:{repository}')}."
        )
    try:
        return Path(hf_hub_download(repository, file, revision=revision, etag_timeout=PATIENCE_S))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"The hub can't be reached, and {file} of {repository} is not in its cache on this computer: connect it to "
            "the network (without HF_HUB_OFFLINE), or give a folder with config.json and model.safetensors."
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{repository} has no {file} on the hub: only safetensors are read, never pickles."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(_HIDDEN.format(repository)) from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise UserError(
            f"The download of {file} of {repository} broke off ({type(error).__name__}), five tries to go on included: "
            "start the same command again, or give a file or folder."
        ) from error
