"""How large pictures, and how many and how large frames of a video, a processor hands to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mustdrop.errors import ConfigError, UnsupportedOptionError

# What the two edges of `size` bound in transformers' processors that resize by area, by the name of the class or of one
# that it inherits from: one picture or frame; a picture that is repeated for the second frame of its patches; a video.
_PICTURES = {
    "Qwen2VLImageProcessor": "frame",
    "PaddleOCRVLImageProcessor": "frame",
    "VideoLlama3ImageProcessor": "frame",
    "Glm4vImageProcessor": "pair",
    "Glm46VImageProcessor": "pair",
}
_VIDEOS = {"Qwen2VLVideoProcessor": "frame", "Qwen3VLVideoProcessor": "video"}


@dataclass(frozen=True)
class MediaLimits:
    """What a processor is told about the size of pictures and videos; None leaves it to the processor.

    The areas mean what they mean in lmms-eval's own classes for Qwen models, whichever way a processor counts.

    Attributes:
        frames: of a video: so many, or as many as there are; with `fps` at most so many.
        fps: frames that are taken of a second of a video.
        min_pixels: area of a picture, and of each frame of a video, to which smaller ones are enlarged.
        max_pixels: area of a picture, and of each frame of a video, to which larger ones are shrunk.
        total_pixels: area of all frames of a video together, to which longer ones are shrunk.

    Raises:
        ConfigError: less than one, or a least area above a largest one.
    """

    frames: int | None = None
    fps: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "total_pixels", "frames"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}: expected a whole number, 1 or more.")
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"fps={self.fps!r}: expected a number above 0.")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}: turn them round.")

    @property
    def areas(self) -> dict[str, int]:
        """The limits of area that are set, by name."""
        named = {name: getattr(self, name) for name in ("min_pixels", "max_pixels", "total_pixels")}
        return {name: value for name, value in named.items() if value is not None}

    def check(self, processor: Any) -> None:
        """Refuse what no part of a processor can do, before anything is asked.

        Args:
            processor: of the model.

        Raises:
            UnsupportedOptionError: the processor has no limits of area, or cannot sample by time.
        """
        pictures, videos = _part(processor, "image_processor"), _part(processor, "video_processor")
        if self.areas and _counted(pictures, _PICTURES) is None and _counted(videos, _VIDEOS) is None:
            raise self._refusal(pictures or videos or processor)
        if self.fps is not None and not hasattr(videos, "fps"):
            raise UnsupportedOptionError(
                f"fps={self.fps}: the {type(processor).__name__} of this model does not sample videos by time: give a "
                "number of frames."
            )

    def pictures(self, processor: Any) -> dict[str, Any]:
        """Arguments of the image processor.

        Args:
            processor: of the model.

        Raises:
            UnsupportedOptionError: it does not resize by area.
        """
        if self.min_pixels is None and self.max_pixels is None:
            return {}
        part = _part(processor, "image_processor")
        counted = _counted(part, _PICTURES)
        if counted is None:
            raise self._refusal(part or processor)
        times = part.temporal_patch_size if counted == "pair" else 1
        least, most = (None if side is None else side * times for side in (self.min_pixels, self.max_pixels))
        return {"size": _size(part, least, most)}

    def videos(self, processor: Any) -> dict[str, Any]:
        """Arguments of the video processor that say how large frames are; see `sampling` for how many.

        Args:
            processor: of the model.

        Raises:
            UnsupportedOptionError: it does not resize by area, or counts per frame what is given per video, or the
                other way round, and the number of frames is not known.
        """
        if not self.areas:
            return {}
        part = _part(processor, "video_processor")
        unit = _counted(part, _VIDEOS)
        if unit is None:
            raise self._refusal(part or processor)
        least, most, total = self.min_pixels, self.max_pixels, self.total_pixels
        converted = {"total_pixels": total} if unit == "frame" else {"max_pixels": most, "min_pixels": least}
        for name, area in converted.items():
            if area is not None and (self.frames is None or self.fps is not None):
                raise self._unknown_length(part, unit, name)
        frames = self.frames or 1
        if unit == "frame":
            size = _size(part, least, _smaller(most, None if total is None else max(1, total // frames)))
        else:
            most = None if most is None else most * frames
            size = _size(part, None if least is None else least * frames, _smaller(most, total))
        # a further limit, which some versions of transformers take from the processor's own settings, would move these
        return {"size": size} | ({"cap_pixels_per_frame": False} if hasattr(part, "cap_pixels_per_frame") else {})

    def sampling(self, processor: Any) -> dict[str, Any]:
        """Arguments of the video processor that say which frames it takes of a file.

        Args:
            processor: of the model.

        Raises:
            UnsupportedOptionError: a largest number of frames beside `fps`, which the processor has not.
        """
        part = _part(processor, "video_processor")
        if self.fps is None and self.frames is not None:
            if _counted(part, _VIDEOS) == "frame" and not isinstance(part.sample_frames, _AsManyAsThereAre):
                part.sample_frames = _AsManyAsThereAre(part.sample_frames, part.temporal_patch_size)
            return _chosen(part, "num_frames", self.frames, "fps")
        if self.fps is None:
            return {}
        if self.frames is not None:
            if not hasattr(part, "max_frames"):
                raise UnsupportedOptionError(
                    f"fps={self.fps} with {self.frames} frames at most: the {type(part).__name__} of this model has no "
                    "largest number of frames: give one of the two."
                )
            part.max_frames = self.frames  # an argument of the call would not reach the sampling of all of them
        return _chosen(part, "fps", self.fps, "num_frames")

    def _refusal(self, part: Any) -> UnsupportedOptionError:
        return UnsupportedOptionError(
            f"{' and '.join(self.areas)}: the {type(part).__name__} of this model has no such limits here: leave them "
            f"out. Those that have them are {', '.join((*_PICTURES, *_VIDEOS))}, and what inherits from one."
        )

    def _unknown_length(self, part: Any, unit: str, name: str) -> UnsupportedOptionError:
        other = "max_pixels" if unit == "frame" else "total_pixels"
        return UnsupportedOptionError(
            f"{name}: the {type(part).__name__} of this model limits each {unit}, so this depends on the number of "
            f"frames: give a number of frames, without fps, or {other} instead."
        )


@dataclass(frozen=True)
class _AsManyAsThereAre:
    """Stands for the method of Qwen2-VL's processor that chooses frames, which refuses more than a video has.

    Attributes:
        choose: the method.
        step: frames of a patch; it takes a multiple of them.
    """

    choose: Callable[..., Any]
    step: int

    def __call__(self, metadata: Any, num_frames: int | None = None, **settings: Any) -> Any:
        if num_frames is not None:
            num_frames = min(num_frames, max(self.step, metadata.total_num_frames // self.step * self.step))
        return self.choose(metadata=metadata, num_frames=num_frames, **settings)


def _part(processor: Any, name: str) -> Any:
    return getattr(processor, name, None)


def _chosen(part: Any, name: str, value: float, other: str) -> dict[str, Any]:
    """One way to sample. Qwen3-VL's processor has `fps` of its own, and refuses a number of frames beside it."""
    found = {name: value, "do_sample_frames": True}
    return found if getattr(part, other, None) is None else found | {other: None}


def _counted(part: Any, table: dict[str, str]) -> str | None:
    """What the edges of a processor's `size` bound; None where they are no areas."""
    for kind in type(part).__mro__:
        name = kind.__name__.removesuffix("Pil").removesuffix("Fast")
        if name in table:
            return table[name]
    return None


def _smaller(one: int | None, other: int | None) -> int | None:
    return min((area for area in (one, other) if area is not None), default=None)


def _size(part: Any, least: int | None, most: int | None) -> dict[str, int]:
    """Both edges, as a call takes no single one; the processor's own gives way where it would cross a given one."""
    if least is None:
        least = min(int(part.size["shortest_edge"]), most or int(part.size["shortest_edge"]))
    if most is None:
        most = int(part.size["longest_edge"])
    return {"shortest_edge": least, "longest_edge": max(least, most)}
