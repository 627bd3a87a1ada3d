"""What is kept: the settings of `patch`, from the environment or from the model's configuration."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mustdrop import __version__
from mustdrop.budget import Keep, check_keep
from mustdrop.errors import ConfigError, UnsupportedOptionError
from mustdrop.integrations.vllm import VARIABLE
from mustdrop.method import DEFAULT_METHOD, Method
from mustdrop.method import find as find_method
from mustdrop.pruners import PictureRule, VisionStagePruner
from mustdrop.pruners.scored import FromModel

REQUEST = "mustdrop_keep"  # in a request's `mm_processor_kwargs`

# Stages of this method can work alone; these are the knobs of its vision stage, as far as it works after an encoder.
ALONE = {"mustdrop": ("keep", "window", "merge", "merge_share", "threshold", "geometry", "key_share")}

# What to take in place of a method that cannot work here.
NEAREST = {
    "cdpruner": "divprune",
    "dart": "divprune",
    "downsample": "pooling",
    "flashvid": "fastvid",
    "mmtok": "scope",
    "mustdrop+": "tome",
    "pixelprune": "divprune",
    "sparsevlm": "visionzip",
    "vscan": "vispruner",
}
OTHERWISE = "mustdrop"


@dataclass(frozen=True)
class Serving:
    """What a server does.

    Attributes:
        method: name of the method.
        keep: tokens of each image or video that stay, unless a request says otherwise: int or share.
        pruner: the vision stage.
        mark: stands for all of this in keys of caches.
    """

    method: str
    keep: Keep
    pruner: VisionStagePruner
    mark: str

    def count(self, total: int, keep: Keep | None = None) -> int:
        """How many of the `total` tokens of one image or video stay; all, where that is fewer than asked for."""
        keep = self.keep if keep is None else keep
        tokens = math.floor(keep * total + 1e-6) if isinstance(keep, float) else keep
        return min(total, max(1, tokens))

    def key(self, item: str, keep: Keep | None) -> str:
        """The key of a cache entry for the pruned form of what has the key `item`."""
        return hashlib.sha256(f"{item}|{self.mark}|{self.keep if keep is None else keep!r}".encode()).hexdigest()


def of(config: Any) -> Serving:
    """The settings for a model: those in its configuration (`--hf-overrides`), else those in the environment.

    Raises:
        MustDropError: what `patch` raises for the same settings; or a method that cannot work in a server.
    """
    given = getattr(config, "mustdrop", None)
    return parse(environment() if given is None else given)


def environment() -> Mapping[str, Any]:
    """The settings in `MUSTDROP_VLLM`; none if it is not set.

    Raises:
        ConfigError: it is no JSON object.
    """
    text = os.environ.get(VARIABLE) or "{}"
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f'{VARIABLE} must be a JSON object such as \'{{"method": "divprune", "keep": 128}}\', got {text!r}: '
            f"{error}."
        ) from None
    if not isinstance(given, dict):
        raise ConfigError(f"{VARIABLE} must be a JSON object, got {text!r}.")
    return given


def parse(given: Mapping[str, Any]) -> Serving:
    """Settings by name: `method`, and the knobs of that method.

    Raises:
        MustDropError: what `patch` raises for the same settings.
        UnsupportedOptionError: a method that cannot work in a server; the message says why, and names another.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f'the settings of mustdrop must be an object such as {{"keep": 128}}, got {given!r}.')
    knobs = dict(given)
    name = knobs.pop("method", DEFAULT_METHOD)
    method = find_method(name, **knobs)
    pruner = _vision_stage(method, knobs)
    keep = pruner.keep
    if isinstance(keep, str):
        raise UnsupportedOptionError(
            f"{name} lets each image decide how many tokens stay, and a server must know it before the encoder runs: "
            "give keep=."
        )
    canonical = json.dumps([__version__, name, knobs], sort_keys=True, default=str)
    return Serving(name, keep, pruner, hashlib.sha256(canonical.encode()).hexdigest()[:16])


def asked(value: object) -> Keep:
    """A request's own `mustdrop_keep`, looked at.

    Raises:
        BudgetError: it can never be right.
    """
    return check_keep(value, REQUEST)  # type: ignore[arg-type]


def _vision_stage(method: Method, knobs: Mapping[str, Any]) -> VisionStagePruner:
    """The part of a method that works after an encoder."""
    if not method.drops:
        raise UnsupportedOptionError(
            f"{method.name} drops nothing, and a server that drops nothing needs no method: unset {VARIABLE}, or name "
            f'one that drops, such as "{OTHERWISE}".'
        )
    own = ALONE.get(method.name)
    if own is not None and method.vision is not None and method.prefill is not None:
        others = [knob for knob in knobs if knob not in own]
        if others:
            raise UnsupportedOptionError(
                f"a server runs the vision stage of {method.name} alone, after the encoder, so that "
                f"{', '.join(others)} cannot be set: leave them out. Its knobs here are {', '.join(own)}."
            )
        settings = dict(method.vision) | {"keep": method.prefill.keep, "inside": False}
        return VisionStagePruner(**settings)
    reason = _obstacle(method)
    if reason is not None or method.vision is None:
        other = NEAREST.get(method.name, OTHERWISE)
        raise UnsupportedOptionError(
            f"{method.name} cannot prune in a server: it {reason}, and vLLM lets a plugin drop tokens only between the "
            f'encoder and the language model. The nearest method that works is "{other}".'
        )
    return method.vision


def _obstacle(method: Method) -> str | None:
    """Why a method cannot work after an encoder."""
    if method.input is not None:
        return "leaves patches out before the encoder runs"
    if method.prefill is not None:
        return "drops tokens between decoder layers"
    if method.vision is None:
        return "drops entries of the KV cache"
    rule = method.vision.rule
    if isinstance(getattr(rule, "importance", None), FromModel):
        return "looks for a scorer in the model's folder (give importance=FOLDER)"
    if method.vision.asks:
        return "reads the question"
    if isinstance(rule, PictureRule):
        return "makes pictures smaller before the encoder sees them"
    if any(read.what == "states" for read in method.vision.reads):
        return "reads hidden states of the encoder"
    if method.renumber:
        return f"numbers positions anew ({method.renumbered_by})"
    return None
