"""What the app looks like: gradio's components around a `Session`."""

from __future__ import annotations

import html
import logging
import random
from typing import Any

import gradio as gr

from mustdrop.app.requests import Request
from mustdrop.app.session import Outcome, Row, Session, message, scene
from mustdrop.errors import MustDropError

log = logging.getLogger(__name__)
SEED = 7  # of the scene that is there at the start
WAITING = 16  # questions in the queue

CSS = """
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem }
.answers section { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .75rem }
.answers h3 { margin: 0 0 .25rem; font-size: 1rem }
.answers p { margin: 0; font-size: 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere }
.costs { overflow-x: auto } .costs table { width: 100%; border-collapse: collapse }
.costs th, .costs td { text-align: left; padding: .3rem .6rem; border-top: 1px solid var(--border-color-primary) }
iframe.kept { width: 100%; height: 46rem; border: 1px solid var(--border-color-primary); border-radius: .5rem }
"""


def as_file(component: Any) -> Any:
    """A component that hands over the file that was uploaded: `Session` reads it, with limits and messages of its own.

    It is no subclass: of these gradio writes stubs beside their source.
    """

    def path(given: Any) -> Any:
        return None if given is None else getattr(given, "video", given).path

    component.preprocess = path
    return component


def build(session: Session) -> gr.Blocks:
    """The page.

    Args:
        session: what answers.
    """
    first, question = scene(SEED)
    with gr.Blocks(title="mustdrop", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(
            "# mustdrop\nAsk about a picture or a video, with all vision tokens and with some of them. The bundled "
            "model knows scenes of coloured digits, and nothing of the world."
        )
        with gr.Row():
            with gr.Column(scale=1):
                kind = gr.State("picture")  # the tab that is open says what the question is about
                with gr.Tab("Picture", elem_id="picture-tab") as picture_tab:
                    sources: Any = ["upload", "webcam", "clipboard"]
                    picture = as_file(
                        gr.Image(first, label="Picture", sources=sources, elem_id="picture", format="png")
                    )
                with gr.Tab("Video", elem_id="video-tab") as video_tab:
                    clip: Any = ["upload", "webcam"]
                    video = as_file(gr.Video(label="Video", sources=clip, elem_id="video", include_audio=False))
                    frames = gr.Slider(1, session.limits.frames, 8, step=1, label="Frames")
                text = gr.Textbox(question, label="Question", elem_id="question", max_length=session.limits.letters)
                model = gr.Dropdown(session.names, value=session.names[0], label="Model", elem_id="model")
                methods = gr.Dropdown(
                    session.methods(),
                    value=["mustdrop"],
                    multiselect=True,
                    max_choices=session.limits.methods,
                    label="Methods",
                    elem_id="methods",
                )
                budget = gr.Slider(
                    2, 100, 25, step=1, label="Budget: % of the vision tokens, average per layer", elem_id="budget"
                )
                length = gr.Slider(1, session.limits.new_tokens, 32, step=1, label="Most tokens of the answer")
                with gr.Row():
                    another = gr.Button("Another scene", elem_id="another")
                    button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=2):
                shown = gr.HTML(elem_id="outcome")

        def ask(
            name: str,
            tab: str,
            image: str | None,
            film: str | None,
            words: str,
            chosen: list[str] | None,
            percent: float,
            most: float,
            taken: float,
        ) -> str:
            request = Request(
                question=words or "",
                pictures=[] if image is None or tab == "video" else [image],
                video=film if tab == "video" else None,
                methods=tuple(chosen or ()),
                keep=float(percent) / 100,
                frames=int(taken),
                new_tokens=int(most),
            )
            try:
                return markup(session.ask(name, request))
            except Exception as error:
                if not isinstance(error, MustDropError):
                    log.exception("a question failed")
                raise gr.Error(html.escape(message(error)), print_exception=False) from None

        def draw() -> tuple[Any, str, None]:
            return *scene(random.randrange(1 << 16)), None

        picture_tab.select(lambda: "picture", None, kind, api_name=False)
        video_tab.select(lambda: "video", None, kind, api_name=False)
        given: list[Any] = [model, kind, picture, video, text, methods, budget, length, frames]
        gr.on([button.click, text.submit], ask, given, shown, api_name="ask", concurrency_limit=1)
        another.click(draw, None, [picture, text, video], api_name=False)
    return blocks.queue(max_size=WAITING)


def markup(outcome: Outcome) -> str:
    """Answers side by side, what they took, and the page of what was kept; whatever a model says is text."""
    answers = "".join(
        f"<section><h3>{html.escape(row.name)}</h3><p>{html.escape(row.answer) or '(nothing)'}</p></section>"
        for row in outcome.rows
    )
    peak = any(row.peak for row in outcome.rows)
    heads = ["", "vision tokens per layer", "seconds", "FLOPs of the prompt", "KV cache", *(["memory"] if peak else [])]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = "".join(_line(row, peak) for row in outcome.rows)
    page = html.escape(outcome.page, quote=True)
    return (
        f'<div class="answers">{answers}</div>'
        f'<div class="costs"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
        f'<iframe class="kept" title="What each method keeps" sandbox="allow-scripts" srcdoc="{page}"></iframe>'
    )


def _line(row: Row, peak: bool) -> str:
    cells = [f"{row.tokens:.1f} of {row.total}", f"{row.seconds:.2f}", f"{row.flops:.0%}", row.stored]
    cells += [row.peak] if peak else []
    return f'<tr><th scope="row">{html.escape(row.name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def launch(blocks: gr.Blocks, session: Session, **options: Any) -> Any:
    """Start serving: what `Blocks.launch` returns.

    Args:
        blocks: the page.
        session: for its limits.
        **options: of `Blocks.launch`, which win.
    """
    largest = max(session.limits.picture_bytes, session.limits.video_bytes)
    own: dict[str, Any] = {
        "max_file_size": largest,
        "css": CSS,
        "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        "share": False,
        "ssr_mode": False,
        "footer_links": [],
    }
    return blocks.launch(**(own | options))
