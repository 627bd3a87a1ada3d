"""CDPruner against determinants written out, and where the kernel has no rank left."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, UnsupportedOptionError
from mustdrop.method import find
from mustdrop.methods.cdpruner import ConditionalDeterminant
from mustdrop.pruners import Features
from mustdrop.pruners.importance import relevance
from mustdrop.rules.diversity import greedy_determinant
from support.builders import answer
from support.families import batch, clone


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def greedy(x, quality, count):
    """The largest determinant at every step, each computed from nothing, in float64."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    kernel = quality.double()[:, None] * (x @ x.T) * quality.double()
    picks = []
    while len(picks) < count:
        others = [i for i in range(len(x)) if i not in picks]
        volume = [float(torch.linalg.det(kernel[[*picks, i]][:, [*picks, i]])) for i in others]
        picks.append(others[volume.index(max(volume))])
    return picks


def test_picks_are_the_greedy_determinants_for_every_row_of_a_batch():
    x, quality = random(3, 20, 12), torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) + 0.05
    assert greedy_determinant(x, quality, 10).tolist() == [greedy(*row, 10) for row in zip(x, quality, strict=True)]


def test_relevance_decides_among_orthogonal_features_and_duplicates_wait():
    x = torch.eye(3)[[0, 0, 1, 2]][None]
    quality = torch.tensor([[0.9, 1.0, 0.2, 0.5]])
    assert greedy_determinant(x, quality, 4).tolist() == [[1, 3, 2, 0]]


def test_past_the_rank_the_most_relevant_of_the_rest_follow():
    x = random(2, 40, 3)  # rank 3
    quality = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) + 0.1
    picks = greedy_determinant(x, quality, 40)
    assert picks.sort(1).values.tolist() == [list(range(40))] * 2
    rest = quality.gather(1, picks[:, 3:])
    assert torch.all(rest[:, :-1] >= rest[:, 1:])


@pytest.mark.parametrize("x", [torch.ones(1, 6, 4), torch.zeros(1, 6, 4)], ids=["equal", "zero"])
def test_features_that_cannot_be_told_apart_go_by_relevance_then_by_place(x):
    quality = torch.tensor([[0.1, 0.3, 0.3, 0.2, 0.5, 0.1]])
    assert greedy_determinant(x, quality, 6).tolist() == [[4, 1, 2, 3, 0, 5]]


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5, 1e-3])
def test_near_duplicates_give_no_nan_and_exactly_as_many_picks(noise):
    base = random(1, 25, 16).repeat(1, 8, 1)
    x = base + noise * random(1, 200, 16, seed=3)
    picks = greedy_determinant(x, torch.full((1, 200), 1e-6), 150)
    assert picks.unique().numel() == 150
    assert (picks[0, :16] % 25).unique().numel() == 16  # of a cluster one, as long as there is rank


def test_the_scale_of_relevance_changes_nothing():
    x, quality = random(1, 50, 32), torch.rand(1, 50, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(greedy_determinant(x, quality, 30), greedy_determinant(x, quality * 1024, 30))


def test_relevance_is_the_mean_cosine_with_the_words():
    values, words = random(2, 9, 5), (random(3, 5, seed=1), random(7, 5, seed=2))
    expected = [
        torch.cosine_similarity(view[:, None], asked[None], dim=2).mean(1)
        for view, asked in zip(values, words, strict=True)
    ]
    torch.testing.assert_close(relevance(values, words), torch.stack(expected))
    assert relevance(values, (random(0, 5), random(0, 5))).eq(0).all()


def test_quality_is_scaled_per_view_and_equal_relevances_leave_diversity_alone():
    rule = ConditionalDeterminant()
    scaled = rule.quality(torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]]))
    torch.testing.assert_close(scaled, torch.tensor([[5e-6, 0.500005, 1.000005], [1.0, 1.0, 1.0]]))
    flat = ConditionalDeterminant(theta=0).quality(torch.tensor([[0.1, 0.2, 0.3]]))
    assert flat.tolist() == [[1.0, 1.0, 1.0]]
    strong = ConditionalDeterminant(theta=0.999).quality(torch.tensor([[0.1, 0.2, 0.3]]))
    assert 0 < float(strong[0, 0]) <= float(strong[0, 1]) < float(strong[0, 2]) == 1


def test_the_question_turns_the_choice():
    values = torch.eye(4)[[0, 0, 1, 2, 3]][None] + 0.01 * random(1, 5, 4)
    pick = {}
    for word in range(4):
        seen = Features.of_grid(values, (1, 5), {}, (torch.eye(4)[word][None],))
        pick[word] = ConditionalDeterminant()(seen, 1).keep.item()
    assert pick[0] in (0, 1)
    assert [pick[word] for word in (1, 2, 3)] == [2, 3, 4]


def test_a_missing_or_other_question_is_an_error():
    seen = Features.of_grid(random(1, 6, 4), (2, 3), {})
    with pytest.raises(ConfigError, match="question"):
        ConditionalDeterminant()(seen, 2)
    seen = Features.of_grid(random(1, 6, 4), (2, 3), {}, (random(2, 5),))
    with pytest.raises(ConfigError, match=r"\(words, 4\)"):
        ConditionalDeterminant()(seen, 2)


def test_in_a_model_other_words_keep_other_tokens():
    model = mustdrop.patch(clone("llava"), "cdpruner", keep=0.2)
    inputs = batch(registry()["llava"], model, (("image",), ("image",)))
    after = inputs["input_ids"].shape[1] - 3
    kept = []
    for word in (5, 9):
        inputs["input_ids"][:, after:] = word
        answer(model, inputs, steps=1)
        kept.append(mustdrop.trace(model).kept(0, 0).tolist())
    assert kept[0] != kept[1]
    with pytest.raises(UnsupportedOptionError, match="question"):
        model.get_image_features(inputs["pixel_values"])


def test_knobs_are_checked():
    with pytest.raises(ConfigError, match="theta"):
        find("cdpruner", theta=1.0)
