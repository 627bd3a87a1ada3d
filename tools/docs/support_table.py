"""The table of families: which passed which conformance test, from benchmarks/results/support.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: Columns of the table of families: heading -> tests of tests/conformance/test_families.py and (from "half types" on)
#: of test_family_weights.py, all of which must pass; "compiles" is of test_family_compiles.py.
SUPPORT = {
    "select": ("test_vision_stage_selects", "test_importance_is_the_encoders_attention"),
    "merge": ("test_vision_stage_merges", "test_merged_features", "test_windows_over_frames"),
    "prefill": ("test_prefill_stage",),
    "decode": ("test_decode_stage",),
    "all": ("test_all_stages", "test_keep_all_is_bit_identical", "test_unpatch_restores", "test_cache_really_shrinks"),
    "batches": ("test_padded_row_equals_single_row", "test_any_prompt_and_budget"),
    "mixed": ("test_several_kinds_in_one_prompt",),
    "eager": ("test_eager_attention",),
    "flash": ("test_flash_attention",),
    "flex": ("test_flex_attention",),
    "beams": ("test_beams",),
    "sampling": ("test_sampling",),
    "no cache": ("test_without_cache",),
    "chat": ("test_second_turn",),
    "new picture in a chat": ("test_new_picture_in_a_second_turn",),
    "static": ("test_static_cache",),
    "trace": ("test_trace_names_the_right_patches",),
    "half types": ("test_bfloat16", "test_float16"),
    "4 bits": ("test_packed_weights",),
    "devices": ("test_several_devices",),
    "offloaded": ("test_offloaded_weights",),
    "gradients": ("test_gradients",),
    "compiles": ("test_compiled_language_model",),
}


#: What is left of a family that lacks a stage, and the test that shows it.
LEFT, LEFT_COLUMNS, LACKING_COLUMNS = "test_stages_that_are_left", ("prefill", "decode", "eager"), ("select", "merge")


def render(record: Mapping[str, Any], table: Callable[..., str]) -> str:
    """Which family passed which conformance test. A number stands for the reason why something is not there."""
    outcomes = record["outcomes"]
    columns = {name: tests for name, tests in SUPPORT.items() if any(t in o for o in outcomes.values() for t in tests)}
    reasons: list[str] = []

    def cell(column: str, own: Mapping[str, str]) -> str:
        found = [own[test] for test in columns[column] if test in own]
        if not found and LEFT in own:
            found = ["passed"] if column in LEFT_COLUMNS else [own[LEFT]] if column in LACKING_COLUMNS else []
        reason = next((outcome for outcome in found if outcome not in ("passed", "failed")), None)
        if "failed" in found:
            return "no"
        if reason is None:
            return "yes" if found else ""
        if reason not in reasons:
            reasons.append(reason)
        return f"[{reasons.index(reason) + 1}]"

    rows = []
    for case, own in outcomes.items():
        family, kind = case.rsplit("-", 1)
        rows.append([f"`{family}`", kind, *(cell(column, own) for column in columns)])
    lines = [
        f"Tiny models with random weights, float32, transformers {record['versions']['transformers']}, commit "
        f"{str(record['commit'])[:10]}{_later(record)}.",
        "",
        table(["family", "media", *columns], rows),
        "",
        *(f"{n}. {reason}" for n, reason in enumerate(reasons, 1)),
        "",
        "The tests of each column, of `tests/conformance/test_families.py`, `test_family_weights.py`"
        + (", `test_family_compiles.py`" if "compiles" in columns else "")
        + ": "
        + "; ".join(f"*{name}* " + ", ".join(f"`{test}`" for test in tests) for name, tests in columns.items())
        + ".",
    ]
    return "\n".join(lines)


def _later(record: Mapping[str, Any]) -> str:
    """Families, and columns, that ran by themselves at a later commit."""
    found: dict[str, list[str]] = {}
    ran = [(f"`{case.rsplit('-', 1)[0]}`", origin) for case, origin in record.get("later", {}).items()]
    tests = record.get("later_tests", {})
    ran += [(f"*{column}*", tests[test]) for column, its in SUPPORT.items() for test in its if test in tests]
    for name, origin in ran:
        names = found.setdefault(str(origin["commit"])[:10], [])
        if name not in names:
            names.append(name)
    return "".join(f"; {', '.join(sorted(names))} at {commit}" for commit, names in found.items())
