"""What a family lacks and a method needs is refused by name, with the nearest method that works there."""

from __future__ import annotations

from mustdrop.adapters.base import Adapter
from mustdrop.errors import UnsupportedModelError
from mustdrop.method import Method
from mustdrop.registry import built_in, find

#: The sockets of a `Method`, in the order in which tokens meet them, and the pruner of each.
SOCKETS = {"vision": "VisionStagePruner", "prefill": "PrefillPruner", "decode": "DecodeCachePruner"}


def require(method: Method, adapter: Adapter) -> None:
    """Refuse a method that needs a stage which no model of a family can have.

    Raises:
        UnsupportedModelError: the message says why, and what works.
    """
    for stage, why in missing(method, adapter).items():
        raise UnsupportedModelError(
            f"the {adapter.name} family has no {stage} stage, which the method {method.name!r} needs: {why} "
            f"{_instead(method, adapter)}"
        )


def missing(method: Method, adapter: Adapter) -> dict[str, str]:
    """Stages that a method needs and a family lacks -> why it lacks them."""
    return {name: adapter.lacks[name] for name in SOCKETS if name in adapter.lacks and getattr(method, name)}


def nearest(method: Method, adapter: Adapter) -> str:
    """Name of the built-in method that is most like another one and needs nothing that a family lacks.

    Most alike is what chooses by the same: by the encoder's attention, by the question, or by neither.
    """
    possible = {name: find(name) for name in sorted(built_in())}
    possible = {name: one for name, one in possible.items() if one.drops and not missing(one, adapter)}
    mine = _chooses_by(method)
    return max(possible, key=lambda name: sum(a == b for a, b in zip(mine, _chooses_by(possible[name]), strict=True)))


def _chooses_by(method: Method) -> tuple[bool, bool]:
    """Whether a method's choice rests on the encoder's attention, and whether on the question."""
    vision = method.vision
    if vision is None:
        return False, True
    encoder = any(read.what in ("attention", "received", "joint_attention") for read in vision.reads)
    return encoder, vision.asks


def _instead(method: Method, adapter: Adapter) -> str:
    """What to patch with."""
    left = [name for name in SOCKETS if name not in adapter.lacks]
    own = {name: getattr(method, name) for name in left if getattr(method, name) is not None}
    calls = ", ".join(f"{name}={SOCKETS[name]}(...)" for name in own or left)
    return (
        f"The nearest method that works here is mustdrop.patch(model, {nearest(method, adapter)!r}, keep=...); "
        f"pruners of your own go into the other stages: mustdrop.patch(model, {calls})."
    )
