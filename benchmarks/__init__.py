"""What the library must reach, measured. `python -m benchmarks` lists the benchmarks; see README.md."""
