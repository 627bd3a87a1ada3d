"""Questions from a data set of `datasets`: a hub id, or a folder that it can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError, DataFileError
from mustdrop.extras import install


def load_rows(name: str, split: str | None) -> tuple[Any, str]:
    """The rows of one split with their pictures left encoded, for the loading processes to decode, and its name.

    Args:
        name: hub id, with `:config` after it where the data set has several; a folder written by `save_to_disk`; or a
            folder of files that `datasets` can read.
        split: name of the split; None takes "test", "validation" or the only one.

    Raises:
        DataFileError: `datasets` is not installed, or cannot load this.
        ConfigError: no such split.
    """
    try:
        import datasets
    except ImportError:
        raise DataFileError(f"--dataset needs the package datasets: {install('eval')}.") from None
    try:
        loaded = _load(datasets, name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataFileError(f"--dataset {name}: cannot be loaded ({type(error).__name__}: {error}).") from None
    rows, used = _split(loaded, name, split) if hasattr(loaded, "keys") else (loaded, str(loaded.split or ""))
    for column, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows, used


def _load(datasets: Any, name: str) -> Any:
    folder = Path(name)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return datasets.load_from_disk(name)
    path, _, config = name.partition(":") if not folder.exists() else (name, "", "")
    return datasets.load_dataset(path, config or None)


def _split(loaded: Any, name: str, split: str | None) -> tuple[Any, str]:
    known = list(loaded)
    wanted = [split] if split is not None else ["test", "validation", *(known if len(known) == 1 else [])]
    for one in wanted:
        if one in known:
            return loaded[one], one
    raise ConfigError(f"--dataset {name} has the splits {', '.join(known)}: say which with --split.")
