"""What an adapter states about one Hugging Face architecture: where things are, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Tower:
    """A vision encoder.

    Attributes:
        module: the encoder.
        blocks: its transformer layers, in order.
        prefix: tokens before the patches (1 with a CLS token, 0 without).
        has_cls: whether the first prefix token attends like a CLS token.
    """

    module: nn.Module
    blocks: nn.ModuleList
    prefix: int
    has_cls: bool


@dataclass(frozen=True)
class ImageLayout:
    """How the features of one image lie.

    Attributes:
        grid: (rows, columns) of the patches.
        prefix: feature rows before the patches (a CLS row that the model keeps); never dropped by the vision stage.
    """

    grid: tuple[int, int]
    prefix: int = 0

    @property
    def size(self) -> int:
        """Features of the image."""
        return self.grid[0] * self.grid[1] + self.prefix


class Adapter(ABC):
    """Where things are in one family. Adapters hold no state and name no method.

    Attributes:
        name: the family's name, as `mustdrop.adapters()` lists it.
        classes: names of the Hugging Face classes it is for.
        features: names of the methods of the base model that encode media.
        pixels: name of their main argument.
        fit: how the family's image processor makes the image fit the grid: "crop" (centre) or "stretch".
    """

    name: str
    classes: tuple[str, ...]
    features: tuple[str, ...] = ("get_image_features",)
    pixels: str = "pixel_values"

    @abstractmethod
    def base(self, model: nn.Module) -> nn.Module:
        """The multimodal model without its language head; owns the `get_*_features` methods."""

    @abstractmethod
    def text(self, model: nn.Module) -> nn.Module:
        """The text model: has `layers` and is called with `inputs_embeds`."""

    @abstractmethod
    def tower(self, model: nn.Module) -> Tower:
        """The vision encoder.

        Raises:
            UnsupportedModelError: an encoder that the vision stage cannot work in; the message says why.
        """

    @abstractmethod
    def placeholder_ids(self, model: nn.Module) -> tuple[int, ...]:
        """Token ids that stand for vision features in the prompt."""

    @abstractmethod
    def layouts(self, model: nn.Module, arguments: dict[str, Any]) -> list[ImageLayout]:
        """Layout of each image of one features call.

        Args:
            model: the patched model.
            arguments: the call's arguments by name.
        """

    @abstractmethod
    def read_layer(self, model: nn.Module, arguments: dict[str, Any]) -> int:
        """Index of the last encoder layer whose output the features are read from (0-based)."""

    @abstractmethod
    def fit(self, model: nn.Module) -> Literal["crop", "stretch"]:
        """How the image processor of this family fits an image to the grid, for drawing."""

    def projector(self, model: nn.Module) -> nn.Module | None:
        """What maps features into the language model, for the cost account; None if it is not one module."""
        return None

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of the text model."""
        return self.text(model).layers  # type: ignore[return-value]
