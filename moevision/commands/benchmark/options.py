"""The command line of `moevision benchmark`: what can be asked for, in words. Nothing heavy is imported here."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Measure how fast a MoE is on this machine, beside dense models and other libraries' layers, in one run.

  layer           one MoE layer, forward and backward, beside timm's dense Mlp of equal active FLOPs
  train WHAT      training steps of a model beside both dense twins: images/s, MFU, memory, and where the time goes
  infer MODEL     images/s and latency of a model beside both dense twins
  data WHAT       the input pipeline alone, and what a training step waits for it

All candidates take turns, and ratios are taken pair by pair: quote the median with its quartiles. Absolute times belong
to the machine and the hour, so nothing else should run meanwhile. With --out DIR everything is written as JSON, with
machine, versions, command and every single time, and as a figure.

moevision benchmark layer --help (or train, infer, data) tells more."""

LAYER = """\
Time one MoE layer: forward under autocast and backward to its input and parameters, in training mode with noise.

Beside it: timm's Mlp of hidden width k·H (equal active FLOPs) and of E·H (equal total parameters), and other libraries'
dropless layers where they are installed: transformers' Mixtral and NemotronH experts, torchtitan's. They get our
router's decisions and the same active FLOPs; what isn't installed or fails is reported, and the rest goes on.

Several values of an option are measured in all combinations. MFU is against matrix products measured just before."""
LAYER_EXAMPLES = """\
examples
  moevision benchmark layer --tokens 4160 --width 192 --experts 8 32 --top-k 2
  moevision benchmark layer --preset bars --precision bf16 fp32 --out bars
  moevision benchmark layer --preset growth --peers none --out growth
"""

TRAIN = """\
Time the training step of a model beside its dense twins of equal active FLOPs and of equal parameters: forward under
autocast, losses, backward, clipping, AdamW. WHAT is a config, a run folder, or a timm name (a dense one is converted).

Tells images/s, MFU against the measured matmul peak, the phases of a step (router, dispatch, experts, attention, ...),
the operators' share, balance and padding of the experts, peak memory (each model in processes of its own), and joules
per image where the machine has a counter."""
TRAIN_EXAMPLES = """\
examples
  moevision benchmark train cifar10 --out cost
  moevision benchmark train cifar10 --peer lightning     beside plain timm in Lightning, both in real Trainers
  moevision benchmark train quickstart --data own        with its own pictures: what does a step wait for data?
"""

INFER = """\
Time the forward pass of a model beside its dense twins at several batch sizes: images/s, median and 95th percentile
of the latency. MODEL is a run folder, a saved model, a timm address, or the name of a config or timm model (untrained:
speed doesn't depend on the weights' values, but for how evenly experts are used)."""
INFER_EXAMPLES = """\
examples
  moevision benchmark infer runs/quickstart
  moevision benchmark infer cifar10 --batch-size 1 256 --precision bf16 --compile
"""

DATA = """\
Time the input pipeline alone: from memory and from files, with augmentation and without, for several numbers of worker
processes; what decoding costs; and how long a training step waits for its batch. WHAT is a config, a run folder, a
folder with one subfolder per class, or a data set's name."""
DATA_EXAMPLES = """\
examples
  moevision benchmark data cifar10 --root datasets
  moevision benchmark data path/to/images --workers 0 4 --out pipeline
"""

QUICK: Mapping[str, Mapping[str, Any]] = {
    "layer": {"tokens": [128], "width": [32], "experts": [4], "repetitions": 3, "warm_up": 1},
    "train": {"batch_size": 4, "repetitions": 3, "warm_up": 1, "breakdown_steps": 2, "memory_runs": 1},
    "infer": {"batch_size": [1, 2], "repetitions": 3, "warm_up": 1},
    "data": {"workers": [0], "batches": 2, "steps": 2, "repetitions": 2},
}
"""What --quick sets: small sizes and few rounds, to see that everything runs. Its figures mean nothing."""


def build_parser(*, quick: bool = False) -> ArgumentParser:
    """The parser of all four kinds.

    Args:
        quick: take the defaults of `QUICK`.
    """
    parser = ArgumentParser(
        prog="moevision benchmark", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="layer|train|infer|data")
    for name, text, examples, add in (
        ("layer", LAYER, LAYER_EXAMPLES, _layer),
        ("train", TRAIN, TRAIN_EXAMPLES, _train),
        ("infer", INFER, INFER_EXAMPLES, _infer),
        ("data", DATA, DATA_EXAMPLES, _data),
    ):
        kind = kinds.add_parser(
            name, description=text, epilog=examples, formatter_class=RawDescriptionHelpFormatter, add_help=True
        )
        add(kind)
        _common(kind, name)
        kind.set_defaults(**(QUICK[name] if quick else {}))
    return parser


def _common(parser: ArgumentParser, kind: str) -> None:
    if kind != "data":
        parser.add_argument(
            "--warm-up",
            type=_count,
            default=20,
            metavar="N",
            help="rounds before them, in which a CPU compiles its kernels for the shapes that occur (%(default)s)",
        )
        parser.add_argument("--no-peak", action="store_true", help="don't measure the matmul peak; tells no MFU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s: CUDA if it is there)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads of torch on the CPU (its own choice)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write benchmark-{kind}.json and .png to DIR")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, measures nothing")


def _layer(parser: ArgumentParser) -> None:
    from_preset = "; a preset brings its own"
    for name, default, text in (
        ("--tokens", 4160, f"tokens T of a batch (%(default)s{from_preset})"),
        ("--width", 192, f"width D of a token (%(default)s{from_preset})"),
        ("--experts", 8, "experts E (%(default)s)"),
        ("--top-k", 2, f"experts k of a token (%(default)s{from_preset})"),
    ):
        parser.add_argument(name, type=_positive, nargs="+", default=[default], metavar="N", help=text)
    parser.add_argument("--router", nargs="+", metavar="NAME", help="routers, such as vmoe_top_k noisy_top_k")
    parser.add_argument(
        "--backend", nargs="+", default=["auto"], metavar="NAME", help="auto, loop, grouped or dense (%(default)s)"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16"], help="autocast to bf16, or fp32 (bf16)"
    )
    parser.add_argument(
        "--preset",
        choices=("bars", "growth"),
        help="bars: three shapes of small ViTs, vmoe_top_k and noisy_top_k; growth: E from 1 to 64, T from 256 to "
        "65536, D from 96 to 768, one at a time",
    )
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="none, all, or some of them by name (all; none with --preset growth)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also ours and the dense ones compiled; takes tens of seconds a shape"
    )
    parser.add_argument("--no-total-params", action="store_true", help="leave the dense MLP of equal parameters out")
    parser.add_argument("--repetitions", type=_positive, default=20, metavar="N", help="measured rounds (%(default)s)")


def _train(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="WHAT", help="a config, a run folder, or a timm name")
    parser.add_argument(
        "--data", choices=("noise", "own"), default="noise", help="batches of noise, or the config's pictures (noise)"
    )
    parser.add_argument("--root", help="folder of named data sets (the config's)")
    _sizes(parser)
    parser.add_argument("--num-classes", type=_positive, metavar="N", help="classes, where no data tells (10)")
    _precision(parser)
    parser.add_argument(
        "--peer", dest="peers", nargs="+", choices=("lightning",), default=[], help="also plain timm in Lightning"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also with compiled blocks; takes a minute or more to begin"
    )
    parser.add_argument(
        "--memory-runs",
        type=_count,
        default=3,
        metavar="N",
        help="processes per model for its peak memory (3; 0: none)",
    )
    parser.add_argument("--no-energy", action="store_true", help="don't look for an energy counter")
    parser.add_argument(
        "--breakdown-steps", type=_positive, default=10, metavar="N", help="steps for the breakdown (%(default)s)"
    )
    parser.add_argument("--repetitions", type=_positive, default=30, metavar="N", help="measured steps (%(default)s)")


def _infer(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run folder, a timm address, a config or a timm name")
    parser.add_argument(
        "--batch-size", type=_positive, nargs="+", default=[1, 8, 64], metavar="N", help="pictures per call (1 8 64)"
    )
    parser.add_argument("--image-size", type=_positive, metavar="PX", help="side of the pictures, for untrained models")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="(both by default)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also with compiled blocks; takes tens of seconds per batch size"
    )
    parser.add_argument("--no-energy", action="store_true", help="don't look for an energy counter")
    parser.add_argument("--repetitions", type=_positive, default=40, metavar="N", help="measured calls (%(default)s)")


def _data(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="WHAT", help="a config, a run folder, a folder of pictures, or a data set's name"
    )
    parser.add_argument("--root", help="folder of named data sets (the config's, or data)")
    parser.add_argument(
        "--model",
        default="quickstart",
        metavar="CONFIG",
        help="whose model trains on a folder of pictures (quickstart)",
    )
    parser.add_argument(
        "--workers", type=_count, nargs="+", default=[0, 1, 2], metavar="N", help="worker processes (0 1 2)"
    )
    _sizes(parser)
    _precision(parser)
    parser.add_argument("--batches", type=_positive, default=20, metavar="N", help="batches per round (%(default)s)")
    parser.add_argument(
        "--steps", type=_count, default=20, metavar="N", help="training steps for the data wait (20; 0: none)"
    )
    parser.add_argument("--repetitions", type=_positive, default=5, metavar="N", help="rounds (%(default)s)")


def _sizes(parser: ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="pictures per step (the config's)")
    parser.add_argument("--image-size", type=_positive, metavar="PX", help="side of the pictures (the config's)")


def _precision(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="of the training step; by default what fit would use on this machine",
    )


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise ArgumentTypeError(f"{text!r} is no whole number") from error
        if value < lowest:
            raise ArgumentTypeError(f"it is {value} and must be at least {lowest}")
        return value

    return number


_positive, _count = _at_least(1), _at_least(0)
