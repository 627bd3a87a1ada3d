"""PixelPrune and the input stage: which cells a picture predicts, against a reference written here cell by cell."""

from __future__ import annotations

import itertools

import pytest
import torch

import mustdrop
from mustdrop import InputPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, NothingDroppedWarning
from mustdrop.pruners import InputRule, Predictable
from mustdrop.rules.prediction import similar, unpredicted, unpredicted_media
from support.builders import answer
from support.chats import chat
from support.families import assert_dropping_equals_masking, batch, clone, plain


def page(rows, columns, seed, depth=3, levels=3):
    """A picture of few values, so that many cells are like others."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns, 1), generator=draw).float().expand(-1, -1, depth)


def by_hand(frames, tolerance, metric, before=None):
    """Cell by cell, as the paper has it, with the same place of the frame before as a second guess."""

    def near(a, b):
        apart = (a - b).abs()
        if metric == "max":
            return bool(apart.max() <= tolerance)
        return bool((apart.mean() if metric == "mae" else apart.pow(2).mean().sqrt()) <= tolerance)

    kept, made = torch.ones(frames.shape[:3], dtype=torch.bool), frames.clone()
    for t, r, c in itertools.product(*map(range, frames.shape[:3])):
        past = made[t - 1] if t else before
        here, guess = frames[t, r, c], None
        if r and c:
            left, above, corner = made[t, r, c - 1], made[t, r - 1, c], made[t, r - 1, c - 1]
            guess = above if near(corner, left) and not near(corner, above) else left
        elif r or c:
            guess = made[t, r, c - 1] if c else made[t, r - 1, c]
        if t == r == c == 0:
            continue
        if guess is not None and near(here, guess):
            kept[t, r, c], made[t, r, c] = False, guess
        elif past is not None and near(here, past[r, c]):
            kept[t, r, c], made[t, r, c] = False, past[r, c]
    return kept, made


@pytest.mark.parametrize("metric", ["max", "mae", "rmse"])
@pytest.mark.parametrize("tolerance", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 4), (2, 1, 6), (2, 6, 1), (1, 1, 1)])
def test_cells_are_predicted_as_by_hand(shape, tolerance, metric):
    frames = torch.stack([page(*shape[1:], seed) for seed in range(shape[0])])
    frames = frames + 0.2 * torch.rand(frames.shape, generator=torch.Generator().manual_seed(1)) * (tolerance > 0)
    for before in (None, page(*shape[1:], 7), frames[0]):
        kept, made = unpredicted(frames, tolerance, metric, before)
        expected, taken = by_hand(frames, tolerance, metric, before)
        assert torch.equal(kept, expected)
        assert torch.equal(made, taken)


def test_differences_do_not_add_up():
    """Each cell is within the tolerance of its neighbour, and the last is far from the first."""
    slope = torch.arange(10.0)[None, None, :, None]
    kept, made = unpredicted(slope, tolerance=1.0)
    assert kept.flatten().tolist() == [True, False] * 5
    assert similar(made, slope, 1.0).all()


def test_an_edge_that_runs_down_is_followed():
    picture = torch.tensor([[0.0, 1, 1], [0, 1, 1], [0, 1, 1]])[None, ..., None]
    kept, _ = unpredicted(picture)
    assert kept[0].int().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_a_picture_that_repeats_the_one_before_is_a_reference_to_it():
    first, other = page(4, 4, 1)[None], page(4, 4, 2)[None]
    changed = first.clone()
    changed[0, 2, 2] = 9.0
    kept = unpredicted_media([first, first, changed, other, page(3, 3, 1)[None]])
    assert kept[1].sum() == 1  # its first cell
    assert kept[1][0, 0, 0]
    assert kept[2].nonzero()[:, 1:].tolist() == [[0, 0], [2, 2]]
    back = unpredicted_media([first, other, first])  # one picture before it, and no earlier one
    assert torch.equal(back[2], unpredicted_media([other, first])[1])
    assert back[2].sum() > 1
    alone = unpredicted_media([first, first], previous=False)
    assert torch.equal(alone[0], alone[1])
    assert torch.equal(kept[4], unpredicted(page(3, 3, 1)[None])[0])  # of another size: on its own


def screens(model, adapter, kind, rows=2, changed=True):
    """Prompts with a screenshot, and the same with one spot changed."""

    def paint(number, picture):
        flat = torch.zeros_like(picture)
        flat[..., :8] = 0.5
        if changed and number % 2:
            flat[..., 9, 13] = 1.0
        return flat

    return batch(adapter, model, ((kind, kind),) * rows, paint=paint)


def test_photographs_lose_nothing_and_the_model_is_bit_identical():
    adapter, model = registry()["qwen2_5_vl"], mustdrop.patch(clone("qwen2_5_vl"), "pixelprune")
    inputs = batch(adapter, model, (("image",), ("image", "image")), paint=lambda _, picture: torch.randn_like(picture))
    with pytest.warns(NothingDroppedWarning, match="documents"):
        ours = answer(model, inputs, 2)
    assert torch.equal(ours.logits, answer(plain("qwen2_5_vl"), inputs, 2).logits)
    assert mustdrop.trace(model).flops.ratio == 1.0


@pytest.mark.parametrize(("family", "kind"), [("qwen3_vl", "image"), ("qwen2_5_vl", "video"), ("glm4v", "image")])
def test_documents_lose_what_is_predictable_at_every_stage(family, kind):
    adapter, model = registry()[family], clone(family)
    inputs = screens(model, adapter, kind)
    both = assert_dropping_equals_masking(family, (), inputs=inputs, steps=3, method="pixelprune")
    trace = both.trace
    assert trace.flops.parts["vision"].ratio < 0.7
    assert trace.flops.parts["prefill"].ratio < 1
    assert all(len(trace.kept(0, row)) < trace.total[row] / 2 for row in range(2))
    assert (trace.assignment(0) >= 0).sum() == len(trace.kept(0, 0))


NOISE = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0))


def screenshot(number, picture):
    """Noise, which no neighbour predicts: of each second one, a pixel in the middle is another."""
    shown = NOISE.clone()
    shown[:, 12, 12] += number % 2
    return shown if picture.ndim == 3 else shown.expand_as(picture[:, :, :24, :24]).clone()


def counts_of(trace):
    return [int(torch.isin(medium.index, trace.kept(0)).sum()) for medium in trace.media[0]]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v", "video_llama_3", "kimi_k25"])
def test_the_second_screenshot_of_a_chat_keeps_what_changed(family):
    adapter, rows = registry()[family], (("image",) * 3,)
    inputs = batch(adapter, plain(family), rows, paint=screenshot)
    trace = assert_dropping_equals_masking(family, (), inputs=inputs, steps=3, method="pixelprune").trace
    whole = trace.media[0][0].layout.size
    assert counts_of(trace) == [whole, 2, 2]  # the first cell, and the one that is another
    again = mustdrop.patch(clone(family), "pixelprune", previous=False)
    with torch.no_grad(), pytest.warns(NothingDroppedWarning):
        again(**inputs)
    assert counts_of(mustdrop.trace(again)) == [whole] * 3


def test_frames_that_repeat_are_references_to_the_first():
    inputs = batch(registry()["qwen3_vl"], plain("qwen3_vl"), (("video",),), paint=screenshot)
    trace = assert_dropping_equals_masking("qwen3_vl", (), inputs=inputs, steps=3, method="pixelprune").trace
    frames, rows, columns = trace.media[0][0].layout.grids[0]
    assert frames > 1
    assert trace.kept(0).tolist() == list(range(rows * columns))


def test_a_screenshot_of_a_later_call_is_looked_at_alone():
    """What came before a call is in its cache, and its pixels are known to nobody."""
    adapter, model = registry()["kimi_k25"], mustdrop.patch(clone("kimi_k25"), "pixelprune")
    turns = [batch(adapter, model, (("image",),), paint=lambda _, picture: NOISE) for _ in range(2)]
    with pytest.warns(NothingDroppedWarning):
        said = chat(model, turns, 1)
    assert [trace.tokens[0].tolist() for trace in said.traces] == [[9], [9]]


def test_rows_of_a_batch_are_chats_of_their_own():
    """The same screenshot in two prompts is a reference in neither."""
    adapter, model = registry()["qwen3_vl"], mustdrop.patch(clone("qwen3_vl"), "pixelprune")
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))

    def paint(_, picture):
        return noise[:, : picture.shape[1], : picture.shape[2]]

    inputs = batch(adapter, model, (("image",), ("image",)), paint=paint)
    with torch.no_grad(), pytest.warns(NothingDroppedWarning):
        model(**inputs)
    trace = mustdrop.trace(model)
    assert [len(trace.kept(0, row)) for row in range(2)] == trace.total.tolist()


def test_a_budget_behind_it_counts_the_whole_picture_and_is_met():
    adapter, model = registry()["qwen3_vl"], clone("qwen3_vl")
    mustdrop.patch(model, input=InputPruner(), vision=VisionStagePruner(window=None, keep=3))
    inputs = screens(model, adapter, "image", rows=1)
    with torch.no_grad():
        model(**inputs)
    assert len(mustdrop.trace(model).kept(0)) == 3


class Returns(InputRule):
    """Answers with whatever it was told."""

    what: str = "nothing"

    def choose(self, media):
        if self.what == "none":
            return [torch.zeros(picture.shape[:3], dtype=torch.bool) for picture in media]
        if self.what == "floats":
            return [torch.ones(picture.shape[:3]) for picture in media]
        if self.what == "few":
            return [torch.ones(picture.shape[:3], dtype=torch.bool) for picture in media][1:]
        return None


@pytest.mark.parametrize(
    ("what", "message"),
    [("nothing", "for each of 1 media"), ("none", "at least one cell"), ("floats", "bool"), ("few", "for each of 1")],
)
def test_rules_that_answer_wrongly_are_named_and_the_model_is_usable(what, message):
    adapter, model = registry()["qwen2_vl"], clone("qwen2_vl")
    inputs = batch(adapter, model, (("image",),))
    mustdrop.patch(model, input=InputPruner(rule=Returns(what=what)))
    with torch.no_grad(), pytest.raises(ConfigError, match=rf"Returns\.choose.*{message}"):
        model(**inputs)
    mustdrop.unpatch(model)
    assert torch.equal(answer(model, inputs, 1).logits, answer(plain("qwen2_vl"), inputs, 1).logits)


def test_settings_that_do_not_exist():
    with pytest.raises(ConfigError, match="tolerance"):
        Predictable(tolerance=-1)
    with pytest.raises(ConfigError, match=r"input= takes a InputPruner|InputPruner"):
        mustdrop.patch(clone("qwen2_vl"), input=VisionStagePruner())


@pytest.mark.parametrize("knob", [("pixelprune", "tolerance"), ("mmtok", "alpha"), ("mmtok", "text_temperature")])
def test_infinite_knobs_are_refused(knob):
    """Without end, everything is like everything, and sums are no numbers."""
    method, name = knob
    with pytest.raises(ConfigError, match=f"{name}.*finite"):
        mustdrop.patch(clone("qwen2_vl"), method, **{name: float("inf")})
