"""`moevision data score | prune | curve`: what a training found out about its images, and which of them to keep."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from moevision.analysis.images import data_settings, run_folder
from moevision.data.prune import HEAD, class_shares, decide, expert_shares, prune, shares_table, starved
from moevision.data.scores import FILE, Scores
from moevision.errors import UserError
from moevision.files import refuse_foreign
from moevision.names import shown


def run(chosen: Namespace) -> None:
    """Do the task that was asked for."""
    {"score": write_page, "prune": write_list, "curve": train_curve}[chosen.task](chosen)


def run_of(address: str) -> Path:
    """The run folder.

    Raises:
        UserError: if it is none.
    """
    folder = run_folder(address)
    if folder is None:
        raise UserError(f"{address} is no run folder, it has no config.yaml: give the folder that fit wrote.")
    return folder


def write_page(chosen: Namespace) -> None:
    """`moevision data score RUN`: write the page and the table.

    Raises:
        UserError: if the run has no scores, or its images or model are gone.
    """
    from moevision.analysis.good_data.build import PAGE, TABLE, score

    run_dir = run_of(chosen.run)
    out = chosen.out or run_dir / "data"
    found = score(run_dir, out, show=chosen.show, quick=chosen.quick, command=chosen.command)
    counts = ", ".join(f"{count:,} {split}" for split, count in found["counts"].items())
    print(f"{counts} images" + ("" if chosen.quick else f", {found['unreadable']:,} of them unreadable"))
    print(f"The page is {shown(str(out / PAGE))}; every number is in {shown(str(out / TABLE))}")


def write_list(chosen: Namespace) -> None:
    """`moevision data prune RUN`: write the list, and print the shares.

    Raises:
        UserError: if an option is missing or doesn't belong to the method, or the run has no scores.
    """
    decided = chosen.by == "decisions"
    _check_options(chosen, decided)
    run_dir = run_of(chosen.run)
    scores = Scores.read(run_dir / FILE)
    if decided:
        plan, name = decide(scores, chosen.decisions), "keep-decisions.csv"
    else:
        hardest = 0.1 if chosen.hardest is None else chosen.hardest
        plan = prune(scores, chosen.by, chosen.keep, hardest=hardest, seed=chosen.seed)
        name = f"keep-{chosen.by}-{chosen.keep:g}.csv"
    out = chosen.out or run_dir / name
    relabelled = bool(data_settings(run_dir).get("relabel"))
    refuse_foreign(out, HEAD.encode())
    plan.write(out, scores, relabelled=relabelled)
    classes, experts = class_shares(scores, plan), expert_shares(scores, plan.keep)
    for shares, what in ((classes, "class"), (experts, "expert")):
        if shares:
            print("\n".join([*map(shown, shares_table(shares, what)), ""]))
    for sentence in [*starved(classes, "class"), *starved(experts, "expert")]:
        print(f"warning: {shown(sentence)}")
    print(f"{plan.keep.sum():,} of {len(plan.keep):,} training images are kept: {shown(str(out))}")
    relabel = f" --data.relabel {shown(str(out))}" if plan.new_label or relabelled else ""
    print(f"train on them: the options of the run, a new --name, and --data.keep {shown(str(out))}{relabel}")


def train_curve(chosen: Namespace) -> None:
    """`moevision data curve RUN`: train on fewer images, and compare.

    Raises:
        UserError: if the run has no scores or an end that is missing, or a training fails.
    """
    from moevision.commands.curve import run as run_curve

    run_curve(chosen, run_of(chosen.run))


def _check_options(chosen: Namespace, decided: bool) -> None:
    if decided and (chosen.decisions is None or chosen.keep is not None):
        raise UserError("--by decisions needs --decisions FILE and no --keep: the file says what goes.")
    if not decided and (chosen.keep is None or not chosen.keep or chosen.decisions is not None):
        raise UserError(f"--by {chosen.by} needs --keep SHARE above 0, such as 0.7, and no --decisions.")
    if chosen.hardest is not None and chosen.by != "ccs":
        raise UserError("--hardest belongs to --by ccs.")
