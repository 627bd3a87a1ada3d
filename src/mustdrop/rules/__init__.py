"""What to drop: small pure functions from scores (or features) to a `Selection`. No model, no Hugging Face."""
