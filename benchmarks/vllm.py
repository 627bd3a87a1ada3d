"""vLLM with the plugin at several budgets, and vLLM's own model without it: the same requests, turn by turn.

Two engines live in processes of their own, one with vLLM's class and one with the pruned class, which takes the budget
per request. In each round every setting answers the same pictures at every concurrency, in turning order. Pictures
differ, and no cache of prefixes or processed pictures helps. A second pair of engines has a small KV cache, in which
longer answers do not all find room to the end: how many requests fit, how often one must leave and begin again, and how
many steps all of them take, are counts, which do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, origin, save, significant, spread

NEW = 8  # tokens of an answer
LONG = 96  # likewise, in the small KV cache
BUDGETS = (None, 1.0, 192, 128, 64)  # None: vLLM's own class; 1.0: the plugin, everything kept
CONCURRENCY = (1, 4, 16)
BLOCK = 32
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
ANSWER = "answer: "  # what a worker's lines begin with; vLLM prints, too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=16, help="per setting, concurrency and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=64, help=f"of {BLOCK} tokens, of the small KV cache")
    parser.add_argument("--method", default="divprune")
    parser.add_argument("--small", action="store_true", help="the small KV cache alone; the rest of --out stays")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_cpu.json")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.worker:
        return work(json.loads(options.worker))
    import torch

    result = origin(torch.device("cpu"), options.seed)
    common = {"method": options.method, "seed": options.seed}
    room = small_cache(common, options) | {"commit": result["commit"], "date": result["date"]}
    if options.small:
        save(options.out, json.loads(options.out.read_text()) | {"small_cache": room})
        return 0
    with worker(common | {"pruned": False}) as plain, worker(common | {"pruned": True}) as pruned:
        speed = rounds(plain, pruned, options)
    result |= {
        "command": "python -m benchmarks vllm",
        "vllm": ask_version(),
        "model": "bundled",
        "dtype": "float32",
        "method": options.method,
        "vision_tokens": 576,
        "new_tokens": NEW,
        "requests": options.requests,
        "rounds": options.rounds,
        "block": BLOCK,
        "rows": speed,
        "small_cache": room,
    }
    save(options.out, result)
    sys.stdout.write(f"{options.out}\n")
    return 0


def small_cache(common: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What fits: all requests at once, with answers so long that the cache overflows."""
    names = ("prompt_tokens", "running", "blocks_used", "preemptions", "steps")
    settings = common | {"blocks": options.blocks}
    rows = []
    with worker(settings | {"pruned": False}) as plain, worker(settings | {"pruned": True}) as pruned:
        for keep in BUDGETS:
            one = ask(plain if keep is None else pruned, keep, options.requests, options.requests, 0, LONG)
            rows.append({"keep": keep} | {name: one[name] for name in names})
    return {"blocks": options.blocks, "requests": options.requests, "new_tokens": LONG, "rows": rows}


def rounds(plain: Any, pruned: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting at every concurrency, in turning order."""
    found: dict[tuple[Any, int], list[dict[str, Any]]] = {}
    ask(plain, None, 4, 4, 10**6), ask(pruned, 128, 4, 4, 10**6)  # the first calls are slower
    for turn in range(options.rounds):
        order = BUDGETS if turn % 2 == 0 else BUDGETS[::-1]
        for concurrency in CONCURRENCY:
            for keep in order:
                engine = plain if keep is None else pruned
                one = ask(engine, keep, concurrency, options.requests, turn * len(CONCURRENCY) + concurrency)
                found.setdefault((keep, concurrency), []).append(one)
    rows = []
    for (keep, concurrency), runs in found.items():
        base = found[None, concurrency]
        latencies = [value for one in runs for value in one["latencies"]]
        rows.append(
            {
                "keep": keep,
                "concurrency": concurrency,
                "prompt_tokens": runs[0]["prompt_tokens"],
                "blocks_used": max(one["blocks_used"] for one in runs),
                "requests_per_second": significant(sum(options.requests / one["seconds"] for one in runs) / len(runs)),
                "throughput": spread([b["seconds"] / a["seconds"] for a, b in zip(runs, base, strict=True)]),
                "processor": spread([b["processor"] / a["processor"] for a, b in zip(runs, base, strict=True)]),
                "latency": spread(latencies),
            }
        )
    return sorted(rows, key=lambda row: (row["concurrency"], BUDGETS.index(row["keep"])))


@contextmanager
def worker(settings: dict[str, Any]) -> Iterator[Any]:
    """An engine in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "vllm", "--worker", json.dumps(settings)]
    process = subprocess.Popen(
        command, env=os.environ | QUIET, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        read(process)  # it is ready
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:  # it has nothing more to say
            process.kill()


def ask(process: Any, keep: Any, concurrency: int, requests: int, seed: int, new: int = NEW) -> dict[str, Any]:
    """What one setting did with its requests."""
    asked = {"keep": keep, "concurrency": concurrency, "requests": requests, "seed": seed, "new": new}
    process.stdin.write(json.dumps(asked) + "\n")
    return read(process)


def read(process: Any) -> dict[str, Any]:
    """The next answer of a worker."""
    for line in process.stdout:
        if line.startswith(ANSWER):
            return json.loads(line[len(ANSWER) :])  # type: ignore[no-any-return]
    raise RuntimeError(f"the engine ended with exit code {process.wait()}")


def ask_version() -> str:
    from mustdrop.doctor.serving import installed

    return installed() or "not installed"


def work(settings: dict[str, Any]) -> int:
    """Be an engine: read what to do line by line, and answer."""
    from transformers import AutoProcessor
    from vllm import LLM

    from mustdrop.demo.model import CHECKPOINT

    options: dict[str, Any] = {}
    if settings["pruned"]:
        options["hf_overrides"] = {
            "architectures": ["MustDropLlavaForConditionalGeneration"],
            "mustdrop": {"method": settings["method"], "keep": 1.0},
        }
    if "blocks" in settings:
        options["num_gpu_blocks_override"] = settings["blocks"]
    engine = LLM(
        str(CHECKPOINT),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=16,
        block_size=BLOCK,
        enforce_eager=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        seed=settings["seed"],
        **options,
    )
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    sys.stdout.write(f"{ANSWER}{json.dumps({})}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.write(f"{ANSWER}{json.dumps(serve(engine, processor, **asked))}\n")
        sys.stdout.flush()
    return 0


def prompts(processor: Any, keep: Any, requests: int, seed: int) -> list[dict[str, Any]]:
    """As many questions about as many pictures."""
    from PIL import Image

    from mustdrop.demo.model import prompt
    from mustdrop.demo.scenes import SceneMaker

    maker, made = SceneMaker("heldout", seed), []
    for _ in range(requests):
        scene = maker.scene()
        text = prompt(processor, maker.question(scene, "region2color").text)
        one: dict[str, Any] = {"prompt": text, "multi_modal_data": {"image": Image.fromarray(scene.image)}}
        if keep is not None:
            one["mm_processor_kwargs"] = {"mustdrop_keep": keep}
        made.append(one)
    return made


def serve(
    engine: Any, processor: Any, keep: Any, concurrency: int, requests: int, seed: int, new: int
) -> dict[str, Any]:
    """Answer the requests, `concurrency` at a time; the time of the pictures' processing counts."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    inner = engine.llm_engine
    scheduler = inner.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    waiting = list(enumerate(prompts(processor, keep, requests, seed)))
    begun: dict[str, float] = {}
    latencies, lengths, used, running = [], set[int](), 0, 0
    preempted: dict[str, int] = {}
    steps = 0
    start, processor_start = time.perf_counter(), time.process_time()
    while waiting or begun:
        while waiting and len(begun) < concurrency:
            number, one = waiting.pop(0)
            at = time.perf_counter()
            begun[inner.add_request(f"{keep}-{seed}-{concurrency}-{number:04}", one, sampling)] = at
        for output in inner.step():
            if output.finished:
                name = next(name for name in begun if name.startswith(output.request_id))
                latencies.append(time.perf_counter() - begun.pop(name))
                lengths.add(len(output.prompt_token_ids or ()))
        used, running = max(used, free - pool.get_num_free_blocks()), max(running, len(scheduler.running))
        preempted |= {name: request.num_preemptions for name, request in scheduler.requests.items()}
        steps += 1
    return {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor_start,
        "latencies": [significant(value) for value in latencies],
        "prompt_tokens": max(lengths),
        "blocks_used": used,
        "running": running,
        "preemptions": sum(preempted.values()),
        "steps": steps,
    }
