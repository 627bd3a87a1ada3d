"""lmms-eval: `lmms_eval --model mustdrop_hf --model_args pretrained=...,method=mustdrop,keep=64 --tasks ...`.

lmms-eval finds `manifest` by the entry point in its group `lmms_eval.models`.
"""

from __future__ import annotations

from typing import Any

NAME = "mustdrop_hf"
_MODULE = "mustdrop.integrations.lmms_eval_models"


def manifest() -> Any:
    """What lmms-eval is to load: one class for its chat tasks, which it prefers, and one for its simple tasks."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=NAME,
        simple_class_path=f"{_MODULE}.MustDropSimple",
        chat_class_path=f"{_MODULE}.MustDropChat",
        aliases=("mustdrop",),
    )
