"""What `import moevision` and the command line's answers cost, and what they must not load; and timm's names.

Bars are CPU time, the best of three tries, so that a busy machine doesn't decide.
"""

import itertools
import json
import os
import resource
import subprocess
import sys

import pytest

from moevision.cli import VERBS

pytestmark = pytest.mark.deep

ROUNDS = 3
HELP_S = 0.3
HEAVY = ["torch", "timm", "numpy", "lightning", "pytorch_lightning", "gradio", "torchmetrics"]
HEAVY += ["matplotlib", "jsonargparse", "rich"]
ANSWERED = ["--help", "--version", "--version --verbose", "help fit"]
ANSWERED += [f"{verb} --help" for verb in (*VERBS, "data score", "data prune")]
ANSWERED += [f"{verb} path/to/images --help-all" for verb in ("fit", "validate", "test")]
REFUSED = ["", "nonsense", "predict runs/pets", "predict runs/pets image.jpg --format xml", "info"]
REFUSED += ["compare", "predict runs/pets image.jpg --batch_size x", "export runs/pets", "analyze"]
REFUSED += ["upcycle vit_tiny_patch16_224 --out new --num-experts 0", "analyze runs/pets --nothing"]
REFUSED += ["data", "data prune runs/pets", "demo --port many"]
ANSWERS = [
    *((0, call.split()) for call in ANSWERED),
    *((2, call.split()) for call in REFUSED),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A program in a new interpreter, with one thread."""
    return subprocess.run(
        [sys.executable, *command],
        timeout=600,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def output(program: str) -> list[str]:
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("code", "arguments"), ANSWERS, ids=[*ANSWERED, *REFUSED])
def test_an_answer_is_quick(code, arguments):
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("-m", "moevision", *arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code, done.stderr
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    taken: list[float] = []
    while not taken or (min(taken) > HELP_S and len(taken) < ROUNDS):
        taken.append(cpu_seconds())
    assert min(taken) <= HELP_S


def test_answers_load_nothing_heavy():
    program = f"""
import contextlib, io, sys
from moevision.cli import main
for code, arguments in {ANSWERS!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(arguments) == code, arguments
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (arguments, heavy)
"""
    assert output(program) == []


STEPS = """
import json, time
marks = [time.process_time()]
import timm
marks.append(time.process_time())
import moevision.models
marks.append(time.process_time())
print(json.dumps(marks))
"""


def test_the_import_costs_little_more_than_timm():
    """After timm, which moevision imports, so that the second number is all that it adds."""

    def cpu_seconds() -> list[float]:
        marks: list[float] = json.loads(output(STEPS)[-1])
        return [after - before for before, after in itertools.pairwise(marks)]

    added: list[float] = []
    while not added or (min(added) > 0.1 and len(added) < ROUNDS):
        timm, ours = cpu_seconds()
        added.append(ours / timm)
    assert min(added) <= 0.1


# ---- timm knows our names

ORDERS = {
    "timm before": "import timm\nimport moevision.models",
    "timm after": "import moevision.models\nimport timm",
    "a public name": "import moevision\nmoevision.forward_routing",
}
KNOWN = """
import timm
from timm.models import VisionTransformer
net = timm.create_model("test_vit_moe", num_experts=3)
assert isinstance(net, VisionTransformer)
assert timm.list_models("vit_moe_*")
print(net.moe_config["num_experts"])
"""


BUILT = """
config = transformers.TimmWrapperConfig(architecture="test_vit_moe", num_labels=2)
print(transformers.TimmWrapperForImageClassification(config).timm_model.moe_config["num_experts"])
"""
PUBLIC = """
from moevision import MoEMlp
import timm
assert timm.list_models("vit_moe_*")
import moevision
for name in (*moevision.__all__, "analysis", "data", "demo", "layers", "losses", "models", "train"):
    assert name in dir(moevision), name
    assert getattr(moevision, name) is not None
try:
    moevision.nothing
except AttributeError as error:
    print(error)
"""
NO_NAME = "module 'moevision' has no attribute 'nothing'"
PROGRAMS = {
    # After `import moevision.models`, or the first use of a public name, timm knows ours.
    **{name: (f"{imports}\n{KNOWN}", "3") for name, imports in ORDERS.items()},
    # So does transformers, whichever is imported first.
    "ours, transformers": (f"import moevision.models, transformers{BUILT}", "4"),
    "transformers, ours": (f"import transformers, moevision.models{BUILT}", "4"),
    "a public name imported, and all without an import of their own": (PUBLIC, NO_NAME),
}
# Each program runs in a fork of a process that has imported what timm needs, neither timm nor moevision.
IN_FORKS = """
import os, sys
import safetensors.torch, torch, torchvision, yaml
from huggingface_hub import HfApi
assert not {{"timm", "moevision"}} & set(sys.modules)
for name, program in {programs!r}.items():
    print("==", name, flush=True)
    child = os.fork()
    if child == 0:
        exec(program, {{"__name__": "__main__"}})
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, name
"""


@pytest.mark.needs("transformers")
def test_names_are_known_however_they_are_imported():
    programs = {name: program for name, (program, _) in PROGRAMS.items()}
    assert output(IN_FORKS.format(programs=programs)) == [
        line for name, (_, said) in PROGRAMS.items() for line in (f"== {name}", said)
    ]


def test_nothing_watches_imports():
    """timm stays as it is for whoever imports it: no finder of ours stands in front of Python's."""
    program = """
import sys
before = list(sys.meta_path)
import moevision
print(sys.meta_path == before, "timm" in sys.modules)
"""
    assert output(program) == ["True False"]
