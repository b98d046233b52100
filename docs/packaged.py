"""The README that a package carries and PyPI shows: hatchling calls this, as pyproject.toml says.

README.md's links are relative, for a forge and for a fork of it. In a package they become absolute once
`[project.urls]` has the repository's address (docs/address.py); until then the text stays as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

sys.path.insert(0, str(Path(__file__).parent))  # hatchling loads this file by its path
from address import address, packaged


class Readme(MetadataHookInterface):
    """`readme`, which is dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put it among the package's metadata."""
        root = Path(self.root)
        text = packaged((root / "README.md").read_text(encoding="utf-8"), address(root))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
