"""The OpenAI server over the loopback interface, with the plugin turned on by one environment variable."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from mustdrop.demo.model import CHECKPOINT
from mustdrop.demo.scenes import SceneMaker
from mustdrop.integrations.vllm import VARIABLE
from support import engines, servers

KEEP, ALL = 128, 576
# Bytes that 300 more requests may take, which leaves room for what an allocator rounds up (1,200 requests took 50 MiB).
# Their pictures alone, as the encoder takes them, are 126 MiB.
GROWN = 64 * 2**20
COUNTED = ("mustdrop:vision_tokens_total", "mustdrop:vision_tokens_kept_total")


def scenes(number, seed=7):
    maker = SceneMaker("heldout", seed)
    found = []
    for _ in range(number):
        scene = maker.scene()
        asked = maker.question(scene, "region2color")
        found.append((Image.fromarray(scene.image), asked.text, asked.answer))
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Its address, its process and the file of its log."""
    port = servers.free_port()
    environment = os.environ | engines.QUIET | {VARIABLE: json.dumps({"method": "divprune", "keep": KEEP})}
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(CHECKPOINT), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--served-model-name", "bundled", "--trust-request-mm-kwargs", "--max-num-seqs", "8"]
    command += ["--limit-mm-per-prompt", '{"image": 1}']
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        servers.wait(address, process, log)
        yield SimpleNamespace(address=address, process=process, log=log)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def server(started):
    """Its address."""
    return started.address


def body(picture, text, kind="PNG", **more):
    made = io.BytesIO()
    picture.save(made, kind)
    data = base64.b64encode(made.getvalue()).decode()
    url = f"data:image/{kind.lower()};base64,{data}"
    return message(url, text, **more)


def message(url, text, **more):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    options = {"model": "bundled", "temperature": 0, "max_tokens": 6, "add_special_tokens": True}
    return options | {"messages": chat} | more


def post(address, asked, timeout=servers.SECONDS):
    data, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", data, kind), timeout=timeout)


def answer(address, asked):
    found = json.load(post(address, asked))
    return found["choices"][0]["message"]["content"].strip(), found["usage"]["prompt_tokens"]


def metric(address, name):
    text = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_nothing_is_counted_before_the_first_prompt(server):
    """What vLLM measures its memory with is no prompt. This test runs first."""
    assert [metric(server, name) for name in COUNTED] == [0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_answers_and_usage(server, kind):
    asked = scenes(6)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        few = list(pool.map(lambda one: answer(server, body(one[0], one[1], kind)), asked))
        own = {"mm_processor_kwargs": {"mustdrop_keep": ALL}}
        whole = list(pool.map(lambda one: answer(server, body(one[0], one[1], kind, **own)), asked))
    assert all(a[1] - b[1] == ALL - KEEP for a, b in zip(whole, few, strict=True))
    assert sum(got[0] == one[2] for got, one in zip(few, asked, strict=True)) >= 5


def test_a_streaming_answer(server):
    picture, text, truth = scenes(1)[0]
    asked = body(picture, text, stream=True, stream_options={"include_usage": True})
    said, usage = "", None
    for line in post(server, asked):
        if line.startswith(b"data: {"):
            part = json.loads(line[6:])
            said += "".join(choice["delta"].get("content") or "" for choice in part["choices"])
            usage = part.get("usage") or usage
    assert said.strip() == truth
    assert usage["prompt_tokens"] < ALL


def test_faulty_requests_get_a_400_and_the_next_one_is_answered(server):
    picture, text, truth = scenes(1)[0]
    broken = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    faulty = [message(broken, text)]
    faulty += [body(picture, text, mm_processor_kwargs={"mustdrop_keep": keep}) for keep in (0, -1, 1.5, "many", None)]
    for asked in faulty:
        with pytest.raises(urllib.error.HTTPError) as raised:
            post(server, asked)
        assert raised.value.code == 400
        assert raised.value.read()
        assert answer(server, body(picture, text))[0] == truth


def test_metrics_count_vision_tokens(server):
    before = [metric(server, name) for name in COUNTED]
    picture, text, _ = scenes(1, seed=11)[0]
    answer(server, body(picture, text))
    after = [metric(server, name) for name in COUNTED]
    assert [b - a for a, b in zip(before, after, strict=True)] == [ALL, KEEP]


def test_the_log_says_once_what_is_kept_and_what_it_did(started):
    answer(started.address, body(*scenes(1)[0][:2]))
    log = started.log.read_text()
    assert log.count(f"mustdrop: divprune keeps {KEEP} tokens of every image and video") == 1
    assert log.count(f"mustdrop: the first prompt has {ALL} vision tokens, of which {KEEP} stay") == 1


def rush(server, asked, number):
    """Many requests of eight clients, of whom a third hang up; the answers of the others, by number."""
    source = random.Random(0)
    impatient = [source.random() < 0.3 for _ in range(number)]

    def one(i):
        picture, text, _ = asked[i % len(asked)]
        if not impatient[i]:
            return answer(server, body(picture, text))
        try:
            post(server, body(picture, text, max_tokens=200), timeout=0.05)
        except (TimeoutError, urllib.error.URLError, ConnectionError):
            return None
        return None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        said = list(pool.map(one, range(number)))
    end = time.monotonic() + 60
    while metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting{"):
        assert time.monotonic() < end, "requests are stuck"
        time.sleep(1)
    assert metric(server, "vllm:kv_cache_usage_perc") < 0.01
    return {i: got for i, got in enumerate(said) if not impatient[i]}


def memory(process):
    """Bytes that the server's processes hold."""
    whole = psutil.Process(process.pid)
    return sum(one.memory_info().rss for one in [whole, *whole.children(recursive=True)])


def test_three_hundred_requests_of_which_a_third_hang_up(started):
    server, asked = started.address, scenes(20, seed=13)
    first = answer(server, body(*asked[0][:2]))
    rush(server, asked, 100)
    before = memory(started.process)
    patient = rush(server, asked, 300)
    grown = memory(started.process) - before
    assert all(patient.values())
    assert patient[next(i for i in range(0, 300, 20) if i in patient)] == first
    assert answer(server, body(*asked[0][:2])) == first
    assert grown < GROWN, f"{grown / 2**20:.1f} MiB more after 300 requests"
