"""Models for the evaluation tools of others: lmms-eval and VLMEvalKit. See docs/evaluate-elsewhere.md."""
