"""The benchmarks' command line: a table of verbs. Nothing heavy is imported before a verb is known."""

from __future__ import annotations

import sys
from importlib import import_module

from moevision.errors import USER_ERROR, UserError

MEASURE = {
    "layer": (
        "one MoE layer beside timm's dense Mlp of equal active FLOPs and other libraries' layers",
        "layer",
    ),
    "train": (
        "a training step beside both dense twins: images/s, MFU, phases, peak memory",
        "train",
    ),
    "infer": ("images/s and latency of a model beside both dense twins", "infer"),
    "infer-exported": ("an ONNX file beside that of the dense twin", "infer.exported"),
    "demo-latency": (
        "how long a visitor of the explorer waits, in headless Chromium",
        "demo.latency",
    ),
    "demo-frames": ("how smooth the explorer's flight is, in headless Chromium", "demo.frames"),
    "demo-views": ("every state of the explorer in pictures, to look at", "demo.views"),
    "demo-load": (
        "many visitors of the explorer at once, every answer compared with the truth",
        "demo.load",
    ),
}
STUDY = {
    "accuracy": (
        "records of finished runs of `moevision fit`: accuracy, cost, load, curve",
        "accuracy",
    ),
    "quickstart": ("CPU seconds and accuracy of the first command, float32 and AVX2", "quickstart"),
    "narrow": ("many narrow experts in the recipes of CIFAR-10 and photos", "narrow"),
    "strangers": (
        "how many images of other things the bundled models recognize as such",
        "strangers",
    ),
}
PROVE = {
    "resume": ("interrupted and resumed against uninterrupted, bit for bit", "reliability.resume"),
    "kill": ("the same with kill -9 at random moments", "reliability.kill"),
    "falls": (
        "the fewest experts without which the bundled models answer otherwise",
        "demo.falls",
    ),
    "names": (
        "what the experts of emoji take, and what new pages cost without them",
        "demo.names",
    ),
    "audit": (
        "how often `moevision audit` finds a planted fault, and accuses a healthy router",
        "audit",
    ),
    "cut": ("what a model of some classes keeps of its experts, and costs", "cut"),
    "sorting": (
        "which expert gets which test photos, of the bundled router of whole images",
        "demo.sorting",
    ),
    "demo-live": (
        "the explorer without a server: its size, its times, its answers beside Python's",
        "demo.live",
    ),
    "mutation": ("small wrong changes, and the tests that notice them", "mutation"),
    "unchanged": (
        "hashes of a training, a resumed training, a report and a view, before and after",
        "house.unchanged",
    ),
    "counts": (
        "modules, lines and tokens of the package, single importers, import circles",
        "house.counts",
    ),
    "trips": ("the files that a forward pass, a training batch and a command cross", "house.trips"),
}
MAKE = {
    "bundle": ("one of the explorer's bundled models, from finished runs", "bundle"),
    "records": (
        "pages whose numbers changed with a new measurement, from the records",
        "records",
    ),
}
VERBS = {**MEASURE, **STUDY, **PROVE, **MAKE}

USAGE = """\
What moevision costs on this machine, and the studies behind its documentation.

usage: python -m benchmarks VERB [arguments]      (python -m benchmarks VERB --help tells more)
{verbs}

Records are JSON with machine, versions, command and commit. Nothing else should run meanwhile: candidates take turns
and ratios are taken pair by pair, but absolute times belong to the machine and the hour."""


def usage() -> str:
    """The help of the whole program."""
    groups = {"measure": MEASURE, "study": STUDY, "prove": PROVE, "make": MAKE}
    lines = [
        f"\n{group}\n" + "\n".join(f"  {name:15} {summary}" for name, (summary, _) in verbs.items())
        for group, verbs in groups.items()
    ]
    return USAGE.format(verbs="\n".join(lines))


def main(arguments: list[str]) -> int:
    """Run the verb that the arguments name; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USER_ERROR
    name, *rest = arguments
    if name not in VERBS:
        print(
            f"benchmarks: there is no verb {name!r}; choose one of {', '.join(VERBS)}.",
            file=sys.stderr,
        )
        return USER_ERROR
    sys.argv = [f"benchmarks {name}", *rest]  # what a record says and argparse reads
    try:
        import_module(f"benchmarks.{VERBS[name][1]}").main()
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
