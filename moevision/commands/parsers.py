"""What each verb takes: flags, help and examples, as plain argparse, so that help and usage errors need no torch.

A parser's function has the name of its verb. The flags of `fit`, `validate` and `test` come from the signatures of
task, data module and Trainer instead; see `moevision.commands.training`.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter, _SubParsersAction
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

SPLITS = ("train", "val", "test")
MODEL = "a run folder, its model/ folder, or a timm address such as hf-hub:user/name"
TRAINED = f"{MODEL}, or a checkpoint of a run, finished or not (checkpoints/last.ckpt)"
_DATA = "a folder with one subfolder per class, or a dataset's name such as synthetic_pets or cifar10"
_ROOT = "folder of the datasets that are known by name (the run's own, or data)"
_FORCE = "write into a folder that holds something"


def predict() -> ArgumentParser:
    """Everything after MODEL that is no option is a path."""
    parser = _parser(
        "predict",
        """\
        Classify images with a saved model: one row per image with the path, the class in words, its probability, and
        the five most likely classes. A file that can't be read gets a row that says why.

        Probabilities are calibrated if fit stored a temperature with the model; if not, a line says so. --unsure is no
        failure: the exit code stays 0.
        """,
        """\
        moevision predict runs/pets/model image.jpg
        moevision predict runs/pets/model photos/ --unsure 0.6 --out answers.csv   a folder with all its subfolders
        """,
    )
    parser.add_argument("model", help=TRAINED)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="image files, folders with all their subfolders, and folders of tar shards",
    )
    parser.add_argument("--format", choices=("csv", "json"), default="csv", help="what is written (%(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write to FILE instead of standard output")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="images per pass (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 is about twice as fast where the processor multiplies bfloat16, and leaves two to three digits of a "
        "probability (%(default)s)",
    )
    parser.add_argument(
        "--unsure",
        type=float,
        metavar="P",
        help='answer "unsure" where the likeliest class has a probability below P, such as 0.6',
    )
    return parser


def info() -> ArgumentParser:
    """One model, or the machine."""
    parser = _parser(
        "info",
        """\
        Parameters and FLOPs per image of a model, beside its dense twins (same active FLOPs, same parameters) and the
        plain ViT.

        With --machine what limits a training here, and what to change: a torch without CUDA beside an NVIDIA card, too
        few or too many threads, little memory, a tiny /dev/shm. Findings are no errors: the exit code is 0.
        """,
        """\
        moevision info runs/pets --format json
        moevision info vit_moe_tiny_patch16_224                a timm name: no weights are needed or fetched
        moevision info --machine
        """,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL}, or a timm name (built without weights)")
    what.add_argument("--machine", action="store_true", help="what limits this machine")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what is printed (%(default)s)")
    return parser


def compare() -> ArgumentParser:
    """Finished runs."""
    parser = _parser(
        "compare",
        """\
        Compare finished runs of fit on the test images that all of them were tested on: accuracy with its interval, the
        difference, what difference would have been found with 80 % power, and cost: FLOPs, parameters, time, load.

        Two runs are compared image by image: McNemar's exact test, Tango's interval. More runs are sorted into two
        recipes by their config.yaml, equal but for the seed, and compared seed by seed: paired t-test, t interval. The
        first run's recipe is A. Not told apart is not the same as equal: the answer says what it cannot exclude.
        """,
        """\
        moevision compare runs/pets runs/pets/twin                    a Mixture of Experts and its dense twin
        moevision compare runs/moe-* runs/dense-* --json out.json   several seeds of two recipes
        """,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of fit, at least two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    return parser


def upcycle() -> ArgumentParser:
    """A dense model, and what to make of it."""
    parser = _parser(
        "upcycle",
        """\
        Turn a trained dense ViT into a Mixture of Experts that computes the same: every expert starts as a copy of the
        MLP that it replaces, and learns from there (arXiv:2212.05055).

        Writes OUT/ with the new model, which every verb takes, and upcycle.json: parameters and FLOPs before and
        after, and how far the outputs are from the dense model's.

        Cost: --num-experts E stores E MLPs in each converted block; --top-k K computes K of them per token, so K = 1
        costs what the dense model costs. Routers and options: docs/reference/routers.md; what can't be upcycled:
        docs/reference/conversions.md.
        """,
        """\
        moevision upcycle deit_tiny_patch16_224 --out tiny_moe            weights from the hub, 8 experts in two blocks
        moevision upcycle runs/dense/model --layers every2 --top-k 2 --out moe
        moevision upcycle deit_small_patch16_224 --weights my.safetensors --num-classes 37 --out pets_moe
        """,
    )
    add = parser.add_argument
    add("model", metavar="NAME_OR_PATH", help="a timm name, a saved model's folder, or a timm address")
    add("--out", required=True, metavar="DIR", help="folder to write to")
    add("--num-experts", type=_positive, default=8, metavar="E", help="experts per layer (%(default)s)")
    add(
        "--layers",
        type=_layers,
        help="last2 (of the odd blocks), every2 (1, 3, 5, ...), all, or numbers such as 8,10 (last2, before the last "
        "block where only the class token is read, so that the routes of all patches count)",
    )
    add("--top-k", type=_positive, default=1, metavar="K", help="experts per token (%(default)s)")
    add("--router", default="vmoe_top_k", metavar="NAME", help="router of the new layers (%(default)s)")
    add = parser.add_argument_group("more").add_argument
    add("--weights", metavar="FILE", help="a .safetensors file for the architecture NAME")
    add("--num-classes", type=_positive, metavar="C", help="a new classifier, if it differs from the model's own")
    add("--image-size", type=_positive, metavar="PX", help="resample positions, if it differs from the model's own")
    add("--depth", type=_positive, metavar="L", help="take only the first L blocks; the model must then be trained on")
    add(
        "--expert-hidden",
        type=_positive,
        metavar="H",
        help="a whole part of the MLP's hidden units, which experts share",
    )
    add("--noise", type=_at_least_0, default=0.0, help="noise on the copies, relative to the spread of their weights")
    add("--reinit", type=_share, default=0.0, help="share of each expert's hidden units that is drawn anew")
    add(
        "--router-start",
        choices=("random", "cluster"),
        default="random",
        help="rows of the routers: random, or centroids of their own input on --data (%(default)s)",
    )
    add("--data", help=f"with --router-start cluster: {_DATA}")
    add("--root", help=_ROOT)
    add("--seed", type=_seed, default=0, help="seed of everything that is drawn (%(default)s)")
    add(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the router, such as route_by=image or noise=none; may be repeated",
    )
    add("--force", action="store_true", help=_FORCE)
    return parser


def surgery() -> ArgumentParser:
    """A model with MoE layers, and one operation."""
    parser = _parser(
        "surgery",
        """\
        Remove experts from a trained model without further training, and measure what that costs.

          --prune N      remove the N least used experts of every MoE layer; their tokens go to the next-best expert
          --merge N      leave N experts in every MoE layer, each the average of experts that the same tokens choose
          --collapse W   make the model dense: one MLP of an expert's width per MoE layer, the average of its experts
                         or the most used one

        The use of experts is measured on one set (--use-split), accuracy before and after on another (--split), on the
        same images for both and for a control: the model with its MoE layers left out. Experts that have little in
        common average to almost nothing; a result no better than the control has lost them all.

        Writes OUT/ with the new model, which the other verbs take, and surgery.json with every number.
        """,
        """\
        moevision surgery runs/pets --prune 2 --out pets_6_experts         on the images that the run was trained on
        moevision surgery runs/pets --collapse average --out pets_dense
        moevision surgery my/model --merge 4 --data cifar10 --root datasets --out smaller
        """,
    )
    add = parser.add_argument
    add("model", help=f"{MODEL}; it must have MoE layers")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prune", type=_positive, metavar="N", help="remove N experts of every MoE layer")
    what.add_argument("--merge", type=_positive, metavar="N", help="leave N experts in every MoE layer")
    what.add_argument("--collapse", choices=("average", "most_used"), help="make the model dense")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    add("--data", help=f"{_DATA}; by default what the run was trained on")
    add("--root", help=_ROOT)
    add("--split", default="test", choices=SPLITS, help="set on which accuracy is measured (%(default)s)")
    add("--use-split", default="val", choices=SPLITS, help="set on which the use of experts is measured (%(default)s)")
    add("--limit", type=_positive, metavar="N", help="images of --split (all)")
    add("--use-limit", type=_positive, metavar="N", default=1000, help="images of --use-split (%(default)s)")
    add("--no-align", dest="align", action="store_false", help="average experts without aligning their hidden units")
    add("--batch-size", type=_positive, default=64, metavar="N", help="images per pass (%(default)s)")
    add("--force", action="store_true", help=_FORCE)
    parser.set_defaults(command="")  # the command line, which surgery.json records
    return parser


def export() -> ArgumentParser:
    """A model, and the file to write."""
    parser = _parser(
        "export",
        """\
        Write a model as one file that runs without moevision: ONNX (for onnxruntime and many others), or a
        torch.export program (needs torch only). Any batch size, float32; class names and the preprocessing of images
        travel in the file. The file is run on seeded images and compared with the model: if a logit differs by more
        than 1e-4, no file is left.

        An exported file computes ALL experts for every token and mixes them with the same weights: it answers as the
        model does, but saves no computation. What that costs is measured and printed.

        ONNX needs three more packages: pip install "moevision[export]"
        """,
        """\
        moevision export runs/pets --out pets.onnx
        moevision export runs/pets --out pets.pt2                          the file's ending says which format
        moevision export runs/pets --out pets.onnx --data cats_and_dogs/   compare on your images too
        """,
    )
    add = parser.add_argument
    add("model", help=TRAINED)
    add("--out", required=True, metavar="FILE", help="file to write: NAME.onnx or NAME.pt2")
    add("--format", choices=("onnx", "torch"), help="by default what FILE's ending says")
    add("--data", metavar="IMAGES", help="compare on these too: an image, a folder, or a dataset's name")
    add("--root", help=_ROOT)
    add("--limit", type=int, default=32, metavar="N", help="at most N images of --data (%(default)s)")
    add("--opset", type=int, metavar="N", help="version of ONNX's operators, 18 to 23 (20)")
    add("--force", action="store_true", help="replace FILE")
    return parser


def push() -> ArgumentParser:
    """A model, and where it goes."""
    parser = _parser(
        "push",
        """\
        Publish a saved model on the Hugging Face hub, where timm and moevision load it as hf-hub:USER/NAME. Only you
        can see it, unless you say --public.

        Three files are uploaded: model.safetensors, config.json and a model card (README.md) that says what the model
        is, on which data it was trained and under which terms, how good it is beside its dense twin, how its experts
        are loaded, and what was not measured. The numbers come from the run folder of the model.

        Log in once with `hf auth login`, or set HF_TOKEN. Class names and the name of the data's folder are published
        with the model; images, paths and the names of files are not.
        """,
        """\
        moevision push runs/pets me/pets-moe --dry-run               look at the files first: no token, no network
        moevision push runs/pets me/pets-moe --license apache-2.0 --analysis report --public
        moevision push runs/pets me/pets-moe --seeds runs/pets-2 runs/pets-3 --force     a new version
        """,
    )
    add = parser.add_argument
    add("model", help="a run folder or its model/ folder")
    add("repo", metavar="USER/NAME", help="repository on the hub")
    add("--public", action="store_true", help="let everyone see it (default: private)")
    add("--dry-run", action="store_true", help="only write the files that would be uploaded")
    add("--out", metavar="DIR", help="folder for --dry-run (hub/USER/NAME)")
    add(
        "--license",
        metavar="ID",
        help="license of the weights, as the hub abbreviates it: apache-2.0, cc-by-nc-4.0, ...",
    )
    add("--analysis", metavar="REPORT", help="folder that `moevision analyze` wrote, for the card")
    add("--seeds", nargs="+", default=[], metavar="RUN", help="other trainings of the same recipe, for the card")
    add("--card", metavar="FILE", help="your own README.md instead of the generated card")
    add("--force", action="store_true", help="add a version to a repository, or to a --dry-run folder, that exists")
    return parser


def analyze() -> ArgumentParser:
    """A trained model, and the images to look at."""
    parser = _parser(
        "analyze",
        """\
        Measure what the experts of a trained model do on held-out images, and write one report, OUT/:

          report.html         one page that opens from disk, without a network
          report.json         every number of it
          figures/*.png       its figures
          trace.safetensors   the routing of every patch, for your own questions:
                              moevision.analysis.RoutingTrace.load("OUT/trace.safetensors")

        It answers three questions, each beside its controls: do classes go to different experts, did training the
        router add to that (beside the router before training and clusters of its own input; with --seeds every training
        against its own), and do the experts do different things (beside the layer left out and any two experts).
        """,
        """\
        moevision analyze runs/pets                                   the images that the run held out for its test
        moevision analyze runs/pets --quick                           a first look, a minute or two, rougher numbers
        moevision analyze runs/pets --seeds runs/pets-2 runs/pets-3   beside two other trainings of the same recipe
        """,
    )
    add = parser.add_argument
    add("model", help=f"{MODEL}; it must have MoE layers")
    add("--data", help=f"{_DATA}; by default what the run was trained on (its held-out test images)")
    add("--root", help=_ROOT)
    add("--out", default="report", metavar="DIR", help="folder to write to (%(default)s)")
    add("--limit", type=int, metavar="N", help="images, the same number of each class (1000)")
    add("--seeds", nargs="+", default=[], metavar="RUN", help="other trainings of the same recipe, to compare with")
    add("--before", metavar="MODEL", help="the model before it was trained, to compare with (fresh weights)")
    add(
        "--permutations", type=int, metavar="N", help="shuffles behind each chance level (1000; smallest p = 1/(N + 1))"
    )
    add("--seed", type=_seed, default=0, help="seed of everything that is drawn (%(default)s)")
    add("--quick", action="store_true", help="rougher: 300 images, 200 shuffles, experts ablated on fewer images")
    parser.set_defaults(command="")  # the command line, which the report records
    return parser


def data() -> ArgumentParser:
    """What to do with the images of a run."""
    parser = _parser(
        "data",
        """\
        Good data: what a training found out about its images, and which of them to keep. It reads scores.csv, which fit
        leaves in the run folder, and changes none of your images: what you choose becomes a list that fit takes.
        And many images: `shard` puts them into a few large files. `moevision data TASK --help` tells more.
        """,
        """\
        moevision data score runs/pets                        a page and a CSV: doubtful, hard, doubled, damaged
        moevision data prune runs/pets --by ccs --keep 0.7    a list with a reason per row
        moevision data shard photos --out shards              a folder as tar shards, which fit takes
        """,
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{score,prune,shard}")
    _score(tasks.add_parser)
    _prune(tasks.add_parser)
    _tars(tasks.add_parser)
    return parser


def _score(add_parser: Callable[..., ArgumentParser]) -> None:
    parser = add_parser(
        "score",
        help="a page and a CSV of what is known about the images",
        **_texts(
            """\
            Write what is known about the images of RUN, OUT/:

              page.html    ranked lists with the images: labels that others speak against, hardest, easiest, of other
                           experts than their class, near-duplicates, leaks between splits, blurred, dark, odd sizes,
                           grey, damaged; a map; tables of classes and experts. One file, and nothing leaves it
              images.csv   a row for each image with all numbers

            On the page you decide by keyboard: keep, wrong label, drop; it saves decisions.csv, which
            `moevision data prune --by decisions` makes a list of. Lists rank, and say of no image that it is bad.
            One pass opens every image and runs the model on it.
            """,
            """\
            moevision data score runs/pets
            moevision data score runs/pets --quick                only the scores of the training, in seconds
            """,
        ),
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder with scores.csv")
    add("--out", type=Path, metavar="DIR", help="folder to write to (RUN/data)")
    add("--show", type=_positive, default=40, metavar="N", help="images in each list of the page (%(default)s)")
    add("--quick", action="store_true", help="no pass over the images: without files, duplicates and predictions")
    parser.set_defaults(command="")  # the command line, which the page records


def _prune(add_parser: Callable[..., ArgumentParser]) -> None:
    parser = add_parser(
        "prune",
        help="a list of the training images to keep, which fit takes",
        **_texts(
            """\
            Write a list of the training images of RUN to keep, with a reason per row, and print the share of each class
            and expert before and after. fit takes the list: --data.keep FILE, and --data.relabel FILE where there are
            new labels. Validation and test images are not touched.

              aum, loss          give up first what speaks against its label: low margins, high mean loss
              el2n, forgetting   give up first what is easy: low EL2N, never forgotten
              ccs                give up the lowest AUM, then draw equally from strata of AUM (arXiv:2210.15809)
              random             the baseline: at small shares scores have lost to it (arXiv:2302.06960)
              decisions          give up what you dropped on the page of `moevision data score`

            No class loses its last image; a class or an expert whose share falls by more than half is warned about.
            """,
            """\
            moevision data prune runs/pets --by ccs --keep 0.7
            moevision data prune runs/pets --by decisions --decisions ~/Downloads/decisions.csv
            """,
        ),
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder with scores.csv")
    methods = ("aum", "el2n", "forgetting", "loss", "random", "ccs", "decisions")
    add("--by", required=True, choices=methods, help="what decides, see above")
    add("--keep", type=_share, metavar="SHARE", help="share of the images to keep, such as 0.7")
    add("--hardest", type=_share, metavar="SHARE", help="with ccs: share with the lowest AUM that goes first (0.1)")
    add("--decisions", type=Path, metavar="FILE", help="with decisions: the file that the page saved")
    add("--seed", type=_seed, default=0, help="seed of what is drawn, and of ties (%(default)s)")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="the list (RUN/keep-METHOD-SHARE.csv, in which another --hardest or --seed has its place)",
    )


def _tars(add_parser: Callable[..., ArgumentParser]) -> None:
    parser = add_parser(
        "shard",
        help="images as a few large tars, which fit takes",
        **_texts(
            """\
            Write the images of a folder (or what a configuration names) into tars in the WebDataset format, SHARDS/:

              train-00000.tar ...      each image as stored, KEY.jpg, and its class beside it, KEY.cls
              moevision-index.json     where each image is; its name, class and order in the folder; a hash of each tar

            Every command that takes a folder of images takes SHARDS: ids, split, order, augmentation and resume are the
            folder's. Stopped at any moment, the same command goes on: finished shards are checked by their hash and
            kept. FOLDER may hold tars that others made (WebDataset): this converts them.
            """,
            """\
            moevision data shard path/to/images --out shards
            moevision data shard imagenet.yaml --out shards --shard-mb 512
            moevision data shard shards --check                   after a copy: compare every byte with the hashes
            """,
        ),
    )
    add = parser.add_argument
    add("what", metavar="FOLDER|CONFIG",
        help="a folder of images, a CSV, hf:NAME, a dataset's name, or a configuration with data")  # fmt: skip
    add("--out", type=Path, metavar="SHARDS", help="folder to write to")
    add("--shard-mb", type=_positive, default=256, metavar="MB", help="MiB of images in a shard (%(default)s)")
    add("--root", metavar="DIR", help="folder of the datasets that are known by name (the configuration's, or data)")
    add("--check", action="store_true", help="write nothing; compare the shards in FOLDER with their hashes")


def demo() -> ArgumentParser:
    """Which model, which images, and who may see the page."""
    parser = _parser(
        "demo",
        """\
        See in a browser which experts every patch of an image goes to.

        Without MODEL it shows the models that come with the package. Nothing is downloaded and nothing leaves this
        computer; images that you drop on the page are not kept.
        """,
        """\
        moevision demo                                     the bundled models, on this computer only
        moevision demo runs/pets --data path/to/photos     a model that you trained, and your images to choose from
        moevision demo --host 0.0.0.0 --auth class         for a class on the same network; a QR code is printed
        """,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=f"{MODEL}; bundled if left out")
    add("--data", metavar="DIR", help=f"images to choose from: {_DATA}")
    add("--root", metavar="DIR", help=_ROOT)
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for the whole network (%(default)s)")
    add("--port", type=int, help="port (the first free one from 7860)")
    add(
        "--root-path", default="", metavar="/PATH", help="path below which a reverse proxy shows the page, such as /moe"
    )
    add(
        "--auth",
        metavar="USER",
        help="ask visitors for this user and a password, which is asked for here, or comes from the environment "
        "variable MOEVISION_AUTH=USER:PASSWORD without this option (USER:PASSWORD works too, but others on this "
        "computer can read it)",
    )
    add("--public", action="store_true", help="let anyone in, without a password, who can reach --host or --share")
    add(
        "--share",
        action="store_true",
        help="open a public address through a server of gradio's (the first time it downloads a program for that)",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name under which the page is opened, such as a proxy's: lab.example.org or *.example.org "
        "(addresses, localhost and this computer's own name always work; repeat it for more)",
    )
    add(
        "--allow-embed",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a website that may show the page in a frame, such as https://lab.example.org (repeat it for more)",
    )
    add("--no-browser", dest="browser", action="store_false", help="don't open a browser")
    return parser


PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    function.__name__: function
    for function in (
        predict,
        info,
        compare,
        upcycle,
        surgery,
        export,
        push,
        analyze,
        data,
        demo,
    )
}


def tasks_of(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """The parsers of a verb's tasks, such as `prune` of `data`; most verbs have none."""
    return {
        name: task
        for action in parser._actions
        if isinstance(action, _SubParsersAction)
        for name, task in action.choices.items()
    }


def _parser(verb: str, description: str, examples: str) -> ArgumentParser:
    """A parser whose help says what the verb does, and ends with one to three examples."""
    return ArgumentParser(prog=f"moevision {verb}", **_texts(description, examples))


def _texts(description: str, examples: str) -> dict[str, Any]:
    return {
        "description": "\n".join(_lines(description)),
        "epilog": "\n".join(["examples", *(f"  {line}" for line in _lines(examples))]),
        "formatter_class": RawDescriptionHelpFormatter,
    }


def _lines(text: str) -> list[str]:
    return dedent(text).strip().splitlines()


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ArgumentTypeError(f"{text!r} is no number of at least 1")
    return number


def _seed(text: str) -> int:
    seed = int(text) if text.isdecimal() else -1
    if not 0 <= seed < 2**32:
        raise ArgumentTypeError(f"{text!r} is no seed: it must be at least 0 and less than 2**32")
    return seed


def _at_least_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise ArgumentTypeError(f"{text!r} is no number of at least 0")
    return number


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return share


def _layers(text: str) -> str | list[int]:
    numbers = text.replace(" ", "").split(",")
    return [int(number) for number in numbers] if all(number.isdecimal() for number in numbers) else text


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:  # a word, such as batch
        return name, value
