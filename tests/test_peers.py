"""The benchmark against other packages: a peer that cannot be measured says why; what runs here means nothing."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import common, peer_adapters, peers
from benchmarks.peer_adapters import PEERS, TEXT, Peer, Skipped

import generate
from mustdrop.compat import cache_of

KEPT = 192


@contextmanager
def cut_cache(module, model, keep):
    """A peer that works: after the prompt each layer's cache keeps its first entries."""

    def cut(attention, _, named, __):
        layer = cache_of(named).layers[attention.layer_idx]
        if named["hidden_states"].shape[1] > 1:
            layer.keys, layer.values = (t[:, :, : TEXT + keep].clone() for t in (layer.keys, layer.values))

    layers = model.model.language_model.layers
    handles = [layer.self_attn.register_forward_hook(cut, with_kwargs=True) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def refuse(module, model, keep):
    raise TypeError("this model is not supported\nand more lines that nobody needs")
    yield


def install(folder, name, text):
    """A package that pip might have installed."""
    (folder / f"{name}.py").write_text(text)
    about = folder / f"{name}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    install(folder, "peer_fine", "")
    install(folder, "peer_broken", "from transformers import NoSuchModel\n")
    out = folder / "peers_cpu.json"

    def peer(name, apply=None, package="peer_fine"):
        return Peer(name, package, package, "text and vision", "cache", apply, "a remark")

    chosen = (
        peer("missing", cut_cache, package="peer_missing"),
        peer("broken", cut_cache, package="peer_broken"),
        peer("unknown"),
        peer("refusing", refuse),
        peer("idle", lambda *_: nullcontext()),
        peer("fine", cut_cache),
    )
    threads = str(torch.get_num_threads())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(peers, "PEERS", chosen)
        patch.setattr(peers, "BUDGETS", (KEPT,))
        patch.setattr(peers, "OURS", {"random": "prefill", "snapkv": "cache"})
        assert command.main(["peers", "--quick", "--steps", "2", "--threads", threads, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_every_row_has_its_budget(result):
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"random", "snapkv", "fine"}
    for name, row in rows.items():
        cache = row["kv_bytes"]["after_prompt"]
        assert cache["entries_per_layer"] == TEXT + KEPT
        assert cache["stored"] / cache["untouched"] == pytest.approx((TEXT + KEPT) / (TEXT + common.VISION))
        assert row["tokens_per_layer"] == TEXT + (KEPT if name == "random" else common.VISION)
        assert row["first_token"]["speed_up"]["median"] > 0
        assert row["decode"]["tokens_per_second"]["median"] > 0
    assert rows["fine"]["version"] == "1.2"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "peer_missing is not installed"),
        ("broken", "peer_broken 1.2 is installed, but `import peer_broken` fails: ImportError: cannot import name"),
        ("unknown", "peer_fine 1.2 is installed, but this benchmark has no adapter for it"),
        ("refusing", "it fails on this model: TypeError: this model is not supported"),
        ("idle", "it runs and drops nothing: 640 cache entries stay in each layer"),
    ],
)
def test_what_cannot_be_measured_says_why(result, name, reason):
    (row,) = [row for row in result["skipped"] if row["name"] == name]
    assert row["skipped"].startswith(reason)
    assert "\n" not in row["skipped"]


def test_the_command_of_a_run_is_recorded(result):
    words = result["command"].split()
    assert words[:4] == ["python", "-m", "benchmarks", "peers"]
    assert "--seed" in words


def test_the_documents_show_the_result(result):
    text = generate.render("<!-- begin: peers-cpu -->\n<!-- end: peers-cpu -->\n", {"peers_cpu": result})
    assert result["hardware"] in text
    assert "| fine 1.2 | text and vision |" in text
    assert "peer_missing is not installed" in text
    assert "a remark" in text


def test_without_the_result_the_documents_cannot_be_made():
    with pytest.raises(generate.GenerateError, match="'peers-cpu' needs 'peers_cpu'"):
        generate.render("<!-- begin: peers-cpu -->\n<!-- end: peers-cpu -->\n", {})


def test_a_peer_that_is_not_installed_says_so():
    for peer in PEERS:
        with pytest.raises(Skipped, match=peer.package) if peer.version is None else nullcontext():
            peer.load()


def test_a_press_gets_the_budget_and_the_positions_and_leaves_nothing_behind():
    seen = []

    class SnapKVPress:
        def __init__(self, compression_ratio):
            self.kept = int((TEXT + common.VISION) * (1 - compression_ratio))

        @contextmanager
        def __call__(self, model):
            layer = model.model.language_model.layers[0].self_attn
            layer.rotary_emb = torch.nn.Identity()
            handle = layer.register_forward_hook(
                lambda *a: seen.append((self.kept, a[2]["cache_position"][-1].item())), with_kwargs=True
            )
            yield
            handle.remove()

    model = common.build("tiny", torch.device("cpu"), 0)
    before = {name for name, _ in model.named_modules()}
    inputs = common.prompt(model, 0)
    for keep in peers.BUDGETS:
        with (
            torch.inference_mode(),
            peer_adapters.press("SnapKVPress")(SimpleNamespace(SnapKVPress=SnapKVPress), model, keep),
        ):
            model.generate(**inputs, max_new_tokens=2)
    assert seen == [(TEXT + keep, at) for keep in peers.BUDGETS for at in (639, 640)]
    assert {name for name, _ in model.named_modules()} == before
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.language_model.layers)
