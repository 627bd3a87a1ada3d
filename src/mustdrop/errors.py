"""Every error and warning that mustdrop raises on purpose.

Each message says what was expected, what came, and what to do. All errors derive from `MustDropError`, and from the
built-in class that a caller who does not know mustdrop would catch (`ValueError`, `TypeError`, ...).
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class MustDropError(Exception):
    """Base class of all errors raised by mustdrop."""


class UnsupportedModelError(MustDropError, TypeError):
    """No adapter knows this model, or the model lacks what a stage needs."""


class UnknownMethodError(MustDropError, ValueError):
    """The method name is not registered."""


class UnknownKnobError(MustDropError, ValueError):
    """A method or pruner has no setting of this name."""


class BudgetError(MustDropError, ValueError):
    """A `keep` that is not positive, larger than what there is, or too small for the chosen layers."""


class ConfigError(MustDropError, ValueError):
    """A setting out of range, settings that contradict each other, or a layer that the model does not have."""


class UnsupportedOptionError(MustDropError, NotImplementedError):
    """A cache, attention backend or generation option that pruning does not support."""


class NotPatchedError(MustDropError, RuntimeError):
    """The call needs a patched model (or one that has already run)."""


class CacheStateError(MustDropError, RuntimeError):
    """A pruned cache was used in a way that would give wrong numbers."""


class PatchedModelError(MustDropError, TypeError):
    """Something that a model can only do while it is not patched."""


class MissingPackageError(MustDropError, ImportError):
    """A package of an extra that is not installed."""


class DataFileError(MustDropError, ValueError):
    """A file that an evaluation reads is missing, or is not what its guide says."""


class PictureError(ConfigError):
    """A picture that is missing, broken, or of a kind that cannot be read."""


class BudgetWarning(UserWarning):
    """A picture is so small that one token of it is more than the budget; one token stays."""


class NothingDroppedWarning(UserWarning):
    """A patched model ran on an image and kept every vision token."""


class AmbiguousBudgetWarning(UserWarning):
    """A budget of 1, which is one token, where 1.0 would be all of them."""


class CaptureWarning(UserWarning):
    """A pass that `mustdrop.compile` cannot capture; it runs as it would without."""


class BrokenMethodWarning(UserWarning):
    """A file or an entry point with a method that cannot be loaded, and was left out."""


#: Packages whose frames lie between a user's line and what is wrong.
_BETWEEN = frozenset({"mustdrop", "torch", "transformers", "accelerate", "peft", "contextlib", "functools"})


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the caller's own code, however many frames of libraries lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that lists the known names and, if there is one, the nearest.

    Args:
        name: what the caller wrote.
        known: all valid names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Known: {', '.join(names) or 'none'}.{hint}"


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The `most` known names that are most like `name`, best first; those that are not like it are left out."""
    return difflib.get_close_matches(name, sorted(known), n=most, cutoff=0.5)
