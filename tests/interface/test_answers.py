"""What somebody's own scorer or rule returns is checked, and refused by class with what came and what is expected."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, errors
from mustdrop.pruners import (
    CacheScorer,
    InnerRule,
    ObservationWindow,
    Read,
    Received,
    Seen,
    Selection,
    TextScorer,
    VisionRule,
    answers,
)
from support.builders import anatomy, answer, batch, clone

NAN = float("nan")


def text_scorer(**answers):
    """A scorer of these answers, the attention's mean where nothing else is said."""

    class Mine(TextScorer):
        def score(self, seen):
            return answers.get("score", lambda seen: seen.attention.mean(1))(seen)

        def raters(self, embeds, vision, text):
            return answers.get("raters", lambda text: text)(text)

        if "choose" in answers:

            def choose(self, seen, count, protected=None, importance=None):
                return answers["choose"](seen, count)

    return {"prefill": PrefillPruner(keep=0.5, layers=(1,), score=Mine())}


def vision_rule(choose):
    class Mine(VisionRule):
        def choose(self, seen, count):
            return choose(seen, count)

    return {"vision": VisionStagePruner(window=None, key_share=0, keep=0.5, score=Mine())}


def inner_rule(**answers):
    class Mine(InnerRule):
        def amounts(self, patches, target, layers):
            return answers.get("amounts", lambda layers: [4] + [0] * (layers - 1))(layers)

        def join(self, keys, number, protected):
            return answers.get("join", _last_ones_join)(keys, number)

        def choose(self, seen, count):
            return Selection.best(seen.values.mean(2), count)

    return {"vision": VisionStagePruner(window=None, key_share=0, keep=0.5, score=Mine())}


def _last_ones_join(keys, number):
    left = keys.shape[1] - number
    return torch.arange(keys.shape[1]).clamp(max=left - 1).expand(len(keys), -1), left


def cache_scorer(**answers):
    class Mine(CacheScorer):
        by_row = "gather" in answers
        by_layer = "budgets" in answers

        def rows(self, text, prompt):
            return answers.get("rows", lambda text: text)(text)

        def gather(self, attention, own):
            return answers["gather"](attention)

        def add(self, known, step):
            return answers.get("add", lambda step: step)(step)

        def score(self, read, vision):
            return answers.get("score", lambda read: read.given)(read)

        def budgets(self, mass, count, entries):
            return answers["budgets"](count, entries)

    steps = "add" in answers
    return {"decode": DecodeCachePruner(keep=0.5, score=Mine(), after_prefill=not steps, interval=2)}


GOOD = {
    "score": text_scorer(),
    "half_precision": text_scorer(score=lambda seen: seen.attention.mean(1).half()),
    "rubbish_on_text": text_scorer(score=lambda seen: seen.attention.mean(1).masked_fill(~seen.alive, NAN)),
    "choose": text_scorer(choose=lambda s, n: s.alive & (s.alive.cumsum(1) <= n[:, None])),
    "raters": text_scorer(raters=lambda text: text & (text.cumsum(1) > 1)),
    "rule": vision_rule(lambda s, n: Selection.best(s.values.mean(2), n)),
    "rule_out_of_order": vision_rule(lambda s, n: Selection(_first(s, n).flip(1))),
    "inner": inner_rule(),
    "cache": cache_scorer(),
    "gather": cache_scorer(gather=lambda attention: attention.amax(1)),
    "add": cache_scorer(add=lambda step: Received(2 * step.given, step.queries)),
    "budgets": cache_scorer(budgets=lambda count, entries: count.expand_as(entries).clone()),
}

FLOAT = r"expected a float tensor of shape \(\d+, \d+\)"
LONG = r"expected a long tensor of shape \(\d+, \d+\)"
BOOL = r"expected a bool tensor of shape \(\d+, \d+\)"

BAD = {
    "scalar": (text_scorer(score=lambda seen: seen.attention.mean()), rf"score: {FLOAT}.*shape \(\)"),
    "column": (text_scorer(score=lambda seen: seen.attention.mean(1)[:, :1]), rf"score: {FLOAT}.*shape \(2, 1\)"),
    "row_means": (text_scorer(score=lambda seen: seen.attention.mean(2)), rf"score: {FLOAT}"),
    "nan": (text_scorer(score=lambda seen: seen.attention.mean(1) * NAN), "score: expected finite.*first is nan"),
    "one_nan": (
        text_scorer(score=lambda seen: seen.attention.mean(1).index_fill(1, torch.tensor([9]), torch.inf)),
        "score: expected finite.*first is inf",
    ),
    "nothing": (text_scorer(score=lambda seen: None), "score: .*got None"),
    "a_list": (text_scorer(score=lambda seen: [1.0]), "score: .*got a list"),
    "a_mask_as_score": (text_scorer(score=lambda seen: seen.alive), rf"score: {FLOAT}.*bool"),
    "scores_as_choice": (text_scorer(choose=lambda s, n: s.attention.mean(1)), f"choose: {BOOL}.*float32"),
    "too_many": (text_scorer(choose=lambda s, n: s.alive), "choose: expected .* vision tokens per sample"),
    "text_chosen": (text_scorer(choose=lambda s, n: ~s.alive), "choose: expected .* vision tokens per sample"),
    "raters_float": (text_scorer(raters=lambda text: text.float()), f"raters: {BOOL}"),
    "raters_short": (text_scorer(raters=lambda text: text[:, :-1]), f"raters: {BOOL}"),
    "raters_vision": (text_scorer(raters=torch.ones_like), "raters names tokens that are not among the text"),
    "rule_tensor": (vision_rule(lambda s, n: s.values.mean(2)), "choose returned a tensor.*expected a Selection"),
    "rule_none": (vision_rule(lambda s, n: None), "choose returned None.*expected a Selection"),
    "best_of_scalar": (vision_rule(lambda s, n: Selection.best(s.values.mean(), n)), r"choose: Selection\.best ranks"),
    "best_of_column": (vision_rule(lambda s, n: Selection.best(s.values.mean(2)[:, :1], n)), f"score.*{FLOAT}"),
    "best_of_nan": (vision_rule(lambda s, n: Selection.best(s.values.mean(2) * NAN, n)), "expected finite"),
    "too_few": (vision_rule(lambda s, n: Selection.best(s.values.mean(2), n - 1)), "asked for 18 of 36.*returned 17"),
    "keep_flat": (vision_rule(lambda s, n: Selection(torch.arange(n))), rf"Selection\.keep: {LONG}"),
    "keep_int32": (vision_rule(lambda s, n: Selection(_first(s, n).int())), rf"Selection\.keep: {LONG}.*int32"),
    "keep_outside": (
        vision_rule(lambda s, n: Selection(_first(s, n) + 30)),
        r"\.keep: expected features 0 to 35",
    ),
    "keep_twice": (vision_rule(lambda s, n: Selection(_first(s, n) // 2)), "each once"),
    "into_short": (
        vision_rule(lambda s, n: Selection(_first(s, n), merge_into=_first(s, n))),
        rf"Selection\.merge_into: {LONG}",
    ),
    "into_outside": (
        vision_rule(lambda s, n: Selection(_first(s, n), merge_into=_first(s, 36))),
        r"Selection\.merge_into: expected columns 0 to 17",
    ),
    "blend_all": (
        vision_rule(lambda s, n: Selection(_first(s, n), blend=lambda x: x)),
        r"Selection\.blend: expected a float tensor of shape \(\d+, 18, \d+\)",
    ),
    "blend_nan": (
        vision_rule(lambda s, n: Selection(_first(s, n), blend=lambda x: x[:, :18] * NAN)),
        r"Selection\.blend: expected finite",
    ),
    "amounts_short": (inner_rule(amounts=lambda layers: [1]), "amounts: expected 3 ints"),
    "amounts_all": (inner_rule(amounts=lambda layers: [36] + [0] * (layers - 1)), "together less than the 36 patches"),
    "amounts_float": (inner_rule(amounts=lambda layers: [1.0] * layers), "amounts: expected 3 ints"),
    "join_tensor": (inner_rule(join=lambda keys, number: keys), "join returned a tensor.*expected a tuple"),
    "join_keys": (inner_rule(join=lambda keys, number: (keys, 30)), f"join: {LONG}"),
    "join_outside": (
        inner_rule(join=lambda keys, number: (_last_ones_join(keys, 0)[0], 30)),
        "join: expected slots 0 to 29",
    ),
    "join_protected": (
        inner_rule(join=lambda keys, number: (torch.zeros(keys.shape[:2]).long(), 30)),
        "the first 1 for the tokens at the front",
    ),
    "cache_scalar": (cache_scorer(score=lambda read: read.given.mean()), rf"score: {FLOAT}.*shape \(\)"),
    "cache_column": (cache_scorer(score=lambda read: read.given[:, :1]), rf"score: {FLOAT}"),
    "cache_nan": (cache_scorer(score=lambda read: read.given * NAN), "score: expected finite"),
    "cache_none": (cache_scorer(score=lambda read: None), "score: .*got None"),
    "rows_float": (cache_scorer(rows=lambda text: text.float()), f"rows: {BOOL}"),
    "rows_padding": (cache_scorer(rows=torch.ones_like), "rows names rows that are padding"),
    "gather_rows": (cache_scorer(gather=lambda attention: attention), f"gather: {FLOAT}"),
    "add_tensor": (cache_scorer(add=lambda step: step.given), r"add returned a tensor.*expected a Received"),
    "add_short": (
        cache_scorer(add=lambda s: Received(s.given[:, :1], s.queries)),
        rf"Received\.given: {FLOAT}",
    ),
    "add_nan": (
        cache_scorer(add=lambda s: Received(s.given * NAN, s.queries)),
        r"Received\.given: expected finite",
    ),
    "budgets_flat": (cache_scorer(budgets=lambda count, entries: count), rf"budgets: {LONG}"),
    "budgets_float": (cache_scorer(budgets=lambda count, entries: entries.float()), rf"budgets: {LONG}"),
    "budgets_all": (cache_scorer(budgets=lambda count, entries: entries), "budgets: expected .* in the mean"),
}


def _first(seen, count):
    return torch.arange(count).expand(len(seen.values), -1)


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_taken(name):
    model = mustdrop.patch(clone(), **GOOD[name])
    answer(model, _padded(), steps=6)
    assert mustdrop.last_trace(model).dropped_anything


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_by_name_and_the_model_goes_on(name):
    setup, says = BAD[name]
    model = mustdrop.patch(clone(), **setup)
    with pytest.raises(errors.ConfigError, match=f"(?s)^Mine[.].*{says}"):
        answer(model, _padded(), steps=6)
    good = mustdrop.patch(model, "random", keep=9)
    answer(good, _padded(), steps=1)
    assert mustdrop.last_trace(good).tokens[0].tolist() == [9, 9]


def _padded():
    """Two rows of which one is padded."""
    from support.builders import LLAMA

    return batch(LLAMA, (1, 1), after=(8, 5))


def test_a_wrong_answer_of_a_first_call_leaves_nothing_behind():
    model = clone()
    answer(model, _padded(), steps=1)  # transformers' own hooks come with the first call
    before = anatomy(model)
    mustdrop.patch(model, **BAD["nan"][0])
    with pytest.raises(errors.ConfigError):
        answer(model, _padded(), steps=1)
    assert anatomy(mustdrop.unpatch(model)) == before


def test_an_own_pruner_returns_a_selection():
    class Own(PrefillPruner):
        def __call__(self, attention, alive=None, **options):
            return alive

    with pytest.raises(errors.ConfigError, match=r"Own returned a Tensor, expected a Selection: Selection\.from_mask"):
        answer(mustdrop.patch(clone(), prefill=Own(keep=0.5, layers=(1,))), batch(), steps=1)
    assert Selection is mustdrop.Selection


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"rows": "all"}, 'rows "text", "last" or "none".*rows=\'all\''),
        ({"reads": frozenset({"values"})}, "reads among"),
        ({"reads": "keys"}, "reads among"),
    ],
)
def test_a_text_scorer_reads_what_there_is(members, says):
    made = type("Mine", (TextScorer,), members)
    with pytest.raises(errors.ConfigError, match=f"Mine: .*{says}"):
        made()


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"reads": property(lambda self: Read())}, r"reads: expected a tuple of Read"),
        ({"reads": property(lambda self: ("keys",))}, r"reads: expected a tuple of Read"),
        ({"space": "pixels"}, 'space: expected "encoder" or "language"'),
    ],
)
def test_a_vision_rule_reads_what_there_is(members, says):
    made = type("Mine", (VisionRule,), members)
    with pytest.raises(errors.ConfigError, match=f"Mine.{says}"):
        made()


def test_on_plain_tensors_too():
    attention = torch.rand(2, 3, 8).softmax(-1)
    pruner = text_scorer(score=lambda seen: seen.attention.mean())["prefill"]
    with pytest.raises(errors.ConfigError, match=r"Mine\.score"):
        pruner(attention, count=3)


def test_where_the_models_own_numbers_are_not_finite_the_message_says_so():
    scorer = text_scorer()["prefill"].score
    alive = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(errors.ConfigError, match="the model's own overflow"):
        answers.scores(scorer, Seen(torch.full((1, 2, 4), NAN), alive))


class _Elsewhere:
    """Stands in for a tensor on an accelerator."""

    device = torch.device("cuda")


def test_on_an_accelerator_numbers_are_looked_at_once_per_model():
    scorer = text_scorer()["prefill"].score
    assert answers._looks(scorer, "score", _Elsewhere)
    assert not answers._looks(scorer, "score", _Elsewhere)
    assert answers._looks(scorer, "choose", _Elsewhere)
    mustdrop.patch(clone(), prefill=PrefillPruner(keep=0.5, layers=(1,), score=scorer))
    assert answers._looks(scorer, "score", _Elsewhere)
    assert not answers._looks(ObservationWindow(), "score", _Elsewhere)  # mustdrop's own are tested here
