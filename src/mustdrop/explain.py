"""One question, several methods: what each of them keeps of the pictures, and what the model then answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import mustdrop
from mustdrop.budget import Keep, keep_text
from mustdrop.eval.batches import takes
from mustdrop.eval.prompts import Prompter
from mustdrop.loading import check_question
from mustdrop.trace_page import MethodRun


@dataclass(frozen=True)
class Prompt:
    """A question about pictures or about a video.

    Attributes:
        question: its text.
        images: the pictures, in the order of the prompt.
        video: the frames of a video that stands in place of pictures; None without one.
    """

    question: str
    images: Sequence[Any] = ()
    video: Any = None

    @property
    def media(self) -> Any:
        """What the page draws on."""
        return list(self.images) if self.video is None else list(self.video)

    def inputs(self, model: Any, processor: Any) -> Any:
        """What the model takes."""
        kinds = ["image"] * len(self.images) if self.video is None else ["video"]
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": self.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        options: dict[str, Any] = {"images": [list(self.images)]} if self.video is None else {"videos": [self.video]}
        if self.video is not None and takes(processor, "do_sample_frames"):
            options["do_sample_frames"] = False  # they are chosen already
        if not Prompter(processor, vicuna=False).special_tokens(text):
            options["add_special_tokens"] = False
        return processor(text=[text], return_tensors="pt", **options).to(model.device, model.dtype)


def compare(
    model: Any,
    processor: Any,
    prompt: Prompt,
    settings: Sequence[tuple[str, Keep | None]],
    *,
    new_tokens: int = 32,
    advance: Callable[[], object] | None = None,
    watch: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[MethodRun]:
    """Ask at every setting.

    Args:
        model: not patched; it is as it was afterwards.
        processor: its processor.
        prompt: what is asked.
        settings: methods with their budgets; None is the method's own.
        new_tokens: most tokens of an answer.
        advance: called after each setting.
        watch: makes what is entered around each answer.

    Returns:
        One for each setting, in their order, for `mustdrop.trace_page.write`.

    Raises:
        MustDropError: what the model or a method does not support.
    """
    check_question(processor, prompt.question)
    inputs = prompt.inputs(model, processor)
    length = inputs["input_ids"].shape[1]
    runs = []
    for method, keep in settings:
        knobs = {} if keep is None else {"keep": keep}
        with mustdrop.patched(model, method, **knobs), torch.inference_mode():
            with watch():
                tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            trace = mustdrop.last_trace(model)
        answer = str(processor.batch_decode(tokens[:, length:], skip_special_tokens=True)[0]).strip()
        name = method if keep is None else f"{method}, keep={keep_text(keep)}"
        runs.append(MethodRun(trace, answer, name=name))
        if advance is not None:
            advance()
    return runs
