"""What a configuration may name and how large it may be: a YAML file from elsewhere is data, not a program.

jsonargparse, which reads the configurations, imports whatever a `class_path` or a function-valued option names, and
importing a module runs it. Here it may import only Lightning's own parts and those of `moevision.train`; what is denied
is refused before its import. Nor may a configuration be fetched from an address, or use YAML's anchors, whose few
lines can stand for billions of values. Own classes are no less welcome in Python: `Trainer(callbacks=[Mine()])`.
"""

from __future__ import annotations

from functools import partial

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader, set_loader, set_parsing_settings

from moevision.models.safe_files import parse_yaml

# A class is imported by the name that is written and checked again by the module that it is defined in, hence fabric.
ALLOWED = (
    "moevision.train",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
    "lightning.fabric.loggers",
)
_load_plain_yaml = partial(parse_yaml, load=get_loader("yaml"))


def restrict_configurations() -> None:
    """Let this process's configurations name nothing but `ALLOWED`, and hold nothing but plain values.

    It holds for all of jsonargparse in this process, so that only the command line calls it.
    """
    set_parsing_settings(
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,  # Lightning's command line turns it on
        import_path_denylist=["*"],
        import_path_allowlist=list(ALLOWED),
    )
    set_loader("yaml", _load_plain_yaml, exceptions=(yaml.YAMLError, RecursionError))
