"""`mustdrop app`: a page in the browser where one asks about pictures and videos, with pruning and without."""

from __future__ import annotations

from typing import Annotated

import typer

from mustdrop.errors import ConfigError

LOOPBACK = "127.0.0.1"


def app(
    model: Annotated[
        list[str] | None, typer.Option(help="Hub id or folder of a model to offer beside the bundled ones; several.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights of --model: auto, float32, bfloat16, float16.")] = "auto",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Ask about pictures and videos in a browser: answers with all vision tokens and with some, side by side.

    Only this machine can reach the page, unless --host says otherwise. Uploads are bounded in size. Needs the extra
    `app`.

    Examples:
        python -m mustdrop app

        python -m mustdrop app --model Qwen/Qwen2.5-VL-3B-Instruct
    """
    from mustdrop.extras import need

    need("gradio", "app", "`mustdrop app`")

    from transformers.utils import logging

    from mustdrop.app.page import build, launch
    from mustdrop.app.session import Session
    from mustdrop.cli.common import check_run

    check_run([], [], device, dtype)
    logging.disable_progress_bar()
    session = Session(model or [], device=device, dtype=dtype)
    try:
        launch(build(session), session, server_name=host, server_port=port or free(host), inbrowser=open_browser)
    except OSError as error:  # gradio's message speaks of a range of ports
        raise ConfigError(f"cannot listen on {host}, port {port}: {error}. Choose another --port, or 0.") from None


def free(host: str) -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])
