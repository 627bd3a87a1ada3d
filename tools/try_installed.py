"""Use mustdrop as someone who has only the wheel: `nox -s dist` runs this in a folder far from the repository.

Two packages must be installed: mustdrop, and tools/second_package, which announces a method. Arguments: the examples
to run.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import mustdrop


def command(*arguments: str) -> str:
    """What the command line prints; it must succeed."""
    done = subprocess.run([sys.executable, "-m", "mustdrop", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mustdrop {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    """Demo, doctor, a scorer of one's own, examples, and a method of another package."""
    home = Path(mustdrop.__file__).parent
    if not home.is_relative_to(sys.prefix):
        raise SystemExit(f"mustdrop is imported from {home}, not from the environment {sys.prefix}")
    print(command("--version"), command("doctor"), sep="\n")
    command("demo", "--keep", "64", "--method", "mustdrop", "--question", "where is the magenta one ?", "--out", "demo")
    answers = json.loads(Path("demo", "demo.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in answers] == ["none", "mustdrop"], answers
    assert Path("demo", "kept.png").stat().st_size > 10_000
    own_scorer()
    for example in sys.argv[1:]:
        sys.argv = [example]
        runpy.run_path(example, run_name="__main__")
    another_package()
    print("all of it works")


def own_scorer() -> None:
    """Train one for two steps, as docs/fit.md has it, and answer with it."""
    command("fit", "--benchmark", "scenes", "--split", "train", "--limit", "16", "--steps", "2", "--out", "scorer")
    scored = ("--method", "learned", "--knob", "importance=scorer", "--keep", "64")
    print(command("eval", "scenes", "--limit", "4", *scored, "--out", "answers"))


def another_package() -> None:
    """The method that tools/second_package announces is listed, patches, and keeps a third."""
    from PIL import Image

    from mustdrop.demo.model import load, prompt
    from mustdrop.demo.scenes import SceneMaker

    assert "every_third" in mustdrop.list_methods(), mustdrop.list_methods()
    assert "every_third" in command("methods")
    model, processor = load()
    image = Image.fromarray(SceneMaker("heldout", seed=7).scene().image)
    inputs = processor(text=prompt(processor, "where is the magenta one ?"), images=image, return_tensors="pt")
    with mustdrop.patched(model, "every_third"):
        model.generate(**inputs, max_new_tokens=2)
        assert mustdrop.last_trace(model).tokens.unique().tolist() == [192]


if __name__ == "__main__":
    main()
