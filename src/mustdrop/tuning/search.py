"""The search: successive halving over methods and budgets (Jamieson and Talwalkar, arXiv 1502.07943).

Every candidate sees a few prompts, the better half sees some more, and so on; the last ones see all of them. Should
none of these be within the goal, those left behind are taken up again, the best first, until one is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mustdrop
from mustdrop.budget import Keep
from mustdrop.errors import (
    AmbiguousBudgetWarning,
    BudgetError,
    ConfigError,
    NothingDroppedWarning,
    UnsupportedModelError,
    UnsupportedOptionError,
)
from mustdrop.fidelity import Reference, measure, reference
from mustdrop.method import Method, Recipe
from mustdrop.patching import warn_of_one
from mustdrop.registry import MethodLike, look_up, name_of, registry, resolve
from mustdrop.tuning.candidate import Candidate
from mustdrop.tuning.goal import Goal
from mustdrop.tuning.result import Tuning
from mustdrop.tuning.timing import prompt_share

KEEPS: tuple[Keep, ...] = (0.75, 1 / 2, 1 / 3, 2 / 9, 1 / 6, 1 / 9, 1 / 18)
FINALISTS = 4
REFUSALS = (BudgetError, ConfigError, UnsupportedModelError, UnsupportedOptionError)

Inputs = Mapping[str, Any]
OnStep = Callable[[int, int], None]


def tune(
    model: Any,
    samples: Sequence[Inputs],
    *,
    agreement: float | None = None,
    kl: float | None = None,
    time: float | None = None,
    methods: Sequence[MethodLike] | None = None,
    keeps: Sequence[Keep] = KEEPS,
    knobs: Mapping[str, Mapping[str, Any]] | None = None,
    max_new_tokens: int = 32,
    timed_pairs: int = 5,
    on_step: OnStep | None = None,
) -> Tuning:
    """Pick a method and a budget for a model and samples of what it will be asked.

    No right answers are needed: quality is fidelity to the unpruned model, see `mustdrop.fidelity`. With `agreement` or
    `kl` the cheapest candidate (FLOPs of the prompt, then KV bytes) within the limits is chosen; with `time` alone, the
    one with the lowest divergence among those that are fast enough on this machine.

    Args:
        model: of a family that mustdrop knows, patched or not; it is left as it came.
        samples: what the processor returned for each prompt, or for batches of them padded on the left.
        agreement: least share of the answers' tokens that the pruned model chooses too.
        kl: largest mean divergence from the unpruned distribution, in nats.
        time: largest share of the unpruned model's time for a prompt: encoder, pruning and prefill.
        methods: what to try, by name or as `Recipe` classes (each at every budget), as `Recipe` objects (the same, with
            their other settings; at their own budget alone if they were given one) or as `Method` objects (as they
            are); default all names that have a budget.
        keeps: budgets to try.
        knobs: name of a method -> further settings for it.
        max_new_tokens: tokens after which an answer is cut off.
        timed_pairs: alternating pairs of runs behind each time; only with `time`.
        on_step: called with (done, total) while the search goes on; the total may shrink.

    Returns:
        All candidates with their numbers, and the chosen one.

    Raises:
        ConfigError: no goal, no samples, or samples that are not what a processor returns.
        UnknownMethodError, UnknownKnobError, BudgetError: candidates that do not exist.
        UnsupportedModelError: no adapter for the model.
    """
    goal = Goal(agreement, kl, time)
    _check(model, samples)
    candidates = _candidates(methods, keeps, knobs or {})
    warn_of_one(*(candidate.build() for candidate in candidates))
    search = _Search(model, samples, goal, candidates, timed_pairs, on_step)
    search.references = [reference(model, sample, max_new_tokens) for sample in samples]
    return search.run()


class _Search:
    def __init__(
        self,
        model: Any,
        samples: Sequence[Inputs],
        goal: Goal,
        candidates: list[Candidate],
        timed_pairs: int,
        on_step: OnStep | None,
    ) -> None:
        self.model, self.samples, self.goal = model, samples, goal
        self.candidates, self.timed_pairs, self.on_step = candidates, timed_pairs, on_step
        self.references: list[Reference] = []
        self.seen = dict.fromkeys(candidates, 0)  # samples that each has been measured on
        self.done, self.total = 0, 0

    def run(self) -> Tuning:
        """Halve until all samples have been seen, then choose."""
        alive, before, sizes = list(self.candidates), 0, rungs(len(self.samples))
        while sizes:
            self.total = self.done + self._ahead(len(alive), before, sizes)
            size = sizes.pop(0)
            for candidate in alive:
                self._see(candidate, size)
            alive = self._ranked(alive)
            before = size
            if sizes:
                alive = alive[: self._half(len(alive))]
        chosen = self._within(alive) or self._second_chance()
        whole = [c for c in self._ranked(self.candidates) if self.seen[c] == len(self.samples)]
        partly = [c for c in self._ranked(self.candidates) if c not in whole]
        refused = [c for c in self.candidates if c.refused]
        prompts = sum(len(r.tokens) for r in self.references)
        return Tuning(self.goal, whole + partly + refused, chosen, prompts, type(self.model).__name__)

    def _second_chance(self) -> Candidate | None:
        """Those left behind, one by one: few prompts may have misled."""
        for candidate in self._ranked(self.candidates):
            left = len(self.samples) - self.seen[candidate]
            if left:
                self.total = self.done + left
                self._see(candidate, len(self.samples))
                if self._within([candidate]):
                    return candidate
        return None

    def _within(self, among: Sequence[Candidate]) -> Candidate | None:
        return next((c for c in among if not c.refused and not self.goal.shortfall(c)), None)

    def _ranked(self, among: Sequence[Candidate]) -> list[Candidate]:
        return sorted((c for c in among if not c.refused), key=self.goal.rank)

    def _ahead(self, alive: int, before: int, sizes: Sequence[int]) -> int:
        """Runs that are left if nothing is refused: `alive` candidates have seen `before` samples."""
        total = 0
        for size in sizes:
            total += alive * (size - before)
            alive, before = self._half(alive), size
        return total

    @staticmethod
    def _half(alive: int) -> int:
        return min(alive, max(FINALISTS, math.ceil(alive / 2)))

    def _see(self, candidate: Candidate, size: int) -> None:
        """Measure a candidate on the samples up to `size` that it has not seen."""
        for place in range(self.seen[candidate], size):
            if not candidate.refused:
                self._measure(candidate, place)
            self.done += 1
            if self.on_step is not None:
                self.on_step(self.done, max(self.done, self.total))
        self.seen[candidate] = max(size, self.seen[candidate])

    def _measure(self, candidate: Candidate, place: int) -> None:
        method = candidate.build()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NothingDroppedWarning)  # the table says how much was kept
                warnings.simplefilter("ignore", AmbiguousBudgetWarning)  # that was said
                with mustdrop.patched(self.model, method):
                    close = measure(self.model, self.samples[place], self.references[place])
                    trace = mustdrop.trace(self.model)
                if self.goal.time is not None and candidate.time is None:
                    candidate.time = prompt_share(self.model, self.samples[place], method, self.timed_pairs)
        except REFUSALS as refusal:
            candidate.refused = f"{type(refusal).__name__}: {refusal}"
            return
        share = trace.equal_tokens / trace.total.clamp(min=1)
        share = share.masked_fill(trace.total == 0, 1.0)  # a prompt without media has nothing to drop
        numbers = {"kl": close.kl, "agreement": close.agreement, "equal_share": share}
        candidate.add(**numbers, flops=trace.flops.ratio, kv=trace.kv_bytes.ratio)


def rungs(samples: int) -> list[int]:
    """How many samples the candidates have seen after each round: an eighth, a quarter, half, all.

    Args:
        samples: how many there are.
    """
    return sorted({max(1, math.ceil(samples / share)) for share in (8, 4, 2, 1)})


def _candidates(
    methods: Sequence[MethodLike] | None, keeps: Sequence[Keep], knobs: Mapping[str, Mapping[str, Any]]
) -> list[Candidate]:
    if isinstance(methods, str | Method | Recipe | type):
        methods = [methods]
    if methods is None:
        methods = [name for name, recipe in registry().items() if "keep" in recipe.model_fields]
    named = _named(methods)
    for name in set(knobs) - set(named):
        resolve(name)  # a name that does not exist is told at once
    unused = [name for name in knobs if name not in named]
    if unused or not methods or not keeps:
        raise ConfigError(
            f"knobs are given for {unused}, which are not among methods={list(named)}."
            if unused
            else "tune needs at least one method and one budget: leave methods= and keeps= out to try all."
        )
    out = []
    for name, given in named.items():
        own = dict(knobs.get(name, {}))
        if isinstance(given, Recipe):  # its class, and what it was given
            own = {field: getattr(given, field) for field in given.model_fields_set} | own
            given = type(given)
        kind = look_up(given) if isinstance(given, str) else given
        budgeted = isinstance(kind, type) and "keep" in kind.model_fields and "keep" not in own
        out += [Candidate(name, {"keep": keep, **own}, given=given) for keep in (keeps if budgeted else ())]
        out += [] if budgeted else [Candidate(name, own, given=given)]
    for candidate in out:
        candidate.build()
    return out


def _named(methods: Sequence[MethodLike]) -> dict[str, MethodLike]:
    """What to try, each under a name of its own."""
    out: dict[str, MethodLike] = {}
    for given in methods:
        if isinstance(given, Recipe):
            name = name_of(type(given))
        elif isinstance(given, type) and issubclass(given, Recipe):
            name = name_of(given)
        else:
            name = given if isinstance(given, str) else resolve(given).name
        number = 1 + sum(other.partition(" #")[0] == name for other in out)
        out[name if number == 1 else f"{name} #{number}"] = given
    return out


def _check(model: Any, samples: Any) -> None:
    with mustdrop.patched(model, "none"):  # raises where no adapter knows the model
        pass
    several = isinstance(samples, Sequence)
    if not several or not samples or not all(isinstance(sample, Mapping) for sample in samples):
        got = f"{len(samples)} of them" if several else type(samples).__name__
        raise ConfigError(
            "samples is a list of what the processor returned for each prompt (mappings with input_ids, pixel_values "
            f"and so on), at least one; got {got}. Put a single one into a list."
        )
