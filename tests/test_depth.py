"""From a hook to the maths it is a short way: at most ten frames of ours lie between the two, whatever the method.

The maths are the methods, their rules and scorers, the kernels, the cache layers, and the tables that these make. A
comprehension is no frame: since Python 3.12 it has none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mustdrop
from support.builders import answer
from tests.families import build, fixture_of, inputs_of

PACKAGE = str(Path(mustdrop.__file__).parent)
MODULE = str(Path(torch.nn.modules.module.__file__))
MOST = 10
MATHS = (
    *("methods/", "rules/", "kernels/", "kv/", "constants.py", "indices.py", "layout.py", "selection.py"),
    *("pruners/importance.py", "pruners/cache_scorers.py", "pruners/text_scorers.py", "pruners/answers.py"),
)
# their first filter follows too late a layer of so shallow a model for the default budget
DEEP = {"dart": 0.6, "fastv": 0.6, "pyramiddrop": 0.8, "sparsevlm": 0.8, "flashvid": 0.6, "vscan": 0.6}
# one needs a trained scorer, the other packed patches; their ways are those of divprune and of mustdrop
APART = {"learned", "pixelprune"}


class Depth(TorchDispatchMode):
    """The longest chain of frames of the package from a module's call, or from `generate`, to an operation."""

    def __init__(self):
        super().__init__()
        self.longest: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        frame, chain = sys._getframe(1), []
        while (
            frame is not None and frame.f_code.co_filename != MODULE and "transformers" not in frame.f_code.co_filename
        ):
            if frame.f_code.co_filename.startswith(PACKAGE):
                place = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
                if (chain or not place.startswith(MATHS)) and not frame.f_code.co_name.endswith("comp>"):
                    chain.append(f"{place}:{frame.f_code.co_name}")
            frame = frame.f_back
        if len(chain) > len(self.longest):
            self.longest = chain
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", sorted({*mustdrop.list_methods()} - APART))
def test_few_frames_lie_between_a_hook_and_an_operation(family, method):
    model = build(family)
    (size, *_) = fixture_of(family).sizes("image")
    picture = torch.rand(*size, generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(family, model, "image", [picture])
    knobs = {"keep": DEEP[method]} if method in DEEP else {}
    with mustdrop.patched(model, method, **knobs), Depth() as depth:
        answer(model, inputs, steps=3)
    assert len(depth.longest) <= MOST, "\n".join(depth.longest)
