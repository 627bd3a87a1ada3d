"""One prompt with its answer through a frozen model: unpruned, and with gates on its vision tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mustdrop.patching as patching
from mustdrop.adapters import find
from mustdrop.adapters.unsupported import inside
from mustdrop.errors import ConfigError, UnsupportedModelError, UnsupportedOptionError
from mustdrop.fidelity import lengths_of, respond
from mustdrop.fitting.gates import gated
from mustdrop.pruners.scored import mean_words
from mustdrop.runtime.language.text_rows import words

BACKENDS = ("eager", "sdpa")


@dataclass(frozen=True)
class Prompt:
    """One prompt with its answer, and what the unpruned model made of it.

    Attributes:
        logits: (T, V) float, what the unpruned model said where each token of the answer was due.
        features: per picture (N, C) float, features that enter the language model; rows that stand for no part of the
            picture are left out, as the vision stage always lets them in.
        places: per picture (N,) long, where these lie in the sequence.
        question: (1, C) float, mean embedding of the words after the last picture.
        length: tokens of prompt and answer.
        entering: arguments of the text model.
    """

    logits: Tensor
    features: list[Tensor]
    places: list[Tensor]
    question: Tensor
    length: int
    entering: tuple[tuple[Any, ...], dict[str, Any]]


class Passes:
    """Runs a model without changing it: nothing is trained in it, and hooks are there only while it runs.

    Args:
        model: a Hugging Face vision-language model of a known family.

    Raises:
        UnsupportedModelError: no adapter knows it, or it has layers that cannot hide a token.
        UnsupportedOptionError: its attention takes no additive mask.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.inner: Any = inside(model)
        self.adapter = find(self.inner)
        self.text: Any = self.adapter.text(self.inner)
        self.layers: Any = self.adapter.decoder_layers(self.inner)
        if self.adapter.recurrent(self.inner):
            raise UnsupportedModelError(
                f"{type(self.inner).__name__} has recurrent layers, in which a token cannot be hidden by degrees: no "
                "scorer can be fitted to it. Expected a model whose decoder layers are all attention."
            )
        attention = str(getattr(self.text.config, "_attn_implementation", None) or "eager")
        if attention not in BACKENDS:
            raise UnsupportedOptionError(
                f"a scorer is fitted through additive attention masks, and this model runs {attention!r}: load it with "
                'attn_implementation="sdpa" (or "eager"). The scorer serves under any attention afterwards.'
            )
        self.tokens = [modality.token for modality in self.adapter.modalities(self.inner)]
        self._placeholders = torch.tensor(self.tokens, dtype=torch.long, device="cpu")
        names = inspect.signature(type(self.inner).forward).parameters
        self._short = "logits_to_keep" in names

    @property
    def width(self) -> int:
        """C, channels of the features that enter the language model."""
        return int(self.text.get_input_embeddings().weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        return self.text.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def inputs(self, sample: Any) -> dict[str, Any]:
        """What the processor returned for one prompt, where and as the model takes it.

        Raises:
            ConfigError: it is not the input of one prompt.
        """
        ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
            got = f"input_ids of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(sample).__name__
            raise ConfigError(
                f"expected what the processor returns for one prompt, with input_ids (1, S); got {got}. Give each "
                "prompt as a sample of its own."
            )
        dtype = self.inner.dtype
        made = {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in sample.items()}
        return {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in made.items()}

    def answer(self, inputs: dict[str, Any], new: int) -> list[int]:
        """The unpruned model's greedy answer, with the token that ends it, of at most `new` tokens."""
        with patching.unpatched(self.model):
            told = respond(self.model, inputs, new).sequences[:, inputs["input_ids"].shape[1] :].cpu()
        return told[0, : int(lengths_of(told, self.model)[0])].tolist()  # type: ignore[no-any-return]

    def unpruned(self, inputs: dict[str, Any], answer: list[int]) -> Prompt:
        """The prompt with its answer through the unpruned model.

        Raises:
            ConfigError: it has no picture.
        """
        ids = inputs["input_ids"]
        whole = _followed(inputs, torch.tensor([answer], dtype=ids.dtype, device=ids.device))
        with patching.patched(self.model, "none"), self._entering() as entered, torch.no_grad():
            logits = self._logits(whole, len(answer))
            media = patching.trace(self.model).media
        vision = torch.isin(whole["input_ids"][0].cpu(), self._placeholders).nonzero()[:, 0]
        if not media or not media[0] or not entered:
            raise ConfigError("expected a prompt with at least one picture or video, got one without.")
        args, kwargs = entered[0]
        embeds: Tensor = kwargs["inputs_embeds"]
        places = [vision[one.index[~one.layout.structural]].to(embeds.device) for one in media[0]]
        seen = torch.zeros(1, ids.shape[1], dtype=torch.bool, device="cpu")
        seen[0, vision[vision < ids.shape[1]]] = True
        valid = inputs.get("attention_mask")
        valid = torch.ones_like(seen) if valid is None else valid.bool().cpu()
        asked = words(embeds[:, : ids.shape[1]], seen.numpy(), valid.numpy())
        features = [embeds[0, place].float() for place in places]
        question = mean_words(tuple(asked), features[0][None])
        return Prompt(logits, features, places, question, embeds.shape[1], (args, kwargs))

    def pruned(self, prompt: Prompt, log_gates: list[Tensor]) -> Tensor:
        """(T, V) float, as `Prompt.logits`, with gates on the vision tokens; gradients go to the gates.

        Args:
            prompt: from `unpruned`.
            log_gates: per picture (N,), log of the gate of each feature.
        """
        bias = torch.zeros(prompt.length, dtype=torch.float32, device=prompt.places[0].device)
        bias = bias.index_put((torch.cat(prompt.places),), torch.cat(log_gates).to(bias.device))
        filler = next(i for i in range(len(self.tokens) + 1) if i not in self.tokens)
        ids = torch.full((1, prompt.length), filler, dtype=torch.long, device=self.device)
        given = {"input_ids": ids, "use_cache": False}
        with patching.unpatched(self.model), self._replaced(prompt), self._gating(bias), sdpa_kernel(SDPBackend.MATH):
            return self._logits(given, len(prompt.logits))

    def _logits(self, given: dict[str, Any], length: int) -> Tensor:
        """(T, V) float, of the last `length` tokens."""
        options: dict[str, Any] = {"logits_to_keep": length + 1} if self._short else {}
        made = self.inner(**{**given, "use_cache": False, "return_dict": True, **options}).logits
        return made[0, -length - 1 : -1].float()  # type: ignore[no-any-return]

    @contextmanager
    def _entering(self) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """The arguments of the text model's calls."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args, dict(kwargs)))

        with _hooked((self.text, note)):
            yield found

    @contextmanager
    def _replaced(self, prompt: Prompt) -> Iterator[None]:
        """The text model gets what it got in the unpruned pass: no picture is encoded again."""
        args, kwargs = prompt.entering
        with _hooked((self.text, lambda *_: (args, dict(kwargs)))):
            yield

    @contextmanager
    def _gating(self, bias: Tensor) -> Iterator[None]:
        """Decoder layers add `bias` (S,) to their attention logits."""

        def gate(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            mask = gated(kwargs.get("attention_mask"), bias.to(hidden.device), hidden)
            return args, {**kwargs, "attention_mask": mask}

        with _hooked(*((layer, gate) for layer in self.layers)):
            yield


@contextmanager
def _hooked(*pairs: tuple[Any, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _followed(inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """The inputs with an answer (1, T) after the prompt; what marks tokens of the prompt marks these as text."""
    shape = inputs["input_ids"].shape
    out = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape != shape:
            continue
        fill = answer if name == "input_ids" else torch.full_like(answer, int(name == "attention_mask"))
        out[name] = torch.cat([value, fill.to(value)], 1)
    return out


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model in evaluation mode and without gradients for its weights; afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    for weight in wanted:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in wanted:
            weight.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
