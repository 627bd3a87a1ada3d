"""`get_*_features` of a patched model: what it returns, with the marks of the vision stage in the features."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop.adapters.base import Modality
from mustdrop.compat import by_name, eager, first_parameter
from mustdrop.errors import MustDropError
from mustdrop.layout import Layout
from mustdrop.runtime import guards
from mustdrop.runtime.state import Local
from mustdrop.runtime.vision.encoding import Encoding
from mustdrop.runtime.vision.marks import FeatureMarks
from mustdrop.runtime.vision.media_plan import EncodedMedia

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime


class MarksHook:
    """Leads marked features around a module that the model runs on what `get_*_features` gave.

    The module would keep rows of NaN as they are, but in training its weights would get them as gradients.
    """

    def __init__(self, local: Local) -> None:
        self.local = local

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Zeros in place of the marks."""
        self.local.dropped = args[0][..., :1].isnan()
        return args[0].masked_fill(self.local.dropped, 0.0), *args[1:]

    def after(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The marks again."""
        dropped, self.local.dropped = self.local.dropped, None
        return out if dropped is None else out.masked_fill(dropped.to(out.device), torch.nan)


class FeaturesWrapper:
    """Stands in for a `get_*_features` of the base model: runs the stage and marks dropped rows with NaN."""

    def __init__(self, runtime: Runtime, modality: Modality, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.runtime, self.modality, self.function = runtime, modality, function

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as before, with NaN in the rows of dropped features."""
        local, arguments = self.runtime.local, self._arguments(args, kwargs)
        # inside an encoder: the method of one kind calls that of another
        encoding = None if arguments is None or local.encoder is not None else self._prepared(arguments)
        if encoding is None:
            output = self.function(*args, **kwargs)
        else:
            output = self._encoded(encoding, args, kwargs)
            if encoding.marks:
                flat = self._flat(getattr(output, self.runtime.adapter.features), encoding.plan.layouts)
                self._write(output, flat, encoding.decide(flat), encoding.media)
        if local.coming is not None and local.encoder is None:
            self.runtime.stage.ahead()
        return output

    def _prepared(self, arguments: dict[str, Any]) -> Encoding | None:
        """What is asked of the encoder; None if nothing is looked at in it."""
        runtime, kind = self.runtime, self.modality.name
        for name in self.modality.pixels:
            guards.pixels(name, arguments.get(name), self.modality)
        call, stage = runtime.calls.encoding, runtime.encoders.get(kind)
        media = EncodedMedia.of(kind, runtime.adapter.layouts(runtime.model, kind, arguments), call)
        if call is not None:
            call.layouts[kind] = media.by_prompt(media.layouts)
        return None if stage is None else Encoding(runtime, self.modality, stage, media, arguments)

    def _encoded(self, encoding: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model's own method returns, with the stage at work in the encoder."""
        local, smaller, call = self.runtime.local, encoding.smaller, encoding.media.during
        local.encoder = encoding.run
        try:
            if smaller is None:
                output = self.function(*args, **kwargs)
            else:
                output = smaller(self.function, args, kwargs, encoding.arguments)
        finally:
            local.encoder, local.capture = None, None
        if call is not None:
            call.encoded.append(encoding.run)
        return output

    def _write(self, output: Any, flat: Tensor, decided: FeatureMarks, media: EncodedMedia) -> None:
        """Mark the features (F, C) of an output; what the model adds to tokens later is merged like them."""
        adapter, layouts, kind, call = self.runtime.adapter, media.layouts, media.kind, media.during
        features = getattr(output, adapter.features)
        setattr(output, adapter.features, _restored(decided.write(flat), features, layouts))
        for name in adapter.added_features:
            levels = [_restored(decided.merged(_rows(level)), level, layouts) for level in getattr(output, name)]
            setattr(output, name, levels)
        if call is None:
            return
        call.marks[kind] = media.by_prompt(decided.marks)
        if decided.flat is not None:
            call.flat[kind] = decided.flat
        if _structural(layouts) and _count(features) < len(flat):
            call.unmarked = True  # rows that the model adds later bear no marks

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The call's arguments by name; None if there are no pixels, for transformers' own error message.

        Releases name the main argument differently; what comes first is what is encoded.
        """
        arguments = by_name(self.function, args, kwargs) if args else dict(kwargs)
        names = self.modality.pixels
        first = arguments.get(first_parameter(self.function))
        if all(arguments.get(name) is None for name in names) and isinstance(first, Tensor):
            arguments[names[0]] = first
        return arguments if any(arguments.get(name) is not None for name in names) else None

    def _flat(self, features: Any, layouts: Sequence[Layout]) -> Tensor:
        """(F, C) features of all media."""
        made = _rows(features)
        expected = sum(layout.size for layout in layouts)
        if len(made) == expected - _structural(layouts) < expected:  # some releases add these rows only afterwards
            picture = ~torch.cat([layout.structural for layout in layouts]).to(made.device)
            made = made.new_zeros(expected, made.shape[1]).masked_scatter(picture[:, None], made)
        if len(made) != expected:
            raise MustDropError(
                f"the adapter {self.runtime.adapter.name!r} expected {expected} features of {len(layouts)} "
                f"{self.modality.name}s ({[layout.size for layout in layouts]}), the model made {len(made)}. "
                "Do the processor and the config of the model agree (patch size, image size, merge size)?"
            )
        return made


def _rows(features: Any) -> Tensor:
    """(F, C) of features in whatever container: one tensor, or one per medium, with or without a frame dimension."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    parts = [part.flatten(0, -2) for part in features]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _structural(layouts: Sequence[Layout]) -> int:
    """Rows of all media that stand for no part of a picture."""
    return sum(layout.size - layout.in_picture for layout in layouts)


def _count(features: Any) -> int:
    """F of features in whatever container."""
    parts = [features] if isinstance(features, Tensor) else features
    return sum(math.prod(part.shape[:-1]) for part in parts)


def _restored(flat: Tensor, like: Any, layouts: Sequence[Layout]) -> Any:
    """Features (F, C) in the container that the model returned them in, without rows that it adds only later."""
    parts = [like] if isinstance(like, Tensor) else list(like)
    counts = [math.prod(part.shape[:-1]) for part in parts]
    if sum(counts) < len(flat):
        flat = flat[~torch.cat([layout.structural for layout in layouts]).to(flat.device)]
    if isinstance(like, Tensor):
        return flat.view(like.shape)
    pieces = torch.split(flat, counts)
    return type(like)(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))
