"""V-CAST, GleanVID, FlashVID and FastVID: the published formulas written out, and invariants of budgets and merging."""

from __future__ import annotations

import math

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.method import find
from mustdrop.methods import gleanvid
from mustdrop.methods.fastvid import SalientAndContext, blended
from mustdrop.methods.flashvid import DiverseAndTrees
from mustdrop.methods.gleanvid import NovelAndLocal, debiased, residuals, shares
from mustdrop.methods.vcast import CurvedFrames, curvature
from mustdrop.pruners import Features
from mustdrop.rules.groups import members
from mustdrop.rules.segments import segments, videos
from support.builders import answer
from support.families import batch, clone

RULES = {
    "vcast": CurvedFrames(),
    "gleanvid": NovelAndLocal(),
    "flashvid": DiverseAndTrees(),
    "fastvid": SalientAndContext(),
}
each = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def video(frames, rows=3, columns=4, channels=8, seed=0):
    """Features of which each frame is less like the others than the one before."""
    made = random(rows * columns, channels, seed=seed) + 1
    noise = random(frames, rows * columns, channels, seed=seed + 50)
    return (made + torch.linspace(0.05, 1, frames)[:, None, None] * noise).flatten(0, 1)[None]


def seen_of(rule, values, grid, seed=3):
    attention = torch.rand(values.shape[:2], generator=torch.Generator().manual_seed(seed)) + 0.01
    return Features.of_grid(values, grid, dict.fromkeys(rule.reads, attention))


# -- what all of them do ----------------------------------------------------------------------------------------------


@each
def test_every_count_is_met_exactly_and_features_are_kept_once(rule):
    seen = seen_of(rule, video(4), (4, 3, 4))
    for count in range(1, 48):
        chosen = rule(seen, count)
        keep = chosen.keep[0].tolist()
        assert len(set(keep)) == count
        assert keep == sorted(keep)
        if chosen.merge_into is not None:
            assert chosen.merge_into[0, chosen.keep[0]].tolist() == list(range(count))


@each
def test_videos_of_a_batch_do_not_mix(rule):
    values = torch.cat([video(4, seed=5), video(4, seed=6)])
    both = seen_of(rule, values, (4, 3, 4))
    together = rule(both, 17)
    for i in range(2):
        alone = Features.of_grid(values[i : i + 1], (4, 3, 4), {r: v[i : i + 1] for r, v in both.read.items()})
        one = rule(alone, 17)
        assert torch.equal(one.keep[0], together.keep[i])
        if one.merge_into is not None:
            assert torch.equal(one.merge_into[0], together.merge_into[i])


@each
def test_frames_may_differ_in_size_or_be_hidden(rule):
    values = random(1, 14, 6, seed=4)
    frame = torch.tensor([[0] * 4 + [2] * 9 + [3]])  # nothing is left of frame 1
    place = torch.arange(14)[None]
    attention = torch.rand(1, 14, generator=torch.Generator().manual_seed(1))
    seen = Features(values, frame, place // 4, place % 4, dict.fromkeys(rule.reads, attention))
    for count in range(1, 14):
        assert rule(seen, count).keep.unique().numel() == count


@each
def test_a_single_picture_is_one_frame_and_tiles_are_videos_of_one(rule):
    values = random(1, 24, 6, seed=4)
    assert rule(seen_of(rule, values, (4, 6)), 7).keep.unique().numel() == 7
    tiles = seen_of(rule, values, (2, 3, 4))
    tiles = Features(tiles.values, tiles.frame, tiles.row, tiles.column, tiles.read, first=tiles.frame)
    assert rule(tiles, 7).keep.unique().numel() == 7


@each
@pytest.mark.parametrize("values", [torch.ones(1, 24, 4), torch.zeros(1, 24, 4)], ids=["equal", "zero"])
def test_features_that_cannot_be_told_apart_are_no_error(rule, values):
    chosen = rule(seen_of(rule, values, (2, 3, 4)), 11)
    assert chosen.keep.unique().numel() == 11
    if chosen.blend is not None:
        assert torch.allclose(chosen.blend(values), values[:, :11])


@pytest.mark.parametrize("method", list(RULES))
def test_frames_of_a_model_share_one_budget(method):
    model = mustdrop.patch(clone("qwen3_vl"), method, keep=0.5, **({"taper": None} if method == "flashvid" else {}))
    answer(model, batch(registry()["qwen3_vl"], model, (("video",), ("video", "image"), ())), steps=2)
    trace = mustdrop.trace(model)
    assert trace.tokens[0].tolist() == [int(total * 0.5) for total in trace.total.tolist()]


# -- segments ---------------------------------------------------------------------------------------------------------


def test_segments_end_where_frames_differ_and_between_videos():
    means = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [0.199, 1]]])
    one = torch.zeros(1, 5, dtype=torch.long)
    assert segments(means, one, 0.9, 1).tolist() == [[0, 0, 1, 1, 1]]
    assert segments(means, one, 0.9, 3).tolist() == [[0, 1, 2, 2, 2]]  # of two neighbours alike, the lower
    assert segments(means, one, -1, 1).tolist() == [[0] * 5]
    assert segments(means, one, -1, 2).tolist() == [[0, 0, 1, 1, 1]]
    assert segments(means, one, -1, 99).tolist() == [[0, 1, 2, 3, 4]]
    assert segments(means, torch.tensor([[0, 1, 1, 1, 1]]), -1, 1).tolist() == [[0, 1, 1, 1, 1]]
    assert segments(means[:, :1], one[:, :1], 0.9, 8).tolist() == [[0]]
    frame = torch.tensor([[0, 0, 1, 3]])
    assert videos(frame, torch.tensor([[0, 0, 0, 3]]), 4).tolist() == [[0, 0, 2, 3]]


def test_members_lie_side_by_side():
    index, real = members(torch.tensor([1, 0, 1, 3]), 4)
    assert index.tolist() == [[1, 0], [0, 2], [0, 0], [3, 0]]
    assert real.sum(1).tolist() == [1, 2, 0, 1]


# -- V-CAST -----------------------------------------------------------------------------------------------------------


def test_curvature_by_hand():
    angle = torch.tensor([0.0, 20, 40, 60, 40]).deg2rad()
    means = torch.stack([angle.cos(), angle.sin()], 1)[None] * torch.tensor([1.0, 2, 3, 1, 5])[:, None]
    bend = curvature(means, torch.zeros(1, 5, dtype=torch.long))[0]
    expected = 1 - math.cos(math.radians(20))  # steps of a circle turn by 20 degrees, and at last by 160 + 20
    assert bend.tolist() == pytest.approx([1, expected, expected, 1 - math.cos(math.radians(180)), 1], abs=1e-5)
    apart = curvature(means, torch.tensor([[0, 0, 0, 3, 3]]))[0]
    assert apart.tolist() == pytest.approx([1, expected, 1, 1, 1], abs=1e-5)
    assert curvature(means[:, :2], torch.zeros(1, 2, dtype=torch.long)).tolist() == [[1, 1]]


@pytest.mark.parametrize("count", [7, 15, 30])
def test_vcast_is_the_formula(count):
    x = video(5, seed=2)
    frames = x[0].view(5, 12, 8).double()
    direction = torch.nn.functional.normalize(frames.mean(1), dim=1)
    step = direction.diff(dim=0)
    bend = torch.ones(5).double()
    bend[1:-1] = 1 - torch.cosine_similarity(step[:-1], step[1:], dim=1)
    share = (bend / 0.7).softmax(0) * (count - 5)
    budget = 1 + share.floor()
    for t in (share - share.floor()).argsort(descending=True)[: count - int(budget.sum())]:
        budget[t] += 1
    assert budget.max() <= 12
    expected = []
    for t in range(5):
        length = frames[t].norm(dim=1)
        score = 1 - torch.cosine_similarity(frames[t], direction[t][None], dim=1)
        score += (length - length.min()) / (length.max() - length.min())
        expected += [t * 12 + i for i in score.argsort(descending=True)[: int(budget[t])].tolist()]
    assert CurvedFrames()(Features.of_grid(x, (5, 3, 4), {}), count).keep[0].tolist() == sorted(expected)


# -- GleanVID ---------------------------------------------------------------------------------------------------------


def test_the_direction_of_largest_variance_is_taken_out():
    x = random(2, 40, 8) + 3 * random(2, 40, 1, seed=1) * random(2, 1, 8, seed=2) + 5
    made = debiased(x)
    for row, out in zip(x.double(), made, strict=True):
        mean = row.mean(0)
        v = torch.linalg.svd(row - mean, full_matrices=False).Vh[0]
        expected = (row - mean) - ((row - mean) @ v)[:, None] * v + mean
        torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=0)


def test_residuals_are_what_earlier_vectors_do_not_span():
    z = random(3, 5, 9)
    found = residuals(z @ z.mT)
    for vectors, got in zip(z.double(), found, strict=True):
        assert float(got[0]) == pytest.approx(float(vectors[0].norm()), rel=1e-4)
        for t in range(1, 5):
            history = vectors[:t].T
            left = vectors[t] - history @ torch.linalg.lstsq(history, vectors[t][:, None]).solution[:, 0]
            assert float(got[t]) == pytest.approx(float(left.norm()), rel=2e-2)
    same = torch.ones(1, 4, 3)
    assert residuals(same @ same.mT)[0, 1:].max() < 0.05


def test_shares_are_more_uneven_the_more_frames_differ():
    size = torch.full((1, 4), 9)
    assert shares(torch.ones(1, 4), size).tolist() == [[pytest.approx(0.25)] * 4]
    added = torch.tensor([[4.0, 0, 0, 0]])  # Gini 3 / 4, so 0.6 - 0.3 evenly
    assert shares(added, size)[0].tolist() == pytest.approx([0.3 / 4 + 0.7, 0.075, 0.075, 0.075])


def gleaned(x, frames, rows, columns, count):
    """The paper's algorithms for one video (N, C), in float64, step by step."""
    n = rows * columns
    x = x.double()
    mean = x.mean(0)
    v = torch.linalg.svd(x - mean, full_matrices=False).Vh[0]
    d = ((x - mean) - ((x - mean) @ v)[:, None] * v + mean).view(frames, n, -1)
    raw = x.view(frames, n, -1)
    cells = [(r // 2, c // 2) for r in range(rows) for c in range(columns)]

    def square(of, i):
        return of[[j for j in range(n) if cells[j] == cells[i]]].mean(0)

    added = torch.zeros(frames).double()
    for i in range(n):
        z = torch.stack([square(d[t], i) for t in range(frames)])
        for t in range(frames):
            if t == 0:
                added[t] += z[0].norm()
                continue
            gram = z[:t] @ z[:t].T
            weights = torch.linalg.solve(gram + 1e-4 * gram.diagonal().mean() * torch.eye(t).double(), z[:t] @ z[t])
            added[t] += (z[t] @ z[t] - (z[:t] @ z[t]) @ weights).clamp(min=0).sqrt()
    gini = (added[:, None] - added[None]).abs().sum() / (2 * frames * added.sum())
    alpha = 0.6 - 0.4 * gini
    share = alpha * count / frames + (1 - alpha) * count * added / added.sum()
    budget = share.floor()
    for t in (share - share.floor()).argsort(descending=True)[: count - int(budget.sum())]:
        budget[t] += 1
    assert budget.max() <= n

    def scaled(s):
        return (s - s.min()) / (s.max() - s.min())

    chosen, kept = [], torch.zeros(0, d.shape[2]).double()
    for t in range(frames):
        near = torch.stack([torch.cosine_similarity(raw[t, i], square(raw[t], i), dim=0) for i in range(n)])
        far = torch.cosine_similarity(raw[t], raw[t].mean(0)[None], dim=1)
        local = torch.nn.functional.softplus(4 * (near - far)) / 4
        novel = d[t].norm(dim=1)
        if len(kept):
            basis = torch.linalg.svd(kept, full_matrices=False)
            q = basis.Vh[basis.S > 1e-8]
            novel = (d[t] - d[t] @ q.T @ q).norm(dim=1)
        picks = (scaled(local) + scaled(novel)).argsort(descending=True)[: int(budget[t])]
        chosen += [t * n + i for i in picks.tolist()]
        kept = torch.cat([kept, d[t, picks]])
    return sorted(chosen)


@pytest.mark.parametrize("count", [8, 14])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5)])
def test_gleanvid_is_the_published_algorithm(count, rows, columns):
    x = video(4, rows, columns, channels=40, seed=7)
    kept = NovelAndLocal()(Features.of_grid(x, (4, rows, columns), {}), count).keep[0].tolist()
    assert kept == gleaned(x[0], 4, rows, columns, count)


def test_a_repeated_frame_adds_nothing_new():
    values = video(1, seed=3).repeat(1, 3, 1)
    keep = NovelAndLocal()(Features.of_grid(values, (3, 3, 4), {}), 12).keep[0]
    of = (keep // 12).bincount(minlength=3).tolist()
    assert of[0] > of[1]
    assert abs(of[1] - of[2]) <= 1


# -- FlashVID ---------------------------------------------------------------------------------------------------------


def test_flashvid_picks_attended_features_that_differ_in_each_frame():
    """With nothing to merge it is max-min diversity, distances times attention, frame by frame."""
    rule = DiverseAndTrees(diverse=1.0)
    x = video(3, seed=1)
    seen = seen_of(rule, x, (3, 3, 4))
    attention = seen.of(rule.reads[0])[0].double().view(3, 12)
    expected = []
    for t, frame in enumerate(x[0].view(3, 12, 8).double()):
        unit = torch.nn.functional.normalize(frame, dim=1)
        far = (1 - unit @ unit.T) * attention[t][None]  # columns are what may be picked
        picks = [int(far.sort(0).values[1].argmax())]
        while len(picks) < 4:
            near = far[picks].amin(0)
            near[picks] = -1
            picks.append(int(near.argmax()))
        expected += [t * 12 + i for i in picks]
    chosen = rule(seen, 12)
    assert chosen.keep[0].tolist() == sorted(expected)
    assert torch.equal(chosen.blend(x), x[:, chosen.keep[0]])


def test_what_stays_alike_over_time_becomes_one_mean():
    """Three equal frames without a choice: each place is a tree, which stands in the first frame."""
    rule = DiverseAndTrees(diverse=0.0, fewest=1)
    x = (torch.eye(6)[None].repeat(3, 1, 1) + 0.01 * random(3, 6, 6)).flatten(0, 1)[None]
    chosen = rule(seen_of(rule, x, (3, 2, 3)), 6)
    assert chosen.keep[0].tolist() == list(range(6))
    assert chosen.merge_into[0].tolist() == list(range(6)) * 3
    torch.testing.assert_close(chosen.blend(x)[0], x[0].view(3, 6, 6).mean(0))


def test_nothing_joins_over_the_end_of_a_segment_and_enough_trees_are_left():
    x = torch.eye(6)[None].repeat(1, 3, 1)
    rule = DiverseAndTrees(diverse=0.0, fewest=3)
    chosen = rule(seen_of(rule, x, (3, 2, 3)), 17)
    assert chosen.keep.unique().numel() == 17
    for into, index in zip(chosen.merge_into[0].tolist(), range(18), strict=True):
        assert into < 0 or int(chosen.keep[0, into]) // 6 == index // 6  # joined in its own frame
    alike = DiverseAndTrees(diverse=0.0, fewest=1)
    assert alike(seen_of(alike, x, (3, 2, 3)), 10).keep.unique().numel() == 10  # though all could join


def test_a_cluster_is_the_mean_of_its_trees_and_not_of_their_members():
    rule = DiverseAndTrees(diverse=0.0, fewest=1, cut=-1.0)
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.02], [-1.0, 0.3]]])  # two frames of two places
    chosen = rule(seen_of(rule, x, (2, 1, 2)), 1)
    made = chosen.blend(x)[0, 0]
    trees = torch.stack([x[0, [0, 2]].mean(0), x[0, 1]])  # the last one is a tree of its own, in the second frame
    torch.testing.assert_close(made, trees.mean(0))


def test_flashvid_filters_late_or_not_at_all():
    method = find("flashvid", keep=0.25)
    assert method.prefill.filter_layers(28) == (19,)
    assert method.vision.taper == 0.3
    alone = find("flashvid", keep=0.25, taper=None)
    assert alone.prefill is None
    assert alone.vision.keep == 0.25


# -- FastVID ----------------------------------------------------------------------------------------------------------


def test_fastvid_by_hand():
    """One frame of six: two are salient, one context takes the three others, at least 0.6 its own."""
    rule = SalientAndContext()
    x = torch.tensor([[[9.0, 1], [0, 5], [1, 0], [1, 0.1], [1, 0.2], [1, 5]]])
    attention = torch.tensor([[0.9, 0.1, 0.1, 0.2, 0.1, 0.8]])
    seen = Features.of_grid(x, (2, 3), {rule.reads[0]: attention})
    chosen = rule(seen, 3)
    assert {0, 5} <= set(chosen.keep[0].tolist())
    (centre,) = set(chosen.keep[0].tolist()) - {0, 5}
    others = [i for i in (1, 2, 3, 4) if i != centre]
    expected = 0.6 * x[0, centre] + 0.4 * x[0, others].mean(0)
    made = chosen.blend(x)[0]
    torch.testing.assert_close(made[chosen.keep[0].tolist().index(centre)], expected)
    torch.testing.assert_close(made[0], x[0, 0])


def test_a_context_keeps_more_than_its_least_share_of_few():
    x = torch.tensor([[[1.0], [3.0]]])
    made = blended(x, torch.tensor([[0]]), torch.tensor([[0, 0]]), 0.3)
    assert made.tolist() == [[[0.5 * 1 + 0.5 * 3]]]
    assert blended(x, torch.tensor([[0]]), torch.tensor([[0, 0]]), 0.6).item() == pytest.approx(0.6 + 1.2)
    assert blended(x, torch.tensor([[1]]), torch.tensor([[-1, 0]]), 0.6).item() == 3


def test_contexts_of_fastvid_lie_in_every_fourth_frame_from_the_end():
    rule = SalientAndContext(context=1.0, fewest=1, cut=-1.0)
    x = video(9, seed=2)
    chosen = rule(seen_of(rule, x, (9, 3, 4)), 18)
    assert set((chosen.keep[0] // 12).tolist()) == {0, 4, 8}
    assert chosen.merge_into[0].min() == 0  # everything joins something
    many = rule(seen_of(rule, x, (9, 3, 4)), 90)  # more than these frames have
    assert many.keep.unique().numel() == 90


def test_noise_is_seeded():
    x = torch.ones(1, 24, 4)
    for kind in (DiverseAndTrees, SalientAndContext):
        kept = [kind(seed=seed)(seen_of(kind(), x, (2, 3, 4)), 9).keep.tolist() for seed in (1, 1)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("method", list(RULES))
def test_sixty_four_frames(method):
    """Thousands of features; nothing of all pairs of them is made (400 MB each)."""
    rule = RULES[method]
    x = video(64, 14, 14, channels=16, seed=1)
    seen = seen_of(rule, x, (64, 14, 14))
    assert rule(seen, 640).keep.unique().numel() == 640


@pytest.mark.parametrize("method", ["fastvid", "flashvid", "gleanvid"])
@pytest.mark.parametrize("keep", [1, 5, 20, 36])
def test_a_picture_is_a_video_of_one_frame(method, keep):
    """Its counts are known, so nothing waits for a device; what stays is the same."""
    rule, values = RULES[method], random(2, 36, 16, seed=keep)
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    frame, row, column = (x.expand(2, -1) for x in (torch.zeros(36, dtype=torch.long), *places))
    if method == "gleanvid":
        for own, local in zip(values, random(2, 36, seed=keep), strict=True):
            expected = gleanvid._picks(own, local, frame[0], torch.tensor([keep]))
            assert torch.equal(gleanvid._best(own, local, keep).sort().values, expected)
        return
    read = {what: random(2, 36, seed=keep + 1).abs() for what in rule.reads}
    seen = Features(values=values, frame=frame, row=row, column=column, read=read)
    got = rule.choose(seen, keep)
    attention = rule.importance.score(seen) if method == "fastvid" else rule.importance.positive(seen)
    for b in range(2):
        segment, budget = torch.zeros(1, dtype=torch.long), torch.tensor([keep])
        expected = rule._of_video(values[b], attention[b], frame[b], segment, budget)
        assert torch.equal(got.keep[b], expected[0])
        assert torch.equal(got.merge_into[b], expected[1])
