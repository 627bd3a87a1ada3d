"""What `torch.compile` and recordings see of a patched model: straight passes, decode steps, and when they hold."""
