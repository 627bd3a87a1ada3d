"""The heart of the suite: run the patched model, read its trace, and ask the masked oracle for the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mustdrop

from .builders import IMAGE, LLAMA, Answer, Variant, answer, batch, clone, plain
from .families import STAND_INS, oracles
from .oracle import CacheWatch, Hidden, MaskedOracle, hidden_by
from .reference_tower import encode

TOLERANCE = 1e-5  # float32


def patched(variant: Variant = LLAMA, attn: str = "sdpa", method: str | None = None, **settings: Any) -> Any:
    """A patched clone. Flash and flex attention need the ``flash`` and the ``flex`` fixture."""
    model = clone(variant, oracles(attn))
    if attn in STAND_INS:
        STAND_INS[attn].use(model)
    return mustdrop.patch(model, method, **settings) if method else mustdrop.patch(model, **settings)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).detach().abs().max().item()


@dataclass(frozen=True)
class Compared:
    """Both sides of one comparison."""

    ours: Answer
    oracle: Answer
    hidden: Hidden
    trace: Any


def merged_features(
    variant: Variant,
    inputs: dict[str, Tensor],
    trace: Any,
    vision: Any,
    repeat: int = 1,
    model: Any = None,
    differentiable: bool = False,
) -> Tensor | None:
    """(images, N, D): what the reference tower gives, in the rows of all its members; None if nothing can merge.

    ``repeat`` is how many rows of the trace belong to one prompt (beams, ``num_return_sequences``). ``model`` is the
    plain model whose tower is meant, if not the shared one.
    """
    if vision is None or vision.window is None or "pixel_values" not in inputs:
        return None
    model, n = model or plain(variant), variant.n_vision
    run = encode.__wrapped__ if differentiable else encode
    features = torch.zeros(len(inputs["pixel_values"]), n, model.config.text_config.hidden_size, dtype=model.dtype)
    image = 0
    for row, total in enumerate((inputs["input_ids"] == IMAGE).sum(1).tolist()):
        entered = trace.kept(0, row * repeat)
        for first in range(0, total, n):
            alive = int(((entered >= first) & (entered < first + n)).sum())
            threshold, least = vision.threshold, alive
            if vision.merge_count == "budget":  # the most similar windows merge, a share of all at most
                windows = int((variant.grid // vision.window) ** 2 * vision.merge_share + 1e-9)
                threshold, least = -1.0, max(alive, n - windows * (vision.window**2 - 1))
            encoded = run(
                model,
                inputs["pixel_values"][image],
                window=vision.window,
                threshold=threshold,
                layer=vision.layer,
                at_least=least,
            )
            for feature, members in zip(encoded.features, encoded.members, strict=True):
                features[image, members] = feature
            image += 1
    return features


def compare(
    model: Any,
    inputs: dict[str, Tensor],
    variant: Variant = LLAMA,
    attn: str = "sdpa",
    *,
    vision: Any = None,
    decode: Any = None,
    steps: int = 8,
    oracle_model: Any = None,
    **options: Any,
) -> Compared:
    """``generate`` on the patched model and on the oracle. ``vision`` and ``decode`` are the pruners in use, if any.

    ``oracle_model`` is an unpatched model with the weights of ``model``, if these are not the variant's.
    """
    oracle_model = oracle_model or plain(variant, oracles(attn))
    # the oracle masks logical positions in a growing cache, whatever cache the patched model is given
    plainly = {
        k: v for k, v in options.items() if k not in ("cache_implementation", "past_key_values", "compile_config")
    }
    repeat = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    ids = inputs["input_ids"].repeat_interleave(repeat, 0)
    with CacheWatch(model) as watch:
        ours = answer(model, inputs, steps, **options)
    trace = mustdrop.trace(model)
    hidden = hidden_by(
        trace, ids, variant.n_layers, cascade_from=decode.full_layers if decode and decode.cascade else None
    )
    features = merged_features(variant, inputs, trace, vision, repeat, oracle_model)
    if decode is not None and decode.keep is not None:
        with MaskedOracle(oracle_model, Hidden(hidden.prefill, hidden.prefill), features) as oracle:
            answer(oracle_model, inputs, 0, **plainly)
        hidden = watch.hidden_while_decoding(oracle.prompt_keys, ids, hidden)
    with MaskedOracle(oracle_model, hidden, features):
        theirs = answer(oracle_model, inputs, steps, **plainly)
    return Compared(ours, theirs, hidden, trace)


def assert_dropping_equals_masking(*args: Any, **options: Any) -> Compared:
    """Logits within 1e-5 at the prefill and at every decode step, equal tokens, and something was dropped."""
    both = compare(*args, **options)
    assert both.hidden.anything, "nothing was dropped: this comparison proves nothing"
    difference = (both.ours.logits - both.oracle.logits).abs().amax((0, 2))
    assert difference.max() <= TOLERANCE, f"largest difference of the logits per step: {difference.tolist()}"
    assert torch.equal(both.ours.sequences, both.oracle.sequences)
    return both


def assert_masking_up_to_rounding(*args: Any, tolerance: float, **options: Any) -> Compared:
    """For types and weights that round: logits within `tolerance` for as long as both chose the same tokens.

    The first differing choice ends the comparison of a row: what the two then see differs. Its own logits are still
    compared, so a choice may only differ where the oracle's two best logits are that close.
    """
    both = compare(*args, **options)
    assert_up_to_rounding(both, tolerance)
    return both


def assert_up_to_rounding(both: Any, tolerance: float) -> None:
    """As :func:`assert_masking_up_to_rounding`, of a comparison that was made."""
    assert both.hidden.anything, "nothing was dropped: this comparison proves nothing"
    steps = both.ours.logits.shape[1]
    same = (both.ours.sequences == both.oracle.sequences)[:, -steps:].long()
    seen = torch.cat([torch.ones_like(same[:, :1]), same.cumprod(1)[:, :-1]], 1).bool()
    assert bool(seen[:, 0].all())
    difference = (both.ours.logits - both.oracle.logits).abs().amax(2) * seen
    assert difference.max() <= tolerance, f"largest difference of the logits per row and step: {difference.tolist()}"
    assert int(seen.sum()) > seen.numel() // 2, "the answers part too early to prove much"


__all__ = [
    "Compared",
    "assert_dropping_equals_masking",
    "assert_masking_up_to_rounding",
    "assert_up_to_rounding",
    "batch",
    "compare",
    "distance",
    "merged_features",
    "patched",
]
