"""MMTok: coverage of question and picture (arXiv 2508.18264)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mustdrop import kernels
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Read, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.importance import check_question
from mustdrop.pruners.vision_rules import STATES, Comparing, ComparingRule
from mustdrop.rules.diversity import unit
from mustdrop.rules.geometry import around_mean

# The published weight of the picture, and the temperatures (0.01 for words with Qwen).
ALPHA, TEXT, VISION = 0.5, 0.02, 0.2


class TwoCoverages(ComparingRule):
    """Each pick adds the most to how well the picks cover the words and the features of the encoder.

    A word spreads 1 over the features, by a softmax of its cosines with what enters the language model; so does each
    feature of the encoder, by its cosines with the others. Words have the weight 1 together, features `alpha`.

    Attributes:
        alpha: weight of the picture, 0 or more; 0 looks at the words alone.
        text_temperature: of the softmax of the words.
        vision_temperature: of the softmax of the features.
        geometry: how features of the encoder are compared with each other; words are compared with raw features.
    """

    asks: ClassVar[bool] = True
    alpha: float = Field(ALPHA, ge=0)
    text_temperature: float = Field(TEXT, gt=0)
    vision_temperature: float = Field(VISION, gt=0)

    @property
    def reads(self) -> tuple[Read, ...]:
        """What leaves the encoder."""
        return STATES

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        check_question(seen.values, seen.question)
        states = unit(around_mean(seen.of(STATES[0]), self.geometry))
        picture = (states @ states.mT / self.vision_temperature).softmax(2) * (self.alpha / states.shape[1])
        rows = torch.cat([self._words(seen), picture], 1)
        # picks do not depend on a common factor, and sums of shares of thousands of features are small
        return Selection.picked(kernels.greedy_coverage(rows * rows.shape[2], count))

    def _words(self, seen: Features) -> Tensor:
        """(B, T, N) what each word spreads over the features; rows of 0 where a view has fewer words."""
        spread = [
            (unit(words) @ values.mT / self.text_temperature).softmax(1) / max(1, len(words))
            for words, values in zip(seen.question, unit(seen.values), strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(spread, batch_first=True)


class MMTok(Comparing, Recipe):
    """Maximum coverage of the question's words and of the picture; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        alpha: weight of the picture beside the words; 0 looks at the words alone.
        text_temperature: of the softmax that spreads a word over the features; the paper has 0.01 for Qwen.
        vision_temperature: of the softmax that spreads a feature of the encoder over the others.
        geometry: how the encoder's features are compared with each other: "raw" as they are, "centered" around their
            mean, "standardized" around it and with channels of equal variance. Words meet raw features.
    """

    keep: Budget = DEFAULT_KEEP
    alpha: float = Field(ALPHA, ge=0)
    text_temperature: float = Field(TEXT, gt=0)
    vision_temperature: float = Field(VISION, gt=0)

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = TwoCoverages(
            alpha=self.alpha,
            text_temperature=self.text_temperature,
            vision_temperature=self.vision_temperature,
            geometry=self.geometry,
        )
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
