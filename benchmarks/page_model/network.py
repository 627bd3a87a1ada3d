"""The page model's architecture, its starting weights, and lean forward passes for training.

Training runs Hugging Face's own parameters through two shorter forward passes: a vision tower for pictures of one
size, and a decoder that answers many questions about one sample at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mustdrop.demo.tasks import WORDS, Sample
from mustdrop.demo.tasks.clip import FPS

PATCH, MERGE, PAIR = 8, 2, 2  # pixels of a patch; patches merged each way; frames of one patch
VISION_WIDTH, VISION_LAYERS, VISION_HEADS = 96, 4, 4
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, KEY_HEADS, HEAD_WIDTH = 128, 6, 4, 2, 32
GRID = 16  # learned positions each way
DEEPSTACK = (1, 2)
STATES = 2  # decoder layers after which vision tokens are asked what stands before them
VOCABULARY = 192  # more rows than words, a rounder number
EPS = 1e-6
TOKEN_ID = {word: index for index, word in enumerate(WORDS)}
PROMPT_START = ("<|im_start|>", "user")


def build() -> Qwen3VLForConditionalGeneration:
    """The untrained model."""
    vision = {
        "depth": VISION_LAYERS,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 3 * VISION_WIDTH,
        "num_heads": VISION_HEADS,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": PAIR,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": GRID * GRID,
        "deepstack_visual_indexes": list(DEEPSTACK),
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 288,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_WIDTH,
        "max_position_embeddings": 2048,
        "rms_norm_eps": EPS,
        "initializer_range": 0.05,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
        },
        "pad_token_id": TOKEN_ID["<|endoftext|>"],
        "eos_token_id": TOKEN_ID["<|im_end|>"],
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = Qwen3VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    _start(model)
    return model


@torch.no_grad()
def _start(model: nn.Module) -> None:
    """Queries equal to keys, so that tokens attend to tokens like themselves from the first step on; sine positions."""
    tower, decoder = model.model.visual, model.model.language_model
    frequency = 20.0 ** -(torch.arange(VISION_WIDTH // 4) / (VISION_WIDTH // 4))
    angle = torch.arange(GRID)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    tower.pos_embed.weight.copy_(0.25 * torch.cat([rows, columns], -1).reshape(GRID * GRID, -1))
    tower.patch_embed.proj.weight.normal_(0, 0.03)
    for block in tower.blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)
        q.normal_(0, 0.13)
        k.copy_(q)
        v.normal_(0, 0.08)
    for module in (*tower.blocks.modules(), *tower.merger.modules(), *tower.deepstack_merger_list.modules()):
        if isinstance(module, nn.Linear) and module.out_features != 3 * VISION_WIDTH:
            module.weight.normal_(0, module.in_features**-0.5 * 0.7)
    for merger in tower.deepstack_merger_list:
        merger.linear_fc2.weight.mul_(0.1)
    decoder.embed_tokens.weight.normal_(0, 0.2)
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.k_proj.weight.normal_(0, 0.1)
        keys = attention.k_proj.weight.view(KEY_HEADS, HEAD_WIDTH, -1)
        attention.q_proj.weight.copy_(keys.repeat_interleave(TEXT_HEADS // KEY_HEADS, 0).flatten(0, 1))


class Grid(NamedTuple):
    """Rows and columns of vision tokens (after merging)."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def grid_of(sample: Sample) -> Grid:
    height, width = sample.size
    return Grid(height // (PATCH * MERGE), width // (PATCH * MERGE))


def to_patches(frames: np.ndarray) -> Tensor:
    """Pairs of frames (N, 2, height, width, 3; uint8) as the processor lays them out: (N, patches, channels)."""
    number, pair, height, width, colours = frames.shape
    rows, columns = height // (PATCH * MERGE), width // (PATCH * MERGE)
    x = frames.reshape(number, pair, rows, MERGE, PATCH, columns, MERGE, PATCH, colours)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(number, rows * columns * MERGE**2, -1)
    return torch.from_numpy(np.ascontiguousarray(x)).float().div_(127.5).sub_(1)


def pictures_of(samples: list[Sample]) -> np.ndarray:
    """All pictures, or pairs of frames, of some samples of one size: (N, 2, height, width, 3)."""
    stacks = []
    for sample in samples:
        stack = np.stack(sample.pictures)
        if sample.video:
            stacks.append(stack.reshape(-1, PAIR, *stack.shape[1:]))
        else:
            stacks.append(np.repeat(stack[:, None], PAIR, 1))
    return np.concatenate(stacks)


@lru_cache(maxsize=512)
def _axes(grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, in the order of merged blocks."""
    side = torch.arange(MERGE)
    row = torch.arange(grid.rows)[:, None, None, None] * MERGE + side[:, None]
    column = torch.arange(grid.columns)[None, :, None, None] * MERGE + side
    shape = (grid.rows, grid.columns, MERGE, MERGE)
    return row.expand(shape).reshape(-1), column.expand(shape).reshape(-1)


@lru_cache(maxsize=512)
def _vision_rotary(grid: Grid) -> tuple[Tensor, Tensor]:
    spatial = VISION_WIDTH // VISION_HEADS // 2
    frequency = 10000.0 ** -(torch.arange(0, spatial, 2).float() / spatial)
    angle = torch.cat([axis[:, None] * frequency for axis in _axes(grid)], -1)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _positions(tower: nn.Module, grid: Grid) -> Tensor:
    table = tower.pos_embed.weight.view(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    size = (grid.rows * MERGE, grid.columns * MERGE)
    table = F.interpolate(table, size, mode="bilinear", align_corners=True)[0]
    row, column = _axes(grid)
    return table[:, row, column].T


def vision_features(tower: nn.Module, patches: Tensor, grid: Grid) -> tuple[Tensor, list[Tensor]]:
    """Features (N, tokens, width) of N pictures, and those of each level of DeepStack."""
    embed = tower.patch_embed.proj
    x = F.linear(patches, embed.weight.flatten(1), embed.bias) + _positions(tower, grid)
    cos, sin = _vision_rotary(grid)
    deep = []
    for index, block in enumerate(tower.blocks):
        qkv = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, VISION_HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = attend(rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin), qkv[2])
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        if index in DEEPSTACK:
            level = tower.deepstack_merger_list[DEEPSTACK.index(index)]
            deep.append(level(x).view(len(x), grid.tokens, -1))
    return tower.merger(x).view(len(x), grid.tokens, -1), deep


def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """Attention in single precision: on a CPU its backward pass is slower in half."""
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)  # type: ignore[arg-type]


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, EPS)


class Prefix(NamedTuple):
    """What comes before a question: words, where vision tokens go (-1 where a word stands), and their positions."""

    ids: Tensor
    source: Tensor
    position: Tensor  # (3, prefix)
    end: int


@lru_cache(maxsize=512)
def prefix_of(grid: Grid, pictures: int, video: bool) -> Prefix:
    """The start of every prompt about so many pictures, or moments of a video, of this size."""
    ids, source, position, here, seen = [], [], [], 0, 0

    def say(*words: str) -> None:
        nonlocal here
        for word in words:
            ids.append(TOKEN_ID[word])
            source.append(-1)
            position.append((here, here, here))
            here += 1

    say(*PROMPT_START)
    for picture in range(pictures):
        if video:
            say("<", *f"{(2 * picture + 0.5) / FPS:.1f}", "seconds>")
        say("<|vision_start|>")
        for token in range(grid.tokens):
            row, column = divmod(token, grid.columns)
            ids.append(TOKEN_ID["<|video_pad|>" if video else "<|image_pad|>"])
            source.append(seen)
            position.append((here, here + row, here + column))
            seen += 1
        here += max(grid)
        say("<|vision_end|>")
    return Prefix(torch.tensor(ids), torch.tensor(source), torch.tensor(position).T, here)


def _text_rotary(position: Tensor) -> tuple[Tensor, Tensor]:
    """Tables (tokens, head width) for positions (3, tokens)."""
    frequency = 1000.0 ** -(torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH)
    angle = position[..., None].float() * frequency
    mixed = angle[0].clone()
    for axis, count in ((1, 5), (2, 5)):
        mixed[:, axis : 3 * count : 3] = angle[axis][:, axis : 3 * count : 3]
    mixed = torch.cat([mixed, mixed], -1)
    return mixed.cos(), mixed.sin()


def _heads(x: Tensor, weight: Tensor, number: int) -> Tensor:
    return F.linear(x, weight).view(x.shape[0], x.shape[1], number, HEAD_WIDTH).transpose(1, 2)


def _layer(
    layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, prefix: int, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One decoder layer, and its queries and keys.  The last one computes the question rows only: no other is read."""
    attention, mlp = layer.self_attn, layer.mlp
    start = prefix if last else 0
    h = rms_norm(x, layer.input_layernorm.weight)
    q = rms_norm(_heads(h[:, start:], attention.q_proj.weight, TEXT_HEADS), attention.q_norm.weight)
    k = rms_norm(_heads(h, attention.k_proj.weight, KEY_HEADS), attention.k_norm.weight)
    q, k = rotate(q, cos[start:], sin[start:]), rotate(k, cos, sin)
    v = _heads(h, attention.v_proj.weight, KEY_HEADS)
    k, v = (t.repeat_interleave(TEXT_HEADS // KEY_HEADS, 1) for t in (k, v))
    mixed = attend(q[:, :, prefix - start :], k, v, attn_mask=mask)
    if not last:
        image = (t[:, :, :prefix] for t in (q, k, v))
        mixed = torch.cat([attend(*image, is_causal=True), mixed], 2)
    x = x[:, start:] + F.linear(mixed.transpose(1, 2).flatten(2), attention.o_proj.weight)
    h = rms_norm(x, layer.post_attention_layernorm.weight)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h)), q, k


def packed_logits(
    model: nn.Module, features: Tensor, deep: list[Tensor], questions: Tensor, prefix: Prefix
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, Q, length, vocabulary) for Q questions with answers, (B, Q, length), about each sample.

    The other results are what the question rows attend to in the first layer, as log shares of the prefix (B, heads,
    Q * length, prefix), and the states of the prefix (B, prefix, width) after `STATES` layers.

    All questions about a sample share the prefix and do not see each other, so this equals Q separate forward passes.
    `features` are (B, all vision tokens, width), `deep` what DeepStack adds to them after each of the first layers.
    """
    decoder = model.model.language_model
    batch, count, length = questions.shape
    start = decoder.embed_tokens(prefix.ids).expand(batch, -1, -1)
    vision = prefix.source >= 0
    at = prefix.source.clamp_min(0)
    start = torch.where(vision[:, None], features[:, at].float(), start)
    x = torch.cat([start, decoder.embed_tokens(questions).flatten(1, 2)], 1)
    size = len(prefix.ids)

    text = (prefix.end + torch.arange(length)).repeat(count).expand(3, -1)
    cos, sin = _text_rotary(torch.cat([prefix.position, text], 1))
    index = torch.arange(count * length)
    own = (index[:, None] // length == index // length) & (index[:, None] >= index)
    mask = torch.cat([torch.ones(len(index), size, dtype=torch.bool), own], 1)
    mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))[None, None]
    for number, layer in enumerate(decoder.layers):
        x, q, k = _layer(layer, x, cos, sin, mask, size, layer is decoder.layers[-1])
        if number == 0:
            with torch.autocast("cpu", enabled=False):
                scores = q[:, :, size:].float() @ k.float().mT / HEAD_WIDTH**0.5 + mask
                shares = scores.log_softmax(-1)[..., :size]
        if number < len(deep):
            added = torch.where(vision[:, None], deep[number][:, at], 0.0)
            x = torch.cat([x[:, :size] + added, x[:, size:]], 1)
        if number == STATES - 1:
            states = x[:, :size]
    logits = F.linear(rms_norm(x, decoder.norm.weight), decoder.embed_tokens.weight)
    return logits.view(batch, count, length, -1), shares, states
