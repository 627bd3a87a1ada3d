"""SparseVLM's pieces on small cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.pruners import PrefillPruner, Raters, Recycling, Seen
from mustdrop.rules.clusters import density_peaks


def test_clusters_of_two_far_groups_are_the_groups():
    x = torch.tensor([[0.0], [1.0], [2.0], [64.0], [65.0], [66.0]])  # all densities tie: the lower index is denser
    centres, member = density_peaks(x, 2)
    assert sorted(centres.tolist()) == [0, 3]
    assert [int(centres[m]) for m in member] == [0, 0, 0, 3, 3, 3]


def test_sizes_are_those_of_the_released_code():
    assert Recycling().sizes(276) == (83, 9)  # int(0.3 * 276) + 1, int(83 / 10) + 1
    assert Recycling().sizes(1) == (1, 1)
    assert Recycling().sizes(0) == (0, 0)


@pytest.mark.parametrize("present", [2, 3, 7, 40, 576])
def test_kept_tokens_and_clusters_never_exceed_the_budget_and_meet_it(present):
    recycling = Recycling()
    for count in range(1, present):
        kept = recycling.kept(present, count)
        if kept:
            assert kept + recycling.sizes(present - kept)[1] == count


def test_a_cluster_takes_the_place_of_its_centre_or_in_the_released_order_comes_last():
    keep = torch.tensor([[False, False, False, True]])
    hidden = torch.tensor([[[0.0], [1.0], [2.0], [5.0]]])
    score = torch.tensor([[0.3, 0.2, 0.1, 0.9]])
    alive = torch.ones_like(keep)
    rule = Recycling(share=0.9)
    selection = rule(keep, alive, score, hidden)
    assert selection.keep.tolist() == [[0, 3]]  # a single cluster: densities tie
    assert selection.apply(hidden)[0].tolist() == [[1.0], [5.0]]
    released = rule(keep, alive, score, hidden, released=True)
    assert released.keep.tolist() == [[3, 0]]
    assert released.apply(hidden)[0].tolist() == [[5.0], [1.0]]


def test_raters_are_the_words_that_the_picture_resembles():
    embeds = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 1.0]]])
    vision = torch.tensor([[True, True, False, False, False]])
    text = torch.tensor([[False, False, True, True, True]])
    assert Raters().raters(embeds, vision, text).tolist() == [[False, False, True, False, False]]


def test_the_score_is_the_mean_over_raters_and_padding_rows_do_not_count():
    attention = torch.tensor([[[0.0, 0.0], [0.2, 0.4], [0.4, 0.4]]])
    seen = Seen(attention, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(Raters().score(seen), torch.tensor([[0.3, 0.4]]))


def test_released_needs_a_number_of_tokens():
    with pytest.raises(ConfigError, match="survivors"):
        find("sparsevlm", compat="released")
    with pytest.raises(ConfigError, match="one way"):
        PrefillPruner(keep=0.5, survivors=(3,))
