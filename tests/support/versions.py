"""The only place of the test suite that knows which transformers version is running."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import transformers
from packaging.version import Version
from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer

TRANSFORMERS = Version(transformers.__version__)

#: Before 5.18 beams and ``num_return_sequences`` repeat pixels per image, not per row: with rows that hold different
#: image counts the *unpatched* library mixes the images up, so those tests use one image per row there.
BEAMS_MIX_IMAGES = Version("5.18") > TRANSFORMERS

#: What `generate` calls its cache.
CACHE = "past_key_values" if Version("5.24") > TRANSFORMERS else "cache"

#: Families whose unpatched model this version cannot run, and the cause.
BROKEN = (
    {"llama4": "its forward reads image_outputs of an output that has none"}
    if Version("5.24.0") == TRANSFORMERS
    else {}
)

#: Whether layers with a sliding window can keep what has left it until the next crop.
RECORDS_PAST = hasattr(DynamicSlidingWindowLayer, "activate_past_recording")

#: From here on weights split over several processes are ``DTensor``s, which mustdrop asks for in tensor parallel.
SPLITS_INTO_DTENSORS = find_spec("transformers.distributed.tensor_parallel") is not None


def tower_body(model: nn.Module) -> nn.Module:
    """The module that owns ``embeddings`` and ``encoder`` of a CLIP or SigLIP tower (one level deeper before 5.6)."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def peft_fits() -> bool:
    """Whether the installed peft is for this transformers.

    From 5.24 on transformers asks for 0.22: under an older peft it refuses to add adapters itself, and the plain model
    ignores a learned prefix, which peft hands in under the former name of the cache.
    """
    return Version("5.24") > TRANSFORMERS or Version(version("peft")) >= Version("0.22")
