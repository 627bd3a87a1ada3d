"""What the tests share: tiny random models, the masked oracle, CPU stand-ins for flash-attn, and version switches."""
