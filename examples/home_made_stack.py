"""The three pruners in a model of your own: a small vision-language transformer in plain PyTorch.

No Hugging Face object in sight. One image of 12 x 12 patches, a question of six tokens, an answer of nine. The weights
are random: this shows where the calls go, not what a model answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner

GRID, WIDTH, HEADS, ENCODER_LAYERS, DECODER_LAYERS = (12, 12), 64, 4, 3, 8


class Layer(nn.Module):
    """Attention and MLP. Returns its output, the head-mean probabilities (B, rows, keys), and all keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.qkv(nn.functional.layer_norm(x, x.shape[-1:])).chunk(3, -1)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        heads = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(2, 3) * heads[0].shape[-1] ** -0.5
        if causal:
            n, keys = scores.shape[2:]
            scores = scores.masked_fill(torch.ones(n, keys).tril(keys - n) == 0, -torch.inf)
        probability = scores.softmax(-1)
        x = x + self.out((probability @ heads[2]).transpose(1, 2).flatten(2))
        return x + self.mlp(nn.functional.layer_norm(x, x.shape[-1:])), probability.mean(1), (k, v)


def encode(layers: nn.ModuleList, patches: Tensor, vision: VisionStagePruner, count: int) -> tuple[Tensor, ...]:
    """(1, N, C) patches to the M that enter the decoder, whether each is protected, and how important each is."""
    x = torch.cat([torch.zeros(1, 1, WIDTH), patches], 1)  # a CLS token in front
    importance = torch.zeros(1, 0)
    for i, layer in enumerate(layers):
        x, probability, _ = layer(x)
        if i == vision.layer:  # similar windows become their mean; the other layers run on fewer tokens
            merged = vision.merge(x[:, 1:], GRID, at_least=torch.tensor([count]))
            x = torch.cat([x[:, :1], merged.apply(x[:, 1:])], 1)
        importance = probability[:, 0, 1:]  # what the CLS row gives to each patch
    keep, protected = vision.select(importance, merged.valid, torch.tensor([count]))
    return x[:, 1:][:, keep[0]], protected[:, keep[0]], importance[:, keep[0]]


def prefill(
    layers: nn.ModuleList, image: Tensor, text: Tensor, protected: Tensor, importance: Tensor, pruner: PrefillPruner
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], Tensor]:
    """Run the prompt. Returns the cache, per layer which of the M vision tokens it processed, and which are left."""
    x, cache, processed = torch.cat([image, text], 1), [], []
    alive = torch.arange(image.shape[1])
    filters = pruner.filter_layers(len(layers))
    counts = pruner.counts(len(alive), len(layers))  # how many stay after each filter: the budget, spread out
    for i, layer in enumerate(layers):
        x, probability, entries = layer(x, causal=True)
        cache.append(entries)
        processed.append(alive)
        if i in filters:  # text rows, vision columns
            n = len(alive)
            attention = probability[:, n:, :n]
            chosen = pruner(attention, count=counts[filters.index(i)], protected=protected, importance=importance)
            stay = chosen.keep[0]
            x = torch.cat([x[:, stay], x[:, n:]], 1)  # fewer rows from here on; each keeps its position
            alive, protected, importance = alive[stay], protected[:, stay], importance[:, stay]
    return cache, processed, alive


def cascade(
    cache: list[tuple[Tensor, Tensor]], processed: list[Tensor], alive: Tensor, pruner: DecodeCachePruner
) -> list[Tensor]:
    """Cut from the earlier layers what later layers dropped. Returns per layer which entries are vision tokens."""
    marks = []
    for i, (k, v) in enumerate(cache):
        vision = torch.arange(k.shape[1]) < len(processed[i])
        if pruner.cascade and i >= pruner.full_layers:
            stays = ~vision
            stays[: len(processed[i])] = torch.isin(processed[i], alive)
            cache[i], vision = (k[:, stays], v[:, stays]), vision[stays]
        marks.append(vision)
    return marks


def decode(
    layers: nn.ModuleList,
    first: Tensor,
    steps: int,
    cache: list[tuple[Tensor, Tensor]],
    marks: list[Tensor],
    totals: Tensor,
    pruner: DecodeCachePruner,
) -> None:
    """Feed `steps` tokens; every `interval` steps the least attended vision entries leave the cache."""
    attended = [torch.zeros(1, len(vision)) for vision in marks]
    for step in range(1, steps + 1):
        x = first
        for i, layer in enumerate(layers):
            if pruner.due(step):
                k, v = cache[i]
                padded = nn.functional.pad(marks[i], (0, k.shape[1] - len(marks[i])))  # decoded tokens are text
                score = nn.functional.pad(attended[i], (0, k.shape[1] - attended[i].shape[1]))
                stay = pruner(score, padded[None], pruner.counts(totals)).keep[0]
                cache[i] = k[:, stay], v[:, stay]
                marks[i], attended[i] = padded[stay], score[:, stay]
            x, probability, cache[i] = layer(x, past=cache[i])
            attended[i] += probability[:, 0, : attended[i].shape[1]]
        first = x


def main() -> None:
    torch.manual_seed(0)
    encoder = nn.ModuleList(Layer() for _ in range(ENCODER_LAYERS))
    decoder = nn.ModuleList(Layer() for _ in range(DECODER_LAYERS))
    coarse = nn.functional.interpolate(torch.randn(1, WIDTH, 4, 4), size=GRID)  # flat areas of 3 x 3 patches ...
    noisy = coarse + torch.randn(1, WIDTH, *GRID) * (torch.arange(12) >= 6)  # ... and noise in the right half
    patches, question = noisy.flatten(2).transpose(1, 2), torch.randn(1, 6, WIDTH)

    with torch.no_grad():
        vision = VisionStagePruner(window=3, threshold=0.8, layer=0)
        image, protected, importance = encode(encoder, patches, vision, count=96)
        pruner = PrefillPruner(keep=48)
        cache, processed, alive = prefill(decoder, image, question, protected, importance, pruner)
        policy = DecodeCachePruner(keep=8, interval=4)
        marks = cascade(cache, processed, alive, policy)
        totals = torch.tensor([patches.shape[1]])
        decode(decoder, torch.randn(1, 1, WIDTH), 9, cache, marks, totals, policy)

    lengths = [len(tokens) for tokens in processed]
    print(f"{patches.shape[1]} patches, {image.shape[1]} enter the decoder, {int(protected.sum())} of them protected")
    print("vision tokens per layer:", lengths, "mean:", sum(lengths) / len(lengths))
    print("vision entries in the cache at the end:", [int(vision.sum()) for vision in marks])
    assert 47 < sum(lengths) / len(lengths) <= 48
    assert all(vision.sum() == 8 for vision in marks)


if __name__ == "__main__":
    main()
