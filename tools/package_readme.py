"""The first page as package indexes show it: a hook of hatchling (see pyproject.toml).

An index shows README.md away from the repository, where links between files lead nowhere and pictures do not show. So
they become addresses in the repository, at the tag of the version. Until pyproject.toml names a repository nothing is
published (tools/distribution.py), and the page stays as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

sys.path.append(str(Path(__file__).parent / "docs"))

import site_pages


class PackageReadme(MetadataHookInterface):
    """Sets the field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the page to the metadata, which have the version."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        shown = site_pages.elsewhere(text, site_pages.repository(), f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": shown}
