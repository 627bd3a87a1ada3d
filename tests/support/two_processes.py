"""One tiny model over two processes of this machine, in tensor parallel; run as ``python -m support.two_processes``.

Each process loads its part of a saved model, does what ``CASES`` say, and writes down what came out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, distributed

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.errors import UnsupportedOptionError

from .builders import LLAMA, anatomy, answer, batch
from .versions import SPLITS_INTO_DTENSORS

PROCESSES, LIMIT = 2, 120
ROWS = (2, 0, 1)  # images per row: padding on the left, and a row of text alone

CASES: dict[str, dict[str, Any]] = {
    "mustdrop": {"method": "mustdrop", "keep": 0.4},
    "thresholds": {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.05)},
    "fastv": {"method": "fastv", "keep": 0.6},
    "sparsevlm": {"method": "sparsevlm", "keep": 0.5},
    "dart": {"method": "dart", "keep": 0.6},
    "h2o": {"method": "h2o", "keep": 0.3},
    "h2o_interval": {"method": "h2o", "keep": 0.3, "interval": 2},
    "tgvkv": {"method": "tgvkv", "keep": 0.3},
    "snapkv": {"method": "snapkv", "keep": 0.3},
    "decode": {"vision": VisionStagePruner(window=3), "decode": DecodeCachePruner(keep=6, interval=2)},
    "visionzip": {"method": "visionzip", "keep": 0.4},
    "tome": {"method": "tome", "keep": 0.4},
}
#: What else is tried: a static cache, eager attention, training, an encoder that is split as well.
VARIED = [
    "mustdrop, static",
    "thresholds, eager",
    "h2o_interval, eager",
    "dart, training",
    "fastv, training",
]
SPLIT_ENCODER = [f"{name}, split encoder" for name in ("mustdrop", "visionzip", "tome")]


def load(folder: Path, **plan: Any) -> Any:
    """The part of the saved model that belongs to this process."""
    if SPLITS_INTO_DTENSORS:
        from transformers.distributed import DistributedConfig

        plan = {"distributed_config": DistributedConfig(tp_size=PROCESSES, tp_plan=plan.get("tp_plan", "auto"))}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype="auto", **(plan or {"tp_plan": "auto"})
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def tower_plan(model: Any) -> dict[str, str]:
    """The plan of transformers, which leaves the encoder whole, and one that splits its attention."""
    styles = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"}
    names = [name for name, _ in model.named_modules() if "vision_tower" in name and ".layers.0.self_attn." in name]
    return model.tp_plan | {name.replace(".0.", ".*."): styles[name.rsplit(".", 1)[1]] for name in names}


def measure(model: Any, name: str) -> dict[str, Any]:
    """Patch as one of ``CASES`` or its variation says, generate, ask again with the cache that is there, unpatch."""
    case, _, variation = name.partition(", ")
    inputs, static = batch(LLAMA, ROWS, seed=5), variation == "static"
    model.set_attn_implementation({"text_config": "eager" if variation == "eager" else "sdpa"})
    mustdrop.patch(model, **CASES[case])
    if variation == "training":
        return _train(model, inputs)
    first = answer(model, inputs, steps=5, **({"cache_implementation": "static"} if static else {}))
    trace = mustdrop.trace(model)
    out = {
        "logits": first.logits,
        "tokens": trace.tokens,
        "kept": [trace.kept(layer, row) for layer in (3, LLAMA.n_layers) for row in range(len(ROWS))],
        "vision": [trace.assignment(row) for row in range(len(ROWS))],
        "entries": trace.kv_vision,
        "bytes": torch.tensor([trace.kv_bytes.actual, trace.kv_bytes.unpruned]),
        "flops": torch.tensor([trace.flops.actual, trace.flops.unpruned]),
    }
    if not static:
        more = torch.randint(2, 100, (len(ROWS), 4), generator=torch.Generator().manual_seed(9))
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.nn.functional.pad(
            inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1
        )
        turn = {"input_ids": ids, "attention_mask": mask}
        out["turn"] = answer(model, turn, steps=2, past_key_values=first.cache).logits
    mustdrop.unpatch(model)
    return out


def _train(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Loss, and the gradient of a weight that every process has as a whole, before all layers."""
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    weight = model.model.multi_modal_projector.linear_2.weight
    out = {"tokens": mustdrop.trace(model).tokens, "loss": loss.detach(), "gradient": weight.grad.clone()}
    model.zero_grad()
    mustdrop.unpatch(model)
    return out


def start(folder: Path) -> list[dict[str, Any]]:
    """What each process wrote down; ``folder`` holds the model."""
    places = [Path(mustdrop.__file__).parents[1], Path(__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    ran = []
    for rank in range(PROCESSES):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "OMP_NUM_THREADS": 1}
        environment = os.environ | {key: str(value) for key, value in own.items()}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, places)), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "support.two_processes", str(folder)]
        with (folder / f"{rank}.log").open("w") as log:
            ran.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=LIMIT) for process in ran]
    finally:
        for process in ran:
            process.kill()
    assert not any(codes), "\n".join((folder / f"{rank}.log").read_text() for rank in range(PROCESSES))
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def _work(folder: Path) -> dict[str, Any]:
    model = load(folder)
    if not SPLITS_INTO_DTENSORS:
        try:
            mustdrop.patch(model)
        except UnsupportedOptionError as error:
            return {"refused": str(error)}
        return {}
    inputs = batch(LLAMA, ROWS, seed=5)
    out = {name: measure(model, name) for name in VARIED}  # static caches leave notes on a model
    plain, before = answer(model, inputs).logits, anatomy_of(model)
    out |= {name: measure(model, name) for name in CASES}
    out["unpatched"] = {"same": before == anatomy_of(model), "logits": answer(model, inputs).logits, "before": plain}
    model = load(folder, tp_plan=tower_plan(model))
    return out | {name: measure(model, name) for name in SPLIT_ENCODER}


def anatomy_of(model: Any) -> dict[str, Any]:
    """What patching could leave behind, without the addresses of weights, which a `DTensor` does not have."""
    found = anatomy(model)
    for part in found.values():
        if isinstance(part, dict):
            part.pop("parameters", None)
    return found


def main() -> None:
    """One process."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    torch.save(_work(folder), folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
