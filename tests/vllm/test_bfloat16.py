"""In bfloat16 every served family is as near to float32 in vLLM as it is in transformers.

Rounding alone makes the answers of random models differ, so that the probabilities of a given answer are compared; and
it changes what a rule chooses, so that the rule is one that sees no features. Positions beyond 256, which bfloat16 does
not hold, are those of the bundled model (`test_bundled`).
"""

from __future__ import annotations

import copy

import pytest
import torch

from mustdrop.adapters import registry
from mustdrop.integrations.vllm import settings
from support import engines
from support import tiny_checkpoints as tiny
from support.engines import Request

SIDE = tiny.TILE
GIVEN = {"method": "uniform", "keep": 0.5}
# Mean differences of log probabilities from float32: at most so many times that of transformers in bfloat16 (kernels
# round differently, and experts are chosen by what was rounded), and so many times less than that of a prompt with all
# its tokens. One token more or less is seen.
NEAR, FAR = 2, 5


def requests(family):
    one = tiny.picture
    found = [
        Request("w6 w7", [one(0, 2 * SIDE, SIDE)]),
        Request("w11", [one(2, SIDE, SIDE), one(3, SIDE, 2 * SIDE)]),
        Request("w12 w13 w14 w15"),
    ]
    if tiny.FAMILIES[family][2]:
        frames = 5 if family == "llava_onevision" else 6  # its line break must not make the halves uneven
        found.append(Request("w17 w18", [one(7, 2 * SIDE, SIDE)], [tiny.video(1, frames, 48, 32)]))
    return found


def rounded(model, dtype):
    """The model with weights rounded to bfloat16, computing in `dtype`."""
    found = copy.deepcopy(model)
    for parameter in found.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    return found


@pytest.mark.parametrize("family", tuple(tiny.FAMILIES))
def test_as_near_to_float32_as_transformers(family, tmp_path):
    from vllm import SamplingParams

    model, processor = tiny.save(family, tmp_path)
    asked, pruner = requests(family), settings.parse(GIVEN).pruner
    limits = {"dtype": "bfloat16", "max_logprobs": -1}
    sampling = SamplingParams(temperature=0, max_tokens=engines.NEW, ignore_eos=True, logprobs=-1)
    with engines.engine(tmp_path, registry()[family].classes[0], GIVEN, **limits) as llm:
        answered = llm.generate([one.data(family) for one in asked], sampling, use_tqdm=False)
    models = [rounded(model, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for one, tokens, got in zip(asked, engines.tokens(answered), answered, strict=True):
        exact, theirs = (engines.log_probabilities(m, processor, family, one, pruner, tokens) for m in models)
        ours = torch.full_like(exact, torch.nan)
        for row, step in zip(ours, got.outputs[0].logprobs, strict=True):
            row[list(step)] = torch.tensor([value.logprob for value in step.values()])
        error = (ours - exact).abs().mean()
        assert error <= NEAR * (theirs - exact).abs().mean()
        if one.images:  # what it would be with other tokens, here all of them
            whole = engines.log_probabilities(models[0], processor, family, one, None, tokens)
            assert error <= (whole - exact).abs().mean() / FAR
