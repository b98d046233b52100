"""What tests share: the command line called in this process, drawn images in a folder, one tiny finished run."""

import io
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import hypothesis
import pytest

from moevision.cli import main

if TYPE_CHECKING:
    from torch import Tensor, nn

# A busy machine may take any time for an example. The same examples in every run: a change is refused for what it does,
# not for what was drawn today; `--hypothesis-profile random` draws new ones.
PATIENT: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("random", **PATIENT)
hypothesis.settings.register_profile("same", derandomize=True, **PATIENT)
hypothesis.settings.load_profile("same")

# 32 px images, four experts: one epoch on 40 images takes a tenth of a second. fp32, so that a saved model, which
# computes in fp32, can be compared with the run that made it.
TINY = (
    "--model.arch.name=test_vit_moe",
    "--model.arch.patch_size=8",
    "--data.image_size=32",
    "--data.batch_size=8",
    "--data.test_fraction=0.3",
    "--trainer.precision=32-true",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
)

# A timm ViT with a class token, 16 patches, MLPs of 128 and few weights.
SMALL_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 3,
}


class Outcome(NamedTuple):
    """What one call of the command line left."""

    code: int
    out: str
    err: str


def run_cli(*arguments: str | Path, render: bool = False) -> Outcome:
    """Call the command line in this process; an exception that it lets through fails the test.

    `fit` composes its figures, but they are rendered only if asked for, as for `tiny_run`: that is a third of the time
    of a tiny training.
    """
    out, err = io.StringIO(), io.StringIO()
    fits = arguments[:1] == ("fit",)
    unrendered = (
        patch("moevision.train.plots.save", _leave_empty) if fits and not render else nullcontext()
    )
    with redirect_stdout(out), redirect_stderr(err), unrendered:
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def free_port() -> int:
    """A port on which nothing listens yet."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def load_script(path: Path) -> ModuleType:
    """A script outside of the package as a module."""
    spec = spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def small_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> "nn.Module":
    """A timm ViT of the size of `SMALL_VIT`, always of the same weights."""
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL_VIT, **options})


def noise_images(count: int = 2, side: int = 32, seed: int = 0) -> "Tensor":
    """[count, 3, side, side] of normal noise."""
    import torch

    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def missing(text: str, *fragments: str) -> list[str]:
    """The fragments that a text doesn't have: names, values, the way on. Its other words may change."""
    return [fragment for fragment in fragments if fragment not in text]


def says(text: str, *fragments: str) -> bool:
    """Whether a sentence names all of these; the failure shows the sentence and what it lacks."""
    lacks = missing(text, *fragments)
    assert not lacks, f"{text!r} doesn't name {lacks}"
    return True


def succeeded(outcome: Outcome) -> Outcome:
    """The outcome of a call that must have done what it was asked for."""
    assert outcome.code == 0, outcome.err
    return outcome


def refused(outcome: Outcome, *fragments: str) -> Outcome:
    """The outcome of a call that ended by one sentence, its last line, which names these."""
    assert outcome.code == 2, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    sentence = outcome.err.splitlines()[-1]
    assert sentence.startswith("moevision: ")
    assert_names(sentence, *fragments)
    return outcome


def assert_names(text: str, *fragments: str) -> None:
    """A text names these, wherever its lines break."""
    assert missing(" ".join(text.split()), *fragments) == [], text


def _leave_empty(figure: object, out: Path) -> None:
    out.touch()


def draw_folder(
    root: Path, classes: Sequence[str] = ("cat", "dog"), per_class: int = 20, size: int = 32
) -> Path:
    """Write drawn pets to `root/<class>/<number>.png`."""
    from PIL import Image

    from moevision.data import SyntheticPets

    kinds = SyntheticPets.classes
    pets = SyntheticPets(per_class * len(kinds), size, 0, "train")
    for index in range(len(pets)):
        name = kinds[pets.label(index)]
        if name in classes:
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pets.image(index)).save(root / name / f"{index:04d}.png")
    return root


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    return run_cli


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options of the tiny training."""
    return TINY


@pytest.fixture(scope="session")
def draw() -> Callable[..., Path]:
    return draw_folder


@pytest.fixture(scope="session")
def drawn_pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 cats and 20 dogs; not to be changed."""
    return draw_folder(tmp_path_factory.mktemp("drawn") / "pets")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `fit pets --with-twin` on 40 images and a broken one; not to be changed."""
    home = tmp_path_factory.mktemp("fit")
    pets = draw_folder(home / "pets")
    (pets / "dog" / "broken.png").write_bytes(b"no picture")
    options = ("--with-twin", "--data.max_bad_fraction=0.2", f"--runs_root={home / 'runs'}")
    outcome = run_cli("fit", pets, *TINY, *options, render=True)
    assert outcome.code == 0, outcome.err
    (home / "output.txt").write_text(outcome.out + outcome.err)
    return home / "runs" / "pets"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, drawn_pets: Path) -> Path:
    """The run folder of a tiny training that nobody interrupted; not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    succeeded(run_cli("fit", drawn_pets, *TINY, f"--runs_root={root}"))
    return root / "pets"


@pytest.fixture(scope="session")
def distant_model(
    tiny_run: Path, drawn_pets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny run's model with distances, whose threshold every other drawn pet sets; not to be changed."""
    import numpy as np
    import torch

    from moevision.analysis.collect import network_input
    from moevision.analysis.images import open_pictures, read_images
    from moevision.models.io import load_model, save_model
    from moevision.models.ood import fit_ood, pooled

    folder, model = tmp_path_factory.mktemp("distant") / "model", load_model(str(tiny_run))
    pets = open_pictures(drawn_pets, model.image_size, split="all", class_names=model.class_names)
    with torch.inference_mode():
        features = (
            pooled(model.net, network_input(model, read_images(pets, range(40)))).double().numpy()
        )
    labels = np.array([pets.label(row) for row in range(40)])
    save_model(
        replace(model, strangers=fit_ood(features[::2], labels[::2], features[1::2])), folder
    )
    return folder


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved_model(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run's exported model, to be damaged."""
    return Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Let this process, which trains, get a signal after a step; afterwards no more."""
    from moevision.train.health import Stopwatch

    real = Stopwatch.on_train_batch_end

    def once(self: Stopwatch, trainer: Any, *rest: Any) -> None:
        real(self, trainer, *rest)
        if trainer.global_step == step:
            monkeypatch.setattr(Stopwatch, "on_train_batch_end", real)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Stopwatch, "on_train_batch_end", once)


@pytest.fixture
def send_signal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`signal_after` for one test."""
    return partial(signal_after, monkeypatch)


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let trainings of this process be struck by faults, as `tests.train.faults` reads them."""

    def by(faults: str) -> None:
        from tests.train.struck import strike

        strike(faults, monkeypatch.setattr)

    return by


@pytest.fixture(autouse=True)
def _environment_of_its_own() -> Generator[None, None, None]:
    """Put the environment back: Lightning leaves LOCAL_RANK there, and what is launched then joins no launcher."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
