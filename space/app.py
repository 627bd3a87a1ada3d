"""The app for Hugging Face Spaces: `mustdrop app`, with the models of MUSTDROP_MODELS beside the bundled one."""

from __future__ import annotations

import os

from mustdrop.app.page import build, launch
from mustdrop.app.session import Session

session = Session(os.environ.get("MUSTDROP_MODELS", "").split())
demo = build(session)

if __name__ == "__main__":
    launch(demo, session)  # a Space says by GRADIO_SERVER_NAME that others may come in; elsewhere nobody else may
