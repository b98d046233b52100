"""What a user's mistake is answered by: one line that names the option or file, the value, and the way on.

A row is a call and the fragments that its sentence must hold. `{pets}` is a folder of images, `{run}` a finished run,
`dense` a saved ViT without experts.
"""

import shutil
from pathlib import Path

import pytest
import timm
import torch

from moevision.models.io import describe, save_model

LIKE = "runs/NAME/checkpoints/"  # where a checkpoint lies
FIT = {
    "nothing to train on": ("fit", ["one subfolder", "quickstart"]),
    "a path beside the one that was meant": ("fit {pets}s", ["did you mean", "{pets}"]),
    "a dataset that isn't there": ("fit pets_cat_dog", ["--data.download true"]),
    "a folder with a dataset's name": ("fit pets", ["--data.download true", "write ./pets"]),
    "a class without validation images": (
        "fit split {tiny}",
        ["split/val", "class 'dog'", "add some there"],
    ),
    "one class": ("fit one {tiny}", ["one class folder", "'cat'", "one subfolder"]),
    "too many bad images": ("fit bad {tiny}", ["--data.max_bad_fraction", "mend or remove"]),
    "config": ("fit --config cifar", ["'cifar'", "Did you mean", "cifar10?"]),
    "config file": ("fit --config=none.yaml", ["'none.yaml'", "quickstart"]),
    "resume another run": (
        "fit {pets} --pretrained=none --ckpt_path=my/checkpoints/best.ckpt",
        ["give its folder", "fit --resume my."],
    ),
    "test of nothing": ("test --config {run}/config.yaml", ["--ckpt_path"]),
    "validate nothing": ("validate --config {run}/config.yaml", ["--ckpt_path"]),
    "resume in a test": ("test {pets} --resume {run}", ["--resume", "with fit"]),
    "no value": ("fit --lr", ["--model.optim.lr", "needs a value", "fit --help"]),
    "a value too much": ("fit --dense=5", ["--dense", "no value"]),
    "no verb": ("learn", ["'learn'", "fit, validate, test"]),
    "mistyped verb": ("anlyze", ["Did you mean", "analyze?"]),
    "a checkpoint that isn't there": (
        "test {set} --ckpt_path missing.ckpt",
        ["no checkpoint", "missing.ckpt", LIKE],
    ),
    "half a checkpoint": (
        "test {set} --ckpt_path half.ckpt",
        ["half.ckpt", "damaged", "best.ckpt"],
    ),
    "no checkpoint at all": (
        "test {set} --ckpt_path text.ckpt",
        ["text.ckpt", "damaged", "best.ckpt"],
    ),
    "a checkpoint of others": (
        "test {set} --ckpt_path foreign.ckpt",
        ["foreign.ckpt", "not written by", LIKE],
    ),
    "a list as a checkpoint": (
        "test {set} --ckpt_path list.ckpt",
        ["list.ckpt", "not written by", LIKE],
    ),
    "a checkpoint to go on from": (
        "fit {set} --ckpt_path my/checkpoints/last.ckpt",
        ["fit --resume my."],
    ),
    "resume a checkpoint": ("fit --resume bare/checkpoints/last.ckpt", ["its folder, bare."]),
    "resume no run": ("fit --resume empty", ["no config.yaml."]),
    "resume no folder": ("fit --resume nowhere", ["nowhere"]),
    "resume without a value": ("fit --resume --data.path x", ["--resume needs a value"]),
    "clusters of untrained layers": (
        "fit {pets} --pretrained=none --data.image_size=32 --router_start=cluster",
        ["--router_start cluster", "say --pretrained too"],
    ),
    "dense and its twin": (
        "fit {pets} --pretrained=none --dense --with-twin",
        ["--dense", "leave --with-twin out"],
    ),
    "pretrained without a value": (
        "fit {pets} --pretrained --name x",
        ["pretrained needs a value"],
    ),
    "no experts to train": (
        "fit {pets} --pretrained dense --with-twin --data.image_size=32"
        " --model.optim.freeze=all_but_experts",
        ["all_but_experts", "with experts"],
    ),
}
# Behind `fit {pets}` and the options of a tiny training.
OPTIONS = {
    "--model.arch.name=vit_moe_mirco_patch4_32": ["vit_moe_micro_patch4_32", "Did you mean"],
    "--model.arch.name=deit_tiny_patch16_224": ["is a dense model"],
    "--model.arch.num_experts=1": ["top_k=2", "num_experts=1", "choose top_k"],
    "--model.aux.label=1 --model.arch.num_experts=3": ["2 classes", "3 experts"],
    "--model.arch.patch_size=7": ["7 px", "do not tile", "multiple of 7"],
    "--model.arch.embed_dim=33": ["test_vit_moe", "divisible by num_heads"],
    "--model.arch.router=topk": ["'topk'", "noisy_top_k"],
    "--model.arch.top_k=0": ["top_k is 0", "at least 1"],
    "--model.arch.nmae=x": ["model.arch.nmae", "model.arch.name"],
    "--model.arch.depth=deep": ["--model.arch.depth", "'deep'", "whole number or"],
    "--data.batch_sise=8": ["data.batch_sise", "data.batch_size", "moevision fit --help"],
    "--data.batch_size=many": ["--data.batch_size", "'many'", "a whole number"],
    "--data.batch_size=0": ["--data.batch_size is 0", "at least 1"],
    "--data.augment=strong": ["--data.augment", "'strong'", "'trivialaugment'"],
    "--trainer.accelerator=quantum": ["quantum", "cpu"],
    "--trainer.max_epochs=-1": ["--trainer.max_epochs", "--trainer.max_steps"],
    "--trainer.limit_train_batches=0": ["limit_train_batches 0"],
    "--trainer.num_nodes=2": ["several machines", "torchrun", "srun"],
    "more": ["'more'", "after the verb"],
    "--pretrained=deit_tny_patch16_224": ["deit_tiny_patch16_224"],
    "--pretrained=/nowhere/model": ["no run or model"],
    "--runs_root=file.txt": ["file.txt", "mend that"],
    "--config=sise.yaml": ["data.batch_sise", "data.batch_size"],
    "--config=depht.yaml": ["model.arch.depht", "model.arch.depth"],
    "--config=modle.yaml": ["modle.label_smoothing", "model.label_smoothing"],
    "--config=many.yaml": ["many.yaml", "--data.batch_size", "'many'", "a whole number"],
    "--config=resume.yaml": ["resume", "command line"],
    "--config=list.yaml": ["list.yaml", "no configuration"],
    "--config=broken.yaml": ["broken.yaml", "line 2"],
}
OTHERS = {
    "no model": ("info runs/nowhere", ["'runs/nowhere'", "no run or model"]),
    "predict by no model": (
        "predict runs/none/model {pets}",
        ["runs/none/model", "no run or model"],
    ),
    "predict by a name": ("predict nowhere {pets}", ["no run or model 'nowhere'", "fit wrote"]),
    "predict by a folder": ("predict {pets} {pets}", ["no saved model", "model.safetensors"]),
    "predict no file": ("predict {run} none.png", ["no file", "none.png"]),
    "predict an empty folder": ("predict {run} empty", ["empty", "no image"]),
    "predict in batches of 0": ("predict {run} {pets} --batch_size=0", ["'0'", "at least 1"]),
    "never unsure": ("predict {run} {pets} --unsure 0", ["'0'", "probability above 0"]),
    "unsure of all": ("predict {run} {pets} --unsure 1.5", ["'1.5'", "at most 1"]),
    "prune nothing": (
        "data prune none --by random --keep 0.5",
        ["none", "no run or model", "fit wrote"],
    ),
    "prune without scores": ("data prune bare --by aum --keep .5", ["scores.csv", "be read"]),
    "no share": ("data prune {run} --by aum", ["--by aum", "--keep SHARE", "above 0"]),
    "a share of 0": ("data prune {run} --by aum --keep 0", ["--keep SHARE", "above 0"]),
    "no decisions": ("data prune {run} --by decisions", ["needs --decisions FILE"]),
    "hardest": (
        "data prune {run} --by loss --keep 0.5 --hardest 0.1",
        ["--hardest", "--by ccs"],
    ),
    "decisions that aren't there": (
        "data prune {run} --by decisions --decisions none.csv",
        ["none.csv", "be read"],
    ),
    "a list in a file": (
        "data prune {run} --by aum --keep 0.5 --out mine.csv/x.csv",
        ["mine.csv/x.csv", "be written"],
    ),
    "somebody's list": (
        "data prune {run} --by aum --keep 0.5 --out mine.csv",
        ["mine.csv", "something else"],
    ),
    "seed of a list": ("data prune run --by=aum --keep=0.5 --seed=-1", ["'-1'", "no seed"]),
    "no ONNX": ("export {run} --out model.bin", ["model.bin", "end it", ".onnx"]),
    "an export that is there": ("export {run} --out there.onnx", ["--force", "replace it"]),
    "export for no image": ("export {run} --out x.onnx --data nothing.jpg", ["nothing.jpg"]),
    "export for a broken image": (
        "export {run} --out x.onnx --data there.onnx",
        ["there.onnx", "be read"],
    ),
    "upcycle nothing": ("upcycle nowhere --out x", ["no run or model", "'nowhere'"]),
    "layers": ("upcycle dense --out x --layers most", ["every2, last2, all"]),
    "layer numbers": ("upcycle dense --out x --layers 3,9", ["0 to 5"]),
    "router of upcycle": ("upcycle dense --out x --router best", ["no router", "'best'"]),
    "option of a router": ("upcycle dense --out x --option speed=2", ["no option", "'speed'"]),
    "option without a value": ("upcycle dense --out x --option speed", ["NAME=VALUE"]),
    "no experts": ("upcycle dense --out x --num-experts 0", ["at least 1"]),
    "pickle": ("upcycle dense --out x --weights w.pth", ["never pickles"]),
    "upcycle into a file": ("upcycle dense --out dense/config.json", ["there already"]),
    "upcycle into a folder": ("upcycle dense --out one", ["one", "there already"]),
    "nowhere to upcycle to": ("upcycle dense", ["--out"]),
    "clusters of nothing": (
        "upcycle dense --out x --router-start cluster",
        ["--router-start cluster", "--data"],
    ),
    "images without clusters": (
        "upcycle dense --out x --data synthetic_pets",
        ["--router-start cluster", "--data"],
    ),
    "reinit": ("upcycle x --out=x --reinit=nan", ["'nan'", "between 0 and 1"]),
    "seed of upcycle": ("upcycle x --out=x --seed=-1", ["'-1'", "at least 0"]),
    "seed of analyze": ("analyze x --out=z --seed=99999999999", ["no seed"]),
}
CONFIGS = {
    "sise": "data:\n  batch_sise: 8\n",
    "depht": "model:\n  arch:\n    depht: 2\n",
    "modle": "modle:\n  label_smoothing: 0.1\n",
    "many": "data:\n  batch_size: many\n",
    "resume": "resume: auto\n",
    "list": "- data\n",
    "broken": "data: [\n",
}
MISTAKES = {
    **FIT,
    **{option: ("fit {pets} {tiny} " + option, names) for option, names in OPTIONS.items()},
    **OTHERS,
}


@pytest.fixture(scope="module")
def workplace(drawn_pets, tiny_run, tmp_path_factory):
    """A folder with what the calls name."""
    root = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "pets", "bare"):
        (root / name).mkdir()
    shutil.copy(tiny_run / "config.yaml", root / "bare")
    shutil.copytree(drawn_pets, root / "split" / "train")
    shutil.copytree(drawn_pets / "cat", root / "split" / "val" / "cat")
    shutil.copytree(drawn_pets / "cat", root / "one" / "cat")
    shutil.copytree(drawn_pets, root / "bad")
    for file in sorted((root / "bad" / "cat").iterdir())[:10]:
        file.write_bytes(b"")
    for name in ("mine.csv", "there.onnx", "file.txt"):
        (root / name).write_text("mine")
    for name, text in CONFIGS.items():
        (root / f"{name}.yaml").write_text(text)
    best = (tiny_run / "checkpoints" / "best.ckpt").read_bytes()
    (root / "half.ckpt").write_bytes(best[: len(best) // 2])
    (root / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}, "epoch": 3}, root / "foreign.ckpt")
    torch.save([torch.zeros(2)], root / "list.ckpt")
    (root / "runs" / "pets").mkdir(parents=True)
    (root / "runs" / "pets" / "summary.md").write_text("of an earlier run")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes)
    save_model(describe(dense), root / "dense")
    return root


def state_of(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_one_sentence(
    cli, tiny, drawn_pets, tiny_run, workplace, monkeypatch, mistake
):
    monkeypatch.chdir(workplace)
    call, fragments = MISTAKES[mistake]
    before = state_of(workplace)
    values = {
        "pets": drawn_pets,
        "run": tiny_run,
        "set": f"--config {tiny_run}/config.yaml",
        "tiny": " ".join(tiny),
    }
    outcome = cli(*call.format(**values).split())
    assert (outcome.code, outcome.out) == (2, "")
    usage, _, sentence = outcome.err.rstrip("\n").rpartition("\n")
    assert sentence.startswith("moevision")
    assert usage == "" or usage.startswith("usage: ")  # argparse says it, too
    for fragment in fragments:
        assert fragment.format(**values) in sentence
    assert state_of(workplace) == before
    assert [path.name for path in Path("runs").iterdir()] == ["pets"], (
        "a failed start leaves no run folder"
    )
