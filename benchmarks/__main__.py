"""`python -m benchmarks NAME ...` runs a benchmark; without a name it lists them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name -> what it measures; the module of that name has `add_arguments(parser)` and `run(options) -> exit status`
BENCHMARKS = {
    "captured": "the prompt's pass replayed as one CUDA graph (mustdrop.compile), beside the same pass as it is",
    "end_to_end": "speed, FLOPs and KV bytes of a patched model against the same model unpatched",
    "evaluation": "scores, tokens and shares of time of the bundled model on its own benchmark",
    "install": "bytes to download, sizes of what is built and seconds of an import, each within its bound",
    "gpu": "everything that needs a GPU, inside ten minutes, on a machine with nothing but torch on it",
    "host_time": "processor time of a first token with tiny widths, patched beside untouched: what the host pays",
    "kernels": "time, bandwidth, FLOP/s and share of the roofline of every operation, beside eager PyTorch",
    "kernels_aot": "registers, spills and shared memory of every kernel, compiled for GPUs that need not be there",
    "launches": "operations of a prefill and a decode step by place, waits and copies, of every method, without a GPU",
    "packed_encoder": "time against FLOPs where patches leave a packed encoder: before its layers, inside, after it",
    "page_model": "a second demo model, a Qwen3-VL: trains it, writes its folder, measures it on held-out samples",
    "method_time": "what every method itself takes of the time to the first token, on both bundled models",
    "peers": "speed and KV bytes beside what pip can install instead, in one run",
    "prompt_length": "first token by length of the prompt, from 144 to 2,880 vision tokens, on a CPU",
    "serving": "time to the first token by parts, decoding and memory, by model, attention, batch and budget",
    "vllm": "throughput, latency and KV cache of vLLM with the plugin and without, at several budgets",
    "scorers": "the scorers bundled with the bundled models: trains them on training samples, and puts them there",
    "quality": "accuracy on scenes and fidelity to the unpruned model, of every method at every budget",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run a benchmark of mustdrop.")
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    for name, summary in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if arguments[:1] == [name]:  # torch is imported for what runs, not for the list
            importlib.import_module(f"benchmarks.{name}").add_arguments(command)
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    return int(importlib.import_module(f"benchmarks.{options.name}").run(options))


if __name__ == "__main__":
    sys.exit(main())
