"""What an adapter states about one Hugging Face architecture: where things are, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mustdrop.compat import MINIMUM_TRANSFORMERS, older_than
from mustdrop.cost import linear_flops
from mustdrop.errors import UnsupportedModelError
from mustdrop.layout import Layout


@dataclass(frozen=True)
class Modality:
    """One kind of media that a family takes.

    Attributes:
        name: "image" or "video".
        method: method of the base model that encodes it.
        pixels: names of that method's main argument, the current one first.
        token: id that stands for one of its features in the prompt.
    """

    name: str
    method: str
    pixels: tuple[str, ...]
    token: int


@dataclass(frozen=True)
class Tower:
    """A vision encoder.

    Attributes:
        module: the encoder.
        blocks: its transformer layers, in order.
        prefix: tokens before the patches of each item (1 with a CLS token, 0 without).
        suffix: tokens after the patches of each item; such towers merge after the encoder only (`pool` is None).
        has_cls: whether the first prefix token, or without a prefix the last suffix token, attends like a CLS token.
        packed: whether the patches of all items lie in one sequence without a batch dimension (or with one of size 1).
            Its layers take borders or a mask, and rotary positions: they can run on some of the patches.
        padded: whether items lie side by side, padded to the longest, and the layers take nothing of the grid but a row
            for each patch (positions, rotary tables, masks): they can run on some of the patches of each item.
        uncut: why the layers of a packed tower cannot run on some of the patches; empty if they can. Then tokens merge
            after the encoder, not in it.
        mergers: modules of a packed tower that map the patches of its cells, which follow one another, to a row each.
            They run on the cells that are left. Without any, all patches are there again after the layers.
        halves: names of the second norm and the MLP of a layer that computes x + mlp(norm(x)) after its attention; None
            where layers are made otherwise.
        whole: layers whose patches see their whole frame, where all others see a window of it; empty if all do.
        before: layers before `blocks`, on the finer patches that were joined before the first of `blocks`. They only
            cost: nothing is read in them, and patches are counted as `blocks` sees them.
        embeds: module of a packed tower that maps the pixels of each patch, a row of its input, to a row by themselves.
            It runs on the patches that enter. None: on all, or there is no such module.
    """

    module: nn.Module
    blocks: nn.ModuleList
    prefix: int = 0
    has_cls: bool = False
    suffix: int = 0
    packed: bool = False
    padded: bool = False
    uncut: str = ""
    mergers: tuple[nn.Module, ...] = ()
    halves: tuple[str, str] | None = None
    whole: tuple[int, ...] = ()
    before: tuple[nn.Module, ...] = ()
    embeds: nn.Module | None = None

    @property
    def cuts(self) -> bool:
        """Whether the layers can run on some of the patches."""
        return (self.packed or self.padded) and not self.uncut


class Adapter:
    """Where things are in one family. Adapters hold no state and name no method.

    Few families need more than `name`, `classes` and a method or two; the last six attributes serve the families named.

    Attributes:
        name: the family's name, as `mustdrop.adapters()` lists it.
        classes: names of the Hugging Face classes it is for.
        media: kind of media -> (method of the base model, names of its main argument, config field of the token id).
        refuses_flash: why the text model cannot be pruned with flash attention; empty if it can.
        token_types: name of the argument that marks the kind of each token (1 image, 2 video), or None.
        since: oldest release of transformers in which the family passes its tests.
        cell_pixels: whether the pixels of each patch are known before a packed encoder runs (`pixels` gives them).
        fixed_pictures: why pictures cannot be resized once the processor has made pixels of them; empty if they can.
        lacks: stage that no model of the family can have ("vision", "prefill", "decode") -> why.
        additions: (Qwen3-VL) methods of the text model, called as method(hidden, mask, rows), that add `rows` to the
            hidden states of the tokens in `mask` between decoder layers (DeepStack).
        added_features: (Qwen3-VL) fields of the features output that hold those rows, as a list of levels of features
            per medium.
        features: (Llama 4) field of the features output that holds what enters the language model.
        after_features: (Llama 4) modules of the base model that map what its features methods returned, and nothing
            else.
        row_arguments: (Ernie 4.5 VL, Gemma 4) arguments of a decoder layer, beside its hidden states, masks and
            positions, that hold one entry per token in dimension 1.
        experts_of: (Ernie 4.5 VL) "text" or "vision" -> name of a module in the decoder layers that only tokens of that
            kind run.
    """

    name: str
    classes: tuple[str, ...]
    media: dict[str, tuple[str, tuple[str, ...], str]] = {  # noqa: RUF012 (a constant of the class)
        "image": ("get_image_features", ("pixel_values",), "image_token_id")
    }
    refuses_flash: str = ""
    token_types: str | None = None
    since: str = MINIMUM_TRANSFORMERS
    fixed_pictures: str = ""
    cell_pixels: bool = False
    lacks: dict[str, str] = {}  # noqa: RUF012 (a constant of the class)
    additions: tuple[str, ...] = ()
    added_features: tuple[str, ...] = ()
    features: str = "pooler_output"
    after_features: tuple[str, ...] = ()
    row_arguments: tuple[str, ...] = ()
    experts_of: dict[str, str] = {}  # noqa: RUF012 (a constant of the class)

    def available(self) -> bool:
        """Whether the installed transformers has this family, with a configuration that its own checks accept."""
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        if older_than(self.since):
            return False
        kinds = [getattr(transformers, name) for name in self.classes if hasattr(transformers, name)]
        try:
            return any(kind.config_class() is not None for kind in kinds)
        except StrictDataclassError:  # early releases of some families declare fields with the wrong type
            return False

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """Layout of each medium of one features call: one per entry of the features that the call returns.

        By default every item of the encoder's batch (a picture, or a tile where the prompt counts tiles as pictures) is
        a medium of its own, whose features are the squares of `pool` x `pool` patches.

        Args:
            model: the patched model.
            modality: key of `media`.
            arguments: the call's arguments by name.
        """
        pool = self.pool(model, modality, arguments)
        if pool is None:
            raise NotImplementedError(f"{self.name}: its features lie on no squares of patches, so it needs `layouts`.")
        rows, columns = self.encoder_grid(model, modality, arguments)
        items = self.main_argument(modality, arguments).flatten(0, -4).shape[0]
        grid = (1, rows // pool, columns // pool)
        return [Layout.of_frames(grid, (rows, columns), i, pool=pool) for i in range(items)]

    def main_argument(self, modality: str, arguments: dict[str, Any]) -> Tensor:
        """What a features call encodes, under whichever of its names it was given."""
        found = (arguments[name] for name in self.media[modality][1] if arguments.get(name) is not None)
        return next(found)  # type: ignore[no-any-return]

    def check(self, model: Any) -> None:
        """Look whether this model of the family is one that the adapter is for.

        Raises:
            UnsupportedModelError: it is not; the message says what it has and what still works.
        """

    def modalities(self, model: Any) -> tuple[Modality, ...]:
        """The media that this model takes."""
        return tuple(
            Modality(name, method, pixels, getattr(model.config, token))
            for name, (method, pixels, token) in self.media.items()
            if getattr(model.config, token, None) is not None
        )

    def base(self, model: Any) -> nn.Module:
        """The multimodal model without its language head; owns the `get_*_features` methods."""
        return model.model  # type: ignore[no-any-return]

    def text(self, model: Any) -> nn.Module:
        """The text model: has `layers` and is called with `inputs_embeds`."""
        return self.base(model).language_model  # type: ignore[return-value]

    def decoder_layers(self, model: Any) -> nn.ModuleList:
        """The decoder layers of the text model."""
        return self.text(model).layers  # type: ignore[return-value]

    def recurrent(self, model: Any) -> tuple[int, ...]:
        """Indices of the decoder layers that fold the tokens before a token into one state.

        Their tokens must follow one another, and their cache holds no entry per token. Layers of attention are none.
        """
        return ()

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """The vision encoder for a kind of media.

        Raises:
            UnsupportedModelError: an encoder that the vision stage cannot work in; the message says why.
        """
        if "vision" in self.lacks:
            raise UnsupportedModelError(
                f"the {self.name} family has no vision stage: {self.lacks['vision']} Its encoder cannot be looked into."
            )
        return self.dense_tower(self.base(model).vision_tower)

    def dense_tower(self, module: Any) -> Tower:
        """A tower of items with a batch dimension: CLIP has a CLS token, other kinds (SigLIP) have none.

        The layers sit one level deeper before transformers 5.6, hence the search.
        """
        depth = module.config.num_hidden_layers
        found = [blocks for blocks in _lists(module) if len(blocks) == depth]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{self.name}: expected one list of {depth} layers in {type(module).__name__}, found {len(found)}."
            )
        cls = module.config.model_type.startswith("clip")
        if found[0] not in _HALVES:
            names = ("layer_norm2", "mlp")  # CLIP and SigLIP
            fits = all(hasattr(block, name) for block in found[0] for name in names)
            _HALVES[found[0]] = names if fits else None
        return Tower(module, found[0], int(cls), cls, halves=_HALVES[found[0]])

    def encoder_grid(self, model: Any, modality: str, arguments: dict[str, Any]) -> tuple[int, int]:
        """(rows, columns) of the patches of one item of a dense tower."""
        pixels = self.main_argument(modality, arguments)
        config: Any = self.tower(model, modality).module.config
        sides = config.patch_size
        high, wide = sides if isinstance(sides, list | tuple) else (sides, sides)
        return int(pixels.shape[-2]) // high, int(pixels.shape[-1]) // wide

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int | None:
        """Side of the square of patches that makes one feature.

        None where features do not lie on squares of patches (resampling): tokens then merge after the encoder.
        """
        return 1

    def resized(
        self, model: Any, modality: str, arguments: dict[str, Any], sizes: list[tuple[int, int]]
    ) -> dict[str, Any] | None:
        """The arguments of the features method that change when media have other sizes.

        Args:
            model: the model.
            modality: kind of media.
            arguments: of the features method, by name.
            sizes: (rows, columns) of the features of each medium.

        Returns:
            None where the encoder takes pictures of one size only.
        """
        return None

    def pixels(self, model: Any, modality: str, arguments: dict[str, Any]) -> Tensor:
        """(P, D) pixels of each patch of a packed encoder, in its order, where `cell_pixels` says so.

        The features method is given them, a row for each patch.
        """
        found = next(arguments[name] for name in self.media[modality][1] if arguments.get(name) is not None)
        rows, place = found.flatten(1), self.pixel_rows(model, modality, arguments)
        return rows if place is None else rows[place.to(rows.device)]  # type: ignore[no-any-return]

    def pixel_rows(self, model: Any, modality: str, arguments: dict[str, Any]) -> Tensor | None:
        """(P,) long, which row of the pixels each patch of a packed encoder's sequence is made of; None: the same."""
        return None

    def read_layers(self, model: Any, modality: str, arguments: dict[str, Any]) -> tuple[int, ...]:
        """Indices of the encoder layers whose outputs the features are read from (0-based).

        `vision_feature_layer` counts hidden states, of which the first is the embedding.
        """
        layers = arguments.get("vision_feature_layer")
        layers = getattr(model.config, "vision_feature_layer", None) if layers is None else layers
        depth = len(self.tower(model, modality).blocks)
        if layers is None:
            return (depth - 1,)
        return tuple(k - 1 if k >= 0 else depth + k for k in ([layers] if isinstance(layers, int) else layers))

    def read_layer(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """The one of `read_layers` before which tokens must have merged.

        It is the first: features of several layers lie side by side, and all must be of the same patches.
        """
        return min(self.read_layers(model, modality, arguments))

    def fit(self, model: Any) -> Literal["crop", "stretch"]:
        """How the image processor of this family fits an image to the grid, for drawing."""
        return "stretch"

    def projector_flops(self, model: Any) -> int:
        """FLOPs per feature of what maps features into the language model, for the cost account."""
        return linear_flops(self.base(model).multi_modal_projector)  # type: ignore[arg-type]


#: Layers of a tower -> the names of their halves: asking each of them takes a while, and every call asks.
_HALVES: WeakKeyDictionary[nn.ModuleList, tuple[str, str] | None] = WeakKeyDictionary()


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of modules inside a module, without those inside other lists."""
    for part in module._modules.values():
        if part is None:
            continue
        if isinstance(part, nn.ModuleList):
            yield part
        else:
            yield from _lists(part)
