"""A method is a recipe that fills the four sockets. `mustdrop.registry` knows recipes by their names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import mustdrop.methods  # noqa: F401  (loaded before the package binds this name to the function `methods`)
from mustdrop.budget import Keep
from mustdrop.errors import ConfigError
from mustdrop.pruners import DecodeCachePruner, InputPruner, PictureRule, PrefillPruner, VisionStagePruner
from mustdrop.pruners.base import Settings

DEFAULT_METHOD = "mustdrop"
DEFAULT_KEEP: Keep = 1 / 3
Positions = Literal["kept", "renumbered"]


@dataclass(frozen=True)
class Method:
    """Four sockets and a name.

    Attributes:
        vision: what happens in the vision encoder, or None.
        prefill: what happens between decoder layers, or None.
        decode: what happens to the KV cache, or None.
        name: the registered name, or "custom".
        strict: whether a picture that is too small for a budget or for a window is an error. If not, budgets beyond a
            picture keep what there is, at least one token, and a picture smaller than a window is not merged.
        input: what happens before the vision encoder, or None.
        positions: "kept": tokens keep the positions that they had, and what is dropped leaves gaps. "renumbered": what
            is left counts 0, 1, 2, ... anew, also where positions have several axes (M-RoPE).
    """

    vision: VisionStagePruner | None = None
    prefill: PrefillPruner | None = None
    decode: DecodeCachePruner | None = None
    name: str = "custom"
    strict: bool = False
    input: InputPruner | None = None
    positions: Positions = "kept"

    def __post_init__(self) -> None:
        for socket, kind in (
            ("input", InputPruner),
            ("vision", VisionStagePruner),
            ("prefill", PrefillPruner),
            ("decode", DecodeCachePruner),
        ):
            value = getattr(self, socket)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(
                    f"{socket}= takes a {kind.__name__}, got {type(value).__name__}: write "
                    f"{socket}={kind.__name__}(...)."
                )
        rule = None if self.vision is None else self.vision.rule
        if self.input is not None and isinstance(rule, PictureRule):
            raise ConfigError(
                f"input= cannot be combined with {type(rule).__name__}, which resizes pictures: the cells that the "
                "input stage chooses are those of the whole picture. Use one of the two."
            )
        if self.positions not in get_args(Positions):
            raise ConfigError(f'positions must be "kept" or "renumbered", got {self.positions!r}.')
        if self.positions == "renumbered" and self.decode is not None:
            raise ConfigError(
                'positions="renumbered" cannot be combined with a decode stage: keys stay where they were written when '
                "others leave the cache. Leave the decode stage out, or keep the positions."
            )
        if self.vision is not None and self.vision.taper is not None and getattr(self.prefill, "keep", None) is None:
            raise ConfigError(
                f"VisionStagePruner.taper={self.vision.taper} splits a budget between vision and prefill stage, and "
                "there is none: add prefill=PrefillPruner(keep=...), or leave taper out."
            )
        kinds = {p.compat for p in (self.vision, self.prefill) if p is not None}
        if len(kinds) > 1:
            raise ConfigError(
                'vision and prefill pruners disagree on compat ("paper" and "released"): use the same for both.'
            )

    @property
    def drops(self) -> bool:
        """Whether any socket is filled."""
        return self.marks or self.prefill is not None or self.decode is not None

    @property
    def marks(self) -> bool:
        """Whether features may be marked as dropped before they enter the language model."""
        return self.input is not None or self.vision is not None

    @property
    def waits(self) -> bool:
        """Whether what it drops may come only with a later turn of a chat."""
        return self.decode is not None and self.decode.old_pictures is not None

    @property
    def account(self) -> Literal["equal_tokens", "equal_entries"]:
        """What the budget counts, as the `Trace` names it.

        Methods that only prune the cache count the vision entries that are left in it; all others count the vision
        tokens that the decoder layers process.
        """
        cache_only = not self.marks and self.prefill is None and self.decode is not None
        return "equal_entries" if cache_only else "equal_tokens"

    @property
    def why_nothing(self) -> str:
        """Why a call may have dropped nothing, and what to do."""
        prefill, decode = self.prefill, self.decode
        if self.account == "equal_entries" and decode is not None and decode.reads_steps:
            return (
                f"entries leave every {decode.interval} decode steps (interval) down to keep={decode.keep}, and there "
                "was no such step, or nothing to leave."
            )
        if self.account == "equal_entries" and decode is not None and decode.after_prefill:
            return f"keep={decode.keep} asks for all of them, or the call had no cache (use_cache=False)."
        if self.vision is None and prefill is None and self.input is not None:
            return (
                "its input stage drops what is predictable in documents, slides, screenshots and still scenes, and "
                "found nothing of that kind: add a vision or prefill stage for photographs, or allow a tolerance."
            )
        if prefill is None:
            return "it has no prefill stage and its vision stage found nothing to drop."
        if prefill.keep is not None:
            return f"keep={prefill.keep} asks for all of them."
        return "its thresholds drop nothing here; raise global_threshold and individual_threshold, or set keep."

    @property
    def renumber(self) -> bool:
        """Whether positions are renumbered after every drop: as asked for, or as the authors' released code does."""
        return self.positions == "renumbered" or self.reorder

    @property
    def renumbered_by(self) -> str:
        """The setting that renumbers, for messages."""
        return 'compat="released"' if self.reorder else 'positions="renumbered"'

    @property
    def reorder(self) -> bool:
        """Whether tokens may come in another order than the prompt's, as in the authors' released code."""
        return any(p is not None and p.compat == "released" for p in (self.vision, self.prefill))


class Recipe(Settings):
    """Base of all recipes: the knobs are fields with their defaults, `build` fills the sockets.

    A class or an object of it is taken wherever a method is named. See docs/add-a-method.md.

    Attributes:
        called: the method's name; None: the name of its file in `mustdrop.methods`, or what it is registered as.
        trained: whether something in it was trained to drop: comparisons keep it apart from methods that are not.
        strict: see `Method.strict`; a knob of every method.
        positions: see `Method.positions`; a knob of every method.
    """

    called: ClassVar[str | None] = None
    trained: ClassVar[bool] = False
    strict: bool = False
    positions: Positions = "kept"

    def build(self) -> Method:
        """The method with these knobs."""
        raise NotImplementedError

    @classmethod
    def unmerged(cls) -> dict[str, Any]:
        """Knobs under which no hidden states are merged between decoder layers; nothing to set for most methods.

        Such a merge changes what a token holds, and no mask can imitate it: tests that compare dropping with masking
        set these.
        """
        return {}

    @classmethod
    def unbiased(cls) -> dict[str, Any]:
        """Knobs under which attention needs no bias, as flash attention has none; nothing to set for most methods."""
        return {}


def __getattr__(name: str) -> Any:
    """What moved to `mustdrop.registry`, which needs this module, can still be had from here."""
    if name in ("find", "methods", "registry"):
        return getattr(importlib.import_module("mustdrop.registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
