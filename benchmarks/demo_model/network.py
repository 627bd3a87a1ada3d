"""The demo model's architecture, its starting weights, and lean forward passes for training.

Training runs Hugging Face's own parameters through two shorter forward passes: a vision tower that also
accepts a square window of the picture, and a decoder that answers many questions about one picture at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mustdrop.demo.scenes import GRID, IMAGE_SIZE, PATCH_SIZE, WORDS

VISION_WIDTH, VISION_LAYERS = 96, 5
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 8, 4
HEAD_WIDTH = TEXT_WIDTH // TEXT_HEADS
VOCABULARY = 64  # more rows than words, a rounder number
TOKEN_ID = {word: index for index, word in enumerate(WORDS)}
PATCHES = GRID * GRID
PROMPT_START = (TOKEN_ID["<s>"], TOKEN_ID["USER:"])
SEGMENT = 11  # tokens of the longest question with its answer


class Window(NamedTuple):
    """A square part of the picture, in patches."""

    row: int
    column: int
    size: int

    def patches(self) -> Tensor:
        """Indices of the window's patches within the whole picture, row by row."""
        side = torch.arange(self.size)
        return ((side[:, None] + self.row) * GRID + side + self.column).reshape(-1)


WHOLE = Window(0, 0, GRID)


def build() -> LlavaForConditionalGeneration:
    """The untrained model.  As in LLaVA, features come from the tower's last layer but one, without CLS."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=3 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=VISION_WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=288,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        num_key_value_heads=TEXT_HEADS,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        pad_token_id=TOKEN_ID["<pad>"],
        bos_token_id=TOKEN_ID["<s>"],
        eos_token_id=TOKEN_ID["</s>"],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=TOKEN_ID["<image>"],
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    _start_vision(model.model.vision_tower)
    for layer in model.model.language_model.layers:
        _tie_queries_to_keys(layer.self_attn, 0.1)
    return model


@torch.no_grad()
def _tie_queries_to_keys(attention: nn.Module, std: float) -> None:
    """Equal query and key weights: tokens attend to tokens like themselves from the first step on."""
    attention.q_proj.weight.normal_(0, std)
    attention.k_proj.weight.copy_(attention.q_proj.weight)


@torch.no_grad()
def _start_vision(tower: nn.Module) -> None:
    """Sine-cosine positions in two dimensions, and queries equal to keys: attention is local from the start.

    With the default initialisation the tower learned to read digits several times more slowly.
    """
    frequency = 30.0 ** -(torch.arange(VISION_WIDTH // 4) / (VISION_WIDTH // 4))
    angle = torch.arange(GRID)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    tower.embeddings.position_embedding.weight[1:] = 0.25 * torch.cat([rows, columns], -1).reshape(PATCHES, -1)
    tower.embeddings.patch_embedding.weight.normal_(0, 0.04)
    for layer in tower.encoder.layers:
        _tie_queries_to_keys(layer.self_attn, 0.13)
        layer.self_attn.v_proj.weight.normal_(0, 0.08)


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """Byte images as the processor normalises them: to -1..1, channels first."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def vision_features(tower: nn.Module, pixels: Tensor, window: Window = WHOLE) -> Tensor:
    """What enters the last layer, (B, 1 + patches, width): CLS, then the features that LLaVA reads."""
    embeddings = tower.embeddings
    position = embeddings.position_embedding.weight
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + position[1 + window.patches()]
    cls = (embeddings.class_embedding + position[0]).expand(len(pixels), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([cls, patches], 1))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def vision_summary(tower: nn.Module, features: Tensor) -> Tensor:
    """CLS after the last layer, (B, width).  No more of that layer is read, so no more is computed."""
    layer = tower.encoder.layers[-1]
    attention, cls, h = layer.self_attn, features[:, :1], layer.layer_norm1(features)
    projected = (attention.q_proj(h[:, :1]), attention.k_proj(h), attention.v_proj(h))
    q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in projected)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    cls = cls + attention.out_proj(mixed)
    return tower.post_layernorm(cls + layer.mlp(layer.layer_norm2(cls)))[:, 0]


def rotary_tables(decoder: nn.Module, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (..., head width), for positions of any shape."""
    angle = position[..., None].float() * decoder.rotary_emb.inv_freq.float()
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, the way Llama pairs its channels."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _heads(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).view(x.shape[0], x.shape[1], TEXT_HEADS, HEAD_WIDTH).transpose(1, 2)


def _packed_layer(
    layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, prefix: int, last: bool
) -> Tensor:
    """One decoder layer.  The last one computes the question rows only, for no other output is read."""
    attention, mlp = layer.self_attn, layer.mlp
    start = prefix if last else 0
    h = rms_norm(x, layer.input_layernorm.weight)
    q = rotate(_heads(h[:, start:], attention.q_proj.weight), cos[..., start:, :], sin[..., start:, :])
    k, v = rotate(_heads(h, attention.k_proj.weight), cos, sin), _heads(h, attention.v_proj.weight)
    mixed = F.scaled_dot_product_attention(q[:, :, prefix - start :], k, v, attn_mask=mask)
    if not last:
        image = (t[:, :, :prefix] for t in (q, k, v))
        mixed = torch.cat([F.scaled_dot_product_attention(*image, is_causal=True), mixed], 2)
    x = x[:, start:] + F.linear(mixed.transpose(1, 2).flatten(2), attention.o_proj.weight)
    h = rms_norm(x, layer.post_attention_layernorm.weight)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def packed_logits(model: nn.Module, features: Tensor, questions: Tensor, kept: Tensor | None = None) -> Tensor:
    """Logits (B, Q, SEGMENT, vocabulary) for Q questions with answers, (B, Q, SEGMENT), about each picture.

    All questions about a picture share the prefix `<s> USER: image` and do not see each other, so this equals
    Q separate forward passes.  `features` are (B, n, width), without CLS; `kept` (B, n) says which patches
    they are when some are hidden, and every token keeps the position that it has in the full sequence.
    """
    decoder = model.model.language_model
    batch, count, _ = questions.shape
    start = decoder.embed_tokens(torch.tensor(PROMPT_START)).expand(batch, -1, -1)
    text = decoder.embed_tokens(questions).flatten(1, 2)
    x = torch.cat([start, model.model.multi_modal_projector(features), text], 1)
    prefix = start.shape[1] + features.shape[1]

    image_position = torch.arange(PATCHES)[None] if kept is None else kept
    rows = len(image_position)
    text_position = (len(PROMPT_START) + PATCHES + torch.arange(SEGMENT)).repeat(count)
    position = torch.cat(
        [
            torch.arange(len(PROMPT_START)).expand(rows, -1),
            len(PROMPT_START) + image_position,
            text_position.expand(rows, -1),
        ],
        1,
    )
    cos, sin = (table[:, None] for table in rotary_tables(decoder, position))

    index = torch.arange(count * SEGMENT)
    own = (index[:, None] // SEGMENT == index // SEGMENT) & (index[:, None] >= index)
    mask = torch.cat([torch.ones(len(index), prefix, dtype=torch.bool), own], 1)
    mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))[None, None]
    for layer in decoder.layers:
        x = _packed_layer(layer, x, cos, sin, mask, prefix, layer is decoder.layers[-1])
    return model.lm_head(rms_norm(x, decoder.norm.weight)).view(batch, count, SEGMENT, -1)
