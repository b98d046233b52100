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
from moevision.files import require_own_file
from moevision.words import shell_word

_HARDEST = 0.1  # of --hardest where it isn't given


def run(args: Namespace) -> None:
    """Do the task that was asked for."""
    {"score": write_page, "prune": write_list}[args.task](args)


def run_of(address: str) -> Path:
    """The run folder; raises UserError if it is none."""
    folder = run_folder(address)
    if folder is None:
        raise UserError(
            f"{address} is no run folder, it has no config.yaml: give the folder that fit wrote."
        )
    return folder


def write_page(args: Namespace) -> None:
    """`moevision data score RUN`: write the page and the table."""
    from moevision.analysis.good_data import PAGE, TABLE, score_run

    run_dir = run_of(args.run)
    out = args.out or run_dir / "data"
    facts = score_run(run_dir, out, show=args.show, quick=args.quick, command=args.command)
    counts = ", ".join(f"{count:,} {split}" for split, count in facts["counts"].items())
    unreadable = "" if args.quick else f", {facts['unreadable']:,} of them unreadable"
    page, table = (escape_controls(str(out / name)) for name in (PAGE, TABLE))
    print(f"{counts} images{unreadable}\nThe page is {page}; every number is in {table}")


def write_list(args: Namespace) -> None:
    """`moevision data prune RUN`: write the list, and print the shares."""
    _check(args)
    run_dir = run_of(args.run)
    scores = Scores.read(run_dir / FILE)
    if args.by == "decisions":
        selection = choose_kept_images(scores, args.decisions)
    else:
        hardest = _HARDEST if args.hardest is None else args.hardest
        selection = prune(scores, args.by, args.keep, hardest=hardest, seed=args.seed)
    out = args.out or run_dir / _list_name(args)
    relabelled = bool(data_settings(run_dir).get("relabel"))
    require_own_file(out, LIST_HEAD.encode())
    selection.write(out, scores, relabelled=relabelled)

    warnings = []
    for kind, shares in (
        ("class", class_shares(scores, selection)),
        ("expert", expert_shares(scores, selection.keep)),
    ):
        if shares:
            print("\n".join([*map(escape_controls, shares_table(shares, kind)), ""]))
        warnings += starvation_warnings(shares, kind)
    for sentence in warnings:
        print(f"warning: {escape_controls(sentence)}")

    path = escape_controls(str(out))
    print(f"{selection.keep.sum():,} of {len(selection.keep):,} training images are kept: {path}")
    file = shell_word(path)
    relabel = f" --data.relabel {file}" if selection.new_label or relabelled else ""
    print(f"train on them: the options of the run, a new --name, and --data.keep {file}{relabel}")


def _check(args: Namespace) -> None:
    """Refuse options that don't belong together."""
    if args.by == "decisions":
        if args.decisions is None or args.keep is not None:
            raise UserError(
                "--by decisions needs --decisions FILE and no --keep: the file says what goes."
            )
    elif not args.keep or args.decisions is not None:
        raise UserError(
            f"--by {args.by} needs --keep SHARE above 0, such as 0.7, and no --decisions."
        )
    if args.hardest is not None and args.by != "ccs":
        raise UserError("--hardest belongs to --by ccs.")


def _list_name(args: Namespace) -> str:
    """A file name by which lists that differ lie side by side."""
    if args.by == "decisions":
        return "keep-decisions.csv"
    name = f"keep-{args.by}-{args.keep:g}"
    if args.hardest not in (None, _HARDEST):
        name += f"-hardest-{args.hardest:g}"
    if args.seed:
        name += f"-s{args.seed}"
    return f"{name}.csv"
