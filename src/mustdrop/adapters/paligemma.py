"""PaliGemma and PaliGemma 2: the whole prompt, image and question, sees both ways; only the answer is causal."""

from __future__ import annotations

from mustdrop.adapters.base import Adapter


class PaliGemma(Adapter):
    """`PaliGemmaForConditionalGeneration`."""

    name = "paligemma"
    classes = ("PaliGemmaForConditionalGeneration",)
    token_types = "token_type_ids"
