"""What it costs to have mustdrop: bytes to download, size of what is built, time of an import; each within its bound.

Two requirements are measured: torch as a package index gives it to Linux, with its CUDA libraries, and a build of torch
for the CPU that lies in a folder. uv resolves both and says how large every file is; nothing is downloaded for it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from benchmarks.common import RESULTS, ROOT, origin, save

#: Measurement -> the most that it may be.
BOUNDS = {
    "wheel_bytes": 12_000_000,  # with the two bundled models
    "sdist_bytes": 20_000_000,
    "modules_of_import": 4,  # `import mustdrop`: beside the standard library, itself and its table of old names
    "modules_of_patch": 160,  # `mustdrop.patch`, beyond `import torch, transformers`
    "share_of_patch": 0.30,  # seconds of `mustdrop.patch` beyond theirs, as a share of theirs
    "seconds_of_help": 1.5,  # `mustdrop --help` beyond the bare interpreter
}
#: What the line of README.md installs beside mustdrop's requirements: an extra, and what Qwen-VL's processors need.
EXTRA, BESIDE = "viz", ("torchvision",)
PYTHON = (3, 11)
LIBC = 34  # of manylinux_2_34
CODE = {
    "bare": "",
    "import": "import mustdrop",
    "base": "import torch, transformers; transformers.PreTrainedModel",
    "patch": "import torch, transformers; transformers.PreTrainedModel; import mustdrop; mustdrop.patch",
    "help": (
        "import contextlib, sys; sys.argv = ['mustdrop', '--help']; from mustdrop.cli import main\n"
        "with contextlib.suppress(SystemExit): main()"
    ),
}
COUNT = """
import resource, sys
used = resource.getrusage(resource.RUSAGE_SELF)
own = [name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names]
print(len(own), used.ru_utime + used.ru_stime, file=sys.stderr)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--rounds", type=int, default=5, help="processes per import")
    parser.add_argument("--uv", default="uv", help="uv; `pip install uv` brings it")
    parser.add_argument("--cpu-wheels", type=Path, help="folder with a wheel of torch for the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "install.json")


def run(options: argparse.Namespace) -> int:
    """Measure, write, and say what is above its bound."""
    figures: dict[str, Any] = {**built(options.uv), **imports(options.rounds)}
    record = origin(torch.device("cpu"), 0) | {
        "what": "what it costs to have mustdrop: downloads, sizes, imports",
        "python": ".".join(map(str, PYTHON)),
        "rounds": options.rounds,
        "downloads": downloads(options.uv, options.cpu_wheels, figures["wheel_bytes"]),
        "figures": figures,
        "bounds": BOUNDS,
    }
    save(options.out, record)
    broken = above(record)
    print(*broken, sep="\n")
    return int(bool(broken))


def above(record: Mapping[str, Any]) -> list[str]:
    """What is above its bound."""
    figures, bounds = record["figures"], record["bounds"]
    return [f"{name}: {figures[name]} is above {most}" for name, most in bounds.items() if figures[name] > most]


# -- imports ----------------------------------------------------------------------------------------------------------


def imports(rounds: int) -> dict[str, float]:
    """Seconds of a processor and modules of fresh processes; the statements take turns.

    A busy machine makes processes wait, and that is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in CODE}
    modules: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, code in CODE.items():
            done = subprocess.run([sys.executable, "-c", code + COUNT], capture_output=True, text=True, check=True)
            *_, count, used = done.stderr.split()
            if number:  # the first round writes byte code
                seconds[name].append(float(used))
            modules[name] = int(count)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    base = median["base"] - median["bare"]
    return {
        "seconds_of_import": round(median["import"] - median["bare"], 3),
        "seconds_of_torch_and_transformers": round(base, 3),
        "seconds_of_patch": round(median["patch"] - median["base"], 3),
        "share_of_patch": round((median["patch"] - median["base"]) / base, 3),
        "seconds_of_help": round(median["help"] - median["bare"], 3),
        "modules_of_import": modules["import"] - modules["bare"],
        "modules_of_patch": modules["patch"] - modules["base"],
    }


# -- sizes ------------------------------------------------------------------------------------------------------------


def built(uv: str) -> dict[str, int]:
    """Bytes of the sdist, of the wheel, and of the trained model inside."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([uv, "build", "--out-dir", folder, str(ROOT)], check=True, capture_output=True)
        (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as archive:
            models = sum(one.compress_size for one in archive.infolist() if one.filename.endswith(".safetensors"))
        return {
            "wheel_bytes": wheel.stat().st_size,
            "wheel_bytes_of_models": models,
            "sdist_bytes": sdist.stat().st_size,
        }


def downloads(uv: str, cpu_wheels: Path | None, own: int) -> dict[str, Any]:
    """Bytes that the line of README.md downloads on Linux, and with a wheel of torch for the CPU.

    mustdrop itself, whose wheel has `own` bytes, counts in both.
    """
    found: dict[str, Any] = {"plain": None, "cpu": None}
    with tempfile.TemporaryDirectory() as folder:
        found["plain"] = _total({**_locked(uv, Path(folder)), "mustdrop": own})
    if cpu_wheels is not None:
        (wheel,) = sorted(cpu_wheels.glob("torch-*+cpu-*.whl"))[-1:]
        _, version, _, _ = parse_wheel_filename(wheel.name)
        with tempfile.TemporaryDirectory() as folder:
            packages = _locked(uv, Path(folder), str(version), cpu_wheels)
        found["cpu"] = _total({**packages, "torch": wheel.stat().st_size, "mustdrop": own})
    return found


def _total(packages: Mapping[str, int]) -> dict[str, Any]:
    largest = dict(sorted(packages.items(), key=lambda item: -item[1])[:5])
    return {"bytes": sum(packages.values()), "packages": len(packages), "largest": largest}


def _locked(uv: str, folder: Path, torch_version: str | None = None, wheels: Path | None = None) -> dict[str, int]:
    """Package -> bytes of the file that an installation takes."""
    import tomllib  # Python 3.11; who measures has it

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][EXTRA], *BESIDE]
    needs = [line for line in wanted if torch_version is None or not line.startswith("torch>")]
    needs += [f"torch=={torch_version}"] if torch_version else []
    lines = [
        "[project]",
        'name = "probe"',
        'version = "0"',
        f'requires-python = "=={PYTHON[0]}.{PYTHON[1]}.*"',
        f"dependencies = {json.dumps(needs)}",
        "[tool.uv]",
        "environments = [\"sys_platform == 'linux' and platform_machine == 'x86_64'\"]",
        *([f"find-links = [{json.dumps(str(wheels))}]"] if wheels else []),
    ]
    (folder / "pyproject.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run([uv, "lock", "--project", str(folder)], check=True, capture_output=True)
    locked = tomllib.loads((folder / "uv.lock").read_text(encoding="utf-8"))["package"]
    tags = list(platform_tags())
    return {package["name"]: _size(package, tags) for package in locked if package["name"] != "probe"}


def _size(package: Mapping[str, Any], tags: Sequence[Tag]) -> int:
    """Bytes of the best wheel; 0 where uv does not know."""
    order = {tag: place for place, tag in enumerate(tags)}
    ranked = []
    for wheel in package.get("wheels", ()):
        name = re.split(r"[/#]", wheel.get("url") or wheel.get("path") or wheel["filename"])[-1].replace("%2B", "+")
        fit = [order[tag] for tag in parse_wheel_filename(name)[3] if tag in order]
        if fit:
            ranked.append((min(fit), int(wheel.get("size", 0))))
    return min(ranked)[1] if ranked else int(package.get("sdist", {}).get("size", 0))


def platform_tags() -> Iterator[Tag]:
    """What a Linux of today can install, best first."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(LIBC, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    yield from cpython_tags(PYTHON, platforms=platforms)
    yield from compatible_tags(PYTHON, platforms=platforms)
