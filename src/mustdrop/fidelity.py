"""How close a pruned model stays to the unpruned one: no right answers are needed, so it works for any model.

The unpruned model answers greedily. Then that answer is forced on the pruned model, token by token, through
`generate`: the prompt is pruned, and the cache is cut and evicted, as in use. At every answer token the two
distributions over the vocabulary are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mustdrop.errors import ConfigError
from mustdrop.patching import unpatched


@dataclass(frozen=True)
class Reference:
    """Answers to one batch of prompts, and what the unpruned model thinks of every token of them.

    Attributes:
        tokens: (B, T) long, the answers, padded on the right.
        lengths: (B,) long, tokens of each answer, the one that ends it included.
        logits: (B, T, V) float, of the unpruned model; those at padding mean nothing.
    """

    tokens: Tensor
    lengths: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Fidelity:
    """The pruned model beside the unpruned one, one entry per prompt.

    Attributes:
        kl: (B,) float, Kullback-Leibler divergence of the pruned from the unpruned distribution in nats, mean over the
            answer's tokens; 0 where they are equal.
        agreement: (B,) float, share of the answer's tokens that the pruned model would have chosen too.
        same: (B,) bool, whether it would have chosen all of them: then it gives the same answer on its own.
    """

    kl: Tensor
    agreement: Tensor
    same: Tensor


class Forced(LogitsProcessor):
    """Leaves the search of `generate` one token at every step."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that only the next token of the answer survives."""
        only = torch.full_like(scores, -torch.inf)
        chosen = self.tokens[:, self.step : self.step + 1].to(scores.device)
        self.step += 1
        return only.scatter(1, chosen, 0.0)


def reference(model: Any, inputs: Mapping[str, Any], max_new_tokens: int = 32) -> Reference:
    """What the unpruned model answers to a batch of prompts, greedily.

    A patched model is taken back to its unpruned state for the call.

    Args:
        model: of a family that mustdrop knows.
        inputs: what the processor returned, on the model's device; prompts are padded on the left.
        max_new_tokens: tokens after which an answer is cut off.

    Returns:
        The answers with their logits.

    Raises:
        ConfigError: no `input_ids` among the inputs.
    """
    _check(inputs)
    with unpatched(model):
        out = respond(model, inputs, max_new_tokens)
    tokens = out.sequences[:, -len(out.logits) :].cpu()
    return Reference(tokens, lengths_of(tokens, model), _stacked(out.logits))


def forced_logits(model: Any, inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Logits at every token of given answers, of the model as it is: pruned if it is patched.

    Args:
        model: patched or not.
        inputs: what the processor returned.
        tokens: (B, T) long, an answer for each prompt, padded on the right with anything.

    Returns:
        (B, T, V) float on the CPU: row t is what the model said where token t of the answer was due.

    Raises:
        ConfigError: no `input_ids`, or not one answer per prompt.
    """
    _check(inputs)
    rows = len(inputs["input_ids"])
    if tokens.ndim != 2 or len(tokens) != rows:
        raise ConfigError(f"expected one answer for each of {rows} prompts, (B, T); got {tuple(tokens.shape)}.")
    logits = _stacked(respond(model, inputs, tokens.shape[1], Forced(tokens)).logits)
    short = tokens.shape[1] - logits.shape[1]  # generate ends where every row has ended; what follows is padding
    return torch.nn.functional.pad(logits, (0, 0, 0, short)) if short else logits


def compare(unpruned: Tensor, pruned: Tensor, lengths: Tensor) -> Fidelity:
    """Distributions at the tokens of the same answers, side by side.

    Args:
        unpruned: (B, T, V) logits.
        pruned: (B, T, V) logits.
        lengths: (B,) long, tokens of each answer.
    """
    p, q = unpruned.double().log_softmax(-1), pruned.double().log_softmax(-1)
    each = (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0).sum(-1)
    equal = unpruned.argmax(-1) == pruned.argmax(-1)
    inside = torch.arange(unpruned.shape[1], dtype=torch.long, device="cpu") < lengths[:, None]
    kl = each.masked_fill(~inside, 0).sum(-1) / lengths
    return Fidelity(kl.clamp(min=0).float(), (equal & inside).sum(-1) / lengths, (equal | ~inside).all(-1))


def log_likelihood(logits: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """(B,) log-probability of whole answers, in nats.

    Args:
        logits: (B, T, V), as `forced_logits` returns them.
        tokens: (B, T) long.
        lengths: (B,) long, tokens of each answer.
    """
    of_token = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    inside = torch.arange(tokens.shape[1], dtype=torch.long, device="cpu") < lengths[:, None]
    return of_token.masked_fill(~inside, 0).sum(-1).float()


def measure(model: Any, inputs: Mapping[str, Any], against: Reference) -> Fidelity:
    """Force the unpruned model's answers on a patched model and compare.

    Args:
        model: patched; afterwards `mustdrop.trace(model)` tells what the call cost.
        inputs: the prompts that `against` answers.
        against: made by `reference`.
    """
    return compare(against.logits, forced_logits(model, inputs, against.tokens), against.lengths)


def lengths_of(tokens: Tensor, model: Any) -> Tensor:
    """(B,) long, tokens of each answer up to and including the first that ends it."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    last = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device="cpu"))
    first = torch.where(last.any(-1), last.int().argmax(-1) + 1, tokens.shape[1])
    return first.long()


def respond(model: Any, inputs: Mapping[str, Any], new: int, forced: Forced | None = None) -> Any:
    """One greedy `generate`, whatever the model's own settings say; its logits come before any processing.

    Args:
        model: patched or not.
        inputs: what the processor returned.
        new: tokens after which an answer is cut off.
        forced: the answers to give instead of the model's own.

    Returns:
        What `generate` returns, with `sequences` and `logits`.
    """
    settings: dict[str, Any] = {} if forced is None else {"logits_processor": [forced]}
    with torch.inference_mode():
        return model.generate(
            **inputs,
            **settings,
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=True,
            output_logits=True,
        )


def _stacked(logits: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(logits, 1).float().cpu()


def _check(inputs: Mapping[str, Any]) -> None:
    if "input_ids" not in inputs:
        raise ConfigError(
            f"expected what a processor returns, with input_ids; got {', '.join(inputs) or 'nothing'}. "
            "Prompts given as inputs_embeds cannot be compared."
        )
