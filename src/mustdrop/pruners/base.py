"""Frozen settings with errors in mustdrop's own terms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
        try:
            super().__init__(**{name: plain(value) for name, value in data.items()})
        except ValidationError as error:
            raise translated(type(self).__name__, error) from error


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
