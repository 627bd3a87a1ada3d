"""The training loop: a scorer learns from the unpruned answers which vision tokens they need.

What a step sees depends on the seed and its number alone, and everything else that decides a step is in the state, so
that a fit which was cut off goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.fitting import state as states
from mustdrop.fitting.draws import Draw
from mustdrop.fitting.gates import counts, hard_gates, soft_gates
from mustdrop.fitting.passes import Passes, Prompt, frozen
from mustdrop.fitting.settings import FitSettings
from mustdrop.fitting.state import State
from mustdrop.pruners.scorer import Scorer, save

#: One prompt: what the processor returned for it, or what returns that when it is called (and may fail).
Sample = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

_HOPELESS = 8  # so many samples may fail before the first one that works
_WARM = 10  # steps in which the rate comes up
_LONGEST = 200  # characters of a reason
_SAVE = 120.0  # seconds after which a fit is saved between two looks


@dataclass(frozen=True)
class Look:
    """Where a fit stands, for a display.

    Attributes:
        step: steps done.
        steps: of the fit at most.
        loss: mean divergence of the last step's prompts, in nats.
        held: divergence on the held-out part at the last look; None before the first one.
        best: the lowest of these.
        skipped: samples that were left out so far.
    """

    step: int
    steps: int
    loss: float | None
    held: float | None
    best: float | None
    skipped: int


@dataclass(frozen=True)
class Fitted:
    """What a fit gave.

    Attributes:
        scorer: the scorer of the best look at the held-out part.
        folder: where it lies: `importance=folder` in `patch`.
        step: of that look.
        held: divergence from the unpruned answers on the held-out part then, in nats, mean over the budgets.
        before: the same of the scorer before it was trained.
        ended: why training ended.
        skipped: name of a sample -> why it was left out.
        log: a line per look at the held-out part.
        covered: exponent of the score beside coverage -> divergence at each of the budgets; the scorer uses the best.
    """

    scorer: Scorer
    folder: Path
    step: int
    held: float
    before: float
    ended: str
    skipped: dict[str, str]
    log: list[dict[str, Any]]
    covered: dict[str, list[float]]


class Training:
    """One fit.

    Args:
        model: a Hugging Face vision-language model of a known family; it is not changed.
        samples: prompts.
        folder: of the fit.
        settings: see `FitSettings`.
        names: of the samples, for what is reported; default their numbers.
        about: goes into the scorer's config.json.
        on_step: called after each step.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        folder: Path,
        settings: FitSettings,
        names: Sequence[str] | None = None,
        about: Mapping[str, Any] | None = None,
        on_step: Callable[[Look], None] | None = None,
    ) -> None:
        self.passes, self.samples, self.folder, self.settings = Passes(model), samples, folder, settings
        self.names = [f"sample {i}" for i in range(len(samples))] if names is None else list(names)
        self.about, self.on_step = dict(about or {}), on_step
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.scorer = Scorer(self.passes.width, settings.rank, settings.question).to(self.passes.device)
        self.optimizer = torch.optim.AdamW(self.scorer.parameters(), lr=settings.rate, weight_decay=0.01)
        self.train, self.held = self._parts()
        self.mark = {**settings.to_dict(), "samples": len(samples), "width": self.passes.width}
        self.state = states.read(folder, self.mark) or State({}, {})
        if self.state.step or self.state.log:
            self.scorer.load_state_dict(self.state.weights)
            self.optimizer.load_state_dict(self.state.optimizer)
        self._saved = time.monotonic()

    def _parts(self) -> tuple[list[int], list[int]]:
        """Samples to train on, and samples to look at."""
        number, wanted = len(self.samples), self.settings.held_out * len(self.samples)
        if number < 2:
            raise ConfigError(f"expected at least two prompts, one to train on and one to look at; got {number}.")
        order = Draw(self.settings.seed, 0, 0).permutation(number)
        some = min(self.settings.most_held_out, max(1, round(wanted)))
        return order[some:], order[:some]

    def run(self) -> Fitted:
        """Train until there are no more steps, or nothing gets better.

        Raises:
            ConfigError: no sample can be used, or none of the held-out part.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with frozen(self.passes.inner):
            if not self.state.log:
                self._look()
            while not self.state.ended:
                loss = self._step()
                self.state.step += 1
                if self.state.step % self.settings.every == 0 or self.state.step == self.settings.steps:
                    self._look()
                elif time.monotonic() - self._saved > _SAVE:
                    self.save()
                self._tell(loss)
            self._cover()
        return self._done()

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self) -> float | None:
        """Gradients of a few prompts, and the weights a step further; the mean divergence, None where none worked."""
        settings, step, losses = self.settings, self.state.step, []
        for n in range(step * settings.batch, (step + 1) * settings.batch):
            place = self._nth(n)
            prompt = self._prompt(place)
            if prompt is None:
                continue
            loss = self._loss(prompt, Draw(settings.seed, 1, n))
            if bool(loss.isfinite()):
                torch.autograd.backward(loss / settings.batch)
                losses.append(float(loss.detach()))
            else:
                self._skip(place, "the divergence is not finite: the model's own logits overflow")
        if losses:
            share = min(1.0, (step + 1) / _WARM) * (0.05 + 0.95 * _cosine(step / settings.steps))
            for group in self.optimizer.param_groups:
                group["lr"] = settings.rate * share
            torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.losses += losses
        return sum(losses) / len(losses) if losses else None

    def _nth(self, n: int) -> int:
        """The n-th sample to train on: all of them in an order drawn anew, again and again."""
        round_, place = divmod(n, len(self.train))
        return self.train[Draw(self.settings.seed, 2, round_).permutation(len(self.train))[place]]

    def _loss(self, prompt: Prompt, draw: Draw) -> Tensor:
        """Divergence of the answer under soft gates at a budget that is drawn, in nats per token."""
        settings, sizes = self.settings, [len(own) for own in prompt.features]
        keep = math.exp(draw.between(*map(math.log, settings.budgets)))
        first, last = settings.temperature
        temperature = first * (last / first) ** (self.state.step / max(1, settings.steps - 1))
        gates = []
        for score, size, count in zip(self._scores(prompt, self.scorer), sizes, counts(sizes, keep), strict=True):
            noise = (settings.noise * draw.logistic(size)).to(score)
            soft = torch.zeros_like(score)
            if count < size:
                soft = soft_gates(score, count, temperature, noise, settings.slope)
            gates.append(soft)
        return divergence(prompt.logits, self.passes.pruned(prompt, gates))

    def _scores(self, prompt: Prompt, scorer: Scorer) -> list[Tensor]:
        given = [prompt.question] if self.settings.question else []
        return [scorer(own[None], *given)[0] for own in prompt.features]

    # -- samples ------------------------------------------------------------------------------------------------------

    def _prompt(self, place: int) -> Prompt | None:
        """A sample through the unpruned model; None where it cannot be used, which is noted."""
        state = self.state
        if place in state.skipped:
            return None
        try:
            sample = self.samples[place]
            inputs = self.passes.inputs(sample() if callable(sample) else sample)
            if place not in state.answers:
                state.answers[place] = self.passes.answer(inputs, self.settings.max_new_tokens)
            return self.passes.unpruned(inputs, state.answers[place])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a decoder of pictures raises anything; the run must not end for one sample
            self._skip(place, f"{type(error).__name__}: {error}")
            if len(state.skipped) >= _HOPELESS and not state.answers:
                raise ConfigError(
                    f"none of the first {len(state.skipped)} prompts can be used. {self.names[place]}: "
                    f"{state.skipped[place]}"
                ) from error
            return None

    def _skip(self, place: int, why: str) -> None:
        self.state.skipped[place] = (why.splitlines() or [""])[0][:_LONGEST]

    # -- the held-out part --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Look at the held-out part, note it, and write down where the fit stands."""
        state, settings = self.state, self.settings
        each = self._divergences(self.scorer)[0.0]
        held = sum(each) / len(each)
        if state.best is None or held < state.best * (1 - settings.better):
            state.best, state.best_step, state.waited = held, state.step, 0
            state.best_weights = {name: value.detach().cpu().clone() for name, value in self._weights().items()}
        else:
            state.waited += 1
        loss = sum(state.losses) / len(state.losses) if state.losses else None
        by_budget = {f"{keep:g}": _short(value) for keep, value in zip(settings.held_budgets, each, strict=True)}
        state.log.append({"step": state.step, "loss": _short(loss), "held": _short(held), "held_at": by_budget})
        state.losses = []
        if state.step >= settings.steps:
            state.ended = "all steps are done"
        elif state.waited >= settings.patience:
            state.ended = f"{state.waited} looks at the held-out part without a better result"
        self.save()

    @torch.no_grad()
    def _divergences(self, scorer: Scorer, coverages: Sequence[float] = (0.0,)) -> dict[float, list[float]]:
        """Mean divergence on the held-out part at each budget, with hard gates, for each exponent of `coverages`."""
        budgets = self.settings.held_budgets
        found: dict[float, list[list[float]]] = {power: [[] for _ in budgets] for power in coverages}
        for place in self.held:
            prompt = self._prompt(place)
            if prompt is None:
                continue
            scores = self._scores(prompt, scorer)
            for power, each in found.items():
                for keep, values in zip(budgets, each, strict=True):
                    values.append(self._hard(prompt, scores, keep, power))
        if not found[coverages[0]][0]:
            reasons = "; ".join(f"{self.names[i]}: {self.state.skipped[i]}" for i in self.held[:3])
            raise ConfigError(f"none of the {len(self.held)} held-out prompts can be used. {reasons}")
        return {power: [sum(values) / len(values) for values in each] for power, each in found.items()}

    def _hard(self, prompt: Prompt, scores: list[Tensor], keep: float, coverage: float) -> float:
        """Divergence under the gates of use."""
        wanted = counts([len(score) for score in scores], keep)
        rows = zip(scores, wanted, prompt.features, strict=True)
        gates = [hard_gates(score, count, values, coverage) for score, count, values in rows]
        return float(divergence(prompt.logits, self.passes.pruned(prompt, gates)))

    def _cover(self) -> None:
        """Find out whether the best scorer does better with coverage, and note it."""
        if self.state.covered:
            return
        found = self._divergences(self._best().to(self.passes.device), self.settings.coverages)
        means = {power: sum(each) / len(each) for power, each in found.items()}
        self.state.coverage = min(means, key=lambda power: (means[power], power))
        self.state.covered = {f"{power:g}": [float(_short(x) or 0) for x in each] for power, each in found.items()}
        self.save()

    # -- in and out ---------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        return self.scorer.state_dict()

    def save(self) -> None:
        """Write down where the fit stands, and the best scorer so far."""
        self.state.weights = {name: value.detach().cpu().clone() for name, value in self._weights().items()}
        self.state.optimizer = self.optimizer.state_dict()
        states.write(self.folder, self.state, self.mark)
        self._saved = time.monotonic()
        if self.state.best_weights:
            save(self._best(), self.folder, self._told())

    def _best(self) -> Scorer:
        best = Scorer(self.passes.width, self.settings.rank, self.settings.question, self.state.coverage)
        best.load_state_dict(self.state.best_weights)
        return best.eval().requires_grad_(False)

    def _told(self) -> dict[str, Any]:
        state = self.state
        facts = {"model": type(self.passes.inner).__name__, "samples": len(self.samples), "step": state.best_step}
        return {**facts, "held": _short(state.best), "settings": self.settings.to_dict(), **self.about}

    def _tell(self, loss: float | None) -> None:
        if self.on_step is not None:
            state = self.state
            held = state.log[-1]["held"]
            self.on_step(Look(state.step, self.settings.steps, loss, held, state.best, len(state.skipped)))

    def _done(self) -> Fitted:
        state = self.state
        assert state.best is not None  # there was a look
        skipped = {self.names[place]: why for place, why in sorted(state.skipped.items())}
        before = state.log[0]["held"]
        step, best = state.best_step, state.best
        return Fitted(self._best(), self.folder, step, best, before, state.ended, skipped, state.log, state.covered)


def divergence(unpruned: Tensor, pruned: Tensor) -> Tensor:
    """() Kullback-Leibler divergence of the pruned from the unpruned model, both (T, V) logits; mean over tokens."""
    p = unpruned.log_softmax(-1)
    return torch.nn.functional.kl_div(pruned.log_softmax(-1), p, log_target=True, reduction="batchmean")


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.5g}")
