"""Whether a module is what it was when something of it was recorded: its parts, weights, hooks, mode and config."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))
_STEADY = ("torch", "transformers")  # their modules hold no switches
_TABLES = ("_modules", "_forward_hooks", "_forward_pre_hooks")


class Watch:
    """A module as it was.

    Weights may have other values: a recording reads them where they lie. It must not outlive their storage. Modules of
    others, as peft's, have switches beside: which adapter is used, and with what weight.

    Attributes:
        away: whether weights are not where they are used, but come there while the module runs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tables: list[tuple[dict[Any, Any], tuple[Any, ...]]] = []
        self.weights: list[tuple[dict[str, Any], str, int]] = []
        self.switches: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.modes: list[tuple[dict[str, Any], bool, object]] = []
        for part in module.modules():
            own = vars(part)
            self.modes.append((own, part.training, own.get("forward")))
            self.tables += [(own[name], tuple(own[name].values())) for name in _TABLES]
            if type(part).__module__.partition(".")[0] not in _STEADY:
                self.switches.append((own, _switches(own)))
            for held in (own["_parameters"], own["_buffers"]):
                self.weights += [(held, name, _address(value)) for name, value in held.items()]
        self.away = any(x.device.type == "meta" for x in module.parameters())
        self.config = getattr(module, "config", None)
        self.settings = copy.deepcopy(vars(self.config)) if self.config is not None else {}

    def unchanged(self) -> bool:
        """Whether it still is."""
        return (
            all(_address(held.get(name)) == address for held, name, address in self.weights)
            and all(own["training"] is mode and own.get("forward") is forward for own, mode, forward in self.modes)
            and all(tuple(table.values()) == known for table, known in self.tables)
            and all(_switches(own) == known for own, known in self.switches)
            and (self.config is None or vars(self.config) == self.settings)
        )


def _switches(own: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module that are numbers or words, or lists, tuples or dicts of such."""
    return {name: copy.copy(value) for name, value in own.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    return isinstance(value, _PLAIN) or (
        type(value) in (list, tuple, set) and all(isinstance(x, _PLAIN) for x in value)
    )


def _address(value: Any) -> int:
    return 0 if value is None else int(value.data_ptr())
