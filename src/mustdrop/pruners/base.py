"""Frozen settings with errors in mustdrop's own terms."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo

from mustdrop.budget import Keep, check_keep, plain
from mustdrop.errors import ConfigError, MustDropError, UnknownKnobError, did_you_mean


def _budget(value: Any, info: ValidationInfo) -> Keep:
    return check_keep(value, info.field_name or "keep")


# Checked before pydantic converts anything: True is not 1 token, and "64" is not 64.
Budget = Annotated[Keep, BeforeValidator(_budget)]
Compat = Literal["paper", "released"]


class Settings(BaseModel):
    """A frozen pydantic object that raises mustdrop's errors: unknown names, wrong types, values out of range.

    Scalars of numpy and torch are taken as the numbers that they hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    def __init__(self, *unnamed: Any, **data: Any) -> None:
        known = type(self).model_fields
        if unnamed:
            first = next(iter(["keep"] if "keep" in known else known), "setting")
            name = type(self).__name__
            raise ConfigError(f"{name} takes its settings by name: write {name}({first}={unnamed[0]!r}).")
        for name in data:
            if name not in known:
                raise UnknownKnobError(f"{type(self).__name__} has no setting {name!r}. {did_you_mean(name, known)}")
        data = {name: plain(value) for name, value in data.items()}
        for name in _numbers(type(self)) & data.keys():
            if _has_bool(data[name]):
                raise ConfigError(
                    f"{type(self).__name__}.{name}: expected a number, got {data[name]!r}. Write the number itself, or "
                    "leave it out for the default."
                )
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise translated(type(self).__name__, error) from error


@functools.cache
def _numbers(kind: type[Settings]) -> frozenset[str]:
    """Settings that are numbers, or hold some: pydantic would take True for 1."""
    fields = kind.model_fields.items()
    return frozenset(name for name, field in fields if not _checks(field.metadata) and _is_number(field.annotation))


def _checks(metadata: Any) -> bool:
    """Whether a type looks at what comes by itself, as `Budget` does."""
    return any(isinstance(note, BeforeValidator) for note in metadata)


def _is_number(annotation: Any) -> bool:
    """Whether a type is, or holds, an int or a float, and nowhere a bool."""
    kinds = set(_kinds(annotation))
    return bool(kinds & {int, float}) and bool not in kinds


def _kinds(annotation: Any) -> list[Any]:
    """What a union, a tuple or an annotated type is made of."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal or (origin is Annotated and _checks(inner[1:])):
        return []
    if origin is Annotated:
        inner = inner[:1]
    return [kind for one in inner for kind in _kinds(one)] if inner else [annotation]


def _has_bool(value: Any) -> bool:
    return any(map(_has_bool, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def translated(owner: str, error: ValidationError) -> MustDropError:
    """The mustdrop error behind a pydantic `ValidationError`.

    What a validator raised, or expected / got in one line.
    """
    for item in error.errors():
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, MustDropError):
            return cause
    lines = [
        f"{owner}.{'.'.join(str(part) for part in item['loc'] if not isinstance(part, int)) or 'settings'}: "
        f"{item['msg']}, got {item['input']!r}"
        for item in error.errors()
    ]
    return ConfigError("; ".join(dict.fromkeys(lines)) + ".")
