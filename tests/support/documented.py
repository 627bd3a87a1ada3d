"""Code of the documents that needs more than the default tests have."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def examples(page: str, *words: str, kind: str = "python") -> list[str]:
    """The blocks of Python, or of another kind, in a page that have all of these words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)
    return [block for block in blocks if all(word in block for word in words)]
