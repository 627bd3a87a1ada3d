"""Makes the bundled `letters.npz`: capital letters of free fonts as small pictures, with a fixed split by family.

Needed once, by whoever makes that file: the fonts of `FAMILIES` (Debian packages, named there) and Pillow. Whoever
makes pages needs neither.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mustdrop.demo.drawing import SPLITS
from mustdrop.demo.lettering import GLYPH, LETTERS

#: Families and their files, by split.  The package that ships a family is named after it: "fonts-lato" and so on.
FAMILIES = {
    "train": {
        "B612": ("B612-Regular.otf", "B612-Bold.otf"),
        "Cantarell": ("Cantarell-Regular.otf", "Cantarell-Bold.otf"),
        "Charis SIL": ("CharisSIL-Regular.ttf", "CharisSIL-Bold.ttf"),
        "Comfortaa": ("Comfortaa-Regular.ttf", "Comfortaa-Bold.ttf"),
        "Comic Neue": ("ComicNeue-Regular.otf", "ComicNeue-Bold.otf"),
        "Courier Prime": ("Courier Prime.otf", "Courier Prime Bold.otf"),
        "DejaVu Sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
        "DejaVu Serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
        "Dosis": ("Dosis-Book.otf", "Dosis-Bold.otf"),
        "Fira Code": ("FiraCode-Regular.ttf", "FiraCode-Bold.ttf"),
        "Gentium": ("Gentium-R.ttf",),
        "Go": ("Go-Regular.ttf", "Go-Bold.ttf"),
        "Inter": ("Inter-Regular.otf", "Inter-Bold.otf"),
        "JetBrains Mono": ("JetBrainsMono-Regular.ttf", "JetBrainsMono-Bold.ttf"),
        "Junicode": ("JunicodeTwoBeta-Regular.otf", "JunicodeTwoBeta-Bold.otf"),
        "Karla": ("Karla-Regular.otf", "Karla-Bold.otf"),
        "Lato": ("Lato-Regular.ttf", "Lato-Bold.ttf"),
        "League Mono": ("LeagueMono-Regular.otf", "LeagueMono-Bold.otf"),
        "Liberation Sans": ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf"),
        "Linux Libertine": ("LinLibertine_R.otf", "LinLibertine_RB.otf"),
        "Monoid": ("Monoid-Regular.ttf", "Monoid-Bold.ttf"),
        "Quicksand": ("Quicksand-Regular.ttf", "Quicksand-Bold.ttf"),
        "Roboto Slab": ("RobotoSlab-Regular.otf", "RobotoSlab-Bold.otf"),
        "Vollkorn": ("Vollkorn-Regular.ttf", "Vollkorn-Bold.ttf"),
    },
    "selection": {
        "Andika": ("Andika-Regular.ttf", "Andika-Bold.ttf"),
        "League Spartan": ("LeagueSpartan-Regular.otf", "LeagueSpartan-Bold.otf"),
        "Liberation Mono": ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf"),
        "Yrsa": ("Yrsa-Regular.ttf", "Yrsa-Bold.ttf"),
    },
    "heldout": {
        "EB Garamond": ("EBGaramond12-Regular.otf", "EBGaramond12-Bold.otf"),
        "Hack": ("Hack-Regular.ttf", "Hack-Bold.ttf"),
        "Liberation Serif": ("LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf"),
        "mononoki": ("mononoki-Regular.ttf", "mononoki-Bold.ttf"),
        "Open Sans": ("OpenSans-Regular.ttf", "OpenSans-Bold.ttf"),
        "Oxygen": ("Oxygen-Sans.ttf", "Oxygen-Sans-Bold.ttf"),
        "Roboto": ("Roboto-Regular.ttf", "Roboto-Bold.ttf"),
    },
}


def _picture(font: object, letter: str) -> np.ndarray:
    """One letter, cut to its ink, scaled to the height of a glyph (or to its width, where that is more)."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (160, 160))
    ImageDraw.Draw(canvas).text((30, 20), letter, fill=255, font=font)
    ink = canvas.crop(canvas.getbbox())
    scale = GLYPH / max(ink.size)
    size = [max(1, round(side * scale)) for side in ink.size]
    ink = ink.resize(size, Image.Resampling.LANCZOS)
    glyph = Image.new("L", (GLYPH, GLYPH))
    glyph.paste(ink, ((GLYPH - size[0]) // 2, (GLYPH - size[1]) // 2))
    return np.asarray(glyph)


def write_letters(path: Path, folder: Path) -> dict[str, int]:
    """Writes pictures, font and split of every letter to `path`; returns the number of font files of each split.

    Args:
        path: the file to write.
        folder: searched, with everything in it, for the font files.
    """
    from PIL import ImageFont

    found = {file.name: file for pattern in ("*.ttf", "*.otf") for file in folder.rglob(pattern)}
    pictures, splits, names = [], [], []
    for split, families in FAMILIES.items():
        for family, files in families.items():
            for name in files:
                font = ImageFont.truetype(str(found[name]), 80)
                pictures.append([_picture(font, letter) for letter in LETTERS])
                splits.append(SPLITS.index(split))
                names.append(family)
    images = (np.asarray(pictures, np.int64) + 8) // 17  # sixteen steps of grey are enough, and pack well
    np.savez_compressed(path, images=images.astype(np.uint8), split=np.array(splits, np.uint8), family=np.array(names))
    return {split: splits.count(index) for index, split in enumerate(SPLITS)}
