"""The four sockets, one per stage of a vision token's life. Each is a frozen object, callable on plain tensors."""

from mustdrop.pruners.cache_scorers import AllRows, CacheScorer, GeneratedRows, LastQuery, ObservationWindow, Received
from mustdrop.pruners.decode import DecodeCachePruner
from mustdrop.pruners.importance import Importance
from mustdrop.pruners.input import InputPruner, InputRule, Predictable
from mustdrop.pruners.prefill import PrefillPruner
from mustdrop.pruners.recycling import Recycling
from mustdrop.pruners.text_scorers import LastRow, MeanOverText, Raters, Seen, TextScorer
from mustdrop.pruners.vision import VisionStagePruner
from mustdrop.pruners.vision_rules import Features, InnerRule, PictureRule, Read, VisionRule
from mustdrop.selection import Selection

__all__ = [
    "AllRows",
    "CacheScorer",
    "DecodeCachePruner",
    "Features",
    "GeneratedRows",
    "Importance",
    "InnerRule",
    "InputPruner",
    "InputRule",
    "LastQuery",
    "LastRow",
    "MeanOverText",
    "ObservationWindow",
    "PictureRule",
    "Predictable",
    "PrefillPruner",
    "Raters",
    "Read",
    "Received",
    "Recycling",
    "Seen",
    "Selection",
    "TextScorer",
    "VisionRule",
    "VisionStagePruner",
]
