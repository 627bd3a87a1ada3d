"""The processor of the bundled Qwen3-VL, for pictures and videos, without torchvision.

Transformers' own `Qwen3VLProcessor` cannot even be made without torchvision, for its videos' sake. This one writes the
same prompts and the same pixels for what the model was trained on: with torchvision, `AutoProcessor` may be used on the
checkpoint folder as on any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature

from mustdrop.errors import ConfigError

PATCH, MERGE, PAIR = 8, 2, 2  # pixels of a patch; patches merged each way; frames of one patch
UNIT = PATCH * MERGE
LEAST, MOST = 48 * 48, 256 * 256  # pixels of a picture or frame
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
FPS = 2.0


def fitted(height: int, width: int) -> tuple[int, int]:
    """The height and width, in whole vision tokens, that a picture is brought to; its aspect ratio hardly changes."""
    down, across = (max(UNIT, round(side / UNIT) * UNIT) for side in (height, width))
    if down * across > MOST:
        scale = math.sqrt(height * width / MOST)
        return tuple(max(UNIT, math.floor(side / scale / UNIT) * UNIT) for side in (height, width))  # type: ignore[return-value]
    if down * across < LEAST:
        scale = math.sqrt(LEAST / (height * width))
        return tuple(math.ceil(side * scale / UNIT) * UNIT for side in (height, width))  # type: ignore[return-value]
    return down, across


def _pixels(picture: Any) -> NDArray[np.uint8]:
    """A picture (PIL, or an array of bytes) in the size that the model sees it in."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture, dtype=np.uint8))
    height, width = fitted(image.height, image.width)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def to_patches(frames: NDArray[np.uint8]) -> Tensor:
    """Pairs of frames (pairs, 2, height, width, 3) as patches (all patches, channels), merged blocks together."""
    pairs, _, height, width, _ = frames.shape
    rows, columns = height // UNIT, width // UNIT
    x = frames.reshape(pairs, PAIR, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(pairs * rows * columns * MERGE**2, -1)
    return torch.from_numpy(np.ascontiguousarray(x)).float().div_(127.5).sub_(1)


class PageProcessor:
    """Prompts and pixels for the bundled Qwen3-VL.

    Attributes:
        tokenizer: a word for each token; pads on the left.
        image_token: stands for one vision token of a picture.
        video_token: stands for one vision token of a video.
    """

    image_token, video_token = IMAGE, VIDEO

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PageProcessor:
        """The processor of a checkpoint folder."""
        return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True))

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        """The prompt of a conversation."""
        text: str = self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        return text

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        return_tensors: str = "pt",
        padding: bool = False,
        fps: float = FPS,
    ) -> BatchFeature:
        """Model inputs for one prompt or several.

        Args:
            text: prompts, with one mark for each picture and video.
            images: a picture, or all pictures in the order of their marks; lists of lists are taken as one list.
            videos: a video (its frames), or all of them.
            return_tensors: "pt".
            padding: whether prompts of different lengths are padded.
            fps: frames a second of the videos, for the times that stand before each pair of frames.

        Returns:
            What the model takes: ids, mask, types of tokens; pixels and grids of pictures and of videos.

        Raises:
            ConfigError: not one mark for each picture and video.
        """
        texts = [text] if isinstance(text, str) else list(text)
        stills = [_pixels(picture)[None, None].repeat(PAIR, 1) for picture in _flat(images)]
        clips = [_clip(video) for video in ([] if videos is None else _videos(videos))]
        runs = {IMAGE: [IMAGE * _tokens(still) for still in stills], VIDEO: [_frames(clip, fps) for clip in clips]}
        for mark, replacements in runs.items():
            marks = sum(one.count(mark) for one in texts)
            if marks != len(replacements):
                raise ConfigError(f"expected one {mark} in the prompts for each of {len(replacements)}; found {marks}.")
            left = iter(replacements)
            texts = [_filled(one, mark, left) for one in texts]
        data = dict(self.tokenizer(texts, return_tensors=return_tensors, padding=padding, return_token_type_ids=False))
        ids = data["input_ids"]
        data["mm_token_type_ids"] = (ids == self.image_token_id).long() + 2 * (ids == self.video_token_id).long()
        for name, grid, media in (
            ("pixel_values", "image_grid_thw", stills),
            ("pixel_values_videos", "video_grid_thw", clips),
        ):
            if media:
                data[name] = torch.cat([to_patches(frames) for frames in media])
                sizes = [[len(f), f.shape[2] // PATCH, f.shape[3] // PATCH] for f in media]
                data[grid] = torch.tensor(sizes, dtype=torch.long, device="cpu")
        return BatchFeature(data)

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of one answer."""
        said: str = self.tokenizer.decode(ids, **options)
        return said

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """The texts of several answers."""
        said: list[str] = self.tokenizer.batch_decode(ids, **options)
        return said


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for one in images for picture in _flat(one)]
    return [images]


def _videos(videos: Any) -> list[Any]:
    """Several videos; a single one is a list of pictures or an array of four dimensions."""
    first = videos[0]
    single = isinstance(first, Image.Image) or np.ndim(first) == 3
    return [videos] if single else list(videos)


def _clip(video: Any) -> NDArray[np.uint8]:
    """A video's frames in pairs; the last one twice where their number is odd."""
    frames = [_pixels(frame) for frame in video]
    frames += frames[-1:] * (len(frames) % PAIR)
    stack = np.stack(frames)
    return stack.reshape(-1, PAIR, *stack.shape[1:])


def _tokens(frames: NDArray[np.uint8]) -> int:
    return int(frames.shape[2] * frames.shape[3]) // UNIT**2


def _frames(clip: NDArray[np.uint8], fps: float) -> str:
    """A time and the vision tokens of each pair of frames."""
    one = f"<|vision_start|>{VIDEO * _tokens(clip)}<|vision_end|>"
    times = ((PAIR * pair + (PAIR - 1) / 2) / fps for pair in range(len(clip)))
    return "".join(f"<{time:.1f} seconds>{one}" for time in times)


def _filled(text: str, mark: str, replacements: Any) -> str:
    before, *rest = text.split(mark)
    return before + "".join(next(replacements) + after for after in rest)
