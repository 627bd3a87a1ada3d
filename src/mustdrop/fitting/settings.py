"""The knobs of a fit, checked before any work."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from mustdrop.errors import ConfigError
from mustdrop.pruners.base import Settings


class FitSettings(Settings):
    """How a scorer is trained.

    Attributes:
        steps: of the optimizer at most; training ends earlier where the held-out part gets no better.
        batch: prompts that a step sees, one after the other.
        budgets: smallest and largest share of the vision tokens; each prompt of a step draws one between them, small
            ones as often as large ones (the logarithm is drawn evenly).
        held_budgets: shares at which the held-out part is looked at, with hard gates, as in use.
        coverages: exponents of the score beside coverage that are tried at the end, on the held-out part, for the
            method `learned` to use; 0 ranks by the score alone.
        question: whether the scorer reads the question. It is then for one question about a picture: what a later turn
            of a chat asks about may be gone, and a server that sees pictures without questions cannot use it.
        held_out: share of the prompts that is held out, in (0, 0.5].
        most_held_out: prompts of it at most.
        every: steps between two looks at the held-out part.
        patience: looks without a better result after which training ends.
        better: how much less divergence counts as better, as a share.
        rate: of learning, at its highest.
        temperature: of the gates at the first and at the last step: the lower, the more they are like the hard ones of
            use.
        slope: temperature of the gates that gradients are taken of.
        noise: added to scores in training, so that other choices are tried; 1 is that of the logistic distribution.
        max_new_tokens: tokens after which an answer is cut off.
        rank: width of the scorer; None: 128, or what the model's width leaves of some half a million weights.
        seed: of the weights, the order, the budgets and the noise.
    """

    steps: int = Field(400, ge=1)
    batch: int = Field(8, ge=1)
    budgets: tuple[float, float] = (0.04, 0.5)
    held_budgets: tuple[float, ...] = Field((0.25, 0.11, 0.055), min_length=1)
    coverages: tuple[float, ...] = Field((0.0, 0.5, 1.0), min_length=1)
    question: bool = False
    held_out: float = Field(0.1, gt=0, le=0.5)
    most_held_out: int = Field(48, ge=1)
    every: int = Field(25, ge=1)
    patience: int = Field(6, ge=1)
    better: float = Field(0.002, ge=0, lt=1)
    rate: float = Field(2e-3, gt=0)
    temperature: tuple[float, float] = (1.0, 0.3)
    slope: float = Field(1.0, gt=0)
    noise: float = Field(1.0, ge=0)
    max_new_tokens: int = Field(32, ge=1)
    rank: int | None = Field(None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _ranges(self) -> FitSettings:
        low, high = self.budgets
        if not 0 < low <= high < 1:
            raise ConfigError(f"FitSettings.budgets: expected 0 < smallest <= largest < 1, got {self.budgets}.")
        if not all(0 < keep < 1 for keep in self.held_budgets):
            raise ConfigError(f"FitSettings.held_budgets: expected shares between 0 and 1, got {self.held_budgets}.")
        if not all(power >= 0 for power in self.coverages):
            raise ConfigError(f"FitSettings.coverages: expected numbers from 0 up, got {self.coverages}.")
        if not all(value > 0 for value in self.temperature):
            raise ConfigError(f"FitSettings.temperature: expected two numbers above 0, got {self.temperature}.")
        return self

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self.model_dump(mode="json")
