"""What is in the sdist and in the wheel: what must be, nothing else, and not too much of it.

`nox -s dist` builds both and runs this on the folder: `python tools/distribution.py dist`. With `--tag v1.2.3`, as the
release workflow calls it, it also refuses what is not ready to be published.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
LARGEST_SDIST = 20_000_000  # bytes, as a package index may ask; it is about 8 MB
LARGEST_WHEEL = 12_000_000  # bytes, most of which are the bundled models
# Beside what git knows below these names, an sdist holds its metadata. A wheel holds the package alone.
IN_SDIST = ("src", "tests", "benchmarks", "docs", "examples", "space", "tools")
LEFT_OUT = "tests/golden/"  # recordings, too large for a package index
ALONE_IN_SDIST = (
    ".gitignore",  # hatchling takes it along, and reads it when a wheel is made from the sdist
    "CHANGELOG.md",
    "CITATION.cff",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "mkdocs.yml",
    "noxfile.py",
    "pyproject.toml",
)
MUST_BE_IN_WHEEL = (
    "mustdrop/__init__.py",
    "mustdrop/py.typed",
    "mustdrop/cli/__init__.py",
    "mustdrop/demo/checkpoint/model.safetensors",
    "mustdrop/demo/digits.npz",
    "mustdrop/kernels/triton/__init__.py",
    "mustdrop/methods/mustdrop.py",
)
UNTRACKED = re.compile(r"(^|/)(__pycache__|\.[^/]*_cache|\.DS_Store|\.env|.*\.py[cod])(/|$)")


def tracked(root: Path) -> set[str]:
    """The files that git knows, with those that are new and not ignored."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (root / name).is_file()}


def expected(root: Path) -> set[str]:
    """The files of the project that an sdist should hold."""
    chosen = {name for name in tracked(root) if name in ALONE_IN_SDIST or PurePosixPath(name).parts[0] in IN_SDIST}
    return {name for name in chosen if not name.startswith(LEFT_OUT)}


def sdist_files(path: Path) -> set[str]:
    """Names in an sdist, without its top folder."""
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames() if name.partition("/")[2]}


def wheel_files(path: Path) -> set[str]:
    """Names in a wheel."""
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def sdist_problems(path: Path, root: Path) -> Iterator[str]:
    """What is wrong with an sdist."""
    yield from _too_large(path, LARGEST_SDIST)
    found = sdist_files(path) - {"PKG-INFO"}
    yield from (f"{path.name}: should not hold {name}" for name in sorted(found) if UNTRACKED.search(name))
    if (root / ".git").exists():
        wanted = expected(root)
        yield from (f"{path.name}: lacks {name}" for name in sorted(wanted - found))
        yield from (f"{path.name}: holds {name}, which is not of the project" for name in sorted(found - wanted))


def wheel_problems(path: Path, root: Path) -> Iterator[str]:
    """What is wrong with a wheel."""
    yield from _too_large(path, LARGEST_WHEEL)
    names = wheel_files(path)
    info = f"{'-'.join(path.name.split('-')[:2])}.dist-info/"
    package = {name for name in names if not name.startswith(info)}
    wanted = {str(PurePosixPath(name).relative_to("src")) for name in expected(root) if name.startswith("src/")}
    yield from (f"{path.name}: lacks {name}" for name in sorted({*wanted, *MUST_BE_IN_WHEEL} - package))
    yield from (f"{path.name}: should not hold {name}" for name in sorted(package - wanted))
    if not any(name.startswith(info) and name.endswith("/LICENSE") for name in names):
        yield f"{path.name}: lacks the licence"


def metadata(path: Path) -> Message:
    """The metadata of a wheel."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


def release_problems(wheel: Path, tag: str, root: Path) -> Iterator[str]:
    """Why this must not be published under a tag."""
    about = metadata(wheel)
    version = about["Version"]
    if tag != f"v{version}":
        yield f"the tag is {tag}, and the version of src/mustdrop/__init__.py is {version}: expected v{version}"
    links = " ".join(about.get_all("Project-URL") or [])
    if "Repository" not in links:
        yield 'pyproject.toml: [project.urls] lacks "Repository": say where the project lives before it is published'
    if f"## [{version}]" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        yield f"CHANGELOG.md has no section [{version}]"
    if "PUBLISHED = True" not in (root / "src" / "mustdrop" / "extras.py").read_text(encoding="utf-8"):
        yield "src/mustdrop/extras.py: PUBLISHED is not True, so messages would say how to install from a checkout"


def _too_large(path: Path, limit: int) -> Iterator[str]:
    size = path.stat().st_size
    if size > limit:
        yield f"{path.name}: {size / 1e6:.1f} MB, the limit is {limit / 1e6:.0f} MB"


def one(folder: Path, pattern: str) -> Path:
    """The one file of a folder that fits."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one {pattern}, found {len(found)}: empty the folder and build again")
    return found[0]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Print what is wrong; the exit status."""
    parser = argparse.ArgumentParser(description="Check what was built.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag", help="also check that this may be published under the tag")
    options = parser.parse_args(arguments)
    sdist, wheel = one(options.folder, "*.tar.gz"), one(options.folder, "*.whl")
    found = [*sdist_problems(sdist, root), *wheel_problems(wheel, root)]
    if options.tag is not None:
        found += release_problems(wheel, options.tag, root)
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in (sdist, wheel))
    print(*found, f"{sizes}: {len(found)} problems", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
