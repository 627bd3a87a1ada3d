"""Trains projector and decoder on frozen vision features, from one visible object to all 576 patches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from network import (
    HEAD_WIDTH,
    PATCHES,
    PROMPT_START,
    SEGMENT,
    TEXT_WIDTH,
    TOKEN_ID,
    packed_logits,
    rms_norm,
    rotary_tables,
    rotate,
    to_pixels,
    vision_features,
)
from torch import Tensor, nn
from training import Log, Metrics, Step
from vision import NO_KIND, Heads, batch

from mustdrop.demo.scenes import (
    CELLS,
    COLOURS,
    GRID,
    KINDS,
    QUESTION_TYPES,
    REGIONS,
    Question,
    Scene,
    SceneMaker,
    SceneObject,
    ask,
)

IGNORE = -100
COUNT = QUESTION_TYPES.index("count")
COUNT_WEIGHT = 0.2  # of a count question in the loss, times the questions per picture (one of them is about the count)


class Bank(NamedTuple):
    """Training scenes, their frozen features (n, 576, width), and each patch's object (n, 576; -1: none)."""

    features: Tensor
    owner: Tensor
    scenes: list[Scene]


@torch.no_grad()
def make_bank(tower: nn.Module, seed: int, size: int) -> Bank:
    maker = SceneMaker("train", seed)
    features, scenes = [], []
    owner = torch.full((size, PATCHES), -1)
    while len(scenes) < size:
        group = [maker.scene() for _ in range(min(8, size - len(scenes)))]
        for row, scene in enumerate(group, start=len(scenes)):
            for number, obj in enumerate(scene.objects):
                owner[row, torch.from_numpy(scene.patches(obj))] = number
        features.append(vision_features(tower, to_pixels([scene.image for scene in group]))[:, 1:].half())
        scenes += group
    return Bank(torch.cat(features), owner, scenes)


def encode(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of the question with its answer, and for each token the next one to predict (answer only)."""
    asked = [TOKEN_ID[word] for word in (*question.text.split(), "ASSISTANT:")]
    answer = [TOKEN_ID[word] for word in (*question.answer.split(), "</s>")]
    ids = asked + answer
    target = [IGNORE] * (len(asked) - 1) + answer + [IGNORE]
    rest = SEGMENT - len(ids)
    return ids + [TOKEN_ID["<pad>"]] * rest, target + [IGNORE] * rest


def ask_many(rng: np.random.Generator, objects: tuple[SceneObject, ...], number: int) -> list[Question]:
    """Questions of every type in turn, but only one about the count: its answer is the same each time."""
    others = [name for name in QUESTION_TYPES if name != "count"]
    names = ["count", *(others[index % len(others)] for index in range(number - 1))]
    asked = []
    for name in names:
        question = ask(rng, objects, name)
        asked.append(question or ask(rng, objects, "locate"))  # there is always something to locate
    return [question for question in asked if question is not None]


def tensors(questions: list[list[Question]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, Q, SEGMENT), targets (B, Q, SEGMENT) and types (B, Q)."""
    coded = [[encode(question) for question in row] for row in questions]
    ids = torch.tensor([[ids for ids, _ in row] for row in coded])
    target = torch.tensor([[target for _, target in row] for row in coded])
    types = torch.tensor([[QUESTION_TYPES.index(question.type) for question in row] for row in questions])
    return ids, target, types


def exact(logits: Tensor, target: Tensor) -> Tensor:
    """Whether every token of an answer is right (B, Q): the same as greedy decoding giving that answer."""
    return ((logits.argmax(-1) == target) | (target == IGNORE)).all(-1)


def make_step(
    model: nn.Module,
    bank: Bank,
    rng: np.random.Generator,
    *,
    pictures: int,
    questions: int,
    visible: int,
    objects: tuple[int, int],
) -> Step:
    """A training step on `visible` patches a picture: those of some objects, and background at random.

    The questions are about these objects only.  To find an object among few patches is learned first and
    fast; in trials that began with whole scenes, answers were still at chance when this had been learned.
    """

    def step() -> tuple[Tensor, Metrics]:
        rows = torch.from_numpy(rng.integers(0, len(bank.scenes), pictures))
        rank = torch.rand(pictures, PATCHES)
        asked = []
        for number, row in enumerate(rows.tolist()):
            everything = bank.scenes[row].objects
            size = min(len(everything), int(rng.integers(objects[0], objects[1] + 1)))
            shown = rng.permutation(len(everything))[:size]
            bonus = torch.full((len(everything) + 1,), -2.0)
            bonus[torch.from_numpy(shown)] = 2.0
            bonus[-1] = 0.0  # owner -1: background
            rank[number] += bonus[bank.owner[row]]
            asked.append(ask_many(rng, tuple(everything[index] for index in shown), questions))
        features, kept = bank.features[rows].float(), None
        if visible < PATCHES:
            kept = rank.topk(visible, -1).indices.sort(-1).values
            features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        ids, target, types = tensors(asked)
        logits = packed_logits(model, features, ids, kept)
        each = F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=IGNORE, reduction="none")
        weight = torch.ones_like(types, dtype=torch.float)
        weight[types == COUNT] = COUNT_WEIGHT * questions
        weight = (weight[..., None] * (target != IGNORE)).flatten()
        right = exact(logits.detach(), target).float()
        metrics = {
            name: right[types == index].mean().item() for index, name in enumerate(QUESTION_TYPES) if index in types
        }
        return (each * weight).sum() / weight.sum(), metrics

    return step


@torch.no_grad()
def selection_accuracy(model: nn.Module, seed: int, pictures: int) -> Metrics:
    """Exact match by type on whole scenes with digits of the selection split."""
    maker = SceneMaker("selection", seed)
    right = []
    for start in range(0, pictures, 16):
        scenes = [maker.scene() for _ in range(min(16, pictures - start))]
        features = vision_features(model.model.vision_tower, to_pixels([scene.image for scene in scenes]))[:, 1:]
        ids, target, _ = tensors([maker.questions(scene) for scene in scenes])
        right.append(exact(packed_logits(model, features, ids), target).float())
    mean = torch.cat(right).mean(0).tolist()
    return {name: round(value, 4) for name, value in (*zip(QUESTION_TYPES, mean, strict=True), ("mean", sum(mean) / 8))}


@torch.no_grad()
def align(model: nn.Module, heads: Heads, seed: int) -> None:
    """Starts the projector from the vision read-outs, and words at the mean feature of what they name.

    This and `ground` stand in for the image-text alignment that a real model's CLIP tower brings with it.
    """
    maker = SceneMaker("train", seed)
    projector, decoder = model.model.multi_modal_projector, model.model.language_model
    groups = [batch([maker.scene() for _ in range(8)]) for _ in range(6)]
    tower = model.model.vision_tower
    features = torch.cat([vision_features(tower, group.pixels)[:, 1:] for group in groups])
    kind = torch.cat([group.kind for group in groups])
    colour = torch.cat([group.colour for group in groups])
    shown = (kind >= 0) & (kind != NO_KIND)
    empty = features[kind == NO_KIND]
    sample = torch.cat([features[shown], empty[torch.randperm(len(empty))[: int(shown.sum())]]])
    mean = sample.mean(0)

    # Random directions of whitened features, so that no direction drowns the others ...
    values, vectors = torch.linalg.eigh((sample - mean).T @ (sample - mean) / len(sample))
    whiten = vectors @ torch.diag((values + 0.03 * values.mean()).rsqrt()) @ vectors.T
    first, second = projector.linear_1, projector.linear_2
    first.weight.copy_(torch.randn(first.weight.shape) / first.in_features**0.5 @ whiten)
    first.bias.copy_(-first.weight @ mean)
    second.weight.normal_(0, 1.6 / second.in_features**0.5)
    # ... but the first rows read kind, colour and region, and the place by thresholds.
    row = 0
    for head in (heads.kind, heads.colour, heads.region):
        weight = head.weight - head.weight.mean(0)
        weight = 1.5 * weight / (sample @ weight.T).std(0)[:, None]
        first.weight[row : row + len(weight)] = weight
        first.bias[row : row + len(weight)] = -weight @ mean
        row += len(weight)
    for axis in range(2):
        for threshold in (-0.8, -0.33, 0.0, 0.33, 0.8):
            for sign in (3.0, -3.0):
                first.weight[row] = sign * heads.position.weight[axis]
                first.bias[row] = sign * (heads.position.bias[axis] - threshold)
                row += 1

    embedding = decoder.embed_tokens.weight.normal_(0, 0.4)
    embedding[TOKEN_ID["<pad>"]] = 0
    projected = projector(features)
    middle = projected[shown].mean(0)
    side = torch.arange(GRID) * CELLS // GRID
    region = (side[:, None] * CELLS + side).reshape(1, -1).expand(len(features), -1)
    for words, label in ((COLOURS, colour), (KINDS, kind), (REGIONS, region)):
        for index, word in enumerate(words):
            direction = projected[shown & (label == index)].mean(0) - middle
            direction = direction / direction.norm() * 0.6 * TEXT_WIDTH**0.5
            embedding[TOKEN_ID[word]] = direction
            model.lm_head.weight[TOKEN_ID[word]] = 0.1 * direction


def ground(model: nn.Module, bank: Bank, log: Log, what: str, head: int, steps: int) -> None:
    """Makes the words for kinds, or for regions, attend to such objects in one head of the first decoder layer.

    Without it, finding an object by its kind ("what color is the 7 ?") or its region stays at chance for long.
    """
    vocabulary = {"kind": KINDS, "region": REGIONS}[what]
    decoder = model.model.language_model
    layer, rows = decoder.layers[0], slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    ids = torch.tensor([TOKEN_ID[word] for word in vocabulary])
    scenes = min(160, len(bank.scenes))
    place = torch.zeros(scenes, len(vocabulary), PATCHES, dtype=torch.bool)
    for row, scene in enumerate(bank.scenes[:scenes]):
        for obj in scene.objects:
            place[row, vocabulary.index(getattr(obj, what)), torch.from_numpy(scene.patches(obj))] = True
    with torch.no_grad():
        images = model.model.multi_modal_projector(bank.features[:scenes].float())
    norm = layer.input_layernorm.weight.detach()
    words = decoder.embed_tokens.weight.detach()
    chosen = words[ids].clone().requires_grad_()
    query = layer.self_attn.q_proj.weight[rows].detach().clone().requires_grad_()
    key = layer.self_attn.k_proj.weight[rows].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([{"params": [chosen], "lr": 3e-2}, {"params": [query, key], "lr": 3e-3}])

    start, text = len(PROMPT_START), len(PROMPT_START) + PATCHES
    image_tables = rotary_tables(decoder, start + torch.arange(PATCHES))
    for _ in range(steps):
        sample = torch.randint(0, scenes, (16,))
        asked = rotary_tables(decoder, torch.randint(text + 2, text + 8, (len(ids),)))
        q = rotate(rms_norm(chosen, norm) @ query.T, *asked) * HEAD_WIDTH**-0.5
        on_image = q @ rotate(rms_norm(images[sample], norm) @ key.T, *image_tables).mT
        # <s>, USER: and every other word compete, or all attention would end on <s> once they do.
        position = torch.randint(text, text + 6, (len(words),))
        position[list(PROMPT_START)] = torch.arange(start)
        on_text = q @ rotate(rms_norm(words, norm) @ key.T, *rotary_tables(decoder, position)).T
        scores = torch.cat([on_image, on_text.expand(len(sample), -1, -1)], -1).log_softmax(-1)[..., :PATCHES]
        here = place[sample]
        share = scores.masked_fill(~here, float("-inf")).logsumexp(-1)[here.any(-1)]
        loss = -share.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        decoder.embed_tokens.weight[ids] = chosen
        layer.self_attn.q_proj.weight[rows], layer.self_attn.k_proj.weight[rows] = query, key
    log.write(event="ground", words=what, steps=steps, attention_on_object=round(share.exp().mean().item(), 4))
