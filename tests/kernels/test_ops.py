"""The operations as the rest of the library sees them: registration, choice of implementation, gradients, the trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mustdrop
from kernels import checks
from mustdrop import PrefillPruner, errors, kernels
from mustdrop.kernels import dispatch, reference, reference_tokens
from mustdrop.selection import Selection
from support.builders import LLAMA, answer, batch
from support.largest import Largest
from support.masking_check import patched


def arguments():
    """One call of every operation, in plain arguments."""
    torch.manual_seed(0)
    q, k, rows, visible = checks.inputs("cpu", 20, torch.float32, 4, 2, 16, 5, 2, "ragged")
    x, index = torch.randn(2, 12, 8), torch.arange(12).view(3, 4)
    slot, keep = torch.randint(-1, 3, (2, 12)), torch.tensor([[0, 3], [-1, 5]])
    return {
        "row_probabilities": (q, k, rows, visible, 0.3, None, None, 4),
        "text_statistics": (q, k, rows, visible, 0.3, None, 5.0, 4),
        "text_sums": (q, k, rows, visible, 0.3, None, 5.0, 4),
        "key_scores": (q[:, :, 0], k, visible[:, 0], 0.3),
        "received_attention": (k, k, visible[:, 0], 0.3),
        "window_similarity": (x, index),
        "merge_tokens": (x, slot, 3, None),
        "best_match": (x[:, ::2], x[:, 1::2]),
        "bipartite_slots": (k, 3, 1, torch.tensor([3, 5]), torch.tensor([20, 13])),
        "merge_sized": (x, slot, 3, torch.rand(2, 12), slot.argsort(1)),
        "followed": ([slot, slot[:, :3]],),
        "farthest_first": (x, 5, slot >= 0, torch.tensor([5, 3]), torch.rand(2, 12), torch.rand(2, 12), slot.argmax(1)),
        "greedy_determinant": (x, torch.rand(2, 12), 5, slot >= 0, None),
        "greedy_coverage": (x @ x.mT, 5, torch.rand(2, 12), slot >= 0, torch.tensor([5, 3]), torch.rand(2, 12)),
        "without_duplicates": (x, slot.argsort(1), 3, 2),
        "select": (torch.rand(2, 2, 12), slot >= 0, torch.tensor([4, 2]), 4, slot == 0, torch.rand(2, 12), 2.0),
        "gather_rows": ([x, x[:1]], keep, True),
        "cut_mask": (torch.rand(1, 1, 12, 12), keep, keep),
        "compact": ([k, k[:, :1]], keep),
        "compact_each": ([k, k[:, :1]], torch.stack([keep, keep]), torch.tensor([2, 1]), [2, 1]),
    }


def op(name):
    """The operation as torch knows it."""
    return getattr(torch.ops.mustdrop, name).default


@pytest.fixture
def auto(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced", [])
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", arguments())
def test_torch_accepts_the_registration(name):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op(name), arguments()[name], test_utils=tests)


@pytest.mark.parametrize("name", arguments())
def test_compiled_code_sees_one_operation_and_no_break(name):
    given = arguments()[name]
    function = getattr(kernels, name)
    torch._dynamo.reset()
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(got, function(*given))


@pytest.mark.parametrize("name", arguments())
def test_shapes_on_a_device_are_known_without_one(name):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")  # noqa: E731
        given = torch.utils._pytree.tree_map_only(torch.Tensor, move, arguments()[name])
        got = torch.utils._pytree.tree_leaves(op(name)(*given))
    assert mode is not None
    expected = torch.utils._pytree.tree_leaves(getattr(kernels, name)(*arguments()[name]))
    assert [(t.shape, t.dtype, t.device.type) for t in got] == [(t.shape, t.dtype, "cuda") for t in expected]


@pytest.mark.parametrize("keys", [1, 63, 577])
def test_the_references_follow_the_definition(keys, monkeypatch):
    q, k, rows, visible = checks.inputs("cpu", keys, torch.float32, 4, 2, 16, 7, 2, "ragged")
    expected = checks.probabilities(q, k, rows, visible, 0.3, first=keys // 2)
    for chunk in (reference._CHUNK, 1):  # all rows at once, and one by one
        monkeypatch.setattr(reference, "_CHUNK", chunk)
        checks.close(reference.row_probabilities(q, k, rows, visible, 0.3, first=keys // 2), expected,
                     "probability", torch.float32)  # fmt: skip
        both = torch.stack([expected.sum(1), expected.amax(1)], 1)
        checks.close(reference.text_statistics(q, k, rows, visible, 0.3, first=keys // 2), both,
                     "probability", torch.float32)  # fmt: skip


def test_the_reference_matches_in_chunks(monkeypatch):
    a, b = torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    whole = reference_tokens.best_match(a, b)
    monkeypatch.setattr(reference_tokens, "_CHUNK", 1)
    torch.testing.assert_close(reference_tokens.best_match(a, b), whole)


def test_no_reference_makes_anything_larger_than_its_inputs_or_its_result():
    q, k = torch.randn(2, 8, 640, 16), torch.randn(2, 8, 640, 16)
    rows, tokens = torch.arange(512).expand(2, -1), torch.randn(2, 900, 16)
    visible = torch.ones(2, 512, 640, dtype=torch.bool)
    slot = torch.arange(900).expand(2, -1) // 3
    wide = torch.randn(2, 64, 128)  # the similarities of a row's candidates are held, up to 4096 of them
    calls = {
        "row_probabilities": (q, k, rows, visible, 0.3),
        "text_statistics": (q, k, rows, visible, 0.3),
        "text_sums": (q, k, rows, visible, 0.3),
        "key_scores": (q[:, :, 0], k, visible[:, 0], 0.3),
        "received_attention": (q, k, visible[:, 0], 0.3),
        "window_similarity": (tokens, torch.arange(900).view(100, 9)),
        "merge_tokens": (tokens, slot, 300, None),
        "best_match": (tokens[:, ::2], tokens[:, 1::2]),
        "bipartite_slots": (q, 200, 1),
        "merge_sized": (tokens, slot, 300, tokens[..., 0].abs()),
        "followed": ([slot, slot[:, :300] // 2],),
        "farthest_first": (wide, 20),
        "greedy_determinant": (wide, wide[..., 0].abs(), 20),
        "greedy_coverage": (wide, 20),
        "without_duplicates": (wide, slot[:, :64] * 3, 20),
        "select": (tokens[..., 0].double(), slot >= 0, rows[:, 20], 300),
        "gather_rows": ([tokens], slot),
        "cut_mask": (visible[:, None], rows, rows),
        "compact": ([q, k], rows),
        "compact_each": ([q, k], rows[None], torch.tensor([500]), [500]),
    }
    assert set(calls) == set(arguments())
    for name, given in calls.items():
        inputs = [t for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
        with Largest() as largest:
            made = torch.utils._pytree.tree_leaves(op(name)(*given))
        assert largest.nbytes <= max(sum(t.nbytes for t in inputs), *(t.nbytes for t in made)), name


def test_no_launcher_copies_numbers_from_the_host():
    """A capture refuses copies from pageable memory, and a replay would find old addresses in them."""
    folder = Path(kernels.__file__).parent / "triton"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert "def _compact" in sources
    for word in ("torch.tensor(", "torch.as_tensor(", "from_numpy", ".tolist()", ".item()", ".cpu()"):
        assert word not in sources, word


# -- choice -----------------------------------------------------------------------------------------------------------


def test_the_cpu_runs_the_reference(auto):
    assert kernels.implementation(torch.device("cpu")) == "reference"


def test_a_wish_that_cannot_be_met_is_an_error(auto):
    auto.delenv("TRITON_INTERPRET", raising=False)
    auto.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(errors.UnsupportedOptionError, match=r"tensors are on 'cpu'.*MUSTDROP_KERNELS=auto"):
        kernels.window_similarity(torch.randn(1, 4, 3), torch.arange(4)[None])
    auto.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(errors.UnsupportedOptionError, match=r"not installed"):
        kernels.window_similarity(torch.randn(1, 4, 3), torch.arange(4)[None])
    with pytest.raises(errors.UnsupportedOptionError, match="pip install triton"):
        kernels.use_kernels("triton")


def test_other_words_are_an_error(auto):
    with pytest.raises(errors.ConfigError, match="use_kernels: expected one of auto, triton, reference, got 'cuda'"):
        kernels.use_kernels("cuda")
    auto.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(errors.ConfigError, match="MUSTDROP_KERNELS: expected"):
        kernels.chosen()


def test_the_function_overrides_the_variable(auto):
    auto.setenv(dispatch.VARIABLE, "reference")
    assert kernels.chosen() == "reference"
    kernels.use_kernels("auto")
    assert kernels.chosen() == "auto"


def test_float64_is_for_the_reference(auto):
    auto.setattr(dispatch, "_gpu_obstacle", lambda index: None)
    assert kernels.implementation(torch.device("cuda", 0), (torch.float16,)) == "triton"
    assert kernels.implementation(torch.device("cuda", 0), (torch.float64,)) == "reference"


def test_importing_the_library_needs_no_triton():
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import torch, mustdrop
from mustdrop import kernels
assert not kernels.dispatch.has_triton() and "triton" not in sys.modules
assert kernels.window_similarity(torch.ones(1, 4, 3), torch.arange(4)[None]).allclose(torch.ones(1, 1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# -- gradients --------------------------------------------------------------------------------------------------------


def test_gathering_and_merging_carry_gradients():
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    index, slot = torch.tensor([[0, 3], [-1, 5]]), torch.tensor([[0, 0, 1, -1, 1, 1], [1, 0, 0, 0, -1, 1]])
    weight = torch.rand(2, 6, dtype=torch.float64)
    mask = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    cache = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    for function, given in (
        (lambda t: kernels.gather_rows([t, t[:1]], index, True)[0], x),
        (lambda t: kernels.cut_mask(t, index, index), mask),
        (lambda t: kernels.compact([t], index)[0], cache),
    ):
        assert torch.autograd.gradcheck(function, (given,))
    for weights in (None, weight):  # sums are made in float32
        kernels.merge_tokens(x, slot, 2, weights).square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad[0, :3].abs() > 0).all())
    assert bool((x.grad[0, 3] == 0).all())


def test_a_gradient_asks_for_the_reference_even_where_triton_is_forced(auto):
    kernels.use_kernels("triton")
    x = torch.randn(1, 4, 3, requires_grad=True)
    out = Selection(torch.tensor([[0]]), torch.tensor([[True]]), torch.zeros(1, 4, dtype=torch.long)).apply(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.25))


def test_scores_carry_no_gradient():
    given = arguments()["text_statistics"]
    given[0].requires_grad_()
    assert not kernels.text_statistics(*given).requires_grad


# -- in the library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"keep": 4}, {"global_threshold": 0.1, "individual_threshold": 0.02}], ids=["budget", "thresholds"]
)
def test_statistics_choose_what_the_whole_attention_chooses(settings):
    pruner = PrefillPruner(**settings, layers=(0,))
    attention = torch.rand(3, 7, 12, generator=torch.Generator().manual_seed(1)) / 12
    alive = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.8
    count = 4 if "keep" in settings else None
    statistics = torch.stack([attention.sum(1), attention.amax(1)], 1)
    whole = pruner(attention, alive, count=count)
    fewer = pruner.from_statistics(statistics, alive, count=count)
    assert torch.equal(whole.mask(12), fewer.mask(12))


def test_the_rank_rule_needs_every_row():
    pruner = PrefillPruner(scale=1.0, bias=0.0)
    assert pruner.needs_rows
    with pytest.raises(errors.ConfigError, match="every text token"):
        pruner.from_statistics(torch.rand(1, 2, 4), torch.ones(1, 4, dtype=torch.bool))


def test_a_pruner_with_a_rule_of_its_own_gets_every_row():
    class Mine(PrefillPruner):
        seen: ClassVar[list[int]] = []

        def __call__(self, attention, alive=None, **rest):
            self.seen.append(attention.shape[1])
            return super().__call__(attention, alive, **rest)

    assert Mine(keep=4).needs_rows
    assert not PrefillPruner(keep=4).needs_rows


def test_the_trace_says_what_ran():
    model = patched(LLAMA, "sdpa", "mustdrop", keep=0.4)
    answer(model, batch(LLAMA, (1,)))
    trace = mustdrop.trace(model)
    assert trace.kernels == "reference"
    assert trace.to_dict()["kernels"] == "reference"
    assert "kernels              reference" in str(trace)
