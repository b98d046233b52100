"""`moevision push MODEL USER/NAME`: publish a saved model with its card on the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moevision.errors import UserError
from moevision.names import shown

if TYPE_CHECKING:
    from moevision.models.io import SavedModel

DESCRIPTION = """\
Publish a saved model on the Hugging Face hub, where timm and moevision load it as hf-hub:USER/NAME.

Three files go up: model.safetensors, config.json and a model card (README.md) that says what the model is, on which
data it was trained and under which terms, how good it is beside its dense twin, how its experts are loaded, and what
was not measured. Numbers come from the run folder that the model lies in. Nobody but you sees it, unless you say
--public.
"""

EXAMPLES = """\
examples
  moevision push runs/pets me/pets-moe --dry-run               look at the files first: no token, no network
  moevision push runs/pets me/pets-moe --license apache-2.0    private: only you can see and load it
  moevision push runs/pets me/pets-moe --license apache-2.0 --analysis report --public
  moevision push runs/pets me/pets-moe --seeds runs/pets-2 runs/pets-3 --force     a new version

Log in once with `hf auth login`, or set HF_TOKEN. Class names and the name of the data's folder are published with the
model; pictures, paths and the names of files are not.
"""


def main(arguments: list[str]) -> None:
    """Run with command-line arguments."""
    chosen = _parser().parse_args(arguments)

    from moevision.models.io import load_model  # torch: not for --help
    from moevision.models.publish import check_repo_id, push_to_hub

    check_repo_id(chosen.repo)
    if not Path(chosen.model).exists():
        raise UserError(f"There is no {chosen.model}: give a run folder or its model/ folder on this computer.")
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
    print(f"Try it: moevision predict hf-hub:{chosen.repo} picture.jpg")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="moevision push", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run folder or its model/ folder")
    parser.add_argument("repo", metavar="USER/NAME", help="where on the hub")
    parser.add_argument("--public", action="store_true", help="show it to everyone (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="only write the files that would be uploaded")
    parser.add_argument("--out", metavar="DIR", help="folder for --dry-run (hub/USER/NAME)")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the weights, as the hub abbreviates it: apache-2.0, cc-by-nc-4.0, ...",
    )
    parser.add_argument("--analysis", metavar="REPORT", help="folder that `moevision analyze` wrote, for the card")
    parser.add_argument(
        "--seeds", nargs="+", default=[], metavar="RUN", help="other trainings of the same recipe, for the card"
    )
    parser.add_argument("--card", metavar="FILE", help="your own README.md instead of the generated card")
    parser.add_argument(
        "--force", action="store_true", help="add a new version to a repository, or to a --dry-run folder, that exists"
    )
    return parser


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
        text = Path(chosen.card).read_text(encoding="utf-8")
        ModelCard(text)
    except (OSError, ValueError) as error:
        raise UserError(f"--card {chosen.card} is no model card ({error}): give a README.md in UTF-8.") from error
    return text


def _analysis(folder: Path, saved: SavedModel) -> dict[str, Any]:
    """The numbers of a report of this very model."""
    from moevision.analysis.collect import weights_sha256
    from moevision.analysis.report.build import former_report

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
    from moevision.models.publish import FILES, stage_model

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
