"""Two lengths of help for the training verbs: what most people need, and every option there is."""

from __future__ import annotations

from argparse import SUPPRESS, Action
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.cli import LightningArgumentParser

ALL = "--help-all"
# What most people change; `--help-all` shows the rest.
SHORT = frozenset(
    [
        "help",
        "config",
        "print_config",
        "seed_everything",
        "name",
        "with_twin",
        "runs_root",
        "ckpt_path",
        "resume",
        "trainer.max_epochs",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.precision",
        "trainer.accumulate_grad_batches",
        "model.arch.name",
        "model.arch.pretrained",
        "model.arch.num_experts",
        "model.arch.top_k",
        "model.arch.router",
        "model.arch.moe_layers",
        "model.optim.lr",
        "model.optim.freeze",
        "model.compile",
        "data.path",
        "data.image_size",
        "data.batch_size",
        "data.num_workers",
        "data.augment",
        "data.crop",
        "data.mixup",
        "data.group_by",
    ]
)
_ABOUT = {
    "fit": "Train a model on a folder of images, a dataset or a config; everything that it leaves is in runs/NAME/.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images.",
}
# What the verb refuses, or what changes nothing for it.
_USELESS = {
    "fit": {"ckpt_path"},
    "validate": {"resume", "with_twin", "trainer.max_epochs", "trainer.accumulate_grad_batches"},
}
_USELESS["test"] = _USELESS["validate"]
_TRAIN = """\
  moevision fit --config quickstart
  moevision fit path/to/images --model.arch.router expert_choice
  moevision fit path/to/images --model.arch.num_experts 16 --model.arch.top_k 2 --with-twin
"""
_EVALUATE = """\
  moevision {verb} --config runs/pets/config.yaml --ckpt_path runs/pets/checkpoints/best.ckpt
"""
_BELOW = """\
examples
{examples}
exit codes: 0 done; 2 something that you can mend, the last line says what; {diverged}130 Ctrl-C,
129 terminal closed, 143 SIGTERM, 138 SIGUSR1{saved}.

{all} shows every option: other routers' knobs (capacity, noise, shared experts), balance losses, data, Trainer.
"""


@contextmanager
def only_short(parser: LightningArgumentParser) -> Iterator[None]:
    """Show of a training verb's options only those in `SHORT`."""
    verb = verb_of(parser)
    short = SHORT - _USELESS[verb]
    hidden: list[tuple[Action, str | None]] = [
        (action, action.help) for action in parser._actions if action.dest not in short
    ]
    groups = [group for group in parser._action_groups if not any(a.dest in short for a in group._group_actions)]
    about = [(group, group.description) for group in groups]
    usage, description = parser.usage, parser.description
    try:
        for action, _ in hidden:
            action.help = SUPPRESS
        for group in groups:
            group.description = None
        parser.usage = f"moevision {verb} [FOLDER] [--config NAME] [options]"
        parser.description = _ABOUT[verb]
        yield
    finally:
        for action, text in hidden:
            action.help = text
        for group, words in about:
            group.description = words
        parser.usage, parser.description = usage, description


def verb_of(parser: LightningArgumentParser) -> str:
    """`fit`, `validate` or `test`."""
    return parser.prog.split()[-1]


def examples(verb: str) -> str:
    """What stands below the short help."""
    trains = verb == "fit"
    return _BELOW.format(
        examples=(_TRAIN if trains else _EVALUATE).format(verb=verb),
        all=ALL,
        diverged="3 diverged, see divergence.md; " if trains else "",
        saved=": saved, the last line goes on with it" if trains else "",
    )
