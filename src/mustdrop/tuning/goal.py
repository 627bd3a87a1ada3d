"""What is asked for: a floor under quality, a ceiling on time, or both."""

from __future__ import annotations

from dataclasses import dataclass

from mustdrop.errors import ConfigError
from mustdrop.tuning.candidate import Candidate


@dataclass(frozen=True)
class Goal:
    """At least one of three limits.

    Attributes:
        agreement: least share of the answers' tokens that the pruned model chooses too, in (0, 1].
        kl: largest mean divergence from the unpruned distribution, in nats.
        time: largest share of the unpruned model's time for a prompt, measured here.
    """

    agreement: float | None = None
    kl: float | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        if self.agreement is None and self.kl is None and self.time is None:
            raise ConfigError(
                "tune needs a goal: agreement=0.95 (share of answer tokens), kl=0.05 (nats) or time=0.5 (share of the "
                "unpruned model's time for a prompt)."
            )
        for name, value, high in (("agreement", self.agreement, 1.0), ("time", self.time, 1.0), ("kl", self.kl, None)):
            if value is not None and not (value > 0 and (high is None or value <= high)):
                interval = "positive" if high is None else "in (0, 1]"
                raise ConfigError(f"{name}={value}: expected a number that is {interval}.")

    @property
    def cheapest(self) -> bool:
        """Whether the cheapest candidate within the limits is wanted; else the most faithful one within `time`."""
        return self.agreement is not None or self.kl is not None

    def shortfall(self, candidate: Candidate) -> float:
        """By how much a candidate misses the limits, relative to each; 0 where it is within all of them."""
        missed = 0.0
        if self.agreement is not None:
            missed += max(0.0, self.agreement - candidate.agreement) / self.agreement
        if self.kl is not None:
            missed += max(0.0, candidate.kl - self.kl) / self.kl
        if self.time is not None and candidate.time is not None:
            missed += max(0.0, candidate.time - self.time) / self.time
        return missed

    def rank(self, candidate: Candidate) -> tuple[float, ...]:
        """Sorts the wanted candidate to the front."""
        cost = (candidate.flops, candidate.kv)
        quality = (candidate.kl, -candidate.agreement)
        return (self.shortfall(candidate), *(cost + quality if self.cheapest else quality + cost))

    def __str__(self) -> str:
        limits = (
            ("agreement >= ", self.agreement),
            ("KL <= ", self.kl),
            ("prompt time <= ", self.time),
        )
        return " and ".join(f"{text}{value:g}" for text, value in limits if value is not None)
