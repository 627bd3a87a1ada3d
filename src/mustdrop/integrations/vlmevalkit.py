"""VLMEvalKit: a model class for its table `supported_VLM`. See docs/evaluate-elsewhere.md."""

from __future__ import annotations

from typing import Any

from vlmeval.vlm.base import BaseModel

from mustdrop.integrations.answering import Answerer
from mustdrop.integrations.conversations import Conversation, Message
from mustdrop.integrations.generation import NEW_TOKENS
from mustdrop.media_limits import MediaLimits


class MustDropVLM(BaseModel):
    """Any model of the hub that mustdrop has an adapter for, as VLMEvalKit calls it: one prompt at a time, greedy.

    Args:
        pretrained: hub id or folder; "bundled" is the tiny model that comes with mustdrop.
        method: name of the method (`mustdrop methods` lists them); "none" is the unpruned model.
        keep: average retained tokens per layer, tokens or share.
        max_new_tokens: limit of an answer.
        generation: further arguments of `model.generate`.
        device: where the model runs; by default a GPU if there is any.
        dtype: "auto", "float32", "bfloat16" or "float16".
        attn_implementation: attention implementation.
        nframe: frames of a video that the model sees; with `fps`, the most.
        fps: frames that are taken of a second of a video.
        min_pixels: area of a picture, and of a frame of a video, to which smaller ones are enlarged.
        max_pixels: area of a picture, and of a frame of a video, to which larger ones are shrunk.
        total_pixels: area of all frames of a video together, to which longer ones are shrunk.
        **knobs: all others are settings of the method.
    """

    INTERLEAVE = True
    VIDEO_LLM = True
    is_api = False

    def __init__(
        self,
        pretrained: str,
        method: str = "mustdrop",
        keep: int | float | None = None,
        *,
        max_new_tokens: int = NEW_TOKENS,
        generation: dict[str, Any] | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        nframe: int | None = None,
        fps: float | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        **knobs: Any,
    ) -> None:
        super().__init__()
        self.nframe = nframe
        self.generation = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, **(generation or {})}
        limits = MediaLimits(nframe, fps, min_pixels, max_pixels, total_pixels)
        self.answerer = Answerer(
            pretrained, method, keep, knobs, limits, device=device, dtype=dtype, attention=attn_implementation
        )

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to one prompt.

        Args:
            message: parts with `type` ("text", "image" or "video"), `value` (text, or name of a file) and, where the
                benchmark gives one, `role`.
            dataset: name of the benchmark; nothing here depends on it.
        """
        return self._answer(_turns(message))

    def chat_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The next answer of a conversation.

        Args:
            message: turns with `role` and `content`, each content as in `generate_inner`.
            dataset: name of the benchmark.
        """
        return self._answer([{"role": turn["role"], "content": _parts(turn["content"])} for turn in message])

    def _answer(self, conversation: Conversation) -> str:
        (answer,) = self.answerer.answer([conversation], **self.generation)
        return answer.text


def _turns(message: list[dict[str, Any]]) -> Conversation:
    """Neighbours of one role make a turn; a part without a role is the user's."""
    turns: Conversation = []
    for given in message:
        role = given.get("role", "user")
        if not turns or turns[-1]["role"] != role:
            turns.append({"role": role, "content": []})
        turns[-1]["content"] += _parts([given])
    return turns


def _parts(content: list[dict[str, Any]]) -> list[Message]:
    return [{"type": part["type"], part["type"]: part["value"]} for part in content]
