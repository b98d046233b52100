"""`moevision data score | prune`: what a training found out about its images, and which of them to keep."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from moevision.analysis.images import data_settings, run_folder
from moevision.data.scores import (
    FILE,
    LIST_HEAD,
    Scores,
    choose_kept_images,
    class_shares,
    expert_shares,
    prune,
    shares_table,
    starvation_warnings,
)
from moevision.errors import UserError, escape_controls
from moevision.files import refuse_foreign
from moevision.words import shell_word

_HARDEST = 0.1  # of --hardest where it isn't given


def run(chosen: Namespace) -> None:
    """Do the task that was asked for."""
    {"score": write_page, "prune": write_list}[chosen.task](chosen)


def run_of(address: str) -> Path:
    """The run folder; raises UserError if it is none."""
    folder = run_folder(address)
    if folder is None:
        raise UserError(
            f"{address} is no run folder, it has no config.yaml: give the folder that fit wrote."
        )
    return folder


def write_page(chosen: Namespace) -> None:
    """`moevision data score RUN`: write the page and the table."""
    from moevision.analysis.good_data import PAGE, TABLE, score_run

    run_dir = run_of(chosen.run)
    out = chosen.out or run_dir / "data"
    found = score_run(run_dir, out, show=chosen.show, quick=chosen.quick, command=chosen.command)
    counts = ", ".join(f"{count:,} {split}" for split, count in found["counts"].items())
    print(
        f"{counts} images"
        + ("" if chosen.quick else f", {found['unreadable']:,} of them unreadable")
    )
    print(
        f"The page is {escape_controls(str(out / PAGE))}; every number is in {escape_controls(str(out / TABLE))}"
    )


def write_list(chosen: Namespace) -> None:
    """`moevision data prune RUN`: write the list, and print the shares."""
    decided = chosen.by == "decisions"
    if decided and (chosen.decisions is None or chosen.keep is not None):
        raise UserError(
            "--by decisions needs --decisions FILE and no --keep: the file says what goes."
        )
    if not decided and (not chosen.keep or chosen.decisions is not None):
        raise UserError(
            f"--by {chosen.by} needs --keep SHARE above 0, such as 0.7, and no --decisions."
        )
    if chosen.hardest is not None and chosen.by != "ccs":
        raise UserError("--hardest belongs to --by ccs.")
    run_dir = run_of(chosen.run)
    scores = Scores.read(run_dir / FILE)
    if decided:
        kept, name = choose_kept_images(scores, chosen.decisions), "keep-decisions.csv"
    else:
        hardest = _HARDEST if chosen.hardest is None else chosen.hardest
        kept = prune(scores, chosen.by, chosen.keep, hardest=hardest, seed=chosen.seed)
        # Lists that differ lie side by side.
        others = ("" if hardest == _HARDEST else f"-hardest-{hardest:g}") + (
            f"-s{chosen.seed}" if chosen.seed else ""
        )
        name = f"keep-{chosen.by}-{chosen.keep:g}{others}.csv"
    out = chosen.out or run_dir / name
    relabelled = bool(data_settings(run_dir).get("relabel"))
    refuse_foreign(out, LIST_HEAD.encode())
    kept.write(out, scores, relabelled=relabelled)
    found = (class_shares(scores, kept), "class"), (expert_shares(scores, kept.keep), "expert")
    for shares, what in found:
        if shares:
            print("\n".join([*map(escape_controls, shares_table(shares, what)), ""]))
    for sentence in (each for shares, what in found for each in starvation_warnings(shares, what)):
        print(f"warning: {escape_controls(sentence)}")
    print(
        f"{kept.keep.sum():,} of {len(kept.keep):,} training images are kept: {escape_controls(str(out))}"
    )
    file = shell_word(escape_controls(str(out)))
    relabel = f" --data.relabel {file}" if kept.new_label or relabelled else ""
    print(f"train on them: the options of the run, a new --name, and --data.keep {file}{relabel}")
