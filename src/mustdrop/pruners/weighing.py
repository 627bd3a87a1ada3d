"""The setting `importance=`, and the base of the rules that weigh an importance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import BeforeValidator
from torch import nn

from mustdrop.errors import ConfigError, did_you_mean
from mustdrop.pruners.importance import Attention, Distinct, Importance, OfField, Question, Space
from mustdrop.pruners.vision_rules import Read, VisionRule

Named = Literal["attention", "question", "distinct"]
_NAMED: dict[str, type[Importance]] = {"attention": Attention, "question": Question, "distinct": Distinct}


def _taken(value: Any) -> Any:
    """What an `importance=` may be; folders are looked into.

    Raises:
        ConfigError: something else, or a folder without a scorer.
    """
    if isinstance(value, Importance | nn.Module) or (isinstance(value, str) and value in _NAMED):
        return value
    if isinstance(value, str | Path):
        if not Path(value).is_dir() and Path(value).name == str(value):  # more likely a name than a path
            raise ConfigError(
                f"importance={str(value)!r} is neither a name nor a folder with a scorer. "
                f"{did_you_mean(str(value), _NAMED)}"
            )
        from mustdrop.pruners import scorer  # files of weights: loaded where somebody has one

        scorer.sizes(value)
        return str(value)
    got = f"the class {value.__name__}: make an object of it" if isinstance(value, type) else repr(value)
    raise ConfigError(
        f"importance= takes {', '.join(map(repr, get_args(Named)))}, an Importance, a torch.nn.Module or the folder of "
        f"a scorer; got {got}."
    )


#: A setting that says what is important: a name, a folder, a module or an `Importance`.
ImportanceKnob = Annotated[Any, BeforeValidator(_taken)]


def importance_of(given: Any, attention: Importance | None = None) -> Importance:
    """The object that an `importance=` stands for; an object is itself.

    Args:
        given: what `ImportanceKnob` lets through.
        attention: what the name "attention" stands for, where it is not `Attention()`.
    """
    if isinstance(given, Importance):
        return given
    if not isinstance(given, nn.Module) and given in _NAMED:
        return attention if given == "attention" and attention is not None else _NAMED[given]()
    from mustdrop.pruners.scored import Scored, loaded  # modules: loaded where somebody has one

    return Scored(module=given) if isinstance(given, nn.Module) else loaded(given)


class WeighingRule(VisionRule):
    """Base of the rules that weigh an importance.

    Attributes:
        importance: what makes a feature important.
        own_space: the rule's `space`, unless the importance asks for one.
    """

    own_space: ClassVar[Space] = "language"
    asks: ClassVar[bool] = cast(bool, OfField("importance", "asks", False))
    importance: Importance = Attention()

    @property
    def reads(self) -> tuple[Read, ...]:
        """What the importance reads, and what the rule does."""
        return tuple(dict.fromkeys((*self.importance.reads, *self.own_reads)))

    @property
    def own_reads(self) -> tuple[Read, ...]:
        """What the rule reads from the encoder, beside its importance."""
        return ()

    def bound(self, model: nn.Module) -> WeighingRule:
        """See `VisionRule.bound`."""
        found = self.importance.bound(model)
        return self if found is self.importance else self.model_copy(update={"importance": found})


class EncoderWeighingRule(WeighingRule):
    """Base of the rules that choose where features leave the encoder, if their importance can be had there."""

    own_space: ClassVar[Space] = "encoder"
    space: ClassVar[Space] = cast(Space, OfField("importance", "space", "encoder"))
