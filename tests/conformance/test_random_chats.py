"""Random chats: several turns with pictures and videos, rows that are padded inside of the chat, all four sockets, and
both sorts of cache. Nobody edits this file to add a family.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, InputPruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.compat import static_cache
from mustdrop.errors import MustDropError
from mustdrop.pruners import ObservationWindow
from support import families
from support.chats import answered_by_the_oracle, chat
from support.families import batch, clone, plain
from support.hidden_patches import TOLERANCE, Drawn

FAMILIES = [name for name, adapter in families.AVAILABLE.items() if not {"vision", "decode"} <= {*adapter.lacks}]
SEEDS = {"turns": 1, "more": 3, "product": 6}  # cases of each family, by --breadth
STEPS = 1

INPUT = (InputPruner(), InputPruner(rule=Drawn(share=0.8)))
VISION = (
    VisionStagePruner(window=None, keep=0.7),
    VisionStagePruner(window=2, threshold=0.0, key_share=0.2),
    VisionStagePruner(window=2, threshold=-1.0, key_share=0.2, inside=False, keep=0.6),
    mustdrop.registry.resolve("tome", keep=0.6).vision,
    mustdrop.registry.resolve("vcast", keep=0.6).vision,
    mustdrop.registry.resolve("flashvid", keep=0.6, taper=None).vision,
)
ON_THE_WAY = VisionStagePruner(window=None, key_share=0.2, key_layer=1, select_layer=1, keep=0.6)
PREFILL = (PrefillPruner(keep=0.6), PrefillPruner(keep=0.5, paper_layers=(4, 12)))
DECODE = (
    DecodeCachePruner(old_pictures=3, cascade=False),
    DecodeCachePruner(old_pictures=0.3),
    DecodeCachePruner(keep=0.5, interval=1, old_pictures=4),
    DecodeCachePruner(keep=0.6, score=ObservationWindow(), after_prefill=True, old_pictures=0.5),
    DecodeCachePruner(),
)


@dataclass(frozen=True)
class Case:
    """One random chat: media of each turn and row, the stages, the attention function, and how pictures look."""

    name: str
    seed: int
    rows: tuple[tuple[tuple[str, ...], ...], ...]
    stages: dict[str, Any]
    attention: str
    pages: bool

    @classmethod
    def draw(cls, name: str, seed: int) -> Case:
        """The case of a family that a seed stands for."""
        dice, adapter = random.Random(f"{name} {seed}"), registry()[name]
        kinds, width = tuple(adapter.media), dice.randint(1, 2)
        rows = [[cls._media(dice, kinds) for _ in range(width)] for _ in range(dice.randint(2, 4))]
        if not any(map(any, rows)):
            rows[0][0] = kinds[:1]
        tower = None if "vision" in adapter.lacks else adapter.tower(plain(name), kinds[0])
        cuts = tower is not None and tower.cuts
        choices = {
            "input": INPUT if cuts and adapter.cell_pixels else (),
            "vision": (*VISION, *(ON_THE_WAY,) * 2 * cuts),
            "prefill": PREFILL,
            "decode": DECODE,
        }
        known = {stage: of for stage, of in choices.items() if of and stage not in adapter.lacks}
        stages = {stage: dice.choice(of) for stage, of in known.items() if dice.random() < 0.7}
        if not stages:
            stages = {stage: of[0] for stage, of in known.items()}
        return cls(
            name, seed, tuple(map(tuple, rows)), stages, dice.choice(("sdpa", "eager")), bool(dice.getrandbits(1))
        )

    @staticmethod
    def _media(dice: random.Random, kinds: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dice.choice(kinds) for _ in range(dice.choice((0, 1, 1, 2))))

    def turns(self, row: int | None = None) -> list[dict[str, torch.Tensor]]:
        """Inputs of each turn, of all rows or of one alone."""
        adapter, model = registry()[self.name], plain(self.name)
        mine = slice(None) if row is None else slice(row, row + 1)
        return [
            batch(adapter, model, own[mine], seed=self.seed + i, first=row or 0, paint=_page if self.pages else None)
            for i, own in enumerate(self.rows)
        ]

    def patched(self) -> Any:
        """A model with the stages."""
        return mustdrop.patch(clone(self.name, self.attention), **self.stages)


def _page(_: int, picture: torch.Tensor) -> torch.Tensor:
    """A page: nothing is written on its lower half, and pages of one size are alike but for their first rows."""
    page = torch.zeros_like(picture)
    top = picture.shape[-2] // 4
    page[..., :top, :] = picture[..., :top, :]
    page[..., top : 2 * top, :] = torch.linspace(-1, 1, picture.shape[-1])
    return page


def pytest_generate_tests(metafunc):
    """So many seeds of each family as ``--breadth`` says."""
    if "case" in metafunc.fixturenames:
        seeds = SEEDS[metafunc.config.getoption("--breadth")]
        pairs = [(name, seed) for name in FAMILIES for seed in range(seeds)]
        metafunc.parametrize("case", pairs, ids=[f"{name}-{seed}" for name, seed in pairs], indirect=True)


@pytest.fixture
def case(request):
    """A case whose chat transformers itself can hold: in some families it cannot go on with a new picture."""
    drawn = Case.draw(*request.param)
    print(drawn)
    try:
        chat(plain(drawn.name, drawn.attention), drawn.turns(), STEPS)
    except (ValueError, RuntimeError, IndexError, StopIteration, TypeError) as error:
        pytest.skip(f"the unpatched model cannot hold this chat: {type(error).__name__}: {error}"[:150])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mustdrop.errors.NothingDroppedWarning)
        yield drawn


def test_dropping_equals_hiding_in_any_chat(case):
    model, turns = case.patched(), case.turns()
    said = chat(model, turns, STEPS)
    theirs = answered_by_the_oracle(plain(case.name, case.attention), model, turns, said, STEPS)
    assert (said.logits - theirs).abs().max() <= TOLERANCE
    _check_static(case, said, turns)
    _check_alone(case, said)


def _check_static(case, said, turns):
    """A static cache gives what a growing one gives, or is refused by name."""
    model = case.patched()
    length = sum(turn["input_ids"].shape[1] + STEPS for turn in turns)
    cache = static_cache(registry()[case.name].text(model).config, length + 2)
    try:
        fixed = chat(model, turns, STEPS, cache=cache)
    except MustDropError as error:
        if "static" not in str(error).lower():
            raise
        return
    assert (said.logits - fixed.logits).abs().max() <= TOLERANCE
    for ours, theirs in zip(said.traces, fixed.traces, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)


def _check_alone(case, said):
    """A row is what it is alone, where that holds for the unpatched model.

    A policy that reads decode steps begins anew when a picture comes, for all rows of the batch (how-it-works.md): it
    is compared where this row has a picture in each turn that another has one in.
    """
    row = len(case.rows[0]) - 1
    if not row or not any(own[row] for own in case.rows):
        return
    decode = case.stages.get("decode")
    if decode is not None and decode.reads_steps and any(any(own) and not own[row] for own in case.rows):
        return
    model = plain(case.name, case.attention)
    whole = chat(model, case.turns(), STEPS).logits[row]
    if (chat(model, case.turns(row), STEPS).logits[0] - whole).abs().max() > TOLERANCE:
        return  # padding inside of a chat counts there
    alone = chat(case.patched(), case.turns(row), STEPS)
    assert (alone.logits[0] - said.logits[row]).abs().max() <= TOLERANCE
    for ours, theirs in zip(alone.traces, said.traces, strict=True):
        assert torch.equal(ours.tokens[:, 0], theirs.tokens[:, row])
