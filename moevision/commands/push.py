"""`moevision push MODEL USER/NAME`: publish a saved model with its card on the Hugging Face hub.

In the format that timm loads: `hf-hub:user/name`. `timm.models.push_to_hf_hub` is not used: it would keep an old
README.md, can write pickles, and saves the model anew. Here `FILES` go up and nothing else, the weights byte for byte
or, if packed, unpacked.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors.torch import save

from moevision.errors import UserError, shown
from moevision.files import write_bytes_atomic
from moevision.models.io import load_model, model_folder, unpack
from moevision.models.safe_files import CONFIG, MAX_YAML_BYTES, WEIGHTS, read_bytes, weights_of
from moevision.models.strangers import FILE as STRANGERS
from moevision.words import loading

CARD = "README.md"
FILES = (CARD, CONFIG, WEIGHTS, STRANGERS)
"""What is published; nothing else of a folder ever is."""


def run(chosen: Namespace) -> None:
    """Write the card, then upload, or show what would be uploaded."""
    check_repo_id(chosen.repo)
    if chosen.out is not None and not chosen.dry_run:
        raise UserError("--out is the folder of --dry-run: add --dry-run, or leave --out out to upload.")
    if not Path(chosen.model).exists():
        raise UserError(f"There is no {chosen.model}: give a run folder or its model/ folder on this computer.")
    with loading("writing the card"):
        card = _own_card(chosen) if chosen.card is not None else _card(chosen)
        model = load_model(chosen.model)  # what can't be loaded here nobody could load
        folder = cast(Path, model_folder(Path(chosen.model)))
        file = weights_of(folder)
        weights = file if file.name == WEIGHTS else save(unpack(file), {"format": "pt"})
    files: dict[str, bytes | Path] = {CARD: card.encode(), CONFIG: folder / CONFIG, WEIGHTS: weights}
    if model.strangers is not None:
        files[STRANGERS] = folder / STRANGERS
    if chosen.dry_run:
        _dry_run(chosen, files)
        return
    if chosen.public and chosen.license is None and chosen.card is None:
        print("No --license was given, so others may look at the model but not use it.", file=sys.stderr)
    print(f"Uploading {shown(chosen.model)} to {chosen.repo} …", file=sys.stderr)
    page = upload(files, chosen.repo, private=not chosen.public, update=chosen.force)
    print(f"{page} ({'everyone' if chosen.public else 'only you'} can see it)")
    print(f"Try it: moevision predict hf-hub:{chosen.repo} image.jpg")


def check_repo_id(repo_id: str) -> str:
    """The address itself; a UserError unless it is `user/name` by the hub's rules."""
    try:
        validate_repo_id(repo_id if "/" in repo_id else "")
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} is no place on the hub: give USER/NAME, each of letters, digits, '-', '_' and '.', "
            "without '--' or '..'."
        ) from error
    return repo_id


def _card(chosen: Namespace) -> str:
    from moevision.train.report import UNKNOWN_LICENCE, gather_facts, model_card

    licence = chosen.license or UNKNOWN_LICENCE
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise UserError(f"--license {licence!r} is no abbreviation of the hub's: use one such as apache-2.0 or mit.")
    facts = gather_facts(
        chosen.model,
        name=chosen.repo.split("/")[1],
        address=f"hf-hub:{chosen.repo}",
        licence=licence,
        others=chosen.seeds,
        analysis=None if chosen.analysis is None else _analysis(Path(chosen.analysis), chosen.model),
    )
    return model_card(facts)


def _own_card(chosen: Namespace) -> str:
    if chosen.license or chosen.analysis or chosen.seeds:
        raise UserError("--card is a finished text: leave --license, --analysis and --seeds out, or leave it out.")
    try:
        text = read_bytes(Path(chosen.card), MAX_YAML_BYTES).decode("utf-8")
        ModelCard(text)
    except (OSError, ValueError) as error:
        raise UserError(f"--card {chosen.card} is no model card ({error}): give a README.md in UTF-8.") from error
    return text


def _analysis(folder: Path, model: str) -> dict[str, Any]:
    from moevision.analysis.collect import weights_sha256
    from moevision.analysis.report import former_report

    numbers = former_report(folder if folder.is_dir() else folder.parent)
    if numbers is None:
        raise UserError(f"{folder} holds no report: give --analysis the folder that `moevision analyze --out` wrote.")
    if numbers["provenance"]["weights_sha256"] != weights_sha256(load_model(model).net):
        raise UserError(
            f"The report in {folder} is of another model ({numbers['model']['name']}): "
            "run `moevision analyze` on this one."
        )
    return numbers


def _dry_run(chosen: Namespace, files: dict[str, bytes | Path]) -> None:
    folder = Path(chosen.out or Path("hub") / chosen.repo)
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    foreign = not found <= set(FILES) or (folder.exists() and not folder.is_dir())
    if foreign or (folder.exists() and found and not chosen.force):
        raise UserError(
            f"{folder} exists already: give --out another place"
            + ("." if foreign else ", or --force to write it anew.")
        )
    for name, content in files.items():
        write_bytes_atomic(folder / name, content if isinstance(content, bytes) else content.read_bytes())
    seen = "everyone" if chosen.public else "you alone"
    print(f"Would be uploaded to {chosen.repo}, seen by {seen}, from {shown(str(folder))}:")
    for name in files:
        print(f"  {name:21} {(folder / name).stat().st_size:>12,} bytes")


def upload(files: dict[str, bytes | Path], repo_id: str, *, private: bool, update: bool) -> str:
    """Publish files as the repository `user/name`, a new one unless `update`; returns the address of its page."""
    if get_token() is None:
        raise UserError(
            "The hub wants to know who you are: make a token with the right to write on "
            "https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )
    api = HfApi(library_name="moevision")
    with _in_words(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=update)
        if update and bool(api.model_info(repo_id).private) != private:
            raise UserError(
                f"{repo_id} exists and "
                + ("everyone can see it: say --public if this model may be seen too." if private else
                   "is private: make it public in its settings on the hub, or leave --public out.")
            )  # fmt: skip
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo_id, operations, commit_message="Add model")
    return f"{api.endpoint}/{repo_id}"


# huggingface_hub has changed its HTTP library more than once: the base of its own error is that of the library's.
_NETWORK: tuple[type[Exception], ...] = (cast(type[Exception], HfHubHTTPError.__mro__[1]), OSError)
_REFUSALS = {
    401: "The hub does not accept the token: run `hf auth login` with one that is valid.",
    403: "The token may not write to REPO: make one with the right to write, or publish under your own name.",
    404: "The hub has no place REPO for this token: check the name of the user or organisation.",
    409: "REPO exists already: choose another name, or say --force to add a new version to it.",
}


@contextmanager
def _in_words(repo_id: str) -> Iterator[None]:
    """Turn the hub's refusals and a missing network into sentences that say what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(_REFUSALS.get(status, f"The hub refused REPO: {error}").replace("REPO", repo_id)) from error
    except _NETWORK as error:  # also HF_HUB_OFFLINE
        raise UserError(
            f"The hub can't be reached ({error}): check the network and try again; --dry-run writes the files."
        ) from error
