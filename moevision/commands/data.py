"""`moevision data score | prune | shard`: what a training found out about its images; images as tar shards."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from moevision.analysis.images import data_settings, run_folder
from moevision.data.collection import Collection
from moevision.data.open import kind_of, open_collection
from moevision.data.scores import (
    FILE,
    LIST_HEAD,
    Scores,
    class_shares,
    decide,
    expert_shares,
    prune,
    shares_table,
    starved,
)
from moevision.data.shards import find_index, verify_shards, write_shards
from moevision.errors import UserError, shown
from moevision.files import refuse_foreign
from moevision.train.recipe import find_config, read_config
from moevision.words import shell_word

_HARDEST = 0.1  # of --hardest where it isn't given


def run(chosen: Namespace) -> None:
    """Do the task that was asked for."""
    {"score": write_page, "prune": write_list, "shard": shard}[chosen.task](chosen)


def run_of(address: str) -> Path:
    """The run folder; raises UserError if it is none."""
    folder = run_folder(address)
    if folder is None:
        raise UserError(f"{address} is no run folder, it has no config.yaml: give the folder that fit wrote.")
    return folder


def write_page(chosen: Namespace) -> None:
    """`moevision data score RUN`: write the page and the table."""
    from moevision.analysis.good_data import PAGE, TABLE, score

    run_dir = run_of(chosen.run)
    out = chosen.out or run_dir / "data"
    found = score(run_dir, out, show=chosen.show, quick=chosen.quick, command=chosen.command)
    counts = ", ".join(f"{count:,} {split}" for split, count in found["counts"].items())
    print(f"{counts} images" + ("" if chosen.quick else f", {found['unreadable']:,} of them unreadable"))
    print(f"The page is {shown(str(out / PAGE))}; every number is in {shown(str(out / TABLE))}")


def write_list(chosen: Namespace) -> None:
    """`moevision data prune RUN`: write the list, and print the shares."""
    decided = chosen.by == "decisions"
    if decided and (chosen.decisions is None or chosen.keep is not None):
        raise UserError("--by decisions needs --decisions FILE and no --keep: the file says what goes.")
    if not decided and (not chosen.keep or chosen.decisions is not None):
        raise UserError(f"--by {chosen.by} needs --keep SHARE above 0, such as 0.7, and no --decisions.")
    if chosen.hardest is not None and chosen.by != "ccs":
        raise UserError("--hardest belongs to --by ccs.")
    run_dir = run_of(chosen.run)
    scores = Scores.read(run_dir / FILE)
    if decided:
        kept, name = decide(scores, chosen.decisions), "keep-decisions.csv"
    else:
        hardest = _HARDEST if chosen.hardest is None else chosen.hardest
        kept = prune(scores, chosen.by, chosen.keep, hardest=hardest, seed=chosen.seed)
        # Lists that differ lie side by side.
        others = ("" if hardest == _HARDEST else f"-hardest-{hardest:g}") + (f"-s{chosen.seed}" if chosen.seed else "")
        name = f"keep-{chosen.by}-{chosen.keep:g}{others}.csv"
    out = chosen.out or run_dir / name
    relabelled = bool(data_settings(run_dir).get("relabel"))
    refuse_foreign(out, LIST_HEAD.encode())
    kept.write(out, scores, relabelled=relabelled)
    found = (class_shares(scores, kept), "class"), (expert_shares(scores, kept.keep), "expert")
    for shares, what in found:
        if shares:
            print("\n".join([*map(shown, shares_table(shares, what)), ""]))
    for sentence in (each for shares, what in found for each in starved(shares, what)):
        print(f"warning: {shown(sentence)}")
    print(f"{kept.keep.sum():,} of {len(kept.keep):,} training images are kept: {shown(str(out))}")
    file = shell_word(shown(str(out)))
    relabel = f" --data.relabel {file}" if kept.new_label or relabelled else ""
    print(f"train on them: the options of the run, a new --name, and --data.keep {file}{relabel}")


def shard(chosen: Namespace) -> None:
    """`moevision data shard FOLDER|CONFIG --out SHARDS`: write tar shards, or check some."""
    if chosen.check == (chosen.out is not None):
        raise UserError(
            "Give --out SHARDS, the folder to write to, or --check to compare written shards with their hashes."
        )
    folder, quiet = Path(chosen.what).expanduser(), not sys.stderr.isatty()
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True, disable=quiet)
    if chosen.check:
        if kind_of(chosen.what) != "shards":
            raise UserError(f"{folder} holds no shards: give the folder that `moevision data shard` wrote.")
        with bar:
            task = bar.add_task("checking shards", total=sum(shard.bytes for shard in find_index(folder).shards))
            index = verify_shards(folder, lambda done: bar.update(task, advance=done))
        print(f"{len(index.shards)} shards have the bytes that were written: {shown(str(folder))}")
        return
    collection = _collection(chosen.what, chosen.root)
    if folder.is_dir() and chosen.out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{chosen.out} lies in the folder of the images, which it would become part of: give --out another place."
        )
    with bar:
        task = bar.add_task("writing shards", total=sum(map(len, collection.given.values())))
        index = write_shards(
            collection,
            chosen.out,
            shard_bytes=chosen.shard_mb * 2**20,
            on_progress=lambda done: bar.update(task, advance=done),
        )
    for sentence in collection.notes:
        print(f"warning: {shown(sentence)}")
    sizes = ", ".join(f"{len(rows.ids):,} {split}" for split, rows in index.splits.items())
    total_mb = sum(each.bytes for each in index.shards) / 2**20
    print(f"{sizes} images in {len(index.shards)} shards, {total_mb:,.1f} MiB: {shown(str(chosen.out))}")
    print(f"train on them: moevision fit {shell_word(shown(str(chosen.out)))}")


def _collection(what: str, root: str | None) -> Collection:
    """The dataset that a folder, a table, a dataset's name or a configuration names."""
    settings: Mapping[str, Any] = {"path": what}
    if kind_of(what) == "folder" and not Path(what).expanduser().is_dir() and not what.lower().endswith(".csv"):
        file = find_config(what)
        given = read_config(file)
        if "data.path" not in given:
            raise UserError(f"{file} names no images: it must say data: {{path: ...}}.")
        settings = {name.removeprefix("data."): value for name, value in given.items()}
    return open_collection(
        settings["path"],
        root=root or settings.get("root", "data"),
        download=bool(settings.get("download")),
        columns=(settings.get("image_column"), settings.get("label_column")),
    )
