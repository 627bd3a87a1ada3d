"""Makes the bundled `digits.npz`: scikit-learn's copy of the UCI optical digits, with a fixed split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mustdrop.demo.scenes import SPLITS

SELECTION, HELD_OUT = 300, 400  # images, as near as whole images per class allow; all others are for training
SPLIT_SEED = 0


def write_digits(path: Path) -> dict[str, int]:
    """Writes images, labels and split to `path`; returns the number of images in each split.

    The split is stratified: every split has its share of each of the ten classes.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.uint8)
    rng = np.random.default_rng(SPLIT_SEED)
    split = np.full(len(labels), SPLITS.index("train"), np.uint8)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        selection = round(SELECTION * len(members) / len(labels))
        held_out = round(HELD_OUT * len(members) / len(labels))
        split[members[:selection]] = SPLITS.index("selection")
        split[members[selection : selection + held_out]] = SPLITS.index("heldout")
    np.savez_compressed(path, images=data.images.astype(np.uint8), labels=labels, split=split)
    return {name: int((split == index).sum()) for index, name in enumerate(SPLITS)}
