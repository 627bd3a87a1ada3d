"""Evaluation in the field's own formats: `python -m mustdrop eval`."""

from mustdrop.eval.published import Published, published
from mustdrop.eval.result import EvalResult

__all__ = ["EvalResult", "Published", "published"]
