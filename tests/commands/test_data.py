"""`moevision data`: lists made from a run, which fit takes and goes on with; and what is refused."""

import shutil
from pathlib import Path

from moevision.data.folder import fetching
from moevision.files import read_csv
from tests.shared import assert_names, refused

COMPARED = (
    "metrics.csv",
    "predictions_test.csv",
    "model/model.safetensors",
    "splits.csv",
    "scores.csv",
)


def test_a_pruned_list_is_trained_on_and_gone_on_with(cli, tiny, tiny_run, send_signal):
    """Half of the images by AUM, one of them relabelled; interrupted, the lists deleted, and gone on with."""
    outcome = cli("data", "prune", tiny_run, "--by", "aum", "--keep", "0.5", "--out", "keep.csv")
    assert (outcome.code, outcome.err) == (0, "")
    scores = read_csv(tiny_run / "scores.csv")
    scored = sorted(
        (row for row in scores if row["visits"] != "0"), key=lambda row: -float(row["aum"])
    )
    unseen = [row for row in scores if row["visits"] == "0"]  # a broken file among the images
    half = {row["image"] for row in [*scored[: round(len(scored) / 2)], *unseen]}
    listed = {row["image"]: row for row in read_csv(Path("keep.csv"))}
    assert {image for image, row in listed.items() if row["keep"] == "yes"} == half
    assert_names(
        outcome.out,
        f"{len(half)} of {len(listed)}",
        "kept: keep.csv",
        "class before after",
        "L1.E0",
    )
    first = scored[0]
    new = "dog" if first["label"] == "cat" else "cat"
    Path("decisions.csv").write_text(
        f"image,label,decision,new_label\n{first['image']},{first['label']},relabel,{new}\n"
    )
    data = tiny_run.parents[1] / "pets"
    options = (
        data,
        *tiny,
        "--data.max_bad_fraction=0.2",
        "--data.keep=keep.csv",
        "--data.relabel=decisions.csv",
    )
    assert cli("fit", *options, "--name=whole").code == 0
    split = {
        (row["split"], row["path"]): row["class"] for row in read_csv(Path("runs/whole/splits.csv"))
    }
    before = {
        (row["split"], row["path"]): row["class"] for row in read_csv(tiny_run / "splits.csv")
    }
    assert {path for part, path in split if part == "train"} == half
    assert {path for part, path in split if part == "unused"} == listed.keys() - half
    assert split["train", first["image"]] == new
    held = [key for key in before if key[0] in ("val", "test")]
    assert [split[key] for key in held] == [before[key] for key in held]
    send_signal(1)  # of two steps
    assert cli("fit", *options, "--name=parts").code == 143
    Path("keep.csv").unlink()
    Path("decisions.csv").unlink()
    outcome = refused(
        cli("fit", "--resume", "runs/parts", "--data.keep=other.csv"),
        "--data.keep is keep.csv",
        "become other.csv",
    )
    assert cli("fit", "--resume", "runs/parts").code == 0
    for name in COMPARED:
        assert Path("runs/whole", name).read_bytes() == Path("runs/parts", name).read_bytes(), name


def test_lists_that_differ_lie_side_by_side(cli, tiny_run):
    Path("run").mkdir()
    for name in ("config.yaml", "scores.csv"):
        shutil.copy(tiny_run / name, "run")
    for options, name in (
        (["random", "--seed", "0"], "keep-random-0.5.csv"),
        (["random", "--seed", "1"], "keep-random-0.5-s1.csv"),
        (["ccs", "--hardest", "0.1"], "keep-ccs-0.5.csv"),
        (["ccs", "--hardest", "0.2", "--seed", "2"], "keep-ccs-0.5-hardest-0.2-s2.csv"),
    ):
        assert (
            f"are kept: run/{name}\n"
            in cli("data", "prune", "run", "--keep", "0.5", "--by", *options).out
        )
    assert len(list(Path("run").glob("keep-*.csv"))) == 4


def test_a_printed_command_can_be_typed(cli, draw, tiny_run):
    draw(Path("my photos"), per_class=3)
    outcome = cli(
        "data", "prune", tiny_run, "--by", "random", "--keep", "0.5", "--out", "my list.csv"
    )
    assert outcome.out.endswith(" --data.keep 'my list.csv'\n")
    assert fetching("cifar10", "my data").endswith(" --data.root 'my data'`")
    outcome = cli(
        "fit", "my photos", "--pretrained=none", "--ckpt_path=my runs/a/checkpoints/best.ckpt"
    )
    assert outcome.err.endswith(" fit --resume 'my runs/a'.\n")
