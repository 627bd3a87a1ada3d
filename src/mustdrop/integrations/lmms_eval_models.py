"""The models that lmms-eval loads as `mustdrop_hf`; see `mustdrop.integrations.lmms_eval`."""

from __future__ import annotations

import json
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from mustdrop.errors import ConfigError, UnsupportedOptionError
from mustdrop.integrations import generation
from mustdrop.integrations.answering import Answer, Answerer, batches
from mustdrop.integrations.conversations import Conversation, kinds, user
from mustdrop.media_limits import MediaLimits

IMAGE_WORD = "<image>"  # what lmms-eval's simple tasks write where an image belongs


class _MustDrop(lmms):
    """Any model of the hub that mustdrop has an adapter for.

    Args:
        pretrained: hub id or folder; "bundled" is the tiny model that comes with mustdrop.
        method: name of the method (`mustdrop methods` lists them); "none" is the unpruned model.
        keep: average retained tokens per layer, tokens or share.
        batch_size: prompts at a time.
        device: where the model runs; by default a GPU if there is any. Under `accelerate launch` each process has its
            own.
        device_map: as in `from_pretrained`, in place of `device`.
        dtype: "auto", "float32", "bfloat16" or "float16".
        attn_implementation: attention implementation.
        max_num_frames: frames of a video that the model sees; with `fps`, the most.
        fps: frames that are taken of a second of a video.
        min_pixels: area of a picture, and of a frame of a video, to which smaller ones are enlarged.
        max_pixels: area of a picture, and of a frame of a video, to which larger ones are shrunk.
        total_pixels: area of all frames of a video together, to which longer ones are shrunk.
        system_prompt: text, or name of a file with it.
        revision: of the model on the hub.
        trust_remote_code: as in `from_pretrained`.
        max_batch_size: lmms-eval always passes it; there is no automatic batch size here.
        **knobs: all others are settings of the method.
    """

    def __init__(
        self,
        pretrained: str = "bundled",
        method: str = "mustdrop",
        keep: int | float | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        max_num_frames: int | None = None,
        fps: float | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        system_prompt: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
        **knobs: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r}: mustdrop_hf expects a number of prompts, 1 or more.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        options = {"device_map": device_map, "revision": revision, "trust_remote_code": trust_remote_code or None}
        self.answerer = Answerer(
            pretrained,
            method,
            keep,
            {name: _knob(name, value) for name, value in knobs.items()},
            MediaLimits(max_num_frames, fps, min_pixels, max_pixels, total_pixels),
            device=device,
            dtype=dtype,
            attention=attn_implementation,
            **{name: value for name, value in options.items() if value is not None},
        )
        self._device = self.answerer.model.device
        self.batch_size = int(batch_size)
        self.system_prompt = None if system_prompt is None else self._resolve_system_prompt(system_prompt)
        self._told: set[str] = set()

    @property
    def model(self) -> Any:
        """The patched model."""
        return self.answerer.model

    @property
    def config(self) -> Any:
        """Configuration of the model."""
        return self.answerer.model.config

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the model."""
        return self.answerer.processor.tokenizer

    @property
    def device(self) -> Any:
        """Device of the model."""
        return self._device

    def clean(self) -> None:
        """Let the model go: lmms-eval calls this before it scores, and the memory may be needed for a judge."""
        self.answerer.release()
        super().clean()

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer every request; the answers come in the order of the requests.

        Args:
            requests: lmms-eval's instances of type "generate_until".
        """
        if not requests:
            return []
        options = [self._options(request) for request in requests]
        chats = [self._conversation(request) for request in requests]
        found: dict[int, Answer] = {}

        def run(chunk: list[int]) -> list[Answer]:
            given, until = options[chunk[0]]
            return self.answerer.answer([chats[i] for i in chunk], until, **given)

        def key(i: int) -> tuple[str, tuple[str, ...]]:
            return repr(options[i]), kinds(chats[i])

        bar = self._bar(len(requests))
        for i, answer in batches(range(len(requests)), self.batch_size, key, run):
            found[i] = answer
            self.cache_hook.add_partial("generate_until", (requests[i].args[0], self._kwargs(requests[i])), answer.text)
            bar.update(1)
        bar.close()
        self._tell()
        counts = {i: TokenCounts(input_tokens=a.prompt_tokens, output_tokens=a.tokens) for i, a in found.items()}
        return [GenerationResult(text=found[i].text, token_counts=counts[i]) for i in range(len(requests))]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Score a given answer to every request.

        As in lmms-eval's own models, the number is the mean negative log-likelihood of the answer's tokens: its
        multiple-choice tasks choose the smallest.

        Args:
            requests: lmms-eval's instances of type "loglikelihood".

        Returns:
            In the order of the requests: the number, and whether greedy decoding would give this answer.
        """
        chats, answers = [], []
        for request in requests:
            context, answer, *rest = request.args
            doc = self._doc(*rest[-3:]) if rest else None
            visuals = (rest[0](doc) or []) if rest else []  # without a prompt, for mutual information
            chats.append(self._with_system(user(visuals, context, IMAGE_WORD)))
            answers.append(answer if isinstance(answer, str) else answer(doc))
        bar = self._bar(len(requests))
        found: dict[int, tuple[float, bool]] = {}

        def run(chunk: list[int]) -> list[tuple[float, bool]]:
            return self.answerer.score([chats[i] for i in chunk], [answers[i] for i in chunk])

        for i, score in batches(range(len(requests)), self.batch_size, lambda i: kinds(chats[i]), run):
            found[i] = score
            self.cache_hook.add_partial("loglikelihood", (requests[i].args[0], answers[i]), score)
            bar.update(1)
        bar.close()
        self._tell()
        return [_pair(found[i]) for i in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Refused: what a task says next depends on the answer.

        Raises:
            UnsupportedOptionError: always.
        """
        raise UnsupportedOptionError(
            "mustdrop_hf cannot run tasks of output_type generate_until_multi_round: expected generate_until, "
            "loglikelihood or multiple_choice. Choose another task."
        )

    def _kwargs(self, request: Any) -> dict[str, Any]:
        """Generation settings of a request."""
        raise NotImplementedError

    def _conversation(self, request: Any) -> Conversation:
        """The chat of a request."""
        raise NotImplementedError

    def _doc(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _with_system(self, conversation: Conversation) -> Conversation:
        if not self.system_prompt or conversation[0]["role"] == "system":
            return conversation
        return [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}, *conversation]

    def _options(self, request: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Arguments of `generate`, and stop words; what is left out is told once."""
        options, until, unknown = generation.arguments(self._kwargs(request))
        for name in unknown.keys() - self._told:
            self._told.add(name)
            logger.warning(f"mustdrop_hf leaves out the task's generation setting {name}={unknown[name]!r}.")
        return options, until

    def _bar(self, total: int) -> Any:
        return tqdm(total=total, disable=self._rank != 0, desc="mustdrop_hf")

    def _tell(self) -> None:
        kept = self.answerer.kept
        logger.info(f"mustdrop_hf, process {self._rank}: {kept}.")
        log_metrics(
            total_gen_tokens=kept.answered,
            total_elapsed_time=kept.seconds,
            avg_speed=kept.answered / kept.seconds if kept.seconds else 0.0,
            additional_metrics={"equal_tokens": kept.equal / kept.prompts} if kept.prompts else None,
        )


class MustDropSimple(_MustDrop):
    """For `--force_simple` and for tasks of log-likelihoods: media first, or where the text says `<image>`."""

    is_simple = True

    def _kwargs(self, request: Any) -> dict[str, Any]:
        return dict(request.args[1])

    def _conversation(self, request: Any) -> Conversation:
        context, _, doc_to_visual, *place = request.args
        return self._with_system(user(doc_to_visual(self._doc(*place)) or [], context, IMAGE_WORD))


class MustDropChat(_MustDrop):
    """For chat tasks: the messages of the task, with media where it puts them."""

    is_simple = False

    def _kwargs(self, request: Any) -> dict[str, Any]:
        return dict(request.args[2])

    def _conversation(self, request: Any) -> Conversation:
        _, doc_to_messages, _, *place = request.args
        messages = doc_to_messages(self._doc(*place))
        return self._with_system([_message(message) for message in messages])


def _knob(name: str, value: Any) -> Any:
    """lmms-eval makes numbers and booleans of arguments; lists and none are still text."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    if not value.startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise ConfigError(f"{name}={value}: expected numbers in brackets, e.g. {name}=[2,6,10].") from None


def _pair(score: tuple[float, bool]) -> Any:
    """A score as the installed lmms-eval takes it: 0.7.3 writes a bare pair out as text, and then cannot read it."""
    return score if unwrap_generation_output(score)[0] == score else GenerationResult(text=score)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content]
    return {"role": message["role"], "content": parts}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval keeps every medium under `url`; a frame range of a video is not for every processor."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    url = part["url"]
    if isinstance(url, dict) or part.get("start_time") is not None or part.get("end_time") is not None:
        raise UnsupportedOptionError("mustdrop_hf cannot take a part of a video: cut the file before.")
    return {"type": part["type"], part["type"]: url}
