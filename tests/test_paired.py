"""The exact test of two runs on the same questions, and the groups of questions by what a smaller picture answers."""

from __future__ import annotations

import pytest

from mustdrop.eval.report.paired import groups, mcnemar, paired


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 0), (3, 9), (40, 25), (700, 800), (8, 8)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_only_questions_that_tell_the_runs_apart_count():
    one, other = [True, True, False, False, True], [True, False, True, False, False]
    found = paired(one, other)
    assert (found.gained, found.lost) == (2, 1)
    assert found.to_dict() == {"gained": 2, "lost": 1, "p": 1.0}
    assert paired([True] * 6, [False] * 6).p == pytest.approx(2 / 2**6)
    with pytest.raises(ValueError, match="shorter"):
        paired(one, other[:-1])


def test_questions_are_grouped_by_what_a_smaller_picture_answers():
    unpruned = [True, True, True, True, False, False]
    smaller = [True, True, False, False, True, False]
    run = [True, False, True, False, True, True]
    found = groups(run, unpruned, smaller)
    assert (found.hard, found.hard_right, found.easy, found.easy_right) == (2, 1, 2, 1)
    assert groups(smaller, unpruned, smaller).shares == (0.0, 1.0)
    assert groups(unpruned, unpruned, smaller).shares == (1.0, 1.0)
    assert groups(run, [False] * 6, smaller).shares == (None, None)
