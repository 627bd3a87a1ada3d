"""What every family must pass, on its own tiny configuration. Nobody edits this file to add a family."""

from __future__ import annotations

import pytest

from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from support.families import assert_dropping_equals_masking

#: (family, kind of media) for all that are known.
FAMILIES = [(name, kind) for name, adapter in registry().items() if adapter.available() for kind in adapter.media]

SETUPS = {
    "prefill": {"prefill": PrefillPruner(keep=0.6)},
    "thresholds": {"prefill": PrefillPruner(global_threshold=0.04, individual_threshold=0.04)},
    "select": {"vision": VisionStagePruner(window=None, keep=0.4)},
    "merge": {"vision": VisionStagePruner(window=2, threshold=0.2)},
    "all three": {
        "vision": VisionStagePruner(window=2, threshold=0.2),
        "prefill": PrefillPruner(keep=0.4),
        "decode": DecodeCachePruner(),
    },
    "eviction": {
        "vision": VisionStagePruner(window=None, keep=0.7),
        "prefill": PrefillPruner(keep=0.5),
        "decode": DecodeCachePruner(keep=4, interval=3, full_layers=1),
    },
}


def rows_of(kind, alone):
    return ((kind,),) if alone else ((kind,), (), (kind, kind))


@pytest.mark.parametrize("alone", [True, False], ids=["one row", "batch"])
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES))
def test_dropping_equals_masking_over_8_steps(name, kind, setup, alone):
    lacks = registry()[name].lacks
    if SETUPS[setup].keys() & lacks.keys():
        pytest.skip("; ".join(lacks.values()))
    assert_dropping_equals_masking(name, rows_of(kind, alone), **SETUPS[setup])
