"""What `tune` found: every candidate with its numbers, the chosen one, a table, a plot, a config file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mustdrop import figures
from mustdrop.budget import knob_text
from mustdrop.config import save_config
from mustdrop.errors import ConfigError
from mustdrop.extras import need
from mustdrop.method import Method
from mustdrop.provenance import provenance
from mustdrop.tuning.candidate import Candidate
from mustdrop.tuning.goal import Goal


@dataclass(frozen=True)
class Tuning:
    """The outcome of `tune`.

    Attributes:
        goal: what was asked for.
        candidates: all of them, best first. Those with fewer `prompts` than `prompts` here were left behind early.
        chosen: the best one within the goal on all prompts; None if there is none.
        prompts: how many there were.
        model: class of the model.
    """

    goal: Goal
    candidates: list[Candidate]
    chosen: Candidate | None
    prompts: int
    model: str
    _about: dict[str, Any] = field(default_factory=lambda: provenance(0))

    @property
    def best(self) -> Candidate:
        """The chosen candidate.

        Raises:
            ConfigError: none meets the goal; the message names the nearest.
        """
        if self.chosen is not None:
            return self.chosen
        usable = [c for c in self.candidates if not c.refused and c.prompts]
        nearest = (
            f"The nearest is {usable[0].method} with {_knobs(usable[0])}: agreement {usable[0].agreement:.3f}, "
            f"KL {usable[0].kl:.3g}" + (f", time {usable[0].time:.2f}." if usable[0].time is not None else ".")
            if usable
            else f"None of them can be used here: {self.candidates[0].refused}"
        )
        raise ConfigError(
            f"no candidate reaches {self.goal}. {nearest} Ask for less, or pass other methods= and keeps=."
        )

    @property
    def method(self) -> Method:
        """The chosen method, for `patch`.

        Raises:
            ConfigError: none meets the goal.
        """
        return self.best.build()

    def save(self, path: str | Path) -> None:
        """Write the config file that `mustdrop.load_config` reads.

        Args:
            path: where to.

        Raises:
            ConfigError: no candidate meets the goal, or a file cannot name the chosen method.
        """
        best = self.best
        measured = {name: getattr(best, name) for name in ("prompts", "agreement", "kl", "equal_share", "flops", "kv")}
        measured["time"] = best.time
        about = {"goal": str(self.goal), "model": self.model, "measured": measured}
        versions = {name: self._about[name] for name in ("versions", "hardware", "date")}
        save_config(path, best.meant, best.knobs, **about, **versions)

    def table(self, rows: int = 12) -> Table:
        """The best candidates, and how many were refused.

        Args:
            rows: how many to show.
        """
        out = Table(title=f"{self.goal}: {self.prompts} prompts", title_justify="left")
        out.add_column("method", no_wrap=True)
        timed = any(c.time is not None for c in self.candidates)
        out.add_column("knobs", justify="right", no_wrap=True)
        for header in ("seen", "agrees", "KL", "tokens per layer", "FLOPs", "KV", *(["time"] if timed else [])):
            out.add_column(header, justify="right")
        usable = [c for c in self.candidates if not c.refused]
        for c in usable[:rows]:
            numbers = (f"{c.agreement:.3f}", f"{c.kl:.4f}", f"{c.equal_share:.1%}", f"{c.flops:.1%}", f"{c.kv:.1%}")
            time = ["" if c.time is None else f"{c.time:.2f}x"] if timed else []
            style = "bold" if c is self.chosen else None
            out.add_row(c.method, _knobs(c), str(c.prompts), *numbers, *time, style=style)
        left = len(usable) - rows
        refused = len(self.candidates) - len(usable)
        notes = [f"{max(0, left)} more; {refused} cannot be used here"] if left > 0 or refused else []
        if any(isinstance(c.knobs.get("keep"), float) for c in usable[:rows]):
            notes.append("keep=25% is typed as --keep 25% or keep=0.25; the config file has all digits")
        out.caption = "\n".join(notes) or None
        return out

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def draw(self, path: str | Path | None = None) -> Any:
        """Agreement against the cost of the prompt, a curve per method.

        Args:
            path: where to write the picture (format by its ending), or None.

        Returns:
            The matplotlib figure.

        Raises:
            MissingPackageError: matplotlib, of the extra `viz`, is not installed.
        """
        need("matplotlib", "viz", "drawing")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        usable = [c for c in self.candidates if not c.refused]
        for name in sorted({c.method for c in usable}):
            own = sorted((c for c in usable if c.method == name), key=lambda c: c.flops)
            axes.plot([c.flops for c in own], [c.agreement for c in own], marker="o", markersize=4, label=name)
        if self.chosen is not None:
            spot = ([self.chosen.flops], [self.chosen.agreement])
            axes.plot(*spot, "o", markersize=14, markerfacecolor="none", markeredgecolor="black", label="chosen")
        axes.set_xlabel("FLOPs of the prompt, share of the unpruned model's")
        axes.set_ylabel("agreement with the unpruned answers")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        if path is not None:
            figures.save(figure, path)
        return figure


def _knobs(candidate: Candidate) -> str:
    return " ".join(knob_text(name, value) for name, value in candidate.knobs.items())
