"""A method at a budget that `tune` tries, with what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mustdrop.method import Method
from mustdrop.registry import MethodLike, resolve


@dataclass(eq=False)
class Candidate:
    """A method with its knobs, and what was measured on the prompts that it has seen so far.

    Attributes:
        method: its name.
        knobs: its settings, `keep` among them.
        prompts: on how many prompts.
        agreement: share of the unpruned answer's tokens that it chooses too.
        kl: mean divergence from the unpruned distribution, in nats.
        equal_share: equal tokens, as a share of the vision tokens.
        flops: share of the unpruned FLOPs for the prompt.
        kv: share of the unpruned bytes of keys and values at the end.
        time: share of the unpruned time for a prompt; None if it was not measured.
        refused: why it cannot be used on this model or these prompts; empty if it can.
        given: what is meant by the name: a recipe class, an address, or a `Method`; None is the name itself.
    """

    method: str
    knobs: dict[str, Any]
    prompts: int = 0
    agreement: float = 0.0
    kl: float = 0.0
    equal_share: float = 0.0
    flops: float = 0.0
    kv: float = 0.0
    time: float | None = None
    refused: str = ""
    given: MethodLike | None = None

    @property
    def meant(self) -> MethodLike:
        """What `resolve` takes."""
        return self.method if self.given is None else self.given

    def build(self) -> Method:
        """The method with its knobs.

        Raises:
            UnknownKnobError, BudgetError, ConfigError: knobs that it does not take.
        """
        return resolve(self.meant, **self.knobs)

    def add(self, **numbers: Any) -> None:
        """Take one more batch of prompts into the means.

        Args:
            **numbers: tensors with an entry per prompt, or single numbers for the batch; `kl` is a tensor.
        """
        new = len(numbers["kl"])
        for name, values in numbers.items():
            mean = float(values.double().mean()) if hasattr(values, "mean") else float(values)
            before = getattr(self, name)
            setattr(self, name, (before * self.prompts + mean * new) / (self.prompts + new))
        self.prompts += new
