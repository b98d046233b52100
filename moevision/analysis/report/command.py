"""`moevision analyze MODEL`: what the experts of a trained model do, as one self-contained report."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from moevision.names import shown

DESCRIPTION = """\
Measure what the experts of a trained model do, and write one report.

Runs the model over held-out images and writes OUT/:
  report.html         one page that opens from disk, without a network
  report.json         every number of it
  figures/*.png       its figures
  trace.safetensors   the routing of every patch, for your own questions:
                      moevision.analysis.RoutingTrace.load("OUT/trace.safetensors")

A layer counts as "learned specialization" only if its experts tell more about the images than chance, than the same
model untrained, than a hash and clusters of the patches and, with --seeds, if other trainings repeat it.
"""

EXAMPLES = """\
examples
  moevision analyze runs/pets                                   the images that the run held out for its test
  moevision analyze runs/pets --seeds runs/pets-2 runs/pets-3   beside two other trainings of the same recipe
  moevision analyze runs/pets --quick                           a first look, a minute or two, rougher numbers
  moevision analyze runs/pets/model --data other/images --out pets_elsewhere
"""


def main(arguments: list[str]) -> None:
    """Run with command-line arguments."""
    parser = ArgumentParser(
        prog="moevision analyze",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a run folder, its model/ folder, or a timm address; it must have MoE layers")
    parser.add_argument(
        "--data",
        help="a folder with one subfolder per class, or a dataset's name such as synthetic_pets or cifar10; "
        "by default what the run was trained on (its held-out test images)",
    )
    parser.add_argument("--out", default="report", metavar="DIR", help="folder to write to (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="images, the same number of each class (1000)")
    parser.add_argument(
        "--seeds", nargs="+", default=[], metavar="RUN", help="other trainings of the same recipe, to compare with"
    )
    parser.add_argument(
        "--permutations", type=int, metavar="N", help="shuffles behind each chance level (1000; smallest p = 1/(N + 1))"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn at random (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="rougher: 300 images, 200 shuffles, experts taken away on fewer images"
    )
    chosen = parser.parse_args(arguments)

    from moevision.analysis.report.build import analyze  # torch, matplotlib: not for --help
    from moevision.analysis.report.measure import ReportSettings

    settings = ReportSettings(
        model=chosen.model,
        data=chosen.data,
        out=Path(chosen.out),
        limit=chosen.limit if chosen.limit is not None else 300 if chosen.quick else 1000,
        seeds=tuple(chosen.seeds),
        permutations=chosen.permutations if chosen.permutations is not None else 200 if chosen.quick else 1000,
        seed=chosen.seed,
        quick=chosen.quick,
        command=shlex.join(["moevision", "analyze", *arguments]),
    )
    numbers = analyze(settings)
    print(shown(numbers["verdict"]["headline"]))
    for layer in numbers["verdict"]["layers"]:
        print("\n".join(f"  {shown(sentence)}" for sentence in layer["sentences"]))
    print(f"The report is {shown(str(settings.out / 'report.html'))}")
