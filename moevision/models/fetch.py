"""Open a model by its address, whose weights are safetensors and whose files were checked before anything is made.

Without this module timm would take `pytorch_model.bin`, a pickle, from a folder or a repository that has nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from moevision.errors import UserError
from moevision.models.safe_config import CONFIG, WEIGHTS, check_model_folder, read_config
from moevision.models.safe_files import read_header

FOLDER, HUB = "local-dir:", ("hf-hub:", "hf_hub:")
_SAFE_NAMES = {
    "": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}


def open_model(address: str, *, weights: bool = True, **options: Any) -> nn.Module:
    """`timm.create_model`, for files of unknown origin.

    Args:
        address: `local-dir:FOLDER`, `hf-hub:USER/NAME[@REVISION]`, or a timm name.
        weights: False builds the architecture alone.
        **options: for `timm.create_model`; None leaves an option to the model.

    Raises:
        UserError: if a file isn't what timm or moevision writes, or the weights are no safetensors.
        Exception: whatever timm, torch and the hub's client raise when files don't fit or can't be fetched.
    """
    if address.startswith(HUB):
        folder = _fetch_folder(address.split(":", 1)[1], weights)
        model = open_model(f"{FOLDER}{folder}", weights=weights, **options)
        # The place in this computer's cache says nothing to anyone who reads the model's facts.
        found: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        found.update(source="hf-hub", hf_hub_id=address.split(":", 1)[1], file=None)
        return model
    if address.startswith(FOLDER):
        check_model_folder(Path(address.removeprefix(FOLDER)), weights=weights)
    elif weights:
        options["pretrained_cfg_overlay"] = {"file": str(_fetch_weights(address)), "custom_load": False}
    created: nn.Module = timm.create_model(address, pretrained=weights, **options)
    return created


def _fetch_folder(repository: str, weights: bool) -> Path:
    """The files of a repository on the Hugging Face hub, both of one commit, in the hub's cache."""
    name, _, revision = repository.partition("@")
    config = _fetch(name, CONFIG, revision or None)
    read_config(config)  # before gigabytes are fetched for nothing
    if weights:
        _fetch(name, WEIGHTS, config.parent.name)  # the cache names a folder after its commit
    return config.parent


def _fetch_weights(name: str) -> Path:
    """The published weights of a timm name, as safetensors."""
    known = timm.get_pretrained_cfg(name)
    asked = "" if known is None else str(known.hf_hub_filename or "")
    file = asked if asked.endswith(".safetensors") else _SAFE_NAMES.get(asked)
    if known is None or not known.has_weights:
        raise UserError(f"There are no pretrained weights for {name}: choose one of timm.list_pretrained().")
    if not known.hf_hub_id or file is None:
        raise UserError(f"The weights of {name} are not published as safetensors, and pickles are never read.")
    repository, _, revision = str(known.hf_hub_id).partition("@")
    path = _fetch(repository, file, revision or None)
    read_header(path)
    return path


def _fetch(repository: str, file: str, revision: str | None) -> Path:
    """One file of a repository on the hub, in the hub's cache.

    Raises:
        UserError: if the hub can't be reached, or has no such repository or file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"The hub can't be reached, and {file} of {repository} is not in its cache on this computer: connect it to "
            "the network (without HF_HUB_OFFLINE), or give a folder with config.json and model.safetensors."
        ) from error
    except EntryNotFoundError as error:
        only = (
            "give a model that timm or moevision saved"
            if file == CONFIG
            else "only safetensors are read, never pickles"
        )
        raise UserError(f"{repository} has no {file} on the hub: {only}.") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"The hub has no {repository} in this revision, or hides it from you: check the name, or log in there with "
            "`hf auth login`."
        ) from error
