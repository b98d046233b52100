"""The command line. Nothing heavy is imported before a verb's arguments are understood."""

from __future__ import annotations

import errno
import io
import math
import os
import select
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moevision.errors import USER_ERROR, DataWarning, UserError
from moevision.words import loading, wrap_lines

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

Add = Callable[..., Any]
"""Declares one option: `ArgumentParser.add_argument`."""


# Each verb: what it does, and `module:function` that does it to the arguments that were understood.
VERBS = {
    "fit": (
        "train a model on a folder of images; writes runs/NAME/",
        "moevision.commands.fit:run",
    ),
    "validate": ("evaluate a checkpoint on the validation images", "moevision.train.fit:validate"),
    "test": ("evaluate a checkpoint on the test images", "moevision.train.fit:test"),
    "predict": (
        "classify images with a saved model, as CSV or JSON",
        "moevision.commands.predict:run",
    ),
    "info": ("parameters and FLOPs of a model", "moevision.commands.info:run"),
    "compare": (
        "compare two runs, or several seeds of two recipes",
        "moevision.commands.compare:run",
    ),
    "upcycle": (
        "turn a pretrained dense ViT into a Mixture of Experts",
        "moevision.commands.upcycle:run",
    ),
    "cut": (
        "a smaller model of some classes, with the experts that they use",
        "moevision.commands.cut:run",
    ),
    "export": ("write a model as ONNX, checked against it", "moevision.commands.export:run"),
    "analyze": (
        "what the experts of a trained model do, as one report",
        "moevision.commands.info:analyze",
    ),
    "audit": (
        "check the router of anybody's model",
        "moevision.commands.info:audit",
    ),
    "data": ("find mislabelled, hard and duplicate training images", "moevision.commands.data:run"),
    "demo": (
        "see in a browser which experts every patch of an image goes to",
        "moevision.commands.demo:run",
    ),
}

_NO_MEMORY = ("can't allocate memory", "out of memory")  # torch's on a CPU, on a GPU
INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it
UNREAD = 141  # the same of SIGPIPE, which Python ignores
# Errors of writing, which of standard output have no file's name: no space, a limit, a lost terminal or pipe.
_UNWRITTEN = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EPIPE")
    if hasattr(errno, name)
}

USAGE = """\
moevision: train sparse vision transformers, see where every patch goes

usage: moevision VERB [arguments]      (moevision VERB --help tells more)

{verbs}

begin with
  moevision fit --config quickstart    drawn pets, 1.5 min on a CPU, no download
  moevision fit path/to/images         your own images, one folder per class
  moevision predict runs/NAME/model image.jpg
  moevision demo                       the explorer, with bundled models

--version prints the version; --verbose adds those of torch, timm and Lightning.
--traceback after the verb's arguments shows where an error came from.

exit codes
  0    done
  2    user error; the last line explains the fix
  3    fit: the training diverged, see divergence.md in its folder
  130  stopped by Ctrl-C
  141  nobody read the output any more, as in | head
       fit: also 129 by a closed terminal, 143 by SIGTERM, 138 by SIGUSR1;
       saved, unless nothing was trained; the last line resumes the run
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that the arguments (`sys.argv[1:]`) name; the exit code, as `moevision --help` lists them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A σ or an arrow that Windows' code pages lack becomes a "?".
        sys.stdout.reconfigure(errors="replace")
    try:
        code = _answer(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # when Python ends, an error would have no sentence
        return code
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITTEN:
            raise
        return _output_failed(error)


def _answer(arguments: Sequence[str]) -> int:
    """Answer a command line; its exit code."""
    if not arguments:
        print(usage())
        return USER_ERROR
    verb, *options = arguments
    if verb == "help" and options:
        verb, options = options[0], ["--help"]
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb == "--version":
        text = versions()
        print(text if "--verbose" in options else text.splitlines()[0])
        return 0
    if verb == "train":
        verb = "fit"
    if verb not in VERBS:
        from difflib import get_close_matches

        hint = "".join(f" Did you mean {near}?" for near in get_close_matches(verb, VERBS, n=1))
        print(
            f"moevision: there is no verb {verb!r}; choose one of {', '.join(VERBS)}.{hint}",
            file=sys.stderr,
        )
        return USER_ERROR
    return _run(verb, options)


def usage() -> str:
    """The help of the whole program."""
    lines = [f"  {name:10} {summary}" for name, (summary, _) in VERBS.items()]
    return USAGE.format(verbs="\n".join(lines))


def versions() -> str:
    """The package's version, then those of Python and of what it stands on, a line each."""
    from moevision import __version__, package_version

    lines = [f"moevision {__version__}", f"python {sys.version.split()[0]}"]
    for name in ("torch", "torchvision", "timm", "lightning"):
        lines.append(f"{name} {package_version(name) or 'not installed'}")
    return "\n".join(lines)


def _run(verb: str, arguments: list[str]) -> int:
    """Do what a verb is asked for, and say in one sentence what stops it; the exit code."""
    show_traceback = "--traceback" in arguments
    try:
        _call(verb, [argument for argument in arguments if argument != "--traceback"])
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        message = _message(verb, error)
        if message is None:
            raise
        if show_traceback:
            import traceback

            traceback.print_exc()
        print(f"moevision: {message}", file=sys.stderr)
        return getattr(error, "exit_code", USER_ERROR)
    except KeyboardInterrupt:
        print(f"\nmoevision: {verb} was stopped by Ctrl-C.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # the argument parser has said what is wrong
        if isinstance(stop.__context__, BrokenPipeError):  # so does rich
            return UNREAD
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    return 0


def _output_failed(error: OSError) -> int:
    """Say why the output can't be written, unless its reader, such as `head`, has had enough; the exit code."""
    if isinstance(error, BrokenPipeError) and not _is_unread():
        raise error  # of another pipe
    with suppress(OSError):
        sys.stdout.flush()
    # Or Python would try once more when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return UNREAD
    with suppress(OSError):  # standard error may be as full
        sentence = f"the output can't be written ({error.strerror}): make room for it, or send it elsewhere."
        print(f"moevision: {sentence}", file=sys.stderr)
    return USER_ERROR


def _is_unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more; on Windows, which can't say, a broken pipe is."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout, 0)  # which tells of errors and hang-ups
    return bool(poll.poll(0))


def _message(verb: str, error: Exception) -> str | None:
    """What a user can mend: what a verb has found, a file that can't be used, too little memory."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        if not error.filename:
            return None
        return f"{error.filename}: {error.strerror}; give another place, or mend it."
    if isinstance(error, MemoryError) or any(message in str(error) for message in _NO_MEMORY):
        return (
            f"there is not enough memory for {verb} here: use a smaller model, smaller images or smaller batches. "
            "(--traceback shows where it ended.)"
        )
    return None


def _call(verb: str, arguments: list[str]) -> None:
    """Understand the arguments of a verb, import what does it, and do it."""
    from moevision import config

    if verb in config.VERBS:
        everything = "--help-all" in arguments or "--help_all" in arguments
        if everything or "-h" in arguments or "--help" in arguments:
            print(config.help_of(verb, everything=everything), end="")
            return
        args: Any = config.parse_args(verb, arguments)
        if verb == "fit":
            _check_images(args.folder)
    else:
        args = parsed(verb, arguments)
        _check_paths(args)

    _, address = VERBS[verb]
    module, _, function = address.partition(":")
    with loading():
        run: Callable[[Any], None] = getattr(import_module(module), function)
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        run(args)


def _check_images(folder: str | None) -> None:
    """Say what is wrong with a folder of images before torch is loaded, which takes seconds."""
    from moevision.data.folder import check_images
    from moevision.files import shipped_configs

    if folder is not None and (Path(folder).exists() or folder not in shipped_configs()):
        check_images(folder)


def _check_paths(args: Namespace) -> None:
    """The same of a model that isn't there, and of images to classify."""
    from moevision.files import model_not_found_message

    for path in getattr(args, "paths", []):
        if not Path(path).exists():
            raise UserError(f"There is no file or folder {path}.")
    models = getattr(args, "model", None) or getattr(args, "run", ".")
    for model in map(str, models if isinstance(models, list) else [models]):
        # Names of timm have a _ or a digit and no slash, other addresses a colon.
        is_path = model.isalpha() or ("/" in model and ":" not in model)
        if is_path and not Path(model).exists():
            raise UserError(model_not_found_message(model))


def _show_warning(
    default: Callable[..., None], warning: Warning, category: type[Warning], *source: Any
) -> None:
    """What a reader is meant to know in one line, without the place in the code."""
    if issubclass(category, DataWarning):
        print(f"warning: {warning}", file=sys.stderr)
    else:
        default(warning, category, *source)


# ---- what each verb takes, as plain argparse, so that help and usage errors need no torch


def _number(
    to_number: Callable[[str], float], is_valid: Callable[[float], bool], description: str
) -> Callable[[str], Any]:
    """A type of argparse's: a number within limits."""

    def parse(text: str) -> float:
        from argparse import ArgumentTypeError

        try:
            number = to_number(text)
        except ValueError:
            number = math.nan
        if not is_valid(number):
            raise ArgumentTypeError(f"{text!r} is no {description}")
        return number

    return parse


_positive = _number(int, lambda x: x >= 1, "number of at least 1")
_seed = _number(int, lambda x: 0 <= x < 2**32, "seed: it must be at least 0 and less than 2**32")
_share = _number(float, lambda x: 0 <= x <= 1, "share between 0 and 1")
_probability = _number(float, lambda x: 0 < x <= 1, "probability above 0, at most 1")
_coverage = _number(float, lambda x: 0 < x < 1, "probability above 0 and below 1")

MODEL = "a run folder, its model/ folder, or a timm address such as hf-hub:user/name"
TRAINED = f"{MODEL}, or a checkpoint of a run, finished or not (checkpoints/last.ckpt)"
_DATA = "a folder with one subfolder per class, or a dataset's name such as emoji or cifar10"
_ROOT = "folder of the datasets that are known by name (the run's own, or data)"


def _predict(add: Add) -> None:
    add("model", help=TRAINED)
    add("paths", nargs="+", metavar="PATH", help="image files, folders with their subfolders")
    add("--format", choices=("csv", "json"), default="csv", help="what is written (%(default)s)")
    add("--out", metavar="FILE", help="write to FILE instead of standard output")
    add(
        "--batch-size",
        type=_positive,
        default=64,
        metavar="N",
        help="images per pass (%(default)s)",
    )
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 leaves two to three digits of a probability, and is faster where the processor has it (%(default)s)",
    )
    add(
        "--features",
        metavar="FILE.npy",
        help="also write the pooled features, records of path and feature",
    )
    add(
        "--heat",
        metavar="DIR",
        help="also write each image with its patches in blue where the answer rests on them, in brown where the second "
        "class does; attention has mixed the patches before",
    )
    add("--unsure", type=_probability, metavar="P", help='answer "unsure" where no class reaches P')
    add(
        "--mirror",
        action="store_true",
        help="answer by the mean over each image and its mirror image, in twice the time; distances, features and heat "
        "are of the image",
    )
    add(
        "--sets",
        type=_coverage,
        metavar="P",
        help="also tell the classes that have the true one with probability P, such as 0.9, where images are like the "
        "validation images: none, one or more",
    )


def _info(add: Add) -> None:
    add("model", metavar="MODEL", help=f"{MODEL}, or a timm name (built without weights)")
    add(
        "--format", choices=("table", "json"), default="table", help="what is printed (%(default)s)"
    )


def _compare(add: Add) -> None:
    add("runs", nargs="+", metavar="RUN", help="run folders of fit, at least two")
    add("--json", type=Path, metavar="FILE", help="write every number to FILE")


def _upcycle(add: Add) -> None:
    add(
        "model",
        metavar="NAME_OR_PATH",
        help="a timm name, a saved model's folder, or a timm address",
    )
    add("--out", required=True, metavar="DIR", help="folder to write to")
    add(
        "--num-experts",
        type=_positive,
        default=8,
        metavar="E",
        help="experts per layer (%(default)s)",
    )
    add(
        "--layers",
        type=_layers,
        help="last2 (odd blocks), every2, all, or numbers: 8,10 (the last two that count)",
    )
    add("--top-k", type=_positive, default=1, metavar="K", help="experts per token (%(default)s)")
    add(
        "--router",
        default="vmoe_top_k",
        metavar="NAME",
        help="router of the new layers (%(default)s)",
    )
    add("--weights", metavar="FILE", help="a .safetensors file for the architecture NAME")
    add(
        "--num-classes",
        type=_positive,
        metavar="C",
        help="a new classifier, if it differs from the model's own",
    )
    add(
        "--image-size",
        type=_positive,
        metavar="PX",
        help="resample positions, if it differs from the model's own",
    )
    add(
        "--depth",
        type=_positive,
        metavar="L",
        help="take only the first L blocks; the model must then be trained on",
    )
    add(
        "--reinit",
        type=_share,
        default=0.0,
        help="share of each expert's hidden units that is drawn anew",
    )
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


def _cut(add: Add) -> None:
    add("model", help=f"{MODEL}; it must have MoE layers")
    add(
        "--classes",
        nargs="+",
        required=True,
        metavar="NAME",
        help="the classes to keep, two or more",
    )
    add("--out", required=True, metavar="DIR", help="folder to write to")
    add(
        "--experts",
        type=_positive,
        metavar="N",
        help="of each layer (the fewest that cost a point at most on validation images)",
    )
    add("--data", help=f"{_DATA}; by default what the run was trained on")
    add("--root", help=_ROOT)
    add(
        "--limit",
        type=_positive,
        default=1000,
        metavar="N",
        help="at most N images for validation, and for the test (%(default)s)",
    )


def _export(add: Add) -> None:
    add("model", help=TRAINED)
    add("--out", required=True, metavar="FILE", help="file to write: NAME.onnx")
    add(
        "--dtype",
        choices=("fp32", "fp16"),
        default="fp32",
        help="of weights and arithmetic (%(default)s)",
    )
    add(
        "--data",
        metavar="IMAGES",
        help="compare on these too: an image, a folder, or a dataset's name",
    )
    add("--root", help=_ROOT)
    add(
        "--limit",
        type=int,
        default=32,
        metavar="N",
        help="at most N images of --data (%(default)s)",
    )
    add("--opset", type=int, metavar="N", help="version of ONNX's operators, 18 to 23 (20)")
    add(
        "--routes",
        action="store_true",
        help="tell each patch's experts and gates too, and take experts away",
    )
    add("--force", action="store_true", help="replace FILE")


def _analyze(add: Add) -> None:
    add("model", help=f"{MODEL}; it must have MoE layers")
    add(
        "--data", help=f"{_DATA}; by default what the run was trained on (its held-out test images)"
    )
    add("--root", help=_ROOT)
    add("--out", default="report", metavar="DIR", help="folder to write to (%(default)s)")
    add("--limit", type=int, metavar="N", help="images, the same number of each class (1000)")
    add(
        "--seeds",
        nargs="+",
        default=[],
        metavar="RUN",
        help="other trainings of the same recipe, to compare with",
    )
    add(
        "--before",
        metavar="MODEL",
        help="the model before it was trained, to compare with (fresh weights)",
    )
    add(
        "--permutations",
        type=int,
        metavar="N",
        help="shuffles behind each chance level (1000; smallest p: 1/(N + 1))",
    )
    add("--seed", type=_seed, default=0, help="seed of everything that is drawn (%(default)s)")
    add(
        "--quick",
        action="store_true",
        help="rougher: 300 images, 200 shuffles, experts ablated on fewer images",
    )


def _audit(add: Add) -> None:
    add(
        "function",
        metavar="FILE.py:FUNCTION",
        help="a function of yours that returns Audited(model, routings); the file's code is run",
    )
    add("--data", required=True, metavar="FOLDER", help=f"held-out images: {_DATA}")
    add("--out", default="report", metavar="DIR", help="folder to write to (%(default)s)")
    add("--limit", type=int, metavar="N", help="images, the same number of each class (1000)")
    add(
        "--quick",
        action="store_true",
        help="rougher: 300 images, 200 shuffles, experts removed on fewer images",
    )


def _score(add: Add) -> None:
    add("run", metavar="RUN", help="a run folder with scores.csv")
    add("--out", type=Path, metavar="DIR", help="folder to write to (RUN/data)")
    add(
        "--show",
        type=_positive,
        default=40,
        metavar="N",
        help="images in each list of the page (%(default)s)",
    )
    add(
        "--quick",
        action="store_true",
        help="no pass over the images: without files, duplicates and predictions",
    )


def _prune(add: Add) -> None:
    methods = ("aum", "el2n", "forgetting", "loss", "random", "ccs", "decisions")
    add("run", metavar="RUN", help="a run folder with scores.csv")
    add("--by", required=True, choices=methods, help="what decides, see above")
    add("--keep", type=_share, metavar="SHARE", help="share of the images to keep, such as 0.7")
    add(
        "--hardest",
        type=_share,
        metavar="SHARE",
        help="with ccs: share with the lowest AUM that goes first (0.1)",
    )
    add(
        "--decisions",
        type=Path,
        metavar="FILE",
        help="with decisions: the file that the page saved",
    )
    add("--seed", type=_seed, default=0, help="seed of what is drawn, and of ties (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="the list (RUN/keep-METHOD-SHARE.csv)")


def _demo(add: Add) -> None:
    add(
        "model",
        nargs="*",
        metavar="MODEL",
        help=f"{MODEL}; several to compare; bundled if left out",
    )
    add("--data", metavar="DIR", help=f"images to choose from: {_DATA}")
    add("--root", metavar="DIR", help=_ROOT)
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 for the whole network (%(default)s)",
    )
    add("--port", type=int, help="port (the first free one from 7860)")
    add(
        "--root-path",
        default="",
        metavar="/PATH",
        help="path below which a proxy shows the page, such as /moe",
    )
    add(
        "--auth",
        metavar="USER",
        help="ask visitors for this user and a password, which is asked for here or comes from the variable "
        "MOEVISION_AUTH=USER:PASSWORD (USER:PASSWORD works too, but others on this computer can read it)",
    )
    add(
        "--public",
        action="store_true",
        help="let anyone in, without a password, who can reach --host or --share",
    )
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
        help="another name under which the page is opened, such as lab.example.org or *.example.org; repeat it "
        "for more (addresses, localhost and this computer's own name always work)",
    )
    add(
        "--allow-embed",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a website that may show the page in a frame, such as https://lab.example.org; repeat it for more",
    )
    add("--no-browser", dest="browser", action="store_false", help="don't open a browser")


def _data(add: Add) -> None:
    add("task", choices=TASKS)


# Each verb, and each task of `data`: its options, what it does in one paragraph, and examples.
_TAKES: dict[str, tuple[Callable[[Add], None], str, str]] = {
    "predict": (
        _predict,
        """\
Classify images with a saved model: one row per image with the path, the class in words, its probability, the five most
likely classes, and the distance: above 1 the image is unlike the training images (empty if fit stored none). A file
that can't be read gets a row that says why. Probabilities are calibrated if fit stored a temperature with the model; if
not, a line says so. With --unsure the exit code stays 0.""",
        """\
  moevision predict runs/pets/model image.jpg
  moevision predict runs/pets/model photos/ --unsure 0.6 --out answers.csv   a folder with all its subfolders""",
    ),
    "info": (
        _info,
        """\
Parameters and FLOPs per image of a model, beside its dense twins (same active FLOPs, same parameters) and the plain
ViT.""",
        """\
  moevision info runs/pets --format json
  moevision info vit_moe_tiny_patch16_224                a timm name: no weights are needed or fetched""",
    ),
    "compare": (
        _compare,
        """\
Compare finished runs of fit on the test images that all of them were tested on: accuracy, the difference with its
interval, what would have been found with 80 % power, and cost. Two runs are compared image by image (McNemar's exact
test, Tango's interval); more are sorted into two recipes by their config.yaml, equal but for the seed, and compared
seed by seed (paired t). The first run's recipe is A. "No difference found" does not mean that they are equal.""",
        """\
  moevision compare runs/pets runs/pets/twin                    a Mixture of Experts and its dense twin
  moevision compare runs/moe-* runs/dense-* --json out.json   several seeds of two recipes""",
    ),
    "upcycle": (
        _upcycle,
        """\
Turn a trained dense ViT into a Mixture of Experts that computes the same: every expert starts as a copy of the MLP
that it replaces, and learns from there (arXiv:2212.05055). Writes OUT/ with the new model, which every verb takes,
and upcycle.json: parameters and FLOPs before and after, and how far the outputs are from the dense model's.
--num-experts E stores E MLPs in each converted block, --top-k K computes K of them per token: K = 1 costs what the
dense model costs.""",
        """\
  moevision upcycle deit_tiny_patch16_224 --out tiny_moe            weights from the hub, 8 experts in two blocks
  moevision upcycle runs/dense/model --layers every2 --top-k 2 --out moe
  moevision upcycle deit_small_patch16_224 --weights my.safetensors --num-classes 37 --out pets_moe""",
    ),
    "cut": (
        _cut,
        """\
Write a smaller model of some of the classes, with the experts that these use most: chosen on training images, their
number on validation images. What that costs is measured on the test images, beside as many experts at random, those
that other classes use, and none. OUT/ is a model that every verb takes; cut.json has the numbers.""",
        """\
  moevision cut runs/cifar10 --classes cat dog --out cats_and_dogs
  moevision cut runs/cifar10 --classes automobile truck ship --experts 2 --out vehicles""",
    ),
    "export": (
        _export,
        """\
Write a model as one ONNX file, which runs in onnxruntime and others without moevision. Any batch size, float32; class
names and preprocessing travel in the file, which is run on seeded images and compared with the model: if a logit
differs by more than rounding, no file is left. It computes the chosen experts only; its time beside the model's is
printed. Needed: pip install onnx onnxscript onnxruntime.""",
        """\
  moevision export runs/pets --out pets.onnx
  moevision export runs/pets --out pets.onnx --data cats_and_dogs/   compare on your images too""",
    ),
    "analyze": (
        _analyze,
        """\
Measure what the experts of a trained model do on held-out images, and write one report: OUT/report.html, a page that
opens from disk, report.json with every number, figures/*.png, and trace.safetensors, the routing of every patch, for
`RoutingTrace.load`. It answers three questions, each beside its controls: do classes go to different experts, did
training the router add to that (with --seeds each against its own), and do the experts do different things.""",
        """\
  moevision analyze runs/pets                                   the images that the run held out for its test
  moevision analyze runs/pets --quick                           a first look, a minute or two, rougher numbers
  moevision analyze runs/pets --seeds runs/pets-2 runs/pets-3   beside two other trainings of the same recipe""",
    ),
    "audit": (
        _audit,
        """\
Check the router of any torch model by the questions that our own runs are asked. Your file loads the model, and says in
some twenty lines what each MoE block chose (docs/guides/audit-a-router.md). Each layer is suspected of dead experts,
constant routes, a label that leaks to the gate, and permuted experts; load and the cost of removing each expert are
beside it. Writes the report of `moevision analyze` to OUT/. Your file's code runs with your rights.""",
        """\
  moevision audit my_model.py:audited --data photos/ --quick

my_model.py is yours, such as
  from moevision.analysis import Audited, Choices
  from moevision.models.io import SavedModel

  def routings(net, images):         # a third one, forced: experts are removed
      logits, experts = net(images)  # [B, C]; [B, patches, choices], best first
      return logits, [Choices(experts, num_experts=8)]

  def audited():
      net = load_my_net()
      return Audited(SavedModel(net, ["cat", "dog"], 224, MEAN, STD), routings)""",
    ),
    "data": (
        _data,
        """\
Good data: what a training found out about its images, and which of them to keep. It reads scores.csv, which fit
leaves in the run folder, and changes none of your images: what you choose becomes a list that fit takes.
`moevision data TASK --help` tells more.""",
        """\
  moevision data score runs/pets                        a page and a CSV: doubtful, hard, doubled, damaged
  moevision data prune runs/pets --by ccs --keep 0.7    a list with a reason per row""",
    ),
    "data score": (
        _score,
        """\
Write what is known about the images of RUN: OUT/page.html, ranked lists with the images (labels that others speak
against, hardest, near-duplicates, leaks between splits, blurred, dark, damaged, ...), and images.csv, a row for each
image. On the page you decide by keyboard: keep, wrong label, drop; it saves decisions.csv, which `moevision data
prune --by decisions` makes a list of. Lists rank, and say of no image that it is bad. Nothing leaves the page.""",
        """\
  moevision data score runs/pets
  moevision data score runs/pets --quick                only the scores of the training, in seconds""",
    ),
    "data prune": (
        _prune,
        """\
Write a list of the training images of RUN to keep, with a reason per row, for fit's --data.keep (and --data.relabel
where there are new labels). aum and loss give up first what speaks against its label, el2n and forgetting what is
easy, ccs the lowest AUM and then equally from strata of AUM (arXiv:2210.15809), decisions what you dropped on the
page; random is the baseline (at small shares scores have lost to it, arXiv:2302.06960). No class loses its last
image.""",
        """\
  moevision data prune runs/pets --by ccs --keep 0.7
  moevision data prune runs/pets --by decisions --decisions ~/Downloads/decisions.csv""",
    ),
    "demo": (
        _demo,
        """\
See in a browser which experts every patch of an image goes to. Without MODEL it shows the models that come with the
package. Nothing is downloaded, and without --share or --host nothing leaves this computer; images that you drop on the
page are not kept.""",
        """\
  moevision demo                                     the bundled models, on this computer only
  moevision demo runs/pets --data path/to/photos     a model that you trained (or several), and images to choose from
  moevision demo --host 0.0.0.0 --auth class         for a class on the same network; a QR code is printed""",
    ),
}


def parser_of(name: str) -> ArgumentParser:
    """What a verb, or a task such as `data prune`, takes."""
    from argparse import ArgumentParser, RawDescriptionHelpFormatter

    add_options, about, examples = _TAKES[name]
    parser = ArgumentParser(
        prog=f"moevision {name}",
        description=wrap_lines(about.replace("\n", " ")),
        epilog=f"examples\n{examples}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_options(parser.add_argument)
    return parser


TASKS = tuple(name.removeprefix("data ") for name in _TAKES if name.startswith("data "))


def parsed(verb: str, arguments: list[str]) -> Namespace:
    """The arguments of a verb that isn't one of the three of training."""
    from moevision.config import spell_options

    name, options, task = verb, arguments, None
    if verb == "data" and arguments and arguments[0] in TASKS:
        task, *options = arguments
        name = f"data {task}"
    parser = parser_of(name)
    args = parser.parse_args(spell_options(parser, options))
    args.command = shlex.join(["moevision", verb, *arguments])  # for what records it
    if task is not None:
        args.task = task
    return args


def _layers(text: str) -> str | list[int]:
    numbers = text.replace(" ", "").split(",")
    if all(number.isdecimal() for number in numbers):
        return list(map(int, numbers))
    return text


def _option(text: str) -> tuple[str, Any]:
    import json
    from argparse import ArgumentTypeError

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:  # a word, such as batch
        return name, value
