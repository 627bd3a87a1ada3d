"""What was answered so far: append-only files of whole lines, so that a run can be killed at any moment and go on.

Every process writes to a file of its own and reads those of all others. A line that was not written to its end is cut
off, and its question is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError, DataFileError

Line = dict[str, Any]
_WAIT, _PATIENCE = 0.2, 3600.0  # seconds between two looks at the other processes' files; without news


def digest(value: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """The files of one run in one folder.

    Args:
        folder: the run's folder.
        rank: which process this is.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.path = folder / f"journal-{rank:04}.jsonl"
        self._file: int | None = None
        self._locked: int | None = None

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Start or resume the run in this folder.

        Args:
            settings: everything that decides an answer.

        Raises:
            ConfigError: the folder holds a run with other settings; the message names them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.json"
        draft = path.with_name(f".run.{os.getpid()}")
        draft.write_text(json.dumps(dict(settings), indent=1, default=str) + "\n", encoding="utf-8")
        try:
            os.link(draft, path)  # the first process wins, and the file is never seen half written
        except FileExistsError:
            self._compare(path, settings)
        except OSError:  # no hard links here
            if path.exists():
                self._compare(path, settings)
            else:
                draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def _compare(self, path: Path, settings: Mapping[str, Any]) -> None:
        there, here = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(dict(settings), default=str))
        changed = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
        if changed:
            lines = "\n".join(f"  {key}: {there.get(key)!r} there, {here.get(key)!r} now" for key in changed)
            raise ConfigError(
                f"{self.folder} holds a run with other settings:\n{lines}\n"
                "Choose another folder with --out, or delete that one to start anew."
            )

    def open(self) -> None:
        """Open this process' file for writing; a torn last line is cut off.

        Raises:
            ConfigError: another process writes to it.
        """
        self._locked = _lock(self.path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        content = self.path.read_bytes()
        os.ftruncate(self._file, content.rfind(b"\n") + 1)
        os.lseek(self._file, 0, os.SEEK_END)

    def write(self, lines: Iterable[Line]) -> None:
        """Append whole lines; they are on the disk when this returns."""
        if self._file is None:
            self.open()
        assert self._file is not None
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        while content:
            content = content[os.write(self._file, content) :]
        os.fsync(self._file)

    def close(self) -> None:
        """Close this process' file."""
        for file in (self._file, self._locked):
            if file is not None:
                os.close(file)
        self._file = self._locked = None

    def lines(self) -> list[Line]:
        """All whole lines of all processes.

        Raises:
            DataFileError: a line inside a file is not what was written.
        """
        found = []
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            content = path.read_bytes()
            for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
                try:
                    found.append(json.loads(line))
                except ValueError:
                    raise DataFileError(
                        f"{path} line {number} is broken: delete that line and run again; the question is asked again."
                    ) from None
        return found

    def answers(self, retry: bool = False) -> dict[int, Line]:
        """Place of an item -> its line; without the failed ones where these are to be asked again."""
        found: dict[int, Line] = {}
        for line in self.lines():
            if "item" in line and (line["item"] not in found or "failed" in found[line["item"]]):
                found[line["item"]] = line
        return {item: line for item, line in found.items() if not (retry and "failed" in line)}

    def starts(self) -> list[Line]:
        """The lines that the processes wrote when they started."""
        return [line for line in self.lines() if "start" in line]

    def method_time(self) -> Line | None:
        """What the method took, as it was measured last; None if it never was."""
        found = [line["method_time"] for line in self.lines() if "method_time" in line]
        return found[-1] if found else None

    def wait(self, number: int) -> dict[int, Line]:
        """All `number` answers, once all processes have written theirs.

        Raises:
            ConfigError: nothing new came for an hour.
        """
        seen, since = -1, time.monotonic()
        while True:
            found = self.answers()
            if len(found) >= number:
                return found
            if len(found) > seen:
                seen, since = len(found), time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                raise ConfigError(
                    f"{number - len(found)} answers of other processes are missing, and none came for an hour. Start "
                    "the same command again: it goes on where this one stopped."
                )
            time.sleep(_WAIT)


def _lock(path: Path) -> int | None:
    """Keep other processes from writing to `path`, until this process ends in whatever way.

    The lock is on a file beside it and is this process' alone: loading processes that outlive a kill for some seconds
    do not hold it.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        return None
    file = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise ConfigError(f"another process is writing to {path}: wait for it, or choose another --out.") from None
    return file
