"""The self-test: the bundled model, patched and not, and the kernels of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

import mustdrop
from mustdrop.doctor import kernels, masking, serving
from mustdrop.errors import NothingDroppedWarning
from mustdrop.integrations import vllm as plugin
from mustdrop.kernels import dispatch

INTERPRETER_SECONDS = 300


class SelfTestError(AssertionError):
    """A check found something wrong; the message says what."""


class Skipped(Exception):  # noqa: N818 (not an error)
    """A check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    Attributes:
        name: of the check.
        state: "passed", "failed" or "skipped".
        detail: what was compared, or what is wrong, or why it was skipped.
        seconds: how long it took.
    """

    name: str
    state: Literal["passed", "failed", "skipped"]
    detail: str
    seconds: float


class Bundled:
    """The bundled model with one question about a held-out scene, on one device; made when first asked for."""

    def __init__(self, device: str) -> None:
        self.device = device

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from mustdrop.demo.model import load

        model, processor = load()
        return model.to(torch.device(self.device)), processor

    @property
    def model(self) -> Any:
        """The model, in float32."""
        return self._loaded[0]

    @cached_property
    def question(self) -> tuple[Any, str]:
        """Model inputs of the question, and its answer."""
        from PIL import Image

        from mustdrop.demo.model import prompt
        from mustdrop.demo.scenes import SceneMaker

        model, processor = self._loaded
        maker = SceneMaker("heldout", 7)
        scene = maker.scene()
        asked = maker.question(scene, "region2color")
        picture = Image.fromarray(scene.image)
        inputs = processor(text=prompt(processor, asked.text), images=picture, return_tensors="pt")
        return inputs.to(model.device), asked.answer

    def answer(self) -> str:
        """What the model says, patched or not."""
        inputs, _ = self.question
        out = self.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return str(self._loaded[1].decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    def logits(self) -> Tensor:
        """Logits of the whole prompt."""
        return self.model(**self.question[0]).logits  # type: ignore[no-any-return]


def answers(bundled: Bundled) -> str:
    """The bundled model loads, and knows the colour of an object."""
    said, truth = bundled.answer(), bundled.question[1]
    if said != truth:
        raise SelfTestError(f"the unpatched bundled model answers {said!r}, expected {truth!r}.")
    return f"it says {said!r}"


def keeps_everything(bundled: Bundled) -> str:
    """With keep=1.0 the patched model computes bit for bit what the plain one does, and so it does when unpatched."""
    before = bundled.logits()
    with mustdrop.patched(bundled.model, keep=1.0), warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingDroppedWarning)
        patched = bundled.logits()
    for what, after in (("patched with keep=1.0", patched), ("unpatched again", bundled.logits())):
        if not torch.equal(before, after):
            far = float((before - after).abs().max())
            raise SelfTestError(f"the model {what} differs from the plain one: logits by up to {far:.3g}.")
    return "all logits are equal"


def drops(bundled: Bundled) -> str:
    """At 64 tokens, tokens leave at every stage, the budget holds, and the answer is still right."""
    with mustdrop.patched(bundled.model, keep=64):
        said, trace = bundled.answer(), mustdrop.trace(bundled.model)
    spent = float(trace.equal_tokens[0])
    if not 63 < spent <= 64:
        raise SelfTestError(f"keep=64 made {spent:.2f} tokens per layer, expected more than 63 and at most 64.")
    if said != bundled.question[1]:
        raise SelfTestError(f"the model patched with keep=64 answers {said!r}, expected {bundled.question[1]!r}.")
    return f"{spent:.2f} tokens per layer of {int(trace.total[0])}, {trace.flops.ratio:.0%} of the FLOPs"


def equals_masking(bundled: Bundled) -> str:
    """Dropping tokens gives the last logits of the plain model with a mask that hides them, layer by layer."""
    difference, hidden = masking.difference(bundled.model, bundled.question[0])
    if not difference < masking.TOLERANCE:
        raise SelfTestError(
            f"logits differ from those of the masked plain model by up to {difference:.3g}, expected less than "
            f"{masking.TOLERANCE:g}."
        )
    return f"{hidden} tokens gone at the last layer, logits within {difference:.1e}"


def kernels_here(bundled: Bundled) -> str:
    """The Triton kernels compute what the references do: on the GPU, else in Triton's interpreter."""
    device = torch.device(bundled.device)
    if not dispatch.has_triton():
        raise Skipped("triton is not installed; the references run")
    if device.type == "cuda":
        reason = dispatch.obstacle(device)
        if reason is not None:
            raise Skipped(f"{reason}; the references run")
        return _agree(kernels.differences(device), "on the GPU")
    return _in_interpreter()


def serves(bundled: Bundled) -> str:
    """vLLM, if it is installed, answers with few tokens what it answers with all."""
    version = serving.installed()
    if version is None:
        raise Skipped("vLLM is not installed")
    if not plugin.supported(version):
        raise Skipped(f"the plugin is for vLLM {plugin.SUPPORTED}, found {version}")
    try:
        return serving.ask()
    except TimeoutError as late:
        raise Skipped(str(late)) from None
    except RuntimeError as error:
        raise SelfTestError(f"the bundled model in vLLM: {error}") from None


def _agree(differences: dict[str, float], where: str) -> str:
    wrong = {name: value for name, value in differences.items() if not value < kernels.TOLERANCE}
    if wrong:
        raise SelfTestError(f"kernels differ from their references {where}: {wrong}.")
    return f"{', '.join(differences)} {where}"


def _in_interpreter() -> str:
    """In a process of its own: the interpreter must be chosen before triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", dispatch.VARIABLE: "triton", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "mustdrop.doctor.kernels"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=INTERPRETER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise Skipped(f"Triton's interpreter took more than {INTERPRETER_SECONDS} s; the references run") from None
    if done.returncode == 0:
        return _agree(kernels.read(done.stdout), "in Triton's interpreter (the references run here)")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise Skipped(f"Triton's interpreter does not work here ({last[:120]}); the references run")


CHECKS: dict[str, Callable[[Bundled], str]] = {
    "bundled model answers": answers,
    "keep=1.0 is bit-identical": keeps_everything,
    "keep=64 drops and answers": drops,
    "dropping equals masking": equals_masking,
    "kernels equal references": kernels_here,
    "vLLM serves the bundled model": serves,
}


@torch.inference_mode()
def self_test(device: str = "cpu") -> Iterator[Outcome]:
    """Make the checks, one after the other; whatever a check raises is an outcome, too.

    Args:
        device: where the bundled model runs.
    """
    bundled = Bundled(device)
    for name, check in CHECKS.items():
        start = time.perf_counter()
        state: Literal["passed", "failed", "skipped"] = "passed"
        try:
            detail = check(bundled)
        except Skipped as reason:
            state, detail = "skipped", str(reason)
        except SelfTestError as error:
            state, detail = "failed", str(error)
        except Exception as error:  # a broken installation can fail anywhere, and this command is there to say so
            state, detail = "failed", " ".join(f"{type(error).__name__}: {error}".split())
        yield Outcome(name, state, detail, time.perf_counter() - start)
