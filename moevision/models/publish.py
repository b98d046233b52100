"""Put a saved model on the Hugging Face hub, in the format that timm loads: `hf-hub:user/name`.

`timm.models.push_to_hf_hub` is not used: it would keep an old README.md, can write pickles, and saves the model anew.
Here exactly three files go up, and a folder's weights go up byte for byte.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.models.io import SavedModel, load_model, model_folder, save_model
from moevision.models.safe_files import CONFIG, WEIGHTS

CARD = "README.md"
FILES = (CARD, CONFIG, WEIGHTS)
"""What is published; nothing else of a folder ever is."""
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"


def check_repo_id(repo_id: str) -> str:
    """The address itself.

    Raises:
        UserError: unless it is `user/name` by the hub's rules.
    """
    if not re.fullmatch(f"{_PART}/{_PART}", repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise UserError(
            f"{repo_id!r} is no place on the hub: give USER/NAME, each of letters, digits, '-', '_' and '.', "
            "without '--' or '..'."
        )
    return repo_id


def stage_model(model: SavedModel | str | Path, card: str, folder: Path) -> list[Path]:
    """Write the files that are published to `folder`.

    Args:
        model: a model in memory, or a run folder or model folder, whose files are copied as they are.
        card: text of README.md.
        folder: a new or empty one.

    Returns:
        The files, in the order of `FILES`.

    Raises:
        UserError: if there is no such model, or it can't be loaded (nobody else could then), or the folder can't be
            written to.
    """
    if not isinstance(model, SavedModel):
        source = model_folder(Path(model))
        load_model(str(model))
        if source is None:
            raise UserError(f"{model} is no folder: only a model that lies on this computer can be published.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, SavedModel):
            save_model(model, folder)
        else:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(Path(source or "") / name, folder / name)
        write_text_atomic(folder / CARD, card)
    except OSError as error:
        raise UserError(f"{folder} can't be written to ({error.strerror}): make room or give another place.") from error
    return [folder / name for name in FILES]


def push_to_hub(
    model: SavedModel | str | Path,
    repo_id: str,
    *,
    card: str,
    private: bool = True,
    token: str | None = None,
    update: bool = False,
) -> str:
    """Publish a model with its card.

    Args:
        model: a model in memory, or a run folder or model folder.
        repo_id: `user/name`.
        card: text of README.md, from `moevision.train.card.model_card`.
        private: visible to you only; False makes it public.
        token: with the right to write; by default the one that `hf auth login` stored, or HF_TOKEN.
        update: add a new version to a repository that exists already.

    Returns:
        Address of the model's page.

    Raises:
        UserError: without a token or network, if the hub refuses, if the repository exists and `update` is False, or if
            it exists and is seen by others than `private` says.
    """
    check_repo_id(repo_id)
    if token is None and get_token() is None:
        raise UserError(
            "The hub wants to know who you are: make a token with the right to write on "
            "https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )
    api = HfApi(token=token, library_name="moevision")
    with TemporaryDirectory() as name, _in_words(repo_id):
        folder = Path(name)
        stage_model(model, card, folder)
        api.create_repo(repo_id, private=private, exist_ok=update)
        if update and bool(api.model_info(repo_id).private) != private:
            raise UserError(_SEEN_BY_OTHERS.format(repo=repo_id) if private else _SEEN_BY_NONE.format(repo=repo_id))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add model", allow_patterns=list(FILES))
    return f"{api.endpoint}/{repo_id}"


@contextmanager
def _in_words(repo_id: str) -> Iterator[None]:
    """Turn the hub's refusals and a missing network into sentences that say what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be published: unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise UserError(
            _REFUSALS.get(status, _OTHER).format(repo=repo_id, status=status, reason=_short(error))
        ) from error
    except _NETWORK as error:
        raise UserError(
            f"The hub can't be reached ({type(error).__name__}: {_short(error)}): check the network and try again; "
            "--dry-run writes the files without it."
        ) from error


# huggingface_hub has changed its HTTP library more than once: the base of its own error is that of the library's.
_NETWORK: tuple[type[Exception], ...] = (cast(type[Exception], HfHubHTTPError.__mro__[1]), OSError)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


_SEEN_BY_OTHERS = "{repo} exists and everyone can see it: say --public if this model may be seen too."
_SEEN_BY_NONE = "{repo} exists and is private: make it public in its settings on the hub, or leave --public out."
_REFUSALS = {
    401: "The hub does not accept the token: run `hf auth login` with one that is valid.",
    403: "The token may not write to {repo}: make one with the right to write, or publish under your own name.",
    404: "The hub has no place {repo} for this token: check the name of the user or organisation.",
    409: "{repo} exists already: choose another name, or say --force to add a new version to it.",
}
_OTHER = (
    "The hub refused {repo} (status {status}: {reason}): try again later, or look at https://status.huggingface.co."
)
