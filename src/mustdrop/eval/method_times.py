"""What the method takes of the time to the first token, of some questions of a run that is done.

The run itself is not clocked at every turn, so its answers, times and throughput are those of a run without this.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence

from mustdrop.eval.batches import Inputs
from mustdrop.eval.journal import Line
from mustdrop.eval.prepare import Prepared
from mustdrop.eval.result_parts import MethodTimeInfo


def measure(ready: Prepared, lines: Sequence[Line]) -> MethodTimeInfo | None:
    """The medians; None, with a warning, where no question with vision tokens was answered.

    Args:
        ready: what was run, with the number of questions to measure.
        lines: the journal's line of each question; the first ones that have vision tokens are asked again.
    """
    places = [place for place, line in enumerate(lines) if line.get("total")][: ready.settings.method_time]
    if not places:
        warnings.warn(
            "--method-time: no question with a picture or a video was answered, so there is nothing to measure.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    inputs, engine = Inputs(ready.items, ready.prompter), ready.engine
    spent = [engine.method_time(inputs[[place]]) for place in places]
    return MethodTimeInfo(
        questions=len(spent),
        method_ms=1000 * statistics.median(one.method for one in spent),
        prefill_ms=1000 * statistics.median(one.whole for one in spent),
        device=str(engine.device),
    )
