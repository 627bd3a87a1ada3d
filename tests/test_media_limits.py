"""Limits of pixels and frames change what processors make, and are refused by name where there are none."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from PIL import Image

from mustdrop import errors
from mustdrop.integrations import conversations as chats
from mustdrop.integrations.answering import Answerer
from mustdrop.media_limits import MediaLimits
from support import tiny_checkpoints

PATCH = 4  # of the tiny processors; two by two are merged
FRAMES, SECOND = 24, 8  # of the video: 24 frames, 8 a second
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|> {% endif %}{% endfor %}{% endfor %}"
)


class Pictures:
    """A processor whose image processor is the real one; transformers' own needs torchvision for its videos."""

    def __init__(self, image_processor):
        self.image_processor = image_processor


def area(grid):
    """Pixels of one picture or frame of (time, height, width) in patches."""
    return grid[1] * grid[2] * PATCH**2


def images(name="Qwen2VL"):
    """A real image processor without torchvision."""
    kind = getattr(transformers, f"{name}ImageProcessorPil", None)
    if kind is None:
        pytest.skip("this transformers has no image processor that needs no torchvision")
    sides = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2 if "Glm" in name else 1}
    return kind(size={"shortest_edge": 256, "longest_edge": 25600}, **sides)


@pytest.mark.parametrize("name", ["Qwen2VL", "PaddleOCRVL", "VideoLlama3", "Glm4v", "Glm46V"])
def test_a_picture_is_brought_between_the_limits(name):
    processor = Pictures(images(name))
    picture = tiny_checkpoints.picture(0, 96, 64)

    def made(limits):
        found = processor.image_processor(picture, return_tensors="pt", **limits.pictures(processor))
        grid = found["image_grid_thw"] if "image_grid_thw" in found else found["image_grid_hws"]
        return area([1, *grid[0].tolist()[-2:]])

    assert made(MediaLimits()) == 96 * 64
    assert 1024 < made(MediaLimits(max_pixels=2048)) <= 2048
    assert 8192 <= made(MediaLimits(min_pixels=8192)) < 16384
    # the processor's own least area gives way to a largest one below it
    assert made(MediaLimits(max_pixels=128)) <= 128


def videos(kind):
    """A real processor with tiny patches."""
    pytest.importorskip("torchvision")
    return tiny_checkpoints.qwen(kind)


def frames_of(processor, limits):
    """What a video becomes: grid of (time, height, width) patches."""
    metadata = transformers.video_utils.VideoMetadata(
        total_num_frames=FRAMES, fps=float(SECOND), frames_indices=list(range(FRAMES))
    )  # a file says how many frames a second it has; an array does not
    made = processor(
        text=["<|vision_start|><|video_pad|><|vision_end|>"],
        videos=[[tiny_checkpoints.video(0, FRAMES, 96, 64)]],
        videos_kwargs=limits.sampling(processor) | limits.videos(processor) | {"video_metadata": [metadata]},
        return_tensors="pt",
    )
    return made["video_grid_thw"][0].tolist()


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_frames_of_a_video_are_brought_between_the_limits(kind):
    count = {"frames": 6}
    assert frames_of(videos(kind), MediaLimits(**count))[0] == 3
    made = frames_of(videos(kind), MediaLimits(max_pixels=2048, **count))
    assert made[0] == 3
    assert 1024 < area(made) <= 2048
    made = frames_of(videos(kind), MediaLimits(min_pixels=8192, max_pixels=16384, **count))
    assert 8192 <= area(made) <= 16384
    made = frames_of(videos(kind), MediaLimits(total_pixels=6 * 2048, **count))
    assert 1024 < area(made) <= 2048
    both = frames_of(videos(kind), MediaLimits(max_pixels=1024, total_pixels=6 * 2048, **count))
    assert area(both) <= 1024


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_a_video_of_fewer_frames_than_asked_for_gives_what_it_has(kind):
    assert frames_of(videos(kind), MediaLimits(frames=FRAMES + 8))[0] >= FRAMES // 2
    processor = videos(kind)
    for _ in range(2):  # the second call finds what the first left
        assert frames_of(processor, MediaLimits(frames=6))[0] == 3


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_frames_by_time(kind):
    assert frames_of(videos(kind), MediaLimits(fps=4))[0] == 6  # three seconds, four frames each, two to a patch
    assert frames_of(videos(kind), MediaLimits(fps=4, frames=4))[0] == 2


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_an_answer_is_about_a_picture_of_that_size(kind, tmp_path):
    videos(kind)
    _, processor = tiny_checkpoints.save(kind, tmp_path)
    processor.chat_template = TEMPLATE
    processor.save_pretrained(tmp_path)
    asked = [chats.user([tiny_checkpoints.picture(0, 96, 64)], "w5")]
    tokens = []
    for limits in (MediaLimits(), MediaLimits(max_pixels=1024), MediaLimits(min_pixels=6400, max_pixels=25600)):
        model = Answerer(str(tmp_path), "none", limits=limits, device="cpu", dtype="float32")
        (answer,) = model.answer(asked, max_new_tokens=1, do_sample=False)
        tokens.append(answer.vision_tokens * (2 * PATCH) ** 2)
    assert tokens[0] == 96 * 64
    assert tokens[1] <= 1024
    assert tokens[2] >= 6400


class Qwen2VLVideoProcessor:
    """As much of it as the limits ask for: each frame has limits of its own."""

    size, num_frames, fps = {"shortest_edge": 256, "longest_edge": 25600}, None, None
    temporal_patch_size = 2

    def sample_frames(self, metadata, num_frames=None, **_):
        assert num_frames <= metadata.total_num_frames
        return list(range(num_frames))


class Qwen3VLVideoProcessor(Qwen2VLVideoProcessor):
    """The limits are those of all frames together, and a rate is set."""

    fps, cap_pixels_per_frame, max_frames = 2, None, 768


class Videos:
    """A processor with one of them."""

    def __init__(self, video_processor):
        self.video_processor = video_processor


FRAMEWISE, WHOLE = Videos(Qwen2VLVideoProcessor()), Videos(type("Own", (Qwen3VLVideoProcessor,), {})())


@pytest.mark.parametrize(
    ("limits", "framewise", "whole"),
    [
        ({"max_pixels": 4096}, (256, 4096), (256, 32768)),
        ({"min_pixels": 512}, (512, 25600), (4096, 25600)),
        ({"min_pixels": 512, "max_pixels": 4096}, (512, 4096), (4096, 32768)),
        ({"total_pixels": 8192}, (256, 1024), (256, 8192)),
        ({"max_pixels": 4096, "total_pixels": 8192}, (256, 1024), (256, 8192)),
        ({"max_pixels": 64}, (64, 64), (256, 512)),
    ],
)
def test_one_limit_for_both_ways_of_counting(limits, framewise, whole):
    for processor, edges in ((FRAMEWISE, framewise), (WHOLE, whole)):
        found = MediaLimits(frames=8, **limits).videos(processor)
        assert (found["size"]["shortest_edge"], found["size"]["longest_edge"]) == edges
        assert ("cap_pixels_per_frame" in found) == (processor is WHOLE)


def test_no_more_frames_than_there_are():
    processor = Videos(Qwen2VLVideoProcessor())
    MediaLimits(frames=8).sampling(processor)
    for total, chosen in ((24, 8), (8, 8), (7, 6), (2, 2)):
        metadata = SimpleNamespace(total_num_frames=total)
        assert len(processor.video_processor.sample_frames(metadata=metadata, num_frames=8, fps=None)) == chosen


def test_one_way_to_sample():
    assert MediaLimits().sampling(WHOLE) == {}
    assert MediaLimits(frames=8).sampling(FRAMEWISE) == {"num_frames": 8, "do_sample_frames": True}
    assert MediaLimits(frames=8).sampling(WHOLE) == {"num_frames": 8, "do_sample_frames": True, "fps": None}
    assert MediaLimits(fps=1, frames=8).sampling(WHOLE) == {"fps": 1, "do_sample_frames": True}
    assert WHOLE.video_processor.max_frames == 8
    with pytest.raises(errors.UnsupportedOptionError, match="fps=1 with 8 frames at most: the Qwen2VLVideoProcessor"):
        MediaLimits(fps=1, frames=8).sampling(FRAMEWISE)


def test_what_depends_on_a_number_of_frames_that_is_not_known_is_refused():
    with pytest.raises(errors.UnsupportedOptionError, match=r"max_pixels: the Own .* limits each video.*total_pixels"):
        MediaLimits(max_pixels=2048).videos(WHOLE)
    with pytest.raises(errors.UnsupportedOptionError, match=r"min_pixels: .*without fps"):
        MediaLimits(min_pixels=64, frames=8, fps=1).videos(WHOLE)
    with pytest.raises(errors.UnsupportedOptionError, match=r"total_pixels: the Qwen2VL.* each frame.*max_pixels"):
        MediaLimits(total_pixels=20480).videos(FRAMEWISE)


def test_processors_without_limits_are_refused_by_name_before_anything_is_asked():
    for name in ("min_pixels", "max_pixels", "total_pixels"):
        with pytest.raises(errors.UnsupportedOptionError, match=rf"{name}: the \w+ of this model has no such limits"):
            Answerer("bundled", "none", limits=MediaLimits(**{name: 4096}), device="cpu")
    with pytest.raises(errors.UnsupportedOptionError, match=r"fps=2: the \w+ of this model does not sample"):
        Answerer("bundled", "none", limits=MediaLimits(fps=2), device="cpu")
    processor = Pictures(images())
    MediaLimits(max_pixels=4096).check(processor)  # pictures have a limit; videos are another question
    with pytest.raises(errors.UnsupportedOptionError, match="max_pixels: the Pictures of this model"):
        MediaLimits(max_pixels=4096).videos(processor)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_pixels": 0}, "max_pixels=0: expected a whole number"),
        ({"min_pixels": 2.5}, "min_pixels=2.5: expected a whole number"),
        ({"frames": 0}, "frames=0: expected a whole number"),
        ({"fps": 0}, "fps=0: expected a number above 0"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels=9 is above max_pixels=8"),
    ],
)
def test_limits_that_cannot_be_meant(limits, message):
    with pytest.raises(errors.ConfigError, match=message):
        MediaLimits(**limits)


def test_without_limits_a_call_has_no_further_arguments():
    seen = []

    class Processor:
        chat_template, tokenizer = "there is one", type("Tokenizer", (), {"bos_token": None})

        def apply_chat_template(self, messages, add_generation_prompt):
            return "text"

        def __call__(self, **arguments):
            seen.append(arguments)

    asked = chats.user([Image.fromarray(np.zeros((8, 8, 3), np.uint8)), "a.mp4"], "what ?")
    chats.inputs(Processor(), [asked])
    chats.inputs(Processor(), [asked], MediaLimits())
    assert all(set(arguments) == {"text", "images", "videos", "padding", "return_tensors"} for arguments in seen)
    chats.inputs(Processor(), [asked], MediaLimits(frames=8))
    assert seen[-1]["videos_kwargs"] == {"num_frames": 8, "do_sample_frames": True}
    Processor.image_processor, Processor.video_processor = images(), Qwen2VLVideoProcessor()
    chats.inputs(Processor(), [asked], MediaLimits(frames=8, max_pixels=4096))
    assert seen[-1]["images_kwargs"] == {"size": {"shortest_edge": 256, "longest_edge": 4096}}
    assert seen[-1]["videos_kwargs"] == {
        "num_frames": 8, "do_sample_frames": True, "size": {"shortest_edge": 256, "longest_edge": 4096}
    }  # fmt: skip
