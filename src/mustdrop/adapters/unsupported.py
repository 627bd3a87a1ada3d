"""Architectures that were looked at and cannot be patched, each with its reason. `find` says so instead of guessing."""

from __future__ import annotations

_RECURRENT = (
    "most of its decoder layers fold all tokens into one recurrent state, which decays with every step: no mask gives "
    "the result of leaving a token out, and there is no entry per token that a cache could drop."
)
_CONVOLUTION = (
    "most of its decoder layers are short convolutions over neighbouring tokens: leaving a token out makes others "
    "neighbours, which no mask does, and there is no entry per token that a cache could drop."
)
_CROSS = (
    "its vision tokens are no part of the sequence: decoder layers read them by cross-attention, so nothing in the "
    "prompt or in the cache of the text could be dropped."
)
_QUERIES = (
    "a Q-Former makes a few dozen queries of every image, which lie nowhere in it, and the text model has learned "
    "positions or is an encoder-decoder."
)
_SEQ2SEQ = "its text model is an encoder-decoder; mustdrop works in decoder-only models with one prefill."
_WORDS = (
    "its images are words of the vocabulary, made by a tokenizer: there are no encoder features to score or to merge."
)
_INSIDE = "its text model encodes the images itself, so there is no place between encoder and text model to work at."
_TIMM = "its vision tower comes from the timm package, whose layers do not go through transformers' attention."

#: Class name -> (family, why).
UNSUPPORTED: dict[str, tuple[str, str]] = {
    "Qwen3_5ForConditionalGeneration": ("Qwen3.5", _RECURRENT),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen3.5-MoE", _RECURRENT),
    "MiniCPMV4_6ForConditionalGeneration": ("MiniCPM-V 4.6 (its text model is Qwen3.5)", _RECURRENT),
    "Lfm2VlForConditionalGeneration": ("LFM2-VL", _CONVOLUTION),
    "MllamaForConditionalGeneration": ("Llama 3.2 Vision", _CROSS),
    "IdeficsForVisionText2Text": ("IDEFICS", _CROSS),
    "Gemma3nForConditionalGeneration": (
        "Gemma 3n",
        "its decoder layers carry four versions of every hidden state in front of the batch dimension (AltUp), and the "
        "last of them read keys and values of earlier ones, so they have no cache of their own.",
    ),
    "Granite4VisionForConditionalGeneration": (
        "Granite 4 Vision",
        "its text model adds image features to hidden states of full length inside its own forward, between decoder "
        "layers, where a shorter sequence does not fit.",
    ),
    "MistralLarge4ForConditionalGeneration": (
        "Mistral Large 4",
        "its sparse attention chooses entries of the cache by an index of its own, which has no pruned form.",
    ),
    "Phi4MultimodalForCausalLM": ("Phi-4 multimodal", _INSIDE),
    "FuyuForCausalLM": ("Fuyu", "it has no vision encoder: raw patches enter through one linear layer."),
    "ChameleonForConditionalGeneration": ("Chameleon", _WORDS),
    "Emu3ForConditionalGeneration": ("Emu3", _WORDS),
    "Blip2ForConditionalGeneration": ("BLIP-2", _QUERIES),
    "InstructBlipForConditionalGeneration": ("InstructBLIP", _QUERIES),
    "InstructBlipVideoForConditionalGeneration": ("InstructBLIP-Video", _QUERIES),
    "Florence2ForConditionalGeneration": ("Florence-2", _SEQ2SEQ),
    "PerceptionLMForConditionalGeneration": ("Perception LM", _TIMM),
    "FastVlmForConditionalGeneration": ("FastVLM", _TIMM),
    "Qwen2_5OmniForConditionalGeneration": (
        "Qwen2.5-Omni as a whole",
        "it is several models. Its thinker is the one that sees: mustdrop.patch(model.thinker).",
    ),
    "Qwen3OmniMoeForConditionalGeneration": (
        "Qwen3-Omni as a whole",
        "it is several models. Its thinker is the one that sees: mustdrop.patch(model.thinker).",
    ),
}


def reason(names: list[str]) -> str | None:
    """A sentence on the first of `names` (a class and its bases) that was looked at and cannot be patched, or None."""
    for name in names:
        if name in UNSUPPORTED:
            family, why = UNSUPPORTED[name]
            return f"{family} ({name}) cannot be patched: {why}"
    return None
