"""VidCom2: the published formulas written out, and budgets over frames."""

from __future__ import annotations

import math

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.methods.vidcom2 import FrameUniqueness
from mustdrop.pruners import Features
from support.builders import answer
from support.families import batch, clone


def video(frames, rows=3, columns=4, channels=8, seed=0):
    """Features of which each frame is less like the others than the one before."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(rows * columns, channels, generator=draw)
    noise = torch.randn(frames, rows * columns, channels, generator=draw)
    return (made + torch.linspace(0, 1, frames)[:, None, None] * noise).flatten(0, 1)[None]


def written_out(values, frames, rate, temperature):
    """Indices that stay, by the formulas for one video (N, C) and a mean rate."""
    n = len(values) // frames
    channels = values.var(0, correction=0).argsort()[: values.shape[1] // 2]
    x = torch.nn.functional.normalize(values[:, channels], dim=-1).view(frames, n, -1)

    def likeness(centre):
        squares = (x - centre).pow(2).sum(-1)
        return sum(torch.exp(-squares / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    of_video, of_frame = likeness(x.mean((0, 1))), likeness(x.mean(1, keepdim=True))
    unique = -of_video.mean(1)
    share = torch.softmax((unique - unique.max()) / temperature, 0)
    kept = []
    for f in range(frames):
        exact = min(1.0, rate * float(1 + share[f] - share.mean())) * n
        number = max(1, math.floor(exact + 0.5))
        kept += [f * n + int(i) for i in (of_video + of_frame)[f].argsort()[:number]]
    return sorted(kept)


@pytest.mark.parametrize("rate", [0.13, 0.25, 0.4, 0.7])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_at_the_count_of_a_rate_it_keeps_what_the_formulas_keep(rate, temperature):
    values = video(5)
    expected = written_out(values[0], 5, rate, temperature)
    rule = FrameUniqueness(temperature=temperature)
    assert rule(Features.of_grid(values, (5, 3, 4), {}), len(expected)).keep[0].tolist() == expected


def test_the_unusual_frame_gets_more_and_every_frame_one():
    same = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(1)).repeat(1, 4, 1)
    same[:, 24:36] = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    seen = Features.of_grid(same, (4, 3, 4), {})
    for count in range(1, 48):
        keep = FrameUniqueness()(seen, count).keep[0]
        assert len(keep) == count
        assert torch.all(keep.diff() > 0)
        of = (keep // 12).bincount(minlength=4)
        assert of.min() >= min(1, count // 4)
        assert of[2] == of.max()
        assert of[[0, 1, 3]].max() - of[[0, 1, 3]].min() <= 1


def test_identical_frames_keep_the_same_places():
    values = video(1, seed=3).repeat(1, 3, 1)
    keep = FrameUniqueness()(Features.of_grid(values, (3, 3, 4), {}), 12).keep[0]
    assert keep.view(3, 4).sub(torch.arange(3)[:, None] * 12).unique(dim=0).shape == (1, 4)


def test_an_image_is_one_frame_and_frames_may_differ_in_size():
    values = torch.randn(2, 14, 6, generator=torch.Generator().manual_seed(4))
    assert FrameUniqueness()(Features.of_grid(values, (2, 7), {}), 5).keep.shape == (2, 5)
    frame = torch.tensor([0] * 4 + [2] * 10)  # nothing is left of frame 1
    place = torch.arange(14)
    seen = Features(values, frame.expand(2, -1), place.expand(2, -1), place.expand(2, -1))
    for count in range(1, 15):
        assert FrameUniqueness()(seen, count).keep.shape == (2, count)
    of = FrameUniqueness(temperature=1e6)(seen, 7).keep < 4  # all frames alike: in proportion to their size
    assert of.sum(1).tolist() == [2, 2]


def test_videos_of_a_batch_do_not_mix():
    values = torch.cat([video(4, seed=5), video(4, seed=6)])
    rule = FrameUniqueness()
    both = rule(Features.of_grid(values, (4, 3, 4), {}), 17).keep
    for i in range(2):
        alone = rule(Features.of_grid(values[i : i + 1], (4, 3, 4), {}), 17).keep
        assert torch.equal(alone[0], both[i])


def test_frames_of_a_model_share_one_budget():
    model = mustdrop.patch(clone("qwen2_5_vl"), "vidcom2", keep=0.25)
    answer(model, batch(registry()["qwen2_5_vl"], model, (("video",), ("video", "image"), ())), steps=2)
    trace = mustdrop.trace(model)
    assert trace.tokens[0].tolist() == [int(total * 0.25) for total in trace.total.tolist()]


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"channels": 0}, {"channels": 1.2}])
def test_knobs_are_checked(knobs):
    with pytest.raises(ConfigError):
        find("vidcom2", **knobs)
