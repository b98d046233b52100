"""`moevision push MODEL USER/NAME`: publish a saved model with its card on the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from moevision.commands import loading
from moevision.errors import UserError
from moevision.models.io import SavedModel, load_model
from moevision.models.publish import FILES, check_repo_id, push_to_hub, stage_model
from moevision.models.safe_files import MAX_YAML_BYTES, read_bytes
from moevision.names import shown


def run(chosen: Namespace) -> None:
    """Write the card, then upload, or show what would be uploaded.

    Raises:
        UserError: if the model, the repository's name or a file for the card can't be used.
    """
    check_repo_id(chosen.repo)
    if chosen.out is not None and not chosen.dry_run:
        raise UserError("--out is the folder of --dry-run: add --dry-run, or leave --out out to upload.")
    if not Path(chosen.model).exists():
        raise UserError(f"There is no {chosen.model}: give a run folder or its model/ folder on this computer.")
    with loading("writing the card"):
        saved = load_model(chosen.model)
        card = _card(chosen, saved)
    if chosen.dry_run:
        print(_dry_run(chosen, card))
        return
    if chosen.public and chosen.license is None and chosen.card is None:
        print("No --license was given, so others may look at the model but not use it.", file=sys.stderr)
    print(f"Uploading {shown(chosen.model)} to {chosen.repo} …", file=sys.stderr)
    page = push_to_hub(chosen.model, chosen.repo, card=card, private=not chosen.public, update=chosen.force)
    print(f"{page} ({'everyone' if chosen.public else 'only you'} can see it)")
    print(f"Try it: moevision predict hf-hub:{chosen.repo} image.jpg")


def _card(chosen: Namespace, saved: SavedModel) -> str:
    """The text of README.md.

    Raises:
        UserError: if a file that it is made from is missing, or of another model.
    """
    if chosen.card is not None:
        return _own_card(chosen)
    from moevision.train.card import UNKNOWN_LICENCE, gather_facts, model_card

    licence = chosen.license or UNKNOWN_LICENCE
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise UserError(f"--license {licence!r} is no abbreviation of the hub's: use one such as apache-2.0 or mit.")
    facts = gather_facts(
        chosen.model,
        name=chosen.repo.split("/")[1],
        address=f"hf-hub:{chosen.repo}",
        licence=licence,
        others=chosen.seeds,
        analysis=None if chosen.analysis is None else _analysis(Path(chosen.analysis), saved),
    )
    return model_card(facts)


def _own_card(chosen: Namespace) -> str:
    from huggingface_hub import ModelCard

    if chosen.license or chosen.analysis or chosen.seeds:
        raise UserError("--card is a finished text: leave --license, --analysis and --seeds out, or leave it out.")
    try:
        text = read_bytes(Path(chosen.card), MAX_YAML_BYTES).decode("utf-8")
        ModelCard(text)
    except (OSError, ValueError) as error:
        raise UserError(f"--card {chosen.card} is no model card ({error}): give a README.md in UTF-8.") from error
    return text


def _analysis(folder: Path, saved: SavedModel) -> dict[str, Any]:
    """The numbers of a report of this very model."""
    from moevision.analysis.collect import weights_sha256
    from moevision.analysis.report import former_report

    numbers = former_report(folder if folder.is_dir() else folder.parent)
    if numbers is None:
        raise UserError(f"{folder} holds no report: give --analysis the folder that `moevision analyze --out` wrote.")
    if numbers["provenance"]["weights_sha256"] != weights_sha256(saved.net):
        raise UserError(
            f"The report in {folder} is of another model ({numbers['model']['name']}): "
            "run `moevision analyze` on this one."
        )
    return numbers


def _dry_run(chosen: Namespace, card: str) -> str:
    """Write the folder, and say what is in it."""
    folder = Path(chosen.out or Path("hub") / chosen.repo)
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in found if name not in FILES]
    if folder.exists() and (not folder.is_dir() or foreign or (found and not chosen.force)):
        raise UserError(
            f"{folder} exists already: give --out another place"
            + ("." if foreign else ", or --force to write it anew.")
        )
    files = stage_model(chosen.model, card, folder)
    lines = [f"  {file.name:18} {file.stat().st_size:>12,} bytes" for file in files]
    seen = "everyone" if chosen.public else "you alone"
    return "\n".join([f"Would be uploaded to {chosen.repo}, seen by {seen}, from {shown(str(folder))}:", *lines])
