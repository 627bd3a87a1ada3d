"""The vision stage in a running model: from the encoder's layers to the marks in its features."""
