"""How a question becomes a prompt: as the published numbers put it, or as the model's processor does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mustdrop.errors import ConfigError, did_you_mean
from mustdrop.eval.benchmark import Item
from mustdrop.media_limits import MediaLimits

PROCESSOR = "chat template of the processor"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: {question} ASSISTANT:"
)
# Models that were published with `vicuna_v1`: LLaVA-1.5 and LLaVA-NeXT around a Vicuna. Its vocabulary is Llama's, with
# a few tokens added.
_VICUNA_FAMILIES = ("llava", "llava_next")
_VICUNA_WORDS = range(32000, 32129)
_PADDED_FAMILY = "llava"  # LLaVA-1.5 was published with pictures padded to squares; its processor here crops them
TEMPLATES = ("auto", "vicuna_v1", "processor")


@dataclass(frozen=True)
class Prompter:
    """Makes prompts for one model.

    Attributes:
        processor: the model's processor.
        vicuna: whether `vicuna_v1` is used instead of the processor's chat template.
        border: colour with which pictures are padded to squares; None leaves them to the processor.
        upright: whether pictures are turned as their EXIF data say.
        limits: how large pictures and frames are.
    """

    processor: Any
    vicuna: bool
    border: tuple[int, int, int] | None = None
    upright: bool = True
    limits: MediaLimits = field(default_factory=MediaLimits)

    @property
    def name(self) -> str:
        """The template's name, for the result file."""
        return "vicuna_v1" if self.vicuna else PROCESSOR

    @property
    def pictures(self) -> str:
        """What happens to pictures, for the result file."""
        padded = "as the processor has it" if self.border is None else f"padded to squares with {self.border}"
        turned = padded if self.upright else f"{padded}, as they are stored (not turned by EXIF data)"
        return ", ".join([turned, *(f"{name}={area}" for name, area in self.limits.areas.items())])

    def picture(self, image: Image.Image) -> Image.Image:
        """A picture as the processor gets it."""
        if self.border is None or image.width == image.height:
            return image
        side = max(image.size)
        square = Image.new("RGB", (side, side), self.border)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def text(self, item: Item) -> str:
        """The whole prompt."""
        kind = None if item.medium is None else item.medium.kind
        if self.vicuna:
            token = "" if kind is None else f"{getattr(self.processor, f'{kind}_token', '<image>')}\n"
            return _VICUNA.format(question=token + item.asked)
        content = [{"type": "text", "text": item.asked}]
        if kind is not None:
            content.insert(0, {"type": kind})
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text

    def special_tokens(self, text: str) -> bool:
        """Whether the tokenizer still has to put its first token before a prompt."""
        first = getattr(self.processor.tokenizer, "bos_token", None)
        return first is None or not text.startswith(first)


def check_template(template: str) -> None:
    """Refuse a template that there is not.

    Raises:
        ConfigError: no such template.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"there is no template {template!r}. {did_you_mean(template, TEMPLATES)}")


def prompter(
    processor: Any, config: Any, template: str, upright: bool = True, limits: MediaLimits | None = None
) -> Prompter:
    """The template for a model.

    Args:
        processor: the model's processor.
        config: the model's configuration.
        template: "vicuna_v1", "processor", or "auto": the first for LLaVA models around a Vicuna, as their numbers were
            published, the second for all others.
        upright: whether pictures are turned as their EXIF data say.
        limits: how large pictures and frames are; None leaves it to the processor.

    Raises:
        ConfigError: no such template, or the processor has none.
        UnsupportedOptionError: the processor has no such limits.
    """
    check_template(template)
    vicuna = template == "vicuna_v1" or (template == "auto" and _published_with_vicuna(config))
    if not vicuna and getattr(processor, "chat_template", None) is None:
        raise ConfigError("this processor has no chat template: give --template vicuna_v1, or a model with a template.")
    border = _mean_colour(processor) if vicuna and config.model_type == _PADDED_FAMILY else None
    limits = limits or MediaLimits()
    limits.check(processor)
    return Prompter(processor, vicuna, border, upright, limits)


def _mean_colour(processor: Any) -> tuple[int, int, int]:
    """The colour that becomes zero, so that the border says nothing."""
    red, green, blue = (int(255 * share) for share in processor.image_processor.image_mean)
    return red, green, blue


def _published_with_vicuna(config: Any) -> bool:
    text = config.get_text_config()
    is_llama = text.model_type == "llama" and text.vocab_size in _VICUNA_WORDS
    return config.model_type in _VICUNA_FAMILIES and is_llama
