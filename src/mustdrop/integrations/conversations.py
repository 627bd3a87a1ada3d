"""From chats with images and videos to model inputs, as the model's own processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError, UnsupportedOptionError
from mustdrop.media_limits import MediaLimits
from mustdrop.pictures import ENDINGS, read_picture

Message = dict[str, Any]
Conversation = list[Message]


def kinds(conversation: Conversation) -> tuple[str, ...]:
    """The kinds of media in a conversation, sorted. Conversations of other kinds never share a batch."""
    return tuple(sorted({kind for kind, _ in media(conversation)}))


def media(conversation: Conversation) -> list[tuple[str, Any]]:
    """The media of a conversation in order: kind and content.

    Raises:
        UnsupportedOptionError: a part that is neither text nor image nor video.
    """
    found = []
    for message in conversation:
        for part in message["content"]:
            if part["type"] not in ("text", "image", "video"):
                raise UnsupportedOptionError(
                    f"a prompt with {part['type']} cannot be asked here: expected text, images and videos."
                )
            if part["type"] != "text":
                found.append((part["type"], part[part["type"]]))
    return found


def user(visuals: Sequence[Any], text: str, place: str | None = None) -> Conversation:
    """One user turn: the media, then the text.

    Args:
        visuals: images and videos (paths, or what the processor takes).
        text: of the question.
        place: word in the text that stands for one of the media, in order. Where the text has as many as there are
            media, they go there.
    """
    parts = [visual(one) for one in visuals]
    pieces = text.split(place) if place else [text]
    if len(pieces) != len(parts) + 1 or len(pieces) == 1:
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    content: list[Message] = []
    for i, piece in enumerate(pieces):
        content += [{"type": "text", "text": piece.strip(" ")}] if piece.strip(" ") else []
        content += parts[i : i + 1]
    return [{"role": "user", "content": content}]


def visual(one: Any) -> Message:
    """An image or a video as a part of a message: a path by its ending, anything else an image."""
    if isinstance(one, str | Path) and not str(one).lower().endswith(ENDINGS):
        return {"type": "video", "video": str(one)}
    return {"type": "image", "image": one}


def inputs(processor: Any, conversations: Sequence[Conversation], limits: MediaLimits | None = None) -> Any:
    """Model inputs of a batch, padded on the left, each prompt ready for the answer.

    Args:
        processor: of the model.
        conversations: all with the same kinds of media.
        limits: how large pictures, and how many and how large frames are; None leaves it to the processor.

    Raises:
        ConfigError: the processor has no chat template.
        UnsupportedOptionError: it has not one of the limits.
    """
    if getattr(processor, "chat_template", None) is None:
        raise ConfigError(
            f"the {type(processor).__name__} of this model has no chat template, so it is not known how to put a "
            "question: set processor.chat_template, or take a model of the hub that has one."
        )
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
    given: dict[str, Any] = {}
    for kind in kinds(conversations[0]):
        own = [[content for k, content in media(one) if k == kind] for one in conversations]
        given[f"{kind}s"] = [[_opened(one) for one in row] for row in own] if kind == "image" else own
    if limits is not None:
        pictures = limits.pictures(processor) if "images" in given else {}
        videos = limits.sampling(processor) | limits.videos(processor) if "videos" in given else {}
        given |= {name: own for name, own in (("images_kwargs", pictures), ("videos_kwargs", videos)) if own}
    begin = getattr(processor.tokenizer, "bos_token", None)
    if begin is not None and texts[0].startswith(begin):
        given["add_special_tokens"] = False  # the template has written it already
    return processor(text=texts, padding=True, return_tensors="pt", **given)


def _opened(image: Any) -> Any:
    from PIL import Image

    return read_picture(image) if isinstance(image, str | Path | Image.Image) else image
