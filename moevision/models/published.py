"""Weights that are published under a timm name: where, under which licence, how large, and whether they are here.

Nothing is fetched here but facts, and those within `PATIENCE_S`: a computer without a network is known by then,
whatever its name server does. `HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_HOME` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm

from moevision.errors import UserError
from moevision.models.safe_files import WEIGHTS

PATIENCE_S = 3.0
_SAFE_NAMES = {
    "": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
# Licences, as the hub abbreviates them, that let anybody use the weights for anything, with attribution at most.
FREE_LICENCES = frozenset(
    [
        *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "cc0-1.0"),
        *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    ]
)
NOT_STATED = "not stated"
_Found = TypeVar("_Found")


class HubUnreachableError(UserError):
    """The hub doesn't answer, or may not be asked."""


@dataclass(frozen=True)
class Published:
    """Where the weights of a timm name are.

    Attributes:
        name: timm's, with the tag of its weights, such as `deit_tiny_patch16_224.fb_in1k`.
        repository: on the hub.
        revision: of the repository; None is its newest.
        file: in the repository, a safetensors file.
        licence: as timm records it, abbreviated as on the hub; `not stated` if it doesn't.
    """

    name: str
    repository: str
    revision: str | None
    file: str
    licence: str


@dataclass(frozen=True)
class HubFacts:
    """What the hub says about a repository.

    Attributes:
        licence: as the hub abbreviates it; empty if its card has none.
        size_bytes: of the file of weights; None if the hub doesn't say.
    """

    licence: str
    size_bytes: int | None


def published(name: str) -> Published:
    """What timm records about the weights of a name.

    Raises:
        UserError: if there are none, or only as a pickle or archive.
    """
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise UserError(f"There are no pretrained weights for {name}: choose one of timm.list_pretrained().")
    asked = str(known.hf_hub_filename or "")
    file = asked if asked.endswith(".safetensors") else _SAFE_NAMES.get(asked)
    if not known.hf_hub_id or file is None:
        raise UserError(f"The weights of {name} are not published as safetensors, and pickles are never read.")
    repository, _, revision = str(known.hf_hub_id).partition("@")
    return Published(name, repository, revision or None, file, str(known.license or NOT_STATED).lower())


def cached(weights: Published) -> Path | None:
    """The file in the hub's cache on this computer; None if it isn't there. Asks nobody."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(
        weights.repository, weights.file, cache_dir=constants.HF_HUB_CACHE, revision=weights.revision
    )
    return Path(found) if isinstance(found, str) else None


def ask_hub(weights: Published) -> HubFacts:
    """Licence and size of published weights, as the hub states them today.

    Raises:
        HubUnreachableError: if it can't be asked within `PATIENCE_S`.
        UserError: if it has no such repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def ask() -> Any:
        return HfApi().model_info(
            weights.repository, revision=weights.revision, files_metadata=True, timeout=PATIENCE_S
        )

    try:
        info = _within(PATIENCE_S, ask)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"The hub has no {weights.repository}, or hides it from you: choose other weights, or log in there with "
            "`hf auth login`."
        ) from error
    except Exception as error:  # each version of the hub's client has its own; the cause stays attached
        raise HubUnreachableError(f"The hub can't be reached ({_reason(error)}).") from error
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    return HubFacts(_licence(info), sizes.get(weights.file))


def hub_answers(url: str) -> bool:
    """Whether a server answers at an address of the hub, whatever it says, within `PATIENCE_S`."""
    from huggingface_hub import get_session

    try:
        _within(PATIENCE_S, lambda: get_session().head(url, timeout=PATIENCE_S))
    except Exception:  # of whichever HTTP client huggingface_hub uses, or its offline mode
        return False
    return True


def is_free(licence: str) -> bool:
    """Whether weights under this licence may be taken unasked."""
    return licence in FREE_LICENCES


def _licence(info: Any) -> str:
    card = info.card_data
    stated = None if card is None else card.get("license")
    tags = (tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:"))
    return str(stated or next(tags, "")).lower()


def _reason(error: BaseException) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"no answer within {PATIENCE_S:.0f} s" if isinstance(error, TimeoutError) else type(error).__name__


def _within(seconds: float, work: Callable[[], _Found]) -> _Found:
    """What `work` returns or raises, or TimeoutError: a name server may keep a thread for minutes."""
    found: list[_Found] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError
    return found[0]
