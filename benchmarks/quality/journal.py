"""One line per finished piece of work, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError

KEY = ("method", "keep", "batch")


class Journal:
    """A file whose first line says what is measured, and whose others are results.

    A kill can leave half a line behind: it is dropped, and that piece is measured again.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.lines = path, []
        head = json.loads(json.dumps(head))
        whole = self._whole_lines()
        if whole and whole[0] != head:
            raise ConfigError(
                f"{path} was begun with {whole[0]}, and this run is {head}. Finish that run, or delete the file or "
                "give another --journal to start anew."
            )
        self.lines = whole[1:]
        self._done = {self._key(line) for line in self.lines}
        if len(self._done) != len(self.lines):
            raise ConfigError(f"{path} has results twice: two runs wrote it at once. Delete it and start anew.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not whole:
            self._write(head)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._done

    def add(self, line: dict[str, Any]) -> None:
        """Write a result; it is on disk when this returns."""
        self._write(line)
        self.lines.append(json.loads(json.dumps(line)))
        self._done.add(self._key(line))

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in KEY)
